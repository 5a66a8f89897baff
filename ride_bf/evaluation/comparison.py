"""Comparison of evaluations on the same test images: over images, by a paired bootstrap, and over several runs."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.digest import DIGITS
from ride_bf.evaluation.metrics import (
    accuracy_weights,
    bootstrap,
    class_means,
    confidence_interval,
    distribution_weights,
    weighted_mean,
)
from ride_bf.evaluation.results import (
    LEVEL,
    LOG_PROBABILITIES,
    PREDICTIONS,
    RESAMPLES,
    RESULTS,
    SEED,
    Predictions,
    read_results,
)
from ride_bf.evaluation.views import CENTRE
from ride_bf.runs.models import find_model
from ride_bf.runs.run_folder import read_settings, run_of


def read_evaluation(path: Path, with_log_probabilities: bool = False) -> tuple[dict[str, Any], Predictions, Path]:
    """Reads the results and the predictions of an evaluation. The third value is their folder.

    `path` is the evaluation's folder, one of its files, or a run's output folder. Raises FileNotFoundError if the files
    do not exist, and ValueError if they do not belong together.
    """
    given = path
    path = path.parent if path.name in (PREDICTIONS, LOG_PROBABILITIES) else path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; name the output folder of a run, or a {RESULTS}")
    if path.is_dir() and not (path / RESULTS).is_file():
        path = Path(find_model(path))
        if not (path / RESULTS).is_file():
            command = f"python -m ride_bf.evaluate --model {shlex.quote(str(given))}"
            raise FileNotFoundError(f"{given} has not been evaluated; first run: {command}")
    results = read_results(path)
    folder = path if path.is_dir() else path.parent
    beside = folder / PREDICTIONS
    predictions = Predictions.load(beside, with_log_probabilities)
    if len(predictions.labels) != results["num_images"]:
        raise ValueError(
            f"{beside} has {len(predictions.labels)} images, but results.json has {results['num_images']}: "
            "evaluate the model again"
        )
    return results, predictions, folder


def check_comparable(paths: Sequence[Path], results: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError unless all evaluations have the same test images and the same training counts."""
    first = results[0]
    for path, other in zip(paths[1:], results[1:], strict=True):
        if len(other["images_digest"]) != len(first["images_digest"]):
            older = path if len(other["images_digest"]) != DIGITS else paths[0]
            raise ValueError(
                f"{older} was evaluated by an earlier version, which identified images in another way; evaluate the "
                "model again"
            )
        if other["images_digest"] != first["images_digest"]:
            raise ValueError(
                f"{paths[0]} and {path} have different test images: {first['num_images']:,} of {first['dataset']}'s "
                f"{first['split']} split and {other['num_images']:,} of {other['dataset']}'s {other['split']} split"
            )
        if other["train_class_counts"] != first["train_class_counts"]:
            raise ValueError(
                f"{paths[0]} and {path} have different training images, {sum(first['train_class_counts']):,} and "
                f"{sum(other['train_class_counts']):,}, so their shot groups differ: the models were trained on "
                "different images, or one was evaluated with other options"
            )


