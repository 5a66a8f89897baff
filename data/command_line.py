"""The parser of the commands `python -m data.NAME`, without torch and `datasets`, so that --help is quick."""

import argparse
from collections.abc import Iterable

from data.sets import data_options


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser for `python -m data.NAME`. The description keeps its line breaks; options have no abbreviations."""
    return argparse.ArgumentParser(
        prog=f"python -m data.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_broken_image_option(parser: argparse.ArgumentParser, default: str | None, more: str) -> None:
    """Adds `--on_broken_image`, which `of_broken_images` reads; `more` says what the command does, and its default."""
    help = f"skip: leave out unreadable images, and rows of a table without image or label; {more}"
    parser.add_argument("--on_broken_image", choices=("stop", "skip"), default=default, help=help)


def of_broken_images(choice: str | None) -> dict[str, bool]:
    """The option of `data.load_long_tailed` that a value of `--on_broken_image` stands for."""
    return {"skip_empty_rows": True} if choice == "skip" else {}


def add_data_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Adds options of the data sets by name, as the other commands have them."""
    for name in names:
        option = data_options()[name]
        kind = {"action": "store_true"} if option.kind is bool else {"type": option.kind}
        parser.add_argument(f"--{name}", help=option.help, **kind)
