"""Random crops of JPEG files that libjpeg scales down while it decodes them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop

from data.reading import decode_upright, is_plain_jpeg, orientation, read_image, turned_upright

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_FACTORS = (8, 4, 2)  # by which libjpeg decodes faster; others take longer than full decoding


@dataclass(frozen=True)
class ScaledCrop:
    """Reads a random crop of an image, resized to uint8 (3, size, size).

    It draws the crops of `v2.RandomResizedCrop(size)`, with the same random numbers. But libjpeg decodes a JPEG file at
    1/2, 1/4 or 1/8 of its width and height if the crop then still has `size` pixels in both directions. The crop keeps
    its exact place, also between pixels. At full scale the pixels are those of `read_image` and RandomResizedCrop.
    """

    size: int

    def __call__(self, image: dict, max_image_pixels: int) -> Tensor:
        drawn: list[tuple[int, int, int, int]] = []  # a file with damaged metadata is decoded twice

        def decode(opened: Image.Image, content: bytes, note: bytes) -> Tensor:
            if not drawn:
                drawn.append(self._draw(opened, note))
            return self._decode(opened, content, note, *drawn[0])

        return read_image(image, max_image_pixels, decode)

    def _draw(self, opened: Image.Image, note: bytes) -> tuple[int, int, int, int]:
        width, height = opened.size[::-1] if orientation(opened, note) in _SIDEWAYS else opened.size
        of_this_size = torch.empty(()).expand(3, height, width)
        drawn = v2.RandomResizedCrop(self.size).make_params([of_this_size])
        return drawn["top"], drawn["left"], drawn["height"], drawn["width"]

    def _decode(
        self, opened: Image.Image, content: bytes, note: bytes, top: int, left: int, height: int, width: int
    ) -> Tensor:
        factor = next((factor for factor in _FACTORS if min(height, width) >= factor * self.size), 1)
        if factor == 1 or not is_plain_jpeg(opened):
            pixels = decode_upright(opened, content, note)
            return resized_crop(pixels, top, left, height, width, [self.size, self.size])
        scaled = opened.draft(None, (opened.width // factor, opened.height // factor))
        opened.load()
        box = tuple(edge / (factor if scaled else 1) for edge in (left, top, left + width, top + height))
        upright = turned_upright(opened, note)
        cropped = upright.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        return pil_to_tensor(cropped).expand(3, -1, -1)


Reader = Callable[[dict, int], Tensor]
"""Reads an image, of at most so many pixels, as uint8 (3, height, width)."""
