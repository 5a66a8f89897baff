"""The options that name data, for commands that read a trained model."""

import argparse
from typing import Any

_OPTIONS: dict[str, tuple[type, str]] = {
    "dataset": (str, "name of the data set"),
    "data_dir": (str, "where the data are now, if they have been moved"),
    "validation_fraction": (float, "share of the training images held out for validation"),
    "imbalance_factor": (float, "of CIFAR"),
    "imbalance_type": (str, "of CIFAR"),
    "image_column": (str, "of one's own table"),
    "label_column": (str, "of one's own table"),
}


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `data.load_long_tailed`; `given_data_options` reads them."""
    group = parser.add_argument_group(
        "data",
        "A checkpoint knows the data that it was trained on, so that none of these is needed. They are for models that "
        "do not, such as converted ones: there they must be as in training. One that contradicts the checkpoint is an "
        "error, but for --data_dir, if the images are the same.",
    )
    for name, (kind, meaning) in _OPTIONS.items():
        group.add_argument(f"--{name}", type=kind, help=meaning)


def given_data_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, by the names of `ride_bf.runs.provenance.load_splits_of`."""
    return {name: getattr(options, name) for name in _OPTIONS if getattr(options, name) is not None}
