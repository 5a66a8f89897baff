"""Everything but the network and the training loop: recipes, losses, metrics, checkpoints and commands."""

import importlib
import sys
from types import ModuleType


class _Alias(ModuleType):
    """A second name for a module. The module is imported on first use, so `import ride_bf` is fast."""

    def __init__(self, name: str, target: str):
        super().__init__(f"{__name__}.{name}", f"The contents of {__name__}.{target}.")
        self._target = f"{__name__}.{target}"
        sys.modules[self.__name__] = self

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # tools that inspect every module must not import this one
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(self._target), name)


losses, metrics = _Alias("losses", "methods.losses"), _Alias("metrics", "evaluation.metrics")
