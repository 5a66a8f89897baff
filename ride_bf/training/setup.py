"""Sets up a run: makes everything that training needs from the options of the command."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, set_seed
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import BitImageProcessor

from data import (
    FinishedBatches,
    evaluation_processor,
    load_long_tailed,
)
from data.class_names import name_classes
from data.notices import printed_notices
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.hub.upload import RunPublisher
from ride_bf.methods.objectives import make_objective
from ride_bf.methods.teacher import describe_teacher, load_teacher
from ride_bf.methods.windows import check_windows, describe_windows
from ride_bf.recipes import TrainingRecipe
from ride_bf.recipes.network_options import NETWORK_DEFAULTS
from ride_bf.runs.checkpoints import TRAINING_STATE, check_loadable
from ride_bf.runs.engine import start_accelerator
from ride_bf.runs.models import to_fast_layout
from ride_bf.runs.provenance import TrainingData, check_same_data, describe_data, read_data
from ride_bf.runs.run_folder import TENSORBOARD, RunFolder, excluded_in
from ride_bf.training.arguments import RunArguments, check_starting_models
from ride_bf.training.backbone import (
    Backbone,
    UnreachableError,
    check_image_size,
    load_backbone,
    processor_facts,
    with_backbone_of,
    with_drop_path,
)
from ride_bf.training.batch_norm import check_batch_norm, check_synchronised, synchronise_batch_norm
from ride_bf.training.collapse import CollapseMonitor
from ride_bf.training.cost import run_cost
from ride_bf.training.effects import check_effect_of_options, check_effects
from ride_bf.training.ema import WeightAverage
from ride_bf.training.ending import end_training
from ride_bf.training.freezing import freeze_batch_norm, parameter_counts, train_only
from ride_bf.training.heads import start_heads
from ride_bf.training.loaders import RunLoaders, draws_per_epoch
from ride_bf.training.lora import add_lora
from ride_bf.training.optimizer import Schedule, make_optimizer
from ride_bf.training.progress import Progress
from ride_bf.training.running_statistics import RunningStatistics
from ride_bf.training.sharding import check_sharding, prepare_network
from ride_bf.training.start_weights import check_frozen_classes, initialise_from
from ride_bf.training.text_start import check_names_are_words, prompt_for, text_class_vectors
from ride_bf.training.tracking import check_tracker, start_tracker


@dataclass(kw_only=True)
class TrainingParts:
    """Everything that a run needs.

    Attributes:
        run, recipe: the options.
        accelerator: handles devices, precision and processes.
        folder: where the results go.
        loaders: one for each split; "validation" only if there is such a split.
        processor: the image processor that is saved beside the model.
        data: the training data, as the checkpoints describe them.
        class_names, class_counts: (C,) of the training split.
        model: the network, prepared for the accelerator's processes.
        weights: the average of its weights, or the network itself; this is evaluated and saved.
        statistics: the running statistics of both, in each process.
        objective: the loss to minimise.
        optimizer, schedule: the updates of the weights and their learning rate.
        clip_gradients: clips the gradients of a complete step, if the recipe asks for it.
        progress: how far the run has come.
        collapse: watches the BatchFormer, if there is one.
        publisher: pushes the run to the Hub, if asked to.
    """

    run: RunArguments
    recipe: TrainingRecipe
    accelerator: Accelerator
    folder: RunFolder
    loaders: dict[str, FinishedBatches]
    processor: BitImageProcessor
    data: TrainingData
    class_names: list[str]
    class_counts: list[int]
    model: nn.Module
    weights: WeightAverage
    statistics: RunningStatistics
    objective: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    clip_gradients: Callable[[], object]
    progress: Progress
    collapse: CollapseMonitor
    publisher: RunPublisher


def set_up(run: RunArguments, recipe: TrainingRecipe, folder: RunFolder) -> dict[str, Any] | None:
    """Makes the arguments of `TrainingParts` and opens the folder of the run. None for a dry run, which writes nothing.

    Raises ValueError or OSError for a run that cannot be trained, before anything is written.
    """
    check_starting_models(run, recipe)
    accelerator = make_accelerator(run, recipe)
    check_processes(run, recipe, accelerator)
    publisher = RunPublisher(
        Path(run.output_dir),
        run.push_to_hub,
        run.push_license,
        run.push_every,
        run.push_private,
        accelerator.is_main_process,
    )
    # the other processes use the cache that the first one makes
    with accelerator.main_process_first(), printed_notices(accelerator.print):
        excluded = excluded_in(Path(run.output_dir) if run.resume else None, run.exclude)
        splits = load_long_tailed(recipe.dataset, **run.data_options() | {"exclude": excluded})
    check_effect_of_options(run, splits)
    splits, names_in_data = name_classes(splits, run.class_names)
    data = describe_data(
        splits,
        recipe.dataset,
        max_image_pixels=run.max_image_pixels,
        names_in_data=names_in_data,
        **run.data_options(),
    )
    counts, names = data.train_class_counts, data.class_names
    with accelerator.main_process_first():  # it downloads
        backbone, recipe = find_backbone(run, recipe)
        text_vectors = vectors_of_text(run, recipe, data, accelerator)
    processor = make_processor(recipe) if backbone is None else backbone.processor
    set_seed(run.seed)
    model = make_model(names, run, recipe, accelerator, backbone)
    run_loaders = RunLoaders(splits, processor, run, recipe, accelerator, model)
    check_batch_norm(model, recipe, draws_per_epoch(counts, recipe), accelerator.num_processes)
    teacher = None if run.teacher is None else load_teacher(run.teacher, names, processor, accelerator.autocast)
    if teacher is not None:
        accelerator.print(describe_teacher(teacher))
    objective = to_fast_layout(make_objective(recipe, counts, teacher)).to(accelerator.device)
    optimizer = make_optimizer(model, recipe, sharded=accelerator.is_fsdp2)
    describe(run, recipe, model, counts, splits, accelerator)
    if run.dry_run:
        cost = run_cost(
            model,
            recipe,
            batches_per_epoch=len(run_loaders.make()["train"]),
            draws_per_epoch=draws_per_epoch(counts, recipe),
            images_seen_once=run_loaders.images_seen_once,
            num_processes=accelerator.num_processes,
            sharded=accelerator.is_fsdp2,
            max_steps=run.max_steps,
        )
        accelerator.print(cost)
        end_training(accelerator)
        return None

    settings = run.settings() | {
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }

    def check(checkpoint: Path) -> None:
        if (before := read_data(checkpoint)) is not None:
            check_same_data(checkpoint, before, data)
        check_loadable(checkpoint, sharded=accelerator.is_fsdp2)

    folder.open(
        accelerator,
        recipe,
        settings,
        resume=run.resume,
        overwrite=run.overwrite_output_dir,
        allow_changes=run.allow_changes or (),
        check=check,
    )
    # From here on images are read, and those that are broken are listed in the folder.
    if not run.resume and run.init_from is None:
        start_heads(model, recipe, run_loaders, text_vectors)
    loaders = run_loaders.make()
    steps_per_epoch = math.ceil(len(loaders["train"]) / recipe.gradient_accumulation_steps)
    schedule = Schedule(optimizer, recipe, steps_per_epoch)
    progress = Progress()
    synchronise_batch_norm(model, recipe, accelerator.num_processes)
    model, optimizer, weights = prepare_network(accelerator, model, optimizer, recipe.ema_decay)
    statistics = RunningStatistics(accelerator, *weights.networks)
    # Were the schedule prepared, Accelerate would step it once for every process.
    accelerator.register_for_checkpointing(schedule, progress, weights)
    if folder.checkpoint is not None:
        accelerator.load_state(str(folder.checkpoint / TRAINING_STATE))
        statistics.restore(progress.running_statistics)
        accelerator.print(
            f"resumed after epoch {progress.epochs_done} of {recipe.epochs}, batch {progress.batches_done} of the "
            f"next, step {progress.steps_done}"
        )
    start_tracker(
        accelerator,
        recipe,
        settings,
        tracker=run.report_to,
        name=folder.path.name,
        run_id=folder.run_id,
        steps_done=progress.steps_done,
    )
    return {
        "run": run,
        "recipe": recipe,
        "accelerator": accelerator,
        "folder": folder,
        "loaders": loaders,
        "processor": processor,
        "data": data,
        "class_names": names,
        "class_counts": counts,
        "model": model,
        "weights": weights,
        "statistics": statistics,
        "objective": objective,
        "optimizer": optimizer,
        "schedule": schedule,
        "clip_gradients": make_clipping(accelerator, model, recipe.max_grad_norm),
        "progress": progress,
        "collapse": CollapseMonitor(
            accelerator, accelerator.unwrap_model(model).batch_module, recipe.batchformer_window, progress.collapse
        ),
        "publisher": publisher,
    }


def make_accelerator(run: RunArguments, recipe: TrainingRecipe) -> Accelerator:
    """The run's Accelerator. `accelerate launch` chooses devices, precision and processes."""
    output_dir = Path(run.output_dir)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not run.deterministic
    trackers = [] if run.report_to == "none" else [run.report_to]
    check_tracker(run.report_to)
    return start_accelerator(
        can_shard=True,
        log_with=trackers or None,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / TENSORBOARD)),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=run.seed, non_blocking=True),
        # Each process keeps the running statistics of its own images; `RunningStatistics` averages them.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def check_processes(run: RunArguments, recipe: TrainingRecipe, accelerator: Accelerator) -> None:
    """Raises ValueError for settings that do not work with this number of processes."""
    shares = accelerator.num_processes * recipe.gradient_accumulation_steps
    if recipe.batch_size % shares:
        raise ValueError(
            f"batch_size {recipe.batch_size} is that of a whole step and cannot be divided among "
            f"{accelerator.num_processes} process(es) with {recipe.gradient_accumulation_steps} batch(es) each; set "
            f"--batch_size to a multiple of {shares}"
        )
    check_synchronised(recipe, accelerator)
    check_sharding(recipe, accelerator)
    check_windows(recipe, accelerator.num_processes, skips_images=run.on_broken_image == "skip")


