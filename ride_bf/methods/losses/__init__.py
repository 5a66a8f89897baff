"""Losses for long-tailed classification. Every file in this folder is a loss with the name of the file.

To add a loss, add a file that defines a subclass of `Criterion` and says which options of a recipe it reads. The
recipe's option `loss`, `--help` and the errors then know its name. Names are found without importing torch.

Every loss is called as `criterion(expert_logits, labels, reweight=False)` and returns a scalar. `expert_logits` are
(B, E, C), `labels` (B,), and `reweight` is true once deferred re-weighting has begun. Under autocast a loss still
computes in float32: logits are around 30, and their losses summed over the experts and the batch can exceed 65,504,
the largest number of half precision.

A loss is a mean over the images of a step. DistributedDataParallel averages its gradient over the processes. With the
same number of images in each process, the result equals that of one process with all images, re-weighted or not.
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
    """The options of a recipe that a loss reads. Errors are those of `loss_class`."""
    kind = loss_class(name)
    return {*kind.options, "reweight_epoch"} if kind.reweights else set(kind.options)


def make_loss(name: str, class_counts: Sequence[int], options: Mapping[str, Any]) -> "Criterion":
    """Makes a loss for the `class_counts` (C,) of a training split. It takes what it reads from a recipe's `options`.

    Raises ValueError for an invalid option and, if the loss reads the counts, for a class without images. Raises the
    errors of `loss_class`.
    """
    kind = loss_class(name)
    arguments = {argument: options[option] for option, argument in kind.options.items()}
    if "class_counts" in inspect.signature(kind).parameters:
        arguments["class_counts"] = class_counts
    return kind(**arguments)


def _import(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _defined_in(module: ModuleType) -> dict[str, Any]:
    """The names that a module defines itself, and their values."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {name: value for name, value in own.items() if getattr(value, "__module__", None) == module.__name__}


def _defined() -> dict[str, Any]:
    return {name: value for file in ("_shared", *loss_names()) for name, value in _defined_in(_import(file)).items()}


def __getattr__(name: str) -> Any:
    """Imports the classes and functions of the files on first use."""
    if not name.startswith("_") and name in (defined := _defined()):
        return defined[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_defined()})
