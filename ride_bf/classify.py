"""Classify image files with a saved model: `python -m ride_bf.classify MODEL IMAGE [IMAGE ...]`.

Files are read as in training and evaluation. If a file cannot be read, the command reports it, classifies the other
files, and exits with code 1. After `ride_bf.calibrate` the scores are calibrated, and sets of classes are printed too.
"""

import argparse
import sys
from pathlib import Path

from ride_bf.command_line.data_options import add_max_image_pixels
from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("classify", __doc__)
    parser.add_argument(
        "model",
        help="output folder of a run, folder of a checkpoint or id on the Hub; its own code is run",
    )
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--top_k", type=int, default=3, help="classes to print for each image")
    add_max_image_pixels(parser, "by default as in training")
    options = parser.parse_args(arguments)
    if options.top_k < 1:
        parser.error(f"--top_k must be 1 or more, not {options.top_k}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from transformers.utils import logging

    from data import BrokenImageError
    from ride_bf.evaluation.classify import ImageClassifier
    from ride_bf.runs.models import find_model

    logging.disable_progress_bar()
    with errors_as_messages():
        classify = ImageClassifier(find_model(options.model), options.max_image_pixels)
    broken = 0
    for path in options.images:
        try:
            answer = classify.answer(path, options.top_k)
        except BrokenImageError as error:
            broken += 1
            print(f"error: {error}", file=sys.stderr)
            continue
        line = ", ".join(f"{found['label']} ({100 * found['score']:.1f} %)" for found in answer.top)
        if answer.rejected:
            line = f"none of the classes; the nearest: {line}"
        if answer.in_set is not None:
            line += f"; {100 * classify.confidence.coverage:g} % set: {', '.join(answer.in_set)}"
        print(f"{path}: {line}")
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
