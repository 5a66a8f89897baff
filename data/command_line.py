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


def add_data_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Adds options of the data sets by name, as the other commands have them."""
    for name in names:
        option = data_options()[name]
        kind = {"action": "store_true"} if option.kind is bool else {"type": option.kind}
        parser.add_argument(f"--{name}", help=option.help, **kind)
