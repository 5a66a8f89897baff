"""Reads image files into pixels.

`hub_cards/handler.py` reads images in the same way. It travels without this package, so it has its own copy of the
rules below. The tests compare the two.
"""

import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from data.formats import MAX_IMAGE_PIXELS, image_formats

try:
    import simplejpeg
except ImportError:  # it has no wheel for a rare platform
    simplejpeg = None
try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision plans to remove its decoders
    decode_jpeg = None


# What decoders raise for a damaged file
DECODER_ERRORS = (
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, SyntaxError, EOFError, AttributeError),
    *(ArithmeticError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
)

_ORIENTATION = 0x0112  # an EXIF tag
# Orientation -> how to turn the image upright. 1 is upright, and other values are damaged.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_METADATA = {0xE1, 0xE2, 0xED, 0xFE}  # markers of EXIF and XMP, colour profiles, Photoshop, and comments
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # the chunks that pixels depend on
# Tags of names, resolution, dates, XMP, IPTC, Photoshop, EXIF, colour profile and GPS
_TIFF_METADATA = {*range(269, 273), 282, 283, 296, 305, 306, 315, 316, 700, 33432, 33723, 34377, 34665, 34675, 34853}
_AVIF_EXIF = re.compile(rb"(infe.{8}(?:..)?)Exif", re.DOTALL)  # an entry that says that an item is EXIF data
_UNKNOWN_TAG = 65_000  # takes the place of a tag that is removed
_STRIP_PIXELS = 2**24  # converted at once, to limit memory

_pil_limit = threading.Lock()


class BrokenImageError(ValueError):
    """An image cannot be read or used. The message names the file and what is wrong with it, and then the remedy.

    `problem` is the message without the remedy, for commands that do not have the option which the remedy names.
    """

    def __init__(self, problem: str, remedy: str | None = None):
        super().__init__(problem if remedy is None else f"{problem}; {remedy}")
        self.problem = problem


def read_image(
    image: dict,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    decode: Callable[[Image.Image, bytes, bytes], Any] | None = None,
) -> Any:
    """Returns the pixels of an image, upright, as uint8 (3, height, width).

    `image` is a value of a `datasets.Image(decode=False)` column: its "bytes", or None there and the "path" of a file.
    The pixels are those of PIL's `ImageOps.exif_transpose` and `convert("RGB")`, with transparency on white and 16-bit
    grey scaled to 8 bits. An animation gives its first frame. Damaged metadata are ignored.

    Large JPEG files are decoded in full. libjpeg could scale them down while decoding, but resizing the result does not
    give the same pixels as resizing the full image, and a bare `pipeline` resizes the full image.

    `decode(image, content, note)` takes the place of `decode_upright`; what it returns is returned.

    Raises BrokenImageError if the file is missing, is not an image, is cut off, has more than `max_image_pixels`, or
    has pixels of 32 bits.
    """
    content = b""
    try:
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        with warnings.catch_warnings(action="ignore"):  # about large images and damaged metadata
            return _with_image(content, max_image_pixels, decode or decode_upright)
    except DECODER_ERRORS as error:
        name, remedy = image["path"] or "an image stored in the data set", None
        if isinstance(error, UnidentifiedImageError):  # its message has a memory address, which changes
            reason = "it is no image of a known format" if content else "it is empty"
        elif isinstance(error, FileNotFoundError):
            reason = "there is no such file"
        elif isinstance(error, IsADirectoryError):
            reason = f"it is a folder; name image files, such as {name}/*.png"
        elif isinstance(error, Image.DecompressionBombError):
            pixels = int(re.search(r"\d+", str(error)).group())  # PIL says nothing else about the size
            reason = f"it has {pixels:,} pixels, and at most {max_image_pixels:,} are read"
            remedy = f"if it is meant to be that large, set --max_image_pixels {pixels}"
        else:
            reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error))  # without the line of torchvision's source
        raise BrokenImageError(f"{name} cannot be read: {reason or type(error).__name__}", remedy) from error


