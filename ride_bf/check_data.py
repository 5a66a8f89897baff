"""Check a data set before training: `python -m ride_bf.check_data --data_dir DIR [--dataset NAME] [--output_dir OUT]`.

Reads every image of every split as training does. Prints a summary and writes the full report, `check_data.json`, and a
plot, `long_tail.png`. The exit code is 0 if training can start, and 1 if lists are wrong or images are broken.
"""

import argparse
import json
import os
from pathlib import Path

from data.formats import MAX_IMAGE_PIXELS
from ride_bf.command_line.data_options import add_max_image_pixels
from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("check_data", __doc__)
    parser.add_argument("--data_dir", help="folder of the lists and images, or any other place that training accepts")
    parser.add_argument("--dataset", help="name of the data set; by default the one whose files are in --data_dir")
    parser.add_argument("--image_column", help="column of the images in your own table; image by default")
    parser.add_argument("--label_column", help="column of the labels in your own table; label by default")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/check_data"), help="folder for the report")
    parser.add_argument(
        "--num_workers",
        type=int,
        default=os.cpu_count(),
        help="processes that read; by default one a core",
    )
    add_max_image_pixels(parser, f"{MAX_IMAGE_PIXELS} by default")
    options = parser.parse_args(arguments)
    if options.data_dir is None and options.dataset is None:
        parser.error("name the data: --data_dir, --dataset or both")
    if options.num_workers < 1:
        parser.error(f"--num_workers is the number of processes that read, 1 or more, not {options.num_workers}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from data import find_entry, list_facts, load_long_tailed, recognise
    from ride_bf.evaluation.data_report import DataReport, draw, refusal, summary

    columns = {name: getattr(options, name) for name in ("image_column", "label_column") if getattr(options, name)}
    with errors_as_messages():
        name = options.dataset or recognise(options.data_dir)
        splits = load_long_tailed(name, options.data_dir, **columns)
        data = DataReport(
            splits,
            options.num_workers,
            lambda path: find_entry(name, options.data_dir, path),
            options.max_image_pixels or MAX_IMAGE_PIXELS,
        )
        lists = list_facts(name, options.data_dir)
        report = {"dataset": name, "data_dir": options.data_dir, "lists": lists, **data.to_dict()}
        options.output_dir.mkdir(parents=True, exist_ok=True)
        file, picture = options.output_dir / "check_data.json", options.output_dir / "long_tail.png"
        file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draw(report["classes"], name, picture)
    print(f"{name}{f' in {options.data_dir}' if options.data_dir else ''}\n\n{summary(report)}\n")
    for facts in lists.values():
        known = {True: ", the public list", False: ", not the public list", None: ""}[facts["known"]]
        print(f"list {facts['file']}: {facts['images']:,} images, digest {facts['digest']}{known}")
    print(f"full report: {file}\nlong tail: {picture}")
    if not data.may_start:
        raise SystemExit(f"error: {refusal(report)}")
    print("Training may start.")


if __name__ == "__main__":
    main()
