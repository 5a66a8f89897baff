"""Write a copy to train on: `python -m data.prepare --data_dir DIR --output_dir OUT [--shorter_side 320]`.

Large photos cost more to decode than to train on. The copy has JPEG files whose shorter side is at most --shorter_side,
upright, with the same splits, labels and order of classes. A smaller upright image is copied byte by byte.

    python -m data.prepare --data_dir DIR --output_dir OUT                      # files and lists
    python -m data.prepare --data_dir DIR --output_dir OUT --format webdataset  # tar archives, for --streaming

The lists are written last. After an interruption the same command continues where it stopped. Images that cannot be
read are named, and end the command unless --on_broken_image skip.
"""

import argparse
import hashlib
import io
import json
import os
import shlex
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from data.command_line import add_broken_image_option, add_data_options, command_parser, of_broken_images
from data.formats import MAX_IMAGE_PIXELS, MAX_IMAGE_PIXELS_HELP
from data.sets import SPLIT_OPTIONS

MARKER = "prepare.json"  # written last
FORMATS = ("folder", "webdataset")
_OPTIONS = ("image_column", "label_column", "allow_empty_classes", "lists")  # those of `data.custom.load_custom`
_BROKEN_IMAGES = "broken_images.txt"
_PREFIXES = {"train": "train", "validation": "val", "test": "test"}
_SHARD_IMAGES, _FEWEST_SHARDS = 1000, 8  # images of an archive; a worker needs an archive of its own
_CHUNK = 32  # images that a process copies between two progress reports


@dataclass(frozen=True)
class CopyOptions:
    """How images are copied: the longest shorter side and JPEG quality of those that are encoded anew."""

    shorter_side: int = 320
    quality: int = 90
    max_image_pixels: int = MAX_IMAGE_PIXELS

    def copy(self, image: dict) -> tuple[bytes, bool]:
        """Returns the file of the copy of an undecoded image, and whether it was encoded anew, as JPEG.

        Raises BrokenImageError if the image cannot be read.
        """
        from PIL import Image

        from data.reading import read_image, stored_format

        pixels = read_image(image, self.max_image_pixels)
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        _, height, width = pixels.shape
        factor = min(1.0, self.shorter_side / min(height, width))
        if factor == 1 and stored_format(content, self.max_image_pixels)[1] == 1:
            return content, False
        size = tuple(max(1, round(factor * side)) for side in (width, height))
        copied = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        copied.save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue(), True


@dataclass(frozen=True)
class _Copied:
    """An image of the copy: its index in the split and its path below the output folder, or why it cannot be read."""

    index: int
    path: str = ""
    error: str = ""


def prepare(
    splits,
    name: str,
    place: str | Path | None,
    output_dir: Path,
    options: CopyOptions | None = None,
    *,
    file_format: str = "folder",
    skip_broken: bool = False,
    num_workers: int = 1,
    command: str = "python -m data.prepare",
) -> dict[str, list[str]]:
    """Writes a copy of the images in `splits`, from `load_long_tailed(name, place, ...)`.

    Args:
        output_dir: if it holds the same copy already, nothing is done; a part of it is completed.
        file_format: "folder", with lists, or "webdataset".
        skip_broken: leave images out that cannot be read.
        num_workers: processes.
        command: for the first line of the lists.

    Returns split -> a line for each image that cannot be read. Raises ValueError if there are some, unless
    `skip_broken`; for a benchmark in any case, because its lists name all its images. Raises FileExistsError if
    `output_dir` contains anything else.
    """
    from data.sets import get_data_set
    from data.sets._benchmark import Benchmark
    from data.splits import class_labels

    options = options or CopyOptions()
    is_benchmark = isinstance(get_data_set(name), Benchmark)
    if is_benchmark and file_format != "folder":
        raise ValueError(f"{name} is read by its lists, and tar archives have none: set --format folder")
    description = {
        "format": file_format,
        **asdict(options),
        "images": {split: len(rows) for split, rows in splits.items()},
        "source": _source_digest(splits),
    }
    if not _begin(output_dir, description):
        return {}
    broken: dict[str, list[str]] = {}
    kept: dict[str, list[_Copied]] = {}
    for split, rows in splits.items():
        if file_format == "folder":
            copied = _copy_files(rows, split, place, output_dir, options, is_benchmark, num_workers)
        else:
            copied = _copy_shards(rows, split, output_dir, options, skip_broken, num_workers)
        kept[split] = [image for image in copied if not image.error]
        if errors := sorted(image.error for image in copied if image.error):
            broken[split] = errors
    lines = [line for of_split in broken.values() for line in of_split]
    if lines and (is_benchmark or not skip_broken):
        shown = "\n".join(lines[:20])
        remedy = "repair them" if is_benchmark else "repair them, or leave them out with --on_broken_image skip"
        raise ValueError(f"{len(lines):,} image(s) cannot be read; {remedy}, and give the same command again:\n{shown}")
    labels = {split: class_labels(rows)[[image.index for image in kept[split]]] for split, rows in splits.items()}
    if lines:
        (output_dir / _BROKEN_IMAGES).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    names = splits["train"].features["label"].names
    _check_classes(labels["train"], names)
    if is_benchmark:
        _copy_lists(get_data_set(name), Path(place), output_dir)
    elif file_format == "folder":
        _write_lists(kept, labels, names, output_dir, command)
    else:
        _describe_archives(labels, names, output_dir)
    (output_dir / MARKER).write_text(json.dumps(description, indent=1) + "\n")
    (output_dir / f"{MARKER}.unfinished").unlink(missing_ok=True)
    return broken


