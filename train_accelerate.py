"""Train a long-tailed image classifier: `accelerate launch train_accelerate.py [--recipe NAME] [--OPTION VALUE ...]`.

Without arguments it trains the default recipe, on images that come with scikit-learn. `--help` lists every option.
The output folder gets `recipe.json`; `metrics.jsonl`, one line an epoch; TensorBoard scalars; the checkpoints `last`
and `best`, each a Hugging Face folder; and `test_results.json`.
"""

import json
import math
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import ProjectConfiguration, set_seed
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers.utils import logging

from data import (
    BrokenImageError,
    FinishedBatches,
    OnBrokenImage,
    TrainBatch,
    class_counts,
    class_labels,
    evaluation_batches,
    evaluation_processor,
    find_entry,
    load_long_tailed,
    train_transform,
    training_batches,
)
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.checkpoints import read_facts, save_model, save_training_state
from ride_bf.command_line import RunArguments, check_starting_models, errors_as_messages, parse_arguments
from ride_bf.evaluate import evaluate
from ride_bf.objectives import make_objective
from ride_bf.parts import initialise_from, load_teacher, set_train_mode, train_only
from ride_bf.publish import RunPublisher
from ride_bf.recipes import TrainingRecipe
from ride_bf.report import accuracy_table, shot_summary
from ride_bf.run_folder import BROKEN_IMAGES, log_epoch, open_run_folder, read_broken_images
from ride_bf.samplers import LongTailedSampler
from ride_bf.speed import make_optimizer, to_fast_layout
from ride_bf.windows import set_batchformer_window

STEPS_BETWEEN_READINGS = 10  # reading the loss waits for the device


@dataclass
class Progress:
    """Where a run is; saved in its checkpoints."""

    epochs_done: int = 0
    best: dict[str, Any] = field(default_factory=dict)  # the facts of the checkpoint `best`

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)


def main() -> None:
    run, recipe = parse_arguments()
    if run.print_recipe:
        print(recipe.as_json())
        return
    with errors_as_messages((BrokenImageError, FloatingPointError)):
        train(run, recipe)


def train(run: RunArguments, recipe: TrainingRecipe) -> None:
    """A whole run: training, and the test of the checkpoint that it chooses."""
    logging.disable_progress_bar()  # one for every file written hides the run's own
    output_dir = Path(run.output_dir)
    with errors_as_messages():
        check_starting_models(run, recipe)
        accelerator = make_accelerator(output_dir, run.seed)
        with accelerator.main_process_first():  # the others find the cache of the first
            splits = load_long_tailed(recipe.dataset, **run.data_options())
        counts = class_counts(splits["train"])
        names = splits["train"].features["label"].names
        processor = evaluation_processor(recipe.resize_size, recipe.image_size, recipe.image_mean, recipe.image_std)
        loaders = make_loaders(splits, processor, run, recipe, accelerator)
        set_seed(run.seed)
        model = make_model(names, run, recipe)
        teacher = None if run.teacher is None else load_teacher(run.teacher, names)
        objective = to_fast_layout(make_objective(recipe, counts, teacher)).to(accelerator.device)
        optimizer = make_optimizer(model, recipe)
        hub = RunPublisher(output_dir, run.push_to_hub, run.push_every, run.push_private, accelerator.is_main_process)
        open_run_folder(output_dir, recipe, run.settings(), accelerator, run.resume, run.overwrite_output_dir)

    schedule = LambdaLR(optimizer, recipe.learning_rate_factor)
    progress = Progress()
    model, optimizer = accelerator.prepare(model, optimizer)
    # The schedule counts epochs. Were it prepared, Accelerate would step it once for every process.
    accelerator.register_for_checkpointing(schedule, progress)
    set_seed(run.seed, device_specific=True)  # every process augments differently
    if run.resume:
        accelerator.load_state(str(output_dir / "last"))
        progress.best = read_facts(output_dir / "best")
        accelerator.print(f"resumed after epoch {progress.epochs_done} of {recipe.epochs}")
    accelerator.init_trackers("")
    describe(recipe, model, counts, splits, accelerator)

    while progress.epochs_done < recipe.epochs:
        epoch = progress.epochs_done
        metrics = train_epoch(model, objective, loaders["train"], optimizer, accelerator, epoch, recipe)
        schedule.step()
        progress.epochs_done += 1
        facts: dict[str, Any] = {"epoch": progress.epochs_done, "train_class_counts": counts}
        summary = f"epoch {epoch + 1:>{len(str(recipe.epochs))}}/{recipe.epochs}  loss {metrics['train_loss']:.3f}"
        if "validation" in loaders:
            validation = evaluate(model, loaders["validation"], accelerator, counts)
            metrics |= {f"validation_{name}": value for name, value in validation.items()}
            summary += f"  validation: {shot_summary(validation)}"
            facts["balanced_accuracy"] = validation["balanced_accuracy"]
            # of equals the later one, which has seen more
            if facts["balanced_accuracy"] >= progress.best.get("balanced_accuracy", -1.0):
                progress.best = facts
                save_model(output_dir / "best", accelerator, model, processor, facts)
        log_epoch(output_dir, epoch + 1, metrics, accelerator)
        save_training_state(output_dir / "last", accelerator, model, processor, facts)
        accelerator.print(summary)
        hub.after_epoch(progress.epochs_done)

    chosen = "best" if "validation" in loaders else "last"
    model = RideBfForImageClassification.from_pretrained(output_dir / chosen)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    results = {
        "recipe": recipe.name,
        "seed": run.seed,
        "checkpoint": chosen,
        "epoch": read_facts(output_dir / chosen)["epoch"],
        "class_names": names,
        "train_class_counts": counts,
        "test": evaluate(model, loaders["test"], accelerator, counts),
    }
    broken = read_broken_images(output_dir)
    if broken:
        results["broken_images"] = broken
        accelerator.print(f"\n{len(broken)} images could not be read and were left out, the first: {broken[0]}")
    if accelerator.is_main_process:
        (output_dir / "test_results.json").write_text(json.dumps(results, indent=2) + "\n")
    accelerator.print(f"\nTest images, checkpoint '{chosen}' (epoch {results['epoch']}):")
    accelerator.print(accuracy_table(results["test"], counts, names))
    accelerator.print(f"\nThe trained model: {output_dir / chosen}")
    accelerator.end_training()
    hub.after_training()


