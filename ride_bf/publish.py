"""Publish a trained model on the Hugging Face Hub: `python -m ride_bf.publish DIR --repo_id user/name`.

DIR is the output folder of a run or the folder of a checkpoint. One commit uploads the weights, the code, the image
processor, a model card made from the run's files, the results, the plots, the number of training images of each class,
and the handler for Inference Endpoints. Nothing of the training images is published, except small copies of some by
`--publish_neighbours`. `--dry_run --output_dir OUT` writes these files to a folder instead, and the
files of a Space to `OUT_space` beside it. First log in with `hf auth login` or set HF_TOKEN. If the command fails, run
it again: files that are on the Hub already are not uploaded again.
"""

import argparse
import tempfile
from pathlib import Path

from ride_bf.command_line.data_options import add_data_options, given_data_options
from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("publish", __doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="output folder of a run, or folder of a checkpoint")
    parser.add_argument("--repo_id", required=True, help="USER/NAME of the repository on the Hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to publish to; it is created if it does not exist")
    parser.add_argument(
        "--license",
        help="licence of the weights, as an identifier of the Hub, such as mit or cc-by-nc-4.0; by default that of the "
        "model in the repository",
    )
    parser.add_argument("--license_name", metavar="NAME", help="of terms that have no identifier: --license other")
    parser.add_argument("--license_link", metavar="ADDRESS", help="where these terms are")
    parser.add_argument("--data_description", metavar="SENTENCE", help="what the training images show, for the card")
    parser.add_argument(
        "--examples", type=Path, nargs="+", help="image files to show on the page; they are published too"
    )
    parser.add_argument(
        "--keep_batchformer", action="store_true", help="keep the BatchFormer's weights, for further training"
    )
    parser.add_argument("--onnx", action="store_true", help="add model.onnx; needs requirements-extras.txt")
    parser.add_argument(
        "--publish_neighbours",
        action="store_true",
        help="publish small copies of training images, at most 50 a class, so that the page shows the nearest ones; "
        "python -m ride_bf.embed must have written the features",
    )
    parser.add_argument("--space", help="USER/NAME of a Space to publish too, a page for trying the model")
    parser.add_argument("--dry_run", action="store_true", help="upload nothing; list the files")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="keep the files in this folder, and those of a Space in OUT_space beside it; both must be new or empty",
    )
    add_data_options(parser)
    options = parser.parse_args(arguments)
    if (given := given_data_options(options)) and not options.publish_neighbours:
        parser.error(f"--{next(iter(given))} cannot act without --publish_neighbours")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from huggingface_hub.constants import ENDPOINT
    from transformers.utils import logging

    from data.hub_ids import check_repo_id
    from data.notices import printed_notices
    from ride_bf.hub.card import describe_images
    from ride_bf.hub.export import default_examples, export, list_files
    from ride_bf.hub.licences import given_licence
    from ride_bf.hub.run_files import read_saved_run
    from ride_bf.hub.upload import PublishError, check_login, is_private, published_license, upload, write_space

    logging.disable_progress_bar()
    expected = (PublishError, ModuleNotFoundError, RuntimeError)
    with errors_as_messages(), errors_as_messages(*expected), tempfile.TemporaryDirectory() as temporary:
        for option, name in (("--repo_id", options.repo_id), ("--space", options.space)):
            if name is not None:
                check_repo_id(name, option)
        license = given_licence(options.license, options.license_name, options.license_link)
        if not options.dry_run:
            check_login()
            license = license or published_license(options.repo_id, options.revision)
        folder = options.output_dir or Path(temporary) / "model"
        page = None if options.space is None else folder.with_name(f"{folder.resolve().name}_space")
        for place in filter(None, (folder, page)):
            if place.is_dir() and any(place.iterdir()):
                raise ValueError(f"{place} is not empty; name another --output_dir")
        saved = read_saved_run(options.folder)
        with printed_notices():
            published = export(
                saved,
                folder,
                options.repo_id,
                license=license,
                data_description=options.data_description,
                examples=default_examples(saved) if options.examples is None else options.examples,
                keep_batchformer=options.keep_batchformer,
                onnx=options.onnx,
                neighbours=given_data_options(options) if options.publish_neighbours else None,
            )
        if options.data_description is None and describe_images(saved) is None:
            print("note: the card does not say what the training images show; pass --data_description SENTENCE")
        print(list_files(options.repo_id, folder))
        if published.neighbours is not None:
            print(published.neighbours.describe())
        if page is not None:
            write_space(page, options.repo_id, options.revision)
            print(list_files(f"Space {options.space}", page))
        if options.dry_run:
            print("Nothing was uploaded.")
            return
        address = upload(folder, options.repo_id, private=options.private, revision=options.revision)
        if page is not None:
            upload(page, options.space, private=options.private, repo_type="space")
            link = f"{ENDPOINT}/spaces/{options.space}"
            print(f"Page: {link}")
            if is_private(options.repo_id):
                print(f"A private model needs a token: add the secret HF_TOKEN, which may read it, at {link}/settings")
        print(f"Published: {address}")


if __name__ == "__main__":
    main()