def stored_format(content: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS) -> tuple[str, int]:
    """Returns PIL's name of the format of an image that `read_image` can read, and its EXIF orientation, 1 to 8."""

    def describe(image: Image.Image, content: bytes, note: bytes) -> tuple[str, int]:
        return "JPEG" if image.format == "MPO" else image.format, orientation(image, note)

    with warnings.catch_warnings(action="ignore"):
        return _with_image(content, max_image_pixels, describe)


def _with_image(content: bytes, max_image_pixels: int, use: Callable[[Image.Image, bytes, bytes], Any]) -> Any:
    """Returns `use(image, content, b"")` for the opened file `content`.

    If that fails, `content` is opened again without its metadata, and `use` gets the EXIF data as its last argument.
    """
    with _pil_refuses_more_than(max_image_pixels):
        try:
            with _open(content) as image:
                return use(image, content, b"")
        except Image.DecompressionBombError:
            raise
        except Exception:  # PIL raises many kinds of errors for damaged metadata
            bare, note = without_metadata(content)
            if bare == content:
                raise
        with _open(bare) as image:
            return use(image, bare, note)


@contextmanager
def _pil_refuses_more_than(pixels: int) -> Iterator[None]:
    """Changes PIL's limit, which holds for the whole program, if it is another one."""
    if Image.MAX_IMAGE_PIXELS is not None and pixels == 2 * Image.MAX_IMAGE_PIXELS:
        yield
        return
    with _pil_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels / 2
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _open(content: bytes) -> Image.Image:
    """Opens an image file without decoding it. Raises DecompressionBombError if its header claims too many pixels."""
    return Image.open(io.BytesIO(content), formats=image_formats())


def decode_upright(image: Image.Image, content: bytes, note: bytes = b"") -> Tensor:
    """Returns the pixels of an opened image and its file, upright, as uint8 (3, height, width).

    `note` are EXIF data of the image that PIL does not know.
    """
    # simplejpeg and torchvision are faster than PIL, with equal pixels, for a JPEG that need not be turned. PIL
    # converts CMYK.
    if is_plain_jpeg(image) and orientation(image, note) == 1:
        pixels = _decode_jpeg(content)
        if pixels is not None:
            return pixels
    image.load()
    return rgb_pixels(turned_upright(image, note))


def is_plain_jpeg(image: Image.Image) -> bool:
    """Whether an opened image is a grey or an RGB JPEG; an MPO is a JPEG file that contains more images."""
    return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")


def turned_upright(image: Image.Image, note: bytes = b"") -> Image.Image:
    """Turns a loaded image as its EXIF orientation says."""
    # PIL turns a TIFF image while it loads it, and then forgets the orientation
    turn = _TURNS.get(orientation(image, note))
    return image if turn is None else image.transpose(turn)


def _decode_jpeg(content: bytes) -> Tensor | None:
    """Decodes a JPEG file without PIL. Returns None if that fails: PIL reads more kinds, and names what is wrong."""
    if simplejpeg is not None:
        with suppress(ValueError, RuntimeError):  # it stops at damage that the others may decode
            return torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)
    if decode_jpeg is None:
        return None
    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.UNCHANGED)
    except RuntimeError:
        return None
    return pixels.expand(3, -1, -1) if len(pixels) in (1, 3) else None


def orientation(image: Image.Image, note: bytes = b"") -> int:
    """Returns the EXIF orientation of an opened image, 1 to 8; 1 if there is none, or if it cannot be read.

    `note` are EXIF data of the image that PIL does not know.
    """
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # PIL raises many kinds of errors for damaged metadata
        value = None
    if value is None:  # PIL gives up at the first damaged entry
        value = _orientation_in(note or image.info.get("exif") or b"")
    return value if value in _TURNS else 1


def _orientation_in(note: bytes) -> int | None:
    """Looks for the orientation in the first directory of EXIF data, whatever else is damaged in them."""
    note = note.removeprefix(b"Exif\x00\x00")
    order = {b"II": "little", b"MM": "big"}.get(note[:2])
    if order is None:
        return None
    start = int.from_bytes(note[4:8], order)
    for entry in _entries(note, start, order):
        tag, kind = (int.from_bytes(entry[place : place + 2], order) for place in (0, 2))
        if tag == _ORIENTATION:
            return int.from_bytes(entry[8 : 8 + {1: 1, 3: 2, 4: 4}.get(kind, 0)], order)
    return None


