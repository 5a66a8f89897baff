"""Train a long-tailed image classifier: `accelerate launch train_accelerate.py [--recipe NAME] [--OPTION VALUE ...]`.

Without arguments it trains the default recipe, on images that come with scikit-learn. `--help` lists every option.
The output folder gets `recipe.json` and `run.json`; `metrics.jsonl`, one line an epoch; TensorBoard scalars; the
checkpoints `last` and `best`, each a Hugging Face folder; and `test_results.json`. SIGTERM, SIGUSR1 and Ctrl-C save a
checkpoint and end the run with exit code 75; `--resume` goes on as if nothing had happened.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import filter_trackers
from accelerate.utils import ProjectConfiguration, set_seed
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import BitImageProcessor
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
from ride_bf.command_line.messages import dead_workers_as_messages, errors_as_messages
from ride_bf.evaluation.predict import evaluate
from ride_bf.evaluation.tables import accuracy_table, shot_summary
from ride_bf.hub.upload import RunPublisher
from ride_bf.methods.objectives import make_objective
from ride_bf.methods.samplers import LongTailedSampler
from ride_bf.methods.teacher import load_teacher
from ride_bf.methods.windows import set_batchformer_window
from ride_bf.recipes import TrainingRecipe
from ride_bf.runs.checkpoints import (
    BEST,
    LAST,
    TRAINING_STATE,
    CheckpointError,
    read_facts,
    save_model,
    save_training_state,
)
from ride_bf.runs.run_folder import BROKEN_IMAGES, log_metrics, open_run_folder, read_broken_images
from ride_bf.training.arguments import RunArguments, check_starting_models, parse_arguments
from ride_bf.training.cost import run_cost
from ride_bf.training.ema import WeightAverage
from ride_bf.training.freezing import set_train_mode, train_only
from ride_bf.training.interruption import EXIT_CODE, Interruption
from ride_bf.training.loss_monitor import LossMonitor
from ride_bf.training.optimizer import make_optimizer, to_fast_layout
from ride_bf.training.start_weights import initialise_from

STEPS_BETWEEN_READINGS = 10  # reading the loss, or whether another process is to stop, waits for the device


@dataclass
class Progress:
    """Where a run is; saved in its checkpoints."""

    epochs_done: int = 0
    batches_done: int = 0  # of the epoch that has begun
    steps_done: int = 0
    loss_sums: list[float] = field(default_factory=lambda: [0.0])  # of that epoch's batches, for each process
    best: dict[str, Any] = field(default_factory=dict)  # the facts of the checkpoint `best`
    evaluations_without_gain: int = 0
    seconds: float = 0.0  # of training, in all sessions

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)


@dataclass
class Training:
    """What a run works with."""

    run: RunArguments
    recipe: TrainingRecipe
    accelerator: Accelerator
    model: nn.Module
    weights: WeightAverage
    objective: nn.Module
    optimizer: Optimizer
    clip_gradients: Callable[[], object]
    schedule: LambdaLR
    loaders: dict[str, FinishedBatches]
    processor: BitImageProcessor
    class_counts: list[int]
    progress: Progress
    interruption: Interruption
    hub: RunPublisher

    @property
    def output_dir(self) -> Path:
        return Path(self.run.output_dir)

    def finished(self) -> bool:
        patience = self.run.early_stopping_patience
        return (
            self.progress.epochs_done >= self.recipe.epochs
            or (self.run.max_steps is not None and self.progress.steps_done >= self.run.max_steps)
            or (patience is not None and self.progress.evaluations_without_gain >= patience)
        )


def main() -> None:
    run, recipe = parse_arguments()
    if run.print_recipe:
        print(recipe.as_json())
        return
    expected = (BrokenImageError, CheckpointError, FloatingPointError)
    with Interruption() as interruption, errors_as_messages(*expected), dead_workers_as_messages():
        train(run, recipe, interruption)


def train(run: RunArguments, recipe: TrainingRecipe, interruption: Interruption) -> None:
    """A whole run: training, and the test of the checkpoint that it chooses."""
    logging.disable_progress_bar()  # one for every file written hides the run's own
    output_dir = Path(run.output_dir)
    with errors_as_messages():
        check_starting_models(run, recipe)
        accelerator = make_accelerator(run, recipe)
        check_processes(run, recipe, accelerator)
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
        describe(run, recipe, model, counts, splits, accelerator)
        if run.dry_run:
            accelerator.print(run_cost(model, recipe, len(splits["train"]), accelerator.num_processes))
            return
        hub = RunPublisher(output_dir, run.push_to_hub, run.push_every, run.push_private, accelerator.is_main_process)
        settings = run.settings() | {
            "num_processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
        }
        checkpoint = open_run_folder(
            output_dir, recipe, settings, accelerator, run.resume, run.overwrite_output_dir, run.allow_changes or ()
        )

    schedule = LambdaLR(optimizer, recipe.learning_rate_factor)
    progress = Progress()
    model, optimizer = accelerator.prepare(model, optimizer)
    weights = WeightAverage(accelerator.unwrap_model(model), recipe.ema_decay)
    # The schedule counts epochs. Were it prepared, Accelerate would step it once for every process.
    accelerator.register_for_checkpointing(schedule, progress, weights)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint / TRAINING_STATE))
        accelerator.print(
            f"resumed after epoch {progress.epochs_done} of {recipe.epochs}, batch {progress.batches_done} of the "
            f"next, step {progress.steps_done}"
        )
    purge = {"tensorboard": {"purge_step": progress.steps_done + 1}} if checkpoint is not None else {}
    accelerator.init_trackers("" if run.report_to == "tensorboard" else "ride_bf", init_kwargs=purge)
    training = Training(
        run,
        recipe,
        accelerator,
        model,
        weights,
        objective,
        optimizer,
        make_clipping(accelerator, model, recipe.max_grad_norm),
        schedule,
        loaders,
        processor,
        counts,
        progress,
        interruption,
        hub,
    )
    while not training.finished():
        train_epoch(training)
    test(training, names)
    accelerator.end_training()
    hub.after_training()


def train_epoch(training: Training) -> None:
    """The epoch that `training.progress` is in, from the batch it is at, to its end or the run's."""
    accelerator, recipe, progress = training.accelerator, training.recipe, training.progress
    batches, model, optimizer = training.loaders["train"], training.model, training.optimizer
    epoch, first = progress.epochs_done, progress.batches_done
    batches.set_epoch(epoch)
    set_train_mode(model)
    reweight = recipe.reweight(epoch)
    monitor = LossMonitor(accelerator, training.output_dir, batches.describe, progress.loss_sums, first)
    started = time.perf_counter()
    bar = tqdm(
        total=len(batches),
        initial=first,
        desc=f"epoch {epoch + 1}",
        leave=False,
        mininterval=1.0,
        disable=not accelerator.is_local_main_process,
    )
    for batch in batches.batches_from(first):
        with accelerator.accumulate(model):
            outputs = model(batch["pixel_values"])
            loss = training.objective(outputs, batch, reweight=reweight)
            accelerator.backward(loss)
            training.clip_gradients()
            optimizer.step()
            optimizer.zero_grad()
        monitor.add(loss, batch)
        progress.batches_done += 1
        bar.update()
        if accelerator.sync_gradients:  # a step is complete
            training.weights.update()
            progress.steps_done += 1
            between_steps(training, monitor, bar)
            if training.finished():
                break
    else:
        progress.batches_done = len(batches)  # a last batch of broken images alone was passed over
    bar.close()
    seconds = time.perf_counter() - started
    images = (progress.batches_done - first) * recipe.batch_size / recipe.gradient_accumulation_steps
    progress.seconds += seconds
    end_epoch(training, monitor, {"images_per_second": images / seconds, "seconds": seconds})


