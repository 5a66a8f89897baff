"""`load_long_tailed` loads every data set by name, with the same splits and columns."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict

from data.annotation_lists import describe_lists
from data.drawing import NothingToDrawError, draw_share
from data.drawing import long_tail as draw_long_tail
from data.notices import notify, some
from data.sets import CUSTOM, DATA_SETS, PERCEPTUAL, get_data_set
from data.split_names import SPLIT_NAMES
from data.streams import ImageStream

_DRAWN = "drawn at random from the training images by ride_bf"  # the description of such a split
_TEST_FRACTION = 0.2  # of your own images, if they have no test split


class NothingToGroupError(ValueError):
    """`group_by` was given, but no images are held out. `shared` says what the given splits have in common."""

    def __init__(self, message: str, shared: Sequence[str] = ()):
        super().__init__("; ".join([message, *shared]))
        self.shared = shared


def load_long_tailed(
    name: str,
    data_dir: str | Path | None = None,
    *,
    validation_fraction: float | None = None,
    group_by: str | None = None,
    exclude: str | Path | None = None,
    **options,
) -> DatasetDict | dict[str, ImageStream]:
    """Loads a long-tailed data set.

    Args:
        name: one of `DATA_SETS`. "custom" is for your own images, in a format that `data.split_names.EXPECTED` lists.
            If they have no test split, about a fifth of each class's training images becomes the test split, the same
            every time, and a notice says so.
        data_dir: the folder with the annotation lists (`data/ImageNet_LT`). For CIFAR, the folder that contains
            `cifar-100-python/` (`data`); without these files the Hub's copy is loaded. For "custom", a folder, a table
            or the id of a data set on the Hub. "hf:USER/NAME" is always a data set on the Hub, for a benchmark the one
            that has its images, see `data.hub_images`. digits_lt needs none, its images come with scikit-learn. None:
            the benchmark's usual folder below `data/`.
        validation_fraction: share of each class's training images to hold out as the validation split of a data set
            that has none (CIFAR, iNaturalist): at least one image, but never a class's last one. The training counts
            and shot groups are those of the remaining images.
        group_by: what else stays together when images are held out, besides images with equal content, which always
            do: "perceptual", for images that look alike, or the column of a table, such as a patient or a camera.
        exclude: a file that lists images to leave out, see `data.exclusion`.
        **options: options of the data set: `imbalance_factor` and `imbalance_type` for CIFAR; for "custom", those of
            `data.custom.load_custom`, and `streaming`. With `streaming`, tar archives or a data set on the Hub are read
            while training and never stored, and a dict of `ImageStream`s is returned.

    Returns a `DatasetDict` of `train`, `validation` (if there is one) and `test`, with the columns `image` and `label`
    (`ClassLabel`). Raises ValueError for an unknown name or option, for an option that would do nothing, and for wrong
    lists, tables and labels. Raises FileNotFoundError, with the missing paths, if files are missing. Issues a
    `data.notices.DataNotice` for everything that is left out or held out.
    """
    data_set = get_data_set(name)
    if unknown := sorted(set(options) - set(data_set.option_names) - {"skip_empty_rows"}):
        raise ValueError(f"{name} has no options {unknown}; it has {sorted(data_set.option_names) or 'none'}")
    if options.get("streaming", False):
        held = {"validation_fraction": validation_fraction, "group_by": group_by, "exclude": exclude}
        if given := [option for option, value in held.items() if value is not None]:
            raise ValueError(f"a stream cannot be split or searched before it is read: leave {', '.join(given)} out")
        streams = data_set.load(data_set.place(data_dir), **options)
        _tell_missing_classes(streams, data_dir or name)
        return streams
    if not data_set.has_columns:
        options.pop("skip_empty_rows", None)
    loaded = _load(name, data_dir, group_by, exclude, options)
    fractions = {} if "test" in loaded else {"test": _TEST_FRACTION}
    if validation_fraction is not None:
        if "validation" in loaded:
            raise ValueError(f"{name} has a validation split of its own; leave validation_fraction out")
        fractions["validation"] = validation_fraction
    if group_by is not None and not fractions:
        from data.groups import shared_values

        raise NothingToGroupError(
            f"group_by {group_by} would do nothing: {data_dir or name} has a test split of its own, and no validation "
            "split is taken from the training images; leave it out",
            [] if group_by == PERCEPTUAL else shared_values(loaded, group_by),
        )
    return _without_groups(_hold_out(loaded, data_dir or name, fractions, group_by))


def make_splits(
    place: str | Path,
    *,
    test: float | None = None,
    validation: float | None = None,
    long_tail: float | None = None,
    seed: int | None = None,
    group_by: str | None = None,
    exclude: str | Path | None = None,
    **options,
) -> DatasetDict:
    """Draws splits of your own images that are to be written down in lists; see `data.make_splits`.

    Args:
        place, group_by, exclude, **options: as in `load_long_tailed`.
        test, validation: share of each class. Without `test` a fifth is taken, unless `place` has a test split.
        long_tail: thins the training images with `data.drawing.long_tail`.
        seed: of the draws, by default 0, which draws the images that `load_long_tailed` draws.

    Raises ValueError for a share of a split that `place` has, for a seed without a draw, and the errors of
    `load_long_tailed`.
    """
    loaded = _load(CUSTOM, place, group_by, exclude, options)
    fractions = {"test": test, "validation": validation}
    for split, fraction in fractions.items():
        if split in loaded and fraction is not None:
            raise ValueError(f"{place} has a {split} split of its own; leave --{split} out")
    if "test" not in loaded and test is None:
        fractions["test"] = _TEST_FRACTION
    given = {split: fraction for split, fraction in fractions.items() if fraction is not None}
    if group_by is not None and not given:
        raise ValueError(f"group_by {group_by} would do nothing: no split is taken from the training images")
    if seed is not None and not given and long_tail is None:
        raise ValueError(
            f"--seed {seed} would do nothing: {place} has a test split of its own, and nothing is drawn; leave it out, "
            "or draw with --validation or --long_tail"
        )
    seed = 0 if seed is None else seed
    if sum(given.values()) >= 1:
        shares = " and ".join(f"--{split} {fraction:g}" for split, fraction in given.items())
        raise ValueError(f"{shares} leave no images for training; give smaller shares")
    if {"test", "validation"} <= set(given):  # the share of what the test leaves
        given["validation"] /= 1 - given["test"]
    splits = _hold_out(loaded, place, given, group_by, seed)
    if long_tail is not None:
        train = splits["train"]
        kept = draw_long_tail(class_labels(train), long_tail, seed)
        counts = class_counts(train.select(kept))
        notify(
            f"{place}: {len(kept):,} of {len(train):,} training images are kept, {max(counts):,} to {min(counts):,} of "
            f"a class, an imbalance factor of {max(counts) / min(counts):g}"
        )
        splits["train"] = train.select(kept)
    return _without_groups(splits)


def _load(name: str, data_dir: str | Path | None, group_by: str | None, exclude: str | Path | None, options: dict):
    """Loads the splits that there are, without the excluded images, and perhaps with the column `GROUP`."""
    data_set = get_data_set(name)
    if group_by not in (None, PERCEPTUAL):
        if not data_set.has_columns:
            raise ValueError(f"{name} has no columns, so group_by must be {PERCEPTUAL!r}, not {group_by!r}")
        for column in ("image", "label"):
            if group_by == (options.get(f"{column}_column") or column):
                raise ValueError(
                    f"--group_by {group_by} names the column of the {column}s; name the column of what several images "
                    "have in common, such as a patient"
                )
        options = {**options, "group_column": group_by}
    place = data_set.place(data_dir)
    loaded = data_set.load(place, **options)
    if exclude is not None:
        from data.exclusion import leave_out

        loaded = leave_out(loaded, Path(exclude), place)
    _tell_missing_classes(loaded, data_dir or name)
    return loaded


def _tell_missing_classes(splits: Mapping[str, Dataset | ImageStream], place: str | Path) -> None:
    """Issues a notice for each given split without an image of some classes that there are in training."""
    names = splits["train"].features["label"].names
    trained = np.asarray(class_counts(splits["train"])) > 0
    for split, rows in splits.items():
        missing = np.flatnonzero(trained & (np.asarray(class_counts(rows)) == 0)).tolist()
        if missing:
            listed = some([names[label] for label in missing])
            notify(f"{place}: the {split} split has no images of {len(missing):,} class(es): {listed}")


def _without_groups(splits: DatasetDict) -> DatasetDict:
    return DatasetDict({split: rows.select_columns(["image", "label"]) for split, rows in splits.items()})


def _hold_out(
    loaded: DatasetDict,
    place: str | Path,
    fractions: dict[str, float],
    group_by: str | None,
    seed: int = 0,
) -> DatasetDict:
    """Takes splits from the training images, one after the other: of what is left, `fractions` of each class."""
    if not fractions:
        return loaded
    from data.groups import describe_groups, group_images, shared_values

    train = loaded["train"]
    given = {split: rows for split, rows in loaded.items() if split != "train"}
    everything = [train, *given.values()]
    # A drawn image must not be in a given split too, so the groups are those of all images.
    groups, *of_given = _per_split(group_images(everything, group_by), everything)
    stay = np.zeros(len(train), dtype=bool)
    for split, others in zip(given, of_given, strict=True):
        touches = np.isin(groups, others)
        stay |= touches
        if touches.any():
            alike = {None: "equal to", PERCEPTUAL: "equal or similar to"}.get(group_by, "in one group with")
            notify(
                f"{place}: {touches.sum():,} training image(s) are {alike} images of the given {split} split; they "
                "stay in train, and none of them is drawn for another split"
            )
    if given and group_by not in (None, PERCEPTUAL):
        for said in shared_values(loaded, group_by):
            notify(f"{place}: {said}")
    if said := describe_groups(groups[~stay], group_by):
        notify(f"{place}: {said}")
    splits = dict(loaded)
    for split, fraction in fractions.items():
        labels = class_labels(train)
        try:
            drawn = draw_share(labels, fraction, groups, seed, stay)
        except NothingToDrawError as error:
            reason = _why_nothing(labels, fraction, groups, stay, group_by) or error
            raise ValueError(f"{place}: {reason}") from error
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if split == "test":
            notify(
                f"{place} has no test split: {drawn.sum():,} of its {len(train):,} training images, "
                f"{_shares(labels, drawn)} of each class, drawn at random with seed {seed}, are kept for the test and "
                "not trained on"
            )
        _tell_classes_without(train, drawn, split)
        splits[split] = train.select(np.flatnonzero(drawn))
        splits[split].info.description = _DRAWN
        train, groups, stay = train.select(np.flatnonzero(~drawn)), groups[~drawn], stay[~drawn]
    splits["train"] = train
    return DatasetDict({split: splits[split] for split in SPLIT_NAMES if split in splits})


def is_drawn(rows: Dataset | ImageStream) -> bool:
    """Whether the split was drawn from the training images when the data set was loaded."""
    return isinstance(rows, Dataset) and rows.info.description == _DRAWN


def _per_split(values: np.ndarray, splits: Sequence[Dataset]) -> list[np.ndarray]:
    """Separates the values (N,) of the images of all splits, one split after the other."""
    return np.split(values, np.cumsum([len(rows) for rows in splits])[:-1])


def _why_nothing(
    labels: np.ndarray, fraction: float, groups: np.ndarray, stay: np.ndarray, group_by: str | None
) -> str | None:
    """Says why no image can be drawn, if `group_by` or the images that `stay` are the reason; else None."""
    remedy = "or provide a separate split"
    try:
        draw_share(labels, fraction, groups)
    except NothingToDrawError:
        counts = np.bincount(labels)
        if group_by is None or counts.max() < 2:
            return None
        return (
            f"--group_by {group_by} leaves no class with a second group that could be held out; name another column, "
            f"leave --group_by out, {remedy}"
        )
    return (
        f"all images that could be held out ({stay.sum():,} of {len(stay):,}) are in one group with images of a given "
        f"split, to which they must not be added; remove them there, {remedy}"
    )


def _shares(labels: np.ndarray, drawn: np.ndarray) -> str:
    """The smallest and the largest share of a class that is drawn."""
    counts = np.bincount(labels)
    shares = 100 * np.bincount(labels[drawn], minlength=len(counts))[counts > 0] / counts[counts > 0]
    low, high = f"{shares.min():.3g}", f"{shares.max():.3g}"
    return f"{low} %" if low == high else f"{low} to {high} %"


def _tell_classes_without(rows: Dataset, drawn: np.ndarray, split: str) -> None:
    """Issues a notice with the classes of `rows` that have no drawn image."""
    feature = rows.features["label"]
    labels = class_labels(rows)
    without = np.flatnonzero(
        (np.bincount(labels[drawn], minlength=feature.num_classes) == 0)
        & (np.bincount(labels, minlength=feature.num_classes) > 0)
    )
    if without.size:
        names = [feature.names[label] for label in without.tolist()]
        notify(
            f"classes without an image in the {split} split, because they have a single image or group: {some(names)}"
        )


def recognise(data_dir: str | Path) -> str:
    """Returns the name of the data set whose files are in a folder, or "custom" if it is none of `DATA_SETS`."""
    return next((name for name, data_set in DATA_SETS.items() if data_set.is_in(Path(data_dir))), CUSTOM)


def find_entry(name: str, data_dir: str | Path | None, image: str, lists: str | Path | None = None) -> str | None:
    """Returns where an image is listed, as "FILE, line N", or None for data sets without lists.

    `lists` is the option of that name, the folder of the lists.
    """
    data_set = get_data_set(name)
    place = data_set.usual_place if data_dir is None else data_dir
    if place is None:
        return None
    return data_set.find_entry(place, image) if lists is None else data_set.find_entry(place, image, lists)


def list_facts(name: str, data_dir: str | Path | None, lists: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """Returns what `data.annotation_lists.describe_lists` finds of the lists of a data set, or of those in `lists`."""
    data_set = get_data_set(name)
    place = data_set.place(data_dir) if lists is None else lists
    return {} if place is None else describe_lists(data_set, place)


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
