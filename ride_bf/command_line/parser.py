"""The parser of a command, and the form of its help."""

import argparse


def command_parser(name: str, description: str, **options) -> argparse.ArgumentParser:
    """A parser for `python -m ride_bf.NAME`, whose description keeps its line breaks. Options are never abbreviated."""
    return argparse.ArgumentParser(
        prog=f"python -m ride_bf.{name}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
