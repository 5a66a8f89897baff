"""Annotation lists with a line `relative/path.jpg label` for each image, for the benchmarks and for your own images."""

import hashlib
import itertools
import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import DatasetDict

from data.notices import some
from data.rows import NamedRows, Rows, check_labels, check_length, load_rows, read_text, with_slashes
from data.sets._benchmark import MARKER, Benchmark
from data.sets._data_set import DataSet

CLASS_NAMES = "class_names.txt"
CLASS_COUNTS = Path(__file__).with_name("class_counts.json")  # training images of each class of the benchmarks


def read_annotation_list(path: Path, folder: Path | None = None) -> Rows:
    """Reads the images and labels of a list. Paths may contain spaces, and empty lines are ignored.

    Lines before the first image that start with "# " are comments. `folder` has the images, by default the list's.

    Raises ValueError, with the file, the line number and the line, if a line is not `relative/path label`, if a path
    leaves the folder, or if a path is listed twice; and for a list of more than 2 GB. Raises OSError if the list cannot
    be read.
    """
    check_length(path, path.stat().st_size)
    expected = "expected lines 'relative/path.jpg label', label a whole number from 0"
    lines = pc.ascii_trim_whitespace(pa.array(read_text(path).split("\n"), pa.string()))
    filled = pc.not_equal(lines, "").to_numpy(zero_copy_only=False)
    numbers = np.flatnonzero(filled) + 1  # of lines in the file
    if numbers.size and lines[numbers[0] - 1].as_py().startswith("# "):
        comments = pc.starts_with(lines, "# ").to_numpy(zero_copy_only=False)
        numbers = numbers[numbers > np.argmax(filled & ~comments)]
    if not numbers.size:
        raise ValueError(f"{path} is empty; {expected}")
    lines = lines.take(pa.array(numbers - 1))
    parts = pc.ascii_split_whitespace(lines, max_splits=1, reverse=True)  # [path, label], or just [word]
    well_formed = pc.equal(pc.list_value_length(parts), 2).to_numpy(zero_copy_only=False).copy()
    words = pc.list_element(parts.filter(pa.array(well_formed)), 1)
    # at most nine digits: enough for any number of classes, and they fit the type
    well_formed[well_formed] = pc.and_(pc.ascii_is_decimal(words), pc.less(pc.utf8_length(words), 10)).to_numpy(
        zero_copy_only=False
    )
    if not well_formed.all():
        wrong = np.flatnonzero(~well_formed)
        raise ValueError(
            f"{path}, line {numbers[wrong[0]]}: {expected}, got {lines[wrong[0]].as_py()!r}"
            + (f"; {len(wrong) - 1} more lines are wrong too" if len(wrong) > 1 else "")
        )
    labels = pc.cast(words, pa.int64()).to_numpy()
    paths = with_slashes(pc.ascii_rtrim_whitespace(pc.list_element(parts, 0)), folder or path.parent)
    rows = Rows(paths, labels, path, numbers)
    rows.check_paths()
    return rows


def list_digest(rows: Rows) -> str:
    """Returns a digest that identifies a list: of its lines, in order, as 32 hexadecimal digits.

    It is the BLAKE2b of the lines "path label", each with a line feed. For a list that is written that way,
    `b2sum -l 128 FILE` prints the same. Windows' line ends, tabs, empty lines and comments make no difference. In
    contrast, `data.digest.images_digest` is of the images that were loaded, whether a list names them or not.
    """
    lines = pc.binary_join_element_wise(rows.paths, pa.array(rows.labels).cast(pa.string()), " ")
    return hashlib.blake2b("\n".join([*lines.to_pylist(), ""]).encode(), digest_size=16).hexdigest()


def describe_lists(data_set: DataSet, place: str | Path) -> dict[str, dict[str, Any]]:
    """Returns `file`, `images`, `digest` and `known` for the list of each split, or nothing for data without lists.

    `known` says whether the digest is that of the public list, or None if that is not known here.
    """
    facts = {}
    known = getattr(data_set, "known_lists", {})
    folder = None if isinstance(data_set, Benchmark) else Path(place)
    for split, path in data_set.list_files(place).items():
        rows = read_annotation_list(path, folder)
        digest = list_digest(rows)
        is_known = digest == known[split] if split in known else None
        facts[split] = {"file": str(path), "images": len(rows.labels), "digest": digest, "known": is_known}
    return facts


