"""A report on a data set, from reading every image: class counts, broken images, duplicates."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from PIL import Image
from tqdm import tqdm

from data import (
    BrokenImageError,
    class_counts,
    class_labels,
    read_image,
    undecoded,
)
from data.formats import MAX_IMAGE_PIXELS
from data.reading import stored_format
from ride_bf.evaluation.metrics import shot_groups

IMAGE_FINDINGS = {  # finding about single images -> its description
    "broken": "images that cannot be read",
    "other_format": "images whose format is not that of their file name (they are read correctly)",
    "turned": "images that are stored rotated or mirrored, with an EXIF orientation (they are turned when read)",
    "very_small": "images that are very small compared to the others",
}
GROUP_FINDINGS = {  # findings about duplicates: images that are equal byte for byte
    "in_two_splits": "groups of duplicates in several splits (a model is tested on images it was trained or chosen on)",
    "two_labels": "groups of duplicates with several labels in the training split",
}
_CHUNK = 64  # images that a process reads between two progress reports
_SHOWN = 5  # images or groups of a finding that are printed
_LISTED, _LISTED_MEMBERS = 1_000, 20  # images or groups of a finding, and images of a group, in the report
_VERY_SMALL = 1 / 8  # of the median shorter side


@dataclass(frozen=True)
class ImageFacts:
    """The facts found by reading images.

    Attributes:
        digests (N,): uint64 digests of the contents; 0 for a broken image.
        sizes (N, 2): width and height, upright; 0, 0 for a broken image.
        findings: (one of `IMAGE_FINDINGS`, index of the image, detail).
    """

    digests: np.ndarray
    sizes: np.ndarray
    findings: list[tuple[str, int, str]]


def inspect_images(images: Sequence[dict], start: int = 0, max_image_pixels: int = MAX_IMAGE_PIXELS) -> ImageFacts:
    """Reads images, values of a `datasets.Image(decode=False)` column. Findings count from `start`."""
    digests = np.zeros(len(images), dtype=np.uint64)
    sizes = np.zeros((len(images), 2), dtype=np.int32)
    findings = []
    for index, image in enumerate(images):
        path = image["path"]
        try:
            content = image["bytes"] if image["bytes"] is not None else Path(path).read_bytes()
            pixels = read_image({"bytes": content, "path": path}, max_image_pixels)
        except (BrokenImageError, OSError) as error:
            findings.append(("broken", start + index, str(error).rpartition(" cannot be read: ")[2]))
            continue
        digests[index] = int.from_bytes(blake2b(content, digest_size=8).digest(), "little")
        sizes[index] = pixels.shape[:0:-1]  # from (3, height, width)
        stored, orientation = stored_format(content, max_image_pixels)
        if orientation > 1:
            findings.append(("turned", start + index, f"EXIF orientation {orientation}"))
        named = Image.registered_extensions().get(Path(path or "").suffix.lower(), stored)
        if named != stored:
            findings.append(("other_format", start + index, f"{stored}, not {named}"))
    return ImageFacts(digests, sizes, findings)


def read_all(images: Dataset, num_workers: int, max_image_pixels: int = MAX_IMAGE_PIXELS) -> ImageFacts:
    """Reads all `images` with `num_workers` processes and a progress bar."""
    starts = range(0, len(images), _CHUNK)
    parts = []
    with (
        ProcessPoolExecutor(num_workers, initializer=_open_images, initargs=(images,)) as pool,
        tqdm(total=len(images), desc="reading", unit="image") as bar,
    ):
        for part in pool.map(partial(_inspect_chunk, max_image_pixels=max_image_pixels), starts):
            parts.append(part)
            bar.update(len(part.digests))
    return ImageFacts(
        np.concatenate([part.digests for part in parts]),
        np.concatenate([part.sizes for part in parts]),
        [finding for part in parts for finding in part.findings],
    )


# Each worker process sets this once, so that a task is only one number and no rows are sent.
_images: Dataset | None = None


def _open_images(images: Dataset) -> None:
    global _images
    torch.set_num_threads(1)
    _images = images


def _inspect_chunk(start: int, max_image_pixels: int) -> ImageFacts:
    return inspect_images(_images[start : start + _CHUNK]["image"], start, max_image_pixels)


def duplicates(digests: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the indices (M,), M > 1, of each group of equal `digests` (N,). Digests of 0 are ignored."""
    order = np.argsort(digests, kind="stable")
    order = order[digests[order] != 0]
    bounds = np.flatnonzero(np.diff(digests[order], prepend=0, append=0) != 0)
    for group in np.flatnonzero(np.diff(bounds) > 1).tolist():
        yield order[bounds[group] : bounds[group + 1]]


