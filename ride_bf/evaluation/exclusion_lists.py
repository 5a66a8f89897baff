"""Lists of images for `--exclude`, which people edit: images under two labels, and broken images."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from data.exclusion import below, content_line, folder_of

_DATA = "# Its images are those of "
_SEAL = "# digest of what follows, which shows whether a list was edited: "


@dataclass(frozen=True)
class ListedGroup:
    """Images to list together. A line is None for an image whose name a list cannot hold."""

    comment: str
    lines: Sequence[str | None]


def image_line(image: dict, folder: str, digest: int) -> str | None:
    """Returns the line for an image, a value of an undecoded column: its path, relative to `folder`, or its content.

    None if a list cannot hold the path.
    """
    if image["bytes"] is not None:
        return content_line(digest)
    relative = below(image["path"], folder)
    if relative.rstrip() != relative or relative.splitlines() != [relative]:
        return None
    # or it would be read as a comment or as a digest, or without the space
    start = "./" if relative.startswith(("# ", "content ")) or relative.lstrip() != relative else ""
    return start + relative


def write_list(
    path: Path,
    heading: str,
    groups: Iterable[ListedGroup],
    *,
    place: str | Path | None,
    in_use: str | Path | None = None,
) -> Path | None:
    """Writes a list of images of the data in `place`, a folder, table or Hub id; None: of data without files.

    It goes to `path`, or to a free name beside it if that file was edited, lists images of other data, or is `in_use`,
    the excluded file. Returns where it is. Without a line to list it writes no list, removes an unedited older one of
    the same data and returns None.
    """
    body, any_line = [], False
    for group in groups:
        any_line |= any(line is not None for line in group.lines)
        body.append(f"# {_one_line(group.comment)}")
        # one line stands for all equal images that a table contains
        body += dict.fromkeys(line for line in group.lines if line is not None)
        if unlisted := sum(line is None for line in group.lines):
            body.append(f"# {unlisted} more, whose names a list cannot hold; rename these files")
        body.append("")
    data = f"{_DATA}{_one_line(_name_of(place))}"
    path = next(name for name in _names(path) if _may_replace(name, data, in_use))
    if not any_line:  # the commands refuse a list without an image
        path.unlink(missing_ok=True)
        return None
    text = "\n".join(body)
    head = [
        f"# {heading}",
        data,
        "# Each line names an image to leave out. Delete the lines of the images to keep.",
        f"# Then give this file to the commands: --exclude {path.name}",
        f"{_SEAL}{_digest(text)}",
        "",
    ]
    path.write_text("\n".join([*head, text]), encoding="utf-8")
    return path


def _names(path: Path) -> Iterable[Path]:
    yield path
    for number in range(2, 1_000_000):
        yield path.with_name(f"{path.stem}_{number}{path.suffix}")


def _name_of(place: str | Path | None) -> str:
    """The real path of a folder or table, and other places as they are."""
    if place is None:
        return "a data set without files"
    return os.path.realpath(place) if folder_of(place) else str(place)


def _may_replace(path: Path, data: str, in_use: str | Path | None) -> bool:
    """Whether nobody needs the file: it does not exist, or is an unedited list of the same `data`, not `in_use`."""
    if not path.exists():
        return True
    if in_use is not None and Path(in_use).exists() and path.samefile(in_use):
        return False
    head, seal, rest = path.read_text(encoding="utf-8", errors="replace").partition(_SEAL)
    digest, _, text = rest.partition("\n\n")
    return bool(seal) and data in head.splitlines() and _digest(text) == digest


def _digest(text: str) -> str:
    return blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)
