"""Rows of image paths and labels. Every source on disk is read into rows, checked, and cached as Arrow tables."""

import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, DatasetDict, Features, Image, Value

from data.notices import notify
from data.split_names import as_data_files

GROUP = "group"  # a column of what images of one group have in common; no split separates them
_IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_MOST_BYTES = 2**31 - 2  # of the paths of a split: an array of Arrow's strings, which `datasets` uses, holds no more
_LOOKED_AT = 100  # files to check in each split when the tables come from the cache
_SHOWN = 5  # examples in a message


@dataclass
class Rows:
    """The images of a split: `paths` (N,) relative to the data set's folder, and their classes `labels` (N,)."""

    paths: pa.Array
    labels: np.ndarray
    source: Path
    """The file that lists them, or the folder in which they were found."""
    lines: np.ndarray | None = None
    """Line or row of each in `source`, from 1; None if that is a folder."""
    unit: str = "line"
    groups: pa.Array | None = None
    """What the images of a group have in common (N,), as text; null for an image of its own."""

    def where(self, index: int) -> str:
        """Returns where a row is listed, for messages."""
        return str(self.source) if self.lines is None else f"{self.source}, {self.unit} {self.lines[index]}"

    def check_paths(self) -> None:
        """Raises ValueError if a path leaves the folder or is listed twice."""
        outside = _first(pc.match_substring_regex(self.paths, r"^([/\\]|[A-Za-z]:)|(^|/)\.\.(/|$)"))
        if outside is not None:
            raise ValueError(
                f"{self.where(outside)}: {self.paths[outside].as_py()!r} leads out of the data set's folder; "
                "paths are relative to it"
            )
        paths = self.paths.to_pylist()
        different = len(set(paths))
        if different < len(paths):
            seen: dict[str, int] = {}
            index = next(index for index, path in enumerate(paths) if seen.setdefault(path, index) != index)
            first = seen[paths[index]]
            raise ValueError(
                f"{self.where(index)}: {paths[index]!r} is listed already ({self.where(first)}, label "
                f"{self.labels[first]}; here {self.labels[index]}); {len(paths) - different} duplicate line(s) in all; "
                "list each image once"
            )


@dataclass
class NamedRows:
    """The rows of every split, the names of the classes in the order of their labels, and notices for the user."""

    splits: dict[str, Rows]
    names: list[str]
    notices: list[str] = field(default_factory=list)


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, with or without a byte order mark. Every kind of line end becomes a line feed.

    Raises ValueError for another encoding.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        likely = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise ValueError(
            f"{path} is not in UTF-8 ({error.reason} at byte {error.start}); convert it, "
            f"for example by: iconv -f {likely} -t utf-8 {path.name}"
        ) from error


