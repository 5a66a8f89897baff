"""Running statistics of batch normalisation, of which every process of a run has its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class RunningStatistics:
    """What the normalisation layers of networks have seen, by process.

    Each process gathers the statistics of its own images, and DistributedDataParallel, without `broadcast_buffers`,
    leaves them alone. Where a network is evaluated or saved, all processes must hold the same one: within `averaged`
    they hold the mean over the processes. Afterwards each has its own again, so that evaluations and checkpoints change
    nothing of the training.

    Args:
        accelerator: of the run.
        networks: whose layers are meant; the weights' average, for one, is a network of its own.
    """

    def __init__(self, accelerator: Accelerator, *networks: nn.Module):
        self.accelerator = accelerator
        layers = [module for network in networks for module in network.modules() if isinstance(module, _NormBase)]
        self.buffers = [
            buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None
        ]

    @property
    def differ(self) -> bool:
        """Whether processes can hold different ones."""
        return self.accelerator.num_processes > 1 and bool(self.buffers)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Every process holds the mean over the processes. Entered and left by all of them."""
        if not self.differ:
            yield
            return
        gathered = self.gather()  # (P, N)
        # In float64 the mean of equal numbers is that number: frozen statistics stay what they are, to the last bit.
        self._write(gathered.double().mean(dim=0).float())
        try:
            yield
        finally:
            self._write(gathered[self.accelerator.process_index])

    @torch.no_grad()
    def gather(self) -> Tensor | None:
        """Those of all processes (P, N), to be saved in a checkpoint; None where they cannot differ."""
        if not self.differ:
            return None
        own = torch.cat([buffer.flatten().float() for buffer in self.buffers])
        return self.accelerator.gather(own[None])

    def restore(self, gathered: Tensor | None) -> None:
        """Gives each process what `gather` had of it. Another number of processes goes on from what was saved."""
        if self.differ and gathered is not None and len(gathered) == self.accelerator.num_processes:
            self._write(gathered[self.accelerator.process_index])

    @torch.no_grad()
    def _write(self, values: Tensor) -> None:
        sizes = [buffer.numel() for buffer in self.buffers]
        for buffer, own in zip(self.buffers, values.to(self.buffers[0].device).split(sizes), strict=True):
            buffer.copy_(own.view_as(buffer))
