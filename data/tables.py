"""Tables: CSV or Parquet files with a column of image paths, or in Parquet of images, and a column of labels."""

import csv
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from datasets import ClassLabel, DatasetDict, Features, Image, Value

from data.columns import arrow_column
from data.notices import notify, some
from data.rows import GROUP, NamedRows, Rows, check_labels, class_codes, load_rows, read_text, with_slashes
from data.split_names import SPLIT_NAMES, as_data_files, split_of

T = TypeVar("T")
SUFFIXES = (".csv", ".tsv", ".parquet")
_SPLIT = "split"  # a column with the split of each row, in a table that is the only one
_FILL = "fill them, or leave these rows out with --on_broken_image skip"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns of a table. `group` holds what images of one group have in common, such as a patient."""

    image: str = "image"
    label: str = "label"
    group: str | None = None

    @property
    def options(self) -> dict[str, str]:
        """Column -> the option that names it."""
        named = {self.image: "--image_column", self.label: "--label_column"}
        return named if self.group is None else {**named, self.group: "--group_by"}

    def check(self, there: list[str], source: str | Path) -> None:
        """Raises ValueError, with the columns that are `there`, if one is missing."""
        for column, option in self.options.items():
            if column not in there:
                raise ValueError(
                    f"{source} has no column {column!r}, only {there}; name it with {option}, or move a table without "
                    "it out of the folder"
                )
        if twice := [name for name, count in Counter(there).items() if count > 1 and name in self.options]:
            raise ValueError(f"{source} has several columns {twice[0]!r}; rename all but one")


def load_tables(
    folder: Path, files: Mapping[str, Sequence[Path]], columns: Columns, skip_empty_rows: bool = False
) -> DatasetDict:
    """Loads tables whose paths are relative to their folder. Parquet files may also contain the images themselves.

    `files` are those of each split; a table of several files is read as one.

    Raises ValueError for files that are no tables, missing columns, and rows without image or label. The latter are
    left out with `skip_empty_rows`.
    """
    if files["train"][0].suffix.lower() == ".parquet":
        schema = _parquet_schema(files["train"][0])
        kind = schema.field(columns.image).type if columns.image in schema.names else pa.string()
        if not _holds_text(kind):
            _check_labels_of_files([path for of_split in files.values() for path in of_split], columns)
            data_files = {split: as_data_files(of_split) for split, of_split in files.items()}
            try:
                loaded = datasets.load_dataset("parquet", data_files=data_files)
            except datasets.exceptions.DatasetGenerationError as error:
                cause = error.__cause__ or error
                raise ValueError(
                    f"the tables of {folder} cannot be read as one data set ({cause}); all files need the same "
                    "columns and types, and a damaged file must be replaced"
                ) from error
            return standardise(_by_own_splits(loaded, folder, columns), folder, columns, skip_empty_rows)

    def read() -> NamedRows:
        tables, notices = {}, []
        for split, of_split in files.items():
            parts = [_read_table(path, columns) for path in of_split]
            for number, path in enumerate(of_split):
                parts[number], notice = _whole_rows(parts[number], path, columns, skip_empty_rows)
                notices += notice
            if len({_SPLIT in part for part in parts}) > 1:
                raise ValueError(
                    f"{_as_one(of_split)}: only some of the files have a column {_SPLIT!r}; make them alike"
                )
            tables[split] = {name: _joined([part[name] for part in parts]) for name in parts[0]}
            if not len(tables[split]["row"]):
                raise ValueError(
                    f"{of_split[0]}: no row of the {split} split has an image and a label; fill them, or remove it"
                )
        sources = {split: _as_one(of_split) for split, of_split in files.items()}
        with_column = [split for split, table in tables.items() if _SPLIT in table]
        if with_column and len(tables) > 1:
            notices.append(_not_used(folder))
        elif with_column:
            table, source = tables["train"], sources["train"]
            tables = {
                split: {name: column.take(indices) for name, column in table.items()}
                for split, indices in _split_rows(table[_SPLIT], source, table["row"].to_numpy()).items()
            }
            sources = dict.fromkeys(tables, source)
        names, notice = class_names(tables["train"]["label"], files["train"][0])
        notices += notice
        rows = {}
        for split, table in tables.items():
            path = sources[split]
            codes = class_codes(table["label"], names, path)
            paths = with_slashes(table["image"], folder)
            group = table[GROUP] if columns.group else None
            rows[split] = Rows(paths, codes, path, table["row"].to_numpy(), unit="row", groups=group)
            rows[split].check_paths()
        check_labels(rows, len(names), names)
        return NamedRows(rows, names, notices)

    used = [path for of_split in files.values() for path in of_split]
    key = "\0".join([*columns.options, str(skip_empty_rows), *(f"{split} {len(files[split])}" for split in files)])
    return load_rows("custom", folder, used, read, key=hashlib.blake2b(key.encode()).hexdigest()[:16])


def _own_splits(there: Sequence[str], columns: Columns) -> str | None:
    """Returns the column with the split of each row, if there is one that no option names."""
    return next((name for name in there if name.strip().lower() == _SPLIT and name not in columns.options), None)


def _not_used(folder: Path) -> str:
    return f"{folder}: the files are the splits, so the column {_SPLIT!r} of the tables is not used"


def _split_rows(values: pa.Array, source: str | Path, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the indices of the rows of each split. `rows` are their numbers, for messages.

    Raises ValueError for a value that is no split's name, and if no row is for training.
    """
    names = values.to_pylist()
    splits = {name: split_of(name or "") for name in set(names)}
    for row, name in zip(rows.tolist(), names, strict=True):
        if splits[name] is None:
            what = "is empty" if not name else f"has {name!r}, which is no split"
            raise ValueError(
                f"{source}: column {_SPLIT!r} {what}, in row {row:,}; write train, val or test, or rename the column "
                "if it means something else"
            )
    of_rows = np.array([splits[name] for name in names])
    found = {split: np.flatnonzero(of_rows == split) for split in SPLIT_NAMES if split in splits.values()}
    if "train" not in found:
        raise ValueError(f"{source}: column {_SPLIT!r} has no row for train; mark the rows to train on")
    return found