def check_utf8(name: str, what: str) -> str:
    """Returns a name of a file or folder. Raises ValueError, with the remedy, if it is not in UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        folder = name[: error.start].rpartition("/")[0]
        raise ValueError(f"{what} {_shown(name)} is not in UTF-8. {_rename(folder or 'FOLDER')}") from error
    return name


def _shown(name: str) -> str:
    """A name that is not in UTF-8, for messages."""
    return ascii(name.encode(errors="surrogateescape").decode("latin1"))[1:-1]


def _rename(folder: str | Path) -> str:
    return f"Rename the files, for example by: convmv -r -f latin1 -t utf8 --notest {folder}"


def with_slashes(paths: pa.Array, folder: Path) -> pa.Array:
    """Returns paths (N,) in one form: with slashes where Windows wrote backslashes, without "./" and "//".

    A file whose name has a backslash keeps it.
    """
    plain = _plain(paths)
    written_by_windows = pc.match_substring(plain, "\\")
    if pc.any(written_by_windows).as_py():
        first = plain.filter(written_by_windows)[0].as_py()
        if not (folder / first).exists():
            plain = _plain(pc.replace_substring(plain, "\\", "/"))
    return plain


def _plain(paths: pa.Array) -> pa.Array:
    """Paths without "./" and "//", which lead to the same file. A leading slash stays, to be refused."""
    without_start = pc.replace_substring_regex(paths, r"^(\./+)+", "")
    return pc.replace_substring_regex(without_start, r"/(\./|/)+", "/")


def class_codes(labels: pa.Array, names: list[str], source: str | Path) -> np.ndarray:
    """Returns labels, text (N,), as numbers. Raises ValueError for a name that no training image has."""
    codes = pc.index_in(labels, value_set=pa.array(names, pa.string()))
    if codes.null_count:
        unknown = pc.unique(labels.filter(pc.is_null(codes))).to_pylist()
        raise ValueError(
            f"{source} has {len(unknown)} class(es) without training images, {', '.join(map(repr, unknown[:_SHOWN]))}; "
            f"the training images have {', '.join(map(repr, names[:_SHOWN]))}{' ...' if len(names) > _SHOWN else ''}"
        )
    return pc.cast(codes, pa.int64()).to_numpy()


def _first(mask: pa.Array) -> int | None:
    found = np.flatnonzero(mask.to_numpy(zero_copy_only=False))
    return int(found[0]) if found.size else None


def check_labels(splits: dict[str, Rows], num_classes: int, names: Sequence[str] = ()) -> None:
    """Raises ValueError for labels out of range, classes without training images, or images in two splits.

    `names` are those of the classes, for the message about a single one.
    """
    for rows in splits.values():
        wrong = np.flatnonzero((rows.labels < 0) | (rows.labels >= num_classes))
        if wrong.size:
            raise ValueError(
                f"{rows.where(wrong[0])}: label {rows.labels[wrong[0]]} is not one of 0 to {num_classes - 1} "
                f"({wrong.size} such row(s)); is this another data set's list, or does it count from 1?"
            )
    train = splits["train"]
    empty = np.flatnonzero(np.bincount(train.labels, minlength=num_classes) == 0)
    if empty.size:
        raise ValueError(
            f"{train.source} has no image of {empty.size} of {num_classes} classes, the first "
            f"{empty[:_SHOWN].tolist()}; labels must be 0 to {num_classes - 1} without gaps: "
            "is the list cut off, or does it count from 1?"
        )
    if num_classes < 2:
        only = f", {names[0]!r}" if names else ""
        raise ValueError(f"{train.source} has one class only{only}; a classifier needs at least two")
    names = list(splits)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            shared = _first(pc.is_in(splits[one].paths, value_set=splits[other].paths))
            if shared is not None:
                path = splits[one].paths[shared].as_py()
                in_other = _first(pc.equal(splits[other].paths, path))
                raise ValueError(
                    f"{path!r} is in two splits, {one} ({splits[one].where(shared)}) and {other} "
                    f"({splits[other].where(in_other)}): the model would be tested on its training images"
                )


def check_length(source: Path, length: int) -> None:
    """Raises ValueError if a split, from `source`, has `length` bytes of paths, more than its table can hold."""
    if length > _MOST_BYTES:
        raise ValueError(
            f"{source} has {length:,} bytes of paths, and a split can have {_MOST_BYTES:,}: put the images into tar "
            "archives in WebDataset's format and train on them with --streaming, or use fewer images or shorter paths"
        )


def check_files(splits: dict[str, Rows], folder: Path) -> None:
    """Raises FileNotFoundError if images are missing in `folder`, with their number, examples and the likely cause.

    Each folder is listed once, which is faster than a look-up for each image.
    """
    problems, absent, total, example = [], 0, 0, ""
    for split, rows in splits.items():
        parents = pc.dictionary_encode(pc.replace_substring_regex(rows.paths, r"/?[^/]*$", ""))
        order = np.argsort(parents.indices.to_numpy(), kind="stable")
        bounds = np.searchsorted(parents.indices.to_numpy()[order], np.arange(len(parents.dictionary) + 1))
        missing: list[int] = []
        for code, parent in enumerate(parents.dictionary.to_pylist()):
            members = order[bounds[code] : bounds[code + 1]]
            there = _file_names(folder / parent)
            skip = len(parent) + 1 if parent else 0
            missing += [
                index
                for index, path in zip(members.tolist(), rows.paths.take(pa.array(members)).to_pylist(), strict=True)
                if path[skip:] not in there
            ]
        total += len(rows.labels)
        absent += len(missing)
        if missing:
            missing.sort()
            example = example or rows.paths[missing[0]].as_py()
            shown = ", ".join(f"{rows.paths[index].as_py()} ({rows.where(index)})" for index in missing[:_SHOWN])
            problems.append(f"{len(missing):,} of {len(rows.labels):,} {split} images, the first: {shown}")
    if problems:
        raise FileNotFoundError(
            f"images are missing: {'; '.join(problems)}. They were looked for in {folder}. "
            f"{_otherwise_written(folder, example) or _likely_cause(splits, folder, everything=absent == total)}"
        )


def _file_names(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except FileNotFoundError:
        return set()
    except NotADirectoryError:
        return set()
    except PermissionError as error:
        raise PermissionError(f"permission to read {folder} is missing; grant it: chmod -R u+rX {folder}") from error


def _otherwise_written(folder: Path, path: str) -> str | None:
    """Explains that the file `path` in `folder` is there under a name that only looks the same, if it is."""
    for part in path.split("/"):
        there = _file_names(folder)
        if part in there:
            folder = folder / part
            continue
        for name in sorted(there):
            if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", part):
                return (
                    f"{folder / name} is there, but its accents are stored in another way. Rename the files to the way "
                    f"of the list: convmv -r -f utf8 -t utf8 --nfc (or --nfd) --notest {folder}"
                )
            if name.casefold() == part.casefold():
                return f"{folder / name} is there: names are case-sensitive. Write the same name in the list"
        for name in sorted(there):
            if _is_bytes_of(name, part):
                return f"{_shown(name)} is there, but its name is not in UTF-8. {_rename(folder)}"
        return None
    return None


def _is_bytes_of(name: str, wanted: str) -> bool:
    """Whether a file name that is not UTF-8 is `wanted` in an older encoding: ASCII characters agree."""
    is_text = not any("\udc80" <= character <= "\udcff" for character in name)
    if is_text or len(name) != len(wanted):
        return False
    return all(one == other for one, other in zip(name, wanted, strict=True) if other.isascii())


def _likely_cause(splits: dict[str, Rows], folder: Path, everything: bool) -> str:
    top = splits["train"].paths[0].as_py().split("/")[0]
    if everything and not (folder / top).exists():
        below = sorted(path.parent for path in folder.glob(f"*/{top}"))
        if below:
            return f"The images seem to be in {below[0]}: move them up, or name that folder with --data_dir"
        return f"There is no {top}/ in it: have the images been unpacked in this folder?"
    if everything:
        return "None of the images exists: does the list belong to these images?"
    return (
        "The other images exist: was an archive unpacked only in part, or a copy interrupted? Names are case-sensitive "
        "(.JPEG is not .jpg)"
    )


class _RowsBuilder(datasets.ArrowBasedBuilder):
    """Builds cached Arrow tables from rows. The tables contain paths, not pixels.

    The rows are read from `data_files`. The tables are rebuilt when one of these files changes, and only then `read` is
    called.
    """

    VERSION = datasets.Version("2.4.0")  # raise it if the checks or the stored columns change

    def __init__(self, *, folder: Path, read: Callable[[], NamedRows], **kwargs):
        self.folder, self.read = folder, read
        self.rows: dict[str, Rows] = {}
        super().__init__(**kwargs)

    def _info(self):
        return datasets.DatasetInfo()  # the features are known after the rows are read

    def _split_generators(self, dl_manager):
        named = self.read()
        for rows in named.splits.values():
            length = pc.sum(pc.binary_length(rows.paths).cast(pa.int64()), min_count=0).as_py()
            check_length(rows.source, length + len(rows.labels) * len(os.fsencode(f"{self.folder}/")))
        check_files(named.splits, self.folder)
        features = {"image": Image(), "label": ClassLabel(names=named.names)}
        if named.splits["train"].groups is not None:
            features[GROUP] = Value("string")
        self.info.features = Features(features)
        self.info.description = json.dumps(named.notices)  # the only text that is kept with the tables
        self.rows = named.splits
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in self.rows]

    def _generate_tables(self, split) -> Iterator[tuple]:
        rows = self.rows.pop(split)
        absolute = pc.binary_join_element_wise(f"{self.folder}/", rows.paths, "")
        images = pa.StructArray.from_arrays([pa.nulls(len(absolute), pa.binary()), absolute], fields=list(_IMAGE_TYPE))
        groups = {} if rows.groups is None else {GROUP: rows.groups}
        yield (0, 0), pa.table({"image": images, "label": pa.array(rows.labels), **groups})


def load_rows(
    name: str, folder: Path, files: Sequence[Path], read: Callable[[], NamedRows], key: str = ""
) -> DatasetDict:
    """Returns the splits that `read` returns, with images in `folder`, cached until one of `files` or `key` changes.

    Raises the errors of `read`, and FileNotFoundError for missing images. All images are checked when the tables are
    built, and a hundred of each split when the tables come from the cache.
    """
    folder = folder.resolve()
    sources = {"data_files": {"files": as_data_files(files)}} if files else {}
    builder = _RowsBuilder(
        folder=folder, read=read, dataset_name=name, config_name=key or "default", data_dir=str(folder), **sources
    )
    cached = Path(builder.cache_dir).exists()
    builder.download_and_prepare()
    splits = builder.as_dataset()
    for notice in json.loads(builder.info.description):
        notify(notice)
    if cached:
        for split, rows in splits.items():
            looked_at = sorted({round(index) for index in np.linspace(0, len(rows) - 1, _LOOKED_AT)})
            paths = rows.data.column("image").take(pa.array(looked_at)).combine_chunks().field("path").to_pylist()
            if not all(map(os.path.isfile, paths)):
                paths = rows.data.column("image").combine_chunks().field("path").to_pylist()
                absent = [path for path in paths if not os.path.isfile(path)]
                shown = f"{', '.join(absent[:_SHOWN])}{', ...' if len(absent) > _SHOWN else ''}"
                raise FileNotFoundError(
                    f"{len(absent):,} of {len(paths):,} {split} images are not there any more: {shown}. Put them back, "
                    "or give their new place with --data_dir"
                )
    return splits
