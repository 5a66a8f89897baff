"""`report.html`: the contents of a `results.json` as a self-contained page."""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from ride_bf.evaluation.confidence import CONFIDENCE, ERRORS, GROUPS, error_rows
from ride_bf.evaluation.leakage import describe_leakage
from ride_bf.evaluation.metrics import shot_groups
from ride_bf.evaluation.neighbours import NEIGHBOURS
from ride_bf.evaluation.pages import to_svg, write_page
from ride_bf.evaluation.plots import FIGURES
from ride_bf.evaluation.tables import summary_rows
from ride_bf.evaluation.unknown import UNKNOWN

REPORT = "report.html"
_SHOT_NAMES = {"many": "Many-shot", "medium": "Medium-shot", "few": "Few-shot"}
_MISSING = "–"
_EXPERT_METRICS = {"accuracy": "All images", "balanced_accuracy": "All classes"}
_EXPERT_METRICS |= {f"{group}_shot_accuracy": f"{name} classes" for group, name in _SHOT_NAMES.items()}


def write_report(results: dict[str, Any], folder: Path, pictures: Mapping[int, str | None] | None = None) -> Path:
    """Writes `report.html` into `folder` from the contents of a `results.json`. Returns its path.

    `pictures` are sources of HTML images, by the row of the image in `predictions.npz`; without them, as in a
    published report, the worst mistakes are listed without pictures.
    """
    contents = {**_contents(results), "mistakes": _mistakes(results, pictures)}
    return write_page(folder / REPORT, "html_report.jinja", contents)


def _contents(results: dict[str, Any]) -> dict[str, Any]:
    metrics = results["metrics"]
    many, few = (metrics.get(f"{group}_shot_accuracy") for group in ("many", "few"))
    gap = None
    if many is not None and few is not None:
        gap = f"{100 * abs(many - few):.1f} points {'behind' if many >= few else 'ahead of'}"
    return {
        "results": results,
        "title": "/".join(PurePath(results["model"]).parts[-2:]),
        "figures": {name: to_svg(name, draw(results)) for name, draw in FIGURES.items()},
        "tiles": _tiles(results),
        "groups": _group_rows(results),
        "voters": results.get(NEIGHBOURS, {}).get("count"),
        "summaries": _summaries(results),
        "calibration_errors": _calibration_errors(metrics),
        "test_prior": _test_prior_rows(results),
        "confidence": _confidence(results),
        "unknown": _unknown(results),
        "pairs": _pairs(results),
        "classes": _class_rows(results),
        "class_headings": _class_headings(results),
        "facts": _facts(results),
        "gap": gap,
        "leakage": describe_leakage(results),
        "expert_headings": list(_EXPERT_METRICS.values()),
        "level": f"{100 * results['bootstrap']['level']:.0f} %",
        "has_top_5": _has_top_5(results),
        "routed": "experts_used" in metrics,
        "expert_rows": _expert_rows(results),
        "better": _better_experts(results),
    }


def _mistakes(results: dict[str, Any], pictures: Mapping[int, str | None] | None) -> list[dict[str, Any]]:
    names = results["class_names"]
    return [
        {
            "true": names[mistake["true"]],
            "predicted": names[mistake["predicted"]],
            "confidence": _percent(mistake["confidence"]),
            "picture": (pictures or {}).get(mistake["image"]),
        }
        for mistake in results.get("mistakes", [])
    ]