def _by_own_splits(loaded: DatasetDict, folder: Path, columns: Columns) -> DatasetDict:
    """Returns the splits that the column of splits gives, if there is one in a table that is the only one."""
    column = _own_splits(loaded["train"].column_names, columns)
    if column is None:
        return loaded
    if len(loaded) > 1:
        notify(_not_used(folder))
        return loaded
    rows = loaded["train"]
    values = as_text(rows.data.column(column), f"{folder}: column {column!r}")
    found = _split_rows(pc.utf8_trim_whitespace(values), folder, np.arange(1, len(rows) + 1))
    return DatasetDict({split: rows.select(indices) for split, indices in found.items()})


def _check_labels_of_files(files: Sequence[Path], columns: Columns) -> None:
    """Raises ValueError if the labels of files differ in kind. `datasets` would give them all the kind of the first."""
    first: str | None = None
    for path in files:
        schema = _parquet_schema(path)
        columns.check(schema.names, path)
        feature = Features.from_arrow_schema(schema)[columns.label]
        if isinstance(feature, ClassLabel):
            kind = f"the classes {some(feature.names)}"
        elif pa.types.is_null(feature.pa_type if isinstance(feature, Value) else pa.bool_()):
            continue
        else:
            kind = "text" if _holds_text(schema.field(columns.label).type) else "numbers"
        first = first or kind
        if kind != first:
            raise ValueError(
                f"{path}: column {columns.label!r} has {kind}, but {first} in {files[0]}; write the same kind in all "
                "files"
            )


