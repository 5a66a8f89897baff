"""The options of `python -m ride_bf.evaluate`."""

import argparse
from pathlib import Path

from ride_bf.command_line.data_options import (
    add_data_options,
    add_loader_options,
    check_loader_options,
)
from ride_bf.command_line.parser import command_parser

AGAIN = ("predictions", "output_dir", "test_prior", "model_prior")  # the options that act with --predictions


def parse_options(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`. An option that cannot act is an error."""
    parser = command_parser("evaluate", description)
    what = parser.add_mutually_exclusive_group(required=True)
    place = "run's output folder, checkpoint's folder or Hub id; its own code is not run"
    what.add_argument("place", nargs="?", metavar="MODEL", help=place)
    what.add_argument("--model", help="the same")
    what.add_argument("--predictions", type=Path, metavar="FOLDER", help="evaluation to compute again, without images")
    add = parser.add_argument
    add("--split", default="test", help="split to evaluate: test, or validation while you still tune")
    add("--output_dir", type=Path, help="default: folder of checkpoint or predictions; outputs/NAME for a Hub id")
    add("--train_images", action="store_true", help="evaluate the training images too, seen as in evaluation")
    prior = "also correct the logits for known class shares: train, inverse, uniform, or a JSON file of numbers"
    add("--test_prior", metavar="PRIOR", help=prior)
    add("--model_prior", choices=("train", "uniform"), help="class shares of the logits; default: by the loss")
    add("--unknown_dir", type=Path, metavar="FOLDER", help="images of none of the classes, to tell apart from these")
    beside = "also the accuracy of the votes of the nearest training images, from the file that ride_bf.embed wrote"
    add("--neighbours", action="store_true", help=beside)
    views = (
        "views of each image whose mean logits are evaluated: centre (default), flip (also mirrored) or five_crop "
        "(centre and corners of an image that is 24 pixels larger)"
    )
    add("--views", default="centre", help=views)
    add_loader_options(parser)
    add_data_options(parser)
    add("--other_images", action="store_true", help="evaluate on the data set, of equal classes, that the options name")
    options = parser.parse_args(arguments)
    place = vars(options).pop("place")
    options.model = options.model or place
    check_loader_options(parser, options)
    changed = [name for name, value in vars(options).items() if value != parser.get_default(name)]
    idle = {name: "with --predictions" for name in changed if options.predictions and name not in AGAIN}
    idle |= {"model_prior": "without --test_prior"} if options.model_prior and not options.test_prior else {}
    idle |= {"train_images": "with --other_images"} if options.train_images and options.other_images else {}
    idle |= {"neighbours": f"with --views {options.views}"} if options.neighbours and options.views != "centre" else {}
    idle |= {"neighbours": "with --split train"} if options.neighbours and options.split == "train" else {}
    for name, where in idle.items():
        parser.error(f"--{name} cannot act {where}; leave it out")
    return options
