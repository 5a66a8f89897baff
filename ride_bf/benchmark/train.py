"""Compare a training step with the authors' implementation and with torchvision's resnet50.

With `--backbone`, the network on a backbone is compared with the backbone alone instead: see `benchmark/backbone.py`.

All of them run in one process, in turns, on images that are on the device already. Reading and augmentation are not
included.

- Reference mode: trains like the authors' code. float32, channels first, eager, loss and BatchFormer expert by expert,
  SGD tensor by tensor, and the loss is read in every step.
- This repository: the network, objective, layout and optimizer of `train_accelerate.py`.
- resnet50: torchvision's network, with the same layout, precision and optimizer, and a plain cross-entropy.

First, both modes take a step on the same images without dropout. In float64 their losses and gradients must agree to
the last digits of float32, because the losses compute in float32. In float32 both deviate by rounding: a gradient jumps
when rounding moves the input of a ReLU across 0, and in a deep network this happens in every step.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from configuration_ride_bf import RideBfConfig
from data import NUM_CLASSES
from modeling_ride_bf import RideBfForImageClassification, RideBfOutput
from ride_bf.benchmark.arguments import DOCS
from ride_bf.benchmark.backbone import backbone_report, measure_backbone
from ride_bf.benchmark.measure import (
    command,
    default_precision,
    machine,
    peak_bytes,
    precision_name,
    seconds_in_turns,
    write_results,
)
from ride_bf.evaluation.compute import multiply_adds, profile
from ride_bf.methods.losses import diversity_temperatures, effective_number_weights, ldam_margins
from ride_bf.methods.objectives import make_objective
from ride_bf.methods.windows import set_window
from ride_bf.recipes import RECIPES, TrainingRecipe
from ride_bf.runs.engine import start_accelerator
from ride_bf.runs.models import to_fast_layout
from ride_bf.training.optimizer import make_optimizer

REFERENCE, OURS, COMPILED, RESNET50 = "reference mode", "this repository", "the same, compiled", "torchvision resnet50"
PRODUCT = "matrix product"
PASSES = 3  # forward, and backward for features and for weights, each with the same multiply-adds
COMPARED_IMAGES = 4  # float64 is slow


def run(options: argparse.Namespace) -> None:
    options.mixed_precision = options.mixed_precision or default_precision()
    accelerator = start_accelerator(mixed_precision=options.mixed_precision)
    if options.backbone is not None:
        if options.compile:
            raise SystemExit("error: --compile has no effect with --backbone; leave it out")
        options.recipe = None
        results = measure_backbone(options.backbone, options.batch_size, accelerator, options.rounds)
        report, name = backbone_report, "backbone_step.json"
    else:
        recipe = RECIPES[options.recipe].with_overrides(batch_size=options.batch_size)
        results = measure_train(recipe, accelerator, options.rounds, options.compile)
        report, name = train_report, "train_step.json"
    results = {"command": command(options), "machine": machine(accelerator.device), **results}
    print(report(results))
    write_results(options.results or DOCS / name, "train", results)


@dataclass
class Contender:
    """A network in training.

    Attributes:
        step: takes one training step and clears the gradients.
        network, optimizer: they keep memory between steps.
        multiply_adds: of a forward pass for one image.
    """

    step: Callable[[], object]
    network: nn.Module
    optimizer: Optimizer
    multiply_adds: int

    def peak_bytes(self, device: torch.device) -> int | None:
        """Returns the memory kept between steps plus the peak that a step adds, or None if it is unknown."""
        momenta = [value for state in self.optimizer.state.values() for value in state.values()]
        held = [*self.network.parameters(), *self.network.buffers(), *filter(torch.is_tensor, momenta)]
        added = peak_bytes(self.step, device)
        return None if added is None else added + sum(tensor.nbytes for tensor in held)


def measure_train(recipe: TrainingRecipe, accelerator: Accelerator, rounds: int, compiled: bool) -> dict[str, Any]:
    """Measures seconds per step by round, memory and cost of each contender, and compares their numbers."""
    device = accelerator.device
    config, counts, batch = step_inputs(recipe, device)
    numbers = compare_numbers(recipe, config, counts, batch)
    contenders = {
        REFERENCE: reference_mode(recipe, config, counts, batch),
        OURS: this_repository(recipe, config, counts, batch, accelerator),
        RESNET50: plain_resnet50(recipe, config, batch, accelerator),
    }
    if compiled:
        contenders[COMPILED] = this_repository(recipe, config, counts, batch, accelerator, torch.compile)
    product, product_multiply_adds = matrix_product(accelerator)
    steps = {name: contender.step for name, contender in contenders.items()}
    seconds = seconds_in_turns({**steps, PRODUCT: product}, rounds, device)
    return {
        "recipe": recipe.name,
        "batch_size": recipe.batch_size,
        "image_size": recipe.image_size,
        "precision": precision_name(accelerator.mixed_precision),
        "seconds_by_round": seconds,
        "multiply_adds": {
            **{name: PASSES * recipe.batch_size * each.multiply_adds for name, each in contenders.items()},
            PRODUCT: product_multiply_adds,
        },
        "peak_bytes": {name: contender.peak_bytes(device) for name, contender in contenders.items()},
        "numbers": numbers,
    }


def step_inputs(recipe: TrainingRecipe, device: torch.device) -> tuple[RideBfConfig, list[int], dict[str, Tensor]]:
    """Returns what a step of a recipe needs: the network's configuration, class counts and a batch on the device."""
    config = recipe.config(num_labels=NUM_CLASSES[recipe.dataset])
    counts = long_tail(config.num_labels)
    return config, counts, random_batch(recipe.batch_size, recipe.image_size, counts, device)