def check_views(paths: Sequence[Path], results: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError unless all evaluations are of the same views of the images."""
    first = results[0].get("views", CENTRE)
    for path, other in zip(paths, results, strict=True):
        if (views := other.get("views", CENTRE)) != first:
            raise ValueError(
                f"{paths[0]} was evaluated with --views {first}, and {path} with --views {views}, so they cannot be "
                "compared; evaluate one of them again, with the views of the other"
            )


def differences(
    first: Predictions, other: Predictions, class_counts: Sequence[int]
) -> dict[str, dict[str, float | list[float]]]:
    """Returns the `difference` of each accuracy, `other` minus `first`, and its confidence `interval`."""
    return _differences(_gains(first, other), first.labels, class_counts)


def _gains(first: Predictions, other: Predictions) -> np.ndarray:
    """For each image (N,): 1 if only `other` is right, -1 if only `first` is, else 0."""
    return (other.predictions == first.labels).astype(int) - (first.predictions == first.labels)


def _differences(
    gains: np.ndarray, labels: np.ndarray, class_counts: Sequence[int]
) -> dict[str, dict[str, float | list[float]]]:
    per_class, images = class_means(gains, labels, len(class_counts))
    weights = accuracy_weights(class_counts, images) | distribution_weights(class_counts, images)
    resampled = bootstrap(gains, labels, weights, RESAMPLES, SEED)
    return {
        name: {"difference": weighted_mean(per_class, shares), "interval": confidence_interval(resampled[name], LEVEL)}
        for name, shares in weights.items()
    }


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """Compares each evaluation with the first one. Raises the errors of `read_evaluation`, `check_comparable` and
    `check_views`.

    Returns `models`, `dataset`, `split` and `num_images`; `metrics`, the accuracies of each model by name;
    `differences`, the result of `differences` for each model but the first; and `level`, that of the intervals.
    """
    results, predictions, _ = zip(*(read_evaluation(path) for path in paths), strict=True)
    check_comparable(paths, results)
    check_views(paths, results)
    counts = results[0]["train_class_counts"]
    if any(not np.array_equal(own.labels, predictions[0].labels) for own in predictions):
        raise ValueError("the predictions have different test images, although the results agree: evaluate again")
    gains = [differences(predictions[0], own, counts) for own in predictions[1:]]
    return {
        **{name: results[0][name] for name in ("dataset", "split", "num_images")},
        "models": [own["model"] for own in results],
        "metrics": [{name: own["metrics"][name] for name in gains[0]} for own in results],
        "differences": gains,
        "level": LEVEL,
    }


def compare_runs(first: Sequence[Path], other: Sequence[Path]) -> dict[str, Any]:
    """Compares two groups of evaluated runs, such as two methods with several seeds each, run by run.

    If the seeds of both groups are known and the same, runs with equal seeds are a pair, else those at the same place.
    Returns `dataset`, `split`, `pairs`, each {"a", "b", "seed"}; `paired_by`, "seed" or "order"; `equal_runs`, groups
    of models of a side that predict the same; `level`; and `metrics`, with, for each metric that is a number: `a` and
    `b`, its values; `differences`, b minus a, their `mean` and `standard_error` and how many are `above_zero`; and, for
    accuracies if all runs have the same test images and training counts, the `interval` of the mean from a bootstrap
    over the images.

    Raises ValueError for less than two runs or different numbers of them, for different classes, and if the runs of a
    pair have different images, and the errors of `read_evaluation` and `check_views`.
    """
    if len(first) != len(other) or len(first) < 2:
        raise ValueError(
            f"{len(first)} run(s) of A and {len(other)} of B cannot be compared in pairs: give both sides the same "
            "number of runs, two or more. Two single runs are compared by: python -m ride_bf.compare A B"
        )
    sides = [[(path, *read_evaluation(path)) for path in paths] for paths in (first, other)]
    names = sides[0][0][1]["class_names"]
    for path, results, *_ in (*sides[0], *sides[1]):
        if results["class_names"] != names:
            raise ValueError(f"{first[0]} and {path} have different classes, so their metrics cannot be compared")
    check_views(*zip(*((path, results) for path, results, *_ in (*sides[0], *sides[1])), strict=True))
    seeds = [[_seed(results, folder) for _, results, _, folder in side] for side in sides]
    distinct = len(set(seeds[0])) == len(seeds[0]) == len(set(seeds[1]))
    by_seed = distinct and set(seeds[0]) == set(seeds[1]) and None not in seeds[0]
    if by_seed:
        sides[1] = [sides[1][seeds[1].index(seed)] for seed in seeds[0]]
    pairs = list(zip(*sides, strict=True))
    for (one, its, *_), (another, theirs, *_) in pairs:
        check_comparable([one, another], [its, theirs])
    measured = {name: _over_runs(pairs, name) for name in _common_numbers([own[1] for side in sides for own in side])}
    # Runs of other training counts have other shot groups.
    same = [(results["images_digest"], results["train_class_counts"]) for side in sides for _, results, *_ in side]
    if all(own == same[0] for own in same):
        labels, counts = sides[0][0][2].labels, sides[0][0][1]["train_class_counts"]
        gains = np.mean([_gains(one[2], another[2]) for one, another in pairs], axis=0)
        for name, found in _differences(gains, labels, counts).items():
            measured[name]["interval"] = found["interval"]
    return {
        **{name: sides[0][0][1][name] for name in ("dataset", "split")},
        "pairs": [
            {"a": one[1]["model"], "b": another[1]["model"], "seed": seed if by_seed else None}
            for (one, another), seed in zip(pairs, seeds[0], strict=True)
        ],
        "paired_by": "seed" if by_seed else "order",
        "equal_runs": [group for side in sides for group in _equal_runs(side)],
        "metrics": measured,
        "level": LEVEL,
    }


def _equal_runs(side: Sequence[tuple]) -> list[list[str]]:
    """The models of a side that predict the same for the same images, in groups of two or more."""
    groups: list[list[tuple]] = []
    for run in side:
        same = (group for group in groups if _predict_the_same(group[0], run))
        if (group := next(same, None)) is None:
            groups.append([run])
        else:
            group.append(run)
    return [[results["model"] for _, results, *_ in group] for group in groups if len(group) > 1]


def _predict_the_same(one: tuple, another: tuple) -> bool:
    (_, its, first, _), (_, theirs, other, _) = one, another
    return (
        its["images_digest"] == theirs["images_digest"]
        and np.array_equal(first.predictions, other.predictions)
        and np.allclose(first.losses, other.losses, rtol=0, atol=1e-5)  # rounding may differ
    )


def _seed(results: dict[str, Any], folder: Path) -> int | None:
    """The seed of the run that was evaluated; None if it is not known.

    Results of an earlier version do not say it, but they may lie beside the run's checkpoint.
    """
    run = run_of(folder)
    return results.get("run", {}).get("seed", None if run is None else read_settings(run).get("seed"))


def _common_numbers(results: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the metrics that are a number in all results: those with an interval first."""
    numbers = [{name for name, value in own["metrics"].items() if isinstance(value, float)} for own in results]
    first = results[0]
    common = [name for name in first["metrics"] if all(name in own for own in numbers)]
    return sorted(common, key=lambda name: name not in first["confidence_intervals"])


def _over_runs(pairs: Sequence[tuple], name: str) -> dict[str, Any]:
    one, another = (np.array([pair[side][1]["metrics"][name] for pair in pairs]) for side in (0, 1))
    gains = {"differences": (another - one).tolist(), **paired_gain(one, another)}
    return {"a": one.tolist(), "b": another.tolist(), **gains}


def paired_gain(one: Sequence[float], another: Sequence[float]) -> dict[str, float]:
    """Returns the `mean` gain of paired runs, `another` minus `one`, its `standard_error` and the runs `above_zero`.

    The standard error of a single pair is NaN.
    """
    gains = np.subtract(another, one)
    error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else np.nan
    return {"mean": float(gains.mean()), "standard_error": float(error), "above_zero": int((gains > 0).sum())}


def runs_table(compared: dict[str, Any]) -> str:
    """Returns a Markdown table of `compare_runs`, in percent but for the loss."""
    runs = len(compared["pairs"])
    lines = ["| | A | B | B − A | above 0 | over images |", "| --- |" + " ---: |" * 5]
    for name, found in compared["metrics"].items():
        unit = 1 if name == "loss" else 100
        low, high = (unit * bound for bound in found.get("interval", (np.nan, np.nan)))
        cells = [
            name.removesuffix("_accuracy").replace("_", " "),
            *(f"{unit * np.mean(found[side]):.{1 if unit > 1 else 3}f}" for side in ("a", "b")),
            f"{unit * found['mean']:+.2f} ± {unit * found['standard_error']:.2f}",
            f"{found['above_zero']} of {runs}",
            f"[{low:+.1f}, {high:+.1f}]" if "interval" in found else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(compared: dict[str, Any]) -> str:
    """Returns a Markdown table with accuracies in percent. A difference is bold if its interval excludes 0."""
    others = range(1, len(compared["models"]))
    headings = ["", "A", *(heading for index in others for heading in (letter(index), f"{letter(index)} − A"))]
    lines = [f"{letter(index)}: {model}" for index, model in enumerate(compared["models"])]
    lines += ["", f"| {' | '.join(headings)} |", "| --- |" + " ---: |" * (len(headings) - 1)]
    for name in compared["metrics"][0]:
        cells = [name.removesuffix("_accuracy").replace("_", " "), f"{100 * compared['metrics'][0][name]:.1f}"]
        for index in others:
            gain = compared["differences"][index - 1][name]
            low, high = gain["interval"]
            shown = f"{100 * gain['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            cells += [f"{100 * compared['metrics'][index][name]:.1f}", f"**{shown}**" if low > 0 or high < 0 else shown]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"model {index + 1}"
