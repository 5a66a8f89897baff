"""Stops a run on request: from a scheduler that wants the machine back, or from Ctrl-C."""

import os
import signal
from types import FrameType

import torch
from accelerate import Accelerator

# EX_TEMPFAIL of sysexits.h, a temporary failure: the scheduler should start the run again, with --resume.
EXIT_CODE = os.EX_TEMPFAIL if hasattr(os, "EX_TEMPFAIL") else 75
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class Interruption:
    """Context in which SIGTERM, SIGUSR1 and Ctrl-C are recorded and do not end the process; a second Ctrl-C does."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def agreed(self, accelerator: Accelerator) -> signal.Signals | None:
        """The signal that any of the processes has received. All processes must call this in the same step."""
        if accelerator.num_processes == 1:
            return self.received
        received = torch.tensor(0 if self.received is None else int(self.received), device=accelerator.device)
        number = int(accelerator.gather(received[None]).max())
        return signal.Signals(number) if number else None
