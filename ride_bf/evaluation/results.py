"""The files of an evaluation: `results.json` has all numbers, `predictions.npz` the predictions for each image.

`log_probabilities.npy` has the logarithms of the predicted probabilities, (N, C) in float16, of up to `MOST_NUMBERS`.
From these files `python -m ride_bf.evaluate --predictions FOLDER` computes all numbers again, without images and model.

`results.json` has the following keys. Accuracies and shares are fractions. A value that does not exist, as for a group
without classes or a class without images, is absent from a dict and null in a list. Lists over classes are in the order
of the labels. Classes are given by their labels, which are indices into `class_names`.

    format_version          1
    model                   folder or Hub id, as given by the user
    dataset, split          names: "imagenet_lt", "test"
    dataset_options         options that the data set was loaded with, such as {"imbalance_factor": 10.0}; often empty
    images_digest           of the images and labels: equal only for the same test images (see `data.digest`; an earlier
                            version had 64 digits)
    other_images            whether the images come from another data set than the training images
    training_data           data that the model was trained on: {"dataset", "options", "images", "digest"}; absent if
                            the checkpoint does not say
    parameters              {"all", "trained"}: how many the model had in training, with LoRA if it had it, and how many
                            of them learned; absent if the checkpoint does not say
    num_images              images evaluated
    broken_images_left_out  how many more the split has, which cannot be read; absent if there are none
    views                   of each image, whose mean logits are evaluated: a key of `ride_bf.evaluation.views.VIEWS`;
                            absent in an earlier version, which always took "centre"
    also_trained_on         {"images"}: how many of them are equal to a training image; and, if some but not all are,
                            "metrics_without" them: loss and accuracies by the names of `metrics`. Absent if unknown
    class_names             (C,)
    train_class_counts      (C,) training images of each class, from the checkpoint
    num_experts             E
    training_images         {"num_images", "metrics"} on the training images, seen as in evaluation; if asked for
    model_prior             distribution of the classes that the logits are for: {"basis", "shares" (C,)}, see
                            `ride_bf.evaluation.priors`; absent if unknown
    test_prior              results with logits corrected for another distribution of the classes; if asked for
      name, shares (C,)                         what was asked for, and the distribution
      model_prior                               the distribution that the logits were corrected from, as above
      uncorrected_test_prior_accuracy           mean of the accuracies of the classes, weighted by `shares`, before the
                                                correction: the expected accuracy on images of that distribution
      metrics, confidence_intervals             as below, of the corrected logits, and `test_prior_accuracy`
    confidence              of a model that `ride_bf.calibrate` calibrated; the keys below are of its logits as they are
      temperature                               by which logits are divided: a number, or (C,) by the predicted class
      before, after                             by group of the predicted class ("all", "many", ...): `loss` and errors
                                                as in `metrics`; class-wise ones are means over the group's classes
      sets                                      `promised`, the share of images whose set holds the true class; by group
                                                {"images", "coverage", its "interval", "mean_size"}; per_class_coverage,
                                                per_class_mean_size (C,)
      rejected                                  `promised`, the share of known images that may be rejected as of none of
                                                the classes; `score`; and the share that is, by group of the true class
    unknown                 with images of no known class: `images`; `scores`, a dict for each of
                            `confidence_ride_bf.KNOWN_SCORES` of groups of the known images, with their `auroc` and
                            `false_positive_rate_95`; `taken_for`, shares predicted as each group; of a model that
                            rejects, its `score` and the share `rejected`; broken_images_left_out
    neighbours              with `--neighbours`: `count`, how many nearest training images vote for the class of an
                            image, and the accuracies of these votes, as `metrics`
    metrics                 those of `ride_bf.evaluation.predict.evaluate`, and more
      loss                                      mean cross-entropy of the mean logits
      accuracy, balanced_accuracy               over the images; mean over the classes
      many_shot_accuracy, medium_..., few_...   mean over the classes of the group
      top_5_accuracy, balanced_top_5_accuracy, many_shot_top_5_accuracy, ...      with more than five classes
      expected_calibration_error, many_shot_expected_calibration_error, ...       over the images, or those of a group
      class_wise_calibration_error, adaptive_calibration_error    of all probabilities, not only of the predicted class;
                                                absent for more than `MOST_NUMBERS` probabilities
      macro_f1                                  mean F1 score of the classes
      harmonic_mean_accuracy, geometric_mean_accuracy             of the classes' accuracies
      worst_class_accuracy, worst_class         the lowest accuracy of a class, and its label
      forward_50_accuracy, forward_25_..., uniform_..., backward_25_..., backward_50_...    long-tailed test sets
      experts_used, many_shot_experts_used, ... shares of images that used 1, 2, ... experts; with a router
      per_class_accuracy, per_class_top_5_accuracy, per_class_precision, per_class_images             (C,)
    confidence_intervals    for the accuracies in `metrics` that are means: [lower, upper]. From the bootstrap, or
                            Wilson's where the bootstrap has no width, as when all images of a group are right
    bootstrap               settings: {"level": 0.95, "resamples": 2000, "seed": 0, "stratified_by": "class",
                            "without_width": "wilson"}; an earlier version has no "without_width" and no Wilson
    calibration             "all", "many", "medium", "few": each has lists with the `count`, the mean `confidence` and
                            the `accuracy` of bins of equal width
    confusion
      pairs                 the most frequent mistakes: {"true", "predicted", "images", "share"} of the class
      worst_classes         `true` (R,), classes with the lowest accuracy; `predicted` (K,), predicted classes; `shares`
                            (R, K) of each true class's images; `other` (R,), share predicted as any other class
    mistakes                the wrong predictions with the highest confidence, at most 24: {"image", its row in
                            predictions.npz, "true", "predicted", "confidence"}; absent in an earlier version
    experts                 with more than one expert
      each                  (E,) dicts: `images` that the expert saw, and the accuracies of `metrics` on them
      agreement             (E, E) how often two experts predict the same class, as a share of images that both saw
      mean_agreement, many_shot_mean_agreement, ...     mean over the pairs of different experts
      oracle_accuracy, many_shot_oracle_accuracy, ...   share of images for which at least one expert is right
    run                     {"recipe", "seed", "commit", "modified", "epoch"} of the training, as far as they are known;
                            absent in an earlier version
    speed                   images_per_second, the median over `timed_batches` batches after the first, which starts
                            everything up, or that of the first if there is no other; seconds, of all; batch_size (of
                            one process), num_processes, num_workers, mixed_precision; includes reading and preparing
                            the images
    machine                 device, processor, cpu_count, python, torch, transformers
    date                    ISO 8601, UTC
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ride_bf.evaluation.metrics import (
    accuracy_weights,
    bootstrap,
    calibration,
    class_means,
    class_summary,
    class_wise_calibration,
    confidence_interval,
    confused_pairs,
    distribution_weights,
    effective_images,
    expected_calibration_error,
    expert_agreement,
    expert_use,
    mean_agreement,
    none_for_nan,
    shot_accuracy,
    shot_groups,
    weighted_mean,
    wilson_interval,
    worst_classes,
)

FORMAT_VERSION = 1
RESULTS, PREDICTIONS, LOG_PROBABILITIES = "results.json", "predictions.npz", "log_probabilities.npy"
MOST_NUMBERS = 250_000_000  # N x C, half a gigabyte; the test images of iNaturalist 2018 have 200 million
LEVEL, RESAMPLES, SEED = 0.95, 2000, 0  # settings of the bootstrap


@dataclass(frozen=True)
class Predictions:
    """The predictions of a model for N images."""

    labels: np.ndarray  # (N,) true classes
    predictions: np.ndarray  # (N,) classes with the highest mean logit
    label_ranks: np.ndarray  # (N,) rank of the true class, 0 if the prediction is right
    confidences: np.ndarray  # (N,) softmax probability of the prediction
    losses: np.ndarray  # (N,) cross-entropy of the mean logits
    expert_predictions: np.ndarray  # (N, E), -1 for an expert that the router did not run
    experts_used: np.ndarray | None = None  # (N,), with a router
    log_probabilities: np.ndarray | None = None  # (N, C) float16, log-softmax of the mean logits; in a file of its own

    def select(self, images: np.ndarray) -> "Predictions":
        """Returns the predictions for some of the images, by a mask (N,)."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return Predictions(**{name: None if values is None else values[images] for name, values in columns.items()})

    def save(self, path: Path) -> None:
        """Writes the columns to `path`, and the log-probabilities beside it. Removes those of earlier predictions."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "log_probabilities"}
        np.savez_compressed(path, **{name: values for name, values in columns.items() if values is not None})
        beside = path.with_name(LOG_PROBABILITIES)
        if self.log_probabilities is None:
            beside.unlink(missing_ok=True)
        else:
            np.save(beside, self.log_probabilities)

    @classmethod
    def load(cls, path: Path, with_log_probabilities: bool = False) -> "Predictions":
        """Loads the columns of `save` and, if asked for and there, the log-probabilities.

        Raises FileNotFoundError if the file does not exist, and ValueError if it is another file.
        """
        beside = path.with_name(LOG_PROBABILITIES)
        try:
            with np.load(path, allow_pickle=False) as columns:
                images = cls(**columns)
            if not with_log_probabilities or not beside.is_file():
                return images
            found = np.load(beside, allow_pickle=False)
            if len(found) != len(images.labels):
                raise ValueError(f"{beside.name} is of {len(found)} images, {path.name} of {len(images.labels)}")
        except (TypeError, ValueError, EOFError, KeyError) as error:
            raise ValueError(f"{path} was not written by ride_bf.evaluate, or is damaged: {error}") from error
        return replace(images, log_probabilities=found)


def main_metrics(images: Predictions, class_counts: Sequence[int]) -> dict[str, Any]:
    """Returns `loss`, the metrics of `shot_accuracy` and `class_summary` and, with a router, those of `expert_use`."""
    metrics = {
        "loss": float(images.losses.astype(np.float64).mean()),
        **shot_accuracy(images.predictions, images.labels, class_counts),
        **class_summary(images.predictions, images.labels, len(class_counts)),
    }
    if images.experts_used is not None:
        num_experts = images.expert_predictions.shape[1]
        metrics |= expert_use(images.experts_used, images.labels, class_counts, num_experts)
    return metrics


def measure(images: Predictions, class_counts: Sequence[int]) -> dict[str, Any]:
    """Computes the keys of `results.json` that depend on nothing but the predictions, from `metrics` to `experts`."""
    labels, num_classes = images.labels, len(class_counts)
    correct = images.predictions == labels
    _, per_class_images = class_means(correct, labels, num_classes)
    precision, _ = class_means(correct, images.predictions, num_classes)
    weights = accuracy_weights(class_counts, per_class_images)
    shifted = distribution_weights(class_counts, per_class_images)

    metrics = main_metrics(images, class_counts)
    accuracy = np.asarray(metrics["per_class_accuracy"], dtype=float)
    metrics |= {name: weighted_mean(accuracy, shares) for name, shares in shifted.items()}
    all_weights = weights | shifted
    resampled = bootstrap(correct, labels, all_weights, RESAMPLES, SEED)
    if num_classes > 5:
        in_top_5 = images.label_ranks < 5
        top_5, _ = class_means(in_top_5, labels, num_classes)
        of_top_5 = {name.replace("accuracy", "top_5_accuracy"): shares for name, shares in weights.items()}
        metrics |= {name: weighted_mean(top_5, shares) for name, shares in of_top_5.items()}
        metrics["per_class_top_5_accuracy"] = none_for_nan(top_5)
        resampled |= bootstrap(in_top_5, labels, of_top_5, RESAMPLES, SEED)
        all_weights |= of_top_5
    metrics |= {"per_class_precision": none_for_nan(precision), "per_class_images": per_class_images.tolist()}

    groups = {"all": np.ones(num_classes, dtype=bool), **shot_groups(class_counts)}
    reliability = {}
    for group, members in groups.items():
        inside = members[labels]
        if inside.any():
            reliability[group] = calibration(images.confidences[inside], correct[inside])
            prefix = "" if group == "all" else f"{group}_shot_"
            metrics[f"{prefix}expected_calibration_error"] = expected_calibration_error(reliability[group])
    if images.log_probabilities is not None:
        metrics |= class_wise_calibration(images.log_probabilities, labels)
    results = {
        "metrics": metrics,
        "confidence_intervals": {
            name: _interval(resampled[name], metrics[name], effective_images(own, per_class_images))
            for name, own in all_weights.items()
        },
        "bootstrap": {
            "level": LEVEL,
            "resamples": RESAMPLES,
            "seed": SEED,
            "stratified_by": "class",
            "without_width": "wilson",
        },
        "calibration": reliability,
        "confusion": {
            "pairs": confused_pairs(images.predictions, labels, num_classes),
            "worst_classes": worst_classes(images.predictions, labels, num_classes),
        },
        "mistakes": worst_mistakes(images),
    }
    if images.expert_predictions.shape[1] > 1:
        results["experts"] = _measure_experts(images, class_counts)
    return results


def worst_mistakes(images: Predictions, most: int = 24) -> list[dict[str, Any]]:
    """Returns the wrong predictions with the highest confidence, the most confident first."""
    wrong = np.flatnonzero(images.predictions != images.labels)
    most_confident = wrong[np.argsort(-images.confidences[wrong], kind="stable")][:most]
    return [
        {
            "image": int(row),
            "true": int(images.labels[row]),
            "predicted": int(images.predictions[row]),
            "confidence": float(images.confidences[row]),
        }
        for row in most_confident
    ]


def _interval(resampled: np.ndarray, value: float, images: float) -> list[float]:
    """The bootstrap's interval; Wilson's if the bootstrap has no width, as when all images are right."""
    low, high = confidence_interval(resampled, LEVEL)
    return [low, high] if high - low > 1e-9 else wilson_interval(value, images, LEVEL)


def _measure_experts(images: Predictions, class_counts: Sequence[int]) -> dict[str, Any]:
    each = []
    for own in images.expert_predictions.T:
        saw = own >= 0
        accuracies = shot_accuracy(own[saw], images.labels[saw], class_counts) if saw.any() else {}
        each.append({"images": int(saw.sum()), **accuracies})
    some_right = (images.expert_predictions == images.labels[:, None]).any(axis=1)
    oracle, per_class_images = class_means(some_right, images.labels, len(class_counts))
    weights = accuracy_weights(class_counts, per_class_images)
    experts = {
        "each": each,
        "agreement": none_for_nan(expert_agreement(images.expert_predictions)),
        **{name.replace("accuracy", "oracle_accuracy"): weighted_mean(oracle, own) for name, own in weights.items()},
    }
    agreement = {"mean_agreement": mean_agreement(images.expert_predictions)}
    for group, members in shot_groups(class_counts).items():
        agreement[f"{group}_shot_mean_agreement"] = mean_agreement(images.expert_predictions[members[images.labels]])
    return experts | {name: value for name, value in agreement.items() if not np.isnan(value)}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describes the machine, because the measured speed depends on it."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    processor = models[0] if models else platform.processor() or platform.machine()
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "processor": processor,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": importlib.metadata.version("transformers"),
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def write_results(folder: Path, facts: dict[str, Any], images: Predictions, class_counts: Sequence[int]) -> dict:
    """Writes `results.json` and the predictions into `folder`. Returns the contents of `results.json`.

    `facts` are the keys of `results.json` before `metrics` and after `experts`. This function adds the keys that follow
    from the predictions, the version of the format and, if `facts` has none, the date.
    """
    results = {
        "format_version": FORMAT_VERSION,
        **facts,
        "num_images": len(images.labels),
        "train_class_counts": list(class_counts),
        "num_experts": images.expert_predictions.shape[1],
        **measure(images, class_counts),
        "date": facts.get("date") or datetime.now(UTC).isoformat(timespec="seconds"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    images.save(folder / PREDICTIONS)
    (folder / RESULTS).write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


def read_results(path: str | Path) -> dict[str, Any]:
    """Reads a `results.json`. `path` is the file or its folder.

    Raises ValueError if it is not such a file or has another version of the format, and FileNotFoundError if it does
    not exist.
    """
    path = Path(path)
    path = path / RESULTS if path.is_dir() else path
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    version = results.get("format_version") if isinstance(results, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version}, not {FORMAT_VERSION}; evaluate the model again")
    return results
