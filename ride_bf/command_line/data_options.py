"""The options that name data, for commands that read a trained model."""

import argparse
from typing import Any

from data.sets import DATA_SETS, data_options

_OF_ALL = {
    "dataset": (str, f"name of the data set: {', '.join(DATA_SETS)}"),
    "data_dir": (str, "where the data are now, if they have been moved"),
    "validation_fraction": (float, "share of the training images that were kept for validation"),
}


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `data.load_long_tailed`, none of which is required; `given_data_options` reads them."""
    group = parser.add_argument_group(
        "data",
        "A checkpoint knows the data that it was trained on, so that none of these is needed. They are for models\n"
        "that do not, such as converted ones: there they must be as in training. One that contradicts the checkpoint\n"
        "is an error; --data_dir may be another place with the same images.",
    )
    for name, (kind, meaning) in _OF_ALL.items():
        group.add_argument(f"--{name}", type=kind, help=meaning)
    for name, option in data_options().items():
        reading = {"action": "store_true", "default": None} if option.kind is bool else {"type": option.kind}
        choices = {} if option.choices is None else {"choices": option.choices}
        group.add_argument(f"--{name}", help=option.help, **reading, **choices)


def given_data_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, by the names of `ride_bf.runs.provenance.load_splits_of`."""
    values = {name: getattr(options, name) for name in (*_OF_ALL, *data_options())}
    return {name: value for name, value in values.items() if value is not None}
