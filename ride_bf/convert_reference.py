"""Convert checkpoints of the authors' code (RIDE and BatchFormer) to this library's format and back.

    python -m ride_bf.convert_reference PATH/model_best.pth --output_dir OUT [--config PATH/config.json]
    python -m ride_bf.convert_reference OUT --to_reference --output_dir BACK

The authors' file is read without executing anything in it. Pickled objects become inert placeholders. A file with
objects that the authors' code does not save is refused.
"""

import argparse
from pathlib import Path

from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("convert_reference", __doc__)
    parser.add_argument("path", type=Path, help="the authors' .pth file; with --to_reference, a run or a checkpoint")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the converted model")
    parser.add_argument("--config", type=Path, help="the authors' config.json, if it is not next to the .pth file")
    parser.add_argument(
        "--batchformer",
        choices=["insert", "shared_classifier"],
        help="how it was used, if no config.json says so",
    )
    parser.add_argument("--to_reference", action="store_true", help="convert to the authors' format instead")
    options = parser.parse_args(arguments)
    if not options.path.exists():
        parser.error(f"{options.path} does not exist")
    if options.path.is_dir() != options.to_reference:
        parser.error(
            f"{options.path} is a file; --to_reference takes the folder of a model"
            if options.to_reference
            else f"{options.path} is a folder; name the .pth file in it, or pass --to_reference to convert it"
        )
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from transformers.utils import logging

    from ride_bf.reference.checkpoints import convert, to_reference
    from ride_bf.reference.configurations import ConversionError
    from ride_bf.runs.models import find_model

    logging.disable_progress_bar()
    with errors_as_messages(), errors_as_messages(ConversionError):
        if options.to_reference:
            to_reference(Path(find_model(options.path)), options.output_dir)
        else:
            convert(options.path, options.output_dir, options.config, options.batchformer)
    print(options.output_dir)


if __name__ == "__main__":
    main()
