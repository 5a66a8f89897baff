"""What a model is worth on rare classes: `python -m ride_bf.evaluate --model DIR_OR_HUB_ID --dataset NAME`.

Writes `results.json`, whose keys `ride_bf.evaluation.results` describes; `report.html`, the same for people, in one
file that needs no other; and `predictions.npz`, with which `python -m ride_bf.compare` compares models image by image.
Several processes share the images: `accelerate launch -m ride_bf.evaluate ...`. The BatchFormer takes no part in
predictions.
"""

import argparse
from pathlib import Path

from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a model; its code is not run")
    parser.add_argument("--dataset", required=True, help="name of the data set")
    parser.add_argument("--data_dir", help="where it is, if not in its usual place in data/; as in training")
    parser.add_argument("--split", default="test", help="test, or validation to leave the test images unseen")
    parser.add_argument("--validation_fraction", type=float, help="as in training, if it was given there")
    parser.add_argument("--imbalance_factor", type=float, help="of CIFAR, as in training")
    parser.add_argument("--imbalance_type", help="of CIFAR, as in training")
    parser.add_argument("--image_column", help="of one's own table, as in training")
    parser.add_argument("--label_column", help="of one's own table, as in training")
    parser.add_argument(
        "--output_dir", type=Path, help="by default the model's folder, or outputs/NAME for one from the Hub"
    )
    parser.add_argument("--batch_size", type=int, default=256, help="images in a batch of one process")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that prepare images, for each process")
    options = parser.parse_args(arguments)
    if options.batch_size < 1 or options.num_workers < 0:
        parser.error(
            f"--batch_size must be 1 or more and --num_workers 0 or more, not {options.batch_size} and "
            f"{options.num_workers}"
        )
    if options.output_dir is None:
        local = Path(options.model)
        options.output_dir = local if local.is_dir() else Path("outputs") / options.model.replace("/", "_")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from accelerate import Accelerator
    from transformers import AutoImageProcessor
    from transformers.utils import logging

    from data import BrokenImageError, class_counts, load_long_tailed
    from ride_bf.evaluation.html_report import REPORT
    from ride_bf.evaluation.predict import evaluate_split
    from ride_bf.evaluation.tables import accuracy_table
    from ride_bf.runs.environment import check_precision
    from ride_bf.runs.models import check_classes, load_model

    logging.disable_progress_bar()
    names = ("validation_fraction", "imbalance_factor", "imbalance_type", "image_column", "label_column")
    data_options = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    with errors_as_messages():
        accelerator = Accelerator()
        check_precision(accelerator)
        model = load_model(options.model)
        processor = AutoImageProcessor.from_pretrained(options.model)
        with accelerator.main_process_first():  # the others find the cache of the first
            splits = load_long_tailed(options.dataset, options.data_dir, **data_options)
        if options.split not in splits:
            raise ValueError(f"{options.dataset} has no split {options.split!r}; it has {', '.join(splits)}")
        counts, split = class_counts(splits["train"]), splits[options.split]
        class_names = splits["train"].features["label"].names
        check_classes(model, class_names, f"the model {options.model}")
    model = accelerator.prepare_model(model, evaluation_mode=True)
    facts = {
        "model": options.model,
        "dataset": options.dataset,
        "split": options.split,
        "dataset_options": data_options,
    }
    with errors_as_messages(BrokenImageError, FloatingPointError):
        results = evaluate_split(
            model,
            split,
            processor,
            accelerator,
            counts,
            options.output_dir,
            facts,
            options.batch_size,
            options.num_workers,
        )
    if results is not None:
        print(f"{options.model}: {len(split):,} images of {options.dataset}'s {options.split} split\n")
        print(accuracy_table(results["metrics"], counts, class_names))
        speed = results["speed"]["images_per_second"]
        print(f"\n{speed:,.0f} images/s. All the numbers: {options.output_dir / REPORT}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
