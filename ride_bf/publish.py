"""Publish a trained model on the Hugging Face Hub: `python -m ride_bf.publish DIR --repo_id user/name`.

DIR is a run's output folder or a checkpoint's. What is uploaded, in one commit or not at all: weights, code, image
processor, a card made from the run's files, results, plots, the training images of each class, and the handler for
Inference Endpoints. `--dry_run --output_dir OUT` writes it to a folder instead. Log in first, by `hf auth login` or
with HF_TOKEN in the environment. What is there already is not uploaded again: a command that failed can be repeated.
"""

import argparse
import tempfile
from pathlib import Path

from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("publish", __doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a run's output folder, or a checkpoint's")
    parser.add_argument("--repo_id", required=True, help="USER/NAME of the repository on the Hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to publish to; it is made if there is none")
    parser.add_argument("--license", default="mit", help="of the weights, by the Hub's identifier")
    parser.add_argument("--examples", type=Path, nargs="+", help="image files to show on the page; you publish them")
    parser.add_argument("--keep_batchformer", action="store_true", help="for those who want to train on")
    parser.add_argument("--onnx", action="store_true", help="add model.onnx; needs requirements-extras.txt")
    parser.add_argument("--space", help="USER/NAME of a Space to publish too: a page to try the model on")
    parser.add_argument("--dry_run", action="store_true", help="upload nothing; list what would be")
    parser.add_argument("--output_dir", type=Path, help="keep the files here; a folder that is new or empty")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from transformers.utils import logging

    from data.hub_ids import check_repo_id
    from ride_bf.hub.export import default_examples, export
    from ride_bf.hub.run_files import read_saved_run
    from ride_bf.hub.upload import PublishError, check_login, upload, write_space

    logging.disable_progress_bar()
    expected = (PublishError, ModuleNotFoundError, RuntimeError)
    with errors_as_messages(), errors_as_messages(*expected), tempfile.TemporaryDirectory() as temporary:
        for option, name in (("--repo_id", options.repo_id), ("--space", options.space)):
            if name is not None:
                check_repo_id(name, option)
        if not options.dry_run:
            check_login()
        folder = options.output_dir or Path(temporary) / "model"
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty; name another --output_dir")
        saved = read_saved_run(options.folder)
        export(
            saved,
            folder,
            options.repo_id,
            license=options.license,
            examples=default_examples(saved) if options.examples is None else options.examples,
            keep_batchformer=options.keep_batchformer,
            onnx=options.onnx,
        )
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"{path.stat().st_size:>12,}  {path.relative_to(folder)}")
        if options.dry_run:
            print(f"Nothing was uploaded; this is what {options.repo_id} would have.")
            return
        address = upload(folder, options.repo_id, private=options.private, revision=options.revision)
        if options.space is not None:
            write_space(Path(temporary) / "space", options.repo_id)
            upload(Path(temporary) / "space", options.space, private=options.private, repo_type="space")
        print(f"Published: {address}")


if __name__ == "__main__":
    main()
