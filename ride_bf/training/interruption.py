"""Stops a run on request: from a scheduler that wants the machine back, or from Ctrl-C."""

import os
import signal
from types import FrameType

import torch
from accelerate import Accelerator

from ride_bf.command_line.processes import first_value, given_value

# EX_TEMPFAIL of sysexits.h, a temporary failure: the scheduler should start the run again, with --resume.
EXIT_CODE = os.EX_TEMPFAIL if hasattr(os, "EX_TEMPFAIL") else 75
_STOP = "ride_bf/stop"  # key of "STEP SIGNAL": after which step all processes stop, and for which signal
# In how many steps they stop. After step n a process knows that the others have passed step n - 2: it has waited for
# step n - 1 on the device, whose gradients are averaged over all processes.
_AHEAD = 2
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class Interruption:
    """Context in which SIGTERM, SIGUSR1 and Ctrl-C are recorded and do not end the process; a second Ctrl-C does."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[int, object] = {}
        self._step_ended: torch.Event | None = None

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

    def agreed(self, accelerator: Accelerator, step: int) -> signal.Signals | None:
        """The signal for which the processes stop after this step; None to go on. Call it after every step.

        A single process stops at once. Several stop after the same step, even if only one of them has received the
        signal, and without waiting for each other here: the first writes into the store of the process group after
        which step all stop, and each looks there after every step. None can have passed that step before it sees it.
        A step is `_AHEAD` steps away, and a process ends a step only once the others have begun it, because the
        gradients are averaged.
        """
        if accelerator.num_processes == 1:
            return self.received
        self._wait_for_the_step_before(accelerator.device)
        if self.received is not None:
            agreed = first_value(_STOP, f"{step + _AHEAD} {self.received.value}")
        else:
            agreed = given_value(_STOP)
        if agreed is None:
            return None
        last, number = map(int, agreed.split())
        return signal.Signals(number) if step >= last else None

    def _wait_for_the_step_before(self, device: torch.device) -> None:
        """Keeps the program less than two steps ahead of the device, which runs behind it. A CPU does not."""
        if device.type == "cpu":
            return
        before, self._step_ended = self._step_ended, torch.Event(device)
        self._step_ended.record()
        if before is not None:
            before.synchronize()
