"""Looks in files for what tells on which machine they were made."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT
from PIL import Image


def traces(folder: Path, *places: Path) -> list[str]:
    """Names each file in `folder` with the path of this repository, of the user's home or of one of `places` in it."""
    told = [str(place).encode() for place in (ROOT, Path.home(), *places)]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert files
    return [
        f"{path.relative_to(folder)}: {place.decode()}"
        for path in files
        for place in told
        if any(place in content for content in _contents(path))
    ]


def _contents(path: Path) -> Iterator[bytes]:
    """The bytes of a file, and what it has in compressed form: members of an archive, texts of a picture."""
    yield path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())
    if path.suffix.lower() in (".png", ".jpg", ".webp"):
        with Image.open(path) as image:
            yield repr(image.info).encode()