def _entries(content: bytes, start: int, order: Literal["little", "big"]) -> Iterator[bytes]:
    """Yields the entries of 12 bytes of a TIFF directory, as far as they are there."""
    count = int.from_bytes(content[start : start + 2], order)
    for place in range(start + 2, min(start + 2 + 12 * count, len(content) - 11), 12):
        yield content[place : place + 12]


def without_metadata(content: bytes) -> tuple[bytes, bytes]:
    """Returns a JPEG, PNG, TIFF or AVIF file without its metadata, and the EXIF data of a JPEG or PNG file.

    Other files are returned unchanged, with b"".
    """
    if content[:2] == b"\xff\xd8":
        return _jpeg_without_metadata(content)
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return _png_without_metadata(content)
    if content[:4] in (b"II*\x00", b"MM\x00*"):
        return _tiff_without_metadata(content), b""
    if content[4:8] == b"ftyp":  # AVIF turns images by another property, so its EXIF data are not needed
        return _AVIF_EXIF.sub(rb"\1free", content), b""
    return content, b""


def _jpeg_without_metadata(content: bytes) -> tuple[bytes, bytes]:
    kept, note, place = [content[:2]], b"", 2
    while content[place : place + 1] == b"\xff" and len(content) >= place + 4:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker in (0xD8, 0xD9, 0xDA):  # the pixels start
            break
        segment = content[place : place + 2 + length]
        if marker not in _JPEG_METADATA:
            kept.append(segment)
        elif not note and segment[4:10] == b"Exif\x00\x00":
            note = segment[10:]
        place += 2 + length
    return b"".join([*kept, content[place:]]), note


def _png_without_metadata(content: bytes) -> tuple[bytes, bytes]:
    kept, note, place = [content[:8]], b"", 8
    while place + 8 <= len(content):
        length, kind = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        if kind in _PNG_PIXELS:
            kept.append(content[place : place + 12 + length])
        elif not note and kind == b"eXIf":
            note = content[place + 8 : place + 8 + length]
        place += 12 + length
    return b"".join(kept), note


def _tiff_without_metadata(content: bytes) -> bytes:
    order = "little" if content[:1] == b"I" else "big"
    start = int.from_bytes(content[4:8], order)
    bare = bytearray(content)
    for number, entry in enumerate(_entries(content, start, order)):
        if int.from_bytes(entry[:2], order) in _TIFF_METADATA:
            place = start + 2 + 12 * number
            bare[place : place + 12] = _UNKNOWN_TAG.to_bytes(2, order) + (1).to_bytes(2, order) + bytes(8)
    return bytes(bare)


def rgb_pixels(image: Image.Image) -> Tensor:
    """Returns the pixels of a loaded image as uint8 (3, height, width), with transparency on white.

    A bare pipeline of transformers differs here: it ignores transparency and cuts 16-bit grey off at 255. Raises
    ValueError for 32-bit numbers that are no 16-bit grey.
    """
    _check_range(image)
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // max(1, width))
    if height <= rows:
        return pil_to_tensor(_strip_to_rgb(image))
    pixels = torch.empty(3, height, width, dtype=torch.uint8)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels[:, top : top + rows] = pil_to_tensor(_strip_to_rgb(strip))
    return pixels


def _check_range(image: Image.Image) -> None:
    """Raises ValueError for fractions, and for whole numbers beyond 16 bits: which is white is not known."""
    if image.mode == "F" or (image.mode == "I" and not 0 <= image.getextrema()[0] <= image.getextrema()[1] <= 65535):
        low, high = image.getextrema()
        raise ValueError(
            f"its pixels are 32-bit numbers whose range is not known ({low:g} to {high:g}); convert it to 8 or 16 bits"
        )


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey: PIL would clip it at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
