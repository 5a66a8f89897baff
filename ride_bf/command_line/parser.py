"""Makes the parser of a command."""

import argparse


def command_parser(name: str, description: str, **options) -> argparse.ArgumentParser:
    """A parser for `python -m ride_bf.NAME`. The description keeps its line breaks; options have no abbreviations."""
    return argparse.ArgumentParser(
        prog=f"python -m ride_bf.{name}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
