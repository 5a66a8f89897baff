"""Correct a trained classifier for its long tail, without training: tau-normalisation and post-hoc logit adjustment.

    python -m ride_bf.decouple tau_normalisation MODEL --recipe NAME --output_dir OUT [--strength T]
    python -m ride_bf.decouple logit_adjustment  MODEL --recipe NAME --output_dir OUT [--strength T]

The strength is chosen on the validation images, never on the test, unless it is given. The recipe names the data;
`--data_dir` and `--validation_fraction` are as in training. (Training the classifiers alone is training:
`train_accelerate.py --train_only classifiers` is cRT, `--train_only class_scales` learnable weight scaling.)
"""

import json
from pathlib import Path

from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser
from ride_bf.training.arguments import RECIPE_OPTIONS, parse_arguments


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("decouple", __doc__, epilog=RECIPE_OPTIONS)
    parser.add_argument("method", choices=("tau_normalisation", "logit_adjustment"))
    parser.add_argument("model", type=Path, help="folder of a trained model with a linear classifier")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the corrected model goes")
    parser.add_argument("--strength", type=float, help="tau; by default chosen on the validation images")
    options, rest = parser.parse_known_args(arguments)
    run, recipe = parse_arguments(rest)
    from accelerate import Accelerator
    from transformers import AutoImageProcessor
    from transformers.utils import logging

    from data import FinishedBatches, class_counts, evaluation_batches, load_long_tailed
    from ride_bf.evaluation.decoupling import check_linear, choose_strength, correct
    from ride_bf.evaluation.predict import evaluate
    from ride_bf.evaluation.tables import shot_summary
    from ride_bf.runs.models import load_model

    logging.disable_progress_bar()
    with errors_as_messages():
        splits = load_long_tailed(recipe.dataset, **run.data_options())
        counts = class_counts(splits["train"])
        model = load_model(options.model)
        check_linear(model, options.method)
        if options.strength is None and "validation" not in splits:
            raise ValueError(f"{recipe.dataset} has no validation images: pass --validation_fraction or --strength")
        if model.config.num_labels != len(counts):
            raise ValueError(f"{options.model} has {model.config.num_labels} classes, the data {len(counts)}")
    processor = AutoImageProcessor.from_pretrained(options.model)

    def loader(split: str) -> FinishedBatches:
        return evaluation_batches(splits[split], processor, run.eval_batch_size, run.num_workers)

    strength, curve = options.strength, {}
    if strength is None:
        curve = choose_strength(model, options.method, loader("validation"), counts)
        strength = max(curve, key=lambda tau: (curve[tau], -tau))  # of equals the least correction
        print(f"{options.method}: {strength} is best of {len(curve)} strengths on {len(splits['validation'])} images")
    accelerator = Accelerator(cpu=True)
    results = {"method": options.method, "strength": strength, "validation_balanced_accuracy": curve}
    results["test_before"] = evaluate(model, loader("test"), accelerator, counts)
    correct(model, options.method, strength, counts)
    results["test"] = evaluate(model, loader("test"), accelerator, counts)
    model.save_pretrained(options.output_dir)
    processor.save_pretrained(options.output_dir)
    (options.output_dir / "decoupling.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"test before: {shot_summary(results['test_before'])}")
    print(f"test after:  {shot_summary(results['test'])}")
    print(options.output_dir)


if __name__ == "__main__":
    main()
