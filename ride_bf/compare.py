"""Compare models on the same test images: `python -m ride_bf.compare A B [C ...]`.

First evaluate each model with `python -m ride_bf.evaluate`. A, B, C are output folders of runs, folders that
`ride_bf.evaluate` wrote, or `results.json` files. Each model is compared with the first one. The table shows the
difference of every accuracy with a confidence interval, from a bootstrap that draws the same images for both models.
The interval covers the choice of test images. To see the effect of the training seed, compare several runs.
"""

import argparse
import json
from pathlib import Path

from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("compare", __doc__)
    parser.add_argument("first", type=Path, metavar="A")
    parser.add_argument("others", type=Path, nargs="+", metavar="B")
    parser.add_argument("--output", type=Path, help="JSON file to write the numbers to")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from ride_bf.evaluation.comparison import compare, table

    with errors_as_messages():
        compared = compare([options.first, *options.others])
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(compared, indent=1) + "\n")
    print(
        f"{compared['num_images']:,} images of {compared['dataset']}'s {compared['split']} split; accuracy in percent\n"
    )
    print(table(compared))
    print(
        f"\nDifferences in points with their {100 * compared['level']:.0f} % interval over test images, bold where it "
        "excludes 0.\nAnother training seed may change them by more: compare several runs of each model."
    )


if __name__ == "__main__":
    main()
