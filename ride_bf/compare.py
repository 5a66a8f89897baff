"""Compare models on the same test images: `python -m ride_bf.compare A B [C ...]`.

First evaluate each model with `python -m ride_bf.evaluate`. A, B, C are output folders of runs, folders that
`ride_bf.evaluate` wrote, or `results.json` files. Each model is compared with the first one. The table shows the
difference of every accuracy with a confidence interval, from a bootstrap that draws the same images for both models.
The interval covers the choice of test images.

To see the effect of the training seed, train each method several times: `python -m ride_bf.compare --a CE_0 CE_1 ...
--b RIDE_0 RIDE_1 ...` compares the runs in pairs, of equal seeds if these are known. The two runs of a pair must have
the same images; other pairs may have other splits.
"""

import argparse
import json
from pathlib import Path

from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("compare", __doc__)
    parser.add_argument("models", type=Path, metavar="A B", nargs="*", help="models, two or more")
    parser.add_argument("--a", type=Path, metavar="RUN", nargs="+", help="runs of one method")
    parser.add_argument("--b", type=Path, metavar="RUN", nargs="+", help="as many runs of another method")
    parser.add_argument("--output", type=Path, help="JSON file to write the numbers to")
    options = parser.parse_args(arguments)
    of_models, of_runs = len(options.models) > 1, bool(options.a and options.b)
    if of_models == of_runs or (options.models and of_runs) or (of_models and (options.a or options.b)):
        parser.error("name two models or more, or the runs of two methods with --a and --b")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    from ride_bf.evaluation.comparison import compare, compare_runs, runs_table, table

    with errors_as_messages():
        compared = compare_runs(options.a, options.b) if options.a else compare(options.models)
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(compared, indent=1) + "\n")
    level = f"{100 * compared['level']:.0f} %"
    if options.a:
        shown = "\n".join("A: {a}, B: {b}".format(**pair) for pair in compared["pairs"])
        print(f"{compared['dataset']}'s {compared['split']} split; pairs by {compared['paired_by']}:\n{shown}\n")
        print(runs_table(compared))
        for models in compared["equal_runs"]:
            print(
                f"\nnote: {', '.join(models)} predict the same, so they are one run. The standard error "
                "says nothing\nof other seeds."
            )
        print(
            "\nMeans over the runs in percent (the loss as it is); differences of the pairs with their standard error, "
            f"and how many are\nabove 0; {level} interval of the mean difference over test images."
        )
        return
    print(
        f"{compared['num_images']:,} images of {compared['dataset']}'s {compared['split']} split; accuracy in percent\n"
    )
    print(table(compared))
    print(
        f"\nDifferences in points with their {level} interval over test images, bold where it excludes 0.\n"
        "Another training seed may change them by more: compare several runs of each method with --a and --b."
    )


if __name__ == "__main__":
    main()