def long_tail(num_classes: int, most: int = 1280, fewest: int = 5) -> list[int]:
    """Returns class counts that decay exponentially, by default from ImageNet-LT's largest to its smallest."""
    last = max(1, num_classes - 1)
    return [max(1, round(most * (fewest / most) ** (label / last))) for label in range(num_classes)]


def random_batch(images: int, image_size: int, counts: list[int], device: torch.device) -> dict[str, Tensor]:
    """Returns pixels of noise, and labels drawn in proportion to `counts`, the same every time."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor(counts, dtype=torch.float), images, replacement=True, generator=generator)
    pixels = torch.randn(images, 3, image_size, image_size, generator=generator)
    return {"pixel_values": pixels.to(device), "labels": labels.to(device)}


def reference_mode(
    recipe: TrainingRecipe, config: RideBfConfig, counts: list[int], batch: dict[str, Tensor]
) -> Contender:
    model = reference_network(recipe, config).to(batch["labels"].device)
    loss_of = ReferenceLoss(recipe, counts).to(batch["labels"].device)
    optimizer = SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        foreach=False,
    )

    def step() -> float:
        loss = loss_of(model(batch["pixel_values"]), batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Contender(step, model, optimizer, network_multiply_adds(recipe, config))


def reference_network(recipe: TrainingRecipe, config: RideBfConfig) -> RideBfForImageClassification:
    """Returns the network with a BatchFormer that encodes expert by expert and window by window."""
    model = _new_network(config)
    if model.batch_module is not None:

        def one_by_one(expert_features: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
            windows = [window.split(1, dim=1) for window in expert_features.split(recipe.window_size)]
            return torch.cat([torch.cat([encode(features) for features in window], dim=1) for window in windows])

        model.batch_module.set_windows(one_by_one)
    return model


class ReferenceLoss(nn.Module):
    """RIDE's re-weighted loss for one or two streams, expert by expert as in the released code."""

    def __init__(self, recipe: TrainingRecipe, counts: list[int]):
        super().__init__()
        self.recipe = recipe
        self.register_buffer("margins", recipe.margin_scale * ldam_margins(counts, recipe.max_margin))
        self.register_buffer("weights", effective_number_weights(counts))
        factors = diversity_temperatures(counts, recipe.reweight_factor)
        self.register_buffer("temperatures", factors)

    def forward(self, outputs: RideBfOutput, labels: Tensor) -> Tensor:
        loss = self.stream(outputs.expert_logits, labels)
        if outputs.batchformer_expert_logits is None:
            return loss
        return loss + self.recipe.batchformer_loss_weight * self.stream(outputs.batchformer_expert_logits, labels)

    def stream(self, expert_logits: Tensor, labels: Tensor) -> Tensor:
        mean_logits = expert_logits.mean(dim=1)
        loss = expert_logits.new_zeros(())
        for logits in expert_logits.unbind(dim=1):
            own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], True)
            lowered = torch.where(own, logits - self.margins, logits)
            loss = loss + F.cross_entropy(lowered, labels, weight=self.weights)
            target = F.softmax(mean_logits / self.temperatures, dim=1).detach()
            divergence = F.kl_div(F.log_softmax(logits / self.temperatures, dim=1), target, reduction="batchmean")
            loss = loss + self.recipe.diversity_factor * self.temperatures.mean() ** 2 * divergence
        return loss


