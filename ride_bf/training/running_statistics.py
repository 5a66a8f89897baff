"""Running statistics of batch normalisation. Every process of a run has its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class RunningStatistics:
    """The running statistics of the normalisation layers, in each process.

    Each process keeps the statistics of its own images, and DistributedDataParallel does not change them, since
    `broadcast_buffers` is off. To evaluate or save a network, all processes must hold the same one: within `averaged`
    they hold the mean over the processes. Afterwards each process has its own statistics again, so evaluations and
    checkpoints do not change the training.

    Args:
        accelerator: the accelerator of the run.
        networks: the networks with these layers; the average of the weights is a network of its own.
    """

    def __init__(self, accelerator: Accelerator, *networks: nn.Module):
        self.accelerator = accelerator
        layers = [module for network in networks for module in network.modules() if isinstance(module, _NormBase)]
        self.buffers = [
            buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None
        ]

    @property
    def differ(self) -> bool:
        """Whether the processes can hold different statistics."""
        return self.accelerator.num_processes > 1 and bool(self.buffers)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which every process holds the mean over the processes. All processes must enter it."""
        if not self.differ:
            yield
            return
        gathered = self.gather()  # (P, N)
        # In float64 the mean of equal numbers is exactly that number, so frozen statistics do not change.
        self._write(gathered.double().mean(dim=0).float())
        try:
            yield
        finally:
            self._write(gathered[self.accelerator.process_index])

    @torch.no_grad()
    def gather(self) -> Tensor | None:
        """The statistics of all processes (P, N), to save in a checkpoint; None if they cannot differ."""
        if not self.differ:
            return None
        own = torch.cat([buffer.flatten().float() for buffer in self.buffers])
        return self.accelerator.gather(own[None])

    def restore(self, gathered: Tensor | None) -> None:
        """Gives each process its row of `gather`. If the number of processes has changed, the saved mean stays."""
        if self.differ and gathered is not None and len(gathered) == self.accelerator.num_processes:
            self._write(gathered[self.accelerator.process_index])

    @torch.no_grad()
    def _write(self, values: Tensor) -> None:
        sizes = [buffer.numel() for buffer in self.buffers]
        for buffer, own in zip(self.buffers, values.to(self.buffers[0].device).split(sizes), strict=True):
            buffer.copy_(own.view_as(buffer))
