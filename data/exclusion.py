"""Leaves images out that a file lists.

The file has a line for each image: its path relative to the data set's folder, as in a list or in `check_data.json`; or
`content DIGEST`, for images that a table contains. Lines that start with "# " are comments. Empty lines are ignored.
"""

import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict

from data.columns import image_field
from data.groups import content_digest
from data.hub_ids import hub_id_of
from data.notices import notify, some
from data.rows import read_text, with_slashes
from data.splits import class_labels

_CONTENT = re.compile(r"content ([0-9a-f]{16})")


def content_line(digest: int) -> str:
    """The line for images with this content, of whose bytes `digest` is `data.groups.content_digest`."""
    return f"content {digest:016x}"


def folder_of(place: str | Path | None) -> str:
    """The folder to which paths are relative: the data set's, or that of its table.

    It is "" without a place, and for images on the Hub, whose paths are as the data set there has them.
    """
    nowhere = place is None or hub_id_of(place) is not None
    return "" if nowhere else os.path.realpath(Path(place).parent if Path(place).is_file() else place)


def leave_out(splits: DatasetDict, file: Path, place: str | Path | None) -> DatasetDict:
    """Returns the splits without the images that `file` lists, with a notice of their number.

    Paths are relative to the folder `place`, or to the folder of the table `place`; for "hf:USER/NAME" they are those
    of the images there. Raises ValueError for lines that name no image, and for a class that loses its last training
    image. Raises OSError if the file cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file; --exclude names a file with a line for each image to leave out")
    lines = dict.fromkeys(
        line for line in map(str.strip, read_text(file).splitlines()) if line not in ("", "#") and line[:2] != "# "
    )
    if not lines:
        raise ValueError(f"{file} lists no image, so --exclude would do nothing; leave it out")
    contents = {int(match.group(1), 16): line for line in lines if (match := _CONTENT.fullmatch(line))}
    folder = folder_of(place)
    named = [line for line in lines if not _CONTENT.fullmatch(line)]
    written = with_slashes(pa.array(named, pa.string()), Path(folder)).to_pylist()
    paths = {os.path.join(folder, path): line for path, line in zip(written, named, strict=True)}
    kept, used, removed = {}, set(), 0
    for split, rows in splits.items():
        listed = _lines_of(rows, paths, contents)  # (N,)
        out = np.array([line is not None for line in listed], dtype=bool)
        used.update(line for line in listed if line is not None)
        removed += int(out.sum())
        kept[split] = rows.select(np.flatnonzero(~out)) if out.any() else rows
        if not len(kept[split]):
            raise ValueError(f"{file} lists all images of the {split} split; leave some of them in")
    if unused := [line for line in lines if line not in used]:
        raise ValueError(
            f"{file} lists {len(unused):,} image(s) that are not in {place}: {some(unused)}. A line has a path "
            "relative to the data set's folder; a comment starts with '# '. Remove these lines, or write the file "
            "again with check_data"
        )
    feature = splits["train"].features["label"]
    lost = np.flatnonzero(np.bincount(class_labels(kept["train"]), minlength=feature.num_classes) == 0)
    if lost.size:
        names = [feature.names[label] for label in lost.tolist()]
        raise ValueError(f"{file} lists all training images of {some(names)}; leave some of them in")
    notify(f"{file}: {removed:,} image(s) left out")
    return DatasetDict(kept)


def _lines_of(rows: Dataset, paths: dict[str, str], contents: dict[int, str]) -> list[str | None]:
    """Returns the line that lists each image of a split, or None, (N,)."""
    found: list[str | None] = [paths.get(path) for path in image_field(rows, "path").to_pylist()]
    if contents:
        for index, content in enumerate(image_field(rows, "bytes")):
            if content.is_valid:
                found[index] = contents.get(content_digest(content.as_py())) or found[index]
    return found


def below(path: str, folder: str) -> str:
    """A path relative to `folder`, from `folder_of`. A path outside the folder stays as it is, and with "" all do."""
    return path.removeprefix(f"{folder.rstrip('/')}/") if folder else path
