"""Ends a command with one line, not a traceback, for errors that the user can fix.

Of several processes, only the first that fails says why.
"""

import re
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager

from ride_bf.command_line.processes import first_value, in_group, is_first_of_machine

_FAILED = "ride_bf/failed"  # key under which the first process that fails writes its rank


@contextmanager
def errors_as_messages(*kinds: type[Exception], go_on: Callable[[], str] | None = None):
    """Ends the program with the message of an error of these kinds.

    The default is ValueError, OSError and ModuleNotFoundError, whose message says which package an option needs.

    Errors that `RideBfConfig` raises for an impossible network count as ValueError. Of several processes, the first
    that fails prints its message, or raises its error, and the others end without a word: they fail in the same way,
    or because the first one is gone.

    `go_on` says how to go on with a run that has ended early, as `RunFolder.how_to_go_on` does. Messages end with its
    answer, also if another process has ended. Only training gives it: no other command can be resumed.
    """
    try:
        yield
    except Exception as error:
        if lost := _has_lost_another(error):
            time.sleep(1)  # so that the launcher sees first the process that ended first
        if not _is_first_to_fail(error):
            raise SystemExit(1) from None
        if lost:
            lost_another = _LOST_ANOTHER.format(str(error).partition(". This is typically")[0])
            raise SystemExit(f"{lost_another}{'; ' + go_on() if go_on else ''}") from None
        mendable = kinds or (ValueError, OSError, ModuleNotFoundError)
        if type(error).__name__.startswith("StrictDataclass") and ValueError in mendable:
            error = error.__cause__ or error  # the outer error only names the validator
        elif not isinstance(error, mendable):
            raise
        message = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1]  # without the traceback of a loader worker
        raise SystemExit(f"error: {message}{'; ' + go_on() if go_on else ''}") from error


# What gloo and NCCL say of a process that is gone. They have no type of error for it.
_LOST = re.compile(r"gloo.*(by peer|Broken pipe)|remote process exited", re.DOTALL)
_LOST_ANOTHER = (
    "error: another process of this command has ended ({}). The launcher's report says which one, and how; SIGKILL "
    "mostly means that there was too little memory"
)


def _is_first_to_fail(error: Exception) -> bool:
    """Whether this process is to say what went wrong. One process always is."""
    if not in_group():  # until then a ValueError comes from the options, which all processes have
        return not isinstance(error, ValueError) or is_first_of_machine()
    from torch.distributed import get_rank

    try:
        return first_value(_FAILED, str(get_rank())) == str(get_rank())
    except RuntimeError:  # the store is gone, with the process or the launcher that kept it
        return is_first_of_machine() or not _has_lost_another(error)


def _has_lost_another(error: Exception) -> bool:
    """Whether the error is that of a collective operation whose other processes are gone."""
    if not in_group():
        return False
    from torch.distributed import DistNetworkError

    return isinstance(error, DistNetworkError) or (isinstance(error, RuntimeError) and bool(_LOST.search(str(error))))


@contextmanager
def stops_as_messages(remedy: str):
    """Ends the program with a message and the usual exit code if the user stops it with Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped: {remedy}", file=sys.stderr)
        raise SystemExit(130) from None


@contextmanager
def dead_workers_as_messages(go_on: Callable[[], str]):
    """Ends the program with a message if a process that prepares images has died. `go_on`: see `errors_as_messages`."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        _is_first_to_fail(error)  # the other processes then say nothing
        raise SystemExit(
            f"error: a process that prepares images has died ({str(error).splitlines()[0]}), most often for lack of "
            f"memory; {go_on()}, with fewer --num_workers or a larger /dev/shm"
        ) from error
