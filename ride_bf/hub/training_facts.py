"""What a model card says about the training."""

from collections.abc import Iterable, Mapping
from typing import Any

from ride_bf.hub.dataset_names import dataset_title, told_options
from ride_bf.hub.run_files import SavedRun
from ride_bf.runs.checkpoints import LAST
from ride_bf.runs.provenance import CORRECTION, describe_parameters

# What a recipe's `train_only` trained of a whole model. `_backbone` says it of "heads" and "lora".
_TRAINED_PARTS = {
    "router": "only the routers, by binary cross-entropy, to tell whether a later expert is needed",
    "classifiers": "only the classifiers, anew",
    "class_scales": "only the lengths of the class vectors",
}
_PRECISIONS = {"no": "float32"}  # Accelerate's name -> ours


def training_facts(saved: SavedRun) -> Iterable[tuple[str, str]]:
    """Facts about the training, as pairs of a subject and a phrase."""
    counts, recipe, settings = saved.train_class_counts, saved.recipe, saved.settings
    if saved.dataset:
        images = f": {sum(counts):,} images, {max(counts):,} to {min(counts):,} a class" if counts else ""
        options = told_options(saved.data.without_place().options) if saved.data else {}
        told = "".join(f"; {name.replace('_', ' ')} {value}" for name, value in options.items())
        yield "Data", f"{dataset_title(saved)}, {saved.config.num_labels:,} classes{images}{told}"
    if recipe:
        optimizer = {"adamw": "AdamW"}.get(recipe.get("optimizer"), "SGD")
        part = recipe.get("train_only")
        loss = "" if part == "router" else f"loss `{recipe['loss']}`, "  # a router has a loss of its own
        yield "Recipe", f"`{recipe['name']}`; every setting is in [`recipe.json`](recipe.json)"
        yield (
            "Schedule",
            f"{recipe['epochs']} epoch{'s' * (recipe['epochs'] != 1)}, {recipe['batch_size']} images a step, "
            f"{optimizer} at {recipe['learning_rate']:g}, "
            f"{recipe['schedule'].replace('_', ' ')} schedule, {loss}seed {settings.get('seed')}",
        )
        if saved.backbone is not None:
            yield "Backbone", _backbone(saved)
            yield "Pre-training", _pre_training(saved)
        if trained := [*filter(None, (_TRAINED_PARTS.get(part), describe_parameters(saved.facts)))]:
            yield "Trained", "; ".join(trained)
        if (batchformer := recipe["network"].get("batchformer", "none")) != "none":
            yield "BatchFormer", f"`{batchformer}`, only in training"
    for name, subject in (("init_from", "Started from"), ("teacher", "Distilled from")):
        if settings.get(name):
            yield subject, f"`{settings[name]}`"
    if saved.broken_images:
        images = f"{saved.broken_images:,} image{'s' * (saved.broken_images != 1)}"
        yield (
            "Left out",
            f"{images} that the run could not read, in all splits; the counts of training images include them",
        )
    if broken := (saved.results or {}).get("broken_images_left_out"):
        yield "Left out of the results", f"{broken:,} image(s) of the evaluated split, which cannot be read"
    if "epoch" in saved.facts:
        yield "Checkpoint", _checkpoint(saved)
    if correction := saved.facts.get(CORRECTION):
        method = correction["method"].replace("_", " ")
        yield "Corrected after training", f"{method} of the classifiers, strength {correction['strength']:g}"
    yield from _environment(saved)


def _checkpoint(saved: SavedRun) -> str:
    """The epoch of the weights, and why it is this one, as far as that is known."""
    epoch = f"epoch {saved.facts['epoch']}" + (f" of {saved.recipe['epochs']}" if saved.recipe else "")
    if "balanced_accuracy" in saved.facts:
        return f"{epoch}, chosen for its balanced accuracy on validation images"
    # a corrected or renamed checkpoint, or an older one, may be any
    is_last = saved.checkpoint.name == LAST and CORRECTION not in saved.facts
    return f"{epoch}, the last one saved" if is_last else epoch


def _backbone(saved: SavedRun) -> str:
    """What the backbone was, and whether it learned."""
    place, part = saved.base_model, saved.recipe["train_only"]
    name = f"`{saved.backbone}`" if place is None else f"[`{place}`](https://huggingface.co/{place})"
    if saved.backbone == saved.settings.get("init_from"):
        name = "that of the model it started from"
    learned = {
        "all": "trained with the rest of the network",
        "lora": f"adapted by LoRA of rank {saved.recipe.get('lora_rank')}, which is merged into its weights",
    }.get(part, "frozen: only what follows it was trained")
    return f"{name}, which was pre-trained. It was {learned}"


def _pre_training(saved: SavedRun) -> str:
    """What the backbone saw before, if its card says so."""
    seen = ", ".join(f"`{name}`" for name in saved.base.datasets)
    silent = "the backbone's card does not say" if saved.base.has_card else "there is no card of the backbone to read"
    known = f"on {seen}, says the backbone's card" if seen else f"on unknown data: {silent}"
    return (
        f"{known}. The backbone may know a class with few training images here well, if it saw many images of that "
        "class then"
    )


def _environment(saved: SavedRun) -> Iterable[tuple[str, str]]:
    if not saved.starts:
        return
    hardware = [
        f"{_devices(start)}, {_PRECISIONS.get(start['precision'], start['precision'])}" for start in saved.starts
    ]
    yield "Hardware", "; ".join(dict.fromkeys(hardware))
    if saved.training_seconds is not None:
        yield "Time", f"{_duration(saved.training_seconds)} for {_timed_epochs(saved)}, without evaluation"
    commits = [
        _commit(start) + (" with changes" if start["modified"] else "") for start in saved.starts if start["commit"]
    ]
    versions = [", ".join(f"{name} {number}" for name, number in start["versions"].items()) for start in saved.starts]
    yield "Code", "; ".join(dict.fromkeys([*commits, *versions]))


def _timed_epochs(saved: SavedRun) -> str:
    """The epochs of `training_seconds`; a checkpoint may lie within a later one."""
    within = saved.facts.get("epoch", 0) % 1 != 0
    return "the whole epochs before this checkpoint" if within else "the epochs up to this checkpoint"


def _devices(start: Mapping[str, Any]) -> str:
    """The device of each process. Processes on the CPU share its cores."""
    processes, device = start["num_processes"], start["device"]
    if device.endswith("CPU cores"):
        return device if processes == 1 else f"{device} for {processes} processes"
    return f"{processes} × {device}"


def _commit(start: Mapping[str, Any]) -> str:
    """The commit of the code, with a link to it if the address of its repository is known."""
    source, commit = start.get("source"), start["commit"]
    return f"[commit `{commit[:12]}`]({source}/tree/{commit})" if source else f"commit `{commit}`"


def _duration(seconds: float) -> str:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return "less than a second" if seconds < 1 else f"{seconds:.1f} seconds"