class DataReport:
    """Reads the images of a data set and reports on them. `to_dict` returns the contents of `check_data.json`.

    Args:
        splits: from `load_long_tailed`.
        num_workers: processes that read images.
        find: returns where an image is listed, or None. It is called only for images that are printed.
        max_image_pixels: images of more pixels are broken.
    """

    def __init__(
        self,
        splits: DatasetDict,
        num_workers: int,
        find: Callable[[str], str | None],
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ):
        self.splits, self.find = splits, find
        self.names = list(splits)
        self.images = concatenate_datasets([undecoded(rows) for rows in splits.values()])
        self.labels = class_labels(self.images)  # (N,)
        self.split_of = np.repeat(np.arange(len(splits)), [len(rows) for rows in splits.values()])  # (N,)
        self.class_names = splits["train"].features["label"].names
        self.train_counts = class_counts(splits["train"])
        self.facts = read_all(self.images, num_workers, max_image_pixels)
        self.broken = np.array([index for kind, index, _ in self.facts.findings if kind == "broken"], dtype=int)

    @property
    def may_start(self) -> bool:
        return not self.broken.size

    def to_dict(self) -> dict[str, Any]:
        counts = np.asarray(self.train_counts)
        return {
            "may_start": self.may_start,
            "splits": {name: self._split(number) for number, name in enumerate(self.names)},
            "imbalance_factor": float(counts.max() / counts.min()),
            "shot_groups": {
                group: {"classes": int(members.sum()), "training_images": int(counts[members].sum())}
                for group, members in shot_groups(counts).items()
            },
            "classes": self.classes(),
            "classes_without_readable_training_images": self._lost_classes(),
            "findings": {**self._image_findings(), **self._group_findings()},
        }

    def classes(self) -> list[dict[str, Any]]:
        """Returns `name`, shot `group` and the images in each split for each class, in the order of the labels."""
        groups = shot_groups(self.train_counts)
        counts = {split: class_counts(rows) for split, rows in self.splits.items()}
        return [
            {
                "name": name,
                "group": next(group for group, members in groups.items() if members[label]),
                **{split: of_split[label] for split, of_split in counts.items()},
            }
            for label, name in enumerate(self.class_names)
        ]

    def _split(self, number: int) -> dict[str, Any]:
        members = self.split_of == number
        sides = self._shorter_sides()[members]
        sides = sides[sides > 0]
        return {
            "images": int(members.sum()),
            "classes": len(np.unique(self.labels[members])),
            "broken": int(members[self.broken].sum()),
            "shorter_side": {"smallest": int(sides.min()), "median": int(np.median(sides)), "largest": int(sides.max())}
            if sides.size
            else None,
        }

    def _shorter_sides(self) -> np.ndarray:
        return self.facts.sizes.min(axis=1)

    def _lost_classes(self) -> list[str]:
        """Returns the classes whose training images are all broken."""
        broken = self.broken[self.split_of[self.broken] == self.names.index("train")]
        left = np.asarray(self.train_counts) - np.bincount(self.labels[broken], minlength=len(self.class_names))
        return [self.class_names[label] for label in np.flatnonzero(left == 0)]

    def _image_findings(self) -> dict[str, dict[str, Any]]:
        found: dict[str, list[tuple[int, str]]] = {finding: [] for finding in IMAGE_FINDINGS}
        for finding, index, detail in self.facts.findings:
            found[finding].append((index, detail))
        sides = self._shorter_sides()
        smallest = _VERY_SMALL * np.median(sides[sides > 0]) if (sides > 0).any() else 0
        for index in np.flatnonzero((sides > 0) & (sides < smallest)).tolist():
            found["very_small"].append((index, "{} x {} pixels".format(*self.facts.sizes[index])))
        return {
            finding: {
                "count": len(listed),
                "images": [
                    {**self._image(index, printed=number < _SHOWN), "detail": detail}
                    for number, (index, detail) in enumerate(listed[:_LISTED])
                ],
            }
            for finding, listed in found.items()
        }

    def _group_findings(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {finding: {"count": 0, "groups": []} for finding in GROUP_FINDINGS}
        for group in duplicates(self.facts.digests):
            of_train = group[self.split_of[group] == self.names.index("train")]
            for finding, members, kinds in (
                ("in_two_splits", group, self.split_of[group]),
                ("two_labels", of_train, self.labels[of_train]),
            ):
                listed = found[finding]
                if len(np.unique(kinds)) > 1:
                    listed["count"] += 1
                    if listed["count"] <= _LISTED:
                        # first one image of each split or label, because the finding is about them
                        first = np.unique(kinds, return_index=True)[1]
                        ordered = members[np.concatenate([first, np.setdiff1d(np.arange(len(members)), first)])]
                        images = [
                            self._image(index, printed=listed["count"] <= _SHOWN and position < _SHOWN)
                            for position, index in enumerate(ordered[:_LISTED_MEMBERS].tolist())
                        ]
                        listed["groups"].append({"count": len(members), "images": images})
        return found

    def _image(self, index: int, printed: bool) -> dict[str, Any]:
        image = self.images[index]["image"]
        path = image["path"] if image["bytes"] is None else None  # for an image in a table it is a name, not a file
        number = int(self.split_of[index])
        place = self.find(path) if printed and path else None
        return {
            "path": path,
            **({"listed": place} if place else {}),
            "split": self.names[number],
            "row": index - int(np.searchsorted(self.split_of, number)),
            "class": self.class_names[self.labels[index]],
        }


def summary(report: dict[str, Any]) -> str:
    """Formats the result of `DataReport.to_dict` for people."""
    lines = [f"{'split':<12} {'images':>9} {'classes':>8} {'unreadable':>11}   shorter side in pixels"]
    for split, facts in report["splits"].items():
        sides = facts["shorter_side"]
        shown = f"{sides['smallest']} to {sides['largest']}, median {sides['median']}" if sides else "-"
        lines.append(f"{split:<12} {facts['images']:>9,} {facts['classes']:>8,} {facts['broken']:>11,}   {shown}")

    lines += ["", f"{'group':<12} {'classes':>9} {'training images':>16}"]
    for group, facts in report["shot_groups"].items():
        lines.append(f"{group + '-shot':<12} {facts['classes']:>9,} {facts['training_images']:>16,}")
    lines.append(f"imbalance factor (largest over smallest class): {report['imbalance_factor']:g}")

    lines += ["", f"{'training images':>15}  class"]
    classes = [f"{of_class['train']:>15,}  {of_class['name']}" for of_class in _by_count(report["classes"])]
    lines += classes if len(classes) <= 2 * _SHOWN else [*classes[:_SHOWN], f"{'...':>15}", *classes[-_SHOWN:]]

    for finding, meaning in IMAGE_FINDINGS.items():
        found = report["findings"][finding]
        if found["count"]:
            lines += ["", f"{meaning}: {found['count']:,}"]
            lines += [f"  {_place(image)}: {image['detail']}" for image in found["images"][:_SHOWN]]
            lines += _and_more(found["count"], "  ")
    for finding, meaning in GROUP_FINDINGS.items():
        found = report["findings"][finding]
        if found["count"]:
            lines += ["", f"{meaning}: {found['count']:,}"]
            for group in found["groups"][:_SHOWN]:
                shown = [f"{_place(image)}: {image['split']}, {image['class']}" for image in group["images"][:_SHOWN]]
                lines += [f"  {shown[0]}", *(f"    = {line}" for line in shown[1:]), *_and_more(group["count"], "    ")]
            lines += _and_more(found["count"], "  ")
    return "\n".join(lines)


def refusal(report: dict[str, Any]) -> str:
    """Returns why training may not start and what to do, for a report with broken images."""
    broken = sum(facts["broken"] for facts in report["splits"].values())
    message = (
        f"images that cannot be read: {broken:,}. Replace them, remove them from the lists, or train "
        "with --on_broken_image skip, which leaves them out and says so in the results"
    )
    if lost := report["classes_without_readable_training_images"]:
        shown = ", ".join(lost[:_SHOWN]) + (" ..." if len(lost) > _SHOWN else "")
        message += f"; but then {len(lost)} class(es) have no training image ({shown})"
    return message


def _by_count(classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(classes, key=lambda of_class: -of_class["train"])


def _place(image: dict[str, Any]) -> str:
    name = image["path"] or f"row {image['row']} of {image['split']}"
    return f"{name} ({image['listed']})" if "listed" in image else name


def _and_more(count: int, indent: str) -> list[str]:
    return [f"{indent}and {count - _SHOWN:,} more"] if count > _SHOWN else []


def draw(classes: list[dict[str, Any]], title: str, picture: Path) -> None:
    """Plots the long tail: training images of each class, in descending order, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ordered = _by_count(classes)
    counts = np.array([of_class["train"] for of_class in ordered])
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for group, colour in (("many", "tab:blue"), ("medium", "tab:orange"), ("few", "tab:red")):
        members = np.flatnonzero([of_class["group"] == group for of_class in ordered])
        if members.size:
            edges = np.arange(members[0], members[-1] + 2) + 0.5
            label = f"{group}-shot: {members.size:,} classes, {counts[members].sum():,} images"
            axes.stairs(counts[members], edges, baseline=0.5, fill=True, color=colour, label=label)
    axes.set_yscale("log")
    axes.set(
        xlabel="classes, most frequent first",
        ylabel="training images",
        title=title,
        xlim=(0.5, len(counts) + 0.5),
        ylim=(0.5, None),
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
