"""Losses for long-tailed classification: every file of this folder is one, of the file's name.

A file defines a subclass of `Criterion`, which says what options of a recipe it reads. That is all it takes: the
recipe's option `loss`, `--help` and the errors know the name. Names are found without importing torch.

Every loss is called as `criterion(expert_logits, labels, reweight=False)` with `expert_logits` (B, E, C), `labels` (B,)
and `reweight` true once deferred re-weighting has begun, and returns a scalar. Under autocast they compute in float32:
half precision ends at 65,504, and a sum over the batch of losses of logits around 30 x E gets there.

A loss is a mean over the images of a step. In a distributed run that is those of all processes: the mean over the
processes of a loss's gradient, which is what DistributedDataParallel takes, is what one process with all the images
would have, re-weighted or not, if all hold equally many.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ride_bf.methods.losses._shared import Criterion


def loss_names() -> list[str]:
    """The names of the losses, in alphabetical order."""
    return sorted(file.name for file in pkgutil.iter_modules(__path__) if not file.name.startswith("_"))


def loss_class(name: str) -> "type[Criterion]":
    """The class of a loss. Raises ValueError for an unknown name, and for a file that does not define one loss."""
    if name not in loss_names():
        raise ValueError(f"no loss is called {name!r}; there are {', '.join(loss_names())}")
    module = _import(name)
    criterion = _import("_shared").Criterion
    found = [value for value in _defined_in(module).values() if inspect.isclass(value) and issubclass(value, criterion)]
    if len(found) != 1:
        raise ValueError(f"{module.__file__} must define one subclass of Criterion, not {len(found)}")
    return found[0]


def losses_that_read(option: str) -> list[str]:
    """The names of the losses that read an option of a recipe."""
    return [name for name in loss_names() if option in options_read(name)]


def options_read(name: str) -> set[str]:
    """The options of a recipe that a loss reads. Raises as `loss_class`."""
    kind = loss_class(name)
    return {*kind.options, "reweight_epoch"} if kind.reweights else set(kind.options)


def make_loss(name: str, class_counts: Sequence[int], options: Mapping[str, Any]) -> "Criterion":
    """A loss for a training split of `class_counts` (C,), with what it reads of the `options` of a recipe.

    Raises as `loss_class`, and ValueError on a class without images or for an impossible option.
    """
    kind = loss_class(name)
    arguments = {argument: options[option] for option, argument in kind.options.items()}
    if "class_counts" in inspect.signature(kind).parameters:
        arguments["class_counts"] = class_counts
    return kind(**arguments)


def _import(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _defined_in(module: ModuleType) -> dict[str, Any]:
    """What a module defines itself, by name."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {name: value for name, value in own.items() if getattr(value, "__module__", None) == module.__name__}


def _defined() -> dict[str, Any]:
    return {name: value for file in ("_shared", *loss_names()) for name, value in _defined_in(_import(file)).items()}


def __getattr__(name: str) -> Any:
    """The classes and functions of the files, imported when one of them is first asked for."""
    if not name.startswith("_") and name in (defined := _defined()):
        return defined[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_defined()})
