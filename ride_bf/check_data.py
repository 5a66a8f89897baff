"""Check a data set before training: `python -m ride_bf.check_data --data_dir DIR [--dataset NAME] [--output_dir OUT]`.

Reads every image of every split as training does. Prints a summary. Writes a page with pictures of what was found,
`check_data.html`, the full report, `check_data.json`, a plot, `long_tail.png`, and lists of images for `--exclude`:
`two_labels.txt` and `broken.txt`. What was read is kept in the cache of the datasets library: after an interruption
the same command continues. The exit code is 0 if training can start, and 1 if lists are wrong or images are broken.
"""

import argparse
import json
import os
from pathlib import Path

from data.command_line import add_broken_image_option
from data.formats import MAX_IMAGE_PIXELS
from ride_bf.command_line.data_options import add_data_options, given_data_options
from ride_bf.command_line.messages import errors_as_messages, stops_as_messages
from ride_bf.command_line.parser import command_parser

_DATA = (
    "The data to check, with the options of training. Without --dataset it is the one whose files are in --data_dir."
)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("check_data", __doc__)
    add_data_options(parser, _DATA)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("outputs/check_data"), help="folder for the report")
    help = "name the classes with fewer than K images in all splits together (default: 2)"
    add("--min_images", type=int, default=2, metavar="K", help=help)
    add("--num_workers", type=int, default=os.cpu_count(), help="processes that read; by default one a core")
    add_broken_image_option(parser, "stop", "what training will do (default: stop)")
    options = parser.parse_args(arguments)
    if options.data_dir is None and options.dataset is None:
        parser.error("name the data: --data_dir, --dataset or both")
    if options.num_workers < 1:
        parser.error(f"--num_workers is the number of processes that read, 1 or more, not {options.num_workers}")
    if options.min_images < 1:
        parser.error(f"--min_images is the least number of images of a class, 1 or more, not {options.min_images}")
    if options.streaming:
        parser.error(
            "--streaming: the images of a stream are read only while training, so they cannot be checked. To check a "
            "data set on the Hub, leave --streaming out, and it is stored on the disk. To check tar archives, unpack "
            "them into class folders. To train without a check, use --on_broken_image skip, which names broken images"
        )
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from data import find_entry, list_facts, recognise
    from data.notices import printed_notices
    from data.sets import PERCEPTUAL, get_data_set
    from ride_bf.evaluation.data_page import write_data_page
    from ride_bf.evaluation.data_report import DataReport, draw, load_to_check, refusal, summary

    given = given_data_options(options)
    given.pop("dataset", None)
    data_dir = given.pop("data_dir", None)
    max_image_pixels = given.pop("max_image_pixels", MAX_IMAGE_PIXELS)
    skips = options.on_broken_image == "skip"
    with (
        errors_as_messages(ValueError, OSError, ModuleNotFoundError),
        stops_as_messages("the same command continues where it stopped"),
    ):
        name = options.dataset or recognise(data_dir)
        with printed_notices() as notices:
            splits = load_to_check(name, data_dir, **given)
        data = DataReport(
            splits,
            options.num_workers,
            lambda path: find_entry(name, data_dir, path, options.lists),
            get_data_set(name).place(data_dir),
            options.min_images,
            similar=options.group_by == PERCEPTUAL,
            max_image_pixels=max_image_pixels,
            skip_broken=skips,
        )
        report = {"dataset": name, "data_dir": data_dir, "options": given, "notices": notices, **data.to_dict()}
        options.output_dir.mkdir(parents=True, exist_ok=True)
        file, picture = options.output_dir / "check_data.json", options.output_dir / "long_tail.png"
        report["annotation_lists"] = list_facts(name, data_dir, options.lists)
        report["lists"] = data.write_lists(options.output_dir, options.exclude)
        file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draw(report["classes"], name, picture)
        page = write_data_page(report, data.pixels_of, options.output_dir)
    print(f"{name}{f' in {data_dir}' if data_dir else ''}\n\n{summary(report)}\n")
    for facts in report["annotation_lists"].values():
        known = {True: ", the public list", False: ", not the public list", None: ""}[facts["known"]]
        print(f"list {facts['file']}: {facts['images']:,} images, digest {facts['digest']}{known}")
    print(f"page: {page}\nfull report: {file}\nlong tail: {picture}")
    if not data.may_start:
        raise SystemExit(f"error: {refusal(report)}")
    print(f"Training may start{' with --on_broken_image skip' if skips else ''}.")


if __name__ == "__main__":
    main()
