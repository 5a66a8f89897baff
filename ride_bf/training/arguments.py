"""The training command's arguments: how to run, which recipe, and what to override in it."""

import difflib
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

from data.sets import data_options, with_option
from ride_bf.command_line.options import (
    Option,
    OptionParser,
    add_options,
    check_values,
    only_with,
    option,
    options_of,
    with_underscores,
)
from ride_bf.recipes import DEFAULT_RECIPE, RECIPES, TrainingRecipe
from ride_bf.recipes.network_options import NETWORK_DEFAULTS, NetworkOptions
from ride_bf.training.effects import check_effects

# What a run can go on with in another way and still be one run: --allow_changes.
SOUND_CHANGES = ("num_processes", "mixed_precision", "data_dir", "epochs")

_HEADINGS = {
    "run": "What is run, and how.",
    "data": "What it is run on. python -m ride_bf.check_data tells whether the data are in order.",
    "start": "Models to start from and to learn from.",
    "checkpoints and evaluation": None,
    "Hub": None,
    "optimisation": "The recipe: everything from here on changes it.",
    "loss": None,
    "sampling": None,
    "images": None,
    "distillation": None,
    "network": None,
    "BatchFormer": None,
    "router": "Expert assignment: which images need a later expert.",
}
_run = partial(option, group="run")
_data = partial(option, group="data")
_start = partial(option, group="start", metavar="MODEL")
_checkpoints = partial(option, group="checkpoints and evaluation")
_hub = partial(option, group="Hub")


@dataclass(kw_only=True)
class RunArguments:
    """How and where to run a recipe. Raises ValueError, naming option and value, for what cannot be."""

    recipe: str = _run(f"one of {', '.join(RECIPES)}", DEFAULT_RECIPE, metavar="NAME")
    recipe_file: str | None = _run(
        "a recipe as --print_recipe prints it, or one of the authors' config.json files", None, metavar="FILE"
    )
    print_recipe: bool = _run("print the recipe with its overrides, and stop", False)
    dry_run: bool = _run("print what would be trained, on what, at what cost and memory, and stop", False)
    output_dir: str | None = _run("folder of the results; outputs/RECIPE if it is not given", None, metavar="DIR")
    overwrite_output_dir: bool = _run("delete the run that output_dir holds", False)
    resume: bool = _run("go on from the last checkpoint in output_dir", False)
    allow_changes: list[str] | None = _run(  # noqa: RUF009
        f"what may differ from the run so far: {', '.join(SOUND_CHANGES)}", None, needs=(only_with("resume", True),)
    )
    max_steps: int | None = _run("steps after which the run ends, whatever its epochs", None, must_be="1 or more")
    seed: int = _run("seed of initialisation, order, augmentation and dropout", 0, must_be="0 to 4294967295")
    deterministic: bool = _run("use operations that give the same bits every time; slower on a GPU", False)
    num_workers: int = _run(
        "number of processes that prepare images, for each training process", 0, must_be="0 or more"
    )
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = _run(
        "tracker that is told losses and accuracies, through Accelerate", "tensorboard"
    )
    logging_steps: int = _run("steps between two losses that the tracker is told", 10, must_be="1 or more")

    data_dir: str | None = _data(
        "folder of the data set's lists and images, if it is not in its usual place in data/; with --dataset custom a "
        "folder, a table or a data set's id on the Hub",
        None,
        metavar="PLACE",
    )
    validation_fraction: float | None = _data(
        "share of the training images on which the best epoch is chosen, for a data set without a validation split",
        None,
        must_be="between 0 and 1",
    )
    on_broken_image: Literal["stop", "skip"] = _data(
        "what to do where an image cannot be read; skip: leave it out and list it in the results", "stop"
    )
    dataset_options: dict[str, Any] = field(default_factory=dict)
    """Options of the data set itself, by name."""

    init_from: str | None = _start(
        "folder or Hub id of a model to start from; its code is not run", None, metavar="MODEL"
    )
    teacher: str | None = _start(
        "folder or Hub id of an image classifier to distil from; its code is run", None, metavar="MODEL"
    )

    save_steps: int | None = _checkpoints(
        "steps between checkpoints, beside those at the ends of epochs", None, must_be="1 or more"
    )
    keep_last: int = _checkpoints(
        "number of checkpoints to go on from that are kept, the newest included", 2, must_be="1 or more"
    )
    eval_steps: int | None = _checkpoints(
        "steps between evaluations on the validation images, beside those at the ends of epochs",
        None,
        must_be="1 or more",
    )
    early_stopping_patience: int | None = _checkpoints(
        "number of evaluations without a better one after which the run ends", None, must_be="1 or more"
    )
    eval_batch_size: int = _checkpoints("images in an evaluation batch of one process", 256, must_be="1 or more")

    push_to_hub: str | None = _hub("repository on the Hub to which the model is published", None, metavar="USER/NAME")
    push_every: int | None = _hub(
        "epochs between two publications before the end", None, must_be="1 or more", needs=(only_with("push_to_hub"),)
    )
    push_private: bool = _hub("make a new repository on the Hub private", False, needs=(only_with("push_to_hub"),))

    given: frozenset[str] = field(default=frozenset(), repr=False)
    """The options that the command line gave, the recipe's and the network's too."""

    def __post_init__(self):
        check_values(self)
        if self.output_dir is None:
            name = self.recipe if self.recipe_file is None else Path(self.recipe_file).stem
            self.output_dir = str(Path("outputs") / name)
        unsound = sorted(set(self.allow_changes or ()) - set(SOUND_CHANGES))
        if unsound:
            raise ValueError(f"a run cannot go on with other {unsound}; it can with other {', '.join(SOUND_CHANGES)}")
        if self.resume and self.overwrite_output_dir:
            raise ValueError("--overwrite_output_dir deletes the run with which --resume goes on; give one of them")

    def data_options(self) -> dict[str, Any]:
        """What `data.load_long_tailed` is to be told beside the data set's name: the options that were given."""
        given = {name: value for name, value in self.dataset_options.items() if value not in (None, False)}
        return {"data_dir": self.data_dir, "validation_fraction": self.validation_fraction, **given}

    def settings(self) -> dict[str, Any]:
        """What a result depends on beside the recipe."""
        return {"seed": self.seed, **self.data_options(), "init_from": self.init_from, "teacher": self.teacher}


