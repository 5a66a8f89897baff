"""A recipe's loss for `transformers.Trainer`."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ride_bf.methods.objectives import make_objective
from ride_bf.methods.windows import set_windows
from ride_bf.recipes import TrainingRecipe

logger = logging.get_logger(__name__)


class TrainerLoss(TrainerCallback):
    """The loss of a recipe. Pass the same object to Trainer twice: as `compute_loss_func` and in `callbacks`.

    In training it is the loss of the recipe, and it re-weights after the recipe's epoch: as a callback it knows the
    epoch. It also prepares the BatchFormer for each epoch. In evaluation it is the plain cross-entropy of `logits`, as
    the model's own loss is.

    The loss is the mean over the images of a step, with gradient accumulation, in several processes and under
    nn.DataParallel too.

    Args:
        recipe: gives the loss with its options, `reweight_epoch`, and the BatchFormer's loss weight, window, start
            epoch and precision. `TrainingArguments` give everything else, such as the epochs and the learning rate.
        class_counts (C,): training images of each class.

    Raises ValueError for a recipe that needs more than a loss and, if the loss reads the counts, for a class without
    images. At the start of training it raises ValueError if the model, the data or the arguments do not suit the
    recipe.
    """

    def __init__(self, recipe: TrainingRecipe, class_counts: Sequence[int]):
        _check_recipe(recipe)
        self.recipe = recipe
        self.objective = make_objective(recipe, class_counts)
        self.passes_begun: int | None = None  # through the training images; None before training
        self.called = False

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Returns the loss of a batch, a scalar, scaled as Trainer expects it."""
        if labels is None:
            raise ValueError(
                "the batch has no labels: give the data set a column 'label' or 'labels', and keep it in the collator"
            )
        self.called = True
        if torch.is_grad_enabled():
            loss = self._training_loss(outputs, labels)
        else:
            loss = F.cross_entropy(outputs.logits.float(), labels)
        if num_items_in_batch is None:
            return loss
        # Trainer adds up the losses of a step. Each is divided by the images of the step: those of all processes and
        # accumulated batches. Under nn.DataParallel, Trainer gives that number once for each GPU, and multiplies the
        # loss by the number of GPUs.
        items = torch.as_tensor(num_items_in_batch, device=loss.device).flatten()
        return loss * (len(labels) / (items[0] * items.numel()))

    def _training_loss(self, outputs: Any, labels: Tensor) -> Tensor:
        if self.passes_begun is None:
            raise ValueError(
                "TrainerLoss does not know the epoch, so it cannot re-weight: pass the same object to Trainer twice, "
                "compute_loss_func=loss and callbacks=[loss]"
            )
        objective = self.objective.to(labels.device)  # of the outputs, too; does nothing after the first batch
        return objective(outputs, {"labels": labels}, reweight=self.recipe.reweight(self.epoch))

    @property
    def epoch(self) -> int:
        """The recipe's epoch, from 0."""
        return max(0, self.passes_begun - 1) // self.recipe.passes_per_epoch

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: DataLoader | None = None,
        **kwargs,
    ) -> None:
        self.called = False
        self.passes_begun = int(state.epoch or 0)  # more than 0 if training resumes
        _check_arguments(args)
        _check_columns(args, train_dataloader)
        _check_model(model, self.recipe)
        _check_window(self.recipe, args)
        reweight_epoch = self.recipe.reweight_epoch
        if reweight_epoch is not None and state.num_train_epochs <= reweight_epoch * self.recipe.passes_per_epoch:
            passes = reweight_epoch * self.recipe.passes_per_epoch
            logger.warning(
                f"The loss is not re-weighted in this run: the recipe re-weights after epoch {passes}, and Trainer "
                f"trains {state.num_train_epochs} epochs. Set TrainingArguments(num_train_epochs=...) above {passes}, "
                "or set another reweight_epoch in the recipe."
            )

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs,
    ) -> None:
        # Counted, because `state.epoch` is not a whole number here if a stream of unknown length begins again.
        self.passes_begun += 1
        if self.recipe.network_value("batchformer") != "none":
            set_windows(model, self.recipe, self.epoch)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not self.called:
            raise ValueError(
                "Trainer does not use TrainerLoss as its loss: pass the same object as compute_loss_func=loss too"
            )


