"""Makes an option that cannot act an error.

Each `Option` says what it needs to have an effect. Only options given on the command line are checked. A recipe has a
value for every option, and `--epochs` or `--loss` may leave some of them without effect.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from data.sets import get_data_set, with_option
from ride_bf.command_line.options import options_of, shown
from ride_bf.recipes import TrainingRecipe
from ride_bf.recipes.network_options import NETWORK_DEFAULTS, NetworkOptions

if TYPE_CHECKING:
    from ride_bf.training.arguments import RunArguments


def check_effects(run: "RunArguments", recipe: TrainingRecipe, given: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that was given on the command line but would do nothing in this run.

    Args:
        run, recipe: the arguments and the recipe, with the given options applied.
        given: name -> value of the given options.
    """
    _check_data_options(run, recipe)
    values = {**vars(run), **vars(recipe), **NETWORK_DEFAULTS, **recipe.network}
    options = {**options_of(run), **options_of(recipe), **options_of(NetworkOptions)}
    for name, value in given.items():
        if name not in options or options[name].asks_for_nothing(value):
            continue
        for need in options[name].needs:
            if not need.is_met(values):
                needed = need.words if isinstance(need.words, str) else need.words()
                others = [other for other in need.options if other != name]
                here = " and ".join(_as_given(other, values[other]) for other in others)
                remedy = need.remedy or f"set {' and '.join(f'--{other}' for other in others)}"
                raise ValueError(
                    f"{_as_given(name, value)} cannot act: it needs {needed}, and this run has {here}; leave it out or "
                    f"{remedy}"
                )


def _as_given(name: str, value: Any) -> str:
    unset = value is None or value is False or value == ()
    return f"no --{name}" if unset else f"--{name}" if value is True else f"--{name} {shown(value)}"


def _check_data_options(run: "RunArguments", recipe: TrainingRecipe) -> None:
    data_set = get_data_set(recipe.dataset)
    for name, value in run.data_options().items():
        if name in run.dataset_options and name not in data_set.option_names:
            readers = " or ".join(with_option(name))
            raise ValueError(
                f"{_as_given(name, value)} cannot act: it needs --dataset {readers}, and this run has --dataset "
                f"{data_set.name}; leave it out or set --dataset"
            )
    if run.data_dir is not None and not data_set.reads_files:
        raise ValueError(f"--data_dir {run.data_dir} cannot act: {data_set.name} reads no files; leave it out")


def check_effect_of_options(run: "RunArguments", splits: Collection[str]) -> None:
    """Raises ValueError for an option that needs a split that the data do not have.

    Args:
        run: the arguments of the run.
        splits: the names of the splits, or a mapping with these names as keys.
    """
    if "validation" in splits:
        return
    remedy = "take one from the training images with --validation_fraction"
    if run.dataset_options.get("streaming"):  # which cannot be split
        remedy = "add one to the stream, such as archives val-*.tar"
    for name in ("early_stopping_patience", "eval_steps"):
        value = getattr(run, name)
        if value is not None:
            raise ValueError(
                f"--{name} {value} cannot act: these data have no validation split to evaluate on; {remedy}, or leave "
                "it out"
            )