def _expert_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The accuracies of all experts together and of each by itself, in the order of `_EXPERT_METRICS`."""
    named = {"all together": results["metrics"]}
    named |= {f"expert {number}": own for number, own in enumerate(results.get("experts", {}).get("each", []), 1)}
    return [
        {"name": name, "cells": [_percent(own.get(metric)) for metric in _EXPERT_METRICS]}
        for name, own in named.items()
    ]


def _better_experts(results: dict[str, Any]) -> list[str]:
    """Says where one expert by itself is better than all together; with a router they saw different images."""
    metrics, experts = results["metrics"], results.get("experts", {}).get("each", [])
    said = []
    for metric, name in _EXPERT_METRICS.items() if "experts_used" not in metrics else ():
        scores = [(own.get(metric, -1.0), number) for number, own in enumerate(experts, 1)]
        best, number = max(scores, default=(-1.0, 0), key=lambda score: score[0])
        if metric in metrics and best > metrics[metric]:
            said.append(f"expert {number} {_percent(best)} on {name.lower()} against {_percent(metrics[metric])}")
    return said


def _percent(value: float | None) -> str:
    return _MISSING if value is None else f"{100 * value:.1f}"


def _interval(results: dict[str, Any], name: str) -> str:
    low, high = results["confidence_intervals"][name]
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _has_top_5(results: dict[str, Any]) -> bool:
    return "top_5_accuracy" in results["metrics"]


def _tiles(results: dict[str, Any]) -> list[dict[str, str]]:
    names = {"accuracy": ("Accuracy", "all"), "balanced_accuracy": ("Balanced", "all")}
    names |= {f"{group}_shot_accuracy": (name, group) for group, name in _SHOT_NAMES.items()}
    names |= {"top_5_accuracy": ("Top-5", "accent")}
    metrics = results["metrics"]
    tiles = [
        {"name": title, "tone": tone, "value": _percent(metrics[name]), "note": _interval(results, name)}
        for name, (title, tone) in names.items()
        if name in metrics
    ]
    error = _percent(metrics["expected_calibration_error"])
    return [*tiles, {"name": "ECE", "tone": "accent", "value": error, "note": "calibration error"}]


def _group_rows(results: dict[str, Any]) -> list[dict[str, str]]:
    metrics = results["metrics"]
    groups = {"all": np.ones(len(results["class_names"]), dtype=bool), **shot_groups(results["train_class_counts"])}
    voted = results.get(NEIGHBOURS, {"metrics": {}})["metrics"]
    rows = []
    for group, members in groups.items():
        prefix = "" if group == "all" else f"{group}_shot_"
        if f"{prefix}accuracy" in metrics:
            rows.append(
                {
                    "name": group,
                    "tone": group,
                    "classes": f"{members.sum():,}",
                    "accuracy": _percent(metrics[f"{prefix}accuracy"]),
                    "interval": _interval(results, f"{prefix}accuracy"),
                    "neighbours": _percent(voted.get(f"{prefix}accuracy")),
                    "top_5": _percent(metrics.get(f"{prefix}top_5_accuracy")),
                    "ece": _percent(metrics[f"{prefix}expected_calibration_error"]),
                }
            )
    return rows


def _summaries(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the metrics that summarise the classes in other ways, and those of the training images."""
    rows = summary_rows(results["metrics"], results["class_names"])
    trained = results.get("training_images", {"metrics": {}})["metrics"]
    for name, words in (("accuracy", "accuracy"), ("balanced_accuracy", "balanced accuracy")):
        if name in trained:
            rows.append((f"{words} on the training images", trained[name]))
    return [(words[0].upper() + words[1:], _percent(value)) for words, value in rows]


