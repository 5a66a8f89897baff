"""Streamed data sets: they are read from front to back during training, because they do not fit on the disk."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import ClassLabel, Features, Image, IterableDataset, load_dataset_builder
from torch import Tensor
from tqdm.auto import tqdm

from data.custom import NOT_ON_THE_HUB
from data.hub_ids import is_hub_id
from data.split_names import SPLIT_NAMES
from data.transforms import collate_prepared, leave_out_broken, only_whole

# usual names of the two columns in WebDataset archives and on the Hub
_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
_LABEL_COLUMNS = ("label", "cls")
SHUFFLE_BUFFER = 1000  # encoded images to draw the next one from: about 100 MB in each worker
EXPECTED = (
    "streaming reads a folder of tar archives in WebDataset's format, train-*.tar and test-*.tar (and val-*.tar), or "
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


@dataclass(frozen=True)
class StreamCollate:
    """Makes a batch of a stream's rows, prepared with `transform`, for `DataLoader(collate_fn)`."""

    transform: Callable[[dict], dict]
    codes: dict[str | int, int]
    leave_out: bool
    """Whether broken images are left out. Otherwise they stay, with the label `data.BROKEN`.

    If they are left out and only one image of a batch can be read, the batch also has a second augmentation of it.
    """

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        prepared = self._prepare(rows)
        if not self.leave_out:
            return collate_prepared(prepared)
        alone = only_whole(prepared)
        return leave_out_broken(prepared if alone is None else [*prepared, *self._prepare([rows[alone]])])

    def _prepare(self, rows: list[dict]) -> list[dict]:
        prepared = self.transform(
            {"image": [row["image"] for row in rows], "label": [self.codes[row["label"]] for row in rows]}
        )
        return [dict(zip(prepared, values, strict=True)) for values in zip(*prepared.values(), strict=True)]


def load_streams(
    place: str | Path, image_column: str | None = None, label_column: str | None = None
) -> dict[str, ImageStream]:
    """Loads the splits of tar archives or of a data set on the Hub. See `data.load_long_tailed`.

    The losses need the number of images of each class. So the first time, every split is read once to count them, and
    the counts are kept in the cache of the `datasets` library. Raises ValueError if `place` or a column is wrong, or if
    a class has no training images.
    """
    builder = _builder(place)
    splits = {}
    streams = builder.as_streaming_dataset()
    for split, names in SPLIT_NAMES.items():
        for name, rows in streams.items():
            if name.lower() in names:
                splits[split] = rows
    if missing := sorted({"train", "test"} - set(splits)):
        raise ValueError(f"{place} has no split for {' and '.join(missing)}, only {', '.join(streams)}; {EXPECTED}")
    features = splits["train"].features
    image_column = _column(image_column, _IMAGE_COLUMNS, features, place, "--image_column")
    label_column = _column(label_column, _LABEL_COLUMNS, features, place, "--label_column")
    columns = {image_column: "image", label_column: "label"}
    undecoded = {split: rows.cast_column(image_column, Image(decode=False)) for split, rows in splits.items()}
    stored = {split: rows.select_columns(list(columns)).rename_columns(columns) for split, rows in undecoded.items()}
    counted = _count(builder, stored, label_column)
    return _with_classes(stored, counted, features[label_column], place)


def _builder(place: str | Path) -> datasets.DatasetBuilder:
    folder = Path(place)
    if folder.is_dir():
        archives = {
            split: files
            for split, names in SPLIT_NAMES.items()
            if (files := sorted(str(path.resolve()) for name in names for path in folder.glob(f"{name}*.tar")))
        }
        if not archives:
            raise ValueError(f"{folder} has no tar archives; {EXPECTED}")
        return load_dataset_builder("webdataset", data_files=archives)
    if folder.exists() or not is_hub_id(place):
        raise ValueError(f"{place} cannot be streamed; {EXPECTED}")
    try:
        return load_dataset_builder(str(place))
    except NOT_ON_THE_HUB as error:
        raise ValueError(f"{str(place)!r} cannot be loaded from the Hub ({error}); {EXPECTED}") from error


def _column(given: str | None, usual: Sequence[str], features: Features, place: str | Path, option: str) -> str:
    column = given or next((name for name in usual if name in features), None)
    if column is None or column not in features:
        wanted = given or " or ".join(usual)
        raise ValueError(f"{place} has no column {wanted}, only {list(features)}; name it with {option}")
    return column


def _count(
    builder: datasets.DatasetBuilder, splits: dict[str, IterableDataset], label_column: str
) -> dict[str, Counter]:
    """Counts the labels of each split, or reads the counts from the cache if the same data were counted before."""
    key = hashlib.blake2b(f"{builder.cache_dir}\0{label_column}".encode(), digest_size=16).hexdigest()
    path = Path(datasets.config.HF_DATASETS_CACHE) / "label_counts" / f"{key}.json"
    if not path.is_file():
        counted = {}
        for split, rows in splits.items():
            labels = tqdm(rows.select_columns(["label"]), f"counting the classes of {split}", unit=" images")
            counted[split] = Counter(row["label"] for row in labels)
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".writing")
        written.write_text(json.dumps({split: list(counts.items()) for split, counts in counted.items()}))
        written.replace(path)
    return {split: Counter(dict(pairs)) for split, pairs in json.loads(path.read_text()).items()}


def _with_classes(
    splits: dict[str, IterableDataset], counted: dict[str, Counter], feature, place: str | Path
) -> dict[str, ImageStream]:
    train = counted["train"]
    if isinstance(feature, ClassLabel):
        names, stored_labels = feature.names, range(feature.num_classes)
    elif all(isinstance(label, int) for label in train):
        stored_labels = range(max(train) + 1)
        names = [str(label) for label in stored_labels]
    else:
        names = stored_labels = sorted(map(str, train))
    codes = {label: code for code, label in enumerate(stored_labels)}
    empty = [name for name, code in zip(names, codes, strict=True) if train[code] == 0]
    unknown = sorted({str(label) for counts in counted.values() for label in counts if label not in codes})
    if empty or unknown:
        raise ValueError(
            f"{place}: classes without training images: {(empty + unknown)[:5]}; labels are names, or numbers from 0 "
            "without gaps"
        )
    return {
        split: ImageStream(rows, names, [counted[split][stored] for stored in codes], codes)
        for split, rows in splits.items()
    }
