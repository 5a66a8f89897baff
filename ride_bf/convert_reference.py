"""Convert checkpoints of the authors' code, RIDE's and BatchFormer's, to ours and back.

    python -m ride_bf.convert_reference PATH/model_best.pth --output_dir OUT [--config PATH/config.json]
    python -m ride_bf.convert_reference OUT --to_reference --output_dir BACK

The authors' file is read as data. Objects that are pickled in it become inert stand-ins, nothing of it is executed,
and a file that asks for anything their code does not put there is refused.
"""

import argparse
from pathlib import Path

from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("convert_reference", __doc__)
    parser.add_argument("path", type=Path, help="the authors' .pth file; with --to_reference, a folder of ours")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--config", type=Path, help="their config.json, if it is not beside the file")
    parser.add_argument("--batchformer", choices=["insert", "shared_classifier"], help="where no config.json tells")
    parser.add_argument("--to_reference", action="store_true", help="the other way round")
    options = parser.parse_args(arguments)
    if not options.path.exists():
        parser.error(f"{options.path} does not exist")
    if options.path.is_dir() != options.to_reference:
        parser.error(
            f"{options.path} is a file; --to_reference takes the folder of a model of ours"
            if options.to_reference
            else f"{options.path} is a folder; name the .pth file in it, or pass --to_reference for the other way"
        )
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from transformers.utils import logging

    from ride_bf.reference.checkpoints import convert, to_reference
    from ride_bf.reference.configurations import ConversionError

    logging.disable_progress_bar()
    with errors_as_messages(ConversionError):
        if options.to_reference:
            to_reference(options.path, options.output_dir)
        else:
            convert(options.path, options.output_dir, options.config, options.batchformer)
    print(options.output_dir)


if __name__ == "__main__":
    main()
