"""How your own images may be stored, and what the file or folder of a split may be called, in any case."""

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


def split_files(folder: Path, suffix: str) -> dict[str, Path]:
    """Finds the file of each split: `train.txt`, or a file whose name ends like that ("Places_LT_train.txt").

    Raises ValueError if a split has several files.
    """
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() == suffix and path.is_file()]
    return _one_a_split(folder, {path: path.stem.replace("-", "_").split("_")[-1] for path in files}, "lists")


def folders_of_splits(folder: Path) -> dict[str, str]:
    """Finds the folder of each split, by its whole name. Raises ValueError if a split has several folders."""
    folders = {path: path.name for path in sorted(folder.iterdir()) if path.is_dir()}
    return {split: path.name for split, path in _one_a_split(folder, folders, "folders").items()}


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
