"""Evaluates a model on a split, or earlier predictions again; writes the files about it, and says what they have."""

import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import BaseImageProcessor

from confidence_ride_bf import Confidence
from data import (
    BrokenImageError,
    FinishedBatches,
    ImageStream,
    OnBrokenImage,
    class_counts,
    class_labels,
    evaluation_batches,
    load_unlabelled,
    undecoded,
)
from data.notices import printed_notices
from ride_bf.evaluation.comparison import read_evaluation
from ride_bf.evaluation.confidence import CONFIDENCE, confidence_facts, confidence_table, measure_confidence
from ride_bf.evaluation.embedding import Embedded, chosen_features
from ride_bf.evaluation.html_report import REPORT, write_report
from ride_bf.evaluation.leakage import also_trained_on, describe_leakage, measure_leakage
from ride_bf.evaluation.neighbours import NEIGHBOURS, measure_neighbours
from ride_bf.evaluation.pages import thumbnail
from ride_bf.evaluation.predict import as_predictions, gather_columns, image_facts, rows_of
from ride_bf.evaluation.priors import ModelPrior, TestPrior, given_model_prior, make_test_prior, measure_test_prior
from ride_bf.evaluation.results import (
    LOG_PROBABILITIES,
    MOST_NUMBERS,
    Predictions,
    describe_machine,
    main_metrics,
    worst_mistakes,
    write_results,
)
from ride_bf.evaluation.tables import accuracy_table, calibration_table, shot_summary
from ride_bf.evaluation.unknown import UNKNOWN, known_columns, measure_unknown, unknown_table
from ride_bf.evaluation.views import CENTRE, VIEWS, MeanOverViews
from ride_bf.runs.provenance import EvaluationData


def evaluate_split(
    model: nn.Module,
    data: EvaluationData,
    processor: BaseImageProcessor,
    accelerator: Accelerator,
    output_dir: Path,
    facts: dict[str, Any],
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    train_images: bool = False,
    views: str = CENTRE,
    on_broken: OnBrokenImage | None = None,
    test_prior: TestPrior | None = None,
    unknown_dir: Path | None = None,
    neighbours: Embedded | None = None,
) -> dict[str, Any] | None:
    """Evaluates a prepared model and writes `results.json`, the predictions and `report.html` into `output_dir`.

    `facts` are the keys of `results.json` about the model and the data. If the training images are known, the accuracy
    is also given without those of the split that are among them and, with `train_images`, on the training images.
    `views` is a key of `VIEWS`. Images that cannot be read and that `on_broken` skips are left out. With a `test_prior`
    the logits are corrected too. The images in and below `unknown_dir` are of none of the classes. The training images
    `neighbours` vote for classes too. Every process calls this function. The first one writes the files and returns the
    contents of `results.json`; the others return None. Raises BrokenImageError if no image can be read, and ValueError
    if there are too many probabilities for a `test_prior`.
    """
    split, train_class_counts = data.split, data.train_class_counts
    numbers = len(split) * len(train_class_counts)
    if test_prior is not None and numbers > MOST_NUMBERS:
        raise ValueError(
            f"--test_prior needs the probabilities of all classes for all images, {numbers:,} numbers; at most "
            f"{MOST_NUMBERS:,} are kept: leave it out, or name a smaller split with --split"
        )
    with printed_notices(accelerator.print):
        unlabelled = None if unknown_dir is None else load_unlabelled(unknown_dir)
    network = accelerator.unwrap_model(model)
    confidence = None if network.config.confidence is None else network.confidence
    if views != CENTRE:
        model, processor = MeanOverViews(model, views), VIEWS[views].processor(processor)

    def loader(images: Dataset | ImageStream, broken: OnBrokenImage | None = on_broken) -> FinishedBatches:
        return evaluation_batches(
            images, processor, batch_size, num_workers, accelerator, broken, data.max_image_pixels
        )

    started, speeds = time.perf_counter(), []
    wanted = _columns_of(numbers <= MOST_NUMBERS, confidence, unlabelled is not None, neighbours)
    images, own, read = _read_images(model, loader(split), accelerator, wanted, speeds)
    seconds = time.perf_counter() - started
    _check_order(images, read, split)
    unknown: dict[str, Any] = {}
    if unlabelled is not None:
        others, scores, found = _read_images(
            model,
            loader(unlabelled, OnBrokenImage("skip")),
            accelerator,
            _columns_of(False, None, True),
            source=f"--unknown_dir {unknown_dir}",
        )
        rejecting = () if confidence is None else (confidence.known_score, confidence.known_threshold)
        unknown[UNKNOWN] = {
            **measure_unknown(own, images.labels, scores, others.predictions, train_class_counts, *rejecting),
            "broken_images_left_out": int((~found).sum()),
        }
    trained: dict[str, Any] = {}
    if train_images and data.training_images is not None:
        of_training, *_ = _read_images(model, loader(data.training_images), accelerator, image_facts)
        metrics = main_metrics(of_training, train_class_counts)
        trained = {"training_images": {"num_images": len(of_training.labels), "metrics": metrics}}
    if not accelerator.is_main_process:
        return None
    seen = also_trained_on(split, data.training_images)
    left_out = {} if read.all() else {"broken_images_left_out": int((~read).sum())}
    facts = {
        **facts,
        "views": views,
        **left_out,
        **measure_leakage(images, None if seen is None else seen[read], train_class_counts),
        "class_names": data.class_names,
        **trained,
        **({} if confidence is None else {CONFIDENCE: measure_confidence(images, own, confidence, train_class_counts)}),
        **unknown,
        **_neighbours(images, own, neighbours, train_class_counts),
        "speed": {
            "images_per_second": float(np.median(speeds[1:] or speeds)),
            "timed_batches": len(speeds[1:] or speeds),
            "seconds": seconds,
            "batch_size": batch_size,
            "num_processes": accelerator.num_processes,
            "num_workers": num_workers,
            "mixed_precision": accelerator.mixed_precision,
        },
        "machine": describe_machine(accelerator.device),
    }
    pictures = _mistaken_images(images, split, np.flatnonzero(read), data.max_image_pixels)
    return _write(output_dir, facts, images, train_class_counts, test_prior, pictures)