def this_repository(
    recipe: TrainingRecipe,
    config: RideBfConfig,
    counts: list[int],
    batch: dict[str, Tensor],
    accelerator: Accelerator,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Contender:
    """Trains like `train_accelerate.py`. `wrap` is applied to the network before it is prepared."""
    model = to_fast_layout(_new_network(config))
    set_window(model, recipe.batchformer_window)
    objective = make_objective(recipe, counts).to(accelerator.device)
    prepared, optimizer = accelerator.prepare(wrap(model), make_optimizer(model, recipe))

    def step() -> None:
        loss = objective(prepared(batch["pixel_values"]), batch, reweight=True)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return Contender(step, model, optimizer, network_multiply_adds(recipe, config))


def plain_resnet50(
    recipe: TrainingRecipe, config: RideBfConfig, batch: dict[str, Tensor], accelerator: Accelerator
) -> Contender:
    model = to_fast_layout(torchvision.models.resnet50(num_classes=config.num_labels))
    prepared, optimizer = accelerator.prepare(model, make_optimizer(model, recipe))

    def step() -> None:
        accelerator.backward(F.cross_entropy(prepared(batch["pixel_values"]), batch["labels"]))
        optimizer.step()
        optimizer.zero_grad()

    with torch.device("meta"):
        counted = torchvision.models.resnet50(num_classes=config.num_labels).eval()
        image = torch.empty(1, 3, recipe.image_size, recipe.image_size)
    return Contender(step, model, optimizer, multiply_adds(partial(counted, image)))


def _new_network(config: RideBfConfig) -> RideBfForImageClassification:
    torch.manual_seed(0)
    return RideBfForImageClassification(config).train()


def network_multiply_adds(recipe: TrainingRecipe, config: RideBfConfig) -> int:
    """Returns the multiply-adds of a forward pass in training for one image, including the BatchFormer."""
    parts = profile(config, recipe.image_size, min(recipe.window_size, recipe.batch_size))
    return sum(part["multiply_adds"] for part in parts.values())


def matrix_product(accelerator: Accelerator) -> tuple[Callable[[], Tensor], int]:
    """Returns a product of square matrices, large enough to reach the device's peak, and its multiply-adds."""
    size = 8192 if accelerator.device.type == "cuda" else 2048
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    left, right = torch.randn(2, size, size, device=accelerator.device).to(dtype)
    return partial(torch.mm, left, right), size**3


def compare_numbers(
    recipe: TrainingRecipe, config: RideBfConfig, counts: list[int], batch: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Compares loss and gradient of a step without dropout with those of reference mode in float64.

    Returns `loss`, `loss_difference` and `gradient_difference` for each mode and precision. The differences are
    relative, and the gradient's is the norm over all parameters together.
    """
    config = RideBfConfig(**{**config.to_diff_dict(), "batchformer_dropout": 0.0})
    device = batch["labels"].device
    few = {name: values[:COMPARED_IMAGES] for name, values in batch.items()}
    ours = to_fast_layout(_new_network(config))
    set_window(ours, recipe.batchformer_window)
    objective, reference_loss = make_objective(recipe, counts), ReferenceLoss(recipe, counts)
    modes: dict[str, tuple[nn.Module, Callable[[RideBfOutput], Tensor]]] = {
        REFERENCE: (reference_network(recipe, config), lambda outputs: reference_loss(outputs, few["labels"])),
        OURS: (ours, lambda outputs: objective(outputs, few, reweight=True)),
    }
    objective.to(device), reference_loss.to(device)

    def take_step(model: nn.Module, loss_of: Callable[[RideBfOutput], Tensor], dtype: torch.dtype) -> tuple:
        model = copy.deepcopy(model).to(device, dtype)
        reference_loss.to(dtype)
        loss = loss_of(model(few["pixel_values"].to(dtype)))
        loss.backward()
        return loss.item(), torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        steps = {
            f"{name}, {str(dtype).removeprefix('torch.')}": take_step(*mode, dtype)
            for dtype in (torch.float64, torch.float32)
            for name, mode in modes.items()
        }
    exact_loss, exact = steps[f"{REFERENCE}, float64"]
    return {
        name: {
            "loss": loss,
            "loss_difference": abs(loss - exact_loss) / abs(exact_loss),
            "gradient_difference": ((gradient - exact).norm() / exact.norm()).item(),
        }
        for name, (loss, gradient) in steps.items()
    }


def train_report(results: dict[str, Any]) -> str:
    """Returns the measurements as a Markdown table, followed by the ratios."""
    seconds, cost = results["seconds_by_round"], results["multiply_adds"]
    contenders = [name for name in seconds if name != PRODUCT]
    rates = {name: [2 * cost[name] / value for value in values] for name, values in seconds.items()}  # FLOP/s
    size = results["image_size"]
    lines = [
        f"{results['recipe']}: {results['batch_size']} images of {size} x {size} pixels a step, "
        f"{results['precision']}; {results['machine']}; median of {len(seconds[OURS])} rounds",
        "",
        "| | images/s | peak memory, GB | TFLOP/s | of the matrix product's |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in contenders:
        images = results["batch_size"] / statistics.median(seconds[name])
        peak = results["peak_bytes"][name]
        shown = "–" if peak is None else f"{peak / 1e9:.2f}"
        share = _quotient(rates[name], rates[PRODUCT])[0]
        rate = statistics.median(rates[name]) / 1e12
        lines.append(f"| {name} | {images:.2f} | {shown} | {rate:.3f} | {100 * share:.0f} % |")
    lines.append("")
    for name in contenders:
        if name not in (REFERENCE, RESNET50):
            middle, least, most = _quotient(seconds[REFERENCE], seconds[name])
            lines.append(f"{name}: {middle:.2f} ({least:.2f} to {most:.2f}) x the images/s of {REFERENCE};")
            middle, least, most = (100 * value for value in _quotient(rates[name], rates[RESNET50]))
            lines.append(f"  {middle:.0f} ({least:.0f} to {most:.0f}) % of {RESNET50}'s speed per multiply-add")
    lines += ["", f"A step on {COMPARED_IMAGES} images, relative differences from {REFERENCE} in float64:"]
    for name, numbers in results["numbers"].items():
        differences = f"{numbers['loss_difference']:.1e}, gradient {numbers['gradient_difference']:.1e}"
        lines.append(f"  {name}: loss {numbers['loss']:.6f}, {differences}")
    return "\n".join(lines)


def _quotient(left: list[float], right: list[float]) -> tuple[float, float, float]:
    """Returns the median, the smallest and the largest of the ratios within a round."""
    quotients = [one / other for one, other in zip(left, right, strict=True)]
    return statistics.median(quotients), min(quotients), max(quotients)
