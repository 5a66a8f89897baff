"""Evaluate a model on frequent and rare classes: `python -m ride_bf.evaluate RUN_OR_CHECKPOINT_OR_HUB_ID`.

Writes `results.json`, with the keys that `ride_bf.evaluation.results` describes; `report.html`, a report in a single
file; and `predictions.npz` and `log_probabilities.npy`, from which `python -m ride_bf.compare` compares models image by
image, and `--predictions FOLDER` computes all numbers again. To use several processes: `accelerate launch -m
ride_bf.evaluate ...`. The BatchFormer is not used for predictions.

By default the images come from the data set that the model was trained on. `--other_images` evaluates it on another
data set with the same classes. The training images of the model always determine which classes are many-, medium- and
few-shot.
"""

from ride_bf.command_line.data_options import given_data_options
from ride_bf.command_line.evaluate_options import AGAIN, parse_options
from ride_bf.command_line.messages import errors_as_messages


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(__doc__, arguments)
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
            print(describe(*evaluate_again(*(getattr(options, name) for name in AGAIN))))
        return
    with errors_as_messages():
        accelerator = start_accelerator()
        place = find_model(options.model)
        model, processor = load_model(place), load_processor(place)
        # the other processes use the cache of the first
        with accelerator.main_process_first(), printed_notices(accelerator.print):
            data = load_data_to_evaluate(place, options.split, options.other_images, **given_data_options(options))
        check_classes(model, data.class_names, f"the model {place}")
        neighbours = read_neighbours(results_folder(place) / EMBEDDINGS, model, place) if options.neighbours else None
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
