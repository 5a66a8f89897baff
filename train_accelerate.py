"""Train a long-tailed image classifier: `accelerate launch train_accelerate.py [--recipe NAME] [--OPTION VALUE ...]`.

Without arguments it trains the default recipe, on images that come with scikit-learn. `--help` lists every option.
The output folder gets `recipe.json`; `metrics.jsonl`, one line an epoch; TensorBoard scalars; the checkpoints `last`
and `best`, each a Hugging Face folder; and `test_results.json`.
"""

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import ProjectConfiguration, set_seed
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from data import (
    class_counts,
    class_labels,
    evaluation_processor,
    evaluation_transform,
    load_long_tailed,
    train_transform,
)
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.checkpoints import find_checkpoint, save_model, save_training_state
from ride_bf.command_line import RunArguments, parse_arguments
from ride_bf.evaluate import evaluate
from ride_bf.objectives import make_objective
from ride_bf.parts import initialise_from, load_teacher, set_train_mode, train_only
from ride_bf.recipes import TrainingRecipe
from ride_bf.report import accuracy_table, shot_summary
from ride_bf.samplers import LongTailedSampler

STEPS_BETWEEN_READINGS = 10  # reading the loss waits for the device


@dataclass
class Progress:
    """Where a run is; saved in its checkpoints."""

    epochs_done: int = 0
    best_epoch: int = 0
    best_accuracy: float = -1.0

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)


def main() -> None:
    run, recipe = parse_arguments()
    if run.print_recipe:
        print(recipe.as_json())
        return
    logging.disable_progress_bar()  # one for every file written hides the run's own
    output_dir = Path(run.output_dir)
    accelerator = make_accelerator(output_dir, run.seed)
    with accelerator.main_process_first():  # the others find the cache of the first
        splits = load_long_tailed(recipe.dataset, run.data_dir, validation_fraction=run.validation_fraction)
    counts = class_counts(splits["train"])
    names = splits["train"].features["label"].names

    set_seed(run.seed)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    model = RideBfForImageClassification(recipe.config(**labels))
    if run.init_from is not None:
        initialise_from(model, run.init_from, new_parts=[recipe.train_only] if recipe.train_only != "all" else [])
    train_only(model, recipe.train_only)
    teacher = None if run.teacher is None else load_teacher(run.teacher, names)
    objective = make_objective(recipe, counts, teacher).to(accelerator.device)
    optimizer = SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
    schedule = LambdaLR(optimizer, recipe.learning_rate_factor)
    processor = evaluation_processor(recipe.resize_size, recipe.image_size, recipe.image_mean, recipe.image_std)
    loaders = make_loaders(splits, processor, run, recipe, accelerator)
    progress = Progress()

    model, optimizer = accelerator.prepare(model, optimizer)
    # The schedule counts epochs. Were it prepared, Accelerate would step it once for every process.
    accelerator.register_for_checkpointing(schedule, progress)
    set_seed(run.seed, device_specific=True)  # every process augments differently
    prepare_output_dir(output_dir, run, recipe, accelerator)
    if run.resume:
        accelerator.load_state(str(find_checkpoint(output_dir / "last")))
        accelerator.print(f"resumed after epoch {progress.epochs_done} of {recipe.epochs}")
    accelerator.init_trackers("")
    describe(recipe, model, counts, splits, accelerator)

    while progress.epochs_done < recipe.epochs:
        epoch = progress.epochs_done
        metrics = train_epoch(model, objective, loaders["train"], optimizer, accelerator, epoch, recipe)
        schedule.step()
        progress.epochs_done += 1
        summary = f"epoch {epoch + 1:>{len(str(recipe.epochs))}}/{recipe.epochs}  loss {metrics['train_loss']:.3f}"
        if "validation" in loaders:
            validation = evaluate(model, loaders["validation"], accelerator, counts)
            metrics |= {f"validation_{name}": value for name, value in validation.items()}
            summary += f"  validation: {shot_summary(validation)}"
            if validation["accuracy"] >= progress.best_accuracy:  # of equals the later, which has seen more
                progress.best_epoch, progress.best_accuracy = epoch + 1, validation["accuracy"]
                save_model(output_dir / "best", accelerator, model, processor)
        save_training_state(output_dir / "last", accelerator, model, processor)
        log_epoch(output_dir, metrics, epoch, accelerator)
        accelerator.print(summary)

    chosen = "best" if "validation" in loaders else "last"
    model = RideBfForImageClassification.from_pretrained(output_dir / chosen)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    results = {
        "recipe": recipe.name,
        "seed": run.seed,
        "checkpoint": chosen,
        "epoch": progress.best_epoch if chosen == "best" else progress.epochs_done,
        "class_names": names,
        "train_class_counts": counts,
        "test": evaluate(model, loaders["test"], accelerator, counts),
    }
    if accelerator.is_main_process:
        (output_dir / "test_results.json").write_text(json.dumps(results, indent=2) + "\n")
    accelerator.print(f"\nTest images, checkpoint '{chosen}' (epoch {results['epoch']}):")
    accelerator.print(accuracy_table(results["test"], counts, names))
    accelerator.print(f"\nThe trained model: {output_dir / chosen}")
    accelerator.end_training()