def make_clipping(accelerator: Accelerator, model: nn.Module, max_norm: float) -> Callable[[], object]:
    """A function that clips the gradients of a complete step. It does nothing if `max_norm` is 0."""

    def clip() -> None:
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), max_norm)

    return clip if max_norm > 0 else lambda: None


def make_processor(recipe: TrainingRecipe) -> BitImageProcessor:
    """The image processor of a recipe without a backbone."""
    return evaluation_processor(recipe.resize_size, recipe.image_size, recipe.image_mean, recipe.image_std)


def find_backbone(run: RunArguments, recipe: TrainingRecipe) -> tuple[Backbone | None, TrainingRecipe]:
    """The backbone that is named or, without `--backbone`, that of the model that the run starts from or of the recipe.

    Returns it with the recipe, which has its image options. The processor is the backbone's own, with the recipe's
    `image_size` and `crop`. Raises ValueError for an option that cannot act on the backbone of the model, and the
    errors of `with_backbone_of` and `load_backbone`.
    """
    if run.init_from is not None and "backbone" not in run.given:
        chosen = {"image_size": recipe.image_size} if "image_size" in run.given else {}
        recipe = with_backbone_of(run.init_from, recipe, **chosen)
        values = {**vars(run), **vars(recipe), **NETWORK_DEFAULTS, **recipe.network}
        check_effects(run, recipe, {name: values[name] for name in sorted(run.given) if name in values})
    if recipe.backbone is None:
        if recipe.drop_path is not None:
            raise ValueError(
                f"--drop_path {recipe.drop_path:g} needs a backbone; {run.init_from} is a residual network"
            )
        return None, recipe
    try:
        backbone = load_backbone(recipe.backbone)
    except UnreachableError as error:
        if recipe.dataset != "custom":  # the recipes of the other data sets have images of their own size
            raise
        raise ValueError(
            f"{error}; or train from scratch: --recipe digits_lt_resnet32 (16 x 16 pixels) or imagenet_lt_resnet10 "
            "(224 x 224), with --dataset custom"
        ) from error
    if backbone.model is None and run.init_from is None:
        raise ValueError(f"{recipe.backbone} is a model of this library: start from it with --init_from")
    backbone = with_drop_path(backbone.prepare_images(recipe.image_size, recipe.crop), recipe.drop_path)
    return backbone, replace(recipe, **processor_facts(backbone.processor))


