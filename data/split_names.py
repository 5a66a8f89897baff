"""How your own images may be stored, and what the file or folder of a split may be called, in any case."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval"),
}
EXPECTED = (
    "expected one of: lists train.txt (and val.txt, test.txt) of lines 'relative/path.jpg label'; folders "
    "train/CLASS/*.jpg (and val/, test/), or CLASS/*.jpg; tables train.csv or train.parquet (and val, test), or the "
    "path of one table; the id of a data set on the Hub"
)


def split_of(name: str) -> str | None:
    """Returns the split that `name` stands for, or None."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


# Words beside the name of a split which say that a folder is no class: training_set, test-images
_GENERIC = {"set", "data", "dataset", "image", "images", "img", "imgs", "folder", "split"}


def split_in_name(name: str) -> tuple[str | None, bool]:
    """Returns the split that the first or last word of a name stands for, or None, and whether this is certain.

    It is certain if the other words say nothing: "test_images" is, "bullet_train" may well be a class.
    """
    words = re.split(r"[-_. ]+", name.lower())
    for word, others in ((words[0], words[1:]), (words[-1], words[:-1])):
        if (split := split_of(word)) is not None and (word is words[-1] or _GENERIC.issuperset(others)):
            return split, _GENERIC.issuperset(others)
    return None, False


# A file of several, as the Hub writes them: train-00000-of-00002.parquet. Its older versions added a hash.
_SHARD = re.compile(r"(?P<name>.+?)[-_.](?P<number>\d+)-of-(?P<count>\d+)(-[0-9a-f]{8,})?", re.IGNORECASE)


def split_files(folder: Path, suffix: str) -> dict[str, Path]:
    """Finds the file of each split: `train.txt`, or a file whose name ends like that ("Places_LT_train.txt").

    Raises ValueError if a split has several files.
    """
    named = {path: _last_word(path.stem) for path in _files(folder, suffix)}
    return _one_a_split(folder, named, "lists")


def split_tables(folder: Path, suffix: str) -> tuple[dict[str, list[Path]], list[Path]]:
    """Finds the tables of each split, named as in `split_files`, and the tables that belong to no split.

    A table may consist of several files, `train-00000-of-00002.parquet` and so on. Raises ValueError if a split has
    several tables, or if a file of a table is missing.
    """
    tables: dict[Path, list[Path]] = {}  # the name that a table would have as one file -> its files
    for path in _files(folder, suffix):
        shard = _SHARD.fullmatch(path.stem)
        whole = path if shard is None else path.with_name(f"{shard['name']}-*-of-{shard['count']}{path.suffix}")
        tables.setdefault(whole, []).append(path)
    named = {
        whole: _last_word(whole.stem.partition("-*-of-")[0] if whole not in files else whole.stem)
        for whole, files in tables.items()
    }
    found = {split: tables[whole] for split, whole in _one_a_split(folder, named, "tables").items()}
    for files in found.values():
        _check_shards(files)
    used = {path for files in found.values() for path in files}
    return found, [path for files in tables.values() for path in files if path not in used]


def split_parts(folder: Path) -> dict[str, list[Path]]:
    """Finds tables of numbered files in a folder for each split: `train/0000.parquet`, as the Hub converts data sets.

    Raises ValueError if a file of a table is missing.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        if (split := split_of(path.name)) is None or not path.is_dir():
            continue
        files = [file for file in _files(path, ".parquet") if re.fullmatch("[0-9]+", file.stem)]
        if not files:
            continue
        if split in found:
            raise ValueError(f"{folder} has several folders of tables for {split}, one of them {path.name}; keep one")
        numbers = [int(file.stem) for file in files]
        if missing := sorted(set(range(max(numbers) + 1)) - set(numbers)):
            raise ValueError(f"{path} has {files[-1].name}, but number {missing[0]} is missing; download all files")
        found[split] = files
    return found


def is_shard(path: Path) -> bool:
    """Whether a file is one of several of a table."""
    shard = _SHARD.fullmatch(path.stem)
    return shard is not None and int(shard["count"]) > 1


def _check_shards(files: Sequence[Path]) -> None:
    """Raises ValueError if a file of a table is missing, or there twice."""
    shards = [shard for path in files if (shard := _SHARD.fullmatch(path.stem))]
    if not shards:
        return
    count = int(shards[0]["count"])
    there = sorted(int(shard["number"]) for shard in shards)
    if there == list(range(count)):
        return
    missing = [number for number in range(count) if number not in there]
    what = f"number {missing[0]} and {len(missing) - 1} more are missing" if missing[1:] else ""
    what = what or (f"number {missing[0]} is missing" if missing else f"there are {len(files)}")
    raise ValueError(
        f"{files[0]} is one of {count} files of a table, and {what}; download all of them, or remove what is left of "
        "another version"
    )


def as_data_files(paths: Sequence[Path]) -> list[str]:
    """Returns paths in the form that `datasets` takes for `data_files`. It would take a plain path for a pattern.

    Raises ValueError for a path that it cannot take.
    """
    absolute = [str(path.resolve()) for path in paths]
    for path in absolute:
        if "::" in path:
            raise ValueError(f"{path} has '::' in its name, where the library datasets ends a path; rename it")
    return [glob.escape(path) for path in absolute]


def folders_of_splits(folder: Path) -> dict[str, str]:
    """Finds the folder of each split, by its whole name. Raises ValueError if a split has several folders."""
    folders = {path: path.name for path in sorted(folder.iterdir()) if path.is_dir()}
    return {split: path.name for split, path in _one_a_split(folder, folders, "folders").items()}


def _files(folder: Path, suffix: str) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() == suffix and not path.name.startswith(".") and path.is_file()
    ]


def _last_word(stem: str) -> str:
    return stem.replace("-", "_").split("_")[-1]


def _one_a_split(folder: Path, named: dict[Path, str], what: str) -> dict[str, Path]:
    found: dict[str, list[Path]] = {}
    for path, name in named.items():
        if (split := split_of(name)) is not None:
            found.setdefault(split, []).append(path)
    for split, paths in found.items():
        if len(paths) > 1:
            raise ValueError(
                f"{folder} has several {what} for {split}: {', '.join(path.name for path in paths)}; keep one"
            )
    return {split: found[split][0] for split in SPLIT_NAMES if split in found}
