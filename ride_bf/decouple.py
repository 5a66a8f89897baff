"""Correct a trained classifier for its long tail, without training: tau-normalisation and post-hoc logit adjustment.

    python -m ride_bf.decouple tau_normalisation MODEL --recipe NAME --output_dir OUT [--strength T]
    python -m ride_bf.decouple logit_adjustment  MODEL --recipe NAME --output_dir OUT [--strength T]

The strength is chosen on the validation images, never on the test, unless it is given. The recipe names the data;
`--data_dir` and `--validation_fraction` are as in training. (Training the classifiers alone is training:
`train_accelerate.py --train_only classifiers` is cRT, `--train_only class_scales` learnable weight scaling.)
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor
from transformers.utils import logging

from data import FinishedBatches, class_counts, evaluation_batches, load_long_tailed
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.command_line import RECIPE_OPTIONS, errors_as_messages, parse_arguments
from ride_bf.evaluate import evaluate
from ride_bf.losses import log_prior
from ride_bf.metrics import shot_accuracy
from ride_bf.parts import load_model
from ride_bf.report import shot_summary

STRENGTHS = tuple(np.linspace(0, 1, 21).round(2).tolist())  # 0 leaves the classifier as it is


_WHY_LINEAR = {
    "tau_normalisation": "a cosine classifier normalises each class's weights already. Train with --classifier linear",
    "logit_adjustment": "a cosine classifier has no bias to write the adjustment into. Train with "
    "--loss logit_adjusted, or with --classifier linear",
}


def check_linear(model: RideBfForImageClassification, method: str) -> None:
    """Raises ValueError, with the reason, for a cosine classifier."""
    if model.config.classifier != "linear":
        raise ValueError(f"{method} needs a linear classifier: {_WHY_LINEAR[method]}")


def tau_normalised(weight: Tensor, bias: Tensor, tau: float, class_counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """W_c / ||W_c||^tau and no bias. Kang et al.: Decoupling Representation and Classifier, 2020, section 4.2."""
    return weight / weight.norm(dim=1, keepdim=True) ** tau, torch.zeros_like(bias)


def logit_adjusted(weight: Tensor, bias: Tensor, tau: float, class_counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The bias less tau times the log of the class's share. Menon et al.: Logit Adjustment, 2021, section 4.1."""
    return weight, bias - tau * log_prior(class_counts).to(bias)


METHODS: dict[str, Callable] = {"tau_normalisation": tau_normalised, "logit_adjustment": logit_adjusted}


@torch.no_grad()
def correct(model: RideBfForImageClassification, method: str, strength: float, class_counts: Sequence[int]) -> None:
    """Corrects every expert's classifier in place. Raises ValueError unless they are linear."""
    check_linear(model, method)
    for classifier in model.classifiers:
        assert isinstance(classifier, nn.Linear)
        weight, bias = METHODS[method](classifier.weight, classifier.bias, strength, class_counts)
        classifier.weight.copy_(weight)
        classifier.bias.copy_(bias)


@torch.no_grad()
def choose_strength(
    model: RideBfForImageClassification, method: str, loader: DataLoader, class_counts: Sequence[int]
) -> dict[float, float]:
    """Balanced accuracy on the loader's images at each of `STRENGTHS`; the network runs once."""
    model.eval()
    features, labels = [], []
    for batch in loader:
        features.append(model(batch["pixel_values"]).expert_features)
        labels.append(batch["labels"])
    features, labels = torch.cat(features), torch.cat(labels)
    accuracies = {}
    for strength in STRENGTHS:
        logits = torch.zeros(len(labels), model.config.num_labels)
        for classifier, own in zip(model.classifiers, features.unbind(dim=1), strict=True):
            logits += F.linear(own, *METHODS[method](classifier.weight, classifier.bias, strength, class_counts))
        metrics = shot_accuracy(logits.argmax(dim=1).numpy(), labels.numpy(), class_counts)
        accuracies[strength] = metrics["balanced_accuracy"]
    return accuracies


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=RECIPE_OPTIONS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("model", type=Path, help="folder of a trained model with a linear classifier")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the corrected model goes")
    parser.add_argument("--strength", type=float, help="tau; by default chosen on the validation images")
    options, rest = parser.parse_known_args(arguments)
    run, recipe = parse_arguments(rest)
    logging.disable_progress_bar()
    with errors_as_messages():
        splits = load_long_tailed(recipe.dataset, **run.data_options())
        counts = class_counts(splits["train"])
        model = load_model(options.model)
        check_linear(model, options.method)
        if options.strength is None and "validation" not in splits:
            raise ValueError(f"{recipe.dataset} has no validation images: pass --validation_fraction or --strength")
        if model.config.num_labels != len(counts):
            raise ValueError(f"{options.model} has {model.config.num_labels} classes, the data {len(counts)}")
    processor = AutoImageProcessor.from_pretrained(options.model)

    def loader(split: str) -> FinishedBatches:
        return evaluation_batches(splits[split], processor, run.eval_batch_size, run.num_workers)

    strength, curve = options.strength, {}
    if strength is None:
        curve = choose_strength(model, options.method, loader("validation"), counts)
        strength = max(curve, key=lambda tau: (curve[tau], -tau))  # of equals the least correction
        print(f"{options.method}: {strength} is best of {len(curve)} strengths on {len(splits['validation'])} images")
    accelerator = Accelerator(cpu=True)
    results = {"method": options.method, "strength": strength, "validation_balanced_accuracy": curve}
    results["test_before"] = evaluate(model, loader("test"), accelerator, counts)
    correct(model, options.method, strength, counts)
    results["test"] = evaluate(model, loader("test"), accelerator, counts)
    model.save_pretrained(options.output_dir)
    processor.save_pretrained(options.output_dir)
    (options.output_dir / "decoupling.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"test before: {shot_summary(results['test_before'])}")
    print(f"test after:  {shot_summary(results['test'])}")
    print(options.output_dir)


if __name__ == "__main__":
    main()
