"""What may be wrong with a data set though every image can be read: proposals for people to look at."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice, product
from typing import Any

import numpy as np

_FAR_PIXELS, _FAR_SHAPE = 16.0, 4.0  # factors between an image and the median that are never far below this
_DEVIATIONS = 6.0  # robust standard deviations from the median
_RARE_FORMAT, _COMMON_FORMAT = 0.01, 0.9  # shares of the images
_LEAK_IN_CLASS, _LEAK_IN_OTHERS = 0.9, 0.1  # shares of a class's images and, on average, of the other classes' images
_LEAK_IMAGES = 5  # fewer images of a class may look the same by chance
_FORMS = 16  # singular forms of a name that are tried

# Signs between two numbers are part of a number, as in 1.5 or 10-20.
_SEPARATOR = re.compile(r"\.?[\s_]+|(?<=[^\W\d])[-/.&]+(?=\w)|(?<=\w)[-/.&]+(?=[^\W\d])")

_IRREGULAR = {
    "calves": "calf",
    "children": "child",
    "feet": "foot",
    "geese": "goose",
    "halves": "half",
    "knives": "knife",
    "leaves": "leaf",
    "loaves": "loaf",
    "men": "man",
    "mice": "mouse",
    "people": "person",
    "scarves": "scarf",
    "shelves": "shelf",
    "teeth": "tooth",
    "wolves": "wolf",
    "women": "woman",
}


def similar_names(names: Sequence[str]) -> list[list[str]]:
    """Returns groups of names that seem to mean the same class, in the order of `names`.

    Names match if they differ only in capitals, accents, separators ("fire_truck", "Fire Truck") or the plural
    ("cat", "cats"). Numbers and other signs count ("class1" and "class2", "c" and "c++"), and single letters are all
    different.
    """
    exact: dict[str, list[int]] = defaultdict(list)
    words = [_words(name) for name in names]
    for index, of_name in enumerate(words):
        exact[_joined(of_name)].append(index)
    group = list(range(len(names)))

    def root(index: int) -> int:
        while group[index] != index:
            index = group[index]
        return index

    for index, of_name in enumerate(words):
        for forms in islice(product(*map(_singulars, of_name)), _FORMS):
            key = _joined(forms)
            for other in exact.get(key, ()) if len(key) > 1 else ():
                group[root(other)] = root(index)
    found: dict[int, list[str]] = defaultdict(list)
    for index, name in enumerate(names):
        found[root(index)].append(name)
    return [members for members in found.values() if len(members) > 1]


def _words(name: str) -> list[str]:
    """The words of a name, in small letters and without accents on Latin letters."""
    decomposed = unicodedata.normalize("NFKD", name)
    # In other scripts a mark makes another letter.
    plain = unicodedata.normalize("NFC", re.sub(r"(?<=[A-Za-z])[\u0300-\u036f]+", "", decomposed)).casefold()
    plain = re.sub(r"['’]", "", plain).strip(" _\t\n.")
    return [word for word in _SEPARATOR.split(plain) if word]


def _joined(words: Sequence[str]) -> str:
    """Joins words without a separator, except between numbers: "1 5" is not "15"."""
    joined = ""
    for word in words:
        joined += f" {word}" if joined[-1:].isdigit() and word[:1].isdigit() else word
    return joined


def _singulars(word: str) -> Iterator[str]:
    """Yields a word and the words of which it may be the English plural."""
    yield word
    if word in _IRREGULAR:
        yield _IRREGULAR[word]
    elif len(word) >= 4 and word.isalpha() and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        yield word[:-1]
        if word.endswith("ies") and len(word) > 4:
            yield f"{word[:-3]}y"
        elif word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
            yield word[:-2]


def far_sizes(sizes: np.ndarray) -> list[tuple[int, str]]:
    """Returns the indices of images with far more or fewer pixels than the others, or a far longer shape, and why.

    Ignores broken images, whose `sizes` (N, 2) are 0.
    """
    whole = np.flatnonzero(sizes.min(axis=1, initial=1) > 0)
    if not whole.size:
        return []
    width, height = sizes[whole].astype(float).T
    pixels, shape = np.log(width * height), np.log(width / height)
    median = float(np.exp(np.median(pixels)))
    found = []
    for place in np.flatnonzero(_far(pixels, _FAR_PIXELS) | _far(shape, _FAR_SHAPE)).tolist():
        size = f"{width[place]:.0f} x {height[place]:.0f} pixels"
        factor = float(np.exp(pixels[place])) / median
        if _far(pixels, _FAR_PIXELS)[place]:
            said = f"{factor:,.0f} times" if factor > 1 else f"1/{1 / factor:,.0f} of"
            found.append((int(whole[place]), f"{size}, {said} the median number of pixels"))
        else:
            found.append((int(whole[place]), f"{size}, an unusual shape"))
    return found


def _far(values: np.ndarray, factor: float) -> np.ndarray:
    """Which logarithms (N,) are far from their median: by `factor`, and by several robust standard deviations."""
    distance = np.abs(values - np.median(values))
    return distance >= max(np.log(factor), _DEVIATIONS * 1.4826 * float(np.median(distance)))


def rare_formats(formats: np.ndarray) -> list[tuple[int, str]]:
    """Returns the indices of images with a rare format, if nearly all have another one, and their formats.

    Ignores broken images, whose `formats` (N,) are empty.
    """
    whole = np.flatnonzero(formats != "")
    if not whole.size:
        return []
    names, codes, counts = np.unique(formats[whole].astype(str), return_inverse=True, return_counts=True)
    shares = counts / len(whole)
    if shares.max() < _COMMON_FORMAT:
        return []
    rare = np.flatnonzero(shares[codes] <= _RARE_FORMAT)
    common = names[shares.argmax()]
    return [(int(whole[place]), f"{names[codes[place]]}; nearly all images are {common}") for place in rare.tolist()]


def leaks(labels: np.ndarray, formats: np.ndarray, sizes: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns classes whose training images nearly all have one format or size that the other classes lack.

    A model can tell such a class by how its images were made, and not by what they show. Takes the training images
    (N,) that can be read. The other classes count alike, however many images they have.
    """
    kinds = {"format": formats.astype(str), "size": np.array([f"{w} x {h} pixels" for w, h in sizes.tolist()], str)}
    images = np.bincount(labels, minlength=len(names))
    found = []
    for kind, values in kinds.items():
        if not len(values):
            continue
        existing, codes = np.unique(values, return_inverse=True)
        pairs, counts = np.unique(labels * len(existing) + codes, return_counts=True)
        label, code = np.divmod(pairs, len(existing))
        share = counts / images[label]
        total = np.bincount(code, share, minlength=len(existing))
        others = (total[code] - share) / max(1, np.count_nonzero(images) - 1)
        leak = (share >= _LEAK_IN_CLASS) & (others <= _LEAK_IN_OTHERS) & (images[label] >= _LEAK_IMAGES)
        found += [
            {
                "class": names[label[place]],
                "kind": kind,
                "value": str(existing[code[place]]),
                "images": int(counts[place]),
                "of": int(images[label[place]]),
                "share_in_other_classes": float(others[place]),
            }
            for place in np.flatnonzero(leak).tolist()
        ]
    return found
