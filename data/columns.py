"""Columns of a split as Arrow tables have them, without decoding images."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image


def undecoded(split: Dataset) -> Dataset:
    """Returns the same images undecoded, so that `read_image` decodes them instead of the `datasets` library."""
    return split.cast_column("image", Image(decode=False))


def arrow_column(split: Dataset, name: str) -> pa.ChunkedArray:
    """Returns an Arrow column in the order of the rows. `split[name]` takes seconds if rows were selected."""
    return _selected(split, split.data.column(name))


def image_field(split: Dataset, name: str) -> pa.ChunkedArray:
    """Returns the "path" or the "bytes" of each image (N,). Of selected rows only this field is copied."""
    return _selected(split, pc.struct_field(undecoded(split).data.column("image"), name))


def in_table(split: Dataset) -> np.ndarray:
    """Returns whether the table contains the image itself (N,). No image is copied, however many were selected."""
    stored = pc.is_valid(pc.struct_field(undecoded(split).data.column("image"), "bytes"))
    return _selected(split, stored).to_numpy()


def _selected(split: Dataset, values: pa.ChunkedArray) -> pa.ChunkedArray:
    return values if split._indices is None else values.take(split._indices.column(0))