def _source_digest(splits) -> str:
    from data.columns import image_field
    from data.splits import class_labels

    digest = hashlib.blake2b(digest_size=16)
    for split, rows in splits.items():
        names = [path or "" for path in image_field(rows, "path").to_pylist()]
        digest.update("\0".join([split, *rows.features["label"].names, *names]).encode())
        digest.update(class_labels(rows).tobytes())
    return digest.hexdigest()


def _begin(output_dir: Path, description: dict) -> bool:
    """Returns whether there is something to do. Raises FileExistsError if the folder contains anything else."""
    marker, unfinished = output_dir / MARKER, output_dir / f"{MARKER}.unfinished"
    for path in (marker, unfinished):
        if path.is_file() and json.loads(path.read_text()) == description:
            return path == unfinished
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise FileExistsError(
            f"{output_dir} is not empty and does not hold this copy; name another --output_dir or empty this one"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(json.dumps(description, indent=1) + "\n")
    return True


def _copy_files(
    rows, split: str, place, output_dir: Path, options: CopyOptions, same_names: bool, num_workers: int
) -> list[_Copied]:
    from data.columns import image_field
    from data.exclusion import below, folder_of

    folder = folder_of(place)
    names = [
        below(path, folder) if path and folder and path.startswith(f"{folder}/") else f"{split}/{index:08d}.jpg"
        for index, path in enumerate(image_field(rows, "path").to_pylist())
    ]
    named = list(enumerate(names))
    for parent in {os.path.dirname(name) for name in names}:
        (output_dir / parent).mkdir(parents=True, exist_ok=True)
    work = partial(_write_files, output_dir=output_dir, options=options, same_names=same_names)
    chunks = [named[start : start + _CHUNK] for start in range(0, len(named), _CHUNK)]
    return _in_processes(work, chunks, rows, f"copying {split}", num_workers)


def _write_files(
    chunk: Sequence[tuple[int, str]], output_dir: Path, options: CopyOptions, same_names: bool
) -> list[_Copied]:
    """Copies images to files that do not exist yet. A file that becomes JPEG gets another suffix: a.png.jpg."""
    from data.reading import BrokenImageError
    from data.writing import whole_file

    copied = []
    for index, name in chunk:
        as_jpeg = name if same_names or name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg"
        there = next((other for other in (name, as_jpeg) if (output_dir / other).is_file()), None)
        if there is None:
            try:
                content, is_new = options.copy(_rows[index]["image"])
            except BrokenImageError as error:
                copied.append(_Copied(index, error=str(error)))
                continue
            there = as_jpeg if is_new else name
            with whole_file(output_dir / there) as written:
                written.write_bytes(content)
        copied.append(_Copied(index, there))
    return copied


def _copy_shards(
    rows, split: str, output_dir: Path, options: CopyOptions, skip_broken: bool, num_workers: int
) -> list[_Copied]:
    import numpy as np

    count = min(len(rows), max(_FEWEST_SHARDS, -(-len(rows) // _SHARD_IMAGES)))
    order = np.random.default_rng(0).permutation(len(rows))  # the classes of an archive are mixed
    shards = [
        (f"{_PREFIXES[split]}-{number:05d}-of-{count:05d}.tar", part.tolist())
        for number, part in enumerate(np.array_split(order, count))
    ]
    work = partial(_write_shard, output_dir=output_dir, options=options, skip_broken=skip_broken)
    return _in_processes(work, shards, rows, f"copying {split}", num_workers)


def _write_shard(
    shard: tuple[str, list[int]], output_dir: Path, options: CopyOptions, skip_broken: bool
) -> list[_Copied]:
    """Writes an archive that does not exist yet. With broken images it is written only if they are skipped."""
    from data.reading import BrokenImageError
    from data.writing import whole_file

    name, indices = shard
    errors = output_dir / f".{name}.broken.json"  # of an archive that is written
    if (output_dir / name).is_file():
        known = {int(index): error for index, error in _read_json(errors).items()}
        return [_Copied(index, name, known.get(index, "")) for index in indices]
    copied, files = [], []
    for index in indices:
        row = _rows[index]
        try:
            content, _ = options.copy(row["image"])
        except BrokenImageError as error:
            copied.append(_Copied(index, error=str(error)))
            continue
        copied.append(_Copied(index, name))
        files += [(f"{index:08d}.jpg", content), (f"{index:08d}.cls", str(row["label"]).encode())]
    broken = {image.index: image.error for image in copied if image.error}
    if broken and not skip_broken:
        return copied
    if broken:
        errors.write_text(json.dumps(broken))
    with whole_file(output_dir / name) as written, tarfile.open(written, "w") as archive:
        for file, content in files:
            member = tarfile.TarInfo(file)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return copied


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


# Set in each process, which gets only numbers.
_rows = None


def _use_rows(rows) -> None:
    import torch

    global _rows
    torch.set_num_threads(1)
    _rows = rows


def _in_processes(work, parts: list, rows, description: str, num_workers: int) -> list[_Copied]:
    """Calls `work` on each part in processes that have the rows, with a progress bar of images."""
    from tqdm import tqdm

    from data.columns import undecoded
    from data.groups import forking

    def results() -> Iterator[list[_Copied]]:
        if num_workers == 1:
            global _rows
            _rows = undecoded(rows)
            yield from map(work, parts)
            return
        with ProcessPoolExecutor(num_workers, forking(), _use_rows, (undecoded(rows),)) as pool:
            yield from pool.map(work, parts)

    copied: list[_Copied] = []
    with tqdm(total=len(rows), desc=description, unit="image") as bar:
        for some in results():
            copied += some
            bar.update(len(some))
    return copied


def _check_classes(labels, names: Sequence[str]) -> None:
    """Raises ValueError if a class has lost all its training images."""
    import numpy as np

    from data.notices import some

    lost = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0).tolist()
    if lost:
        raise ValueError(f"no training image of {some([names[label] for label in lost])} can be read; repair some")


def _copy_lists(benchmark, place: Path, output_dir: Path) -> None:
    """Copies the lists of a benchmark, whose images keep their names."""
    from data.sets._benchmark import MARKER as SYNTHETIC

    drawn = place / SYNTHETIC  # without it the counts would have to be the published ones
    for path in (*benchmark.list_files(place).values(), *([drawn] if drawn.is_file() else [])):
        (output_dir / path.name).write_bytes(path.read_bytes())


def _write_lists(
    kept: dict[str, list[_Copied]], labels: dict, names: Sequence[str], output_dir: Path, command: str
) -> None:
    """Writes lists of the copied files."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

    from data.exclusion import folder_of
    from data.make_splits import write_lists

    features = Features({"image": Image(decode=False), "label": ClassLabel(names=names)})
    folder = folder_of(output_dir)
    written = {
        split: Dataset.from_dict(
            {
                "image": [{"bytes": None, "path": f"{folder}/{image.path}"} for image in images],
                "label": labels[split].tolist(),
            },
            features,
        )
        for split, images in kept.items()
    }
    write_lists(DatasetDict(written), output_dir, output_dir, command, overwrite=True)


def _describe_archives(labels: dict, names: Sequence[str], output_dir: Path) -> None:
    """Writes the names of the classes, and how many images of each the archives have."""
    import numpy as np

    from data.annotation_lists import CLASS_NAMES
    from data.tar_archives import LABEL_COUNTS

    for path in output_dir.glob(".*.broken.json"):
        path.unlink()
    (output_dir / CLASS_NAMES).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(output_dir.glob("*.tar"))}
    counts = {
        split: [[str(label), count] for label, count in enumerate(np.bincount(of_split).tolist()) if count]
        for split, of_split in labels.items()
    }
    (output_dir / LABEL_COUNTS).write_text(json.dumps({"bytes": sizes, "counts": counts}, indent=1) + "\n")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("prepare", __doc__)
    parser.add_argument("--data_dir", required=True, help="the images: class folders, lists or a table")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for the copy, outside --data_dir")
    parser.add_argument("--dataset", metavar="NAME", help="name of the data set; by default the one that is there")
    parser.add_argument(
        "--shorter_side", type=int, default=320, metavar="N", help="of larger images, in pixels (default 320)"
    )
    parser.add_argument(
        "--quality", type=int, default=90, metavar="N", help="of the JPEG files that it writes, 1 to 95 (default 90)"
    )
    parser.add_argument("--format", choices=FORMATS, default="folder", help="files and lists, or tar archives")
    add_broken_image_option(parser, "stop", "a benchmark needs all of its images (default: stop)")
    help = f"{MAX_IMAGE_PIXELS_HELP} (default {MAX_IMAGE_PIXELS:,})"
    parser.add_argument("--max_image_pixels", type=int, default=MAX_IMAGE_PIXELS, metavar="N", help=help)
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes; by default all cores")
    for option in SPLIT_OPTIONS:
        parser.add_argument(f"--{option.name}", metavar=option.metavar, type=option.kind, help=option.help)
    add_data_options(parser, _OPTIONS)
    options = parser.parse_args(arguments)
    for name, most in (("shorter_side", None), ("quality", 95), ("max_image_pixels", None), ("num_workers", None)):
        value = getattr(options, name)
        if value < 1 or (most is not None and value > most):
            parser.error(f"--{name} must be {'1 or more' if most is None else f'1 to {most}'}, not {value}")
    if options.output_dir.exists() and not options.output_dir.is_dir():
        parser.error(f"--output_dir {options.output_dir} is a file; name a folder")
    source, output = os.path.realpath(options.data_dir), os.path.realpath(options.output_dir)
    if os.path.commonpath([source, output]) == source:
        parser.error(f"--output_dir {options.output_dir} is in --data_dir, where it would be read as images; move it")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from data import load_long_tailed, recognise
    from data.notices import printed_notices
    from data.sets import get_data_set
    from data.sets._benchmark import Benchmark

    names = (*(option.name for option in SPLIT_OPTIONS), *_OPTIONS)
    given = {name: getattr(options, name) for name in names if getattr(options, name)}
    given |= of_broken_images(options.on_broken_image)
    command = shlex.join(["python", "-m", "data.prepare", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        name = options.dataset or recognise(options.data_dir)
        with printed_notices():
            splits = load_long_tailed(name, options.data_dir, **given)
        broken = prepare(
            splits,
            name,
            get_data_set(name).place(options.data_dir),
            options.output_dir,
            CopyOptions(options.shorter_side, options.quality, options.max_image_pixels),
            file_format=options.format,
            skip_broken=options.on_broken_image == "skip",
            num_workers=options.num_workers,
            command=command,
        )
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command continues where it stopped") from None
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    left_out = sum(map(len, broken.values()))
    if left_out:
        print(f"{left_out:,} image(s) that cannot be read are left out, see {options.output_dir / _BROKEN_IMAGES}")
    place = shlex.quote(str(options.output_dir))
    if options.format == "webdataset":
        classes = shlex.quote(str(options.output_dir / "class_names.txt"))
        # The recipes for own images read the features of all training images first, which no stream can give.
        place += f" --dataset custom --streaming --class_names {classes}"
        place += " --classifier_init random --standardise_features false"
    if isinstance(get_data_set(name), Benchmark):  # --data_dir alone would take it for images of one's own
        place += " --recipe RECIPE"
        print(f"train on the copy, with RECIPE a recipe of {name}, by:")
    else:
        print("train on the copy:")
    print(f"  accelerate launch train_accelerate.py --data_dir {place}")


if __name__ == "__main__":
    main()
