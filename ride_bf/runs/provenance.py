"""Records what a model was trained on in its checkpoint, so that later commands can load the same data.

The record is in `checkpoint.json`, under the key `DATA`. `describe_data` makes it when a run starts. `load_splits_of`
loads the data of a checkpoint again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from data import CUSTOM, MAX_IMAGE_PIXELS, ImageStream, OnBrokenImage, class_counts, load_long_tailed
from data.class_names import names_of, with_names
from data.digest import images_digest
from data.sets import SPLIT_OPTIONS, data_options
from data.splits import is_drawn
from ride_bf.recipes import TrainingRecipe
from ride_bf.runs.checkpoints import FACTS, read_facts
from ride_bf.runs.models import find_model
from ride_bf.runs.run_folder import ENVIRONMENT, RECIPE, excluded_in, read_settings, run_of

DATA = "data"
PARAMETERS = "parameters"  # {"all": ..., "trained": ...}: how many the network had in training
# Options that name a file or folder
PATH_OPTIONS = {option.name for option in (*SPLIT_OPTIONS, *data_options().values()) if option.is_path}
CORRECTION = "correction"  # method and strength of the correction that ride_bf.decouple made to the classifiers
Splits = DatasetDict | dict[str, ImageStream]


class OtherDataError(ValueError):
    """The data differ from those that a model was trained on."""


@dataclass(frozen=True, kw_only=True)
class SplitData:
    """A split: its number of images and their `data.digest.images_digest`.

    `drawn` says whether it was drawn from the training images; an earlier version did not record this.
    """

    images: int
    digest: str
    drawn: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data that a model was trained on, with the validation and test splits of the same data set.

    Attributes:
        dataset: the name of the data set, as in `data.load_long_tailed`.
        data_dir: where it was: an absolute path, an id on the Hub, or None for the usual place of a benchmark.
        options: other options of `data.load_long_tailed`, such as {"validation_fraction": 0.1}.
        class_names: (C,), in the order of the labels.
        train_class_counts: (C,), training images of each class.
        splits: "train", "test" and, if there is one, "validation".
        max_image_pixels: images of more pixels were not read.
        names_in_data: (C,), what the classes are called in the data, if `--class_names` gave them other names.
    """

    dataset: str
    data_dir: str | None
    options: dict[str, Any]
    class_names: list[str]
    train_class_counts: list[int]
    splits: dict[str, SplitData]
    max_image_pixels: int = MAX_IMAGE_PIXELS
    names_in_data: list[str] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The dict that is written to `checkpoint.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "TrainingData":
        """Makes it from a dict of `as_dict`. Raises TypeError or KeyError for any other dict."""
        splits = {name: SplitData(**split) for name, split in content["splits"].items()}
        return cls(**{**content, "splits": splits})

    def on_broken(self, action: Literal["stop", "skip"] | None = None) -> OnBrokenImage:
        """What to do with images that cannot be read: `action` or, by default, as in training."""
        return OnBrokenImage(action or ("skip" if self.options.get("skip_empty_rows") else "stop"))

    def without_place(self) -> "TrainingData":
        """A copy without paths of this machine, for publishing. A Hub id stays."""
        place = None if _is_local(self.data_dir) else self.data_dir
        return replace(self, data_dir=place, options=_without_folders(self.options))


def describe_data(
    splits: Splits,
    dataset: str,
    data_dir: str | Path | None = None,
    *,
    max_image_pixels: int | None = None,
    names_in_data: list[str] | None = None,
    **options: Any,
) -> TrainingData:
    """Describes the splits that `data.load_long_tailed(dataset, data_dir, **options)` returned.

    If their classes have been renamed since, `names_in_data` are the names that they had.
    """
    return TrainingData(
        dataset=dataset,
        data_dir=None if data_dir is None else _absolute(data_dir),
        options={
            name: str(Path(value).resolve()) if name in PATH_OPTIONS else value
            for name, value in _given(options).items()
        },
        class_names=names_of(splits),
        train_class_counts=class_counts(splits["train"]),
        splits={
            name: SplitData(images=len(split), digest=images_digest(split), drawn=is_drawn(split))
            for name, split in splits.items()
        },
        max_image_pixels=max_image_pixels or MAX_IMAGE_PIXELS,
        names_in_data=names_in_data,
    )


def named_as_in_training(splits: Splits, data: TrainingData) -> Splits:
    """The splits, whose classes have the names that the data give them, with the names of a model's classes.

    Names that the data did not have in training stay as they are.
    """
    if data.names_in_data is None:
        return splits
    readable = dict(zip(data.names_in_data, data.class_names, strict=True))
    names = [readable.get(name, name) for name in names_of(splits)]
    return with_names(splits, names) if len(set(names)) == len(names) else splits


def read_checkpoint_facts(place: str | Path) -> dict[str, Any]:
    """Reads the `checkpoint.json` of a model, by the folder of a checkpoint or a run, or by Hub id.

    Empty if there is none; converted and older models have none. Raises ValueError if it is damaged, or if the Hub
    cannot be reached.
    """
    found = find_model(place)
    if isinstance(found, Path):
        return read_facts(found)
    try:
        return read_facts(Path(hf_hub_download(found, FACTS)).parent)
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"cannot find out what {found} was trained on: its {FACTS} has not been downloaded, and the Hub cannot be "
            f"reached. Download it once: hf download {found} {FACTS}"
        ) from error
    except EntryNotFoundError:
        return {}


def read_recipe(place: str | Path) -> TrainingRecipe | None:
    """The recipe of a model, by the folder of a checkpoint or a run, or by Hub id.

    None if there is none, or none that this version reads. Converted and corrected models have none.
    """
    found = find_model(place)
    if isinstance(found, Path):
        path = (run_of(found) or found) / RECIPE  # a published model has it beside its weights
    else:
        try:
            path = Path(hf_hub_download(found, RECIPE))
        except EntryNotFoundError:
            return None
    try:
        return TrainingRecipe.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def describe_run(place: str | Path) -> dict[str, Any]:
    """The `recipe`, `seed`, `commit`, whether files were `modified`, and `epoch` of a run's checkpoint.

    Unknown facts are absent; all are for a model of the Hub, and if the checkpoint is not in the folder of its run.
    """
    checkpoint = find_model(place)
    run = run_of(checkpoint) if isinstance(checkpoint, Path) else None
    if run is None or not (run / RECIPE).is_file():
        return {}
    starts = json.loads((run / ENVIRONMENT).read_text()) if (run / ENVIRONMENT).is_file() else []
    facts = {"recipe": json.loads((run / RECIPE).read_text()).get("name"), "seed": read_settings(run).get("seed")}
    facts |= {name: starts[-1].get(name) for name in ("commit", "modified")} if starts else {}
    facts["epoch"] = read_facts(checkpoint).get("epoch")
    return {name: value for name, value in facts.items() if value is not None}


def read_data(place: str | Path) -> TrainingData | None:
    """What a model was trained on; None if its checkpoint does not say. Errors are those of `read_checkpoint_facts`."""
    return data_of(read_checkpoint_facts(place), place)


def describe_parameters(facts: Mapping[str, Any]) -> str | None:
    """How many parameters a model had in training and how many of them learned, by its facts; None if unknown."""
    if PARAMETERS not in facts:
        return None
    trained, every = facts[PARAMETERS]["trained"], facts[PARAMETERS]["all"]
    return f"{trained:,} of {every:,} parameters ({trained / every:.1%})".replace("%", " %")


def data_of(facts: Mapping[str, Any], place: str | Path) -> TrainingData | None:
    """The training data in the facts of a checkpoint at `place`. Raises ValueError if they are damaged."""
    if DATA not in facts:
        return None
    try:
        return TrainingData.from_dict(facts[DATA])
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{place}: the entry {DATA!r} of {FACTS} is damaged: {error!r}") from error


def limit_in_training(place: str | Path) -> int:
    """Returns the largest number of pixels of an image that was read in training, for a model by folder or Hub id.

    It is the usual limit if the checkpoint does not say it, or if the Hub cannot be reached.
    """
    found = find_model(place)
    if not isinstance(found, Path):
        try:
            found = Path(hf_hub_download(found, FACTS)).parent
        except EntryNotFoundError:  # LocalEntryNotFoundError, if the Hub cannot be reached, is one of these
            return MAX_IMAGE_PIXELS
    data = data_of(read_facts(found), found)
    return MAX_IMAGE_PIXELS if data is None else data.max_image_pixels


def load_splits_of(
    place: str | Path,
    *,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    max_image_pixels: int | None = None,
    **options: Any,
) -> tuple[Splits, TrainingData]:
    """Loads the data that a model was trained on, as they were in training. Returns the splits and their record.

    `place` is the folder of a checkpoint or a run, or a Hub id. Nothing else needs to be given. Options that are given
    must agree with the checkpoint. Only `data_dir` may differ, if the same images have been moved there, and
    `max_image_pixels`, which is in the record that is returned. The list of excluded images is the copy in the run's
    folder, if it is there.

    Raises OtherDataError, with both values, if an option or the images differ from training; ValueError if the
    checkpoint does not say what it was trained on and `dataset` is not given; and the errors of
    `data.load_long_tailed`.
    """
    facts = read_checkpoint_facts(place)
    data = data_of(facts, place)
    options = _given(options)
    if data is None:
        splits, data = _load_as_told(place, facts.get("train_class_counts"), dataset, data_dir, options)
        return splits, replace(data, max_image_pixels=max_image_pixels or MAX_IMAGE_PIXELS)
    said = {"dataset": data.dataset, **data.options}
    for name, value in {"dataset": dataset or data.dataset, **options}.items():
        if name in said and said[name] != value and name not in PATH_OPTIONS:
            raise OtherDataError(
                f"{place} was trained with --{name} {said[name]}, not {value}. Leave out --{name}: the checkpoint "
                "knows its data"
            )
    where = data.data_dir if data_dir is None else data_dir
    if data_dir is None and _is_local(where) and not Path(where).exists() and data.dataset != CUSTOM:
        where = None  # a checkpoint from another machine: try the usual place of a benchmark
    found = find_model(place)
    kept = {"exclude": excluded_in(run_of(found) if isinstance(found, Path) else None, data.options.get("exclude"))}
    try:
        splits = load_long_tailed(data.dataset, where, **{**data.options, **_given(kept), **options})
    except FileNotFoundError as error:
        for name in sorted(PATH_OPTIONS & set(said) - set(options)):
            if not Path(said[name]).exists():
                raise FileNotFoundError(
                    f"{place} was trained with --{name} {said[name]}, which is not there; if it has been moved, give "
                    f"its new place with --{name}"
                ) from error
        if data.data_dir is None or data_dir is not None:
            raise
        raise FileNotFoundError(
            f"{place} was trained on the data in {data.data_dir}, which are not there: {error}. If they have been "
            "moved, give their new place with --data_dir"
        ) from error
    splits = named_as_in_training(splits, data)
    new = {name: value for name, value in options.items() if name not in said}
    check_same_data(place, data, describe_data(splits, data.dataset, where, **data.options), new)
    return splits, replace(data, max_image_pixels=max_image_pixels or data.max_image_pixels)


def load_stored_splits_of(
    place: str | Path, names: Sequence[str] | None = None, **given: Any
) -> tuple[dict[str, Dataset], TrainingData]:
    """Loads some splits, by default all, of the data that a model was trained on, with `load_splits_of`.

    Raises ValueError for a split that the data set does not have, and for a stream, whose images have no rows.
    """
    splits, data = load_splits_of(place, **given)
    names = list(splits) if names is None else list(dict.fromkeys(names))
    for name in names:
        if name not in splits:
            raise ValueError(f"{data.dataset} has no split {name!r}; it has {', '.join(splits)}")
        if isinstance(splits[name], ImageStream):
            raise ValueError(
                f"{place} was trained on a stream, whose images have no places to name; this command needs a data set "
                "that was loaded without --streaming"
            )
    return {name: splits[name] for name in names}, data


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """A split to evaluate a model on, and where it comes from.

    Attributes:
        split: the images.
        split_name: "test" or "validation".
        dataset, options: the data set and the options that loaded it.
        digest: `data.digest.images_digest` of the images.
        other_images: whether the images are from another data set than the one the model was trained on.
        trained_on: what the model was trained on; None if its checkpoint does not say.
        parameters: how many it had in training, and how many of them learned; None if its checkpoint does not say.
        class_names: (C,).
        train_class_counts: (C,), images of each class that the model was trained on.
        training_images: the images that the model was trained on; None if they were not loaded.
        max_image_pixels: images of more pixels are not read.
    """

    split: Dataset | ImageStream
    split_name: str
    dataset: str
    options: dict[str, Any]
    digest: str
    other_images: bool
    trained_on: TrainingData | None
    class_names: list[str]
    train_class_counts: list[int]
    max_image_pixels: int
    training_images: Dataset | ImageStream | None = None
    parameters: dict[str, int] | None = None

    def on_broken(self, action: Literal["stop", "skip"] | None = None) -> OnBrokenImage:
        """What to do with images that cannot be read: `action` or, by default, as in training on the same data."""
        if self.trained_on is None or self.other_images:
            return OnBrokenImage(action or "stop")
        return self.trained_on.on_broken(action)

    def facts(self) -> dict[str, Any]:
        """Entries of `results.json` about the evaluated images and the training data."""
        facts: dict[str, Any] = {
            "dataset": self.dataset,
            "split": self.split_name,
            "dataset_options": _without_folders(self.options),
            "images_digest": self.digest,
            "other_images": self.other_images,
        }
        if self.trained_on is not None:
            train = self.trained_on.splits["train"]
            options = _without_folders(self.trained_on.options)
            names = {"dataset": self.trained_on.dataset, "options": options}
            facts["training_data"] = {**names, "images": train.images, "digest": train.digest}
        if self.parameters is not None:
            facts[PARAMETERS] = self.parameters
        return facts


def load_data_to_evaluate(
    place: str | Path,
    split: str = "test",
    other_images: bool | None = False,
    *,
    max_image_pixels: int | None = None,
    **given: Any,
) -> EvaluationData:
    """Loads a split of the data that a model was trained on, with `load_splits_of`.

    With `other_images` the split is from another data set, which the options `given` name. If its name or place is not
    given, that of training is used; no other option is, except `max_image_pixels`. Raises ValueError if its classes
    differ from those of training. None is for commands without this choice, whose errors do not propose it.
    """
    recorded = read_checkpoint_facts(place)
    known = data_of(recorded, place)
    if max_image_pixels is None:
        max_image_pixels = MAX_IMAGE_PIXELS if known is None else known.max_image_pixels
    if other_images:
        dataset, options, splits = _load_other(place, known, **given)
    else:
        try:
            splits, data = load_splits_of(place, **given)
        except OtherDataError as error:
            if other_images is None:
                raise
            raise OtherDataError(
                f"{error}. To evaluate it on other images of the same classes, pass --other_images"
            ) from error
        dataset, options = data.dataset, data.options
    if split not in splits:
        raise ValueError(f"{dataset} has no split {split!r}; it has {', '.join(splits)}: name one with --split")
    here = splits["train"]
    return EvaluationData(
        split=splits[split],
        split_name=split,
        dataset=dataset,
        options=options,
        digest=images_digest(splits[split]) if other_images else data.splits[split].digest,
        other_images=other_images,
        trained_on=known,
        class_names=names_of(splits),
        train_class_counts=class_counts(here) if known is None else known.train_class_counts,
        training_images=None if other_images else here,
        parameters=recorded.get(PARAMETERS),
        max_image_pixels=max_image_pixels,
    )


def _load_other(place: str | Path, known: TrainingData | None, **given: Any) -> tuple[str, dict[str, Any], Splits]:
    if known is None:
        raise ValueError(
            f"{place} does not say how many training images its classes have, so it can only be evaluated on the data "
            "set that it was trained on: name it with --dataset"
        )
    given = _given(given)
    if not given:
        raise ValueError("--other_images needs --dataset, --data_dir or another data option that names these images")
    dataset = given.pop("dataset", known.dataset)
    data_dir = given.pop("data_dir", known.data_dir if dataset == known.dataset else None)
    splits = load_long_tailed(dataset, data_dir, **given)
    splits = named_as_in_training(splits, known)
    names = names_of(splits)
    if names != known.class_names:
        raise ValueError(f"{place} was trained on other classes: {_differing(known.class_names, names)}")
    return dataset, given, splits


def check_same_data(
    place: str | Path, data: TrainingData, here: TrainingData, given: Mapping[str, Any] | None = None
) -> None:
    """Raises OtherDataError, with the differences, unless the data `here` are those that `place` was trained on.

    `given` are options that training did not have; they are named in the message.
    """
    problems = []
    if here.class_names != data.class_names:
        problems.append(_differing(data.class_names, here.class_names))
    nothing = SplitData(images=0, digest="")
    for name in dict.fromkeys((*data.splits, *here.splits)):
        then, now = data.splits.get(name, nothing), here.splits.get(name, nothing)
        if then.images != now.images:
            problems.append(f"{name} had {then.images:,} images in training and has {now.images:,} here")
        elif then.digest != now.digest:
            problems.append(
                f"{name} has {now.images:,} images as in training, but other ones or in another order (digest "
                f"{then.digest[:8]} in training, {now.digest[:8]} here)"
            )
    if problems:
        hint = "".join(f", with --{name} {value} that training was not given" for name, value in (given or {}).items())
        raise OtherDataError(
            f"the data in {here.data_dir or 'their usual place'} are not those that {place} was trained on{hint}: "
            f"{'; '.join(problems)}"
        )


def check_same_counts(place: str | Path, known: Sequence[int], here: Sequence[int], where: str, remedy: str) -> None:
    """Raises OtherDataError unless the counts `here` (C,), found in `where`, are the `known` counts of training."""
    if list(known) != list(here):
        raise OtherDataError(
            f"{place} was trained on {sum(known):,} images, {max(known, default=0):,} in the largest class; {where} "
            f"has {sum(here):,}, {max(here, default=0):,} in the largest. {remedy}"
        )


def _load_as_told(
    place: str | Path, known: Sequence[int] | None, dataset: str | None, data_dir, options: dict[str, Any]
) -> tuple[Splits, TrainingData]:
    """Loads the data for a checkpoint that does not know them. `known` (C,) are its class counts, if it has them."""
    if dataset is None:
        raise ValueError(
            f"{place} does not say what it was trained on: name the data set with --dataset, and give --data_dir, "
            "--validation_fraction and so on as in training"
        )
    splits = load_long_tailed(dataset, data_dir, **options)
    data = describe_data(splits, dataset, data_dir, **options)
    if known is not None:
        remedy = "Give --data_dir, --validation_fraction and so on as in training"
        check_same_counts(place, known, data.train_class_counts, f"{dataset} with these options", remedy)
    return splits, data


def _differing(then: Sequence[str], now: Sequence[str]) -> str:
    pairs = [pair for pair in zip(then, now, strict=False) if pair[0] != pair[1]][:3]
    return f"{len(then)} classes in training, {len(now)} here; the first that differ: {pairs}"


def _without_folders(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the paths of this machine: of files only their names remain."""
    return {name: Path(value).name if name in PATH_OPTIONS else value for name, value in options.items()}


def _absolute(place: str | Path) -> str:
    """An absolute path, if `place` is one that exists; else, as for an id on the Hub, `place`."""
    return str(Path(place).resolve() if Path(place).exists() else place)


def _is_local(data_dir: str | None) -> bool:
    """Whether a `data_dir` of `describe_data` is a path, not a Hub id."""
    return data_dir is not None and Path(data_dir).is_absolute()


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
