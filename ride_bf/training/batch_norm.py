"""BatchNorm of several processes, and the check that the training batches are large enough for it."""

import torch
from accelerate import Accelerator
from torch import nn

from ride_bf.recipes import TrainingRecipe


def check_synchronised(recipe: TrainingRecipe, accelerator: Accelerator) -> None:
    """Raises ValueError if BatchNorm is to be synchronised on CPUs, which PyTorch cannot do."""
    if recipe.batchnorm == "synchronised" and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise ValueError(
            "--batchnorm synchronised needs GPUs, because PyTorch does not synchronise BatchNorm on CPUs; set "
            "--batchnorm local, or train in one process"
        )


def synchronise_batch_norm(model: nn.Module, recipe: TrainingRecipe, num_processes: int) -> None:
    """Makes BatchNorm normalise with the images of all processes, if the recipe asks for it. Changes `model`.

    A BatchNorm that is frozen stays as it is, and so does a pre-trained backbone. One process has all images already.
    Parameters, statistics and the names in a state dict stay the same, so the saved model has an ordinary BatchNorm.
    """
    if recipe.batchnorm == "local" or recipe.backbone is not None or num_processes == 1:
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d) and child.weight.requires_grad:
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


def check_batch_norm(model: nn.Module, recipe: TrainingRecipe, num_images: int, num_processes: int) -> None:
    """Raises ValueError if BatchNorm would get a single value for each channel, on which torch fails.

    That happens when the batch of a process is a single image and a feature map is one pixel.

    Args:
        model: the network; parts that do not train must be frozen already (see `train_only`).
        recipe: gives the batch size, accumulation and image size of the run.
        num_images: training images in an epoch; a single process may have fewer than a batch.
        num_processes: number of processes that share the images.
    """
    if recipe.batchnorm == "synchronised":
        num_processes = 1
    shares = num_processes * recipe.gradient_accumulation_steps
    held = recipe.batch_size // shares
    if num_processes == 1:
        held = min(held, num_images)
    if held > 1 or not has_single_pixels(model, recipe.image_size):
        return
    remedy = f"--batch_size {2 * shares} or more" if recipe.batch_size == shares else "--passes_per_epoch 2 or more"
    raise ValueError(
        f"each batch of a process holds 1 image (batch_size {recipe.batch_size}, {num_processes} process(es), "
        f"gradient_accumulation_steps {recipe.gradient_accumulation_steps}, {num_images:,} images), and at image_size "
        f"{recipe.image_size} the network has feature maps of one pixel, where BatchNorm needs two images or more; "
        f"set {remedy}, or a larger --image_size"
    )


@torch.no_grad()
def has_single_pixels(model: nn.Module, image_size: int) -> bool:
    """Whether a trained BatchNorm gets feature maps (B, C, 1, 1) for images (B, 3, image_size, image_size)."""
    sizes: list[int] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[2:].numel()))
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d) and module.weight.requires_grad
    ]
    training = model.training
    parameter = next(model.parameters())
    try:
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return 1 in sizes
