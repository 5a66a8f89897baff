"""Streamed data sets: they are read from front to back during training, because they do not fit on the disk."""

import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Features, Image, IterableDataset, load_dataset_builder
from torch import Tensor
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info
from tqdm.auto import tqdm

from data.batches import derived_seed
from data.custom import NOT_ON_THE_HUB
from data.hub_ids import is_hub_id, refuse_missing
from data.notices import notify, some
from data.split_names import SPLIT_NAMES, as_data_files, split_of
from data.tables import NOT_DOWNLOADED, as_text, class_names, is_lfs_pointer, known_splits
from data.tar_archives import LABEL_COUNTS, TarArchives
from data.transforms import collate_prepared, leave_out_broken, only_whole
from data.writing import whole_file

# usual names of the two columns in WebDataset archives and on the Hub
_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
_LABEL_COLUMNS = ("label", "cls")
SHUFFLE_BUFFER = 1000  # encoded images to draw the next one from: about 100 MB in each worker
EXPECTED = (
    "streaming reads a folder of tar archives in WebDataset's format, train-*.tar and test-*.tar (and val-*.tar) or "
    "train/*.tar and test/*.tar, or "
    "a data set's id on the Hub"
)


@dataclass(frozen=True)
class ImageStream:
    """A split that is read image by image. `rows` has the columns `image`, undecoded, and `label`, as it is stored."""

    rows: IterableDataset
    names: list[str]
    counts: list[int]
    codes: dict[str | int, int]
    """Stored label -> class."""

    @property
    def features(self) -> Features:
        """The features that a split on disk would have."""
        return Features({"image": Image(), "label": ClassLabel(names=self.names)})

    def __len__(self) -> int:
        return sum(self.counts)


