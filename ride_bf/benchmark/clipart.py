"""What RIDE and the BatchFormer are worth on Clipart-LT, from scratch and on a pre-trained backbone.

Every run is a normal training command. All methods of a part see the same images in the same number of steps. The
learning rate of each method is chosen on a part of the training images; the test images are looked at once a run.
Methods are compared in pairs of runs on the same split with the same seed.
"""

import argparse
import copy
import shlex
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ride_bf.benchmark.clipart_lists import drawings_digest, find_drawings, run_inputs, shrink, write_split
from ride_bf.benchmark.efficientnet_lite0 import backbone_folder
from ride_bf.benchmark.measure import backbone_name, command, machine, read_results, write_results
from ride_bf.benchmark.paired import COLUMNS, draw_windows, of_splits, table
from ride_bf.benchmark.runs import Run, train_all

# of a run's results
_KEPT = (
    *(*COLUMNS, "accuracy", "macro_f1", "geometric_mean_accuracy", "worst_class_accuracy", "loss"),
    *("commit", "modified", "seconds", "batchformer_cosine", "batchformer_warned"),
)
_SPLITS = range(5)  # by default
_TUNED_ON = (0,)  # splits on whose training images the learning rates are chosen
_SMALL = 128  # shorter side of the small copies, at least as long as the images of their parts

