"""Your own images: annotation lists, folders of images, a table, or a data set on the Hub."""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow.compute as pc
from datasets import DatasetDict

from data import folders, tables
from data.annotation_lists import CLASS_NAMES, load_own_lists
from data.columns import image_field
from data.hub_ids import did_you_mean, hub_id_of, is_hub_id, refuse_missing
from data.hub_loading import is_gated, load_from_hub, why_not
from data.notices import notify, some
from data.rows import check_utf8
from data.split_names import EXPECTED, folders_of_splits, is_shard, split_files, split_parts, split_tables
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
    check_utf8(str(place.resolve()), "the path")
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
        if is_shard(place):
            raise ValueError(f"{place} is one of several files of a table; name their folder, {place.parent}")
        return tables.load_tables(place.parent, {"train": [place]}, columns, skip_empty_rows)
    if not place.exists():
        if is_hub_id(data_dir):
            refuse_missing(data_dir, "file or folder")
            _refuse(named, data_dir, "allow_empty_classes", "no class folders")
            return _load_from_hub(str(data_dir), columns, skip_empty_rows)
        raise FileNotFoundError(f"{place} does not exist{did_you_mean(place) or f'; {EXPECTED}'}")
    text = split_files(place, ".txt")
    found = _find_tables(place)
    if "train" in text:
        used = {*text.values(), place / CLASS_NAMES}
        lists_unread = [path for path in _lists_in(place) if path not in used]
        _tell_unread(place, text["train"], [*found.all_files(), *found.others, *lists_unread])
        loaded = _load_lists(place, place, named)
        _refuse_other_splits(place, text["train"].name, loaded)
        return loaded
    if not found.files:
        found = _find_tables_below(place) or found
    if not found.files:
        _refuse(named, place, "image_column label_column group_by", "no columns")
        loaded = folders.load_folders(place, allow_empty_classes)
        _refuse_other_splits(place, "the class folders", loaded)
        return loaded
    first = found.files["train"][0]
    _tell_unread(place, first, [*_lists_in(place), *found.others])
    _refuse(named, first, "allow_empty_classes", "no class folders")
    loaded = tables.load_tables(found.folder, found.files, columns, skip_empty_rows)
    _refuse_other_splits(place, first.name, loaded)
    return loaded


def _lists_in(place: Path) -> list[Path]:
    return [path for path in sorted(place.iterdir()) if path.suffix.lower() == ".txt" and path.is_file()]


def _refuse_other_splits(place: Path, read: str, loaded: DatasetDict) -> None:
    """Raises ValueError if a split which `read` lacks is there in another format: another test split would be drawn.

    Folders of images that the rows name are no splits of their own.
    """
    there: dict[str, list[str]] = {}
    for split, path in split_files(place, ".txt").items():
        there.setdefault(split, []).append(path.name)
    for suffix in tables.SUFFIXES:
        for split, paths in split_tables(place, suffix)[0].items():
            there.setdefault(split, []).append(paths[0].name)
    for split, name in folders_of_splits(place).items():
        if split in loaded or not folders.count_images(place / name) or _names_images_of(loaded, place / name):
            continue
        if folders.has_class_folders(place / name):
            there.setdefault(split, []).append(f"{name}/")
        else:
            notify(f"{place}: {read} is read, so the images in {name}/, which have no class folders, are not")
    left_out = {split: names for split, names in there.items() if split not in loaded}
    for split, names in left_out.items():
        raise ValueError(
            f"{place}: {read} is read, which has no split for {split}, but {names[0]} would be one in another format. "
            f"Convert it to the format of {read}, or move it out of {place}"
        )


def _names_images_of(loaded: DatasetDict, folder: Path) -> bool:
    """Whether rows name images in a folder."""
    start = f"{folder.resolve()}/"
    return any(pc.any(pc.starts_with(image_field(rows, "path"), start)).as_py() for rows in loaded.values())


@dataclass
class _Tables:
    """The tables in a folder: `files` of each split, empty if there are none to train on, and `others`."""

    folder: Path
    files: dict[str, list[Path]] = field(default_factory=dict)
    others: list[Path] = field(default_factory=list)

    def all_files(self) -> list[Path]:
        return [path for files in self.files.values() for path in files]


def _find_tables(folder: Path) -> _Tables:
    found = _Tables(folder)
    for suffix in tables.SUFFIXES:
        files, rest = split_tables(folder, suffix)
        if "train" in files and not found.files:
            found.files = files
        else:
            rest += [path for of_split in files.values() for path in of_split]
        found.others += rest
    if not found.files and "train" in (parts := split_parts(folder)):
        found.files = parts
    return found


def _find_tables_below(place: Path) -> _Tables | None:
    """Finds tables in a folder of `place`, as in a cloned repository of the Hub. None if images are beside them."""
    below = [
        found
        for folder in sorted(place.iterdir())
        if folder.is_dir() and not folder.name.startswith(".") and (found := _find_tables(folder)).files
    ]
    if not below:
        return None
    with_tables = sum(folders.count_images(found.folder) for found in below)
    if folders.count_images(place) > with_tables:
        # A folder of a class may have a table of its own, and splits may have one beside them.
        if with_tables or folders_of_splits(place):
            return None
        names = some([f"{found.folder.name}/" for found in below])
        raise ValueError(
            f"{place} has tables in {names} and images beside them. To read the tables, name their folder: --data_dir "
            f"{below[0].folder}. To read the images as class folders, move the tables out of {place}"
        )
    if len(below) > 1:
        names = some([f"{found.folder.name}/" for found in below])
        raise ValueError(f"{place} has tables in {names}; name one of these folders: --data_dir {below[0].folder}")
    notify(f"{place}: the tables in {below[0].folder.name}/ are read")
    return below[0]


def _tell_unread(place: Path, read: Path, others: list[Path]) -> None:
    if others:
        notify(f"{place}: {read.name} is read, so these are not: {some([path.name for path in others])}")


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
