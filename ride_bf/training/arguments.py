"""The training command's arguments: how to run, which recipe, and what to override in it."""

import difflib
import inspect
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

from configuration_ride_bf import RideBfConfig
from ride_bf.recipes import DEFAULT_RECIPE, RECIPES, TrainingRecipe
from ride_bf.reference.configurations import read_recipe_file

RECIPE_OPTIONS = "Also: --recipe, --recipe_file, --data_dir and every other option of train_accelerate.py --help."


# What a run can go on with in another way and still be one run: --allow_changes.
SOUND_CHANGES = ("num_processes", "mixed_precision", "data_dir", "epochs")


@dataclass
class RunArguments:
    """How and where to run a recipe."""

    recipe: str = field(default=DEFAULT_RECIPE, metadata={"help": f"one of {', '.join(RECIPES)}"})
    recipe_file: str | None = field(
        default=None, metadata={"help": "a recipe as --print_recipe shows it, or one of the authors' config.json files"}
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "folder of the data set's lists and images, if not its usual place in data/; with --dataset custom "
            "a folder, a table or a data set's id on the Hub"
        },
    )
    imbalance_factor: float | None = field(default=None, metadata={"help": "of CIFAR: largest over smallest class"})
    imbalance_type: str | None = field(default=None, metadata={"help": "of CIFAR: exp or step"})
    image_column: str | None = field(default=None, metadata={"help": "of one's own table; image by default"})
    label_column: str | None = field(default=None, metadata={"help": "of one's own table; label by default"})
    streaming: bool = field(
        default=False,
        metadata={"help": "read tar archives or a data set on the Hub while training, never storing it"},
    )
    on_broken_image: Literal["stop", "skip"] = field(
        default="stop",
        metadata={"help": "what to do where an image cannot be read; skip leaves it out and lists it in the results"},
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={"help": "share of the training images to choose the best epoch on, if there is no validation split"},
    )
    init_from: str | None = field(
        default=None, metadata={"help": "folder or Hub id of a model to start from; its code is not run"}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "folder or Hub id of an image classifier to distil from; its code is run"}
    )
    output_dir: str | None = field(default=None, metadata={"help": "where results go; outputs/RECIPE by default"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "delete a run that output_dir holds"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in output_dir"})
    allow_changes: list[str] | None = field(
        default=None,
        metadata={"help": f"with --resume, what may differ from the run so far: {', '.join(SOUND_CHANGES)}"},
    )
    save_steps: int | None = field(default=None, metadata={"help": "steps between checkpoints, beside those of epochs"})
    keep_last: int = field(default=2, metadata={"help": "checkpoints to go on from that are kept, the newest included"})
    eval_steps: int | None = field(
        default=None, metadata={"help": "steps between evaluations on validation, beside those of epochs"}
    )
    max_steps: int | None = field(default=None, metadata={"help": "after which the run ends, whatever its epochs"})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "evaluations without a better one after which the run ends"}
    )
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = field(
        default="tensorboard", metadata={"help": "tracker of losses and accuracies, through Accelerate"}
    )
    logging_steps: int = field(default=10, metadata={"help": "steps between two losses that the tracker is told"})
    deterministic: bool = field(
        default=False, metadata={"help": "only operations that give the same bits every time; slower on a GPU"}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print what would be trained, on what, at what cost and memory, and stop"}
    )
    seed: int = field(default=0, metadata={"help": "of initialisation, order, augmentation and dropout"})
    num_workers: int = field(default=0, metadata={"help": "processes that prepare images, for each training process"})
    eval_batch_size: int = field(default=256, metadata={"help": "images in an evaluation batch of one process"})
    push_to_hub: str | None = field(
        default=None, metadata={"help": "USER/NAME of a repository on the Hub, to publish the model there in the end"}
    )
    push_every: int | None = field(default=None, metadata={"help": "publish every so many epochs too"})
    push_private: bool = field(default=False, metadata={"help": "make a new repository on the Hub private"})
    print_recipe: bool = field(default=False, metadata={"help": "print the recipe with its overrides, and stop"})

    def __post_init__(self):
        if self.output_dir is None:
            name = self.recipe if self.recipe_file is None else Path(self.recipe_file).stem
            self.output_dir = str(Path("outputs") / name)
        unsound = sorted(set(self.allow_changes or ()) - set(SOUND_CHANGES))
        if unsound:
            raise ValueError(f"a run cannot go on with other {unsound}; it can with other {', '.join(SOUND_CHANGES)}")
        for name in ("save_steps", "eval_steps", "max_steps", "early_stopping_patience", "keep_last", "logging_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value}")
        if self.num_workers < 0 or self.eval_batch_size < 1:
            raise ValueError(
                f"num_workers must be 0 or more and eval_batch_size 1 or more, not {self.num_workers} and "
                f"{self.eval_batch_size}"
            )

    def data_options(self) -> dict[str, Any]:
        """What `data.load_long_tailed` is to be told beside the data set's name: the options that were given."""
        names = ("imbalance_factor", "imbalance_type", "image_column", "label_column")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        given |= {"streaming": True} if self.streaming else {}
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


