"""What a run will cost before it is begun: arithmetic and memory."""

import math

import torch

from modeling_ride_bf import RideBfForImageClassification
from ride_bf.evaluation.compute import profile
from ride_bf.recipes import TrainingRecipe

_MEASURED = 4  # images whose activations are counted


def activation_bytes(model: RideBfForImageClassification, image_size: int) -> float:
    """What the forward pass keeps of each image for the backward pass, in bytes; counted, in float32."""
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
        outputs = model.train()(images)  # what is kept must live until all of it has been counted
    del outputs
    model.train(training)
    for name, buffer in model.named_buffers():
        buffer.copy_(statistics[name])
    return sum(kept.values()) / _MEASURED


def number_of_steps(recipe: TrainingRecipe, batches_per_epoch: int, max_steps: int | None = None) -> int:
    """Steps of a whole run whose loader has so many batches in an epoch. An epoch ends with a step."""
    steps = recipe.epochs * math.ceil(batches_per_epoch / recipe.gradient_accumulation_steps)
    return steps if max_steps is None else min(steps, max_steps)


def run_cost(
    model: RideBfForImageClassification,
    recipe: TrainingRecipe,
    *,
    batches_per_epoch: int,
    draws_per_epoch: int,
    num_processes: int = 1,
    max_steps: int | None = None,
) -> str:
    """Steps, arithmetic, and memory of each process, in words; in float32, without what PyTorch itself takes.

    Args:
        model, recipe: what is trained.
        batches_per_epoch: of each process, as the run's loader has them: the steps follow from it.
        draws_per_epoch: images that the run's sampler draws in an epoch, for all processes; a loader that ends before,
            as one of a stream does, shows as many as fill its batches.
        num_processes: which share a batch.
        max_steps: after which the run ends.
    """
    held = recipe.batch_size // num_processes // recipe.gradient_accumulation_steps
    images_per_epoch = min(draws_per_epoch, batches_per_epoch * held * num_processes)
    steps = number_of_steps(recipe, batches_per_epoch, max_steps)
    images = min(steps * recipe.batch_size, recipe.epochs * images_per_epoch)
    parts = profile(model.config, recipe.image_size, recipe.window_size)
    multiply_adds = sum(part["multiply_adds"] for part in parts.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    copies = 4 * (total + 2 * learning + (total if recipe.ema_decay else 0))  # weights, gradients, momentum, average
    activations = held * activation_bytes(model, recipe.image_size)
    epochs = f"{recipe.epochs} epochs of {images_per_epoch:,} images"
    if steps < number_of_steps(recipe, batches_per_epoch):
        epochs = f"part of {epochs}, ended by max_steps"
    return (
        f"{epochs}: {steps:,} steps of {recipe.batch_size}. {multiply_adds / 1e9:.3g} G multiply-adds an image; "
        f"{6 * multiply_adds * images:.2g} FLOP in all, forward and backward.\n"
        f"Memory of each process: {copies / 2**30:.2f} GiB for weights, gradients and optimizer, "
        f"{activations / 2**30:.2f} GiB for what {held} images keep for the backward pass, in float32."
    )
