"""The arguments of the training command: how to run, which recipe, and what to override in it."""

import difflib
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

from data.command_line import of_broken_images
from data.formats import MAX_IMAGE_PIXELS, MAX_IMAGE_PIXELS_HELP
from data.sets import SPLIT_OPTIONS, data_options, with_option
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
from ride_bf.recipes import DEFAULT_RECIPE, OWN_IMAGES_RECIPE, RECIPES, TrainingRecipe
from ride_bf.recipes.network_options import NETWORK_DEFAULTS, NetworkOptions
from ride_bf.runs.changes import SOUND_CHANGES
from ride_bf.training.effects import check_effects

_HEADINGS = {
    "run": "What to run, and how.",
    "data": "What to train on. Check your data with python -m ride_bf.check_data.",
    "start": "Models to start from and to learn from.",
    "checkpoints and evaluation": None,
    "Hub": None,
    "optimisation": "The recipe: everything from here on changes it.",
    "loss": None,
    "sampling": None,
    "images": None,
    "distillation": None,
    "backbone": "A pre-trained network in place of the residual one.",
    "network": None,
    "BatchFormer": None,
    "router": "Expert assignment: which images need a later expert.",
}
_SPLIT_HELP = {of_data.name: of_data.help for of_data in SPLIT_OPTIONS}
_run = partial(option, group="run")
_data = partial(option, group="data")
_start = partial(option, group="start", metavar="MODEL")
_checkpoints = partial(option, group="checkpoints and evaluation")
_hub = partial(option, group="Hub")


@dataclass(kw_only=True)
class RunArguments:
    """How and where to run a recipe. Raises ValueError for an invalid value, naming the option and the value."""

    recipe: str = _run(
        f"one of {', '.join(RECIPES)}; with --data_dir or --dataset custom alone {OWN_IMAGES_RECIPE}",
        DEFAULT_RECIPE,
        metavar="NAME",
    )
    recipe_file: str | None = _run(
        "a recipe as --print_recipe prints it, or one of the authors' config.json files", None, metavar="FILE"
    )
    print_recipe: bool = _run("print the recipe with its overrides, and stop", False)
    dry_run: bool = _run("print the network, the data, the cost and the memory of the run, and stop", False)
    output_dir: str | None = _run("folder for the results; outputs/RECIPE if not given", None, metavar="DIR")
    overwrite_output_dir: bool = _run("delete the run that output_dir holds", False)
    resume: bool = _run("continue from the last checkpoint in output_dir", False)
    allow_changes: list[str] | None = _run(  # noqa: RUF009
        f"what may differ when the run is resumed: {', '.join(SOUND_CHANGES)}", None, needs=(only_with("resume", True),)
    )
    max_steps: int | None = _run(
        "end the run after this many steps, even if epochs are left", None, must_be="1 or more"
    )
    seed: int = _run("seed of initialisation, order, augmentation and dropout", 0, must_be="0 to 4294967295")
    deterministic: bool = _run("use operations that give the same bits every time; slower on a GPU", False)
    num_workers: int = _run("number of processes that load images, for each training process", 0, must_be="0 or more")
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = _run(
        "tracker for losses and accuracies, through Accelerate", "tensorboard"
    )
    logging_steps: int = _run("log the loss to the tracker every N steps", 10, must_be="1 or more")

    data_dir: str | None = _data(
        "folder of your images, a table of them, or the id of a data set on the Hub; with another --dataset, the "
        "folder of its lists and images, if it is not in its usual place in data/, or hf:USER/NAME, a data set on the "
        "Hub that has the images",
        None,
        metavar="PLACE",
    )
    validation_fraction: float | None = _data(_SPLIT_HELP["validation_fraction"], None, must_be="between 0 and 1")
    group_by: str | None = _data(_SPLIT_HELP["group_by"], None, metavar="COLUMN")
    exclude: str | None = _data(_SPLIT_HELP["exclude"], None, metavar="FILE")
    class_names: str | None = _data(
        "file with readable names for the classes: a name in each line, in the order of the labels; or .json, .csv or "
        ".tsv with the name for each class, by its name in the data, its folder or its label",
        None,
        metavar="FILE",
    )
    max_image_pixels: int = _data(MAX_IMAGE_PIXELS_HELP, MAX_IMAGE_PIXELS, must_be="1 or more")
    on_broken_image: Literal["stop", "skip"] = _data(
        "what to do when an image cannot be read; skip: leave it out and list it in the results, and leave out rows of "
        "a table without image or label",
        "stop",
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
        "save a checkpoint every N steps, in addition to the end of each epoch", None, must_be="1 or more"
    )
    keep_last: int = _checkpoints(
        "number of checkpoints to keep for resuming, including the newest", 2, must_be="1 or more"
    )
    eval_steps: int | None = _checkpoints(
        "evaluate on the validation images every N steps, in addition to the end of each epoch",
        None,
        must_be="1 or more",
    )
    early_stopping_patience: int | None = _checkpoints(
        "end the run after this many evaluations without improvement", None, must_be="1 or more"
    )
    eval_batch_size: int = _checkpoints("images in an evaluation batch, for each process", 256, must_be="1 or more")

    push_to_hub: str | None = _hub("repository on the Hub to publish the model to", None, metavar="USER/NAME")
    push_license: str | None = _hub(
        "licence of the weights, as an identifier of the Hub", None, needs=(only_with("push_to_hub"),), metavar="ID"
    )
    push_every: int | None = _hub(
        "publish every N epochs, not only at the end", None, must_be="1 or more", needs=(only_with("push_to_hub"),)
    )
    push_private: bool = _hub("make a new repository on the Hub private", False, needs=(only_with("push_to_hub"),))

    given: frozenset[str] = field(default=frozenset(), repr=False)
    """Names of all options given on the command line, including those of the recipe and the network."""

    def __post_init__(self):
        check_values(self)
        if self.output_dir is None:
            name = self.recipe if self.recipe_file is None else Path(self.recipe_file).stem
            self.output_dir = str(Path("outputs") / name)
        unsound = sorted(set(self.allow_changes or ()) - set(SOUND_CHANGES))
        if unsound:
            raise ValueError(f"allow_changes cannot allow {unsound}; it can allow {', '.join(SOUND_CHANGES)}")
        if self.resume and self.overwrite_output_dir:
            raise ValueError("--overwrite_output_dir deletes the run that --resume continues; give one of them")

    def data_options(self) -> dict[str, Any]:
        """The options to pass to `data.load_long_tailed` with the name of the data set."""
        given = {name: value for name, value in self.dataset_options.items() if value not in (None, False)}
        given |= of_broken_images(self.on_broken_image)
        return {"data_dir": self.data_dir, **{name: getattr(self, name) for name in _SPLIT_HELP}, **given}

    def settings(self) -> dict[str, Any]:
        """What a result depends on, apart from the recipe."""
        of_data = self.data_options()
        of_data.pop("skip_empty_rows", None)  # the training images show whether it has left out any
        of_data["class_names"] = self.class_names
        if self.dataset_options.get("streaming"):
            of_data["num_workers"] = self.num_workers  # each reads archives of its own, in turn
        return {"seed": self.seed, **of_data, "init_from": self.init_from, "teacher": self.teacher}


