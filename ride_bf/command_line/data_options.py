"""Options that name the data, for commands that read a trained model."""

import argparse
from typing import Any

from data.command_line import add_broken_image_option, of_broken_images
from data.formats import MAX_IMAGE_PIXELS_HELP
from data.sets import DATA_SETS, SPLIT_OPTIONS, data_options, with_option

_OF_A_CHECKPOINT = """\
A checkpoint knows the data that it was trained on, so none of these is needed. They are for models that do
not know it, such as converted ones, and must be as in training. One that contradicts the checkpoint is an
error; --data_dir may be another place with the same images, and --max_image_pixels any number. With
--other_images, where a command has it, they name the other data set."""


def add_data_options(parser: argparse.ArgumentParser, description: str = _OF_A_CHECKPOINT) -> None:
    """Adds the options of `data.load_long_tailed`, none of which is required; `given_data_options` reads them."""
    group = parser.add_argument_group("data", description)
    group.add_argument("--dataset", metavar="NAME", help=f"name of the data set: {', '.join(DATA_SETS)}")
    group.add_argument("--data_dir", metavar="PLACE", help="folder, table or Hub id (hf:USER/NAME) of the data")
    for option in SPLIT_OPTIONS:
        group.add_argument(f"--{option.name}", metavar=option.metavar, type=option.kind, help=option.help)
    add_max_image_pixels(group, "by default as in training")
    for name, option in data_options().items():
        help = f"{option.help}; only with --dataset {' or '.join(with_option(name))}"
        if option.kind is bool:
            group.add_argument(f"--{name}", action="store_true", default=None, help=help)
        else:
            group.add_argument(f"--{name}", type=option.kind, choices=option.choices, help=help)


def add_max_image_pixels(parser: argparse.ArgumentParser | argparse._ArgumentGroup, default: str) -> None:
    """Adds `--max_image_pixels`, which is None if it is not given; `default` tells what that means."""
    parser.add_argument("--max_image_pixels", metavar="N", type=positive, help=f"{MAX_IMAGE_PIXELS_HELP}; {default}")


def positive(text: str) -> int:
    """Reads a whole number of 1 or more, for `add_argument(type=positive)`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be a whole number, 1 or more, not {text!r}")
    return int(text)


def add_loader_options(parser: argparse.ArgumentParser, batch_size: int = 256) -> None:
    """Adds the options of a loader of images; `check_loader_options` checks them once they are parsed."""
    help = "images in a batch of one process"
    parser.add_argument("--batch_size", type=int, default=batch_size, help=help)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that prepare images, for each process")
    default = "by default as in training, and stop for other images or a model that does not know its data"
    add_broken_image_option(parser, None, default)


def check_loader_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the command with an error if they are no numbers of a loader."""
    if options.batch_size < 1 or options.num_workers < 0:
        numbers = f"{options.batch_size} and {options.num_workers}"
        parser.error(f"--batch_size must be 1 or more and --num_workers 0 or more, not {numbers}")


def given_data_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, by the names of `ride_bf.runs.provenance.load_splits_of`."""
    split_options = (option.name for option in SPLIT_OPTIONS)
    names = ("dataset", "data_dir", *split_options, "max_image_pixels", *data_options())
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return given | of_broken_images(getattr(options, "on_broken_image", None))
