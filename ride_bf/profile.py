"""Count parameters and multiply-adds: `python -m ride_bf.profile --recipe NAME [--num_labels C] [--OPTION VALUE]`.

Prints the parameters and multiply-adds of each part. The command needs no data and no weights: torch counts on meta
tensors.
"""

import json
from pathlib import Path

from ride_bf.command_line.messages import errors_as_messages
from ride_bf.command_line.parser import command_parser
from ride_bf.training.arguments import parse_arguments


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("profile", __doc__)
    parser.add_argument("--num_labels", type=int, help="number of classes; by default that of the recipe's data set")
    parser.add_argument(
        "--results", type=Path, help="a run with a router, or its test_results.json: its use of the experts is counted"
    )
    options, rest = parser.parse_known_args(arguments)
    run, recipe = parse_arguments(rest)
    from data import NUM_CLASSES
    from ride_bf.evaluation.compute import profile, table
    from ride_bf.runs.models import run_of
    from ride_bf.runs.run_folder import TEST_RESULTS
    from ride_bf.training.setup import find_backbone

    num_labels = options.num_labels or NUM_CLASSES.get(recipe.dataset)
    if num_labels is None:
        parser.error(f"the number of classes of {recipe.dataset} is not known before it is read; pass --num_labels")
    with errors_as_messages():
        backbone, recipe = find_backbone(run, recipe)
    pretrained = {} if backbone is None else {"backbone_config": backbone.config}
    parts = profile(recipe.config(num_labels=num_labels, **pretrained), recipe.image_size, recipe.window_size)
    shares = None
    if options.results is not None:
        with errors_as_messages():
            path = options.results if options.results.is_file() else run_of(options.results) / TEST_RESULTS
            shares = json.loads(path.read_text()).get("test", {}).get("experts_used")
        if shares is None:
            parser.error(f"{options.results} does not come from a network with a router")
        if "router" not in parts:
            parser.error(f"{recipe.name} has no router, but {options.results} comes from a network with one")
    print(f"{recipe.name}: {num_labels} classes, {recipe.image_size} x {recipe.image_size} pixels\n")
    print(table(parts, shares))


if __name__ == "__main__":
    main()
