"""Image files to pixels."""

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
except ImportError:  # torchvision means to give its decoders up
    decode_jpeg = None


# what the decoders, PIL's for EXIF among them, raise on a damaged file
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


# Where a file says how it is to be turned: EXIF, or Adobe's XMP. PIL reads both.
_NOTES = (b"Exif\x00\x00", b"tiff:Orientation")


class BrokenImageError(ValueError):
    """An image that cannot be read; its message names the file and what is wrong with it."""


def read_image(image: dict) -> Tensor:
    """The pixels of an image, uint8 (3, height, width), upright.

    `image` is what a column of `datasets.Image(decode=False)` holds: "bytes", or None and the file's "path". Pixels
    are those of PIL's `convert("RGB")` after `ImageOps.exif_transpose`; what is transparent lies on white. Raises
    BrokenImageError for a file that is not there, is no image or is cut off.
    """
    try:
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        # a JPEG that need not be turned: faster than by PIL, to the same pixels
        if decode_jpeg is not None and content[:2] == b"\xff\xd8" and not any(note in content for note in _NOTES):
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels = decode_jpeg(data, mode=ImageReadMode.UNCHANGED)
            if len(pixels) in (1, 3):  # four are CMYK, which PIL converts
                return pixels.expand(3, -1, -1)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as opened:
                return pil_to_tensor(convert_to_rgb(upright(opened)))
    except DECODER_ERRORS as error:
        name = image["path"] or "an image stored in the data set"
        if isinstance(error, UnidentifiedImageError):  # whose message, an address in memory, is never the same
            reason = "it is no image of a known format" if content else "it is empty"
        else:
            reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error))  # without the place in torchvision's source
        raise BrokenImageError(f"{name} cannot be read: {reason}") from error


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF note says. A note that is damaged says nothing; damaged pixels raise PIL's errors."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except DECODER_ERRORS:
        return image


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB; what is transparent in it lies on white.

    A bare pipeline of transformers differs here: it drops an alpha channel and cuts 16-bit grey off at 255.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey, which PIL would cut off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
