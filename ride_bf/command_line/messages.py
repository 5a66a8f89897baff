"""Ends a command with one line, not a traceback, for errors that the user can fix."""

import sys
from contextlib import contextmanager


@contextmanager
def errors_as_messages(*kinds: type[Exception]):
    """Ends the program with the message of an error of these kinds.

    The default is ValueError, OSError and ModuleNotFoundError, whose message says which package an option needs.

    Errors that `RideBfConfig` raises for an impossible network count as ValueError.
    """
    try:
        yield
    except Exception as error:
        mendable = kinds or (ValueError, OSError, ModuleNotFoundError)
        if type(error).__name__.startswith("StrictDataclass") and ValueError in mendable:
            error = error.__cause__ or error  # the outer error only names the validator
        elif not isinstance(error, mendable):
            raise
        message = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1]  # without the traceback of a loader worker
        raise SystemExit(f"error: {message}") from error


@contextmanager
def stops_as_messages(remedy: str):
    """Ends the program with a message and the usual exit code if the user stops it with Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped: {remedy}", file=sys.stderr)
        raise SystemExit(130) from None


@contextmanager
def dead_workers_as_messages():
    """Ends the program with a message if a process that prepares images has died."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise SystemExit(
            f"error: a process that prepares images has died ({str(error).splitlines()[0]}), most often for lack of "
            "memory. The last checkpoint is intact: continue with --resume, fewer --num_workers or a larger /dev/shm"
        ) from error
