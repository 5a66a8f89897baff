"""Evaluate a model on frequent and rare classes: `python -m ride_bf.evaluate --model RUN_OR_CHECKPOINT_OR_HUB_ID`.

Writes three files: `results.json`, with the keys that `ride_bf.evaluation.results` describes; `report.html`, a report
in a single file; and `predictions.npz`, which `python -m ride_bf.compare` uses to compare models image by image. To use
several processes: `accelerate launch -m ride_bf.evaluate ...`. The BatchFormer is not used for predictions.

By default the images come from the data set that the model was trained on. `--other_images` evaluates it on another
data set with the same classes. The training images of the model always determine which classes are many-, medium- and
few-shot.
"""

import argparse
from pathlib import Path

from ride_bf.command_line.data_options import add_data_options, given_data_options
from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("evaluate", __doc__)
    parser.add_argument(
        "--model",
        required=True,
        help="output folder of a run, folder of a checkpoint or id on the Hub; its own code is not run",
    )
    parser.add_argument("--split", default="test", help="split to evaluate: test, or validation while you still tune")
    parser.add_argument(
        "--output_dir", type=Path, help="by default the checkpoint's folder, or outputs/NAME for a model from the Hub"
    )
    parser.add_argument(
        "--views",
        default="centre",
        help="views of each image whose mean logits are evaluated: centre (default), flip (also mirrored) or five_crop "
        "(centre and corners of an image that is 24 pixels larger)",
    )
    parser.add_argument("--batch_size", type=int, default=256, help="images in a batch of one process")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that prepare images, for each process")
    parser.add_argument(
        "--on_broken_image",
        choices=("stop", "skip"),
        help="skip: leave out what cannot be read; default: as in training",
    )
    add_data_options(parser)
    parser.add_argument(
        "--other_images", action="store_true", help="evaluate on the data set, of equal classes, that the options name"
    )
    options = parser.parse_args(arguments)
    if options.batch_size < 1 or options.num_workers < 0:
        parser.error(
            f"--batch_size must be 1 or more and --num_workers 0 or more, not {options.batch_size} and "
            f"{options.num_workers}"
        )
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from transformers.utils import logging

    from data import BrokenImageError
    from data.notices import printed_notices
    from ride_bf.evaluation.html_report import REPORT
    from ride_bf.evaluation.leakage import describe_leakage
    from ride_bf.evaluation.predict import describe_broken, evaluate_split
    from ride_bf.evaluation.tables import accuracy_table
    from ride_bf.runs.engine import start_accelerator
    from ride_bf.runs.models import check_classes, find_model, load_model, load_processor, results_folder
    from ride_bf.runs.provenance import load_data_to_evaluate

    logging.disable_progress_bar()
    with errors_as_messages():
        accelerator = start_accelerator()
        place = find_model(options.model)
        model, processor = load_model(place), load_processor(place)
        # the other processes use the cache of the first
        with accelerator.main_process_first(), printed_notices(accelerator.print):
            data = load_data_to_evaluate(place, options.split, options.other_images, **given_data_options(options))
        check_classes(model, data.class_names, f"the model {place}")
    output_dir = options.output_dir or results_folder(place)
    with errors_as_messages(BrokenImageError, FloatingPointError, ValueError):
        results = evaluate_split(
            accelerator.prepare_model(model, evaluation_mode=True),
            data.split,
            processor,
            accelerator,
            data.train_class_counts,
            output_dir,
            {"model": str(options.model), **data.facts()},
            options.batch_size,
            options.num_workers,
            data.training_images,
            options.views,
            data.max_image_pixels,
            data.on_broken(options.on_broken_image),
        )
    if results is not None:
        seen = "" if options.views == "centre" else f", mean of the views {options.views}"
        print(f"{place}: {results['num_images']:,} images of {results['dataset']}'s {options.split} split{seen}\n")
        print(accuracy_table(results["metrics"], data.train_class_counts, data.class_names))
        for said in filter(None, (describe_broken(results), describe_leakage(results))):
            print(f"\nnote: {said}")
        print(f"\n{results['speed']['images_per_second']:,.0f} images/s. Full report: {output_dir / REPORT}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
