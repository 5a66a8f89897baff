"""Clipart-LT: a long-tailed benchmark of real drawings, from Debian's package openclipart-png.

The drawings are in the public domain, so the benchmark needs no licence.
"""

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.annotation_lists import CLASS_NAMES
from data.groups import content_digest
from data.reading import MAX_IMAGE_PIXELS

_NO_SUBJECT = ("special", "unsorted", "logos", "buttons")  # folders whose drawings share no subject
_FEWEST = 12  # drawings of a class
_MOST_TESTED = 20  # drawings of a class
Drawings = dict[str, list[str]]


def find_drawings(folder: Path) -> Drawings:
    """Paths of the drawings of each class, relative to `folder`.

    A class is two folders deep, as "animals/birds"; drawings directly in a folder are "animals/other". Equal files
    count once, the first by path. Drawings with more pixels than the usual limit are left out. Raises FileNotFoundError
    without drawings, with the remedy.
    """
    paths = sorted(path for path in folder.rglob("*.png") if path.is_file())
    if not paths:
        raise FileNotFoundError(
            f"{folder} has no drawings: apt-get install openclipart-png, or name their folder by --data_dir"
        )
    classes: Drawings = {}
    for parts in _distinct(folder, paths, with_subject=True):
        name = f"{parts[0]}/{parts[1] if len(parts) > 2 else 'other'}"
        classes.setdefault(name, []).append("/".join(parts))
    return {name: paths for name, paths in sorted(classes.items()) if len(paths) >= _FEWEST}


def find_left_out(folder: Path) -> list[str]:
    """Paths, relative to `folder`, of the drawings that `find_drawings` leaves out because they share no subject.

    Some of them show what a class shows. Equal files count once, and not at all if one of them has a subject.
    """
    paths = sorted(path for path in folder.rglob("*.png") if path.is_file())
    paths.sort(key=lambda path: path.relative_to(folder).parts[0] in _NO_SUBJECT)
    return ["/".join(parts) for parts in _distinct(folder, paths) if parts[0] in _NO_SUBJECT]


def _distinct(folder: Path, paths: Sequence[Path], with_subject: bool = False) -> Iterator[tuple[str, ...]]:
    """The parts of the paths of distinct drawings, the first of equal files."""
    seen = set()
    for path in paths:
        parts = path.relative_to(folder).parts
        if len(parts) < 2 or (with_subject and parts[0] in _NO_SUBJECT):
            continue
        content = path.read_bytes()
        digest = content_digest(content)
        if digest in seen or len(content) < 24:  # the length of the signature and the first chunk, up to the size
            continue
        width, height = struct.unpack(">II", content[16:24])
        if width * height > MAX_IMAGE_PIXELS:
            continue
        seen.add(digest)
        yield parts


def drawings_digest(folder: Path, drawings: Drawings) -> str:
    """A digest of the paths and contents of drawings in `folder`."""
    digest = hashlib.blake2b(digest_size=16)
    for path in _all(drawings):
        digest.update(f"{path} {content_digest((folder / path).read_bytes())}\n".encode())
    return digest.hexdigest()


def run_inputs(lists: str, drawings: str) -> str:
    """What a run depends on beside its options, from the digests of its lists and of all drawings."""
    return f"lists {lists}, drawings {drawings}"


def draw_split(drawings: Drawings, seed: int) -> dict[str, Drawings]:
    """Splits each class at random.

    Returns `test`, a third of a class, but 4 to 20; `train`, the rest; and of this rest `tune_test`, as large a part,
    and `tune_train`, on which settings are chosen.
    """
    generator = np.random.default_rng(seed)
    splits: dict[str, Drawings] = {"train": {}, "test": {}, "tune_train": {}, "tune_test": {}}
    for name, paths in drawings.items():
        shuffled = [paths[index] for index in generator.permutation(len(paths))]
        tested = _share(len(paths))
        held_out = tested + min(_share(len(paths) - tested), (len(paths) - tested) // 2)
        splits["test"][name], splits["train"][name] = shuffled[:tested], shuffled[tested:]
        splits["tune_test"][name], splits["tune_train"][name] = shuffled[tested:held_out], shuffled[held_out:]
    return splits


def _share(count: int) -> int:
    return min(_MOST_TESTED, max(4, count // 3))


def write_lists(folder: Path, train: Drawings, test: Drawings) -> str:
    """Writes the lists that `--lists` takes, the classes in order of their names. Returns their digest."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2b(digest_size=16)
    texts = {CLASS_NAMES: "".join(f"{name}\n" for name in train)}
    for name, drawings in (("train.txt", train), ("test.txt", test)):
        lines = (f"{path} {label}\n" for label, paths in enumerate(drawings.values()) for path in sorted(paths))
        texts[name] = "".join(lines)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        digest.update(text.encode())
    return digest.hexdigest()


def write_split(folder: Path, drawings: Drawings, seed: int) -> tuple[dict[str, Drawings], str]:
    """Draws a split and writes its lists into `folder`, those for tuning into `folder/tune`.

    Returns what `draw_split` returns, and the digest of the lists of training and test. Those for tuning follow from
    them.
    """
    drawn = draw_split(drawings, seed)
    write_lists(folder / "tune", drawn["tune_train"], drawn["tune_test"])
    return drawn, write_lists(folder, drawn["train"], drawn["test"])


def shrink(folder: Path, drawings: Drawings, output: Path, shorter_side: int) -> None:
    """Writes small copies of the drawings, as training sees them: on white. Copies that are there stay."""
    from PIL import Image

    from data.reading import read_image

    def one(path: str) -> None:
        copy = output / path
        if copy.is_file():
            return
        pixels = read_image({"path": str(folder / path), "bytes": None})
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        scale = shorter_side / min(image.size)
        size = tuple(max(1, round(side * scale)) for side in image.size)
        copy.parent.mkdir(parents=True, exist_ok=True)
        written = copy.with_name(f".{copy.name}")
        image.resize(size, Image.Resampling.BICUBIC).save(written, format="png")
        written.replace(copy)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a large drawing needs a gigabyte
        list(pool.map(one, _all(drawings)))


def _all(drawings: Drawings) -> Sequence[str]:
    return [path for paths in drawings.values() for path in paths]
