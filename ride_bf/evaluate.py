"""Evaluate a model on frequent and rare classes: `python -m ride_bf.evaluate RUN_OR_CHECKPOINT_OR_HUB_ID`.

Writes `results.json`, with the keys that `ride_bf.evaluation.results` describes; `report.html`, a report in a single
file; and `predictions.npz` and `log_probabilities.npy`, from which `python -m ride_bf.compare` compares models image by
image, and `--predictions FOLDER` computes all numbers again. To use several processes: `accelerate launch -m
ride_bf.evaluate ...`. The BatchFormer is not used for predictions.

By default the images come from the data set that the model was trained on. `--other_images` evaluates it on another
data set with the same classes. The training images of the model always determine which classes are many-, medium- and
few-shot.
"""

import argparse
from pathlib import Path

from ride_bf.command_line.data_options import (
    add_data_options,
    add_loader_options,
    check_loader_options,
    given_data_options,
)
from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser

_AGAIN = ("predictions", "output_dir", "test_prior", "model_prior")  # the options that act with --predictions


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("evaluate", __doc__)
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
    add("--on_broken_image", choices=("stop", "skip"), help="skip: leave out unreadable ones; default: as in training")
    add_data_options(parser)
    add("--other_images", action="store_true", help="evaluate on the data set, of equal classes, that the options name")
    options = parser.parse_args(arguments)
    place = vars(options).pop("place")
    options.model = options.model or place
    check_loader_options(parser, options)
    changed = [name for name, value in vars(options).items() if value != parser.get_default(name)]
    idle = {name: "with --predictions" for name in changed if options.predictions and name not in _AGAIN}
    idle |= {"model_prior": "without --test_prior"} if options.model_prior and not options.test_prior else {}
    idle |= {"train_images": "with --other_images"} if options.train_images and options.other_images else {}
    idle |= {"neighbours": f"with --views {options.views}"} if options.neighbours and options.views != "centre" else {}
    idle |= {"neighbours": "with --split train"} if options.neighbours and options.split == "train" else {}
    for name, where in idle.items():
        parser.error(f"--{name} cannot act {where}; leave it out")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from transformers.utils import logging

    from data import BrokenImageError
    from data.notices import printed_notices
    from ride_bf.evaluation.embedding import EMBEDDINGS, read_neighbours
    from ride_bf.evaluation.priors import choose_priors
    from ride_bf.evaluation.report import describe, evaluate_again, evaluate_split
    from ride_bf.runs.engine import start_accelerator
    from ride_bf.runs.models import check_classes, find_model, load_model, load_processor, results_folder
    from ride_bf.runs.provenance import describe_run, load_data_to_evaluate

    logging.disable_progress_bar()
    if options.predictions is not None:
        with errors_as_messages():
            print(describe(*evaluate_again(*(getattr(options, name) for name in _AGAIN))))
        return
    with errors_as_messages():
        accelerator = start_accelerator()
        place = find_model(options.model)
        model, processor = load_model(place), load_processor(place)
        # the other processes use the cache of the first
        with accelerator.main_process_first(), printed_notices(accelerator.print):
            data = load_data_to_evaluate(place, options.split, options.other_images, **given_data_options(options))
        check_classes(model, data.class_names, f"the model {place}")
        neighbours = read_neighbours(results_folder(place) / EMBEDDINGS, model) if options.neighbours else None
        known, test_prior = choose_priors(place, options.test_prior, options.model_prior, data)
    output_dir = options.output_dir or results_folder(place)
    with errors_as_messages(BrokenImageError, FloatingPointError, ValueError):
        results = evaluate_split(
            accelerator.prepare_model(model, evaluation_mode=True),
            data,
            processor,
            accelerator,
            output_dir,
            {"model": str(options.model), **data.facts(), **known, "run": describe_run(place)},
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            train_images=options.train_images,
            views=options.views,
            on_broken=data.on_broken(options.on_broken_image),
            test_prior=test_prior,
            unknown_dir=options.unknown_dir,
            neighbours=neighbours,
        )
    if results is not None:
        print(describe(results, output_dir))
    accelerator.end_training()


if __name__ == "__main__":
    main()
