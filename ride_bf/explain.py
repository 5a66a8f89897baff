"""Show why a model gives its answers: `python -m ride_bf.explain RUN_OR_CHECKPOINT_OR_HUB_ID IMAGE [IMAGE ...]`.

Writes a page for each image: a Grad-CAM map of each expert, and the nearest training images with their labels and
distances. For these, `python -m ride_bf.embed` must have written the features. Files are read as in training and
evaluation. If a file cannot be read, the command reports it, explains the others, and exits with code 1. See
docs/explain.md.
"""

import argparse
import sys
from pathlib import Path

from ride_bf.command_line.data_options import add_data_options, given_data_options
from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("explain", __doc__)
    add = parser.add_argument
    add("model", help="output folder of a run, folder of a checkpoint or id on the Hub; its own code is not run")
    add("images", nargs="+", type=Path)
    add("--class_name", metavar="NAME", help="show what speaks for this class; default: for the predicted one")
    add(
        "--embeddings",
        type=Path,
        metavar="FILE",
        help="default: embeddings.parquet in the model's folder, if it is there",
    )
    add("--output_dir", type=Path, help="default: explanations in the model's folder")
    add_data_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from transformers.utils import logging

    from data import BrokenImageError
    from data.notices import printed_notices
    from ride_bf.evaluation.embedding import EMBEDDINGS, check_written
    from ride_bf.evaluation.explanation import Explainer, TrainingImages, page_paths
    from ride_bf.runs.models import find_model, load_model, load_processor, results_folder
    from ride_bf.runs.provenance import limit_in_training, load_stored_splits_of

    logging.disable_progress_bar()
    given = given_data_options(options)
    with errors_as_messages():
        place = find_model(options.model)
        folder = results_folder(place)
        limit = options.max_image_pixels or limit_in_training(place)
        explain = Explainer(load_model(place), load_processor(place), limit, options.class_name)
        neighbours, embeddings = None, options.embeddings or folder / EMBEDDINGS
        try:
            check_written(embeddings, place)  # before the images are loaded
            with printed_notices():
                splits, data = load_stored_splits_of(place, ["train"], **given)
            neighbours = TrainingImages(embeddings, splits["train"], data, explain.model, place)
        except (ValueError, OSError) as error:
            if options.embeddings or given.keys() - {"max_image_pixels"}:  # which ask for the training images
                raise
            print(f"without the nearest training images: {error}")
    output_dir = options.output_dir or folder / "explanations"
    broken = 0
    with errors_as_messages():
        for image, page in page_paths(options.images, output_dir).items():
            try:
                explain(image, page, neighbours)
            except BrokenImageError as error:
                broken += 1
                print(f"error: {error}", file=sys.stderr)
                continue
            print(page)
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
