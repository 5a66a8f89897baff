"""Fix the splits of your own images in lists: `python -m data.make_splits --data_dir DIR --output_dir OUT`.

Writes train.txt, val.txt, test.txt and class_names.txt into OUT. With these lists your images are a benchmark: everyone
who has the images and the lists has the same splits. Equal images are in one split. The first lines of each list name
the command that made it.

    python -m data.make_splits --data_dir DIR --output_dir OUT --validation 0.1 --test 0.2
    accelerate launch train_accelerate.py --data_dir DIR --lists OUT

`--long_tail 100` also thins the training images to a long tail, as CIFAR-LT is made.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from data.command_line import add_broken_image_option, add_data_options, command_parser, of_broken_images

_OPTIONS = ("image_column", "label_column", "allow_empty_classes")  # those of `data.custom.load_custom`
_HEADING = "# The {split} split, by: "
_LISTS = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("make_splits", __doc__)
    parser.add_argument("--data_dir", required=True, help="your images: class folders, lists or a table")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for the lists; may be --data_dir")
    parser.add_argument(
        "--test", type=float, metavar="X", help="share of each class for the test; 0.2 if there is no test split"
    )
    parser.add_argument(
        "--validation", type=float, metavar="X", help="share of each class for validation; by default 0"
    )
    parser.add_argument(
        "--long_tail",
        type=float,
        metavar="FACTOR",
        help="thin the training images: class sizes decay exponentially, the largest FACTOR times the smallest",
    )
    parser.add_argument("--seed", type=int, help="seed of the random draws (default: 0)")
    parser.add_argument("--group_by", metavar="COLUMN", help="perceptual, or a column; see train_accelerate.py --help")
    parser.add_argument("--exclude", metavar="FILE", help="file with a line for each image to leave out")
    parser.add_argument("--overwrite", action="store_true", help="replace lists that are in --output_dir")
    add_broken_image_option(parser, "stop", "here no image is read, so the rows alone (default: stop)")
    add_data_options(parser, _OPTIONS)
    options = parser.parse_args(arguments)
    if options.output_dir.exists() and not options.output_dir.is_dir():
        parser.error(f"--output_dir {options.output_dir} is a file; name a folder")
    if options.seed is not None and options.seed < 0:
        parser.error(f"--seed must be 0 or more, not {options.seed}")
    for name in ("test", "validation"):
        share = getattr(options, name)
        if share is not None and not 0 < share < 1:
            parser.error(f"--{name} must be between 0 and 1, not {share}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from data.exclusion import folder_of
    from data.notices import printed_notices, some
    from data.splits import class_counts, make_splits

    given = {name: getattr(options, name) for name in _OPTIONS if getattr(options, name)}
    given |= of_broken_images(options.on_broken_image)
    try:
        with printed_notices(), _earlier_lists_aside(options) as earlier_names:
            splits = make_splits(
                options.data_dir,
                test=options.test,
                validation=options.validation,
                long_tail=options.long_tail,
                seed=options.seed,
                group_by=options.group_by,
                exclude=options.exclude,
                **given,
            )
            names = splits["train"].features["label"].names
            if earlier_names not in (None, names):
                raise ValueError(
                    f"{options.data_dir} has other classes without the lists in it, which --overwrite would replace: "
                    f"{some(names)}, not {some(earlier_names)}; name another --output_dir"
                )
            words = sys.argv[1:] if arguments is None else arguments
            command = shlex.join(["python", "-m", "data.make_splits", *words])
            write_lists(splits, options.data_dir, options.output_dir, command, options.overwrite)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    for split, rows in splits.items():
        counts = class_counts(rows)
        print(f"{split:<12} {len(rows):>9,} images, {max(counts):,} to {min(counts):,} of a class")
    place = Path(options.data_dir)
    place = place.parent if place.is_file() else place
    command = f"accelerate launch train_accelerate.py --data_dir {shlex.quote(str(place))}"
    if os.path.realpath(options.output_dir) != folder_of(place):
        command += f" --lists {shlex.quote(str(options.output_dir))}"
    print(f"train on them: {command}")


@contextmanager
def _earlier_lists_aside(options: argparse.Namespace) -> Iterator[list[str] | None]:
    """Hides the lists that `--overwrite` replaces, if they are in the folder of the images and this command wrote them.

    Otherwise their splits would be read, and nothing be drawn. Yields the names of their classes, or None without such
    lists. After an error they are as before.
    """
    from data.annotation_lists import CLASS_NAMES
    from data.rows import read_text

    folder = options.output_dir
    ours = [
        name
        for split, name in _LISTS.items()
        if (folder / name).is_file() and read_text(folder / name).startswith(_HEADING.format(split=split))
    ]
    same_folder = Path(options.data_dir).is_dir() and os.path.realpath(folder) == os.path.realpath(options.data_dir)
    names = folder / CLASS_NAMES
    if not (options.overwrite and same_folder and _LISTS["train"] in ours and names.is_file()):
        yield None
        return
    with TemporaryDirectory(prefix=".earlier_lists_", dir=folder) as aside:
        earlier_names = read_text(names).splitlines()
        for name in (*ours, CLASS_NAMES):
            (folder / name).rename(Path(aside) / name)
        try:
            yield earlier_names
        except BaseException:
            for name in (*ours, CLASS_NAMES):
                (Path(aside) / name).replace(folder / name)
            raise


def write_lists(splits, place: str | Path, output_dir: Path, command: str, overwrite: bool = False) -> None:
    """Writes a list for each split, of lines `relative/path label`, and the names of the classes.

    Paths are relative to the folder `place`, or to the folder of the table `place`. Raises ValueError if images are not
    files there, or if there are lists already and not `overwrite`.
    """
    from data.annotation_lists import CLASS_NAMES
    from data.columns import image_field
    from data.exclusion import folder_of
    from data.splits import class_labels

    there = [name for name in (*_LISTS.values(), CLASS_NAMES) if (output_dir / name).exists()]
    if there and not overwrite:
        raise ValueError(f"{output_dir} has {', '.join(there)} already; pass --overwrite or another --output_dir")
    folder = folder_of(place) + os.sep
    names = splits["train"].features["label"].names
    if unfit := [name for name in names if "\n" in name or name != name.strip()]:
        raise ValueError(f"the class name {unfit[0]!r} does not fit on a line of {CLASS_NAMES}; rename the class")
    files = {CLASS_NAMES: "".join(f"{name}\n" for name in names)}
    for split, rows in splits.items():
        lines = [f"{_HEADING.format(split=split)}{command}"]
        paths = image_field(rows, "path").to_pylist()
        for path, label in zip(paths, class_labels(rows).tolist(), strict=True):
            if path is None or not path.startswith(folder):
                raise ValueError(f"{place} has images that are not files in it, so a list cannot name them; save them")
            if path.strip() != path or "\n" in path:
                raise ValueError(f"the file name {path!r} does not fit on a line of a list; rename the file")
            relative = path[len(folder) :]
            # or it would be read as a comment, or without the space
            start = "./" if relative.startswith("# ") or relative.lstrip() != relative else ""
            lines.append(f"{start}{relative} {label}")
        files[_LISTS[split]] = "".join(f"{line}\n" for line in lines)
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in there:
        (output_dir / name).unlink()
    for name, text in files.items():
        (output_dir / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
