"""Images whose label is likely wrong: their neighbours and the experts agree on another class.

A network tells nothing of the labels that it has learned by heart, so both must not have seen the label of the image.
The neighbours of a training image are other images. What an expert thinks of it is the class whose mean is nearest in
the features of this expert, without the image itself. Of other images it is what the expert predicts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from data import undecoded
from data.exclusion import below, folder_of
from data.groups import content_digest
from data.sets import get_data_set
from ride_bf.evaluation.embedding import SplitEmbeddings
from ride_bf.evaluation.exclusion_lists import ListedGroup, image_line, write_list
from ride_bf.evaluation.metrics import shot_accuracy
from ride_bf.evaluation.neighbours import nearest, nearest_mean_without_itself, vote
from ride_bf.evaluation.pages import thumbnail, write_page
from ride_bf.evaluation.tables import shot_summary
from ride_bf.runs.provenance import TrainingData

TRAIN = "train"
_BY_HEART = 0.98  # accuracy of the neighbours on training images
_SHOWN = 120  # images on the page
_NEIGHBOURS_SHOWN = 3


@dataclass(frozen=True)
class Judged:
    """A split whose images the nearest training images judge too.

    Attributes:
        part: features and predictions of the N images.
        neighbours (N, K): rows of the training split, nearest first, without the image itself.
        neighbour_labels (N, K).
        votes (N,): classes that they vote for, see `ride_bf.evaluation.neighbours.vote`.
        shares (N,): of the votes.
        opinions (N, E): classes that the experts give the images, without knowing their labels.
    """

    part: SplitEmbeddings
    neighbours: np.ndarray
    neighbour_labels: np.ndarray
    votes: np.ndarray
    shares: np.ndarray
    opinions: np.ndarray


def judge(parts: dict[str, SplitEmbeddings], expert: int | None) -> dict[str, Judged]:
    """Lets neighbours and experts judge all images, by split. Empty if the training images are not among them.

    The features are those of `expert`, or of all, as in `ride_bf.evaluation.embedding.chosen_features`.
    """
    if TRAIN not in parts:
        return {}
    train, judged = parts[TRAIN], {}
    for name, part in parts.items():
        distances, found = nearest(train.features, None if name == TRAIN else part.features)
        labels, opinions = train.images.labels[found], part.images.expert_predictions
        if name == TRAIN:
            of_experts = np.split(train.features, opinions.shape[1] if expert is None else 1, axis=1)
            own = train.images.labels
            opinions = np.stack([nearest_mean_without_itself(features, own) for features in of_experts], axis=1)
        judged[name] = Judged(part, train.rows[found], labels, *vote(labels, distances), opinions)
    return judged


def describe(judged: dict[str, Judged], class_counts: Sequence[int]) -> str:
    """The accuracies in percent of the classifier and of the nearest training images, by split and shot group."""
    if not judged:
        return "without the train split there are no neighbours, so no k-NN accuracy and no label errors"
    count = next(iter(judged.values())).neighbours.shape[1]
    lines = []
    for name, of in judged.items():
        images = of.part.images
        for who, predictions in (("classifier", images.predictions), (f"{count} neighbours", of.votes)):
            accuracy = shot_summary(shot_accuracy(predictions, images.labels, class_counts))
            lines.append(f"{name:<12} {who:<13} {accuracy}")
    if (judged[TRAIN].votes == judged[TRAIN].part.images.labels).mean() > _BY_HEART:
        lines.append(
            "note: the features fit the labels of nearly all training images. If the backbone was trained on them, it "
            "may have learned wrong labels by heart, and these are not found; see docs/explain.md"
        )
    return "\n".join(lines)


def find_label_errors(judged: dict[str, Judged]) -> dict[str, np.ndarray]:
    """The images whose neighbours and experts agree on another class than the label, by split, the clearest first.

    The neighbours must vote for another class, and more than half of the experts that ran must be of the same opinion.
    The clearest case has the largest product of their share and that of the vote.
    """
    found = {}
    for name, of in judged.items():
        ran, same = (of.opinions >= 0).sum(axis=1), (of.opinions == of.votes[:, None]).sum(axis=1)
        agreed = np.flatnonzero((of.votes != of.part.images.labels) & (2 * same > ran))
        clearness = of.shares[agreed] * same[agreed] / ran[agreed]
        found[name] = agreed[np.argsort(-clearness, kind="stable")]
    return found


def write_label_errors(
    errors: dict[str, np.ndarray], judged: dict[str, Judged], data: TrainingData, output: Path
) -> list[Path]:
    """Writes the page and the list for `--exclude` beside the file `output`. Returns their paths.

    `errors` are from `find_label_errors`. The list has training images only: leaving out the test images that a model
    gets wrong would raise its accuracy. It is not written if there are none.
    """
    if not judged:
        return []
    place = get_data_set(data.dataset).place(data.data_dir)
    folder = folder_of(place)
    stored = {name: undecoded(of.part.split) for name, of in judged.items()}
    entries = {
        name: [_entry(judged[name], index, stored[name], data.class_names, folder) for index in rows.tolist()]
        for name, rows in errors.items()
    }
    listed = write_list(
        output.with_name(f"{output.stem}_label_errors.txt"),
        "Training images whose label is likely wrong, found by python -m ride_bf.embed. Look at each one first.",
        (
            ListedGroup(f"{entry['label']}, more likely {entry['other']}", [_line(entry["image"], folder)])
            for entry in entries.get(TRAIN, [])
        ),
        place=place,
        in_use=data.options.get("exclude"),
    )
    pictures: dict[tuple[str, int], str | None] = {}

    def picture(split: str, row: int) -> str | None:
        if (split, row) not in pictures:
            pictures[split, row] = thumbnail(stored[split][row]["image"], data.max_image_pixels)
        return pictures[split, row]

    shown = {
        name: [
            {
                **entry,
                "picture": picture(name, entry["row"]),
                "neighbours": [(picture(TRAIN, row), label) for row, label in entry["neighbours"]],
            }
            for entry in some[:_SHOWN]
        ]
        for name, some in entries.items()
        if some
    }
    page = write_page(
        output.with_name(f"{output.stem}_label_errors.html"),
        "label_errors.jinja",
        {
            "title": "Likely label errors",
            "lead": f"{data.dataset}: {sum(len(of.part.rows) for of in judged.values()):,} images",
            "splits": {name: {"count": len(entries[name]), "entries": some} for name, some in shown.items()},
            "listed": None if listed is None else listed.name,
        },
    )
    return [page] if listed is None else [page, listed]


def _entry(of: Judged, index: int, stored: Dataset, class_names: Sequence[str], folder: str) -> dict[str, Any]:
    images, row = of.part.images, int(of.part.rows[index])
    image = stored[row]["image"]
    opinions, other = of.opinions[index], of.votes[index]
    neighbours = [
        (int(neighbour), class_names[label])
        for neighbour, label in zip(of.neighbours[index], of.neighbour_labels[index], strict=True)
    ]
    return {
        "image": image,
        "row": row,
        "name": f"row {row}" if image["path"] is None else below(image["path"], folder),
        "label": class_names[images.labels[index]],
        "other": class_names[other],
        "predicted": class_names[images.predictions[index]],
        "score": f"{100 * of.part.scores[index]:.0f} %",
        "experts": f"{(opinions == other).sum()} of {(opinions >= 0).sum()}",
        "voters": f"{(of.neighbour_labels[index] == other).sum()} of {len(neighbours)}",
        "neighbours": neighbours[:_NEIGHBOURS_SHOWN],
    }


def _line(image: dict[str, Any], folder: str) -> str | None:
    digest = 0 if image["bytes"] is None else content_digest(image["bytes"])
    return image_line(image, folder, digest)
