"""What a run will cost before it is begun: arithmetic and memory."""

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


def run_cost(model: RideBfForImageClassification, recipe: TrainingRecipe, num_images: int, num_processes: int) -> str:
    """Steps, arithmetic, and memory of each process, in words; in float32, without what PyTorch itself takes."""
    held = recipe.batch_size // num_processes // recipe.gradient_accumulation_steps
    images = num_images * recipe.passes_per_epoch
    steps = recipe.epochs * -(-images // recipe.batch_size)
    parts = profile(model.config, recipe.image_size, recipe.window_size)
    multiply_adds = sum(part["multiply_adds"] for part in parts.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    copies = 4 * (total + 2 * learning + (total if recipe.ema_decay else 0))  # weights, gradients, momentum, average
    activations = held * activation_bytes(model, recipe.image_size)
    return (
        f"{recipe.epochs} epochs of {images:,} images: {steps:,} steps of {recipe.batch_size}. "
        f"{multiply_adds / 1e9:.3g} G multiply-adds an image forward; forward and backward, in all "
        f"{6 * multiply_adds * images * recipe.epochs:.2g} FLOP.\n"
        f"Memory of each process: {copies / 2**30:.2f} GiB for weights, gradients and optimizer, "
        f"{activations / 2**30:.2f} GiB for what {held} images keep for the backward pass, in float32."
    )
