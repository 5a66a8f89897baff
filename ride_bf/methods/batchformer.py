"""The BatchFormer by itself, for any classifier and any training loop."""

from typing import Literal

import torch
from torch import Tensor

from modeling_ride_bf import RideBfBatchFormer
from ride_bf.methods.windows import BatchFormerWindows


class BatchFormer(RideBfBatchFormer):
    """A transformer layer across the images of a batch, for the features before a classifier.

    Call it on the features of a batch while training, and train the classifier on both streams, as in the README. In
    evaluation it gives the features back as they are, so a prediction never depends on the other images of its batch.
    Hou, Yu, Tao: BatchFormer: Learning to Explore Sample Relationships for Robust Representation Learning, CVPR 2022.

    Args:
        feature_size: D.
        num_heads: attention heads; None: the paper's, 4 if the features are wider than 128, else 1.
        num_layers: encoder layers; the paper has 1.
        dropout: of the encoder layers; the paper has 0.5.
        layer_scale_init_value: None: the paper's post-norm layers. A number: pre-norm layers whose branches are
            multiplied by learned gates of this initial value; with 0 the layer starts as the identity. Small batches
            need it.
        window: images that attend to each other: "local": the batch; "global": that of all processes of
            torch.distributed; N: windows of N images, gathered across processes or split.

    Raises ValueError for a window below 1, and AssertionError (PyTorch's) for heads that do not divide D.
    """

    def __init__(
        self,
        feature_size: int,
        num_heads: int | None = None,
        num_layers: int = 1,
        dropout: float = 0.5,
        layer_scale_init_value: float | None = None,
        window: Literal["local", "global"] | int = "local",
    ):
        heads = (4 if feature_size > 128 else 1) if num_heads is None else num_heads
        super().__init__(feature_size, heads, num_layers, dropout, layer_scale_init_value)
        if window != "local":
            self.windows = BatchFormerWindows(size=None if window == "global" else window)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D), or (B, E, D) of several experts, to the same shape. Raises ValueError for any other."""
        if features.ndim not in (2, 3):
            raise ValueError(f"features must be (B, D) or (B, E, D), got {tuple(features.shape)}")
        if not self.training:
            return features
        columns = features.unsqueeze(1) if features.ndim == 2 else features  # (B, D) -> (B, 1, D)
        return super().forward(columns).view_as(features)

    def both_streams(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Features of both streams, the plain ones first, and a label for each: (2 B, D) and (2 B,) while training.

        A classifier and a loss that are given them train as the paper's "shared classifier". In evaluation both are
        returned as they are.
        """
        if not self.training:
            return features, labels
        return torch.cat([features, self(features)]), torch.cat([labels, labels])
