"""Your own images: annotation lists, folders of images, a table, or a data set on the Hub."""

from pathlib import Path

import datasets
from datasets import DatasetDict

from data import folders, tables
from data.annotation_lists import load_own_lists
from data.hub_ids import hub_id_of, is_hub_id
from data.hub_loading import is_gated, load_from_hub, why_not
from data.notices import notify, some
from data.split_names import EXPECTED, split_files
from data.tables import Columns

# What `datasets` raises if the Hub does not have an id; RuntimeError if the data set needs code of its own
NOT_ON_THE_HUB = (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError, RuntimeError)


def load_custom(
    data_dir: str | Path,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    lists: str | None = None,
    allow_empty_classes: bool = False,
    skip_empty_rows: bool = False,
) -> DatasetDict:
    """Loads the images at `data_dir`, with the splits that they have. See `data.load_long_tailed`.

    `image_column` and `label_column`, by default "image" and "label", and `group_column` name columns of a table or of
    a data set on the Hub. The latter becomes the column `data.rows.GROUP`. `lists` is the folder of the lists, if it is
    not `data_dir`, which has the images then. Raises ValueError for an option that would do nothing.
    """
    place = Path(data_dir)
    named = {"image_column": image_column, "label_column": label_column, "group_by": group_column}
    named = {option: column for option, column in named.items() if column is not None}
    if allow_empty_classes:
        named["allow_empty_classes"] = ""
    columns = Columns(image=image_column or "image", label=label_column or "label", group=group_column)
    if lists is not None:
        return _load_lists(place, Path(lists), named)
    if (hub_id := hub_id_of(data_dir)) is not None:
        _refuse(named, data_dir, "allow_empty_classes", "no class folders")
        return tables.standardise(load_from_hub(hub_id), hub_id, columns, skip_empty_rows)
    if place.is_file():
        if place.suffix.lower() not in tables.SUFFIXES:
            known = ", ".join(tables.SUFFIXES)
            raise ValueError(f"{place} is not a table of a known format ({known}); {EXPECTED}")
        _refuse(named, place, "allow_empty_classes", "no class folders")
        return tables.load_tables(place.parent, {"train": place}, columns, skip_empty_rows)
    if not place.exists():
        if is_hub_id(data_dir):
            _refuse(named, data_dir, "allow_empty_classes", "no class folders")
            return _load_from_hub(str(data_dir), columns, skip_empty_rows)
        raise FileNotFoundError(f"{place} does not exist; {EXPECTED}")
    kinds = {suffix: split_files(place, suffix) for suffix in (".txt", *tables.SUFFIXES)}
    chosen = next((suffix for suffix, files in kinds.items() if "train" in files), None)
    if chosen is None:
        _refuse(named, place, "image_column label_column group_by", "no columns")
        return folders.load_folders(place, allow_empty_classes)
    files = kinds.pop(chosen)
    if unread := [path.name for others in kinds.values() for path in others.values()]:
        notify(f"{place}: {files['train'].name} is read, so these are not: {some(unread)}")
    _refuse(named, files["train"], "allow_empty_classes", "no class folders")
    if chosen == ".txt":
        return _load_lists(place, place, named)
    return tables.load_tables(place, files, columns, skip_empty_rows)


def _load_lists(place: Path, folder: Path, named: dict[str, str]) -> DatasetDict:
    files = split_files(folder, ".txt") if folder.is_dir() else {}
    if "train" not in files:
        raise FileNotFoundError(f"{folder} has no list train.txt; write lists with python -m data.make_splits")
    _refuse(named, files["train"], "allow_empty_classes", "no class folders")
    _refuse(named, files["train"], "image_column label_column group_by", "no columns")
    if not place.is_dir():
        raise FileNotFoundError(f"{place} is not a folder; --data_dir names the folder of the images in the lists")
    return load_own_lists(place, files)


def _refuse(given: dict[str, str], source: str | Path, names: str, reason: str) -> None:
    """Raises ValueError if one of the options `names` was given."""
    options = " and ".join(f"--{name} {given[name]}".strip() for name in names.split() if name in given)
    if options:
        raise ValueError(f"{source} has {reason}, so {options} would do nothing; leave it out")


def _load_from_hub(name: str, columns: Columns, skip_empty_rows: bool) -> DatasetDict:
    try:
        loaded = datasets.load_dataset(name)
    except (*NOT_ON_THE_HUB, ValueError) as error:
        if is_gated(error):
            raise ValueError(why_not(name, error)) from error
        raise ValueError(
            f"{name!r} does not exist here, and the Hub has no data set of that id to load ({error}); {EXPECTED}"
        ) from error
    return tables.standardise(loaded, name, columns, skip_empty_rows)
