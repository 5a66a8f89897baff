"""Groups of images that belong in the same split: equal images, images that look alike, and images of one subject."""

import hashlib
import importlib.metadata
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import combinations, pairwise
from pathlib import Path

import datasets
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torchvision
from datasets import Dataset
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from data.columns import arrow_column, image_field, in_table, undecoded
from data.notices import some
from data.reading import BrokenImageError, read_image
from data.rows import GROUP
from data.sets import PERCEPTUAL
from data.writing import whole_file

HASH_BITS = 64
NEAR = 4  # bits in which the hashes of images that look alike may differ
_TAIL = 4096  # bytes at the end of a file; of photographs they differ, though the sizes are equal
_THREADS = 8
_KEYS_AT_ONCE = 1024  # that a thread computes at once
_BROKEN = 2**64 - 1  # in place of the hash of an image that cannot be read
_CHUNK = 32  # images that a process gets at once
_PROGRESS_FROM = 20_000  # images; fewer take a few seconds


def group_images(splits: Sequence[Dataset], by: str | None = None) -> np.ndarray:
    """Returns the number of each image's group, for the images of all splits together, (N,) int64.

    Images with equal content are always in one group. `by` "perceptual" adds images that look alike; the name of a
    column, which the splits have as `data.rows.GROUP`, adds images with the same value in it. Raises
    ModuleNotFoundError if "perceptual" lacks a package.
    """
    groups = equal_images(splits)
    if by == PERCEPTUAL:
        hashes = np.concatenate([perceptual_hashes(split) for split in splits])
        groups = join_groups(groups, similar_images(hashes))
    elif by is not None:
        chunks = [chunk for split in splits for chunk in arrow_column(split, GROUP).chunks]
        groups = join_groups(groups, _encode(pa.chunked_array(chunks)))
    return groups


def shared_values(splits: Mapping[str, Dataset], by: str) -> list[str]:
    """Says for each two splits how many values of the column `by`, their `data.rows.GROUP`, both have, if any."""
    values = {split: set(pc.unique(arrow_column(rows, GROUP)).to_pylist()) - {None} for split, rows in splits.items()}
    said = []
    for one, other in combinations(values, 2):
        if both := sorted(map(str, values[one] & values[other])):
            said.append(f"{len(both):,} value(s) of {by!r} are in {one} and in {other}: {some(both)}")
    return said


