"""Run the benchmarks that the README reports: `python -m ride_bf.benchmark NAME`."""

import argparse
import importlib

from ride_bf.benchmark.arguments import BENCHMARKS
from ride_bf.command_line.messages import errors_as_messages


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ride_bf.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, (add_arguments, summary) in BENCHMARKS.items():
        add_arguments(commands.add_parser(name, help=summary, description=summary))
    options = parser.parse_args(arguments)
    with errors_as_messages():
        importlib.import_module(f"ride_bf.benchmark.{options.name}").run(options)


if __name__ == "__main__":
    main()
