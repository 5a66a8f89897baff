"""Estimates the cost of a run before it starts: arithmetic and memory."""

import math

import torch
from torch import nn

from modeling_ride_bf import RideBfForImageClassification
from ride_bf.evaluation.compute import network_parts, profile
from ride_bf.recipes import TrainingRecipe
from ride_bf.training.freezing import parameter_counts

_MEASURED = 4  # number of images whose activations are measured


def activation_bytes(model: RideBfForImageClassification, image_size: int) -> float:
    """Bytes that the forward pass keeps for the backward pass, per image, measured in float32."""
    images = torch.zeros(_MEASURED, 3, image_size, image_size)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        outputs = model.train()(images)  # keeps the tensors alive until all are counted
    del outputs
    model.train(training)
    for name, buffer in model.named_buffers():
        buffer.copy_(statistics[name])
    return sum(kept.values()) / _MEASURED


def number_of_steps(recipe: TrainingRecipe, batches_per_epoch: int, max_steps: int | None = None) -> int:
    """Number of steps in a whole run. An epoch always ends with a step."""
    steps = recipe.epochs * math.ceil(batches_per_epoch / recipe.gradient_accumulation_steps)
    return steps if max_steps is None else min(steps, max_steps)


def training_flop(
    model: RideBfForImageClassification, recipe: TrainingRecipe, images: int, seen_once: int = 0
) -> float:
    """Floating-point operations of training on `images` images.

    For each multiply-add, a part of the network costs 2 in the forward pass, 2 for the gradient of its inputs if
    anything up to it learns, and 2 for those of its own parameters, in proportion to those that learn. Classifiers that
    a second stream shares see every image twice.

    Args:
        seen_once: images that alone pass through the trunk, and once; 0: all do, each time.
    """
    parts, flop = profile(model.config, recipe.image_size, recipe.window_size), 0.0
    learns = {name: _share_that_learns(module) for name, module in network_parts(model).items()}
    for name, part in parts.items():
        before = ["trunk"] if name != "trunk" else []
        if name.startswith("classifier"):
            before.append(name.replace("classifier", "expert"))
        elif name in ("BatchFormer", "router"):
            before += [other for other in parts if other.startswith("expert")]
        gradients = any(learns[other] for other in (*before, name))
        passes = 2 + 2 * gradients + 2 * learns[name]
        if name.startswith("classifier") and model.config.batchformer == "shared_classifier":
            passes *= 2
        flop += passes * part["multiply_adds"] * (seen_once if name == "trunk" and seen_once else images)
    return flop


def _share_that_learns(module: nn.Module) -> float:
    counts = parameter_counts(module)
    return counts["trained"] / max(1, counts["all"])


def run_cost(
    model: RideBfForImageClassification,
    recipe: TrainingRecipe,
    *,
    batches_per_epoch: int,
    draws_per_epoch: int,
    images_seen_once: int = 0,
    num_processes: int = 1,
    sharded: bool = False,
    max_steps: int | None = None,
) -> str:
    """Describes the steps, the arithmetic, and the memory of each process.

    The memory is for float32, without what PyTorch itself needs.

    Args:
        model, recipe: the network and how it is trained.
        batches_per_epoch: batches that the loader of each process has in an epoch.
        draws_per_epoch: images that the sampler draws in an epoch, over all processes. A loader that ends earlier, as
            that of a stream may, shows only the images in its batches.
        images_seen_once: images whose features are computed before training; 0: each batch passes through the trunk.
        num_processes: number of processes that share a batch.
        sharded: whether they share the network too. The blocks that are gathered at the moment are not counted.
        max_steps: the run ends after this many steps.
    """
    held = recipe.batch_size // num_processes // recipe.gradient_accumulation_steps
    images_per_epoch = min(draws_per_epoch, batches_per_epoch * held * num_processes)
    steps = number_of_steps(recipe, batches_per_epoch, max_steps)
    images = min(steps * recipe.batch_size, recipe.epochs * images_per_epoch)
    counts = parameter_counts(model)
    total, states = counts["all"], 2 if recipe.optimizer == "adamw" else 1
    # weights, gradients, the optimizer's states, average
    copies = 4 * (total + (1 + states) * counts["trained"] + (total if recipe.ema_decay else 0))
    if sharded:
        copies /= num_processes
    activations = held * activation_bytes(model, recipe.image_size)
    epochs = f"{recipe.epochs} epochs of {images_per_epoch:,} images"
    if steps < number_of_steps(recipe, batches_per_epoch):
        epochs = f"part of {epochs}, ended by max_steps"
    parts = profile(model.config, recipe.image_size, recipe.window_size)
    multiply_adds = sum(part["multiply_adds"] for part in parts.values())
    once = f"The features of {images_seen_once:,} images are computed once. " if images_seen_once else ""
    return (
        f"{epochs}: {steps:,} steps of {recipe.batch_size}. {once}{multiply_adds / 1e9:.3g} G multiply-adds an image; "
        f"{training_flop(model, recipe, images, images_seen_once):.2g} FLOP in all, forward and backward.\n"
        f"Memory of each process: {copies / 2**30:.2f} GiB for weights, gradients and optimizer, "
        f"{activations / 2**30:.2f} GiB for what {held} images keep for the backward pass, in float32."
    )
