"""The BatchFormer on its own, for any classifier and any training loop."""

from typing import Literal

import torch
from torch import Tensor

from modeling_ride_bf import RideBfBatchFormer
from ride_bf.methods.windows import windows_of


class BatchFormer(RideBfBatchFormer):
    """A transformer layer across the images of a batch. It goes between a backbone and its classifier.

    While training, call it on the features of a batch, and train the classifier on both streams, as in the README. In
    evaluation it returns the features unchanged, so a prediction never depends on the other images of its batch.
    Hou, Yu, Tao: BatchFormer: Learning to Explore Sample Relationships for Robust Representation Learning, CVPR 2022.

    Args:
        feature_size: D.
        num_heads: number of attention heads; None: as in the paper, 4 if the features are wider than 128, else 1.
        num_layers: number of encoder layers; 1 in the paper.
        dropout: dropout of the encoder layers; 0.5 in the paper.
        layer_scale_init_value: None: the paper's post-norm layers. A number: pre-norm layers whose branches are
            multiplied by learned gates. The gates start at this number; with 0 the layer starts as the identity.
        window: which images attend to each other. "local": the batch; "global": the batches of all processes of
            torch.distributed; N: windows of N images, gathered across processes or split.

    Raises ValueError, which names the value, for options that no layer can have.
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
        if feature_size < 1 or num_layers < 1:
            raise ValueError(f"feature_size ({feature_size}) and num_layers ({num_layers}) must both be 1 or more")
        heads = (4 if feature_size > 128 else 1) if num_heads is None else num_heads
        if heads < 1 or feature_size % heads:
            divisors = [number for number in range(1, min(feature_size, 16) + 1) if feature_size % number == 0]
            raise ValueError(
                f"the features have feature_size={feature_size} channels, which {heads} attention heads cannot share "
                f"equally; set num_heads to a divisor of {feature_size}, such as {divisors[-1]}"
            )
        super().__init__(feature_size, heads, num_layers, dropout, layer_scale_init_value)
        self.feature_size = feature_size
        if window != "local":
            self.set_windows(windows_of(window))

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D), or (B, E, D) for several experts, to the same shape. Raises ValueError for other shapes."""
        if features.ndim not in (2, 3) or features.shape[-1] != self.feature_size:
            size = self.feature_size
            raise ValueError(
                f"features must be (B, D) or (B, E, D) with D = feature_size = {size}, got {tuple(features.shape)}; "
                "pool feature maps first, as in maps.mean(dim=(2, 3)), and unsqueeze a single image's features"
            )
        if not self.training:
            return features
        columns = features.unsqueeze(1) if features.ndim == 2 else features  # (B, D) -> (B, 1, D)
        return super().forward(columns).view_as(features)

    def both_streams(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """While training, returns the features without and with the BatchFormer (2 B, D), and their labels (2 B,).

        A classifier trained on them is the paper's "shared classifier". In evaluation, features and labels are
        returned unchanged. Raises ValueError unless there is one label for each image.
        """
        if len(labels) != len(features):
            raise ValueError(
                f"features are of {len(features)} images and labels of {len(labels)}: pass the labels (B,) of the same "
                "batch, once"
            )
        if not self.training:
            return features, labels
        return torch.cat([features, self(features)]), torch.cat([labels, labels])
