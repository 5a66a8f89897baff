"""What a model is worth on rare classes: `python -m ride_bf.evaluate --model DIR_OR_HUB_ID --dataset NAME`.

Writes `results.json`, whose keys `ride_bf.results` describes; `report.html`, the same for people, in one file that
needs no other; and `predictions.npz`, with which `python -m ride_bf.compare` compares models image by image. Several
processes share the images: `accelerate launch -m ride_bf.evaluate ...`. The BatchFormer takes no part in predictions.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoImageProcessor, BaseImageProcessor
from transformers.utils import logging

from data import (
    DATASETS,
    BrokenImageError,
    FinishedBatches,
    class_counts,
    class_labels,
    evaluation_batches,
    load_long_tailed,
)
from ride_bf.command_line import errors_as_messages
from ride_bf.html_report import REPORT, write_report
from ride_bf.parts import check_classes, load_model
from ride_bf.report import accuracy_table
from ride_bf.results import Predictions, describe_machine, images_digest, main_metrics, write_results


def evaluate(model: nn.Module, loader: FinishedBatches, accelerator: Accelerator, class_counts: Sequence[int]) -> dict:
    """What `ride_bf.metrics.shot_accuracy` gives, and `loss`, the mean cross-entropy of the mean logits.

    With a router, what `ride_bf.metrics.expert_use` gives too. Model, loader and processes as `predict` has them.
    """
    return main_metrics(predict(model, loader, accelerator), class_counts)


@torch.no_grad()
def predict(model: nn.Module, loader: FinishedBatches, accelerator: Accelerator) -> Predictions:
    """Each image of the loader once, in order, over all processes.

    Model and loader come from `accelerator.prepare`; the model is left in evaluation mode. Every process gets the
    predictions of all images. Raises FloatingPointError if some are not finite.
    """
    model.eval()
    columns: dict[str, list[Tensor]] = {}
    for batch in loader:
        values = _image_facts(model(batch["pixel_values"]), batch["labels"])
        for name, gathered in accelerator.gather_for_metrics(values).items():
            columns.setdefault(name, []).append(gathered.cpu())
    images = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
    read = images["labels"] >= 0  # what could not be read comes with a label below
    images = {name: column[read] for name, column in images.items()}
    if not np.isfinite(images["confidences"]).all():
        raise FloatingPointError("some logits are not finite: is the model damaged, or the precision too low for it?")
    return Predictions(**images)


def _image_facts(outputs: Any, labels: Tensor) -> dict[str, Tensor]:
    """The columns of `Predictions` for a batch, computed where the logits are, so that these need not be kept."""
    logits = outputs.logits.float()  # (B, C)
    expert_logits = outputs.expert_logits  # (B, E, C)
    classes = torch.arange(logits.shape[1], device=logits.device)
    label = labels.clamp(min=0)[:, None]  # (B, 1)
    own = logits.gather(1, label)
    before = (logits > own) | ((logits == own) & (classes < label))  # of equal logits the first class wins
    facts = {
        "labels": labels,
        "predictions": logits.argmax(dim=1),
        "label_ranks": before.sum(dim=1),
        "confidences": logits.softmax(dim=1).amax(dim=1),
        "losses": F.cross_entropy(logits, label.squeeze(1), reduction="none"),
        "expert_predictions": expert_logits.argmax(dim=2).where(~expert_logits[..., 0].isnan(), -1),
    }
    if outputs.get("num_experts_used") is not None:
        facts["experts_used"] = outputs.num_experts_used
    return facts


def evaluate_split(
    model: nn.Module,
    split: Dataset,
    processor: BaseImageProcessor,
    accelerator: Accelerator,
    class_counts: Sequence[int],
    output_dir: Path,
    facts: dict[str, Any],
    batch_size: int = 256,
    num_workers: int = 0,
) -> dict[str, Any] | None:
    """Evaluates a prepared model and writes `results.json`, `predictions.npz` and `report.html` into `output_dir`.

    `class_counts` (C,) are the training images of each class; `facts` what `results.json` is to say of the model and
    the data: `model`, `dataset`, `split` and `dataset_options`. Called by every process; returns what `results.json`
    holds in the first one, which writes it, and None in the others.
    """
    loader = evaluation_batches(split, processor, batch_size, num_workers, accelerator)
    started = time.perf_counter()
    images = predict(model, loader, accelerator)
    seconds = time.perf_counter() - started
    if not np.array_equal(images.labels, class_labels(split)):
        raise RuntimeError("the images came in another order than the split has them in, or not each of them once")
    if not accelerator.is_main_process:
        return None
    facts = {
        **facts,
        "images_digest": images_digest(split),
        "class_names": split.features["label"].names,
        "speed": {
            "images_per_second": len(split) / seconds,
            "seconds": seconds,
            "batch_size": batch_size,
            "num_processes": accelerator.num_processes,
            "num_workers": num_workers,
            "mixed_precision": accelerator.mixed_precision,
        },
        "machine": describe_machine(accelerator.device),
    }
    results = write_results(output_dir, facts, images, class_counts)
    write_report(results, output_dir)
    return results


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ride_bf.evaluate",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a model; its code is not run")
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--data_dir", help="where it is, if not in its usual place in data/; as in training")
    parser.add_argument("--split", default="test", help="test, or validation to leave the test images unseen")
    parser.add_argument("--validation_fraction", type=float, help="as in training, if it was given there")
    parser.add_argument("--imbalance_factor", type=float, help="of CIFAR, as in training")
    parser.add_argument("--imbalance_type", help="of CIFAR, as in training")
    parser.add_argument("--image_column", help="of one's own table, as in training")
    parser.add_argument("--label_column", help="of one's own table, as in training")
    parser.add_argument(
        "--output_dir", type=Path, help="by default the model's folder, or outputs/NAME for one from the Hub"
    )
    parser.add_argument("--batch_size", type=int, default=256, help="images in a batch of one process")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that prepare images, for each process")
    options = parser.parse_args(arguments)
    if options.batch_size < 1 or options.num_workers < 0:
        parser.error(
            f"--batch_size must be 1 or more and --num_workers 0 or more, not {options.batch_size} and "
            f"{options.num_workers}"
        )
    if options.output_dir is None:
        local = Path(options.model)
        options.output_dir = local if local.is_dir() else Path("outputs") / options.model.replace("/", "_")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    logging.disable_progress_bar()
    names = ("validation_fraction", "imbalance_factor", "imbalance_type", "image_column", "label_column")
    data_options = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    with errors_as_messages():
        accelerator = Accelerator()
        check_precision(accelerator)
        model = load_model(options.model)
        processor = AutoImageProcessor.from_pretrained(options.model)
        with accelerator.main_process_first():  # the others find the cache of the first
            splits = load_long_tailed(options.dataset, options.data_dir, **data_options)
        if options.split not in splits:
            raise ValueError(f"{options.dataset} has no split {options.split!r}; it has {', '.join(splits)}")
        counts, split = class_counts(splits["train"]), splits[options.split]
        class_names = splits["train"].features["label"].names
        check_classes(model, class_names, f"the model {options.model}")
    model = accelerator.prepare_model(model, evaluation_mode=True)
    facts = {
        "model": options.model,
        "dataset": options.dataset,
        "split": options.split,
        "dataset_options": data_options,
    }
    with errors_as_messages((BrokenImageError, FloatingPointError)):
        results = evaluate_split(
            model,
            split,
            processor,
            accelerator,
            counts,
            options.output_dir,
            facts,
            options.batch_size,
            options.num_workers,
        )
    if results is not None:
        print(f"{options.model}: {len(split):,} images of {options.dataset}'s {options.split} split\n")
        print(accuracy_table(results["metrics"], counts, class_names))
        speed = results["speed"]["images_per_second"]
        print(f"\n{speed:,.0f} images/s. All the numbers: {options.output_dir / REPORT}")
    accelerator.end_training()


def check_precision(accelerator: Accelerator) -> None:
    """Raises ValueError for fp16 on a CPU, which Accelerate would silently ignore."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("fp16 needs a GPU; on a CPU use --mixed_precision bf16 or no")


if __name__ == "__main__":
    main()
