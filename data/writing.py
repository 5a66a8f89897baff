"""Writes files that are whole if they exist."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to, in the same folder. The file gets its name at the end of the block.

    An error in the block leaves nothing. Several processes, on several machines too, may write the same file.
    """
    written = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield written
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)
