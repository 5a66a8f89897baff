"""Correct a trained classifier for the long tail without training: tau-normalisation and post-hoc logit adjustment.

    python -m ride_bf.decouple tau_normalisation MODEL --output_dir OUT [--strength T]
    python -m ride_bf.decouple logit_adjustment  MODEL --output_dir OUT [--strength T]

MODEL is a run's output folder, a checkpoint's folder or a Hub id. By default the strength is chosen on the validation
images, never on the test images. To use several processes: `accelerate launch -m ride_bf.decouple ...`. To train the
classifiers alone, use `train_accelerate.py --train_only classifiers` (cRT) or `--train_only class_scales` (learnable
weight scaling).
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
    parser = command_parser("decouple", __doc__)
    parser.add_argument("method", choices=("tau_normalisation", "logit_adjustment"))
    parser.add_argument("model", help="a trained model with linear classifiers")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder for the corrected model; it must be new or empty"
    )
    parser.add_argument("--strength", type=float, help="tau; by default chosen on the validation images")
    add_loader_options(parser)
    add_data_options(parser)
    options = parser.parse_args(arguments)
    check_loader_options(parser, options)
    from transformers.utils import logging

    from data import BrokenImageError, FinishedBatches, evaluation_batches
    from data.notices import printed_notices
    from ride_bf.evaluation.decoupling import check_linear, choose_strength, correct, evaluate_both
    from ride_bf.evaluation.tables import shot_summary
    from ride_bf.runs.checkpoints import save_model
    from ride_bf.runs.engine import start_accelerator
    from ride_bf.runs.models import check_classes, find_model, load_model, load_processor
    from ride_bf.runs.provenance import CORRECTION, DATA, load_splits_of, read_checkpoint_facts

    logging.disable_progress_bar()
    with errors_as_messages():
        if options.output_dir.exists() and any(options.output_dir.iterdir()):
            raise ValueError(f"{options.output_dir} is not empty; name another --output_dir")
        accelerator = start_accelerator()
        place = find_model(options.model)
        model, processor = load_model(place), load_processor(place)
        check_linear(model, options.method)
        # the other processes use the cache of the first
        with accelerator.main_process_first(), printed_notices(accelerator.print):
            splits, data = load_splits_of(place, **given_data_options(options))
        if options.strength is None and "validation" not in splits:
            raise ValueError(f"{place} has no validation images to choose the strength on: pass --strength")
        check_classes(model, data.class_names, f"the model {place}")
    method, strength, counts = options.method, options.strength, data.train_class_counts
    prepared = accelerator.prepare_model(model, evaluation_mode=True)

    def loader(split: str) -> FinishedBatches:
        return evaluation_batches(
            splits[split],
            processor,
            options.batch_size,
            options.num_workers,
            accelerator,
            data.on_broken(options.on_broken_image),
            data.max_image_pixels,
        )

    curve = {}
    with errors_as_messages(BrokenImageError, FloatingPointError, ValueError):
        if strength is None:
            curve = choose_strength(prepared, method, loader("validation"), accelerator, counts)
            strength = max(curve, key=lambda tau: (curve[tau], -tau))  # of equal strengths, the smallest correction
            accelerator.print(
                f"{method}: {strength} is best of {len(curve)} strengths on {len(splits['validation'])} images"
            )
        before, after = evaluate_both(prepared, method, strength, loader("test"), accelerator, counts)
    facts = {name: value for name, value in read_checkpoint_facts(place).items() if name != "balanced_accuracy"}
    facts |= {DATA: data.as_dict(), CORRECTION: {"method": method, "strength": strength}}
    correct(model, method, strength, counts)
    with errors_as_messages():
        save_model(options.output_dir, accelerator, prepared, processor, facts)
        if accelerator.is_main_process:
            results = {"method": method, "strength": strength, "validation_balanced_accuracy": curve}
            results |= {"test_before": before, "test": after}
            (options.output_dir / "decoupling.json").write_text(json.dumps(results, indent=2) + "\n")
    accelerator.print(f"test before: {shot_summary(before)}")
    accelerator.print(f"test after:  {shot_summary(after)}")
    accelerator.print(options.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
