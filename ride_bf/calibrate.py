"""Calibrate a model's scores: `python -m ride_bf.calibrate MODEL [--coverage 0.9]`.

MODEL is a run's output folder or a checkpoint's folder. On the validation images the command fits a temperature, by
which logits are divided before the softmax, and one for each shot group where cross-validation shows that it is better.
Without validation images it takes a fifth of the training images, or all of a stream, and promises nothing.
With `--coverage` it also finds thresholds for sets of classes that hold the true one in that share of the cases, and
with `--reject_known` a threshold for images of none of the classes. It writes them into the model's config.json, in
place of earlier ones; the weights and logits stay as they are. Then `pipeline`, `ride_bf.classify`, the endpoint, the
demo page and ONNX files give calibrated scores, and `ride_bf.evaluate` measures them on the test images. The command
also writes `calibration.json`. To use several processes: `accelerate launch -m ride_bf.calibrate ...`. See
docs/confidence.md.
"""

import argparse

from ride_bf.command_line.data_options import (
    add_data_options,
    add_loader_options,
    check_loader_options,
    given_data_options,
)
from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("calibrate", __doc__)
    parser.add_argument("model", help="output folder of a run or folder of a checkpoint")
    parser.add_argument("--coverage", type=float, metavar="SHARE", help="share of images whose set has the true class")
    parser.add_argument(
        "--coverage_by",
        choices=("all", "group", "class"),
        default="group",
        help="classes for whose images the share holds: all together, each shot group (default), or each class, where "
        "those with few validation images share a threshold",
    )
    parser.add_argument(
        "--reject_known",
        type=float,
        metavar="SHARE",
        help="say 'none of the classes' for images that look unlike all, and at most for this share of known images",
    )
    add_loader_options(parser)
    add_data_options(parser)
    options = parser.parse_args(arguments)
    check_loader_options(parser, options)
    for name in ("coverage", "reject_known"):
        share = getattr(options, name)
        if share is not None and not 0 < share < 1:
            parser.error(f"--{name} must be between 0 and 1, not {share}")
    if options.coverage is None and options.coverage_by != parser.get_default("coverage_by"):
        parser.error(f"--coverage_by {options.coverage_by} cannot act without --coverage; leave it out or set both")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from transformers.utils import logging

    from data import BrokenImageError, evaluation_batches
    from data.notices import printed_notices
    from ride_bf.evaluation.confidence import (
        calibrate,
        calibration_images,
        check_promises,
        describe_calibration,
        logits_of,
        write_confidence,
    )
    from ride_bf.runs.engine import start_accelerator
    from ride_bf.runs.models import changeable_folder, check_classes, find_model, load_model, load_processor
    from ride_bf.runs.provenance import load_splits_of

    logging.disable_progress_bar()
    with errors_as_messages(ValueError, OSError, BrokenImageError, FloatingPointError):
        accelerator = start_accelerator()
        place = changeable_folder(find_model(options.model))
        model, processor = load_model(place), load_processor(place)
        # the other processes use the cache of the first
        with accelerator.main_process_first(), printed_notices(accelerator.print):
            splits, data = load_splits_of(place, **given_data_options(options))
        check_classes(model, data.class_names, f"the model {place}")
        images, split = calibration_images(splits)
        check_promises(split, options.coverage, options.reject_known)
        loader = evaluation_batches(
            images,
            processor,
            options.batch_size,
            options.num_workers,
            accelerator,
            data.on_broken(options.on_broken_image),
            data.max_image_pixels,
        )
        logits, labels = logits_of(accelerator.prepare_model(model, evaluation_mode=True), loader, accelerator)
        promises = options.coverage, options.coverage_by, options.reject_known
        confidence, record = calibrate(logits, labels, data.train_class_counts, split, *promises)
        if accelerator.is_main_process:
            write_confidence(model, confidence, record, place)
            print(f"{describe_calibration(record)}\n\n{place / 'config.json'}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
