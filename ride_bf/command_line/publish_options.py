"""The options of `python -m ride_bf.publish`."""

import argparse
from pathlib import Path

from ride_bf.command_line.data_options import add_data_options, given_data_options
from ride_bf.command_line.parser import command_parser

_DATA = """\
Only with --publish_neighbours. A checkpoint knows the data that it was trained on, so none of these is needed. They are
for models that do not know it, and must be as in training; --data_dir may be another place with the same images."""


def parse_options(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`. An option that cannot act is an error."""
    parser = command_parser("publish", description)
    parser.add_argument("folder", metavar="DIR", type=Path, help="output folder of a run, or folder of a checkpoint")
    parser.add_argument("--repo_id", required=True, help="USER/NAME of the repository on the Hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to publish to; it is created if it does not exist")
    parser.add_argument(
        "--license",
        help="licence of the weights, as an identifier of the Hub, such as mit or cc-by-nc-4.0; by default that of the "
        "model in the repository",
    )
    parser.add_argument("--license_name", metavar="NAME", help="of terms that have no identifier: --license other")
    parser.add_argument("--license_link", metavar="ADDRESS", help="where these terms are")
    parser.add_argument("--data_description", metavar="SENTENCE", help="what the training images show, for the card")
    parser.add_argument(
        "--examples", type=Path, nargs="+", help="image files to show on the page; they are published too"
    )
    parser.add_argument(
        "--keep_batchformer", action="store_true", help="keep the BatchFormer's weights, for further training"
    )
    parser.add_argument("--onnx", action="store_true", help="add model.onnx; needs requirements-extras.txt")
    parser.add_argument(
        "--publish_neighbours",
        action="store_true",
        help="publish small copies of training images, at most 50 a class, so that the page shows the nearest ones; "
        "python -m ride_bf.embed must have written the features",
    )
    parser.add_argument("--space", help="USER/NAME of a Space to publish too, a page for trying the model")
    parser.add_argument("--dry_run", action="store_true", help="upload nothing; list the files")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="keep the files in this folder, and those of a Space in OUT_space beside it; both must be new or empty",
    )
    add_data_options(parser, _DATA)
    options = parser.parse_args(arguments)
    if (given := given_data_options(options)) and not options.publish_neighbours:
        parser.error(f"--{next(iter(given))} cannot act without --publish_neighbours")
    return options
