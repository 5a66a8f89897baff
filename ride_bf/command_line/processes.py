"""What the processes of a run tell each other at any time, without waiting for each other.

They write into the key-value store by which their process group was made. Asking it takes a fraction of a millisecond.
"""

import os
import sys


def is_first_of_machine() -> bool:
    """Whether a launcher started this process as the first of its machine, or as the only one. Needs no group."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def in_group() -> bool:
    """Whether this process is one of a process group. Does not import torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def first_value(key: str, value: str) -> str:
    """Returns the value that the first of the processes gave to `key`; this one's own if it is the first."""
    return _store().compare_set(key, "", value).decode()


def given_value(key: str) -> str | None:
    """Returns the value that a process has given to `key`; None if none has."""
    store = _store()
    return store.get(key).decode() if store.check([key]) else None


def _store():
    from torch.distributed.distributed_c10d import _get_default_store  # torch has no public name for it

    return _get_default_store()