def _joined(parts: Sequence[pa.Array]) -> pa.Array:
    return parts[0] if len(parts) == 1 else pa.concat_arrays(parts)


def _as_one(files: Sequence[Path]) -> Path:
    """How messages call a table. The rows of a table of several files are counted in each of them."""
    others = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return files[0].with_name(f"{files[0].name}{others}")


def _parquet_schema(path: Path) -> pa.Schema:
    try:
        return pyarrow.parquet.read_schema(path)
    except pa.ArrowInvalid as error:
        if is_lfs_pointer(path):
            raise ValueError(NOT_DOWNLOADED.format(path)) from error
        raise ValueError(f"{path} is no Parquet file, or is damaged: {error}; download it again") from error


NOT_DOWNLOADED = "{} is only the pointer of a file in Git LFS; download the file itself by: git lfs pull"


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file of a cloned repository has not been downloaded by Git LFS."""
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def _read_csv(path: Path, columns: Columns) -> pa.Table:
    """Reads a table. Its delimiter is the most frequent of comma, semicolon and tab in the first line.

    The columns that are used are read as text: 007 is not 7, NA is not missing, and True is a name.
    """
    text = read_text(path)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    header = next(csv.reader([text.partition("\n")[0]], delimiter=delimiter), [])
    used = {*columns.options, _own_splits([name.strip() for name in header], columns)}
    table = pyarrow.csv.read_csv(
        pa.BufferReader(text.encode()),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values='"' in text),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in header if name.strip() in used},
            strings_can_be_null=False,
        ),
    )
    return table.rename_columns([name.strip() for name in table.column_names])


def _read_table(path: Path, columns: Columns) -> dict[str, pa.Array]:
    """Returns the columns `image`, `label` and `GROUP`, as text that may be null, and `row`, counted from 1."""
    is_parquet = path.suffix.lower() == ".parquet"
    try:
        table = pyarrow.parquet.read_table(path) if is_parquet else _read_csv(path, columns)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:].lower()}: {error}") from error
    columns.check(table.column_names, path)
    if not len(table):
        raise ValueError(f"{path} has no rows")
    read = {"row": pa.array(np.arange(1, len(table) + 1))}
    named = {"image": columns.image, "label": columns.label, GROUP: columns.group}
    for name, column in {**named, _SPLIT: _own_splits(table.column_names, columns)}.items():
        if column is not None:
            text = pc.utf8_trim_whitespace(as_text(table.column(column), f"{path}: column {column!r}"))
            read[name] = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    return read


def _whole_rows(
    table: dict[str, pa.Array], path: Path, columns: Columns, skip: bool
) -> tuple[dict[str, pa.Array], list[str]]:
    """Returns the rows with image and label, and a notice if others are left out. Raises ValueError unless `skip`."""
    whole = np.ones(len(table["row"]), dtype=bool)
    for name, column in (("image", columns.image), ("label", columns.label)):
        empty = np.flatnonzero(pc.is_null(table[name]).to_numpy(zero_copy_only=False))
        if empty.size and not skip:
            raise ValueError(f"{path}: column {column!r} is empty in {_rows(empty)}; {_FILL}")
        whole[empty] = False
    if whole.all():
        return table, []
    notice = f"{path}: rows without image or label are left out: {_rows(np.flatnonzero(~whole))}"
    return {name: column.filter(pa.array(whole)) for name, column in table.items()}, [notice]


def _rows(indices: np.ndarray) -> str:
    return f"row {some([f'{index + 1:,}' for index in indices.tolist()])}"


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _holds_text(kind: pa.DataType) -> bool:
    """Whether a column is text, perhaps as pandas' categories."""
    return _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind)