def between_steps(training: Training, monitor: LossMonitor, bar: tqdm) -> None:
    """What is due between two steps of an epoch: reading the loss, evaluation, a checkpoint, the end of an interrupted
    run. Raises SystemExit for the last, FloatingPointError if the loss is lost."""
    accelerator, run, progress = training.accelerator, training.run, training.progress
    step, rate = progress.steps_done, training.optimizer.param_groups[0]["lr"]
    reading = step % STEPS_BETWEEN_READINGS == 0
    if reading:
        bar.set_postfix(loss=f"{monitor.read(step, rate):.3f}", lr=f"{rate:.3g}")
    if progress.batches_done == len(training.loaders["train"]):
        return  # the end of the epoch brings all that is below
    if is_due(step, run.eval_steps) and "validation" in training.loaders:
        monitor.read(step, rate)
        metrics, summary = validate(training)
        log_metrics(training.output_dir, step, metrics, accelerator)
        accelerator.print(f"step {step}{summary}")
        set_train_mode(training.model)
    received = training.interruption.agreed(accelerator) if reading or accelerator.num_processes == 1 else None
    if received or is_due(step, run.save_steps):
        monitor.read(step, rate)  # nothing is saved that is lost already
        progress.loss_sums = monitor.sums()
        save(training)
    if received:
        stop(training, received.name)