PAPER = "--batchformer shared_classifier"
GATED = f"{PAPER} --batchformer_layer_scale_init_value 0"
_BATCHFORMERS = {"BatchFormer": PAPER, "gated BatchFormer": GATED}
_ADAPTERS = "--num_experts 3 --expert_adapter_size 256"
_ONE_EXPERT = "--num_experts 1 --hidden_sizes 16 32 64 --batchformer none"
_LINEAR = "--classifier linear --classifier_init random"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A table of the benchmark.

    Attributes:
        summary: what it compares.
        options: of every run.
        methods: name -> options.
        pairs: method -> the methods that it is compared with.
        learning_rates: those that each method tries; a single one is taken.
        ladder: more of them, from low to high. While the best is not between two that were tried, the next is tried.
        own_learning_rates: method -> those that it tries instead.
        small: whether training reads small copies of the drawings.
        pretrained: whether it starts from the backbone of the command.
        mixed_precision: that Accelerate trains in.
    """

    summary: str
    options: str
    methods: dict[str, str]
    pairs: dict[str, tuple[str, ...]]
    learning_rates: tuple[str, ...]
    ladder: tuple[str, ...] = ()
    own_learning_rates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    small: bool = False
    pretrained: bool = True
    mixed_precision: str = "no"


def _with_batchformers(heads: Mapping[str, str]) -> dict[str, str]:
    return {
        f"{name} + {kind}": f"{options} {batchformer}".strip()
        for name, options in heads.items()
        for kind, batchformer in _BATCHFORMERS.items()
    }


_HEADS = {
    "linear, cross-entropy": f"{_LINEAR} --loss cross_entropy",
    "linear, logit-adjusted": _LINEAR,
    "cosine, cross-entropy": "--classifier_init random --loss cross_entropy",
    "cosine, logit-adjusted": "--classifier_init random",
    "cosine from class means, logit-adjusted": "",
    "three adapters, logit-adjusted": f"{_ADAPTERS} --loss expert_logit_adjusted",
    "three adapters, BalPoE": f"{_ADAPTERS} --loss expert_logit_adjusted --logit_adjustment_tau 0 1 2",
    "three adapters, SADE": f"{_ADAPTERS} --loss sade",
    "three adapters, RIDE": f"{_ADAPTERS} --loss ride",
}
_BEST_HEAD = "cosine from class means, logit-adjusted"
_ALONE = "BatchFormer, window 1"  # each image alone: the same layer and stream, without the other images
_LINEAR_HEAD, _RIDE_HEAD = "linear, cross-entropy", "three adapters, RIDE"
_SADE_HEAD = "three adapters, SADE"  # without a BatchFormer: it is one more comparison for RIDE's loss
_ON_ONE_IMAGE = {
    f"{head} + {_ALONE}": f"{_HEADS[head]} {PAPER} --batchformer_window 1" for head in (_LINEAR_HEAD, _RIDE_HEAD)
}
# At the learning rates that these heads chose with other images, so that nothing else differs from those rows.
_AT_THEIR_RATE = {
    f"{head} + {_ALONE}, rate {rate}": (f"{head} + {_ALONE}", rate)
    for head, rate in ((_LINEAR_HEAD, "0.03"), (_RIDE_HEAD, "0.001"))
}
_ON_FROZEN = _with_batchformers({name: options for name, options in _HEADS.items() if name != _SADE_HEAD})
_CROPPED = {f"{_BEST_HEAD}, centre crop": "--crop backbone"}
_WINDOWS = (1, 32, 128, 512)  # 512 is the whole batch
_NAMES_ON_WINDOWS = {kind: {window: f"{kind}, window {window}" for window in _WINDOWS} for kind in _BATCHFORMERS}
_ON_WINDOWS = {
    name: f"{_BATCHFORMERS[kind]} --batchformer_window {window}"
    for kind, names in _NAMES_ON_WINDOWS.items()
    for window, name in names.items()
}
_FROM_SCRATCH = {
    "cross-entropy": f"{_ONE_EXPERT} --loss cross_entropy --classifier linear",
    "LDAM-DRW": f"{_ONE_EXPERT} --loss ldam --reweight_epoch 8",
    "RIDE": "--batchformer none --reweight_epoch 8",
    "RIDE + BatchFormer": f"{PAPER} --reweight_epoch 8",
    "RIDE + gated BatchFormer": f"{GATED} --reweight_epoch 8",
}
_TUNED = {
    "frozen": "--recipe probe",
    "all": "--recipe finetune",
    "LoRA": "--recipe lora",
    "all, three experts with own last blocks": "--recipe finetune --num_experts 3 --num_expert_layers 1 "
    "--loss expert_logit_adjusted",
    "all, three experts with own last blocks, RIDE": "--recipe finetune --num_experts 3 --num_expert_layers 1 "
    "--loss ride",
}

_SCRATCH = Part(
    summary="ResNet-32 from scratch, 32 pixels, 10 epochs in batches of 128, bfloat16",
    options="--recipe cifar100_lt_resnet32 --epochs 10 --schedule cosine --warmup_epochs 2 --augmentation imagenet",
    methods=_FROM_SCRATCH,
    pairs={
        "LDAM-DRW": ("cross-entropy",),
        "RIDE": ("cross-entropy", "LDAM-DRW"),
        "RIDE + BatchFormer": ("RIDE",),
        "RIDE + gated BatchFormer": ("RIDE",),
    },
    learning_rates=("0.1",),  # of the published recipes for CIFAR, with every one of these losses
    small=True,
    pretrained=False,
    mixed_precision="bf16",
)

PARTS = {
    "scratch": _SCRATCH,
    "scratch_tuned": replace(
        _SCRATCH,
        summary=f"{_SCRATCH.summary}, the learning rate chosen for each method",
        learning_rates=("0.1", "0.03"),
    ),
    "frozen": Part(
        summary="heads on the features of a frozen backbone, 10 epochs in batches of 128",
        options="--recipe probe --epochs 10",
        methods=_HEADS
        | _CROPPED
        | _ON_FROZEN
        | _ON_ONE_IMAGE
        | {name: _ON_ONE_IMAGE[method] for name, (method, _) in _AT_THEIR_RATE.items()},
        pairs={name: (_LINEAR_HEAD,) for name in _HEADS if name != _LINEAR_HEAD}
        | {name: (name.rsplit(" + ", 1)[0],) for name in (*_ON_FROZEN, *_ON_ONE_IMAGE, *_AT_THEIR_RATE)}
        | dict.fromkeys(_CROPPED, (_BEST_HEAD,))
        | {
            f"{head} + BatchFormer": (
                head,
                *(name for name in (*_ON_ONE_IMAGE, *_AT_THEIR_RATE) if name.startswith(head)),
            )
            for head in (_LINEAR_HEAD, _RIDE_HEAD)
        },
        learning_rates=("0.003", "0.01", "0.03"),
        ladder=("0.0003", "0.001", "0.003", "0.01", "0.03", "0.1", "0.3", "1"),
        own_learning_rates={name: (rate,) for name, (_, rate) in _AT_THEIR_RATE.items()},
    ),
    "windows": Part(
        summary="the BatchFormer's window on a frozen backbone, 20 epochs in batches of 512",
        options="--recipe probe --epochs 20 --batch_size 512",
        methods={_BEST_HEAD: "", **_ON_WINDOWS},
        pairs={
            name: (_BEST_HEAD,) if window == 1 else (_BEST_HEAD, names[1])
            for names in _NAMES_ON_WINDOWS.values()
            for window, name in names.items()
        },
        learning_rates=("0.03",),
    ),
    "tuned": Part(
        summary="the backbone learns too, 96 pixels, 2 epochs in batches of 32",
        options="--epochs 2 --image_size 96 --batch_size 32",
        methods=_TUNED,
        pairs={"all": ("frozen",), **{name: ("frozen", "all") for name in _TUNED if name not in ("frozen", "all")}},
        learning_rates=("1e-4", "3e-4"),
        own_learning_rates={"frozen": ("0.01", "0.03")},
        small=True,
    ),
}


def run(options: argparse.Namespace) -> None:
    known = dict.fromkeys(method for name in options.parts for method in PARTS[name].methods)
    if unknown := [method for method in options.methods or () if method not in known]:
        shown = ", ".join(map(repr, unknown))
        raise ValueError("\n  ".join([f"no method of --parts is called {shown}; there are", *known]))
    results = read_results(options, required=options.table_only)
    if not options.table_only:
        options.splits = options.splits or list(_SPLITS)
        results = measure(options, results)
    parts = results.get("parts", {})
    of_some_splits = options.table_only and options.splits
    if of_some_splits:
        there = {run["split"] for part in parts.values() for own in part["methods"].values() for run in own["runs"]}
        if missing := sorted(set(options.splits) - there):
            raise ValueError(f"{options.results} has no runs of --splits {missing}; it has those of {sorted(there)}")
        parts = {name: of_splits(measured, options.splits) for name, measured in parts.items()}
        parts = {name: measured for name, measured in parts.items() if measured["methods"]}
    for name, measured in parts.items():
        print(f"\n### {PARTS[name].summary}\n\n{table(PARTS[name], measured)}")
    on_windows = parts.get("windows", {}).get("methods", {})
    if on_windows.keys() >= {_BEST_HEAD, *_ON_WINDOWS} and not of_some_splits:  # the picture is of all
        picture = options.picture or options.results.with_name("clipart_windows.png")
        draw_windows(on_windows, _BEST_HEAD, _NAMES_ON_WINDOWS, picture)
        print(f"\n{picture}")


def measure(options: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """Trains what is missing in `results` and writes them after each part. Returns all results."""
    drawings = find_drawings(options.data_dir)
    digests, contents = {}, drawings_digest(options.data_dir, drawings)
    for split in sorted({*options.splits, *_TUNED_ON}):
        drawn, digests[str(split)] = write_split(_lists(options, split), drawings, split)
        counts = [len(paths) for paths in drawn["train"].values()]
    data = {"classes": len(drawings), "drawings": sum(map(len, drawings.values())), "class_counts_of_split": counts}
    known = results.get("lists", {})
    other_drawings = results.get("drawings_digest", contents) != contents
    if other_drawings or any(known.get(split, digest) != digest for split, digest in digests.items()):
        raise ValueError(f"{options.results} is of other drawings or splits; name another file by --results")
    inputs = {int(split): run_inputs(digest, contents) for split, digest in digests.items()}
    for name in options.parts:
        part = PARTS[name]
        if options.methods and part.methods.keys().isdisjoint(options.methods):
            continue
        if part.pretrained:
            options.backbone = backbone_folder(options.backbone, options.output_dir)
        images = options.data_dir
        if part.small:
            images = options.output_dir / f"drawings_{_SMALL}_{contents[:8]}"
            shrink(options.data_dir, drawings, images, _SMALL)
        before = results.get("parts", {}).get(name, {})
        make_run = partial(_run, name, part, options, images, inputs)
        measured = measure_part(name, part, options, make_run, copy.deepcopy(before))
        if measured == before:
            print(f"{options.results} has all of {name!r}; name another file by --results to measure it again")
            continue
        latest = read_results(options, required=False)  # another command may have measured another part meanwhile
        results = {**latest, **data, "drawings_digest": contents, "lists": latest.get("lists", {}) | digests}
        results["parts"] = {**latest.get("parts", {}), name: measured}
        write_results(options.results, "clipart", results, _commits(results))
    return results


def _commits(results: dict[str, Any]) -> set[str | None]:
    """The commits of all runs."""
    methods = [own for part in results["parts"].values() for own in part["methods"].values()]
    return {run["commit"] for own in methods for run in own["runs"]}


def measure_part(
    name: str, part: Part, options: argparse.Namespace, make_run: Callable[..., Run], before: dict[str, Any]
) -> dict[str, Any]:
    """Chooses the learning rate of each method, then trains it on each split. Keeps earlier runs of other splits.

    Raises ValueError if the earlier runs are on another backbone.
    """
    backbone = backbone_name(options.backbone) if part.pretrained else None
    if before and before.get("backbone") != backbone:
        raise ValueError(
            f"{options.results} has {name!r} on the backbone {before.get('backbone')!r}, not {backbone!r}; "
            "name another file by --results"
        )
    same = {"options": part.options, "mixed_precision": part.mixed_precision}
    if any(before.get(key) != value for key, value in same.items()):
        before = {}
    names = options.methods or part.methods
    methods = {method: _kept(before, method, own) for method, own in part.methods.items() if method in names}
    others = {
        method: own
        for method, own in before.get("methods", {}).items()
        if method not in methods and own["options"] == part.methods.get(method)
    }
    _choose_learning_rates(part, methods, make_run, options.jobs)
    wanted = [
        (method, split)
        for split in options.splits
        for method in methods
        if split not in {own["split"] for own in methods[method]["runs"]}
    ]
    runs = [make_run(method, split, methods[method]["learning_rate"]) for method, split in wanted]
    for (method, split), result in zip(wanted, train_all(runs, options.jobs), strict=True):
        own = {"split": split, "seed": split, **{key: result[key] for key in _KEPT if key in result}}
        methods[method]["runs"] = sorted([*methods[method]["runs"], own], key=lambda run: run["split"])
    methods = {method: (methods | others)[method] for method in part.methods if method in methods | others}
    for method, own in methods.items():
        own["command"] = command_of(part, method, own)
    # The command and the machine are those of all runs, not of the last ones alone.
    splits = sorted({run["split"] for own in methods.values() for run in own["runs"]})
    machines = [before["machine"]] if before else []
    if wanted and machine() not in "; ".join(machines):
        machines.append(machine())
    return {
        "command": command(options, parts=[name], splits=splits, methods=None),
        "machine": "; ".join(machines),
        **same,
        "backbone": backbone,
        "methods": methods,
    }


def _kept(before: dict[str, Any], method: str, options: str) -> dict[str, Any]:
    """What was measured before of a method, unless its options have changed."""
    measured = before.get("methods", {}).get(method, {})
    return measured if measured.get("options") == options else {"options": options, "runs": []}


def _choose_learning_rates(part: Part, methods: dict[str, Any], make_run: Callable[..., Run], jobs: int) -> None:
    """Adds `learning_rate`: the best by balanced accuracy on held-out training images.

    What was tried before is not tried again. If another rate is chosen now, the runs of a method are dropped.
    """
    for method, own in methods.items():
        if not own.get("tuning", {}).keys() <= {*_learning_rates(part, method), *part.ladder}:
            own.pop("tuning")  # chosen among other rates
    while untried := [(method, rate) for method, own in methods.items() for rate in _untried(part, method, own)]:
        tried = [(method, rate, split) for method, rate in untried for split in _TUNED_ON]
        runs = [make_run(method, split, rate, tune=True) for method, rate, split in tried]
        for (method, rate, _), result in zip(tried, train_all(runs, jobs), strict=True):
            methods[method].setdefault("tuning", {}).setdefault(rate, []).append(result["balanced_accuracy"])
    for method, own in methods.items():
        best = _best(own["tuning"]) if "tuning" in own else _learning_rates(part, method)[0]
        own["runs"] = own["runs"] if own.get("learning_rate") == best else []  # all runs of a table have one rate
        own["learning_rate"] = best


def _learning_rates(part: Part, method: str) -> tuple[str, ...]:
    return part.own_learning_rates.get(method, part.learning_rates)


def _untried(part: Part, method: str, own: Mapping[str, Any]) -> list[str]:
    """The learning rates that a method has to try next; none if its choice stands."""
    rates, tuning = _learning_rates(part, method), own.get("tuning", {})
    if len(rates) == 1:
        return []
    if missing := [rate for rate in rates if rate not in tuning]:
        return missing
    if (best := _best(tuning)) not in part.ladder:
        return []
    place = part.ladder.index(best)
    return [rate for rate in part.ladder[max(0, place - 1) : place + 2] if rate not in tuning]


def _best(tuning: Mapping[str, list[float]]) -> str:
    """The best learning rate, the lowest of several."""
    return max(sorted(tuning, key=float), key=lambda rate: statistics.mean(tuning[rate]))


def _run(
    name: str,
    part: Part,
    options: argparse.Namespace,
    images: Path,
    inputs: Mapping[int, str],
    method: str,
    split: int,
    rate: str,
    tune: bool = False,
) -> Run:
    lists = _lists(options, split) / ("tune" if tune else "")
    where = ["--dataset", "custom", "--data_dir", images, "--lists", lists, "--seed", split]
    if part.pretrained:
        where += ["--backbone", options.backbone]
    words = [*part.options.split(), *part.methods[method].split(), *where, "--learning_rate", rate]
    kind = f"tune_{rate}" if tune else "test"
    folder = options.output_dir / name / method.replace(" ", "_") / kind / str(split)
    shown = f"{name}: {method}, split {split}" + (f", learning rate {rate}, held-out training images" if tune else "")
    return Run(
        name=shown,
        options=tuple(map(str, words)),
        folder=folder,
        mixed_precision=part.mixed_precision,
        inputs=inputs[split],
        keeps_model=False,
        may_diverge=tune,
    )


def _lists(options: argparse.Namespace, split: int) -> Path:
    return options.output_dir / "lists" / str(split)


def command_of(part: Part, method: str, measured: Mapping[str, Any]) -> str:
    """The training command of a method, but for its data."""
    words = [*part.options.split(), *part.methods[method].split(), "--learning_rate", measured["learning_rate"]]
    return f"accelerate launch --mixed_precision {part.mixed_precision} train_accelerate.py {shlex.join(words)}"
