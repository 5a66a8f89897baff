"""A digest that identifies the images of a split, wherever they are stored."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from data.columns import arrow_column, image_field, undecoded
from data.reading import BrokenImageError, read_image
from data.streams import ImageStream

DIGITS = 32  # of a digest; an earlier version had 64
_ROWS_AT_ONCE = 256  # of images that are stored in the table, to limit memory
_LINES_AT_ONCE = 65_536  # as Python's own strings


def images_digest(split: Dataset | ImageStream) -> str:
    """Returns a digest of a split's images and labels, in order, as `DIGITS` hexadecimal digits.

    An image in a file is identified by its path, relative to the deepest folder that contains all images of the split.
    This takes a third of a second for 437,513 images. An image stored in the table is
    identified by its path in the same way, if all images have different ones, and else by its content. For
    JPEG and WebP that is the bytes of the file, because the pixels depend on the decoder. For other formats it is the
    pixels, because each PNG encoder writes different bytes. A stream is identified by the number of its images in each
    class, because nothing else is known before it is read.
    """
    digest = hashlib.blake2b(digest_size=DIGITS // 2)
    for lines in _lines(split):
        digest.update("\n".join([*lines, ""]).encode())
    return digest.hexdigest()


def _lines(split: Dataset | ImageStream) -> Iterator[Iterable[str]]:
    """Yields, in parts, a line for each image: what identifies it, a tab, and its label."""
    if isinstance(split, ImageStream):
        yield (f"{name}\t{count}" for name, count in zip(split.names, split.counts, strict=True))
        return
    paths = image_field(split, "path")
    labels = arrow_column(split, "label").cast(pa.string())
    if paths.null_count or pc.count_distinct(paths).as_py() < len(paths):  # paths do not identify the images
        yield (f"{content}\t{label}" for content, label in zip(_contents(split), labels.to_pylist(), strict=True))
        return
    first_and_last = pc.min_max(paths).as_py().values()  # a start that these two share is shared by all
    folder = os.path.commonpath([os.path.dirname(path) for path in first_and_last])
    relative = pc.utf8_slice_codeunits(paths, len(folder.rstrip("/")) + 1 if folder else 0)
    lines = pc.binary_join_element_wise(relative, labels, "\t")
    for start in range(0, len(lines), _LINES_AT_ONCE):
        yield lines.slice(start, _LINES_AT_ONCE).to_pylist()


def _contents(split: Dataset) -> Iterator[str]:
    for rows in undecoded(split).select_columns("image").iter(_ROWS_AT_ONCE):
        for image in rows["image"]:
            yield hashlib.blake2b(_content(image), digest_size=DIGITS // 2).hexdigest()


def _content(image: dict) -> bytes:
    content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    if content[:2] == b"\xff\xd8" or content[8:12] == b"WEBP":
        return content
    try:
        # the usual limit on pixels, so that the digest does not depend on --max_image_pixels
        pixels = read_image({**image, "bytes": content})
    except BrokenImageError:
        return content
    return f"{tuple(pixels.shape)} ".encode() + pixels.numpy().tobytes()
