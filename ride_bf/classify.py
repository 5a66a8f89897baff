"""Classify image files with a saved model: `python -m ride_bf.classify MODEL IMAGE [IMAGE ...]`."""

import argparse
from pathlib import Path

from transformers import pipeline
from transformers.utils import logging


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a checkpoint, or a model id on the Hub; its code is run")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--top_k", type=int, default=3, help="classes to print for each image")
    options = parser.parse_args(arguments)
    missing = [str(path) for path in options.images if not path.is_file()]
    if missing:
        parser.error(f"no such image file: {', '.join(missing)}")

    logging.disable_progress_bar()
    classifier = pipeline("image-classification", model=options.model, trust_remote_code=True)
    for path in options.images:
        answers = classifier(str(path), top_k=options.top_k)
        print(f"{path}: " + ", ".join(f"{answer['label']} ({100 * answer['score']:.1f} %)" for answer in answers))


if __name__ == "__main__":
    main()
