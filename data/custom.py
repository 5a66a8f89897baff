"""Your own images: annotation lists, folders of images, a table, or a data set on the Hub."""

import hashlib
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from datasets import ClassLabel, DatasetDict, Image

from data.annotation_lists import load_own_lists
from data.formats import image_suffixes
from data.hub_ids import is_hub_id
from data.rows import NamedRows, Rows, check_labels, load_rows, read_text

# split -> what its file, folder or split on the Hub may be called
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval"),
}
_TABLES = (".csv", ".parquet")
# What `datasets` raises if the Hub does not have an id; RuntimeError if the data set needs code of its own
NOT_ON_THE_HUB = (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError, RuntimeError)
EXPECTED = (
    "expected one of: lists train.txt (and val.txt, test.txt) of lines 'relative/path.jpg label'; folders "
    "train/CLASS/*.jpg (and val/, test/), or CLASS/*.jpg; tables train.csv or train.parquet (and val, test), or the "
    "path of one table; the id of a data set on the Hub"
)


def load_custom(data_dir: str | Path, image_column: str | None = None, label_column: str | None = None) -> DatasetDict:
    """Loads the images at `data_dir`, with the splits that they have. See `data.load_long_tailed`.

    `image_column` and `label_column`, by default "image" and "label", name columns of a table or of a data set on the
    Hub. Raises ValueError if they are given and `data_dir` has no columns.
    """
    place = Path(data_dir)
    named = {"image_column": image_column, "label_column": label_column}
    named = {option: column for option, column in named.items() if column is not None}
    image_column, label_column = image_column or "image", label_column or "label"
    if place.is_file():
        if place.suffix not in _TABLES:
            raise ValueError(f"{place} is not a table of a known format ({', '.join(_TABLES)}); {EXPECTED}")
        return _load_tables(place.parent, {"train": place}, image_column, label_column)
    if not place.exists():
        if is_hub_id(data_dir):
            return _load_from_hub(str(data_dir), image_column, label_column)
        raise FileNotFoundError(f"{place} does not exist; {EXPECTED}")
    for suffix, load in ((".txt", load_own_lists), *((suffix, None) for suffix in _TABLES)):
        files = split_files(place, suffix)
        if "train" in files:
            if load is None:
                return _load_tables(place, files, image_column, label_column)
            _refuse_columns(named, files["train"])
            return load(place, files)
    _refuse_columns(named, place)
    return _load_folders(place)


def _refuse_columns(named: dict[str, str], source: Path) -> None:
    if named:
        options = " and ".join(f"--{option} {column}" for option, column in named.items())
        raise ValueError(f"{source} has no columns, so {options} would do nothing; leave it out")


def split_files(folder: Path, suffix: str) -> dict[str, Path]:
    """Finds the file of each split: `train.txt`, or a file whose name ends like that ("Places_LT_train.txt")."""
    found: dict[str, Path] = {}
    for split, names in SPLIT_NAMES.items():
        files = sorted(
            path for path in folder.glob(f"*{suffix}") if path.stem.lower().replace("-", "_").split("_")[-1] in names
        )
        if len(files) > 1:
            raise ValueError(
                f"{folder} has several lists for {split}: {', '.join(path.name for path in files)}; keep one"
            )
        if files:
            found[split] = files[0]
    return found


def _load_folders(place: Path) -> DatasetDict:
    """Loads a folder for each class, below a folder for each split, or at the top if there are no splits."""
    with os.scandir(place) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    splits = {split: name for split, names in SPLIT_NAMES.items() for name in folders if name.lower() in names}
    if splits and "train" not in splits:
        raise ValueError(f"{place} has {', '.join(sorted(splits.values()))} but no folder train; {EXPECTED}")
    tops = {split: f"{name}/" for split, name in splits.items()} or {"train": ""}
    found = {split: _scan(place, top) for split, top in tops.items()}
    names = sorted({path[len(tops["train"]) :].split("/")[0] for path in found["train"]})
    if not names:
        raise ValueError(
            f"{place} has no folders of images (.jpg, .png and other suffixes of images that PIL reads); {EXPECTED}"
        )

    def read() -> NamedRows:
        rows = {}
        for split, paths in found.items():
            classes = pa.array([path[len(tops[split]) :].split("/")[0] for path in paths], pa.string())
            rows[split] = Rows(
                pa.array(paths, pa.string()), _codes(classes, names, place / tops[split]), place / tops[split]
            )
        check_labels(rows, len(names))
        return NamedRows(rows, names)

    # The tables are built from the files' names. A hash of the names shows whether they have changed.
    digest = hashlib.blake2b(digest_size=16)
    for split, paths in found.items():
        digest.update("\0".join([split, *paths, ""]).encode(errors="surrogateescape"))
    return load_rows("custom", place, [], read, key=digest.hexdigest())