def content_digest(content: bytes) -> int:
    """Returns a digest of an image's bytes, below 2 ** 63."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def join_groups(*groupings: np.ndarray) -> np.ndarray:
    """Joins groups (N,) that share an image. Returns the group of each image, (N,)."""
    count = len(groupings[0])
    _, together = connected_components(_edges(groupings, count), directed=False)
    return together[:count].astype(np.int64)


def _edges(groupings: Sequence[np.ndarray], count: int) -> coo_matrix:
    """A graph of images, the first `count` nodes, and groups: an image is connected to each of its groups."""
    images, nodes, size = [], [], count
    for groups in groupings:
        names, codes = np.unique(groups, return_inverse=True)
        images.append(np.arange(count))
        nodes.append(codes + size)
        size += len(names)
    rows, columns = np.concatenate(images), np.concatenate(nodes)
    return coo_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(size, size))


def equal_images(splits: Sequence[Dataset]) -> np.ndarray:
    """Returns the same number for images with the same bytes, for the images of all splits together, (N,) int64.

    Only files of equal length are read: first their ends, then, where these are equal too, the whole. The result is
    cached until a file changes. A file that cannot be read is equal to none.
    """
    count = sum(map(len, splits))
    if not count:
        return np.zeros(0, dtype=np.int64)
    paths = [path for split in splits for path in image_field(split, "path").to_pylist()]
    stored = _StoredBytes(splits)
    lengths = stored.lengths()  # -1: the image is in a file
    in_file = np.flatnonzero(lengths < 0)
    changed = np.zeros(count, dtype=np.int64)
    for index, facts in zip(in_file.tolist(), _in_threads(_size_and_time, [paths[i] for i in in_file]), strict=True):
        lengths[index], changed[index] = facts

    def compute() -> np.ndarray:
        def content(index: int) -> bytes:
            inside = stored.of(index)
            return Path(paths[index]).read_bytes() if inside is None else inside

        def end(index: int) -> bytes:
            inside = stored.of(index)
            if inside is not None:
                return inside[-_TAIL:]
            with open(paths[index], "rb") as file:
                file.seek(max(0, lengths[index] - _TAIL))
                return file.read()

        groups = lengths.copy()
        alone = -np.arange(1, count + 1)
        unread = np.flatnonzero(lengths < 0)
        groups[unread] = alone[unread]
        for what, read in (("ends", end), ("contents", content)):
            groups = _refine(groups, read, f"comparing the {what} of images of equal size")
        return np.unique(groups, return_inverse=True)[1].astype(np.int64)

    if len(in_file) < count:  # nothing but the content shows whether a stored image has changed
        return compute()
    return _cached("equal", [paths, lengths, changed], compute)


class _StoredBytes:
    """The images that tables contain, of several splits one after the other. Selected rows are not copied."""

    def __init__(self, splits: Sequence[Dataset]):
        self._columns = [pc.struct_field(undecoded(split).data.column("image"), "bytes") for split in splits]
        self._rows = [
            np.arange(len(split)) if split._indices is None else split._indices.column(0).to_numpy() for split in splits
        ]
        self._starts = np.cumsum([0, *map(len, splits)])

    def lengths(self) -> np.ndarray:
        """Bytes of each image (N,); -1 for an image in a file."""
        each = zip(self._columns, self._rows, strict=True)
        return np.concatenate([_signed(pc.binary_length(column))[rows] for column, rows in each])

    def of(self, index: int) -> bytes | None:
        split = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._columns[split][int(self._rows[split][index - self._starts[split]])].as_py()


def _refine(groups: np.ndarray, read: Callable[[int], bytes], doing: str) -> np.ndarray:
    """Splits the groups (N,) of several images by a digest of what `read` returns for an image."""
    _, codes, counts = np.unique(groups, return_inverse=True, return_counts=True)
    several = np.flatnonzero(counts[codes] > 1)

    def digest(index: int) -> int:
        try:
            content = read(index)
        except OSError:
            return -index - 1
        return content_digest(content)

    digests = np.zeros(len(groups), dtype=np.int64)
    digests[several] = _in_threads(digest, several.tolist(), doing)
    return np.unique(np.stack([codes, digests]), axis=1, return_inverse=True)[1].reshape(-1)


def perceptual_hashes(split: Dataset) -> np.ndarray:
    """Returns the perceptual hash of each image, (N,) uint64, by `imagehash.phash`; cached until a file changes.

    Raises ModuleNotFoundError, which says what to install, without the package ImageHash. An image that cannot be read
    has the hash 0.
    """
    try:
        import imagehash  # noqa: F401 (the processes use it)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--group_by perceptual needs the package ImageHash; install it: pip install imagehash"
        ) from error

    def compute() -> np.ndarray:
        # Processes, not threads: `read_image` silences warnings, and that is for the whole program.
        with ProcessPoolExecutor(mp_context=forking(), initializer=_hash_these, initargs=(undecoded(split),)) as pool:
            hashes = pool.map(_phash, range(len(split)), chunksize=_CHUNK)
            quiet = len(split) < _PROGRESS_FROM // 10
            bar = tqdm(hashes, "comparing images by their looks", total=len(split), unit="image", disable=quiet)
            return np.fromiter(bar, np.uint64, len(split))

    paths = image_field(split, "path").to_pylist()
    if in_table(split).any() or not all(paths):  # nothing but the content shows whether a stored image has changed
        hashes = compute()
    else:
        facts = np.array(_in_threads(_size_and_time, paths), dtype=np.int64).reshape(-1, 2)
        versions = [PIL.__version__, torchvision.__version__, importlib.metadata.version("imagehash")]
        # a file that cannot be read now may be read another time
        hashes = _cached("phash", [paths, facts, versions], compute, keep=lambda found: not (found == _BROKEN).any())
    return np.where(hashes == _BROKEN, np.uint64(0), hashes)


# Set in each process, which gets only numbers.
_hashed: Dataset | None = None


def _hash_these(images: Dataset) -> None:
    global _hashed
    torch.set_num_threads(1)
    _hashed = images


def _phash(index: int) -> int:
    import imagehash
    from PIL import Image

    try:
        pixels = read_image(_hashed[index]["image"])
    except BrokenImageError:
        return _BROKEN
    bits = imagehash.phash(Image.fromarray(pixels.permute(1, 2, 0).numpy())).hash
    return int(np.packbits(bits).view(">u8")[0])


def forking() -> multiprocessing.context.BaseContext | None:
    """Processes that share the memory of this one, where there are such."""
    return multiprocessing.get_context("fork") if sys.platform == "linux" else None


def similar_images(hashes: np.ndarray, near: int = NEAR) -> np.ndarray:
    """Returns the same number for images whose hashes (N,) uint64 differ in at most `near` bits, (N,) int64.

    So do images that are connected by a chain of such images. A hash of at most one bit belongs to no other image: it
    is that of a broken image, or of an image without any structure, such as a blank one.
    """
    values, codes = np.unique(hashes, return_inverse=True)
    pairs = [np.zeros((2, 0), dtype=np.int64)]
    # Two hashes that differ in at most `near` bits agree in one of `near` + 1 pieces.
    bounds = np.linspace(0, HASH_BITS, near + 2).astype(int)
    for start, stop in pairwise(bounds.tolist()):
        piece = (values >> np.uint64(start)) & np.uint64((1 << (stop - start)) - 1)
        order = np.argsort(piece, kind="stable")
        edges = np.flatnonzero(np.diff(piece[order])) + 1
        for members in np.split(order, edges):
            if len(members) > 1:
                pairs += _pairs_within(values, members, near)
    first, second = np.concatenate(pairs, axis=1)
    graph = coo_matrix((np.ones(len(first), dtype=bool), (first, second)), shape=(len(values), len(values)))
    _, together = connected_components(graph, directed=False)
    groups = together[codes].astype(np.int64)
    alone = np.flatnonzero(np.bitwise_count(hashes) <= 1)
    groups[alone] = len(values) + np.arange(len(alone))
    return groups


def _pairs_within(values: np.ndarray, members: np.ndarray, near: int) -> list[np.ndarray]:
    found = []
    for place, member in enumerate(members[:-1].tolist()):
        others = members[place + 1 :]
        close = others[np.bitwise_count(values[others] ^ values[member]) <= near]
        if close.size:
            found.append(np.stack([np.full(len(close), member), close]))
    return found


def describe_groups(groups: np.ndarray, by: str | None) -> str | None:
    """Says how many images are in groups of several, for the user; None if there are none."""
    counts = np.unique(groups, return_counts=True)[1]
    several = counts[counts > 1]
    if not several.size:
        return None
    kinds = {None: "equal images", PERCEPTUAL: "equal or similar images"}
    what = kinds.get(by, f"equal images, and images with the same {by!r},")
    return (
        f"{what} stay in one split: {several.sum():,} images in {len(several):,} groups, the largest of "
        f"{several.max():,}"
    )


def image_keys(split: Dataset) -> np.ndarray:
    """Returns a digest of each image as it is now, (N,) of 16 bytes: path, size and time of a file, or stored bytes."""
    contents, stored, paths = _StoredBytes([split]), in_table(split), image_field(split, "path")

    def key(index: int, path: str | None) -> bytes:
        fact = contents.of(index) if stored[index] else f"{path}\0{_size_and_time(path)}".encode()
        return hashlib.blake2b(fact, digest_size=16).digest()

    def keys_of(start: int) -> bytes:
        some = paths[start : start + _KEYS_AT_ONCE].to_pylist()
        return b"".join(map(key, range(start, start + len(some)), some))

    return np.frombuffer(b"".join(_in_threads(keys_of, range(0, len(split), _KEYS_AT_ONCE))), dtype="V16")


def _signed(lengths: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(lengths.cast(pa.int64()), -1).to_numpy().copy()


def _encode(values: pa.ChunkedArray) -> np.ndarray:
    """Numbers equal values (N,). A null is equal to none."""
    codes = pc.fill_null(pc.dictionary_encode(values.combine_chunks()).indices.cast(pa.int64()), -1).to_numpy().copy()
    missing = np.flatnonzero(codes < 0)
    codes[missing] = codes.max(initial=0) + 1 + np.arange(len(missing))
    return codes


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        facts = os.stat(path)
    except OSError:
        return -1, 0
    return facts.st_size, facts.st_mtime_ns


def _in_threads(function: Callable, items: Sequence, doing: str = "") -> list:
    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(function, items)
        quiet = not doing or len(items) < _PROGRESS_FROM
        return list(tqdm(results, doing, total=len(items), unit="image", disable=quiet))


def _cached(
    name: str,
    facts: Sequence,
    compute: Callable[[], np.ndarray],
    keep: Callable[[np.ndarray], bool] = lambda computed: True,
) -> np.ndarray:
    """Returns what was computed before for images with the same `facts`, or computes it and, if `keep`, stores it."""
    digest = hashlib.blake2b(digest_size=16)
    for fact in facts:
        digest.update(fact.tobytes() if isinstance(fact, np.ndarray) else "\0".join(fact).encode())
    path = Path(datasets.config.HF_DATASETS_CACHE) / "image_groups" / f"{name}-{digest.hexdigest()}.npy"
    if path.is_file():
        return np.load(path)
    computed = compute()
    if not keep(computed):
        return computed
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as written, written.open("wb") as file:  # np.save would add a suffix to a name
        np.save(file, computed)
    return computed
