"""Publish a trained model on the Hugging Face Hub: `python -m ride_bf.publish DIR --repo_id user/name`.

DIR is the output folder of a run or the folder of a checkpoint. One commit uploads the weights, the code, the image
processor, a model card made from the run's files, the results, the plots, the number of training images of each class,
and the handler for Inference Endpoints. No training images are published, except small copies of some by
`--publish_neighbours`. `--dry_run --output_dir OUT` writes these files to a folder instead, and the files of a Space to
`OUT_space` beside it. First log in with `hf auth login` or set HF_TOKEN. If the command fails, run it again: files that
are on the Hub already are not uploaded again.
"""

import tempfile
from pathlib import Path

from ride_bf.command_line.data_options import given_data_options
from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.publish_options import parse_options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(__doc__, arguments)
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
