"""Test-time views: a prediction from the mean logits over several views of an image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import five_crop, horizontal_flip
from transformers import BaseImageProcessor

from modeling_ride_bf import RideBfOutput

CENTRE = "centre"
_LARGER = 24  # pixels by which images are resized larger for five crops; Shi et al., 2024 (LIFT)


@dataclass(frozen=True, kw_only=True)
class Views:
    """A way to see an image several times.

    Attributes:
        help: its description.
        larger: pixels by which the image is read larger, in each direction, than the network sees it.
        make: maps pixels (B, 3, H + larger, W + larger) and the size (H, W) to views (B, 3, H, W).
    """

    help: str
    make: Callable[[Tensor, list[int]], Sequence[Tensor]]
    larger: int = 0

    def processor(self, processor: BaseImageProcessor) -> BaseImageProcessor:
        """A processor that reads images as large as the views need them."""
        if not self.larger:
            return processor
        described = processor.to_dict()
        for name in ("size", "crop_size"):
            if size := described.get(name):
                described[name] = {key: value + self.larger for key, value in dict(size).items() if value}
        return type(processor).from_dict(described)


VIEWS = {
    CENTRE: Views(help="the image as training evaluates it", make=lambda pixels, size: [pixels]),
    "flip": Views(help="the image and its mirror image", make=lambda pixels, size: [pixels, horizontal_flip(pixels)]),
    "five_crop": Views(
        help=f"the centre and the corners of the image, resized {_LARGER} pixels larger",
        make=five_crop,
        larger=_LARGER,
    ),
}


class MeanOverViews(nn.Module):
    """A classifier whose logits are the mean over views of its images.

    Args:
        model: a `RideBfForImageClassification` without a router, or a wrapper of one.
        name: a key of `VIEWS`.

    Raises ValueError for an unknown name, and for a model with a router, which may use other experts for each view.
    """

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        if name not in VIEWS:
            raise ValueError(f"no views are called {name!r}; there are {', '.join(VIEWS)}")
        if any(getattr(module, "router", None) is not None for module in model.modules()):
            raise ValueError(
                f"views {name} cannot be averaged with a router, which may use other experts for each view"
            )
        self.model, self.views = model, VIEWS[name]

    def forward(self, pixel_values: Tensor) -> RideBfOutput:
        height, width = pixel_values.shape[2:]
        size = [height - self.views.larger, width - self.views.larger]
        outputs = [self.model(view.contiguous()) for view in self.views.make(pixel_values, size)]
        expert_logits = torch.stack([output.expert_logits for output in outputs]).mean(dim=0)
        return RideBfOutput(
            logits=torch.stack([output.logits for output in outputs]).mean(dim=0), expert_logits=expert_logits
        )