def _scan(place: Path, top: str) -> list[str]:
    """Returns the images below `place/top`CLASS/, at any depth, relative to `place`."""
    found = []
    for folder, below, files in os.walk(place / top, followlinks=True, onerror=_refuse):
        below[:] = sorted(name for name in below if not name.startswith("."))
        relative = os.path.relpath(folder, place).replace(os.sep, "/")
        depth = 0 if relative == "." else relative.count("/") + 1
        if depth <= top.count("/"):
            continue  # files next to the folders of the classes have no class
        found += [
            f"{relative}/{name}"
            for name in sorted(files)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes()
        ]
    return found


def _refuse(error: OSError) -> None:
    raise PermissionError(
        f"{error.filename} cannot be read ({error.strerror}); remedy: chmod -R u+rX {error.filename}"
    ) from error


def _load_tables(folder: Path, files: dict[str, Path], image_column: str, label_column: str) -> DatasetDict:
    """Loads tables whose paths are relative to their folder. Parquet files may also contain the images themselves."""
    if files["train"].suffix == ".parquet":
        schema = _parquet_schema(files["train"])
        kind = schema.field(image_column).type if image_column in schema.names else pa.string()
        if not _is_text(kind):
            data_files = {split: str(path.resolve()) for split, path in files.items()}
            return standardise(
                datasets.load_dataset("parquet", data_files=data_files), folder, image_column, label_column
            )

    def read() -> NamedRows:
        columns = {split: _read_table(path, image_column, label_column) for split, path in files.items()}
        names = _names(columns["train"][1], files["train"], label_column)
        rows = {}
        for split, (paths, labels) in columns.items():
            numbers = np.arange(1, len(paths) + 1)
            rows[split] = Rows(paths, _codes(labels, names, files[split]), files[split], numbers, unit="row")
            rows[split].check_paths()
        check_labels(rows, len(names))
        return NamedRows(rows, names)

    key = f"{image_column}\0{label_column}"
    return load_rows("custom", folder, list(files.values()), read, key=hashlib.blake2b(key.encode()).hexdigest()[:16])


def _parquet_schema(path: Path) -> pa.Schema:
    try:
        return pyarrow.parquet.read_schema(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file, or is damaged: {error}") from error


def _read_csv(path: Path) -> pa.Table:
    """Reads a table. Its delimiter is the most frequent of comma, semicolon and tab in the first line."""
    text = read_text(path)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    return pyarrow.csv.read_csv(
        pa.BufferReader(text.encode()), parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter)
    )


def _read_table(path: Path, image_column: str, label_column: str) -> tuple[pa.Array, pa.Array]:
    try:
        table = pyarrow.parquet.read_table(path) if path.suffix == ".parquet" else _read_csv(path)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
    for column, option in ((image_column, "--image_column"), (label_column, "--label_column")):
        if column not in table.column_names:
            raise ValueError(f"{path} has no column {column!r}, only {table.column_names}; name it with {option}")
        if pa.types.is_dictionary(table.column(column).type):  # pandas' categories
            values = table.column(column).cast(table.column(column).type.value_type)
            table = table.set_column(table.column_names.index(column), column, values)
        empty = table.column(column).null_count
        if _is_text(table.column(column).type):
            empty += pc.sum(pc.equal(pc.utf8_trim_whitespace(table.column(column)), "")).as_py() or 0
        if empty:
            raise ValueError(
                f"{path}: column {column!r} has {empty} empty cell(s); every row needs an image and a label"
            )
    if not len(table):
        raise ValueError(f"{path} has no rows")
    return (
        table.column(image_column).cast(pa.string()).combine_chunks(),
        table.column(label_column).combine_chunks(),
    )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _names(labels: pa.Array, source: Path, label_column: str) -> list[str]:
    """Returns the classes of a training table: its strings, sorted, or the numbers from 0 to the largest label."""
    if pa.types.is_integer(labels.type):
        return [str(label) for label in range(pc.max(labels).as_py() + 1)]
    if _is_text(labels.type):
        return sorted(pc.unique(labels).to_pylist())
    raise ValueError(f"{source}: column {label_column!r} holds {labels.type}; labels are names or whole numbers from 0")


