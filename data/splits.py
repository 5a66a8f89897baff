"""`load_long_tailed` loads every data set by name, with the same splits and columns."""

import warnings
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image

from data.sets import CUSTOM, DATA_SETS, get_data_set
from data.streams import ImageStream

_TEST_FRACTION = 0.2  # of your own images, if they have no test split


def load_long_tailed(
    name: str, data_dir: str | Path | None = None, *, validation_fraction: float | None = None, **options
) -> DatasetDict | dict[str, ImageStream]:
    """Loads a long-tailed data set.

    Args:
        name: one of `DATA_SETS`. "custom" is for your own images, in a format that `data.split_names.EXPECTED` lists. If
            they have no test split, a fifth of each class's training images becomes the test split, the same every
            time, and a warning says so.
        data_dir: the folder with the annotation lists (`data/ImageNet_LT`). For CIFAR, the folder that contains
            `cifar-100-python/` (`data`); without these files the Hub's copy is loaded. For "custom", a folder, a table
            or the id of a data set on the Hub. digits_lt needs none, its images come with scikit-learn. None: the
            benchmark's usual folder below `data/`.
        validation_fraction: share of each class's training images to hold out as the validation split of a data set
            that has none (CIFAR, iNaturalist): at least one image, but never a class's last one. The training counts
            and shot groups are those of the remaining images.
        **options: options of the data set: `imbalance_factor` and `imbalance_type` for CIFAR; for "custom",
            `image_column` and `label_column` of tables and of the Hub, and `streaming`. With `streaming`, tar archives
            or a data set on the Hub are read while training and never stored, and a dict of `ImageStream`s is returned.

    Returns a `DatasetDict` of `train`, `validation` (if there is one) and `test`, with the columns `image` and `label`
    (`ClassLabel`). Raises ValueError for an unknown name or option, for an option that would do nothing, and for wrong
    lists, tables and labels. Raises FileNotFoundError, with the missing paths, if files are missing.
    """
    data_set = get_data_set(name)
    if unknown := sorted(set(options) - set(data_set.option_names)):
        raise ValueError(f"{name} has no options {unknown}; it has {sorted(data_set.option_names) or 'none'}")
    streaming = options.get("streaming", False)
    if streaming and validation_fraction is not None:
        raise ValueError("a stream cannot be split into training and validation images: leave validation_fraction out")
    loaded = data_set.load(data_set.place(data_dir), **options)
    if streaming:
        return loaded
    if "test" not in loaded:
        train, test = hold_out(loaded["train"], _TEST_FRACTION)
        warnings.warn(
            f"{data_dir} has no test split: {len(test)} of its {len(loaded['train'])} training images, a fifth of "
            "each class, drawn at random but the same every time, are kept for the test and not trained on",
            stacklevel=2,
        )
        loaded = DatasetDict({**loaded, "train": train, "test": test})
    if validation_fraction is not None:
        if "validation" in loaded:
            raise ValueError(f"{name} has a validation split of its own; leave validation_fraction out")
        train, validation = hold_out(loaded["train"], validation_fraction)
        loaded = DatasetDict(train=train, validation=validation, test=loaded["test"])
    return loaded


def recognise(data_dir: str | Path) -> str:
    """Returns the name of the data set whose files are in a folder, or "custom" if it is none of `DATA_SETS`."""
    return next((name for name, data_set in DATA_SETS.items() if data_set.is_in(Path(data_dir))), CUSTOM)


def find_entry(name: str, data_dir: str | Path | None, image: str) -> str | None:
    """Returns where an image is listed, as "FILE, line N", or None for data sets without lists."""
    data_set = get_data_set(name)
    place = data_set.usual_place if data_dir is None else data_dir
    return None if place is None else data_set.find_entry(place, image)


def class_counts(split: Dataset | ImageStream) -> list[int]:
    """Returns the number of images of each class. Raises TypeError if the column `label` is not a ClassLabel."""
    if isinstance(split, ImageStream):
        return list(split.counts)
    feature = split.features.get("label")
    if not isinstance(feature, ClassLabel):
        raise TypeError(f"column 'label' must be a datasets.ClassLabel, got {feature!r}")
    return np.bincount(class_labels(split), minlength=feature.num_classes).tolist()


def class_labels(split: Dataset | ImageStream) -> np.ndarray:
    """Returns the class of each image (N,), from Arrow, which is much faster than `split["label"]`.

    Raises ValueError for a stream, because its labels are not known before it is read.
    """
    if isinstance(split, ImageStream):
        raise ValueError("images of a stream cannot be drawn by class: with --streaming set --sampler instance")
    return split.with_format("arrow")["label"].to_numpy()


def undecoded(split: Dataset) -> Dataset:
    """Returns the same images undecoded, so that `read_image` decodes them instead of the `datasets` library."""
    return split.cast_column("image", Image(decode=False))


def hold_out(rows: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Holds out `fraction` of each class: at least one image, but never the last.

    Returns the remaining and the held-out images, the same every time. Raises ValueError if the fraction is not between
    0 and 1, or if no class has two images.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, not {fraction}")
    labels = class_labels(rows)
    order = np.random.default_rng(0).permutation(len(labels))
    grouped = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each image in its class
    share = np.minimum(np.maximum(1, np.round(fraction * counts)), counts - 1)
    if not share.any():
        raise ValueError("no class has a second image that could be held out; provide a separate split instead")
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[grouped[rank < np.repeat(share, counts)]] = True
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))