def _words_or_number(annotation: Any) -> tuple[str, ...]:
    """The words of an annotation such as `int | Literal["local", "global"]`; none of any other."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    literals = [member for member in members if get_origin(member) is Literal]
    return get_args(literals[0]) if literals and int in members else ()


def _argument_type(annotation: Any) -> Any:
    """An annotation as HfArgumentParser can take it: tuples as lists, `float | int` as float, others as str."""
    if _words_or_number(annotation):
        return str
    if get_origin(annotation) in (Union, UnionType):
        members = [_argument_type(member) for member in get_args(annotation)]
        optional = type(None) in members
        members = [member for member in members if member not in (type(None), int)] or [int]
        return members[0] | None if optional else members[0]
    if get_origin(annotation) is tuple:
        return list[get_args(annotation)[0]]
    return annotation


def _or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads the word None as None, for options that may be so."""

    def convert_or_none(text: str) -> Any:
        return None if text.lower() == "none" else convert(text)

    convert_or_none.__name__ = getattr(convert, "__name__", "value")  # for argparse's message
    return convert_or_none


def _word_or_int(words: tuple[str, ...]) -> Callable[[str], str | int]:
    """Reads one of the words as it is, anything else as a whole number."""

    def convert(text: str) -> str | int:
        if text in words or text.lstrip("-").isdecimal():
            return text if text in words else int(text)
        raise ArgumentTypeError(f"{text!r} is neither a whole number nor one of {', '.join(words)}")

    return convert


def _network_value(recipe: TrainingRecipe, option: str) -> Any:
    value = recipe.network.get(option, getattr(RideBfConfig, option))
    return list(value) if isinstance(value, tuple) else value


def _overrides(recipe: TrainingRecipe) -> tuple[type, type]:
    """Two dataclasses of what can be overridden, the recipe's own fields and its network's, with its values."""
    hints = get_type_hints(TrainingRecipe)
    own = [
        (f.name, hints[f.name], getattr(recipe, f.name), f.metadata["help"])
        for f in fields(recipe)
        if "help" in f.metadata
    ]
    meanings = dict(re.findall(r"^ {8}(\w+): (.+)$", RideBfConfig.__doc__, re.MULTILINE))
    hints = inspect.get_annotations(RideBfConfig)  # the class's own, without those of every PreTrainedConfig
    network = [(name, hint, _network_value(recipe, name), meanings[name]) for name, hint in hints.items()]

    def to_dataclass(name: str, options: list[tuple[str, Any, Any, str]]) -> type:
        members = []
        for option, hint, value, meaning in options:
            shown = list(value) if isinstance(value, tuple) else value
            default = {"default_factory": lambda shown=shown: shown} if isinstance(shown, list) else {"default": shown}
            members.append((option, _argument_type(hint), field(**default, metadata={"help": meaning})))
        return make_dataclass(name, members)

    return to_dataclass("RecipeOverrides", own), to_dataclass("NetworkOverrides", network)


def parse_arguments(arguments: list[str] | None = None) -> tuple[RunArguments, TrainingRecipe]:
    """The run's arguments and its recipe with the command line's overrides.

    Exits with a message that lists what there is for an unknown recipe or option or an impossible value.
    """
    chooser = HfArgumentParser(RunArguments, allow_abbrev=False, add_help=False)
    chosen = chooser.parse_known_args(arguments)[0]
    given = sys.argv[1:] if arguments is None else arguments
    if chosen.recipe_file is not None and any(word.split("=")[0] == "--recipe" for word in given):
        chooser.exit(2, "error: --recipe and --recipe_file name two recipes; give one of them\n")
    if chosen.recipe not in RECIPES:
        chooser.exit(2, f"error: no recipe is called {chosen.recipe!r}; there are {', '.join(RECIPES)}\n")
    try:
        recipe = RECIPES[chosen.recipe] if chosen.recipe_file is None else read_recipe_file(Path(chosen.recipe_file))
    except ValueError as error:
        chooser.exit(2, f"error: {error}\n")

    parser = HfArgumentParser(
        (RunArguments, *_overrides(recipe)),
        allow_abbrev=False,
        description=f"Train a long-tailed image classifier. Recipe {recipe.name}: {recipe.description}",
    )
    hints = {**get_type_hints(RunArguments), **get_type_hints(TrainingRecipe), **inspect.get_annotations(RideBfConfig)}
    for action in parser._actions:
        if type(None) in get_args(hints.get(action.dest)):
            action.type = _or_none(action.type)
        if words := _words_or_number(hints.get(action.dest)):
            action.type = _word_or_int(words)
    try:
        run, own, network, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            options = [option.removeprefix("--") for option in parser._option_string_actions if "-" not in option[2:]]
            close = difflib.get_close_matches(unknown[0].lstrip("-").replace("-", "_"), options, n=1)
            hint = f"; did you mean --{close[0]}?" if close else ""
            parser.exit(2, f"error: unknown arguments {unknown}{hint}\nknown: {' '.join(sorted(options))}\n")
        changed = {
            name: tuple(value) if isinstance(getattr(recipe, name), tuple) else value
            for name, value in vars(own).items()
        }
        # only what the command line changes: RideBfConfig's defaults need not be written down in every recipe
        changed |= {name: value for name, value in vars(network).items() if value != _network_value(recipe, name)}
        recipe = recipe.with_overrides(**changed)
        recipe.config(num_labels=max(2, network.router_top_k))  # an impossible network is refused before data is read
    except (ValueError, StrictDataclassError) as error:
        parser.exit(2, f"error: {error}\n")
    return run, recipe
