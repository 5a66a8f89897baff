"""Measurements that the README shows: `python -m ride_bf.benchmark NAME`."""

import argparse

from ride_bf.benchmark import digits, input, lists, scale, train

# name -> module with add_arguments(parser) and run(options); its docstring says what it measures
BENCHMARKS = {"digits": digits, "input": input, "lists": lists, "train": train, "scale": scale}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ride_bf.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, module in BENCHMARKS.items():
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    BENCHMARKS[options.name].run(options)


if __name__ == "__main__":
    main()
