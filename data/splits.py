"""`load_long_tailed`: every data set by name, with the same splits and columns."""

import warnings
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image

from data.annotation_lists import BENCHMARKS, find_line, load_benchmark
from data.cifar import CIFAR, load_cifar_lt
from data.custom import load_custom, split_files
from data.digits import load_digits_lt
from data.streams import ImageStream, load_streams

CUSTOM = "custom"
_OPTIONS = {
    "cifar10_lt": {"imbalance_factor", "imbalance_type"},
    "cifar100_lt": {"imbalance_factor", "imbalance_type"},
    CUSTOM: {"image_column", "label_column", "streaming"},
}
NUM_CLASSES = {
    "digits_lt": 10,
    "cifar10_lt": 10,
    "cifar100_lt": 100,
    **{name: benchmark.num_classes for name, benchmark in BENCHMARKS.items()},
}
DATASETS = (*NUM_CLASSES, CUSTOM)
_TEST_FRACTION = 0.2  # of one's own images, where they have no test split


def load_long_tailed(
    name: str, data_dir: str | Path | None = None, *, validation_fraction: float | None = None, **options
) -> DatasetDict | dict[str, ImageStream]:
    """A long-tailed data set.

    Args:
        name: one of `DATASETS`; "custom" is one's own, of which `data.custom.EXPECTED` tells the forms. One without a
            test split gets one, a fifth of each class's training images, drawn alike every time, and warns of it.
        data_dir: the folder with the annotation lists (`data/ImageNet_LT`), for CIFAR the one with
            `cifar-100-python/` (`data`), where the Hub's copy is taken if nothing is there. None: the benchmark's usual
            place below `data/`. For "custom" a folder, a table or the id of a data set on the Hub. Not used by
            digits_lt, whose images come with scikit-learn.
        validation_fraction: takes this share of each class's training images, at least one and never the last, as
            the validation split of a data set that has none of its own (CIFAR, iNaturalist). The training counts, and
            with them a class's shot group, are those of what is left.
        **options: of the data set itself: `imbalance_factor` and `imbalance_type` for CIFAR; for "custom"
            `image_column` and `label_column` of tables and the Hub, and `streaming`, which returns a dict of
            `ImageStream`s of tar archives or of a data set on the Hub that are never stored.

    Returns a `DatasetDict` of `train`, `validation` (where there is one) and `test`, with the columns `image` and
    `label` (`ClassLabel`). Raises ValueError for an unknown name or option and for lists, tables and labels that are
    wrong, and FileNotFoundError, saying what was looked for where, if files are missing.
    """
    if name not in DATASETS:
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(DATASETS)}")
    known = _OPTIONS.get(name, set())
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{name} has no options {unknown}; it has {sorted(known) or 'none'}")
    if name == "digits_lt":
        loaded = load_digits_lt()
    elif name == CUSTOM:
        if data_dir is None:
            raise ValueError("a data set of one's own needs its place: --data_dir FOLDER, TABLE or ID on the Hub")
        if options.pop("streaming", False):
            if validation_fraction is not None:
                raise ValueError("nothing can be held out of a stream: leave validation_fraction out")
            return load_streams(data_dir, **options)
        loaded = load_custom(data_dir, **options)
    elif name in BENCHMARKS:
        loaded = load_benchmark(name, Path(data_dir or usual_place(name)))
    else:
        loaded = load_cifar_lt(name, Path(data_dir or usual_place(name)), **options)
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


def usual_place(name: str) -> Path:
    """Where a benchmark is if no other place is named, relative to the working directory."""
    return Path("data") / BENCHMARKS[name].folder if name in BENCHMARKS else Path("data")


def recognise(data_dir: str | Path) -> str:
    """The name of the data set whose files are in a folder; "custom" if it is none of the benchmarks."""
    folder = Path(data_dir)
    for name, benchmark in BENCHMARKS.items():
        if all((folder / file).is_file() for file in benchmark.lists.values()):
            return name
    for name, files in CIFAR.items():
        if (folder / files.folder).is_dir() or (folder / files.archive).is_file():
            return name
    return CUSTOM


def find_entry(name: str, data_dir: str | Path | None, image: str) -> str | None:
    """Where an image is listed, as "FILE, line N"; None for data sets without lists."""
    if name in BENCHMARKS:
        folder = Path(data_dir or usual_place(name))
        return find_line([folder / file for file in BENCHMARKS[name].lists.values()], folder, image)
    if name == CUSTOM and data_dir is not None and Path(data_dir).is_dir():
        return find_line(list(split_files(Path(data_dir), ".txt").values()), Path(data_dir), image)
    return None


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

    The same every time. Raises ValueError for a fraction that is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, not {fraction}")
    labels = class_labels(rows)
    order = np.random.default_rng(0).permutation(len(labels))
    grouped = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each among its class
    share = np.minimum(np.maximum(1, np.round(fraction * counts)), counts - 1)
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[grouped[rank < np.repeat(share, counts)]] = True
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))
