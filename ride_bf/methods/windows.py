"""The BatchFormer's window: which images of a training step attend to each other.

In the authors' code a window holds the images of one GPU. Here its size is an option. Windows across processes cost
little communication: only pooled features, a few megabytes, are exchanged.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from ride_bf.recipes import TrainingRecipe


def set_window(model: nn.Module, window: Literal["local", "global"] | int) -> None:
    """Gives the batch-level module of `model`, if it has one, its window in training.

    "local": the batch that the process holds; "global": the images of all processes; N: windows of N images. Raises
    ValueError for another window, and TypeError for a module that has no windows.
    """
    if model.batch_module is not None and window != "local":
        _give(model.batch_module, windows_of(window), f"the window {window!r}", "the window 'local'")


def _give(module: nn.Module, windows: Callable[[Tensor, Callable], Tensor], wanted: str, remedy: str) -> None:
    """Gives a batch-level module its windows. Raises TypeError if it cannot have them, and so not what is `wanted`."""
    if not hasattr(module, "set_windows"):
        raise TypeError(
            f"{type(module).__name__} has no windows, so it cannot have {wanted}: give it a method "
            f"set_windows(windows), or set {remedy}"
        )
    module.set_windows(windows)


def set_windows(model: nn.Module, recipe: "TrainingRecipe", epoch: int) -> None:
    """Prepares the batch-level module of `model`, if it has one, for an epoch (from 0) of a recipe's training.

    Before `batchformer_start_epoch` the module passes the features on unchanged. With `batchformer_float32` it computes
    in float32 under mixed precision. Raises as `set_window` does.
    """
    set_window(model, recipe.batchformer_window)
    if recipe.batchformer_start_epoch == 0 and not recipe.batchformer_float32:
        return
    windows = None if recipe.batchformer_window == "local" else windows_of(recipe.batchformer_window)
    acts = epoch >= recipe.batchformer_start_epoch
    if model.batch_module is not None:
        careful = _CarefulWindows(windows, float32=recipe.batchformer_float32, acts=acts)
        wanted = f"batchformer_start_epoch {recipe.batchformer_start_epoch}"
        wanted += f" and batchformer_float32 {recipe.batchformer_float32}"
        _give(model.batch_module, careful, wanted, "them to 0 and False")


def windows_of(window: Literal["global"] | int) -> "BatchFormerWindows":
    """The windows that "global" or a number of images stands for. Raises ValueError for anything else."""
    if window != "global" and (not isinstance(window, int) or isinstance(window, bool)):
        raise ValueError(f"a window is 'local', 'global' or a number of images, not {window!r}")
    return BatchFormerWindows(size=None if window == "global" else window)


def check_windows(recipe: "TrainingRecipe", num_processes: int, skips_images: bool) -> None:
    """Raises ValueError if windows reach across processes that may not hold equally many images."""
    gathered = recipe.network_value("batchformer") != "none" and recipe.batchformer_window != "local"
    if skips_images and gathered and num_processes > 1:
        raise ValueError(
            "windows that reach across processes need the same number of images in each process, and --on_broken_image "
            "skip can change that number: remove the broken images (python -m ride_bf.check_data lists them) or set "
            "--batchformer_window local"
        )


def describe_windows(recipe: "TrainingRecipe", num_processes: int) -> str | None:
    """How many images the windows of a run hold, in words; None without a BatchFormer."""
    if recipe.network_value("batchformer") == "none":
        return None
    held = recipe.batch_size // num_processes // recipe.gradient_accumulation_steps
    gathered = held * num_processes
    window = {"local": held, "global": gathered}.get(recipe.batchformer_window, recipe.batchformer_window)
    words = f"The BatchFormer's windows hold {min(window, gathered)} images"
    if window > gathered:
        words += (
            f", not {window}: a step's {recipe.batch_size} are accumulated from {recipe.gradient_accumulation_steps} "
            "batches"
        )
    return words


@dataclass(frozen=True)
class BatchFormerWindows:
    """Windows of `size` images; None: one window with all images of the step.

    The images of the step are those of all processes, in the order of the processes. Every `size` consecutive images
    form a window; the images left at the end form a smaller one. So the windows do not depend on the number of
    processes: a larger batch is split, and a smaller one is completed with images of other processes. Gradients flow
    back to the process that holds the image. Each process encodes every window that holds one of its images, with its
    own dropout.

    All processes must hold the same number of images. Accelerate's loaders ensure that, at the end of an epoch too.
    Raises ValueError for a size below 1.
    """

    size: int | None

    def __post_init__(self):
        if self.size is not None and self.size < 1:
            raise ValueError(f"a BatchFormer's window must hold 1 image or more, not {self.size}")

    def __call__(self, expert_features: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Encodes the images of this process, (B, E, D) -> (B, E, D). `encode` maps sequences (length, number, D)."""
        own, first = expert_features.shape[0], 0
        if dist.is_available() and dist.is_initialized() and (self.size is None or own % self.size):
            expert_features, first = _GatheredRows.apply(expert_features), dist.get_rank() * own
        images = expert_features.shape[0]
        size = self.size or images
        start = first // size * size  # of the first window that holds an image of this process
        stop = min(-(-(first + own) // size) * size, images)  # of the last one
        encoded = _encode_windows(expert_features[start:stop], size, encode)
        return encoded[first - start : first - start + own]


@dataclass(frozen=True)
class _CarefulWindows:
    """Windows, in float32 if asked for. Unless it `acts`, the module's output has no effect and its gradients are 0."""

    windows: BatchFormerWindows | None  # None: the batch of the process
    float32: bool
    acts: bool

    def __call__(self, expert_features: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast(expert_features.device.type, enabled=False) if self.float32 else nullcontext():
            features = expert_features.float() if self.float32 else expert_features
            encoded = encode(features) if self.windows is None else self.windows(features, encode)
        # in a product with 0 the parameters still have gradients, which DistributedDataParallel waits for
        return encoded if self.acts else expert_features + 0 * encoded


def _encode_windows(expert_features: Tensor, size: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, E, D) -> (B, E, D). Encodes every `size` consecutive images on their own, and then the rest."""
    images, experts, _ = expert_features.shape
    encoded = []
    for part in expert_features.split([images // size * size, images % size]):
        if len(part):
            # (windows, length, E, D) -> (length, windows * E, D): the windows are side by side, as the experts are
            windows = part.unflatten(0, (-1, min(size, len(part)))).transpose(0, 1).flatten(1, 2)
            encoded.append(encode(windows).unflatten(1, (-1, experts)).transpose(0, 1).flatten(0, 1))
    return torch.cat(encoded)


class _GatheredRows(torch.autograd.Function):
    """Gathers the rows of all processes. The gradient of a row is summed over the processes and returned to its own."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