def as_text(values: pa.Array | pa.ChunkedArray, where: str) -> pa.Array:
    """Returns values as text: names as they are, whole numbers in digits, True and False.

    Raises ValueError, starting with `where`, for other types.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    kind = values.type
    if pa.types.is_dictionary(kind):  # pandas' categories
        return as_text(values.cast(kind.value_type), where)
    if _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind):
        return values.cast(pa.string())
    if pa.types.is_boolean(kind):
        return pc.if_else(values, "True", "False")
    if pa.types.is_floating(kind):  # pandas' whole numbers, if a cell is missing
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, kind), values)
        if pc.all(pc.equal(values, pc.floor(values))).as_py() is not False:
            return values.cast(pa.int64()).cast(pa.string())
    raise ValueError(f"{where} holds {kind}; expected names or whole numbers")


def class_names(labels: pa.Array, source: str | Path) -> tuple[list[str], list[str]]:
    """Returns the classes of the training labels, which are text (N,), in the order of their numbers; and notices.

    Labels that are the numbers 0 to C-1 keep their values. Any others are names, sorted; numbers by value.
    Raises ValueError for negative numbers: they mean that a label is missing.
    """
    found = pc.unique(labels).to_pylist()
    if not all(name.removeprefix("-").isdecimal() and name.isascii() for name in found):
        return sorted(found), []
    if negative := [name for name in found if name.startswith("-")]:
        raise ValueError(f"{source}: label {negative[0]} is no class; give these images a label or leave them out")
    names = sorted(found, key=lambda name: (int(name), name))
    if names == [str(label) for label in range(len(names))]:
        return names, []
    notice = f"{source}: the labels are not 0 to {len(names) - 1}, so they are the names of classes: {some(names)}"
    return names, [notice]


def standardise(
    loaded: DatasetDict, source: str | Path, columns: Columns | None = None, skip_empty_rows: bool = False
) -> DatasetDict:
    """Gives any data set the splits, columns and label names that this library uses.

    Splits are renamed to train, validation and test. Other splits are dropped, with a notice, and so are splits without
    labels: some public test splits have the label -1 everywhere. Raises ValueError for missing columns, labels that
    are neither names nor whole numbers, classes without training images, and rows without image or label, which are
    left out with `skip_empty_rows`.
    """
    columns = columns or Columns()
    splits = known_splits(loaded, source)
    for split, rows in splits.items():
        columns.check(list(rows.features), source)
        wanted = {columns.image: "image", columns.label: "label"} | ({columns.group: GROUP} if columns.group else {})
        rows = rows.select_columns(list(wanted))
        splits[split] = rows.rename_columns({old: new for old, new in wanted.items() if old != new})
        if columns.group:
            splits[split] = _with_groups(splits[split], f"{source}, split {split}: column {columns.group!r}")
    if not isinstance(splits["train"].features["image"], Image):
        for split, rows in splits.items():
            _check_image_column(rows, f"{source}, split {split}: column {columns.image!r}")
        splits = {split: rows.cast_column("image", Image()) for split, rows in splits.items()}
    feature = splits["train"].features["label"]
    unlabelled = [split for split, rows in splits.items() if split != "train" and _has_no_labels(rows)]
    for split in unlabelled:
        notify(f"{source}: the split {split} has no labels and is not used")
    splits = {split: rows for split, rows in splits.items() if split not in unlabelled}
    for split, rows in splits.items():
        splits[split] = _rows_with_all(rows, f"{source}, split {split}", columns, skip_empty_rows)
    if not isinstance(feature, ClassLabel):
        texts = {
            split: as_text(rows.with_format("arrow")["label"][:], f"{source}: column {columns.label!r}")
            for split, rows in splits.items()
        }
        names, notices = class_names(texts["train"], source)
        for notice in notices:
            notify(notice)
        feature = ClassLabel(names=names)
        for split, rows in splits.items():
            codes = class_codes(texts[split], names, f"{source}, split {split}")
            splits[split] = rows.remove_columns("label").add_column("label", codes.tolist(), feature=feature)
    nothing = pa.array([], pa.string())  # only lists need the check for a path in two splits
    check_labels(
        {
            split: Rows(nothing, rows.with_format("arrow")["label"].to_numpy(), Path(f"{source}, split {split}"))
            for split, rows in splits.items()
        },
        feature.num_classes,
        feature.names,
    )
    return DatasetDict(splits)


def known_splits(loaded: Mapping[str, T], source: str | Path) -> dict[str, T]:
    """Returns the splits by the names of this library, with a notice of other splits, which are not used.

    Raises ValueError if there is no training split, or if several splits have the same meaning.
    """
    splits: dict[str, T] = {}
    others = []
    for name, rows in loaded.items():
        split = split_of(name)
        if split in splits:
            raise ValueError(f"{source} has several splits for {split}, one of them {name}; keep one")
        if split is None:
            others.append(name)
        else:
            splits[split] = rows
    if "train" not in splits:
        raise ValueError(f"{source} has no training split, only {', '.join(loaded)}")
    if others:
        notify(f"{source}: splits that are not used: {some(others)}")
    return splits


def _with_groups(rows: datasets.Dataset, where: str) -> datasets.Dataset:
    """Returns rows whose empty groups are null: each of these images is a group of its own, as in other tables."""
    values = _stored(rows, GROUP)
    if pa.types.is_nested(values.type):
        raise ValueError(f"{where} holds {values.type}; name a column of text or numbers with --group_by")
    if not _is_text(values.type):
        return rows
    text = pc.utf8_trim_whitespace(values)
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text)
    if text.equals(values):
        return rows
    return rows.remove_columns(GROUP).add_column(GROUP, text.to_pylist(), feature=Value("string"))


def _check_image_column(rows: datasets.Dataset, where: str) -> None:
    """Raises ValueError for a column that cannot hold images."""
    kind = rows.features.arrow_schema.field("image").type
    if _is_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind):
        return
    if pa.types.is_struct(kind) and {"bytes", "path"} >= {field.name for field in kind}:
        return
    raise ValueError(f"{where} holds {kind}; expected images or their paths. Name their column with --image_column")


def _stored(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column as it is stored, in the order of the rows."""

    return arrow_column(rows, name)


