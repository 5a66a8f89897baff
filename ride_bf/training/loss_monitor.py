"""Tracks the loss of an epoch, and reports the images of a batch whose loss is not finite."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ride_bf.runs.checkpoints import LAST
from ride_bf.runs.run_folder import LOST_LOSS


class LossMonitor:
    """Adds up losses on their device. Only `read` waits for the device.

    Args:
        accelerator: the accelerator of the run.
        output_dir: folder for `lost_loss.json`, which is written if a loss is not finite.
        find_images: names the images of a batch: `data.FinishedBatches.describe`.
        sums: the sum of each process so far, if the epoch was interrupted.
        batches: number of batches in each of these sums.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        find_images: Callable[[Mapping], list[str]],
        sums: list[float],
        batches: int,
    ):
        self.accelerator, self.output_dir, self.find_images = accelerator, output_dir, find_images
        # If the number of processes has changed, each starts with the mean of the sums.
        own = (
            sums[accelerator.process_index] if len(sums) == accelerator.num_processes else sum(sums) / max(1, len(sums))
        )
        self.total = torch.tensor(own, device=accelerator.device)
        self.batches = batches
        self.unread: list[tuple[Tensor, Mapping]] = []

    def add(self, loss: Tensor, batch: Mapping) -> None:
        """Adds the loss of one batch."""
        self.total += loss.detach()
        self.batches += 1
        self.unread.append(
            (loss.detach(), {name: value for name, value in batch.items() if name in ("index", "labels")})
        )

    def read(self, step: int, learning_rate: float) -> float | None:
        """Mean loss over all processes since the last call; None if there was no batch since then.

        Every process must call it. If a loss is not finite, it writes down the images of that batch and raises
        FloatingPointError.
        """
        if not self.unread:
            return None
        losses = torch.stack([loss for loss, _ in self.unread]).float()
        for loss, (_, batch) in zip(losses.tolist(), self.unread, strict=True):
            if loss - loss != 0:  # infinite or NaN
                self._lost(loss, batch, step, learning_rate)
        self.unread.clear()
        return self.accelerator.reduce(losses.mean(), "mean").item()

    def _lost(self, loss: float, batch: Mapping, step: int, learning_rate: float) -> None:
        images = self.find_images(batch)
        path = self.output_dir / LOST_LOSS
        facts = {"loss": str(loss), "step": step, "learning_rate": learning_rate, "images": images}
        path.write_text(json.dumps(facts, indent=1) + "\n")
        intact = ", and the last checkpoint is intact" if (self.output_dir / LAST).exists() else ""
        raise FloatingPointError(
            f"the loss is {loss} near step {step} at learning rate {learning_rate:g}; the images of that batch are in "
            f"{path}{intact}. Start again in another --output_dir, with a lower "
            "--learning_rate, --max_grad_norm 1, or in float32"
        )

    def sums(self) -> list[float]:
        """The sum of each process, to save in a checkpoint."""
        return self.accelerator.gather(self.total[None]).tolist()

    def mean(self) -> float:
        """Mean loss over the batches of all processes."""
        return self.accelerator.reduce(self.total / max(1, self.batches), "mean").item()
