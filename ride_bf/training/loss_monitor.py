"""The loss of an epoch: its mean, and which images were in the batch in which it was lost."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ride_bf.runs.run_folder import LOST_LOSS


class LossMonitor:
    """Adds losses up on their device, without waiting for it until `read`.

    Args:
        accelerator: of the run.
        output_dir: where `lost_loss.json` goes if a loss is not finite.
        find_images: what `data.FinishedBatches.describe` gives for a batch.
        sums: of each process, where an interrupted epoch left off.
        batches: how many these are of.
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
        # Another number of processes than before shares what there was.
        own = (
            sums[accelerator.process_index] if len(sums) == accelerator.num_processes else sum(sums) / max(1, len(sums))
        )
        self.total = torch.tensor(own, device=accelerator.device)
        self.batches = batches
        self.unread: list[tuple[Tensor, Mapping]] = []

    def add(self, loss: Tensor, batch: Mapping) -> None:
        """The loss of one batch."""
        self.total += loss.detach()
        self.batches += 1
        self.unread.append(
            (loss.detach(), {name: value for name, value in batch.items() if name in ("index", "labels")})
        )

    def read(self, step: int, learning_rate: float) -> float | None:
        """Mean loss of all processes since it was last read; None if there was no batch since.

        Called by every process. Raises FloatingPointError, and writes down the images of the batch, if a loss is not
        finite.
        """
        if not self.unread:
            return None
        losses = torch.stack([loss for loss, _ in self.unread]).float()
        for loss, (_, batch) in zip(losses.tolist(), self.unread, strict=True):
            if loss - loss != 0:  # infinite or not a number
                self._lost(loss, batch, step, learning_rate)
        self.unread.clear()
        return self.accelerator.reduce(losses.mean(), "mean").item()

    def _lost(self, loss: float, batch: Mapping, step: int, learning_rate: float) -> None:
        images = self.find_images(batch)
        path = self.output_dir / LOST_LOSS
        facts = {"loss": str(loss), "step": step, "learning_rate": learning_rate, "images": images}
        path.write_text(json.dumps(facts, indent=1) + "\n")
        raise FloatingPointError(
            f"the loss is {loss} near step {step} at learning rate {learning_rate:g}; the images of that batch are in "
            f"{path}, and the last checkpoint is intact. Start again in another --output_dir, with a lower "
            "--learning_rate, --max_grad_norm 1, or in float32"
        )

    def sums(self) -> list[float]:
        """Of each process, to be saved in a checkpoint."""
        return self.accelerator.gather(self.total[None]).tolist()

    def mean(self) -> float:
        """Over the batches of all processes."""
        return self.accelerator.reduce(self.total / max(1, self.batches), "mean").item()
