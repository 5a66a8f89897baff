"""A digest by which the images of a split are known again, wherever they lie."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from data.reading import BrokenImageError, read_image
from data.splits import undecoded
from data.streams import ImageStream

DIGITS = 32  # of a digest; the digests of an earlier definition had 64
_ROWS_AT_ONCE = 256  # of images that are stored in the table, for memory


def images_digest(split: Dataset | ImageStream) -> str:
    """A digest of a split's images and labels, in order: `DIGITS` hexadecimal digits.

    An image is known by its file's path, counted from the deepest folder that has all images of the split: 437,513 take
    a third of a second. An image that is stored in the table is known by its content. That is the file's bytes if it is
    a JPEG or WebP, whose pixels depend on the decoder, and else the pixels, since each writer of PNG has bytes of its
    own. A stream is known by the number of its images in each class, which is all that is known before it is read.
    """
    digest = hashlib.blake2b(digest_size=DIGITS // 2)
    for lines in _lines(split):
        digest.update("\n".join([*lines, ""]).encode())
    return digest.hexdigest()


def _lines(split: Dataset | ImageStream) -> Iterator[Iterable[str]]:
    """For each image what it is known by and, after a tab, its label; in parts."""
    if isinstance(split, ImageStream):
        yield (f"{name}\t{count}" for name, count in zip(split.names, split.counts, strict=True))
        return
    paths = pc.struct_field(_column(undecoded(split), "image"), "path")
    labels = _column(split, "label").cast(pa.string())
    if paths.null_count or pc.count_distinct(paths).as_py() < len(paths):  # paths do not tell the images apart
        yield (f"{content}\t{label}" for content, label in zip(_contents(split), labels.to_pylist(), strict=True))
        return
    first_and_last = pc.min_max(paths).as_py().values()  # what these two have in common, all have
    folder = os.path.commonpath([os.path.dirname(path) for path in first_and_last])
    relative = pc.utf8_slice_codeunits(paths, len(folder.rstrip("/")) + 1 if folder else 0)
    for chunk in pc.binary_join_element_wise(relative, labels, "\t").chunks:
        yield chunk.to_pylist()


def _column(split: Dataset, name: str) -> pa.ChunkedArray:
    """A column of Arrow's, in the order of the rows. By `split[name]` selected rows take seconds."""
    values = split.data.column(name)
    return values if split._indices is None else values.take(split._indices.column(0))


def _contents(split: Dataset) -> Iterator[str]:
    for rows in undecoded(split).select_columns("image").iter(_ROWS_AT_ONCE):
        for image in rows["image"]:
            yield hashlib.blake2b(_content(image), digest_size=DIGITS // 2).hexdigest()


def _content(image: dict) -> bytes:
    content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    if content[:2] == b"\xff\xd8" or content[8:12] == b"WEBP":
        return content
    try:
        pixels = read_image({**image, "bytes": content})
    except BrokenImageError:
        return content
    return f"{tuple(pixels.shape)} ".encode() + pixels.numpy().tobytes()