def vectors_of_text(
    run: RunArguments, recipe: TrainingRecipe, data: TrainingData, accelerator: Accelerator
) -> Tensor | None:
    """The class vectors (C, D) of a run that starts from text; None for another run, and for one that goes on."""
    if recipe.classifier_init != "text" or run.resume or run.init_from is not None:
        return None
    if data.names_in_data is None:
        check_names_are_words(data.class_names)
    texts = ", ".join(repr(prompt_for(prompt, data.class_names[0])) for prompt in recipe.prompt)
    accelerator.print(f"The class vectors start from text, the first one from {texts}")
    return text_class_vectors(recipe.backbone, data.class_names, recipe.prompt, accelerator.device)


def make_model(
    names: list[str],
    run: RunArguments,
    recipe: TrainingRecipe,
    accelerator: Accelerator,
    backbone: Backbone | None = None,
) -> RideBfForImageClassification:
    """The recipe's network, with the weights of `--init_from` or of a backbone if given.

    Parts that do not train are frozen.
    """
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    if backbone is None:
        model = RideBfForImageClassification(recipe.config(**labels))
    else:
        config = recipe.config(backbone_config=backbone.config, **labels)
        model = RideBfForImageClassification(config)
        if backbone.model is not None:
            model = RideBfForImageClassification.from_backbone(backbone.model, config)
        if backbone.other_size:
            check_image_size(model, backbone)
    if run.init_from is not None:
        started = initialise_from(model, run.init_from, new_parts={"classifiers", "router"} & {recipe.train_only})
        check_frozen_classes(started, recipe)
        accelerator.print(started)
    if recipe.train_only == "lora":
        add_lora(model, recipe)
    train_only(model, recipe.train_only)
    if recipe.freeze_batch_norm and not freeze_batch_norm(model) and "freeze_batch_norm" in run.given:
        raise ValueError("--freeze_batch_norm cannot act: the network has no batch normalisation; leave it out")
    return to_fast_layout(model)


def describe(
    run: RunArguments,
    recipe: TrainingRecipe,
    model: RideBfForImageClassification,
    counts: list[int],
    splits,
    accelerator: Accelerator,
) -> None:
    """Prints the network, the data, the devices and the rule that chooses a checkpoint."""
    parameters = parameter_counts(model)
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    best = "the one with the best balanced accuracy on the validation images"
    rule = best if "validation" in splits else "the last one, because there is no validation split"
    accelerator.print(
        f"{recipe.name}: {parameters['all']:,} parameters, {parameters['trained']:,} of them trained; {sizes} images, "
        f"{len(counts)} classes of {max(counts)} to {min(counts)} training images; {accelerator.num_processes} "
        f"process(es) on {accelerator.device.type}, precision {accelerator.mixed_precision}. The checkpoint tested is "
        f"{rule}."
    )
    if (windows := describe_windows(recipe, accelerator.num_processes)) is not None:
        accelerator.print(windows)