def _mistaken_images(
    images: Predictions, split: Dataset | ImageStream, rows: np.ndarray, max_image_pixels: int
) -> dict[int, str | None]:
    """Pictures for `write_report`. `rows` (N,) are the rows of the split that the predictions are of.

    There are none of a stream, which gives its images only once.
    """
    if isinstance(split, ImageStream):
        return {}
    shown, stored = [mistake["image"] for mistake in worst_mistakes(images)], undecoded(split)
    return {image: thumbnail(stored[int(rows[image])]["image"], max_image_pixels) for image in shown}


def _columns_of(
    with_log_probabilities: bool,
    confidence: Confidence | None,
    with_known_scores: bool,
    neighbours: Embedded | None = None,
) -> Callable[[Any, Tensor], dict[str, Tensor]]:
    """What is kept of a batch: the columns of `Predictions`, and others about confidence and unknown images."""

    def columns(outputs: Any, labels: Tensor) -> dict[str, Tensor]:
        facts = image_facts(outputs, labels)
        if with_log_probabilities:
            log_probabilities = outputs.logits.float().log_softmax(dim=1).clamp(min=torch.finfo(torch.float16).min)
            facts["log_probabilities"] = log_probabilities.half()
        if confidence is not None:
            facts |= confidence_facts(confidence)(outputs, labels)
        if neighbours is not None:
            facts["features"] = chosen_features(outputs.expert_features.float(), neighbours.source.expert)
        return facts | known_columns(outputs.logits) if with_known_scores else facts

    return columns


def _neighbours(
    images: Predictions, columns: dict[str, np.ndarray], embedded: Embedded | None, class_counts: Sequence[int]
) -> dict[str, Any]:
    if embedded is None:
        return {}
    training_labels = embedded.label_numbers()
    measured = measure_neighbours(columns["features"], embedded.features, training_labels, images.labels, class_counts)
    return {NEIGHBOURS: measured}


def _read_images(
    model: nn.Module,
    loader: FinishedBatches,
    accelerator: Accelerator,
    columns_of: Callable[[Any, Tensor], dict[str, Tensor]],
    speeds: list[float] | None = None,
    source: str = "the split",
) -> tuple[Predictions, dict[str, np.ndarray], np.ndarray]:
    """The predictions for the images that can be read, other columns about them, and a mask (N,) of these images.

    Raises BrokenImageError if there are none; it names their `source`.
    """
    columns = gather_columns(model, loader, accelerator, columns_of, with_broken=True, speeds=speeds)
    read = columns["labels"] >= 0
    if not read.any():
        raise BrokenImageError(
            f"none of the {len(read):,} images of {source} can be read; are they images, and still there?"
        )
    columns = rows_of(columns, read)
    names = {field.name for field in fields(Predictions)}
    predicted = {name: column for name, column in columns.items() if name in names}
    return as_predictions(predicted), {name: columns[name] for name in columns.keys() - names}, read