def _has_no_labels(rows: datasets.Dataset) -> bool:
    labels = _stored(rows, "label")
    if labels.null_count == len(labels):
        return True
    return pa.types.is_integer(labels.type) and bool(pc.all(pc.less(labels, 0)).as_py())


def _rows_with_all(rows: datasets.Dataset, where: str, columns: Columns, skip: bool) -> datasets.Dataset:
    """Returns the rows that have an image and a label. Raises ValueError for others unless `skip`."""
    table = rows.with_format("arrow").cast_column("image", Image(decode=False))
    whole = np.ones(len(rows), dtype=bool)
    for name, column in (("image", columns.image), ("label", columns.label)):
        empty = _empty(_stored(table, name))
        if empty.size and not skip:
            raise ValueError(f"{where}: column {column!r} is empty in {_rows(empty)}; {_FILL}")
        whole[empty] = False
    if whole.all():
        return rows
    if not whole.any():
        raise ValueError(f"{where}: no row has an image and a label; fill them, or remove the split")
    notify(f"{where}: rows without image or label are left out: {_rows(np.flatnonzero(~whole))}")
    return rows.select(np.flatnonzero(whole))


def _empty(values: pa.ChunkedArray) -> np.ndarray:
    empty = pc.is_null(values, nan_is_null=pa.types.is_floating(values.type))
    if pa.types.is_struct(values.type):
        fields = (pc.struct_field(values, name) for name in ("bytes", "path"))
        without = [pc.is_null(field) for field in fields]
        empty = pc.or_(empty, pc.and_(*without))
    elif _is_text(values.type):
        empty = pc.or_kleene(empty, pc.equal(pc.utf8_trim_whitespace(values), ""))
    return np.flatnonzero(empty.to_numpy())