def _codes(labels: pa.Array, names: list[str], source: Path) -> np.ndarray:
    """Returns labels (N,) as numbers. Raises ValueError for a name that no training image has."""
    if pa.types.is_integer(labels.type) and names == [str(label) for label in range(len(names))]:
        return pc.cast(labels, pa.int64()).to_numpy()
    labels = pc.cast(labels, pa.string())  # a split whose names are all digits was read as numbers
    codes = pc.index_in(labels, value_set=pa.array(names, pa.string()))
    if codes.null_count:
        unknown = pc.unique(labels.filter(pc.is_null(codes))).to_pylist()
        raise ValueError(
            f"{source} has {len(unknown)} class(es) without training images, {', '.join(map(repr, unknown[:5]))}; "
            f"the training images have {', '.join(map(repr, names[:5]))}{' ...' if len(names) > 5 else ''}"
        )
    return pc.cast(codes, pa.int64()).to_numpy()


def _load_from_hub(name: str, image_column: str, label_column: str) -> DatasetDict:
    try:
        loaded = datasets.load_dataset(name)
    except (*NOT_ON_THE_HUB, ValueError) as error:
        raise ValueError(
            f"{name!r} does not exist here, and the Hub has no data set of that id to load ({error}); {EXPECTED}"
        ) from error
    return standardise(loaded, name, image_column, label_column)


def standardise(
    loaded: DatasetDict, source: str | Path, image_column: str = "image", label_column: str = "label"
) -> DatasetDict:
    """Gives any data set the splits, columns and label names that this library uses.

    Splits are renamed to train, validation and test. Other splits are dropped, and so are splits without labels: some
    public test splits have the label -1 everywhere. Raises ValueError for missing columns, labels that are neither
    names nor whole numbers, and classes without training images.
    """
    splits = {
        split: rows for split, names in SPLIT_NAMES.items() for name, rows in loaded.items() if name.lower() in names
    }
    if "train" not in splits:
        raise ValueError(f"{source} has no training split, only {', '.join(loaded)}")
    for split, rows in splits.items():
        for column, option in ((image_column, "--image_column"), (label_column, "--label_column")):
            if column not in rows.features:
                raise ValueError(
                    f"{source} has no column {column!r}, only {list(rows.features)}; name it with {option}"
                )
        splits[split] = rows.select_columns([image_column, label_column]).rename_columns(
            {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
        )
    if not isinstance(splits["train"].features["image"], Image):
        splits = {split: rows.cast_column("image", Image()) for split, rows in splits.items()}
    if not isinstance(splits["train"].features["label"], ClassLabel):
        labels = {split: rows.with_format("arrow")["label"] for split, rows in splits.items()}
        labels = {
            split: column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            for split, column in labels.items()
        }
        names = _names(labels["train"], Path(str(source)), label_column)
        feature = ClassLabel(names=names)
        for split, rows in splits.items():
            codes = _codes(labels[split], names, Path(str(source)))
            splits[split] = rows.remove_columns("label").add_column("label", codes.tolist(), feature=feature)
    unlabelled = [split for split, rows in splits.items() if (rows.with_format("arrow")["label"].to_numpy() < 0).all()]
    splits = {split: rows for split, rows in splits.items() if split not in unlabelled}
    num_classes = splits["train"].features["label"].num_classes
    nothing = pa.array([], pa.string())  # only lists need the check for a path in two splits
    check_labels(
        {
            split: Rows(nothing, rows.with_format("arrow")["label"].to_numpy(), Path(f"{source}, split {split}"))
            for split, rows in splits.items()
        },
        num_classes,
    )
    return DatasetDict(splits)