def _calibration_errors(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    names = {"class_wise_calibration_error": "class-wise", "adaptive_calibration_error": "adaptive"}
    return [(words, _percent(metrics[name])) for name, words in names.items() if name in metrics]


def _confidence(results: dict[str, Any]) -> dict[str, Any]:
    """The tables about a calibrated model; empty without one."""
    if CONFIDENCE not in results:
        return {}
    measured = results[CONFIDENCE]
    rows = [
        (group, [(f"{100 * before:.2f}", f"{100 * after:.2f}") for before, after in pairs])
        for group, pairs in error_rows(measured)
    ]
    names = list(ERRORS.values())[: len(rows[0][1])]
    contents: dict[str, Any] = {"names": names, "rows": rows, "sets": None, "rejected": None}
    if (sets := measured.get("sets")) is not None:
        contents["promised"] = f"{100 * sets['promised']:g}"
        contents["sets"] = [
            (
                group,
                f"{sets[group]['images']:,}",
                _percent(sets[group]["coverage"]),
                " to ".join(map(_percent, sets[group]["interval"])),
                f"{sets[group]['mean_size']:.2f}",
            )
            for group in GROUPS
            if group in sets
        ]
    if (rejected := measured.get("rejected")) is not None:
        contents["rejected"] = [(group, _percent(rejected[group])) for group in GROUPS if group in rejected]
        contents["reject_known"] = f"{100 * rejected['promised']:g}"
    return contents


def _unknown(results: dict[str, Any]) -> dict[str, Any]:
    """The table about images of no known class; empty without them."""
    if UNKNOWN not in results:
        return {}
    scores = results[UNKNOWN]["scores"]
    rows = [
        (
            group,
            [
                (_percent(own[group]["auroc"]), _percent(own[group]["false_positive_rate_95"]))
                for own in scores.values()
            ],
        )
        for group in GROUPS
        if group in scores["max_logit"]
    ]
    rejected = results[UNKNOWN].get("rejected")
    names = [name.replace("_", " ") for name in scores]
    return {"names": names, "rows": rows, "rejected": None if rejected is None else _percent(rejected)}


def _test_prior_rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value before and value after the correction for a test prior; empty without one."""
    if "test_prior" not in results:
        return []
    before, prior = results["metrics"], results["test_prior"]
    after = prior["metrics"]
    names = {"accuracy": "Accuracy", "balanced_accuracy": "Balanced"}
    names |= {f"{group}_shot_accuracy": name for group, name in _SHOT_NAMES.items()}
    rows = [(words, _percent(before[name]), _percent(after[name])) for name, words in names.items() if name in after]
    expected = ("On images of the test prior", prior["uncorrected_test_prior_accuracy"], after["test_prior_accuracy"])
    return [(expected[0], *map(_percent, expected[1:])), *rows]


def _pairs(results: dict[str, Any]) -> list[dict[str, str]]:
    names = results["class_names"]
    return [
        {
            "true": names[pair["true"]],
            "predicted": names[pair["predicted"]],
            "images": f"{pair['images']:,}",
            "share": f"{100 * pair['share']:.0f}",
        }
        for pair in results["confusion"]["pairs"]
    ]


def _class_headings(results: dict[str, Any]) -> list[str]:
    top_5 = ["Top-5"] if _has_top_5(results) else []
    return ["Class", "Training images", "Group", "Test images", "Accuracy", *top_5, "Precision"]


def _class_rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """Returns a row for each class, from the most to the least frequent."""
    metrics, counts = results["metrics"], results["train_class_counts"]
    group_of = {label: group for group, members in shot_groups(counts).items() for label in np.flatnonzero(members)}
    top_5 = metrics.get("per_class_top_5_accuracy", [None] * len(counts))
    return [
        {
            "name": results["class_names"][label],
            "tone": group_of[label],
            "train_images": f"{counts[label]:,}",
            "images": f"{metrics['per_class_images'][label]:,}",
            "accuracy": _percent(metrics["per_class_accuracy"][label]),
            "top_5": _percent(top_5[label]),
            "precision": _percent(metrics["per_class_precision"][label]),
        }
        for label in np.argsort(-np.asarray(counts), kind="stable")
    ]


def _trained_on(data: dict[str, Any]) -> str:
    options = "".join(f", {name} {value}" for name, value in data["options"].items())
    return f"{data['dataset']}, {data['images']:,} images{options}"


def _run(run: dict[str, Any]) -> str:
    changed = " with changes" if run.get("modified") else ""
    shown = {
        "recipe": "recipe {}",
        "seed": "seed {}",
        "epoch": "epoch {} of the checkpoint",
        "commit": f"commit {{:.12}}{changed}",
    }
    return ", ".join(text.format(run[name]) for name, text in shown.items() if name in run)


def _timed(speed: dict[str, Any]) -> str:
    batches = speed.get("timed_batches")
    if batches is None:
        return "over all batches"  # of an earlier version
    return f"the median of {batches} batches after the first" if batches > 1 else "of a single batch"


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    speed, machine = results["speed"], results["machine"]
    options = ", ".join(f"{name} {value}" for name, value in results["dataset_options"].items())
    trained_on = results.get("training_data")
    processes = f"{speed['num_processes']} process{'es' if speed['num_processes'] > 1 else ''}"
    return [
        ("Model", results["model"]),
        ("Data", f"{results['dataset']}, {results['split']} split" + (f", {options}" if options else "")),
        *(
            [("Views", f"mean logits of the views {results['views']}")]
            if results.get("views", "centre") != "centre"
            else []
        ),
        *([("Trained on", _trained_on(trained_on))] if trained_on else []),
        *([("Run", _run(results["run"]))] if results.get("run") else []),
        ("Images' digest", results["images_digest"][:16]),
        (
            "Speed",
            f"{speed['images_per_second']:,.0f} images/s including reading, {_timed(speed)}; {processes}, batches of "
            f"{speed['batch_size']}, mixed precision {speed['mixed_precision']}",
        ),
        ("Machine", f"{machine['device']}, {machine['processor']}, {machine['cpu_count']} cores"),
        ("Software", f"torch {machine['torch']}, transformers {machine['transformers']}, Python {machine['python']}"),
        ("When", results["date"]),
    ]