def _check_order(images: Predictions, read: np.ndarray, split: Dataset | ImageStream) -> None:
    """Raises RuntimeError unless the predictions are for the images of the split, each once and in order."""
    if len(read) != len(split):
        as_it_is = False
    elif isinstance(split, ImageStream):  # its order is not known in advance
        counts = np.bincount(images.labels, minlength=len(split.counts))
        as_it_is = len(counts) == len(split.counts) and bool((counts <= class_counts(split)).all())
    else:
        as_it_is = np.array_equal(images.labels, class_labels(split)[read])
    if not as_it_is:
        raise RuntimeError("the loader changed the order of the split's images, or did not return each of them once")


def evaluate_again(
    path: Path, output_dir: Path | None, test_prior: str | None = None, model_prior: str | None = None
) -> tuple[dict[str, Any], Path]:
    """Computes all numbers of an evaluation again from its predictions, without images and model.

    Args:
        path: what `read_evaluation` takes, or a `predictions.npz`.
        output_dir: where to write; by default, where the predictions are.
        test_prior, model_prior: see `make_test_prior` and `given_model_prior`. Without them, those of the evaluation.

    What the predictions do not tell, such as the accuracy on the training images, stays as it was. Returns the new
    contents of `results.json`, and their folder. Raises ValueError for a `test_prior` without log-probabilities.
    """
    results, images, folder = read_evaluation(path, with_log_probabilities=True)
    counts, known = results["train_class_counts"], results.get("model_prior")
    prior = None if known is None else ModelPrior(**known)
    if test_prior is not None:
        if images.log_probabilities is None:
            raise ValueError(
                f"{folder} has no probabilities of all classes, which --test_prior needs: an earlier version wrote it, "
                f"or there were too many. Evaluate the model again: python -m ride_bf.evaluate --model "
                f"{results['model']} --test_prior {test_prior}"
            )
        prior = prior if model_prior is None else given_model_prior(model_prior, counts)
        correction = make_test_prior(test_prior, prior, results["class_names"], counts)
    else:
        earlier = results.get("test_prior")
        correction = None if earlier is None or images.log_probabilities is None else TestPrior.from_dict(earlier)
    return _write(output_dir or folder, results, images, counts, correction), output_dir or folder


def _write(
    folder: Path,
    facts: dict[str, Any],
    images: Predictions,
    class_counts: Sequence[int],
    test_prior: TestPrior | None,
    pictures: dict[int, str | None] | None = None,
) -> dict[str, Any]:
    """Writes the files of an evaluation into `folder`. Returns the contents of `results.json`."""
    if test_prior is not None:
        facts = {**facts, "test_prior": measure_test_prior(images, test_prior, class_counts)}
    results = write_results(folder, facts, images, class_counts)
    write_report(results, folder, pictures)
    return results


def describe(results: dict[str, Any], folder: Path) -> str:
    """What the command prints about an evaluation whose files are in `folder`."""
    counts, names, metrics = results["train_class_counts"], results["class_names"], results["metrics"]
    views = results.get("views", CENTRE)
    parts = [
        f"{results['model']}: {results['num_images']:,} images of {results['dataset']}'s {results['split']} split"
        + ("" if views == CENTRE else f", mean of the views {views}"),
        accuracy_table(metrics, counts, names),
        calibration_table(metrics),
    ]
    if CONFIDENCE in results:
        parts.append(confidence_table(results[CONFIDENCE]))
    if UNKNOWN in results:
        parts.append(unknown_table(results[UNKNOWN]))
    if (voted := results.get(NEIGHBOURS)) is not None:
        parts.append(f"vote of the {voted['count']} nearest training images: {shot_summary(voted['metrics'])}")
    if (trained := results.get("training_images")) is not None:
        parts.append(f"on the {trained['num_images']:,} training images: {shot_summary(trained['metrics'])}")
    if (prior := results.get("test_prior")) is not None:
        before, after = prior["uncorrected_test_prior_accuracy"], prior["metrics"]["test_prior_accuracy"]
        parts.append(
            f"corrected for the test prior {prior['name']}, from the model's prior by {prior['model_prior']['basis']}: "
            f"{shot_summary(prior['metrics'])}\nexpected accuracy on images of that prior: {100 * after:.1f} %, "
            f"{100 * before:.1f} % without the correction"
        )
    notes = [describe_broken(results), describe_leakage(results)]
    if "class_wise_calibration_error" not in metrics:
        notes.append(
            f"no {LOG_PROBABILITIES}, so no calibration errors of all classes (see ride_bf.evaluation.results)"
        )
    parts += [f"note: {said}" for said in notes if said]
    parts.append(f"{results['speed']['images_per_second']:,.0f} images/s. Full report: {folder / REPORT}")
    return "\n\n".join(parts)


def describe_broken(results: dict[str, Any]) -> str | None:
    """Says how many images were left out because they cannot be read; None without such."""
    broken = results.get("broken_images_left_out")
    return f"{broken:,} more image(s) cannot be read and are left out; check_data names them" if broken else None