class TrainStream(TorchIterableDataset):
    """The rows of a stream that never ends, each with `draw`, the numbers that identify it in a run.

    `draw` is the epoch, the worker and the number of the row in that worker's epoch. So the augmentation depends on
    nothing else, and a resumed run goes on with the same images. The state that `datasets` keeps of a stream would not
    do: it loses the images in the shuffle buffer.

    Args:
        rows: the part of a process, in an order that depends only on the epoch.
        batch_size: rows in a batch.
        num_workers: of the loader. At most `rows.num_shards`: then batch i is one of worker i % num_workers.
    """

    def __init__(self, rows: IterableDataset, batch_size: int, num_workers: int):
        self.rows, self.batch_size, self.num_workers = rows, batch_size, max(1, num_workers)
        self._skipped = torch.zeros((), dtype=torch.int64).share_memory_()  # workers outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)

    def skip_batches(self, number: int) -> int:
        """Leaves out the first batches of the next epoch. Returns how many, at most `number`: as many of each worker.

        Their images are read, because tar archives have no index, but not decoded.
        """
        self._skipped.fill_(number // self.num_workers)
        return int(self._skipped) * self.num_workers

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        first = int(self._skipped) * self.batch_size
        for number, row in enumerate(self.rows):
            if number >= first:
                yield {**row, "draw": (self.rows.epoch, worker, number)}


@dataclass(frozen=True)
class StreamCollate:
    """Makes a batch of a stream's rows, prepared with `transform`, for `DataLoader(collate_fn)`."""

    transform: Callable[[dict], dict]
    codes: dict[str | int, int]
    leave_out: bool
    """Whether broken images are left out. Otherwise they stay, with the label `data.BROKEN`.

    If they are left out and only one image of a batch can be read, the batch also has a second augmentation of it.
    """
    seed: tuple[int, ...] | None = None
    """Numbers that, with the `draw` of a row, seed its augmentation. None: rows without `draw`; nothing is seeded."""

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        prepared = [self._prepare(row) for row in rows]
        if not self.leave_out:
            return collate_prepared(prepared)
        alone = only_whole(prepared)
        return leave_out_broken(prepared if alone is None else [*prepared, self._prepare(rows[alone], 1)])

    def _prepare(self, row: dict, *again: int) -> dict:
        with torch.random.fork_rng(devices=[], enabled=self.seed is not None):  # the training step may use it too
            if self.seed is not None:
                torch.default_generator.manual_seed(derived_seed(*self.seed, *row["draw"], *again))
            prepared = self.transform({"image": [row["image"]], "label": [self.codes[row["label"]]]})
        return {name: values[0] for name, values in prepared.items()}


def load_streams(
    place: str | Path, image_column: str | None = None, label_column: str | None = None, skip_empty_rows: bool = False
) -> dict[str, ImageStream]:
    """Loads the splits of tar archives or of a data set on the Hub. See `data.load_long_tailed`.

    The losses need the number of images of each class. So the first time, every split is read once to count them, and
    the counts are kept in the cache of the `datasets` library. Labels become classes as in `data.tables`.

    Raises ValueError if `place` or a column is wrong, if a class has no training images, and for rows without image or
    label, which are left out with `skip_empty_rows`. Issues a notice for archives and splits that are not read.
    """
    archives = _find_archives(place) if Path(place).is_dir() else None
    try:
        builder = _builder(place, archives)
        splits = known_splits(builder.as_streaming_dataset(), place)
        features = splits["train"].features
        image_column = _column(image_column, _IMAGE_COLUMNS, features, place, "--image_column", archives)
        label_column = _column(label_column, _LABEL_COLUMNS, features, place, "--label_column", archives)
        columns = {image_column: "image", label_column: "label"}
        undecoded = {split: rows.cast_column(image_column, Image(decode=False)) for split, rows in splits.items()}
        renamed = {column: name for column, name in columns.items() if column != name}  # the others cannot be renamed
        stored = {
            split: rows.select_columns(list(columns)).rename_columns(renamed) for split, rows in undecoded.items()
        }
        counted = _prepared_counts(place, archives, label_column) or _count(builder, stored, image_column, label_column)
    except (tarfile.TarError, UnicodeDecodeError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(_what_is_wrong(place, archives, error)) from error
    except ValueError as error:
        if "WebDataset format" not in str(error) and "Duplicate field" not in str(error):
            raise
        raise ValueError(_what_is_wrong(place, archives, error)) from error
    if archives and any(counts[None] for counts in counted.values()) and (said := _other_suffix(archives)):
        raise ValueError(said)
    for split in [split for split in stored if split != "train" and _has_no_labels(counted[split])]:
        notify(f"{place}: the split {split} has no labels and is not used")
        del stored[split], counted[split]
    if "test" not in stored:
        raise ValueError(f"{place} has no split for test, only {', '.join(splits)}; {EXPECTED}")
    for split, counts in counted.items():
        of_split = (archives or {}).get(split, [])
        stored[split] = _with_all(stored[split], counts, f"{place}, split {split}", of_split, skip_empty_rows)
    return _with_classes(stored, counted, features[label_column], place)


def _find_archives(folder: str | Path) -> dict[str, list[Path]]:
    """Finds the archives of each split: by a word of their names, or else by the name of their folder.

    Raises ValueError if there are none for training, or if several names have the meaning of one split. Issues a notice
    for archives that are not read.
    """
    found: dict[str, dict[str, list[Path]]] = {}
    others = []
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in path.parts[len(Path(folder).parts) :]) or not path.is_file():
            continue
        if path.suffix.lower() != ".tar":
            if ".tar" in [suffix.lower() for suffix in path.suffixes] or path.suffix.lower() == ".tgz":
                others.append(f"{name} (unpack it to .tar)")
            continue
        words = [word for word in re.findall("[a-z]+", path.stem.lower()) if split_of(word)]
        words = words or [word for word in (path.parent.name.lower(),) if name.count("/") == 1 and split_of(word)]
        if len(set(words)) > 1:
            raise ValueError(f"{path} has the names of several splits, {' and '.join(words)}; keep one in its name")
        if words:
            found.setdefault(split_of(words[0]), {}).setdefault(words[0], []).append(path)
        else:
            others.append(name)
    for split, of_split in found.items():
        if len(of_split) > 1:
            first = ", ".join(files[0].relative_to(folder).as_posix() for files in of_split.values())
            raise ValueError(f"{folder} has archives of several names for {split}: {first}; keep one name")
    if "train" not in found:
        hint = f", only {some(others or [files[0].name for of in found.values() for files in of.values()])}"
        raise ValueError(f"{folder} has no tar archives to train on{hint if others or found else ''}; {EXPECTED}")
    if others:
        notify(f"{folder}: archives that belong to no split are not read: {some(others)}")
    return {split: next(iter(found[split].values())) for split in SPLIT_NAMES if split in found}


def _builder(place: str | Path, archives: dict[str, list[Path]] | None) -> datasets.DatasetBuilder:
    if archives is not None:
        return TarArchives(data_files={split: as_data_files(files) for split, files in archives.items()})
    if Path(place).exists() or not is_hub_id(place):
        raise ValueError(f"{place} cannot be streamed; {EXPECTED}")
    refuse_missing(place)
    try:
        return load_dataset_builder(str(place))
    except NOT_ON_THE_HUB as error:
        raise ValueError(f"{str(place)!r} cannot be loaded from the Hub ({error}); {EXPECTED}") from error


def _what_is_wrong(place: str | Path, archives: dict[str, list[Path]] | None, error: Exception) -> str:
    """Explains an error in the archives, with the archive and the remedy."""
    for path in (path for files in (archives or {}).values() for path in files):
        if is_lfs_pointer(path):
            return NOT_DOWNLOADED.format(path)
        try:
            members = _members(path)
        except tarfile.TarError as broken:
            return f"{path} is no tar archive, or is damaged: {broken}; replace it"
        if said := _dotted(path, members) or _incomplete(path, members):
            return said
    if isinstance(error, UnicodeDecodeError):
        return f"{place} has a label that is not in UTF-8 ({error}); write the labels in UTF-8"
    return f"{place} cannot be read: {error}; expected files KEY.jpg and KEY.cls of each image, one after the other"


def _members(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        return [member.name for member in archive if member.isfile()]


def _dotted(path: Path, members: Sequence[str]) -> str | None:
    """Explains a dot in the key of an image."""
    for name in members:
        key, _, rest = name.rpartition("/")[2].partition(".")
        if "." in rest and rest.rpartition(".")[2].lower() in _IMAGE_COLUMNS:
            better = name.rpartition(".")[0].rpartition("/")[2].replace(".", "_")
            return (
                f"{path}: {name} has a dot in its key. WebDataset ends the key at the first dot, so this is the column "
                f"{rest!r} of the key {key!r}. Rename the files of the archive, for example to "
                f"{better}.{rest.rpartition('.')[2]}; if {rest!r} is meant as a column, name it with --image_column"
            )
    return None


def _incomplete(path: Path, members: Sequence[str]) -> str | None:
    """Explains a first image whose files differ from those of the others."""
    kinds: dict[str, list[str]] = {}
    for name in members:
        folder, slash, file = name.rpartition("/")
        key, _, kind = file.partition(".")
        kinds.setdefault(f"{folder}{slash}{key}", []).append(kind)
    usual = Counter(tuple(sorted(of_key)) for of_key in kinds.values()).most_common(1)
    for key, of_key in kinds.items():
        if tuple(sorted(of_key)) != usual[0][0]:
            files = " and ".join(f".{kind}" for kind in usual[0][0])
            here = ", ".join(f".{kind}" for kind in of_key)
            return (
                f"{path}: {key} has the files {here}, but other images have {files}; "
                "add what is missing, with one suffix for all images, or remove this image from the archive"
            )
    return None


def _other_suffix(archives: dict[str, list[Path]]) -> str | None:
    """Explains an archive whose images have another suffix than those of the first: none of them would be read."""
    first: tuple[Path, list[str]] | None = None
    for path in (path for files in archives.values() for path in files):
        suffixes = {name.rpartition("/")[2].partition(".")[2] for name in _members(path)}
        kinds = sorted(suffix for suffix in suffixes if suffix.lower() in _IMAGE_COLUMNS)
        first = first or (path, kinds)
        if kinds and first[1] and not set(kinds) & set(first[1]):
            return (
                f"{path} has images .{kinds[0]}, but {first[0]} has .{first[1][0]}. The suffix names the "
                "column, so the images of all archives need one suffix; rename them"
            )
    return None


def _column(
    given: str | None,
    usual: Sequence[str],
    features: Features,
    place: str | Path,
    option: str,
    archives: dict[str, list[Path]] | None,
) -> str:
    by_case = {name.lower(): name for name in features}
    column = given or next((by_case[name] for name in usual if name in by_case), None)
    if column is not None and column in features:
        return column
    if given is None and archives is not None and any("." in name for name in features):
        first = archives["train"][0]
        if said := _dotted(first, _members(first)):
            raise ValueError(said)
    wanted = given or " or ".join(usual)
    shown = [name for name in features if name not in ("__key__", "__url__")]
    raise ValueError(f"{place} has no column {wanted}, only {shown}; name it with {option}")


def _count(
    builder: datasets.DatasetBuilder, splits: dict[str, IterableDataset], image_column: str, label_column: str
) -> dict[str, Counter]:
    """Counts the labels of each split, or reads the counts from the cache if the same data were counted before.

    The label of rows without image is None too.
    """
    key = hashlib.blake2b(
        f"3\0{builder.cache_dir}\0{image_column}\0{label_column}".encode(), digest_size=16
    ).hexdigest()
    path = Path(datasets.config.HF_DATASETS_CACHE) / "label_counts" / f"{key}.json"
    if not path.is_file():
        counted = {}
        for split, rows in splits.items():
            counted[split] = Counter(
                row["label"] if _is_whole(row) else None
                for row in tqdm(rows, f"counting the classes of {split}", unit=" images")
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as written:
            written.write_text(json.dumps({split: list(counts.items()) for split, counts in counted.items()}))
    return {split: Counter(dict(pairs)) for split, pairs in json.loads(path.read_text()).items()}


def _prepared_counts(
    place: str | Path, archives: dict[str, list[Path]] | None, label_column: str
) -> dict[str, Counter] | None:
    """Reads the counts that `data.prepare` wrote beside its archives; None if they are not of these archives."""
    path = Path(place) / LABEL_COUNTS
    if archives is None or label_column != "cls" or not path.is_file():
        return None
    written = json.loads(path.read_text())
    sizes = {file.name: file.stat().st_size for files in archives.values() for file in files}
    if sizes != written["bytes"]:
        return None
    return {split: Counter(dict(pairs)) for split, pairs in written["counts"].items()}


def _is_whole(row: dict) -> bool:
    """Whether a row has an image and a label."""
    image, label = row["image"], row["label"]
    has_image = image is not None and (image["bytes"] is not None or image["path"] is not None)
    return has_image and label is not None and (not isinstance(label, str) or bool(label.strip())) and label == label


def _has_no_labels(counts: Counter) -> bool:
    return all(label is None or (isinstance(label, int) and label < 0) or label == "-1" for label in counts)


def _with_all(
    rows: IterableDataset, counts: Counter, where: str, archives: Sequence[Path], skip: bool
) -> IterableDataset:
    """Returns the rows that have an image and a label. Raises ValueError for others unless `skip`.

    Raises ValueError for keys with a dot in the archives, even if `skip`: one row may stand for many images then.
    """
    empty = counts.pop(None, 0)
    if not empty:
        return rows
    members = [(path, _members(path)) for path in archives]
    if said := next((said for path, names in members if (said := _dotted(path, names))), None):
        raise ValueError(said)
    if not skip:
        said = next((said for path, names in members if (said := _incomplete(path, names))), None)
        raise ValueError(
            f"{where}: {empty:,} row(s) have no image or no label, the first is {_first_empty(rows)}; fill them, or "
            f"leave them out with --on_broken_image skip{'. ' if said else ''}{said or ''}"
        )
    if not counts:
        raise ValueError(f"{where}: no row has an image and a label; fill them, or remove the split")
    notify(f"{where}: {empty:,} row(s) without image or label are left out")
    return rows.filter(_is_whole)


def _first_empty(rows: IterableDataset) -> str:
    number, row = next((number, row) for number, row in enumerate(rows, start=1) if not _is_whole(row))
    path = (row["image"] or {}).get("path")
    return f"row {number:,}" + (f" ({path})" if path else "")


def _with_classes(
    splits: dict[str, IterableDataset], counted: dict[str, Counter], feature, place: str | Path
) -> dict[str, ImageStream]:
    stored = list(dict.fromkeys(label for counts in counted.values() for label in counts))
    if isinstance(feature, ClassLabel):
        names = feature.names
        known = dict(enumerate(range(len(names))))
        codes = {label: known.get(label) for label in stored}
    else:
        texts = pc.utf8_trim_whitespace(as_text(pa.array(stored), f"{place}: the labels")).to_pylist()
        of_training = [text for label, text in zip(stored, texts, strict=True) if counted["train"][label]]
        names, notices = class_names(pa.array(of_training, pa.string()), f"{place}, split train")
        for notice in notices:
            notify(notice)
        known = {name: code for code, name in enumerate(names)}
        codes = {label: known.get(text) for label, text in zip(stored, texts, strict=True)}
    unknown = [str(label) for label, code in codes.items() if code is None]
    counts = {split: [0] * len(names) for split in splits}
    for split, of_split in counts.items():
        for label, count in counted[split].items():
            if codes[label] is not None:
                of_split[codes[label]] += count
    empty = [name for name, count in zip(names, counts["train"], strict=True) if count == 0]
    if empty or unknown:
        raise ValueError(
            f"{place}: classes without training images: {some(empty + unknown)}; add images of them for training, or "
            "remove their images from the other splits"
        )
    if len(names) < 2:
        raise ValueError(f"{place} has one class only, {names[0]}; a classifier needs at least two")
    return {split: ImageStream(rows, names, counts[split], codes) for split, rows in splits.items()}
