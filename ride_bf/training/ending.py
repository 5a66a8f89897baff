"""The end of a run of several processes."""

import atexit

import torch.distributed
from accelerate import Accelerator


def end_training(accelerator: Accelerator) -> None:
    """Ends the trackers and the process group, but frees the group only after the model.

    DistributedDataParallel holds the group too. Where it is the last to let go, PyTorch 2.11 frees the group without
    giving up Python's lock, and waits for a thread of gloo that may be waiting for that lock. The process then hangs
    although everything is saved. A group that is freed as Python shuts down may abort the process instead.
    """
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    accelerator.end_training()
    if group is not None:
        atexit.register(_free_models, accelerator, group)


def _free_models(accelerator: Accelerator, group: torch.distributed.ProcessGroup) -> None:
    accelerator.free_memory()
    del group  # atexit holds the last reference, and drops it after this call
