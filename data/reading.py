"""Reads image files into pixels."""

import io
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision plans to remove its decoders
    decode_jpeg = None


# what decoders raise for a damaged file, including PIL's decoder of EXIF
DECODER_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    SyntaxError,
    struct.error,
    Image.DecompressionBombError,
    Warning,
)


# Marks of the metadata that say how to rotate an image: EXIF, or Adobe's XMP. PIL reads both.
_NOTES = (b"Exif\x00\x00", b"tiff:Orientation")


class BrokenImageError(ValueError):
    """An image cannot be read. The message names the file and what is wrong with it."""


def read_image(image: dict) -> Tensor:
    """Returns the pixels of an image, upright, as uint8 (3, height, width).

    `image` is a value of a `datasets.Image(decode=False)` column: its "bytes", or None there and the "path" of a file.
    The pixels are those of PIL's `ImageOps.exif_transpose` and `convert("RGB")`, with transparency on white. Raises
    BrokenImageError if the file is missing, is not an image or is cut off.
    """
    try:
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        # torchvision is faster than PIL, with equal pixels, for a JPEG that need not be rotated
        if decode_jpeg is not None and content[:2] == b"\xff\xd8" and not any(note in content for note in _NOTES):
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels = decode_jpeg(data, mode=ImageReadMode.UNCHANGED)
            if len(pixels) in (1, 3):  # four channels are CMYK, which PIL converts
                return pixels.expand(3, -1, -1)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as opened:
                return pil_to_tensor(convert_to_rgb(upright(opened)))
    except DECODER_ERRORS as error:
        name = image["path"] or "an image stored in the data set"
        if isinstance(error, UnidentifiedImageError):  # its message has a memory address, which changes
            reason = "it is no image of a known format" if content else "it is empty"
        else:
            reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error))  # without the line of torchvision's source
        raise BrokenImageError(f"{name} cannot be read: {reason}") from error


def upright(image: Image.Image) -> Image.Image:
    """Rotates an image as its EXIF data say. Ignores damaged EXIF data; raises PIL's errors for damaged pixels."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except DECODER_ERRORS:
        return image


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB, with transparency on white.

    A bare pipeline of transformers differs here: it drops an alpha channel and cuts 16-bit grey off at 255.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey: PIL would clip it at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
