"""The methods of the papers: losses, objectives, samplers, the BatchFormer and its windows, the teacher.

`from ride_bf.methods import BatchFormer, RideLoss, make_objective` imports them for your own training loop.
"""

from importlib import import_module
from typing import Any

# Name -> module. Modules are imported on first use, because importing torch takes seconds.
_PIECES = {
    "BatchFormer": "batchformer",
    "BatchFormerWindows": "windows",
    "ClassificationObjective": "objectives",
    "LDAMLoss": "losses",
    "LogitAdjustedLoss": "losses",
    "LongTailedSampler": "samplers",
    "RideLoss": "losses",
    "SharedClassifierObjective": "objectives",
    "TrainerLoss": "trainer_loss",
    "make_objective": "objectives",
}
__all__ = list(_PIECES)


def __getattr__(name: str) -> Any:
    if name in _PIECES:
        return getattr(import_module(f"{__name__}.{_PIECES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_PIECES)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PIECES])
