"""Write the features of a model for every image: `python -m ride_bf.embed RUN_OR_CHECKPOINT_OR_HUB_ID`.

Writes a Parquet file with path, label, split, prediction, score and feature of each image, which
`ride_bf.evaluation.embedding` describes. Prints the accuracy of the nearest training images beside that of the
classifier, by shot group. Beside the file it writes the images whose label is likely wrong: as a page with pictures,
`FILE_label_errors.html`, and as a list for `--exclude`, `FILE_label_errors.txt`, of those among the training images. To
use several processes: `accelerate launch -m ride_bf.embed ...`. See docs/explain.md.
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


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("embed", __doc__)
    add = parser.add_argument
    add("model", help="output folder of a run, folder of a checkpoint or id on the Hub; its own code is not run")
    add("--output", type=Path, metavar="FILE", help="default: embeddings.parquet in the model's folder")
    add("--splits", nargs="+", metavar="SPLIT", help="splits to embed; default: all that the data set has")
    experts = "take the features of this expert, from 0; default: of all, scaled to length 1, one after another"
    add("--expert", type=int, metavar="N", help=experts)
    add_loader_options(parser)
    add_data_options(parser)
    options = parser.parse_args(arguments)
    check_loader_options(parser, options)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from transformers.utils import logging

    from data import BrokenImageError, evaluation_batches
    from data.notices import printed_notices
    from ride_bf.evaluation.embedding import EMBEDDINGS, Source, check_expert, embed_split, write_embeddings
    from ride_bf.evaluation.label_errors import describe, find_label_errors, judge, write_label_errors
    from ride_bf.runs.engine import start_accelerator
    from ride_bf.runs.models import (
        check_classes,
        find_model,
        load_model,
        load_processor,
        results_folder,
        weights_digest,
    )
    from ride_bf.runs.provenance import load_stored_splits_of

    logging.disable_progress_bar()
    with errors_as_messages():
        accelerator = start_accelerator()
        place = find_model(options.model)
        model, processor = load_model(place), load_processor(place)
        check_expert(options.expert, model.config.num_experts, model.router is not None)
        # the other processes use the cache of the first
        with accelerator.main_process_first(), printed_notices(accelerator.print):
            splits, data = load_stored_splits_of(place, options.splits, **given_data_options(options))
        check_classes(model, data.class_names, f"the model {place}")
    source = Source(weights=weights_digest(model.ride_bf), expert=options.expert, class_names=data.class_names)
    with errors_as_messages(BrokenImageError, FloatingPointError, ValueError, OSError):
        model = accelerator.prepare_model(model, evaluation_mode=True)
        embedded = {}
        for name, split in splits.items():
            broken, limit = data.on_broken(options.on_broken_image), data.max_image_pixels
            sizes = options.batch_size, options.num_workers
            loader = evaluation_batches(split, processor, *sizes, accelerator, broken, limit)
            embedded[name] = embed_split(model, split, loader, accelerator, options.expert)
        if accelerator.is_main_process:
            output = options.output or results_folder(place) / EMBEDDINGS
            write_embeddings(output, embedded, source)
            print(f"{output}: {sum(len(part.rows) for part in embedded.values()):,} images")
            judged = judge(embedded, options.expert)
            print(describe(judged, data.train_class_counts))
            errors = find_label_errors(judged)
            for path in write_label_errors(errors, judged, data, output):
                print(path)
    accelerator.end_training()


if __name__ == "__main__":
    main()