def end_epoch(training: Training, monitor: LossMonitor, speed: dict[str, float]) -> None:
    """Evaluation, log and checkpoint of an epoch, or of the part of one with which a run ends.

    `speed` is logged with the rest: images a second and seconds, since the epoch was begun or gone on with.
    """
    accelerator, recipe, progress = training.accelerator, training.recipe, training.progress
    rate = training.optimizer.param_groups[0]["lr"]
    monitor.read(progress.steps_done, rate)
    metrics = {
        "epoch": progress.epochs_done + 1,
        "train_loss": monitor.mean(),
        "learning_rate": rate,
        **speed,
    }
    if progress.batches_done == len(training.loaders["train"]):
        training.schedule.step()
        progress.epochs_done += 1
        progress.batches_done, progress.loss_sums = 0, [0.0]
    else:
        progress.loss_sums = monitor.sums()
    summary = f"epoch {metrics['epoch']:>{len(str(recipe.epochs))}}/{recipe.epochs}  loss {metrics['train_loss']:.3f}"
    if "validation" in training.loaders:
        validation, words = validate(training)
        metrics |= validation
        summary += words
    log_metrics(training.output_dir, progress.steps_done, metrics, accelerator)
    save(training)
    accelerator.print(summary)
    training.hub.after_epoch(progress.epochs_done)
    received = training.interruption.agreed(accelerator)
    if received and not training.finished():
        stop(training, received.name)


def validate(training: Training) -> tuple[dict[str, Any], str]:
    """Evaluates on the validation images, and keeps the checkpoint `best`: that of the best balanced accuracy.

    Returns the metrics to log, and words for them.
    """
    progress = training.progress
    metrics = evaluate(
        training.weights.evaluated, training.loaders["validation"], training.accelerator, training.class_counts
    )
    progress.evaluations_without_gain += 1
    # of equals the later one, which has seen more
    if metrics["balanced_accuracy"] >= progress.best.get("balanced_accuracy", -1.0):
        if metrics["balanced_accuracy"] > progress.best.get("balanced_accuracy", -1.0):
            progress.evaluations_without_gain = 0
        progress.best = {**facts(training), "balanced_accuracy": metrics["balanced_accuracy"]}
        save_model(
            training.output_dir / BEST,
            training.accelerator,
            training.weights.evaluated,
            training.processor,
            progress.best,
        )
    return {f"validation_{name}": value for name, value in metrics.items()}, f"  validation: {shot_summary(metrics)}"


def facts(training: Training) -> dict[str, Any]:
    """What a checkpoint says of itself: epochs, a part of one counted by its share, and steps."""
    progress = training.progress
    share = round(progress.batches_done / len(training.loaders["train"]), 3)
    return {
        "epoch": progress.epochs_done + share if share else progress.epochs_done,
        "step": progress.steps_done,
        "train_class_counts": training.class_counts,
    }


def save(training: Training) -> None:
    """The checkpoint `last`, from which the run can go on."""
    save_training_state(
        training.output_dir,
        training.accelerator,
        training.weights.evaluated,
        training.processor,
        facts(training),
        training.run.keep_last,
    )


def stop(training: Training, signal_name: str) -> None:
    """Ends a run that was asked to, once its checkpoint is written. Raises SystemExit with `EXIT_CODE`."""
    training.accelerator.print(
        f"\n{signal_name}: stopped after step {training.progress.steps_done}; the checkpoint is "
        f"{training.output_dir / LAST}. The same command with --resume goes on"
    )
    training.accelerator.end_training()
    raise SystemExit(EXIT_CODE)


