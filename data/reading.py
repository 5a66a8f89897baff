"""Image files to pixels."""

import io
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision means to give its decoders up
    decode_jpeg = None


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
        if decode_jpeg is not None and content[:2] == b"\xff\xd8":  # a JPEG: faster than by PIL, to the same pixels
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels = decode_jpeg(data, mode=ImageReadMode.UNCHANGED, apply_exif_orientation=True)
            if len(pixels) in (1, 3):  # four are CMYK, which PIL converts
                return pixels.expand(3, -1, -1)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as opened:
                return pil_to_tensor(convert_to_rgb(ImageOps.exif_transpose(opened)))
    except (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
        name = image["path"] or "an image stored in the data set"
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error))  # without the place in torchvision's source
        raise BrokenImageError(f"{name} cannot be read: {reason}") from error


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB; what is transparent in it lies on white.

    So have it the image processors of transformers 5.23 in a pipeline; those of 5.17 drop the transparency instead.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey, which PIL would cut off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
