"""Options that name the data, for commands that read a trained model."""

import argparse
from typing import Any

_OPTIONS: dict[str, tuple[type, str]] = {
    "dataset": (str, "name of the data set"),
    "data_dir": (str, "new place of the data, if they have been moved"),
    "validation_fraction": (float, "share of the training images that was held out for validation"),
    "imbalance_factor": (float, "imbalance factor of CIFAR"),
    "imbalance_type": (str, "imbalance type of CIFAR"),
    "image_column": (str, "image column of your own table"),
    "label_column": (str, "label column of your own table"),
}


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `data.load_long_tailed`; `given_data_options` reads them."""
    group = parser.add_argument_group(
        "data",
        "A checkpoint knows the data that it was trained on, so you need none of these options. They are for models "
        "that do not know, such as converted ones; give the values of training. An option that contradicts the "
        "checkpoint is an error. Only --data_dir may differ, if the images are the same.",
    )
    for name, (kind, meaning) in _OPTIONS.items():
        group.add_argument(f"--{name}", type=kind, help=meaning)


def given_data_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as arguments of `ride_bf.runs.provenance.load_splits_of`."""
    return {name: getattr(options, name) for name in _OPTIONS if getattr(options, name) is not None}