def train_epoch(
    model: nn.Module,
    objective: nn.Module,
    loader: FinishedBatches,
    optimizer: Optimizer,
    accelerator: Accelerator,
    epoch: int,
    recipe: TrainingRecipe,
) -> dict[str, float]:
    """One epoch, 0-based. Returns mean loss, learning rate and speed. Raises FloatingPointError if the loss is lost."""
    set_train_mode(model)
    loader.set_epoch(epoch)
    reweight = recipe.reweight(epoch)
    learning_rate = optimizer.param_groups[0]["lr"]
    total_loss = torch.zeros((), device=accelerator.device)
    images, started = 0, time.perf_counter()
    bar = tqdm(
        loader, f"epoch {epoch + 1}", leave=False, mininterval=1.0, disable=not accelerator.is_local_main_process
    )
    for step, batch in enumerate(bar, start=1):
        outputs = model(batch["pixel_values"])
        loss = objective(outputs, batch, reweight=reweight)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

        total_loss += loss.detach()
        images += len(batch["labels"]) * accelerator.num_processes
        if step % STEPS_BETWEEN_READINGS == 0:
            speed = images / (time.perf_counter() - started)
            bar.set_postfix(loss=f"{total_loss.item() / step:.3f}", lr=f"{learning_rate:.3g}", images_s=f"{speed:.0f}")
    mean_loss = accelerator.reduce(total_loss / len(loader), "mean").item()
    if not math.isfinite(mean_loss):
        raise FloatingPointError(
            f"the loss of epoch {epoch + 1} is {mean_loss} at learning rate {learning_rate:g}; the checkpoints of the "
            "epochs before are kept. Start again in another --output_dir, with a lower --learning_rate, or in float32"
        )
    return {
        "train_loss": mean_loss,
        "learning_rate": learning_rate,
        "images_per_second": images / (time.perf_counter() - started),
        "seconds": time.perf_counter() - started,
    }


def make_accelerator(output_dir: Path, seed: int) -> Accelerator:
    """Devices, precision and processes are `accelerate launch`'s business; this names folders and the data's seed."""
    accelerator = Accelerator(
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "tensorboard")),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed, non_blocking=True),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("fp16 needs a GPU; on a CPU use --mixed_precision bf16 or no")
    return accelerator


def make_model(names: list[str], run: RunArguments, recipe: TrainingRecipe) -> RideBfForImageClassification:
    """The recipe's network, from the weights of another if the run says so, with all but what is to learn frozen."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    model = RideBfForImageClassification(recipe.config(**labels))
    if run.init_from is not None:
        initialise_from(model, run.init_from, new_parts={"classifiers", "router"} & {recipe.train_only})
    train_only(model, recipe.train_only)
    set_batchformer_window(model, recipe.batchformer_window)
    return to_fast_layout(model)


def make_loaders(
    splits, processor, run: RunArguments, recipe: TrainingRecipe, accelerator: Accelerator
) -> dict[str, FinishedBatches]:
    """A prepared loader for each split; the training one shuffles and augments."""
    on_broken = OnBrokenImage(
        run.on_broken_image, partial(find_entry, recipe.dataset, run.data_dir), Path(run.output_dir) / BROKEN_IMAGES
    )
    loaders = {
        name: evaluation_batches(split, processor, run.eval_batch_size, run.num_workers, accelerator, on_broken)
        for name, split in splits.items()
        if name != "train"
    }
    loaders["train"] = training_batches(
        splits["train"],
        train_transform(recipe.augmentation, recipe.image_size, recipe.auto_augment, on_broken),
        TrainBatch(recipe.augmentation, recipe.image_mean, recipe.image_std, recipe.mixup_alpha, recipe.cutmix_alpha),
        recipe.batch_size,
        accelerator,
        sampler=make_sampler(splits["train"], recipe, run.seed),
        passes=recipe.passes_per_epoch,
        num_workers=run.num_workers,
        seed=run.seed,
    )
    return loaders


def make_sampler(split, recipe: TrainingRecipe, seed: int) -> LongTailedSampler | None:
    """What draws an epoch's images; None where each comes once, in random order."""
    if recipe.sampler == "instance":
        return None
    counts = class_counts(split)
    all_images = len(split) * recipe.passes_per_epoch
    draws = all_images if recipe.sampler_epoch == "images" else len(counts) * max(counts)
    return LongTailedSampler(class_labels(split), len(counts), recipe.sampler, draws, recipe.epochs, seed)


def describe(recipe: TrainingRecipe, model: nn.Module, counts: list[int], splits, accelerator: Accelerator) -> None:
    """Says what is going to be trained, on what and where."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    best = "the one of the best balanced accuracy on validation"
    rule = best if "validation" in splits else "the last, there being no validation split"
    accelerator.print(
        f"{recipe.name}: {parameters:,} parameters; {sizes} images, {len(counts)} classes of {max(counts)} to "
        f"{min(counts)} training images; {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"precision {accelerator.mixed_precision}. The checkpoint tested is {rule}."
    )


if __name__ == "__main__":
    main()
