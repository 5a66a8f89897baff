"""Makes the model card from the files of a run. Every number on the card comes from a file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from confidence_ride_bf import Confidence
from data import CUSTOM
from data.sets import DATA_SETS
from ride_bf.evaluation.confidence import CONFIDENCE
from ride_bf.evaluation.leakage import describe_leakage
from ride_bf.evaluation.metrics import FEW_SHOT_BELOW, MANY_SHOT_ABOVE, shot_groups
from ride_bf.evaluation.plots import (
    COLOURS,
    accuracy_by_group,
    accuracy_by_training_images,
    experts_by_group,
    save,
    styled,
)
from ride_bf.evaluation.unknown import UNKNOWN
from ride_bf.hub.dataset_names import dataset_title, hub_link, title_of, told_options
from ride_bf.hub.licences import Licence
from ride_bf.hub.neighbours import NEIGHBOURS, SIDE, PublishedNeighbours
from ride_bf.hub.onnx import output_names
from ride_bf.hub.papers import published_for
from ride_bf.hub.run_files import SavedRun
from ride_bf.hub.training_facts import training_facts

TEMPLATE = Path(__file__).resolve().parent.parent.parent / "hub_cards" / "model_card.md"
_CALIBRATION_ERROR = "expected_calibration_error"
# Metrics of the card's table and metadata, in this order. Metrics that were not measured are left out.
METRIC_NAMES = {
    "accuracy": "Accuracy over all images",
    "balanced_accuracy": "Balanced accuracy (mean over all classes)",
    "many_shot_accuracy": f"Many-shot accuracy (more than {MANY_SHOT_ABOVE} training images)",
    "medium_shot_accuracy": f"Medium-shot accuracy ({FEW_SHOT_BELOW} to {MANY_SHOT_ABOVE})",
    "few_shot_accuracy": f"Few-shot accuracy (less than {FEW_SHOT_BELOW})",
    "top_5_accuracy": "Top-5 accuracy",
    _CALIBRATION_ERROR: "Expected calibration error",
}
_MOST_CLASSES_IN_A_TABLE = 20
_DIGITS = 6  # of the metrics in the metadata; results.json has them all


@dataclass(frozen=True)
class Example:
    """An example image and the model's answers: dicts of `label` and `score`.

    `path` is the image in the repository, and `shown` the picture of it on the card.
    """

    path: str
    shown: str
    answers: list[dict[str, Any]]


@dataclass(frozen=True)
class Published:
    """The result of an export: the parameters that it kept and left out, and the files beside the weights."""

    repo_id: str
    license: Licence | None  # None: not chosen yet
    parameters: int
    parameters_left_out: int = 0
    data_description: str | None = None  # what the training images show, in the author's words
    image_size: tuple[int, int] | None = None  # height and width of the prepared images; None: any
    multiply_adds: int | None = None  # of a prediction by all experts, for an image of that size
    examples: Sequence[Example] = ()
    plots: Sequence[str] = ()
    onnx_size: tuple[int, int] | None = None  # height and width of the input images of model.onnx
    oldest_transformers: str = ""  # that handler.py's requirements allow
    oldest_timm: str | None = None  # the same; None: the network's code needs no timm
    neighbours: PublishedNeighbours | None = None  # small copies of training images


def make_card(saved: SavedRun, published: Published) -> ModelCard:
    """The card of a published model."""
    return ModelCard.from_template(
        _metadata(saved, published),
        template_path=str(TEMPLATE),
        saved=saved,
        confidence=_confidence(saved),
        published=published,
        has_batchformer=_has_batchformer(saved),
        onnx_size=published.onnx_size,
        onnx_outputs=output_names(saved.config),
        title=published.repo_id.rpartition("/")[2],
        dataset=dataset_title(saved),
        images=published.data_description or describe_images(saved),
        training=list(training_facts(saved)),
        split=(saved.results or {}).get("split"),
        measured_on=_measured_on(saved),
        drawn=_is_drawn(saved),
        main_table=_main_table(saved),
        leakage=describe_leakage(saved.results or {}),
        unknown=_unknown_images(saved),
        group_table=_group_table(saved),
        class_table=_class_table(saved),
        expert_table=_expert_table(saved),
        rare=_rare_classes(saved),
        neighbours_file=NEIGHBOURS,
        picture_side=SIDE,
        papers=published_for(saved),
        many_above=MANY_SHOT_ABOVE,
        few_below=FEW_SHOT_BELOW,
    )


def _metadata(saved: SavedRun, published: Published) -> ModelCardData:
    name = published.repo_id.rpartition("/")[2]
    results = []
    if saved.results is not None:
        metrics, measured_on = _published_metrics(saved), _measured_on(saved)
        results = [
            EvalResult(
                task_type="image-classification",
                task_name="Long-tailed image classification",
                dataset_type=measured_on if measured_on == saved.hub_dataset else saved.results["dataset"],
                dataset_name=measured_on,
                dataset_split=saved.results["split"],
                dataset_args=told_options(saved.results.get("dataset_options") or {}) or None,
                metric_type=metric,
                metric_name=title,
                metric_value=round(metrics[metric], _DIGITS),
            )
            for metric, title in METRIC_NAMES.items()
            if metric in metrics
        ]
    widget = [
        {"src": example.path, "example_title": Path(example.path).stem.replace("_", " "), "output": example.answers}
        for example in published.examples
    ]
    return ModelCardData(
        **({} if published.license is None else published.license.as_metadata()),
        base_model=saved.base_model,
        datasets=[saved.hub_dataset] if saved.hub_dataset else None,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=[
            "image-classification",
            "long-tailed-recognition",
            "class-imbalance",
            *(["ride"] if saved.config.num_experts > 1 else []),
            *(["batchformer"] if _has_batchformer(saved) else []),
            "custom_code",
        ],
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
        widget=widget or None,
    )


def _confidence(saved: SavedRun) -> Confidence:
    """The calibration that the model has now; the plain softmax without one."""
    return Confidence.from_dict(saved.config.confidence, saved.config.num_labels)


def _published_metrics(saved: SavedRun) -> dict[str, Any]:
    """The metrics of the published scores: with a temperature, the calibration error with it, if known."""
    metrics = dict(saved.results["metrics"])
    if _confidence(saved).has_temperature:
        metrics.pop(_CALIBRATION_ERROR, None)
        if (measured := _measured_confidence(saved)) is not None:
            metrics[_CALIBRATION_ERROR] = measured["after"]["all"][_CALIBRATION_ERROR]
    return metrics


def _measured_confidence(saved: SavedRun) -> dict[str, Any] | None:
    """What the evaluation measured of the calibration that the model has now; None if it was of another or of none."""
    measured = (saved.results or {}).get(CONFIDENCE)
    confidence = _confidence(saved)
    return measured if measured is not None and measured["temperature"] == confidence.temperature else None


def _unknown_images(saved: SavedRun) -> dict[str, str] | None:
    """How many images of none of the classes the evaluation had, and what became of them; None if that is unknown."""
    unknown, measured = (saved.results or {}).get(UNKNOWN), _measured_confidence(saved)
    confidence = _confidence(saved)
    if unknown is None or measured is None or "rejected" not in unknown:
        return None
    promised = measured.get("rejected", {}).get("promised")
    if (unknown["score"], promised) != (confidence.known_score, confidence.reject_known):
        return None
    return {
        "images": f"{unknown['images']:,}",
        "rejected": _percent(unknown["rejected"]),
        "auroc": _percent(unknown["scores"][unknown["score"]]["all"]["auroc"]),
    }


def _has_batchformer(saved: SavedRun) -> bool:
    """Whether it was trained with a BatchFormer, by its recipe or, without one, by its weights."""
    return saved.recipe.get("network", vars(saved.config)).get("batchformer", "none") != "none"


def describe_images(saved: SavedRun) -> str | None:
    """A sentence on what the training images show, or where that is said; None if it is not known."""
    if saved.hub_dataset is not None:
        return f"The card of {hub_link(saved.hub_dataset)} describes them."
    return (DATA_SETS[saved.dataset].description if saved.dataset in DATA_SETS else "") or None


def _measured_on(saved: SavedRun) -> str | None:
    """The Hub id or the name for people of the data set that the model was evaluated on."""
    results = saved.results or {}
    if results.get("dataset") == CUSTOM and results.get("other_images"):
        return "other images of the same classes"  # whose place is not in the results
    if results.get("dataset") == CUSTOM and saved.hub_dataset is not None:
        return saved.hub_dataset
    return title_of(results.get("dataset"))


def _is_drawn(saved: SavedRun) -> bool:
    """Whether the evaluated images were drawn from the same images as those of training."""
    results = saved.results or {}
    if saved.data is None or results.get("other_images") or results.get("split") not in saved.data.splits:
        return False
    return saved.data.splits[results["split"]].drawn


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def _with_interval(saved: SavedRun, metric: str) -> str:
    """A metric in percent, with its confidence interval if there is one; a dash if it was not measured."""
    shown = _percent(saved.results["metrics"].get(metric))
    interval = saved.results.get("confidence_intervals", {}).get(metric)
    return shown if interval is None else f"{shown} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table whose first column is text."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    """The value as text, escaped so that it neither ends a table cell nor starts an HTML tag."""
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _main_table(saved: SavedRun) -> str | None:
    if saved.results is None:
        return None
    measured = [metric for metric in METRIC_NAMES if metric in saved.results["metrics"] and "_shot_" not in metric]
    rows = {METRIC_NAMES[metric]: _with_interval(saved, metric) for metric in measured}
    title = METRIC_NAMES[_CALIBRATION_ERROR]
    if _confidence(saved).has_temperature and title in rows:
        rows[f"{title} before calibration"] = rows.pop(title)
        published = _published_metrics(saved).get(_CALIBRATION_ERROR)
        rows[f"{title} of the calibrated scores"] = "not measured" if published is None else _percent(published)
    return _table(["Metric", "Value"], list(rows.items()))


def _group_table(saved: SavedRun) -> str | None:
    if saved.results is None:
        return None
    counts, rows = saved.results["train_class_counts"], []
    for group, members in shot_groups(counts).items():
        if members.any():
            images = sum(count for count, inside in zip(counts, members, strict=True) if inside)
            rows.append([group, int(members.sum()), images, _with_interval(saved, f"{group}_shot_accuracy")])
    return _table(["Classes", "How many", "Training images", "Mean accuracy of a class"], rows)


def _class_table(saved: SavedRun) -> str | None:
    if saved.results is None or saved.config.num_labels > _MOST_CLASSES_IN_A_TABLE:
        return None
    counts, accuracies = saved.results["train_class_counts"], saved.results["metrics"]["per_class_accuracy"]
    order = sorted(range(len(counts)), key=lambda label: -counts[label])
    rows = [[saved.class_names[label], counts[label], _percent(accuracies[label])] for label in order]
    return _table(["Class", "Training images", "Accuracy"], rows)


def _expert_table(saved: SavedRun) -> str | None:
    experts = (saved.results or {}).get("experts")
    if not experts:
        return None
    names = {"accuracy": "Images", "balanced_accuracy": "Classes"}
    names |= {f"{group}_shot_accuracy": f"{group.capitalize()}-shot" for group in ("many", "medium", "few")}
    names = {metric: name for metric, name in names.items() if any(metric in own for own in experts["each"])}
    rows = [
        [f"{number}", *(_percent(own.get(metric)) for metric in names)] for number, own in enumerate(experts["each"], 1)
    ]
    return _table(["Expert", *names.values()], rows)


def _rare_classes(saved: SavedRun) -> dict[str, Any] | None:
    """Facts about few-shot classes for the section on limits; None if there are none or the counts are unknown."""
    counts = saved.train_class_counts
    if counts is None or min(counts) >= FEW_SHOT_BELOW:
        return None
    metrics = (saved.results or {}).get("metrics", {})
    accuracies = {group: metrics.get(f"{group}_shot_accuracy") for group in ("many", "few")}
    return {
        "classes": sum(count < FEW_SHOT_BELOW for count in counts),
        "fewest": min(counts),
        **{group: None if accuracy is None else _percent(accuracy) for group, accuracy in accuracies.items()},
    }


def write_plots(saved: SavedRun, folder: Path) -> list[str]:
    """Draws every plot that the run has data for. Returns the paths of the pictures in `folder`."""
    figures: dict[str, Figure | None] = {"training": _draw_training(saved)}
    if saved.results is not None:
        figures["accuracy_by_class"] = accuracy_by_training_images(saved.results)
    if saved.is_evaluated:
        figures["accuracy_by_group"] = accuracy_by_group(saved.results)
        figures["experts_by_group"] = experts_by_group(saved.results)
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(f"plots/{name}.png")
            (folder / "plots").mkdir(exist_ok=True)
            save(figure, folder / paths[-1], dpi=130, metadata={"Software": None})
    return paths


@styled
def _draw_training(saved: SavedRun) -> Figure | None:
    """Training loss by epoch and, if there are validation images, balanced accuracy."""
    if len(saved.epochs) < 2:
        return None
    figure = Figure(figsize=(4.8, 2.6))
    epochs = [line["epoch"] for line in saved.epochs]
    axes = figure.subplots()
    axes.plot(epochs, [line["train_loss"] for line in saved.epochs], color=COLOURS["muted"])
    axes.set(xlabel="epoch", ylabel="training loss")
    if all("validation_balanced_accuracy" in line for line in saved.epochs):
        right = axes.twinx()
        right.plot(epochs, [line["validation_balanced_accuracy"] for line in saved.epochs], color=COLOURS["many"])
        right.set(ylim=(0, 1))
        right.set_ylabel("validation balanced accuracy", color=COLOURS["many"])
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        right.grid(visible=False)
    return figure
