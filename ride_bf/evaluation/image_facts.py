"""Facts about images, from reading each of them once. A cache keeps them, so a second reading takes seconds."""

import multiprocessing
import os
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet
import torch
import torchvision
from datasets import Dataset
from tqdm import tqdm

from data import BrokenImageError, read_image
from data.columns import image_field, in_table
from data.formats import MAX_IMAGE_PIXELS
from data.groups import content_digest
from data.reading import stored_format
from data.writing import whole_file

_CHUNK = 64  # images that a process reads between two progress reports
_SAVE_EVERY = 5.0  # seconds of work that a killed process loses at most
_CACHE_VERSION = 1  # raise it if the meaning of a fact changes


class ImageFacts(NamedTuple):
    """The facts about an image.

    Attributes:
        digest: `data.groups.content_digest` of the bytes; 0 if the file cannot be opened.
        width, height: upright; 0 for a broken image.
        format: PIL's name of the format, such as JPEG; empty for a broken image.
        orientation: 2 to 8 if EXIF data rotate or mirror the image, otherwise 1.
        error: why the image cannot be read, or None.
    """

    digest: int
    width: int = 0
    height: int = 0
    format: str = ""
    orientation: int = 1
    error: str | None = None


@dataclass(frozen=True)
class FactTable:
    """The facts about N images.

    Attributes:
        digests (N,), sizes (N, 2), formats (N,), orientations (N,): as in `ImageFacts`.
        errors: index of a broken image -> why it cannot be read.
    """

    digests: np.ndarray
    sizes: np.ndarray
    formats: np.ndarray
    orientations: np.ndarray
    errors: dict[int, str]

    @classmethod
    def empty(cls, count: int) -> "FactTable":
        return cls(
            digests=np.zeros(count, dtype=np.int64),
            sizes=np.zeros((count, 2), dtype=np.int32),
            formats=np.full(count, "", dtype=object),
            orientations=np.ones(count, dtype=np.int8),
            errors={},
        )

    def put(self, index: int, facts: ImageFacts) -> None:
        self.digests[index] = facts.digest
        self.sizes[index] = facts.width, facts.height
        self.formats[index] = facts.format
        self.orientations[index] = facts.orientation
        if facts.error is not None:
            self.errors[index] = facts.error