def class_names(rows: Rows, num_classes: int) -> list[str]:
    """Names each class after the folder of its first image, or by its number if folders and classes do not match.

    A start that all folders share ("train/") is dropped. So is the letter that Places puts before its classes
    ("a/airfield").
    """
    labels, first = np.unique(rows.labels, return_index=True)
    paths = rows.paths.take(pa.array(first)).to_pylist()
    numbers = [str(label) for label in range(num_classes)]
    if len(labels) < num_classes:
        return numbers
    folders = [path.split("/")[:-1] for path in paths]
    in_common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    common = len(list(in_common))
    names = []
    for folder in folders:
        parts = folder[common:]
        if len(parts) > 1 and len(parts[0]) == 1 and parts[1].startswith(parts[0]):
            parts = parts[1:]
        names.append("/".join(parts))
    return names if len(set(names)) == num_classes and all(names) else numbers


def imagenet_names(synsets: Sequence[str]) -> list[str]:
    """Returns ImageNet's names for its 1,000 synsets, from torchvision, which has them in the same order.

    Where two classes share a name, the synset is added to it. Returns the synsets themselves if they are not
    ImageNet's 1,000 in ascending order.
    """
    from torchvision.models import ResNet50_Weights

    categories = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    well_known = len(synsets) == len(categories) and synsets[0] == "n01440764" and synsets[-1] == "n15075141"
    if not well_known or list(synsets) != sorted(synsets):
        return list(synsets)
    return [
        category if categories.count(category) == 1 else f"{category} ({synset})"
        for category, synset in zip(categories, synsets, strict=True)
    ]


def load_benchmark(benchmark: Benchmark, data_dir: Path) -> DatasetDict:
    """Loads the splits of a benchmark whose lists and images are in `data_dir`. See `data.load_long_tailed`."""
    lists = benchmark.list_files(data_dir)
    missing = [str(path) for path in lists.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{benchmark.name} needs the lists {', '.join(missing)}, which do not exist; put them and the images into "
            f"{data_dir}, or name another folder with --data_dir. For your own images, use --dataset custom"
        )

    def read() -> NamedRows:
        return read_benchmark(benchmark, lists)

    marker = data_dir / MARKER
    return load_rows(benchmark.name, data_dir, [*lists.values(), *([marker] if marker.is_file() else [])], read)


def read_benchmark(benchmark: Benchmark, lists: Mapping[str, Path]) -> NamedRows:
    """Reads the list of each split. Raises ValueError if they do not have the published labels and counts.

    A notice says so if a list has the published counts but not the digest of the public list.
    """
    rows = {split: read_annotation_list(path) for split, path in lists.items()}
    expected, counts = _expected(benchmark, lists["train"].parent)
    check_labels(rows, expected.num_classes)
    _check_counts(expected, counts, rows)
    names = class_names(rows["train"], expected.num_classes)
    notices = []
    for split, known in benchmark.known_lists.items() if expected is benchmark else ():
        if (digest := list_digest(rows[split])) != known:
            notices.append(
                f"{rows[split].source} has as many images as the public {split} list of {benchmark.title}, but other "
                f"lines or another order (its digest is {digest}, not {known}): results may not be comparable"
            )
    return NamedRows(rows, benchmark.class_names(names) if benchmark.class_names else names, notices)


def load_own_lists(data_dir: Path, lists: dict[str, Path]) -> DatasetDict:
    """Loads your own lists of images in `data_dir`.

    The file `CLASS_NAMES` beside the training list has the names of the classes, one a line. Without it the largest
    label of the training list gives the number of classes, and folders their names.
    """
    names_file = lists["train"].parent / CLASS_NAMES

    def read() -> NamedRows:
        rows = {split: read_annotation_list(path, data_dir) for split, path in lists.items()}
        names = read_class_names(names_file) if names_file.is_file() else None
        labelled = int(rows["train"].labels.max()) + 1
        if names is not None and len(names) != labelled:
            raise ValueError(
                f"{names_file} has {len(names)} names, but the labels of {rows['train'].source} are 0 to "
                f"{labelled - 1}; give each label a name, one a line"
            )
        check_labels(rows, labelled)
        return NamedRows(rows, class_names(rows["train"], labelled) if names is None else names)

    return load_rows("custom", data_dir, [*lists.values(), *([names_file] if names_file.is_file() else [])], read)


