"""Which files are images, and how many pixels an image may have."""

from functools import cache

from PIL import Image

# PIL refuses images of more pixels, unless a program changes its limit.
MAX_IMAGE_PIXELS = 178_956_970
MAX_IMAGE_PIXELS_HELP = (
    "largest number of pixels of an image that is read; an image of more pixels counts as broken, because a small file "
    "can claim to be huge"
)

# PIL recognises these formats, but needs another program or package to read them, or reads no pixels at all.
_UNREADABLE = {"BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "WMF"}


@cache
def image_formats() -> tuple[str, ...]:
    """Returns PIL's names of the formats that are read. The most frequent formats come first."""
    Image.init()
    usual = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
    return (*usual, *sorted(set(Image.OPEN) - _UNREADABLE - set(usual)))


@cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes of the files that are read as images, in lower case: ".jpg", ".png" and so on."""
    formats = image_formats()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats)
