"""`load_long_tailed`: every data set by name, with the same splits and columns."""

import warnings
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image

from data.sets import CUSTOM, DATA_SETS, get_data_set
from data.streams import ImageStream

_TEST_FRACTION = 0.2  # of one's own images, where they have no test split


def load_long_tailed(
    name: str, data_dir: str | Path | None = None, *, validation_fraction: float | None = None, **options
) -> DatasetDict | dict[str, ImageStream]:
    """A long-tailed data set.

    Args:
        name: one of `DATA_SETS`; "custom" is one's own, of which `data.custom.EXPECTED` tells the forms. One without a
            test split gets one, a fifth of each class's training images, drawn alike every time, and warns of it.
        data_dir: the folder with the annotation lists (`data/ImageNet_LT`), for CIFAR the one with
            `cifar-100-python/` (`data`), where the Hub's copy is taken if nothing is there. None: the benchmark's usual
            place below `data/`. For "custom" a folder, a table or the id of a data set on the Hub. digits_lt has none:
            its images come with scikit-learn.
        validation_fraction: takes this share of each class's training images, at least one and never the last, as
            the validation split of a data set that has none of its own (CIFAR, iNaturalist). The training counts, and
            with them a class's shot group, are those of what is left.
        **options: of the data set itself: `imbalance_factor` and `imbalance_type` for CIFAR; for "custom"
            `image_column` and `label_column` of tables and the Hub, and `streaming`, which returns a dict of
            `ImageStream`s of tar archives or of a data set on the Hub that are never stored.

    Returns a `DatasetDict` of `train`, `validation` (where there is one) and `test`, with the columns `image` and
    `label` (`ClassLabel`). Raises ValueError for an unknown name or option, for one that would do nothing, and for
    lists, tables and labels that are wrong; FileNotFoundError, saying what was looked for where, if files are missing.
    """
    data_set = get_data_set(name)
    if unknown := sorted(set(options) - set(data_set.option_names)):
        raise ValueError(f"{name} has no options {unknown}; it has {sorted(data_set.option_names) or 'none'}")
    streaming = options.get("streaming", False)
    if streaming and validation_fraction is not None:
        raise ValueError("nothing can be held out of a stream: leave validation_fraction out")
    loaded = data_set.load(data_set.place(data_dir), **options)
    if streaming:
        return loaded
    if "test" not in loaded:
        train, test = hold_out(loaded["train"], _TEST_FRACTION)
        warnings.warn(
            f"{data_dir} has no test split: {len(test)} of its {len(loaded['train'])} training images, a fifth of each "
            "class drawn at random, the same every time, are kept for the test and not trained on",
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
    """The name of the data set whose files are in a folder; "custom" if it is none that has a name here."""
    return next((name for name, data_set in DATA_SETS.items() if data_set.is_in(Path(data_dir))), CUSTOM)


def find_entry(name: str, data_dir: str | Path | None, image: str) -> str | None:
    """Where an image is listed, as "FILE, line N"; None for data sets without lists."""
    data_set = get_data_set(name)
    place = data_set.usual_place if data_dir is None else data_dir
    return None if place is None else data_set.find_entry(place, image)


def class_counts(split: Dataset | ImageStream) -> list[int]:
    """Images of each class in a split, in the order of the labels. Raises TypeError if `label` is no ClassLabel."""
    if isinstance(split, ImageStream):
        return list(split.counts)
    feature = split.features.get("label")
    if not isinstance(feature, ClassLabel):
        raise TypeError(f"column 'label' must be a datasets.ClassLabel, got {feature!r}")
    return np.bincount(class_labels(split), minlength=feature.num_classes).tolist()


def class_labels(split: Dataset | ImageStream) -> np.ndarray:
    """Class of each image (N,); from Arrow, which is many times faster than `split["label"]`.

    Raises ValueError for a stream, whose labels are not known before it is read.
    """
    if isinstance(split, ImageStream):
        raise ValueError("images of a stream cannot be drawn by class: with --streaming set --sampler instance")
    return split.with_format("arrow")["label"].to_numpy()


def undecoded(split: Dataset) -> Dataset:
    """The same images as `read_image` takes them: decoded by it, not by the `datasets` library."""
    return split.cast_column("image", Image(decode=False))


def hold_out(rows: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """What is left and what is held out: `fraction` of each class, at least one image and never the last.

    The same every time. Raises ValueError for a fraction that is not between 0 and 1, and if no class has two images.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, not {fraction}")
    labels = class_labels(rows)
    order = np.random.default_rng(0).permutation(len(labels))
    grouped = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each among its class
    share = np.minimum(np.maximum(1, np.round(fraction * counts)), counts - 1)
    if not share.any():
        raise ValueError("no class has a second image that could be held out; give the data a split of their own")
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[grouped[rank < np.repeat(share, counts)]] = True
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))
