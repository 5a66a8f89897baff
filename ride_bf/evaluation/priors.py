"""Corrects logits for a test set whose distribution of the classes is known and is not the one they were trained for.

log(test share) - log(model share) is added to the logit of each class. Saerens, Latinne, Decaestecker: Adjusting the
Outputs of a Classifier to New a Priori Probabilities, 2002, eq. 4.

The model share follows from the training: it is the share of the class among the images that the loss saw, which the
sampler decides, changed by what the loss adds to the logits and by its class weights (`Criterion.learned_prior`). So
cross-entropy learns for the training images, and the balanced softmax for balanced classes. The margins of LDAM and
RIDE, a teacher and the corrections of `ride_bf.decouple` are no distribution of the classes: the first two are left
aside, and after the last, or after training a router, the model share is unknown.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_ride_bf import RideBfOutput
from ride_bf.evaluation.metrics import class_means, weighted_mean
from ride_bf.evaluation.predict import as_predictions, image_facts
from ride_bf.evaluation.results import Predictions, measure
from ride_bf.methods.losses import reversed_shares
from ride_bf.methods.objectives import make_criterion
from ride_bf.methods.samplers import class_probabilities
from ride_bf.runs.provenance import CORRECTION, EvaluationData, read_checkpoint_facts, read_recipe

MODEL_PRIORS = ("train", "uniform")
_ROWS = 4096  # images that are corrected at a time, to limit memory


@dataclass(frozen=True, kw_only=True)
class ModelPrior:
    """The distribution of the classes that logits are for: its `shares` (C,), and the `basis` of that knowledge."""

    basis: str
    shares: list[float]


@dataclass(frozen=True, kw_only=True)
class TestPrior:
    """A correction to the class `shares` (C,) that the user gave by `name`, from those of `model_prior`."""

    __test__ = False  # not a test, whatever pytest reads in its name

    name: str
    shares: list[float]
    model_prior: ModelPrior

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "TestPrior":
        """Makes it from the entry `test_prior` of a `results.json`."""
        return cls(name=content["name"], shares=content["shares"], model_prior=ModelPrior(**content["model_prior"]))


def choose_priors(
    place: str | Path, test_prior: str | None, model_prior: str | None, data: EvaluationData
) -> tuple[dict[str, Any], TestPrior | None]:
    """The entry `model_prior` of `results.json`, if it is known, and the correction to a `test_prior`, if there is one.

    The arguments are the model and the options of `ride_bf.evaluate`. Errors are those of `make_test_prior`.
    """
    counts = data.train_class_counts
    prior = find_model_prior(place, counts) if model_prior is None else given_model_prior(model_prior, counts)
    known = {} if prior is None else {"model_prior": asdict(prior)}
    return known, None if test_prior is None else make_test_prior(test_prior, prior, data.class_names, counts)


def find_model_prior(place: str | Path, class_counts: Sequence[int]) -> ModelPrior | None:
    """The distribution of the classes that a model was trained for; None if it is not known.

    `place` is the folder of a checkpoint or a run, or a Hub id. `class_counts` (C,) are its training images.
    """
    recipe, facts = read_recipe(place), read_checkpoint_facts(place)
    if recipe is None or recipe.train_only == "router" or CORRECTION in facts:
        return None
    epoch = max(0, math.ceil(facts.get("epoch", recipe.epochs)) - 1)  # 0-based; a few steps of the first may be none
    reweight = recipe.reweight(epoch)
    shares = class_probabilities(class_counts, recipe.sampler, epoch / max(1, recipe.epochs - 1))
    prior = make_criterion(recipe, class_counts).learned_prior(torch.from_numpy(shares).log(), reweight)
    basis = f"loss {recipe.loss}{', re-weighted' if reweight else ''}, sampler {recipe.sampler}"
    return ModelPrior(basis=basis, shares=prior.double().softmax(dim=0).tolist())


def given_model_prior(name: str, class_counts: Sequence[int]) -> ModelPrior:
    """The distribution that the user says the logits are for: one of `MODEL_PRIORS`."""
    return ModelPrior(basis=f"--model_prior {name}", shares=read_shares(name, [], class_counts))


def read_shares(name: str, class_names: Sequence[str], class_counts: Sequence[int]) -> list[float]:
    """Class shares (C,): those of "train", "uniform" or "inverse", or of a JSON file.

    "inverse" are the training shares in the reverse order of the classes. A file has a list of C numbers in the order
    of the labels, or an object with a number for each of `class_names`; they need not sum to 1. Raises
    FileNotFoundError or ValueError, which name the file, for anything else.
    """
    if name == "train":
        numbers: Any = list(class_counts)
    elif name == "uniform":
        numbers = [1] * len(class_counts)
    elif name == "inverse":
        numbers = reversed_shares(class_counts).tolist()
    else:
        numbers = _read_numbers(Path(name), class_names)
    values = np.asarray(numbers, dtype=np.float64)
    if not (np.isfinite(values) & (values > 0)).all():
        label = int(np.flatnonzero(~(np.isfinite(values) & (values > 0)))[0])
        raise ValueError(
            f"the prior {name} has {numbers[label]} for class {label}; each class needs a number above 0, a small one "
            "if it is rare"
        )
    return (values / values.sum()).tolist()


def _read_numbers(path: Path, class_names: Sequence[str]) -> list[float]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; name a JSON file, or one of train, uniform, inverse")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    expected = f"{path} must have a list of {len(class_names)} numbers, or an object with a number for each class"
    if isinstance(content, dict):
        differing = sorted(set(content) ^ set(class_names))
        if differing:
            raise ValueError(f"{expected}; these names are not in both: {', '.join(differing[:5])}")
        content = [content[name] for name in class_names]
    if not isinstance(content, list) or len(content) != len(class_names):
        found = f"{len(content)} numbers" if isinstance(content, list) else content
        raise ValueError(f"{expected}, not {found}")
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in content):
        raise ValueError(f"{expected}; not all are numbers")
    return content


def make_test_prior(
    name: str, model_prior: ModelPrior | None, class_names: Sequence[str], class_counts: Sequence[int]
) -> TestPrior:
    """The correction to the shares that `read_shares` reads. Raises ValueError if the `model_prior` is not known."""
    if model_prior is None:
        raise ValueError(
            f"--test_prior {name}: it is not known which distribution of the classes the logits are for, because there "
            "is no readable recipe.json of their training, or because a router or ride_bf.decouple changed them; say "
            "it with --model_prior train (as after cross-entropy) or uniform (as after a balanced loss)"
        )
    shares = read_shares(name, class_names, class_counts)
    return TestPrior(name=Path(name).name, shares=shares, model_prior=model_prior)  # without a folder of this machine


def correct(images: Predictions, prior: TestPrior) -> Predictions:
    """The predictions of the corrected mean logits, as of one expert. Needs the log-probabilities of the images."""
    assert images.log_probabilities is not None
    added = torch.tensor(prior.shares).log() - torch.tensor(prior.model_prior.shares).log()
    columns: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(images.labels), _ROWS):
        labels = torch.from_numpy(images.labels[start : start + _ROWS])
        logits = torch.from_numpy(images.log_probabilities[start : start + _ROWS]).float() + added
        facts = image_facts(RideBfOutput(logits=logits, expert_logits=logits[:, None]), labels)
        facts["log_probabilities"] = logits.log_softmax(dim=1).half()
        for name, column in facts.items():
            columns.setdefault(name, []).append(column.numpy())
    return as_predictions({"labels": images.labels, **{name: np.concatenate(parts) for name, parts in columns.items()}})


def measure_test_prior(images: Predictions, prior: TestPrior, class_counts: Sequence[int]) -> dict[str, Any]:
    """The entry `test_prior` of `results.json`."""

    def expected_accuracy(own: Predictions) -> float:
        accuracy, present = class_means(own.predictions == own.labels, own.labels, len(class_counts))
        return weighted_mean(accuracy, np.asarray(prior.shares) * (present > 0))

    corrected = correct(images, prior)
    measured = measure(corrected, class_counts)
    return {
        **asdict(prior),
        "uncorrected_test_prior_accuracy": expected_accuracy(images),
        "metrics": {**measured["metrics"], "test_prior_accuracy": expected_accuracy(corrected)},
        "confidence_intervals": measured["confidence_intervals"],
    }
