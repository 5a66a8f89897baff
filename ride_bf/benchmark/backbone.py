"""Compare a network on a backbone with the backbone alone: `python -m ride_bf.benchmark train --backbone vit`.

The backbones have random weights, and all but ViT-B are small. All networks run in one process, in turns, on the same
images, which are on the device already.

- Forward pass in evaluation, under `torch.inference_mode`: the network with one expert that shares the whole backbone,
  against the backbone.
- Training step of all weights: the same network, against the backbone's own image classifier.
- Training step with three experts that own the last block: its time, against what the multiply-adds say.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from configuration_ride_bf import RideBfConfig
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.benchmark.measure import precision_name, seconds_in_turns
from ride_bf.evaluation.compute import inference_cost, profile
from ride_bf.runs.models import to_fast_layout

# Model type -> options that make it small enough for a CPU. A name of another kind has its `model_type`.
_SMALL_TRANSFORMER = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "image_size": 224}
SMALL: dict[str, dict[str, Any]] = {
    "vit": _SMALL_TRANSFORMER,
    "dinov2": {name: value for name, value in _SMALL_TRANSFORMER.items() if name != "intermediate_size"},
    "convnext": {"depths": [2, 2, 6, 2], "hidden_sizes": [40, 80, 160, 320]},
    "swin": {"embed_dim": 48, "depths": [2, 2, 6, 2], "num_heads": [2, 4, 8, 16]},
    "vit_base": {"model_type": "vit"},  # ViT-B/16, with the sizes that transformers gives it
    "resnet": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
}
IMAGE_SIZE, NUM_LABELS = 224, 100
PLAIN, OURS = "backbone, forward", "one expert, forward"
OWN_STEP, OUR_STEP, EXPERTS_STEP = "own classifier, step", "one expert, step", "three experts, step"


def measure_backbone(name: str, batch_size: int, accelerator: Accelerator, rounds: int) -> dict[str, Any]:
    """Measures seconds by round of each contender, and the multiply-adds of our networks for an image."""
    config = AutoConfig.for_model(**{"model_type": name, **SMALL[name]}, num_labels=NUM_LABELS)
    shared = RideBfConfig(backbone_config=config, num_labels=NUM_LABELS, num_experts=1, classifier="linear")
    owned = RideBfConfig(backbone_config=config, num_labels=NUM_LABELS, num_experts=3, num_expert_layers=1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(accelerator.device)
    labels = torch.randint(NUM_LABELS, (batch_size,), generator=generator).to(accelerator.device)
    calls = {
        PLAIN: _forward(AutoModel.from_config(config), images, accelerator),
        OURS: _forward(RideBfForImageClassification(shared), images, accelerator),
        OWN_STEP: _step(AutoModelForImageClassification.from_config(config), images, labels, accelerator),
        OUR_STEP: _step(RideBfForImageClassification(shared), images, labels, accelerator),
        EXPERTS_STEP: _step(RideBfForImageClassification(owned), images, labels, accelerator),
    }
    return {
        "backbone": name,
        "batch_size": batch_size,
        "image_size": IMAGE_SIZE,
        "precision": precision_name(accelerator.mixed_precision),
        "seconds_by_round": seconds_in_turns(calls, rounds, accelerator.device),
        "multiply_adds": {OUR_STEP: _multiply_adds(shared), EXPERTS_STEP: _multiply_adds(owned)},
    }


def _multiply_adds(config: RideBfConfig) -> float:
    return inference_cost(profile(config, IMAGE_SIZE, window=1))


def _forward(model: nn.Module, images: Tensor, accelerator: Accelerator) -> Callable[[], object]:
    model = to_fast_layout(model).to(accelerator.device).eval()

    def forward() -> None:
        with torch.inference_mode(), accelerator.autocast():
            model(images)

    return forward


def _step(model: nn.Module, images: Tensor, labels: Tensor, accelerator: Accelerator) -> Callable[[], object]:
    model = to_fast_layout(model).train()
    prepared, optimizer = accelerator.prepare(model, SGD(model.parameters(), lr=0.01, momentum=0.9))

    def step() -> None:
        accelerator.backward(F.cross_entropy(prepared(images).logits, labels))
        optimizer.step()
        optimizer.zero_grad()

    return step


def ratios(results: dict[str, Any]) -> dict[str, list[float]]:
    """Returns by round how fast our networks are: 1 is as fast as the backbone, or as the multiply-adds say."""
    seconds, cost = results["seconds_by_round"], results["multiply_adds"]
    more = cost[EXPERTS_STEP] / cost[OUR_STEP]

    def by_round(left: str, right: str, factor: float = 1.0) -> list[float]:
        return [factor * one / other for one, other in zip(seconds[left], seconds[right], strict=True)]

    return {
        "forward": by_round(PLAIN, OURS),
        "step": by_round(OWN_STEP, OUR_STEP),
        "three experts": by_round(OUR_STEP, EXPERTS_STEP, more),
    }


def backbone_report(results: dict[str, Any]) -> str:
    """Returns the measurements as a Markdown table, followed by the ratios."""
    seconds = results["seconds_by_round"]
    size = results["image_size"]
    lines = [
        f"{results['backbone']}, with random weights: {results['batch_size']} images of {size} x {size} "
        f"pixels, {results['precision']}; {results['machine']}; median of {len(seconds[OURS])} rounds",
        "",
        "| | images/s |",
        "| --- | --- |",
    ]
    lines += [
        f"| {name} | {results['batch_size'] / statistics.median(values):.2f} |" for name, values in seconds.items()
    ]
    cost = results["multiply_adds"]
    compared = {
        "forward": "x the images/s of the backbone under torch.inference_mode",
        "step": "x the images/s of the backbone's own classifier in training",
        "three experts": f"x the speed that {cost[EXPERTS_STEP] / cost[OUR_STEP]:.2f} x the multiply-adds allow",
    }
    lines.append("")
    for name, values in ratios(results).items():
        middle, least, most = statistics.median(values), min(values), max(values)
        lines.append(f"{name}: {middle:.2f} ({least:.2f} to {most:.2f}) {compared[name]}")
    return "\n".join(lines)
