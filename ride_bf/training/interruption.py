"""Being asked to stop: by a scheduler that wants the machine back, or by Ctrl-C."""

import os
import signal
from types import FrameType

import torch
from accelerate import Accelerator

# By sysexits.h: a temporary failure, to be tried again. A scheduler is to start the run anew, with --resume.
EXIT_CODE = os.EX_TEMPFAIL if hasattr(os, "EX_TEMPFAIL") else 75
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class Interruption:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C are noted instead of ending the process; Ctrl-C twice does end it."""

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
        """The signal that any process has received: the same answer in all of them, who must ask in the same step."""
        if accelerator.num_processes == 1:
            return self.received
        received = torch.tensor(0 if self.received is None else int(self.received), device=accelerator.device)
        number = int(accelerator.gather(received[None]).max())
        return signal.Signals(number) if number else None
