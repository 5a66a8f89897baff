"""Watches whether the BatchFormer makes all images of a window alike."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ride_bf.training.printing import print_above_bar

ALIKE = 0.99  # mean cosine above which images are alike
BATCHES = 50  # in a row, before the warning
EVERY = 10  # batches: on a CPU, a measurement takes 0.1 % (ResNet-32) to 0.4 % (ResNet-50) of a step


def mean_pairwise_cosine(features: Tensor, size: int | None = None, first: int = 0) -> Tensor:
    """Mean cosine between two different images of a window, over all such pairs and all experts. A scalar.

    Args:
        features (B, E, D): a vector for each image and expert. A vector of zeros has cosine 0 to all others.
        size: images of a window; None: all B.
        first: place of the first image in its window, if these windows begin in another process.

    It costs one sum, not B^2 products: the cosines of all pairs of a window, in both orders, add up to the squared
    length of the sum of its unit vectors, less the squared length of each. NaN if no two images share a window.
    """
    images, experts, _ = features.shape
    if images < 2:
        return features.new_full((), math.nan)
    size = size or images
    before = first % size
    after = -(before + images) % size
    units = F.normalize(features.float(), dim=2)
    windows = F.pad(units, (0, 0, 0, 0, before, after)).unflatten(0, (-1, size))  # (windows, size, E, D)
    lengths = [size] * len(windows)
    lengths[0] -= before
    lengths[-1] -= after
    pairs = experts * sum(length * (length - 1) for length in lengths)
    total = windows.sum(dim=1).square().sum() - units.square().sum()
    return total / pairs if pairs else total * math.nan


class CollapseMonitor:
    """Measures how alike the BatchFormer makes the images of a window, in one batch of `EVERY`.

    A BatchFormer collapses if it gives every image of a window the same features: its stream then tells nothing about
    an image, and the classifiers learn from it only how frequent the classes are. If it makes images alike that were
    not so before, in `BATCHES` batches as far as they are measured, one warning is printed.

    The batch goes through the layers a second time, without dropout, which would hide a collapse: of two equal vectors
    it makes two that differ. Only `read` waits for the device.

    Args:
        accelerator: the accelerator of the run.
        batch_module: the network's `batch_module`; None without one.
        window: the recipe's `batchformer_window`. If windows reach across processes, each process measures the pairs
            of images that it holds.
        state: kept in the checkpoints: the `batches` so far, those that were `alike` in a row, and the `cosine` of the
            last one that was measured and read. An empty dict at first.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        batch_module: nn.Module | None,
        window: Literal["local", "global"] | int,
        state: dict[str, Any],
    ):
        self.accelerator, self.module, self.state = accelerator, batch_module, state
        self.size = window if isinstance(window, int) else None
        self.unread: list[Tensor] = []

    def add(self, expert_features: Tensor) -> None:
        """Takes the features (B, E, D) of one batch, before the BatchFormer. Does nothing unless one trains."""
        if self.module is None or not self.module.training:
            return
        batch = self.state["batches"] = self.state.get("batches", 0) + 1
        if batch % EVERY == 0:
            self.unread.append(self._measure(expert_features.detach()))

    @torch.no_grad()
    def _measure(self, expert_features: Tensor) -> Tensor:
        """The cosines (2,) of the features behind the BatchFormer, and before it."""
        for layers in self.module.children():  # the module itself may do nothing in evaluation
            layers.eval()
        with self.accelerator.autocast():
            encoded = self.module(expert_features)
        self.module.train()
        first = self.accelerator.process_index * len(encoded)
        return torch.stack([mean_pairwise_cosine(each, self.size, first) for each in (encoded, expert_features)])

    def read(self) -> dict[str, float]:
        """`batchformer_cosine` of the last batch that was measured, as the mean over the processes.

        Empty if none was. Every process must call it after the same batches.
        """
        if self.unread:
            for cosine, before in (cosines := torch.stack(self.unread)).tolist():
                # A layer that does not act yet, or whose gates are closed, passes on what the network made alike.
                self.state["alike"] = self.state.get("alike", 0) + EVERY if cosine > ALIKE >= before else 0
                if self.state["alike"] >= BATCHES and not self.state.get("warned", False):
                    self.state["warned"] = True
                    print_above_bar(self.accelerator, _WARNING.format(cosine))
            self.unread.clear()
            self.state["cosine"] = self.accelerator.reduce(cosines[-1, 0], "mean").item()
        return self.latest()

    def latest(self) -> dict[str, float]:
        """What the last `read` returned."""
        cosine = self.state.get("cosine", math.nan)
        return {} if math.isnan(cosine) else {"batchformer_cosine": cosine}


WARNING_START = f"warning: for {BATCHES} batches the BatchFormer has made the images of a window alike"
_WARNING = (
    f"{WARNING_START} (mean cosine {{:.4f}}): its stream cannot tell them apart. Start again with --batchformer "
    "shared_classifier and a smaller weight of its stream (--batchformer_loss_weight 0.1), or with a lower rate: "
    "--learning_rate, or --batchformer_learning_rate_factor 0.1 for the layer alone"
)
