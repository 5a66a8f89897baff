"""`load_long_tailed`: every data set by name, with the same splits and columns."""

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict

from data.annotation_lists import BENCHMARKS, load_annotation_lists
from data.cifar import load_cifar_lt
from data.digits import load_digits_lt

NUM_CLASSES = {
    "digits_lt": 10,
    "cifar10_lt": 10,
    "cifar100_lt": 100,
    **{name: benchmark.num_classes for name, benchmark in BENCHMARKS.items()},
}
DATASETS = tuple(NUM_CLASSES)


def load_long_tailed(
    name: str, data_dir: str | Path | None = None, *, validation_fraction: float | None = None, **options
) -> DatasetDict:
    """A long-tailed data set.

    Args:
        name: one of `DATASETS`.
        data_dir: the folder with the annotation lists (`data/ImageNet_LT`), for CIFAR the one with
            `cifar-100-python/` (`data`). None: the benchmark's usual place below `data/`. Not used by digits_lt, whose
            images come with scikit-learn.
        validation_fraction: takes this share of each class's training images, at least one and never the last, as
            the validation split of a data set that has none of its own (CIFAR, iNaturalist). The training counts, and
            with them a class's shot group, are those of what is left.
        **options: of the data set itself: `imbalance_factor` and `imbalance_type` for CIFAR.

    Returns a `DatasetDict` of `train`, `validation` (where there is one) and `test`, with the columns `image` and
    `label` (`ClassLabel`). Raises ValueError for an unknown name or option, and FileNotFoundError, saying what was
    looked for, if files are missing.
    """
    cifar = name in ("cifar10_lt", "cifar100_lt")
    known = {"imbalance_factor", "imbalance_type"} if cifar else set()
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{name} has no options {unknown}; it has {sorted(known) or 'none'}")
    if name == "digits_lt":
        loaded = load_digits_lt()
    elif cifar:
        loaded = load_cifar_lt(name, Path(data_dir or "data"), **options)
    elif name in BENCHMARKS:
        loaded = load_annotation_lists(name, Path(data_dir or Path("data") / BENCHMARKS[name].folder))
    else:
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(DATASETS)}")
    if validation_fraction is not None:
        loaded = _with_validation_split(name, loaded, validation_fraction)
    return loaded


def class_counts(split: Dataset) -> list[int]:
    """Images of each class in a split, in the order of the labels. Raises TypeError if `label` is no ClassLabel."""
    feature = split.features.get("label")
    if not isinstance(feature, ClassLabel):
        raise TypeError(f"column 'label' must be a datasets.ClassLabel, got {feature!r}")
    return np.bincount(class_labels(split), minlength=feature.num_classes).tolist()


def class_labels(split: Dataset) -> np.ndarray:
    """Class of each image (N,); from Arrow, which is many times faster than `split["label"]`."""
    return split.with_format("arrow")["label"].to_numpy()


def _with_validation_split(name: str, loaded: DatasetDict, fraction: float) -> DatasetDict:
    if "validation" in loaded:
        raise ValueError(f"{name} has a validation split of its own; leave validation_fraction out")
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, not {fraction}")
    train = loaded["train"]
    labels = class_labels(train)
    order = np.random.default_rng(0).permutation(len(labels))
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        held_out[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return DatasetDict(
        train=train.select(np.flatnonzero(~held_out)),
        validation=train.select(np.flatnonzero(held_out)),
        test=loaded["test"],
    )