def inspect_image(
    image: dict, known: Mapping[int, ImageFacts] | None = None, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> ImageFacts:
    """Reads an image, a value of a `datasets.Image(decode=False)` column, as training does.

    `known` has facts by digest. An image with a known digest is not decoded again. An image of more than
    `max_image_pixels` is broken.
    """
    path, digest = image["path"], 0
    try:
        content = image["bytes"] if image["bytes"] is not None else Path(path).read_bytes()
        digest = content_digest(content)
        if known and digest in known:
            return known[digest]
        _, height, width = read_image({"bytes": content, "path": path}, max_image_pixels).shape
    except (BrokenImageError, OSError) as error:
        return ImageFacts(digest, error=str(error).rpartition(" cannot be read: ")[2])
    return ImageFacts(digest, width, height, *stored_format(content, max_image_pixels))


def read_facts(images: Dataset, num_workers: int, data_set: str, max_image_pixels: int = MAX_IMAGE_PIXELS) -> FactTable:
    """Reads the facts about all images, an undecoded column `image`, with `num_workers` processes and a progress bar.

    The facts are kept in the cache of the `datasets` library, in a folder for `data_set`, any text that identifies
    the data. They are written while the images are read, so after an interruption the next call continues there.
    Broken images are not kept, because they may be mended or another version of a library may read them. Images of
    more than `max_image_pixels` are broken. Raises
    ChildProcessError if a process dies.
    """
    cache = FactCache(data_set, max_image_pixels)
    facts = FactTable.empty(len(images))
    paths, sizes, changed = _files(images)
    unread = []
    for index, key in enumerate(zip(paths, sizes.tolist(), changed.tolist(), strict=True)):
        kept = cache.of_files.get(key)
        if kept is None:
            unread.append(index)
        else:
            facts.put(index, kept)

    def keep(index: int, found: ImageFacts) -> None:
        facts.put(index, found)
        if found.error is None:
            cache.add((paths[index], int(sizes[index]), int(changed[index])), found)

    with tqdm(total=len(images), initial=len(images) - len(unread), desc="reading", unit="image") as bar, cache:
        for indices, chunk in _read_in_processes(images, unread, num_workers, cache.of_contents, max_image_pixels):
            for index, found in zip(indices, chunk, strict=True):
                keep(index, found)
            cache.save_now_and_then()
            bar.update(len(indices))
    return facts


def stored_paths(images: Dataset) -> tuple[list[str | None], list[bool]]:
    """Returns the stored path of each image (N,), and whether the table contains the image (N,).

    The path of an image that a table contains is a name only. No image is copied, however many were selected.
    """
    return image_field(images, "path").to_pylist(), in_table(images).tolist()


def _files(images: Dataset) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Returns path, size and time of change of each image's file (N,); "", -1, 0 for images that a table contains."""
    paths = ["" if inside or path is None else path for path, inside in zip(*stored_paths(images), strict=True)]
    sizes, changed = np.full(len(paths), -1, dtype=np.int64), np.zeros(len(paths), dtype=np.int64)
    for index, path in enumerate(paths):
        if path:
            try:
                found = os.stat(path)
            except OSError:
                continue
            sizes[index], changed[index] = found.st_size, found.st_mtime_ns
    return paths, sizes, changed


def _read_in_processes(
    images: Dataset,
    indices: Sequence[int],
    num_workers: int,
    known: Mapping[int, ImageFacts],
    max_image_pixels: int,
) -> Iterator[tuple[Sequence[int], list[ImageFacts]]]:
    """Yields indices and the facts about these images, in parts."""
    if not indices:
        return
    chunks = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]
    pool = ProcessPoolExecutor(
        min(num_workers, len(chunks)), initializer=_open_images, initargs=(images, known, max_image_pixels)
    )
    try:
        waiting = {pool.submit(_inspect_chunk, chunk): chunk for chunk in chunks}
        for done in as_completed(list(waiting)):  # in any order: a slow chunk does not hold up what can be saved
            yield waiting.pop(done), done.result()
    except BrokenProcessPool as error:
        less = f"with fewer --num_workers than {num_workers}" if num_workers > 1 else "with more free memory"
        raise ChildProcessError(
            "a process that reads images has died, most often for lack of memory; run the same command again, "
            f"{less}: it continues where this one stopped"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# Each worker process sets these once, so that a task is only a few numbers and no rows are sent.
_images: Dataset | None = None
_known: Mapping[int, ImageFacts] = {}
_max_image_pixels = MAX_IMAGE_PIXELS


def _open_images(images: Dataset, known: Mapping[int, ImageFacts], max_image_pixels: int) -> None:
    global _images, _known, _max_image_pixels
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops its workers
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()
    _images, _known, _max_image_pixels = images, known, max_image_pixels


def _end_with_the_main_process() -> None:
    """Ends a worker whose main process was killed. It would wait for work for ever."""
    main_process = multiprocessing.parent_process()
    if main_process is not None:
        wait([main_process.sentinel])
        os._exit(1)


def _inspect_chunk(indices: Sequence[int]) -> list[ImageFacts]:
    return [inspect_image(image, _known, _max_image_pixels) for image in _images[list(indices)]["image"]]


Key = tuple[str, int, int]  # path, size and time of change of a file; "", -1, 0 for an image that a table contains


class FactCache:
    """The facts about a data set's images on disk. As a context manager it saves what was added.

    Attributes:
        of_files: facts by file, see `Key`.
        of_contents: facts by digest.
    """

    def __init__(self, data_set: str, max_image_pixels: int = MAX_IMAGE_PIXELS):
        # What an image is depends on the libraries that read it, and whether it is too large, on a limit.
        readers = (PIL.__version__, torchvision.__version__, str(max_image_pixels), str(_CACHE_VERSION))
        name = blake2b("\0".join((data_set, *readers)).encode(errors="surrogateescape"), digest_size=16).hexdigest()
        self.folder = Path(datasets.config.HF_DATASETS_CACHE) / "image_facts" / name
        self.of_files: dict[Key, ImageFacts] = {}
        self.of_contents: dict[int, ImageFacts] = {}
        self._unsaved: list[tuple[Key, ImageFacts]] = []
        self._saved_at = time.monotonic()
        for part in sorted(self.folder.glob("*.parquet")):
            self._read(part)

    def _read(self, part: Path) -> None:
        try:
            columns = list(pa.parquet.read_table(part).to_pydict().values())
        except (OSError, pa.ArrowException):  # a damaged part only costs time
            return
        for path, size, changed, *facts in zip(*columns, strict=True):
            found = ImageFacts(*facts)
            self.of_contents[found.digest] = found
            if path:
                self.of_files[path, size, changed] = found

    def __enter__(self) -> "FactCache":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.save()

    def add(self, key: Key, facts: ImageFacts) -> None:
        if key[0] or facts.digest not in self.of_contents:
            self._unsaved.append((key, facts))

    def save_now_and_then(self) -> None:
        if time.monotonic() - self._saved_at >= _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Writes what was added to a new part. A cache that cannot be written is none, but no error."""
        if self._unsaved:
            rows = [(*key, *facts[:-1]) for key, facts in self._unsaved]
            names = ("path", "size", "changed", *ImageFacts._fields[:-1])
            table = pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
            part = self.folder / f"{uuid.uuid4().hex}.parquet"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with whole_file(part) as written:
                    pa.parquet.write_table(table, written)
            except OSError as error:
                warnings.warn(f"the facts about the images cannot be kept in {self.folder}: {error}", stacklevel=2)
        self._unsaved = []
        self._saved_at = time.monotonic()
