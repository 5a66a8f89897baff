"""How far a run has come."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass(kw_only=True)
class Progress:
    """How far a run has come. Saved in its checkpoints."""

    epochs_done: int = 0
    batches_done: int = 0  # in the current epoch
    steps_done: int = 0
    loss_sums: list[float] = field(default_factory=lambda: [0.0])  # of the current epoch, for each process
    running_statistics: Tensor | None = None  # of each process, from `RunningStatistics.gather`
    collapse: dict[str, Any] = field(default_factory=dict)  # the state of `CollapseMonitor`
    best: dict[str, Any] = field(default_factory=dict)  # the facts of the checkpoint `best`
    evaluations_without_gain: int = 0
    seconds: float = 0.0  # of training, over all starts of the run

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)