def check_starting_models(run: RunArguments, recipe: TrainingRecipe) -> None:
    """Raises ValueError if the recipe needs `--init_from` or `--teacher` and the run does not give it."""
    if recipe.classifier_init != "random" and run.init_from is not None and "classifier_init" in run.given:
        raise ValueError(
            f"--classifier_init {recipe.classifier_init} would replace the class vectors of --init_from; leave one out"
        )
    if run.dataset_options.get("streaming") and run.init_from is None:
        reading = {  # name -> value, and the value that reads none
            "classifier_init": (recipe.classifier_init == "class_means" and recipe.classifier_init, "random"),
            "standardise_features": (recipe.network_value("standardise_features"), "false"),
            "feature_views": (recipe.feature_views, "none"),
        }
        if asked := {name: values for name, values in reading.items() if values[0]}:
            given = ", ".join(f"--{name} {value}" for name, (value, _) in asked.items())
            remedy = " ".join(f"--{name} {value}" for name, (_, value) in asked.items())
            raise ValueError(
                f"{given} needs the features of all training images, which --streaming does not keep; leave out "
                f"--streaming, or set {remedy}"
            )
    if recipe.train_only in ("heads", "lora") and recipe.backbone is None and run.init_from is None:
        raise ValueError(
            f"train_only {recipe.train_only} needs a trained backbone: name it with --backbone, or a model with "
            "--init_from"
        )
    if recipe.trains_a_part_of_a_model and run.init_from is None:
        raise ValueError(f"train_only {recipe.train_only!r} needs a trained model: name it with --init_from")
    if recipe.needs_teacher and run.teacher is None:
        raise ValueError(f"{recipe.name} needs a teacher: name the teacher with --teacher")
    if recipe.train_only == "router" and run.teacher is not None:
        raise ValueError("a router learns from the experts' mistakes, not from a --teacher")


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[RunArguments, TrainingRecipe]:
    """Parses the command line into the arguments of the run and the recipe with its overrides.

    Exits with a message for an unknown recipe or option, an invalid value, a network that cannot be built, and an
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
        if "recipe_file" not in own:
            own["recipe"] = recipe.name
        of_data = {name: given[name] for name in data_options() if name in given}
        run = RunArguments(**own, dataset_options=of_data, given=frozenset(given))
        recipe = recipe.with_overrides(**_changes(recipe, given))
        check_effects(run, recipe, given)
        recipe.check_network()
    except ValueError as error:
        parser.error(str(error))
    return run, recipe


def _chosen_recipe(words: list[str]) -> TrainingRecipe:
    """The recipe that the command line names; without one, that of own images if it names images, else the default."""
    chooser = OptionParser(add_help=False)
    for kind, names in ((RunArguments, ("recipe", "recipe_file", "data_dir")), (TrainingRecipe, ("dataset",))):
        hints = get_type_hints(kind)
        for name in names:
            chooser.add_option(name, hints[name], options_of(kind)[name], None)
    chosen = vars(chooser.parse_known_args(words)[0])
    if "recipe" in chosen and "recipe_file" in chosen:
        chooser.error("--recipe and --recipe_file name two recipes; give one of them")
    if chosen.get("recipe_file") is None:
        own_images = RECIPES[OWN_IMAGES_RECIPE].dataset
        named = chosen.get("dataset", own_images if chosen.get("data_dir") is not None else None)
        name = chosen.get("recipe", OWN_IMAGES_RECIPE if named == own_images else DEFAULT_RECIPE)
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
    """A parser with every option. The values of the recipe are its defaults."""
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

    Options of the network that already have the given value are left out: a recipe only lists what differs from the
    defaults of `RideBfConfig`.
    """
    own = {name: given[name] for name in options_of(TrainingRecipe) if name in given}
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
    network = {name: given[name] for name in options_of(NetworkOptions) if name in given}
    as_is = {name: recipe.network_value(name) for name in network}
    as_is = {name: list(value) if isinstance(value, tuple) else value for name, value in as_is.items()}
    return own | {name: value for name, value in network.items() if value != as_is[name]}
