"""Makes the parser of a command."""

import argparse

from ride_bf.command_line.processes import is_first_of_machine


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are printed by one process of each machine. All of them get the same arguments."""

    def error(self, message: str) -> None:
        if is_first_of_machine():
            super().error(message)
        self.exit(2)


def command_parser(name: str, description: str, **options) -> CommandParser:
    """A parser for `python -m ride_bf.NAME`. The description keeps its line breaks; options have no abbreviations."""
    return CommandParser(
        prog=f"python -m ride_bf.{name}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