def is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def test(training: Training, names: list[str]) -> None:
    """Evaluates the chosen checkpoint on the test images, prints the report and writes `test_results.json`."""
    accelerator, output_dir, counts = training.accelerator, training.output_dir, training.class_counts
    chosen = BEST if "validation" in training.loaders else LAST
    model = RideBfForImageClassification.from_pretrained(output_dir / chosen)
    model = accelerator.prepare_model(to_fast_layout(model), evaluation_mode=True)
    chosen_facts = read_facts(output_dir / chosen)
    results = {
        "recipe": training.recipe.name,
        "seed": training.run.seed,
        "checkpoint": chosen,
        "epoch": chosen_facts["epoch"],
        "step": chosen_facts["step"],
        "class_names": names,
        "train_class_counts": counts,
        "test": evaluate(model, training.loaders["test"], accelerator, counts),
    }
    broken = read_broken_images(output_dir)
    if broken:
        results["broken_images"] = broken
        accelerator.print(f"\n{len(broken)} images could not be read and were left out, the first: {broken[0]}")
    if accelerator.is_main_process:
        (output_dir / "test_results.json").write_text(json.dumps(results, indent=2) + "\n")
    accelerator.print(f"\nTest images, checkpoint '{chosen}' (epoch {results['epoch']}):")
    accelerator.print(accuracy_table(results["test"], counts, names))
    progress = training.progress
    minutes, images = progress.seconds / 60, progress.steps_done * training.recipe.batch_size
    accelerator.print(
        f"\n{progress.steps_done:,} steps of {training.recipe.batch_size} images in {minutes:.1f} minutes of training, "
        f"{images / max(progress.seconds, 1e-9):,.0f} images/s\nThe trained model: {output_dir / chosen}"
    )


def make_accelerator(run: RunArguments, recipe: TrainingRecipe) -> Accelerator:
    """Devices, precision and processes are `accelerate launch`'s business; this names folders and the data's seed."""
    output_dir = Path(run.output_dir)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not run.deterministic
    trackers = [] if run.report_to == "none" else [run.report_to]
    if trackers and not filter_trackers(trackers, str(output_dir)):
        raise ValueError(f"{run.report_to} is not installed: pip install {run.report_to}, or set --report_to none")
    accelerator = Accelerator(
        log_with=trackers or None,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "tensorboard")),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=run.seed, non_blocking=True),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("fp16 needs a GPU; on a CPU use --mixed_precision bf16 or no")
    return accelerator


def check_processes(run: RunArguments, recipe: TrainingRecipe, accelerator: Accelerator) -> None:
    """Raises ValueError for what several processes cannot do."""
    shares = accelerator.num_processes * recipe.gradient_accumulation_steps
    if recipe.batch_size % shares:
        raise ValueError(
            f"batch_size {recipe.batch_size} is that of a whole step and cannot be shared out among "
            f"{accelerator.num_processes} process(es) of {recipe.gradient_accumulation_steps} batch(es); set "
            "--batch_size to a multiple"
        )
    gathered = recipe.network.get("batchformer", "none") != "none" and recipe.batchformer_window != "local"
    if run.on_broken_image == "skip" and gathered and accelerator.num_processes > 1:
        raise ValueError(
            "windows that reach across processes need equally many images in each, which --on_broken_image skip does "
            "not leave: take the broken ones out (python -m ride_bf.check_data lists them) or set "
            "--batchformer_window local"
        )


def make_clipping(accelerator: Accelerator, model: nn.Module, max_norm: float) -> Callable[[], object]:
    """What clips the gradients of a complete step; nothing if `max_norm` is 0."""

    def clip() -> None:
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), max_norm)

    return clip if max_norm > 0 else lambda: None


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
        recipe.batch_size // recipe.gradient_accumulation_steps,
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


def describe(
    run: RunArguments,
    recipe: TrainingRecipe,
    model: RideBfForImageClassification,
    counts: list[int],
    splits,
    accelerator: Accelerator,
) -> None:
    """Says what is going to be trained, on what and where, and by which rule a checkpoint is chosen."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    best = "the one of the best balanced accuracy on validation"
    rule = best if "validation" in splits else "the last, there being no validation split"
    accelerator.print(
        f"{recipe.name}: {parameters:,} parameters; {sizes} images, {len(counts)} classes of {max(counts)} to "
        f"{min(counts)} training images; {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"precision {accelerator.mixed_precision}. The checkpoint tested is {rule}."
    )
    if model.batchformer is not None:
        held = recipe.batch_size // accelerator.num_processes // recipe.gradient_accumulation_steps
        gathered = held * accelerator.num_processes
        window = {"local": held, "global": gathered}.get(recipe.batchformer_window, recipe.batchformer_window)
        accelerator.print(
            f"The BatchFormer's windows hold {min(window, gathered)} images"
            + (
                f", not {window}: a step's {recipe.batch_size} are accumulated from "
                f"{recipe.gradient_accumulation_steps} batches"
                if window > gathered
                else ""
            )
        )


if __name__ == "__main__":
    main()