def read_class_names(path: Path) -> list[str]:
    """Reads the names of classes, one a line in the order of the labels. Raises ValueError for empty or equal names."""
    lines: dict[str, int] = {}
    for number, name in enumerate(read_text(path).rstrip().split("\n"), start=1):
        name = name.strip()
        if not name or name in lines:
            what = f"the name {name!r} of line {lines[name]}, again" if name else "an empty line"
            raise ValueError(f"{path}, line {number} has {what}; each class needs a name of its own")
        lines[name] = number
    return list(lines)


def find_line(lists: Sequence[Path], data_dir: Path, image: str | Path) -> str | None:
    """Returns where an image is listed, as "FILE, line N", or None if it is not listed."""
    try:
        relative = Path(image).relative_to(data_dir.resolve()).as_posix()
    except ValueError:
        return None
    for path in lists:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                listed, _, label = line.strip().rpartition(" ")
                if label.isdecimal() and _same_path(listed.rstrip(), relative):
                    return f"{path}, line {number}"
    return None


def _same_path(listed: str, relative: str) -> bool:
    """Whether a list means the image `relative`, by that path or another form of it; see `data.rows.with_slashes`."""
    return listed == relative or (
        listed.endswith(relative.rpartition("/")[2]) and posixpath.normpath(listed.replace("\\", "/")) == relative
    )


def _expected(benchmark: Benchmark, data_dir: Path) -> tuple[Benchmark, list[int] | None]:
    """Returns what the lists must have: the published facts, or those of synthetic data; and the counts (C,) if known.

    The counts of `CLASS_COUNTS` apply to the published facts alone, not to a variant of the benchmark.
    """
    marker = data_dir / MARKER
    if not marker.is_file():
        counts = json.loads(CLASS_COUNTS.read_text()).get(benchmark.name, [])
        published = (len(counts), sum(counts)) == (benchmark.num_classes, benchmark.images["train"])
        return benchmark, counts if published else None
    try:
        facts = json.loads(marker.read_text())
        counts = facts["class_counts"]
        changes = {"num_classes": facts["num_classes"], "images": facts["images"]}
        return replace(benchmark, **changes, most=max(counts), least=min(counts)), counts
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{marker} is damaged ({error!r}); create the data again with python -m data.synthesize"
        ) from error


def _check_counts(published: Benchmark, of_classes: list[int] | None, rows: dict[str, Rows]) -> None:
    counts = np.bincount(rows["train"].labels)
    expected = {f"{split} images": count for split, count in published.images.items()}
    expected |= {"images of the commonest class": published.most, "images of the rarest class": published.least}
    found = {f"{split} images": len(split_rows.labels) for split, split_rows in rows.items()}
    found |= {"images of the commonest class": int(counts.max()), "images of the rarest class": int(counts.min())}
    wrong = [
        f"{fact} {expected[fact]:,} expected, {found[fact]:,} found"
        for fact in expected
        if expected[fact] != found[fact]
    ]
    if not wrong and of_classes is not None and (differing := np.flatnonzero(counts != np.array(of_classes))).size:
        shown = [f"{label} ({of_classes[label]:,} expected, {counts[label]:,} found)" for label in differing.tolist()]
        wrong = [f"training images of {differing.size:,} classes differ, of class {some(shown)}"]
    if wrong:
        hint = f" {published.other_lists}" if published.other_lists else ""
        found = ", ".join(f"{r.source.name} ({len(r.labels):,} images, digest {list_digest(r)})" for r in rows.values())
        raise ValueError(
            f"the lists in {rows['train'].source.parent} are not those of {published.name}: {'; '.join(wrong)}.{hint} "
            "Are they cut off, or from another data set? To train on them as they are, use --dataset custom. "
            f"Found: {found}"
        )