def train_epoch(
    model: nn.Module,
    objective: nn.Module,
    loader: DataLoader,
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
            "epochs before are kept: resume with a lower --learning_rate or without reduced precision"
        )
    return {
        "train_loss": mean_loss,
        "learning_rate": learning_rate,
        "images_per_second": images / (time.perf_counter() - started),
    }


def make_accelerator(output_dir: Path, seed: int) -> Accelerator:
    """Devices, precision and processes are `accelerate launch`'s business; this names folders and the data's seed."""
    accelerator = Accelerator(
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "tensorboard")),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise SystemExit("error: fp16 needs a GPU; on a CPU use --mixed_precision bf16 or no")
    return accelerator


def make_loaders(
    splits, processor, run: RunArguments, recipe: TrainingRecipe, accelerator: Accelerator
) -> dict[str, DataLoader]:
    """A prepared loader for each split; the training one shuffles and augments."""
    if recipe.batch_size % accelerator.num_processes:
        raise SystemExit(
            f"error: batch_size {recipe.batch_size} is that of all processes together and cannot be "
            f"shared out among {accelerator.num_processes}; set --batch_size to a multiple"
        )
    augment = train_transform(recipe.augmentation, recipe.image_size, recipe.image_mean, recipe.image_std)
    prepare = evaluation_transform(processor)
    loaders = {}
    for name, split in splits.items():
        train = name == "train"
        rows = split.repeat(recipe.passes_per_epoch).with_transform(augment) if train else split.with_transform(prepare)
        sampler = make_sampler(split, recipe, run.seed) if train else None
        loaders[name] = DataLoader(
            rows,
            batch_size=recipe.batch_size // accelerator.num_processes if train else run.eval_batch_size,
            sampler=sampler,
            shuffle=train and sampler is None,
            num_workers=run.num_workers,
            pin_memory=accelerator.device.type == "cuda",
            persistent_workers=train and run.num_workers > 0,
        )
    return {name: accelerator.prepare(loader) for name, loader in loaders.items()}


def make_sampler(split, recipe: TrainingRecipe, seed: int) -> LongTailedSampler | None:
    """What draws an epoch's images; None where each comes once, in random order."""
    if recipe.sampler == "instance":
        return None
    counts = class_counts(split)
    all_images = len(split) * recipe.passes_per_epoch
    draws = all_images if recipe.sampler_epoch == "images" else len(counts) * max(counts)
    return LongTailedSampler(class_labels(split), len(counts), recipe.sampler, draws, recipe.epochs, seed)


def prepare_output_dir(output_dir: Path, run: RunArguments, recipe: TrainingRecipe, accelerator: Accelerator) -> None:
    """Makes a folder for a new run, or checks that the run to be resumed is this one. Exits, saying why, if not."""
    written = output_dir / "recipe.json"
    problem = None
    if run.resume and not written.is_file():
        problem = f"{output_dir} holds no run to resume; start without --resume, or name the run's --output_dir"
    elif run.resume:
        changed = recipe.differences(written.read_text())
        if changed:
            problem = f"{output_dir} holds a run of another recipe; differences: {'; '.join(changed)}"
    elif written.is_file() and not run.overwrite_output_dir:
        problem = (
            f"{output_dir} holds a run already; go on with it by --resume, delete it by --overwrite_output_dir, "
            "or name another --output_dir"
        )
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    if problem:
        raise SystemExit(f"error: {problem}")
    if accelerator.is_main_process and not run.resume:
        for old_run in ("last", "best", "tensorboard"):
            shutil.rmtree(output_dir / old_run, ignore_errors=True)
        for old_file in ("metrics.jsonl", "test_results.json"):
            (output_dir / old_file).unlink(missing_ok=True)
        output_dir.mkdir(parents=True, exist_ok=True)
        written.write_text(recipe.as_json())
    accelerator.wait_for_everyone()


def describe(recipe: TrainingRecipe, model: nn.Module, counts: list[int], splits, accelerator: Accelerator) -> None:
    """Says what is going to be trained, on what and where."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    rule = "the best on validation" if "validation" in splits else "the last, there being no validation split"
    accelerator.print(
        f"{recipe.name}: {parameters:,} parameters; {sizes} images, {len(counts)} classes of {max(counts)} to "
        f"{min(counts)} training images; {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"precision {accelerator.mixed_precision}. The checkpoint tested is {rule}."
    )


def log_epoch(output_dir: Path, metrics: dict, epoch: int, accelerator: Accelerator) -> None:
    """A line of metrics.jsonl, in place of that of a run that was resumed before it, and TensorBoard scalars."""
    if accelerator.is_main_process:
        path = output_dir / "metrics.jsonl"
        lines = path.read_text().splitlines()[:epoch] if path.is_file() else []
        path.write_text("\n".join([*lines, json.dumps({"epoch": epoch + 1, **metrics})]) + "\n")
    accelerator.log({name: value for name, value in metrics.items() if isinstance(value, float)}, step=epoch + 1)


if __name__ == "__main__":
    main()
