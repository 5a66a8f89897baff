"""What a router saves and what it costs: `python -m ride_bf.route MODEL --recipe NAME [--output_dir OUT]`.

For thresholds from "every expert for every image" to "one expert for all", on the validation images: accuracy, experts
used, multiply-adds, and images a second as measured. Written as `routing.json` and drawn as `routing.png`. The model's
own threshold is `router_threshold` in its config.json; `--set_threshold T` writes another one there.
"""

import json
from pathlib import Path

from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser
from ride_bf.training.arguments import RECIPE_OPTIONS, parse_arguments


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("route", __doc__, epilog=RECIPE_OPTIONS)
    parser.add_argument("model", type=Path, help="folder of a model with a trained router")
    parser.add_argument("--output_dir", type=Path, help="where routing.json and routing.png go; MODEL by default")
    parser.add_argument("--batch", type=int, default=128, help="images in a batch")
    parser.add_argument("--set_threshold", type=float, help="write this threshold into the model's config.json")
    options, rest = parser.parse_known_args(arguments)
    run, recipe = parse_arguments(rest)
    import torch
    from transformers import AutoImageProcessor
    from transformers.utils import logging

    from data import class_counts, evaluation_batches, load_long_tailed
    from ride_bf.evaluation.routing import draw, measure
    from ride_bf.runs.models import load_model

    logging.disable_progress_bar()
    with errors_as_messages():
        model = load_model(options.model)
        if model.router is None:
            raise ValueError(f"{options.model} has no router; train one with a recipe whose name ends in _router")
        splits = load_long_tailed(recipe.dataset, **run.data_options())
        if "validation" not in splits:
            raise ValueError(f"{recipe.dataset} has no validation images; pass --validation_fraction")
        if options.set_threshold is not None:
            model.config.router_threshold = options.set_threshold
            model.config.save_pretrained(options.model)
    processor = AutoImageProcessor.from_pretrained(options.model)
    batches = list(evaluation_batches(splits["validation"], processor, options.batch, run.num_workers))
    pixel_values = torch.cat([batch["pixel_values"] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches]).numpy()
    curve = measure(model, pixel_values, labels, class_counts(splits["train"]), options.batch)

    output_dir = options.output_dir or options.model
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "routing.json").write_text(json.dumps(curve, indent=2) + "\n")
    draw(curve, output_dir / "routing.png")
    print(f"{'threshold':>9} {'balanced':>9} {'experts':>8} {'multiply-adds':>14} {'images/s':>9}")
    for point in curve:
        print(
            f"{point['threshold']:>9g} {100 * point['balanced_accuracy']:>7.1f} % {point['mean_experts']:>8.2f} "
            f"{round(point['multiply_adds']):>14,} {point['images_per_second']:>9.0f}"
        )
    print(output_dir / "routing.png")


if __name__ == "__main__":
    main()