def check_starting_models(run: RunArguments, recipe: TrainingRecipe) -> None:
    """Raises ValueError if the recipe needs a model to start from or to learn from that the run does not name."""
    if recipe.train_only != "all" and run.init_from is None:
        raise ValueError(f"train_only {recipe.train_only!r} needs a trained model: name it with --init_from")
    if recipe.needs_teacher and run.teacher is None:
        raise ValueError(f"{recipe.name} is a recipe of distillation: name the teacher with --teacher")
    if recipe.train_only == "router" and run.teacher is not None:
        raise ValueError("a router learns from the experts' mistakes, not from a --teacher")


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[RunArguments, TrainingRecipe]:
    """The run's arguments and its recipe with the command line's overrides.

    Exits with a message for an unknown recipe or option, an impossible value, a network that cannot be built, and an
    option that would do nothing.
    """
    words = with_underscores(sys.argv[1:] if arguments is None else arguments)
    recipe = _chosen_recipe(words)
    parser = _parser(recipe)
    parsed, unknown = parser.parse_known_args(words)
    if unknown:
        close = difflib.get_close_matches(unknown[0].lstrip("-"), parser.names, n=1)
        hint = f"; did you mean --{close[0]}?" if close else ""
        parser.error(f"unknown arguments {unknown}{hint}\nknown: {' '.join(sorted(parser.names))}")
    given = vars(parsed)
    try:
        own = {name: given[name] for name in options_of(RunArguments) if name in given}
        of_data = {name: given[name] for name in data_options() if name in given}
        run = RunArguments(**own, dataset_options=of_data, given=frozenset(given))
        recipe = recipe.with_overrides(**_changes(recipe, given))
        recipe.check_network()
        check_effects(run, recipe, given)
    except ValueError as error:
        parser.error(str(error))
    return run, recipe


def _chosen_recipe(words: list[str]) -> TrainingRecipe:
    chooser = OptionParser(add_help=False)
    hints = get_type_hints(RunArguments)
    for name in ("recipe", "recipe_file"):
        chooser.add_option(name, hints[name], options_of(RunArguments)[name], None)
    chosen = vars(chooser.parse_known_args(words)[0])
    if len(chosen) == 2:
        chooser.error("--recipe and --recipe_file name two recipes; give one of them")
    if chosen.get("recipe_file") is None:
        name = chosen.get("recipe", DEFAULT_RECIPE)
        if name not in RECIPES:
            chooser.error(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
        return RECIPES[name]
    if not chosen["recipe_file"]:
        chooser.error("recipe_file is empty; give it a value or leave it out")
    from ride_bf.reference.configurations import read_recipe_file

    try:
        return read_recipe_file(Path(chosen["recipe_file"]))
    except ValueError as error:
        chooser.error(str(error))


def _parser(recipe: TrainingRecipe) -> OptionParser:
    """A parser of every option there is; the recipe's own values are its defaults."""
    parser = OptionParser(
        usage="accelerate launch train_accelerate.py [--recipe NAME] [--OPTION VALUE ...]",
        description="Train a long-tailed image classifier. The defaults below are those of the recipe "
        f"{recipe.name}.\n\n{recipe.description}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    for title, description in _HEADINGS.items():
        parser.add_heading(title, description)
    add_options(parser, NetworkOptions, NETWORK_DEFAULTS | recipe.network)
    add_options(parser, TrainingRecipe, vars(recipe))
    add_options(parser, RunArguments, {f.name: f.default for f in fields(RunArguments)})
    for name, of_data in data_options().items():
        facts = Option(
            help=f"{of_data.help}; only with --dataset {' or '.join(with_option(name))}",
            group="data",
            choices=None if of_data.choices is None else partial(list, of_data.choices),
        )
        parser.add_option(name, of_data.kind if of_data.kind is bool else of_data.kind | None, facts, None)
    return parser


def _changes(recipe: TrainingRecipe, given: dict[str, Any]) -> dict[str, Any]:
    """What the command line changes in a recipe and its network.

    What the network is already need not be written down: a recipe names what differs from `RideBfConfig`'s defaults.
    """
    own = {name: given[name] for name in options_of(TrainingRecipe) if name in given}
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
    network = {name: given[name] for name in options_of(NetworkOptions) if name in given}
    as_is = {name: recipe.network_value(name) for name in network}
    as_is = {name: list(value) if isinstance(value, tuple) else value for name, value in as_is.items()}
    return own | {name: value for name, value in network.items() if value != as_is[name]}
