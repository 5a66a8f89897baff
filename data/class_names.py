"""Readable names for the classes, from a file: `--class_names FILE`."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from datasets.fingerprint import Hasher

from data.annotation_lists import read_class_names
from data.columns import image_field
from data.notices import some
from data.rows import read_text
from data.splits import class_labels
from data.streams import ImageStream

HEADING = ["class", "name"]  # of a table, which may have one
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
Splits = DatasetDict | dict[str, ImageStream]


def name_classes(splits: Splits, file: str | Path | None) -> tuple[Splits, list[str] | None]:
    """Gives the classes of all splits the names in a file. Returns the splits and the names (C,) that they had.

    Without a file, the splits stay as they are, and None is returned for the names.

    The file has a name in each line, in the order of the labels. A .json file is an object, a .csv or .tsv file a table
    of two columns, in which each class stands before its name. There, a class is called by its name in the data, by
    the folder of its images (a WordNet id in ImageNet) or by its label ("0"): all classes in the same way.

    Raises ValueError, which names the classes, for names that are missing, empty or given twice, and for classes that
    the data do not have; FileNotFoundError if there is no file.
    """
    if file is None:
        return splits, None
    path, before = Path(file), names_of(splits)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with the names of the classes; check --class_names")
    ways = _ways_to_call(splits["train"])
    suffix = path.suffix.lower()
    if suffix == ".json":
        names = _by_class(path, _pairs_of_json(path), ways)
    elif suffix in _DELIMITERS:
        names = _by_class(path, _pairs_of_table(path, _DELIMITERS[suffix]), ways)
    else:
        names = _in_order(path, ways)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{path} gives several classes the name {some(twice)}; each class needs a name of its own")
    return with_names(splits, names), before


def names_of(splits: Splits) -> list[str]:
    """The names of the classes (C,)."""
    return list(splits["train"].features["label"].names)


def with_names(splits: Splits, names: Sequence[str]) -> Splits:
    """The same splits with other names (C,) of the classes. Labels and images stay."""
    if isinstance(splits["train"], ImageStream):
        return {split: replace(stream, names=list(names)) for split, stream in splits.items()}
    return DatasetDict({split: _renamed(rows, names) for split, rows in splits.items()})


def _renamed(rows: Dataset, names: Sequence[str]) -> Dataset:
    """The same rows with other names of the classes. `cast_column` would copy them to the disk, images included."""
    info = rows.info.copy()
    info.features["label"] = ClassLabel(names=list(names))
    fingerprint = Hasher.hash([rows._fingerprint, list(names)])
    return Dataset(rows.data, info, rows.split, indices_table=rows._indices, fingerprint=fingerprint)


def _ways_to_call(train: Dataset | ImageStream) -> list[list[str]]:
    """The ways to call the classes in a file, each with a text (C,) for every class."""
    names = list(train.features["label"].names)
    ways = [names, _folders(train), [str(label) for label in range(len(names))]]
    return [way for way in ways if way is not None]


def _folders(train: Dataset | ImageStream) -> list[str] | None:
    """The folder of each class's first image (C,); None unless every class has one of its own."""
    if isinstance(train, ImageStream):
        return None
    _, first = np.unique(class_labels(train), return_index=True)
    paths = image_field(train, "path").take(first).to_pylist()
    folders = [PurePosixPath(path or "").parent.name for path in paths]
    whole = len(set(folders)) == train.features["label"].num_classes and all(folders)
    return folders if whole else None


def _in_order(path: Path, ways: list[list[str]]) -> list[str]:
    names, before = read_class_names(path), ways[0]
    if len(names) != len(before):
        without = before[len(names) :]
        what = f"none for {some(without)}" if without else f"too many, from {names[len(before)]!r} on"
        raise ValueError(f"{path} has {len(names)} names for {len(before)} classes, {what}; give each class a line")
    first_words = [name.partition(" ")[0] for name in names]
    if first_words != names and any(sorted(first_words) == sorted(way) for way in ways):
        raise ValueError(
            f"each line of {path} starts with a class of the data, such as {names[0]!r}; write the file as .csv, with "
            "a comma between class and name"
        )
    return names


def _by_class(path: Path, pairs: Sequence[tuple[str, str]], ways: list[list[str]]) -> list[str]:
    """The names (C,) in the order of the labels, from pairs of a class and its name."""
    given = dict(pairs)
    if len(given) < len(pairs):
        twice = [called for called, count in Counter(called for called, _ in pairs).items() if count > 1]
        raise ValueError(f"{path} names {some(twice)} several times; give each class one name")
    way = max(ways, key=lambda way: len(given.keys() & set(way)))  # of equal ones the first
    if unknown := [called for called in given if called not in set(way)]:
        raise ValueError(
            f"{path} names {some(unknown)}, which the data do not have; their classes are {some(way)}. A heading must "
            f"be {','.join(HEADING)}"
        )
    if missing := [called for called in way if not given.get(called)]:
        raise ValueError(f"{path} has no name for {some(missing)}; give each class a name")
    return [given[called] for called in way]


def _pairs_of_json(path: Path) -> list[tuple[str, str]]:
    try:
        pairs = json.loads(read_text(path), object_pairs_hook=list)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    as_needed = isinstance(pairs, list) and all(isinstance(pair, tuple) and isinstance(pair[1], str) for pair in pairs)
    if not as_needed:
        raise ValueError(f'{path} must be an object with a name for each class, such as {{"n01440764": "tench"}}')
    return [(called, name.strip()) for called, name in pairs]


def _pairs_of_table(path: Path, delimiter: str) -> list[tuple[str, str]]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(read_text(path)), delimiter=delimiter)]
    rows = [row for row in rows if any(row)]
    if wrong := next((row for row in rows if len(row) != 2), None):
        raise ValueError(
            f"{path} must have two columns, a class and its name, but a row is {delimiter.join(wrong)!r}; write a name "
            "with a comma in quotes"
        )
    return [(called, name) for called, name in rows[rows[:1] == [HEADING] :]]