def _check_recipe(recipe: TrainingRecipe) -> None:
    """Raises ValueError for a recipe that is more than a loss of outputs and labels."""
    elsewhere = "train it with train_accelerate.py"
    if recipe.mixup_alpha > 0 or recipe.cutmix_alpha > 0:
        raise ValueError(
            f"mixup_alpha {recipe.mixup_alpha} and cutmix_alpha {recipe.cutmix_alpha} give an image two labels, and "
            f"Trainer passes on one: set both to 0 by recipe.with_overrides(mixup_alpha=0, cutmix_alpha=0), or "
            f"{elsewhere}"
        )
    if recipe.needs_teacher:
        raise ValueError(
            f"the recipe {recipe.name!r} distils a teacher, which needs the images, and Trainer does not pass them to "
            f"the loss: take the recipe without a teacher, or {elsewhere}"
        )
    if recipe.train_only != "all":
        raise ValueError(
            f"train_only {recipe.train_only!r} freezes the rest of the network and its BatchNorm, which Trainer does "
            f"not: {elsewhere}"
        )
    if recipe.batchnorm != "local":
        raise ValueError(
            f"batchnorm {recipe.batchnorm!r} changes the network, which Trainer does not: set it to 'local' and pass "
            f"torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) to Trainer, or {elsewhere}"
        )


def _check_arguments(args: TrainingArguments) -> None:
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor {args.label_smoothing_factor} would do nothing beside TrainerLoss: set it to 0, "
            "and label_smoothing in the recipe"
        )


def _check_columns(args: TrainingArguments, loader: DataLoader | None) -> None:
    """Raises ValueError if the data set has lost the columns from which its pixel values are made."""
    columns = getattr(getattr(loader, "dataset", None), "column_names", None)
    if columns is not None and args.remove_unused_columns and "pixel_values" not in columns:
        raise ValueError(
            f"the training data have no column 'pixel_values', only {list(columns)}: Trainer has removed the columns "
            "that the network does not take, before a transform or a collator could read them; set "
            "TrainingArguments(remove_unused_columns=False)"
        )


def _check_model(model: nn.Module | None, recipe: TrainingRecipe) -> None:
    """Raises ValueError if the network and the loss are of different kinds, so that a part would not be trained."""
    ours, theirs = recipe.network_value("batchformer"), getattr(getattr(model, "config", None), "batchformer", None)
    if theirs is not None and ours != theirs:
        raise ValueError(
            f"the recipe has batchformer {ours!r} and the model {theirs!r}, which need different losses: use "
            f"recipe.with_overrides(batchformer={theirs!r}), or make the model by "
            "RideBfForImageClassification(recipe.config(num_labels=...))"
        )


def _check_window(recipe: TrainingRecipe, args: TrainingArguments) -> None:
    """Raises ValueError for the window "global" if one process has several GPUs."""
    if recipe.network_value("batchformer") == "none":
        return
    window = recipe.batchformer_window
    if args.n_gpu > 1 and window == "global":
        raise ValueError(
            f"batchformer_window 'global' cannot reach across the {args.n_gpu} GPUs of one process: start a process "
            "for each GPU (torchrun or accelerate launch), or use recipe.with_overrides(batchformer_window='local')"
        )
    held = args.per_device_train_batch_size * args.world_size  # world_size counts processes, not their GPUs
    if window != "local" and window != "global" and window > held:
        logger.warning(
            f"The BatchFormer's windows hold {held} images, not {window} as in the recipe: "
            f"per_device_train_batch_size is {args.per_device_train_batch_size}, in {args.world_size} process(es)."
        )
