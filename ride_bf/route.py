"""Measure a router's accuracy and cost: `python -m ride_bf.route RUN_OR_CHECKPOINT_OR_HUB_ID [--output_dir OUT]`.

The thresholds go from "every expert for every image" to "one expert for all". For each threshold the command reports
accuracy, experts used and multiply-adds on the validation images, and the speed on a sample of them. It writes
`routing.json` and plots `routing.png`. The model's own threshold is `router_threshold` in its config.json;
`--set_threshold T` changes it. To use several processes: `accelerate launch -m ride_bf.route ...`.
"""

import json
from pathlib import Path

from ride_bf.command_line.data_options import (
    add_data_options,
    add_loader_options,
    check_loader_options,
    given_data_options,
)
from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("route", __doc__)
    parser.add_argument(
        "model", help="output folder of a run, folder of a checkpoint or id on the Hub; needs a trained router"
    )
    parser.add_argument(
        "--output_dir", type=Path, help="by default the checkpoint's folder, or outputs/NAME for a model from the Hub"
    )
    parser.add_argument("--split", default="validation", help="split to measure the curve on")
    add_loader_options(parser, batch_size=128)
    parser.add_argument(
        "--set_threshold",
        type=float,
        help="write this threshold into the model's config.json; a calibration is removed",
    )
    add_data_options(parser)
    options = parser.parse_args(arguments)
    check_loader_options(parser, options)
    from transformers.utils import logging

    from data import evaluation_batches
    from data.notices import printed_notices
    from ride_bf.evaluation.routing import draw, measure, set_threshold
    from ride_bf.runs.engine import start_accelerator
    from ride_bf.runs.models import find_model, load_model, load_processor, results_folder
    from ride_bf.runs.provenance import load_data_to_evaluate

    logging.disable_progress_bar()
    with errors_as_messages():
        accelerator = start_accelerator()
        place = find_model(options.model)
        model, processor = load_model(place), load_processor(place)
        if model.router is None:
            raise ValueError(
                f"{place} has no router; train one with --router true --train_only router --init_from {place}, or with "
                "a recipe whose name ends in _router"
            )
        # the other processes use the cache of the first
        with accelerator.main_process_first(), printed_notices(accelerator.print):
            data = load_data_to_evaluate(place, options.split, None, **given_data_options(options))
        if options.set_threshold is not None and accelerator.is_main_process:
            set_threshold(model.config, options.set_threshold, place)
        loader = evaluation_batches(
            data.split,
            processor,
            options.batch_size,
            options.num_workers,
            accelerator,
            data.on_broken(options.on_broken_image),
            data.max_image_pixels,
        )
        model = accelerator.prepare_model(model, evaluation_mode=True)
        curve = measure(model, loader, accelerator, data.train_class_counts)
    if curve is not None:
        output_dir = options.output_dir or results_folder(place)
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "routing.json").write_text(json.dumps(curve, indent=2) + "\n")
        draw(curve, output_dir / "routing.png")
        print(f"{'threshold':>9} {'balanced':>9} {'experts':>8} {'multiply-adds':>14} {'images/s':>9}")
        for point in curve:
            print(
                f"{point['threshold']:>9g} {100 * point['balanced_accuracy']:>7.1f} % {point['mean_experts']:>8.2f} "
                f"{round(point['multiply_adds']):>14,} {point['images_per_second']:>9.0f}"
            )
        print(f"images/s: the network alone, on {curve[0]['timed_images']} of the images\n{output_dir / 'routing.png'}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
