"""A report on a data set, from reading every image: class counts, broken images, duplicates, proposals."""

import shlex
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict, concatenate_datasets
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from data import class_counts, class_labels, load_long_tailed, undecoded
from data.exclusion import folder_of
from data.formats import MAX_IMAGE_PIXELS
from data.groups import join_groups, perceptual_hashes, similar_images
from data.notices import notify
from data.sets import PERCEPTUAL
from data.splits import NothingToGroupError
from ride_bf.evaluation.exclusion_lists import ListedGroup, image_line, write_list
from ride_bf.evaluation.image_facts import FactTable, read_facts, stored_paths
from ride_bf.evaluation.metrics import shot_groups
from ride_bf.evaluation.plots import COLOURS, save, styled
from ride_bf.evaluation.proposals import far_sizes, leaks, rare_formats, similar_names

IMAGE_FINDINGS = {  # finding about single images -> its description
    "broken": "images that cannot be read",
    "other_format": "images whose format is not that of their file name (they are read correctly)",
    "turned": "images that are stored rotated or mirrored, with an EXIF orientation (they are turned when read)",
    "very_small": "images that are very small compared to the others",
}
GROUP_FINDINGS = {  # findings about duplicates: images that are equal byte for byte
    "in_two_splits": "groups of duplicates in several splits (a model is tested on images it was trained or chosen on)",
    "two_labels": "groups of duplicates with several labels",
}
SIMILAR = {"similar": "groups of images that look alike but are not equal"}  # only if asked for
IMAGE_PROPOSALS = {  # proposals about single images
    "far_sizes": "images whose size or shape is far from the others",
    "rare_formats": "images of a rare format",
}
_SHOWN = 5  # images or groups of a finding that are printed
_LISTED, _LISTED_MEMBERS = 1_000, 20  # images or groups of a finding, and images of a group, in the report
_VERY_SMALL = 1 / 8  # of the median shorter side


def load_to_check(name: str, data_dir: str | Path | None, **options: Any) -> DatasetDict:
    """`data.load_long_tailed`, but images may be grouped if none are held out.

    Similar images are then only looked for, and a notice says what of a column the given splits have in common.
    """
    try:
        return load_long_tailed(name, data_dir, **options)
    except NothingToGroupError as error:
        if options["group_by"] != PERCEPTUAL and not error.shared:
            raise
        for said in error.shared:
            notify(f"{data_dir or name}: {said}")
        return load_long_tailed(name, data_dir, **{**options, "group_by": None})


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
        place: folder, table or Hub id of the data, to which the paths in lists are relative; None without files.
        min_images: a class with fewer images, in all splits together, is a proposal.
        similar: whether to look for images that look alike. Raises ModuleNotFoundError without ImageHash.
        max_image_pixels: images of more pixels are broken.
        skip_broken: whether training leaves out broken images.
    """

    def __init__(
        self,
        splits: DatasetDict,
        num_workers: int,
        find: Callable[[str], str | None],
        place: str | Path | None = None,
        min_images: int = 2,
        similar: bool = False,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        skip_broken: bool = False,
    ):
        self.splits, self.find, self.place, self.min_images = splits, find, place, min_images
        self.max_image_pixels, self.skip_broken = max_image_pixels, skip_broken
        self.names = list(splits)
        self.images = concatenate_datasets([undecoded(rows) for rows in splits.values()])
        self.labels = class_labels(self.images)  # (N,)
        self.split_of = np.repeat(np.arange(len(splits)), [len(rows) for rows in splits.values()])  # (N,)
        self.class_names = splits["train"].features["label"].names
        self.train_counts = class_counts(splits["train"])
        self.looks = perceptual_hashes(self.images) if similar else None  # (N,)
        self.facts: FactTable = read_facts(self.images, num_workers, folder_of(place), max_image_pixels)
        self.broken = np.array(sorted(self.facts.errors), dtype=int)
        self.whole = np.ones(len(self.images), dtype=bool)
        self.whole[self.broken] = False

    @property
    def may_start(self) -> bool:
        return not self.broken.size or (self.skip_broken and not self._lost_classes())

    @cached_property
    def duplicates(self) -> list[np.ndarray]:
        """Groups of equal images that can be read."""
        return list(duplicates(np.where(self.whole, self.facts.digests, 0)))

    @cached_property
    def similar(self) -> list[np.ndarray]:
        """Groups of images that look alike, those of duplicates only left out."""
        if self.looks is None:
            return []
        groups = join_groups(similar_images(np.where(self.whole, self.looks, np.uint64(0))), self.facts.digests)
        found = duplicates(np.where(self.whole, groups + 1, 0))
        return [group for group in found if len(np.unique(self.facts.digests[group])) > 1]

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
            "proposals": self._proposals(),
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

    def write_lists(self, folder: Path, in_use: str | Path | None) -> dict[str, str]:
        """Writes the lists for `--exclude` into `folder`. Returns finding -> path of its list, if there is any."""
        written = {
            "two_labels": write_list(
                folder / "two_labels.txt",
                "Equal images under two labels or more, found by python -m ride_bf.check_data.",
                (
                    self._listed(group, ", ".join(self.class_names[label] for label in np.unique(self.labels[group])))
                    for group in self.duplicates
                    if len(np.unique(self.labels[group])) > 1
                ),
                place=self.place,
                in_use=in_use,
            ),
            "broken": write_list(
                folder / "broken.txt",
                "Images that cannot be read, found by python -m ride_bf.check_data.",
                (self._listed(np.array([index]), self.facts.errors[index]) for index in self.broken.tolist()),
                place=self.place,
                in_use=in_use,
            ),
        }
        return {finding: str(path) for finding, path in written.items() if path is not None}

    def _listed(self, group: np.ndarray, comment: str) -> ListedGroup:
        folder = folder_of(self.place)
        images = self.images[group.tolist()]["image"]
        digests = self.facts.digests[group].tolist()
        lines = [image_line(image, folder, digest) for image, digest in zip(images, digests, strict=True)]
        if len(lines) > 1 and any(image["bytes"] is not None for image in images):
            comment += " (a line with content leaves out every copy of the image)"
        return ListedGroup(comment, lines)

    def pixels_of(self, image: dict[str, Any]) -> dict:
        """Returns the image, as a value of an undecoded column, that an entry of the report names."""
        start = int(np.searchsorted(self.split_of, self.names.index(image["split"])))
        return self.images[start + image["row"]]["image"]

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
        facts = self.facts
        found = {
            "broken": [(index, facts.errors[index]) for index in self.broken.tolist()],
            "other_format": self._other_formats(),
            "turned": [
                (index, f"EXIF orientation {facts.orientations[index]}")
                for index in np.flatnonzero(facts.orientations > 1).tolist()
            ],
            "very_small": [
                (index, "{} x {} pixels".format(*facts.sizes[index])) for index in self._very_small().tolist()
            ],
        }
        return {finding: self._images(listed) for finding, listed in found.items()}

    def _images(self, listed: list[tuple[int, str]]) -> dict[str, Any]:
        return {
            "count": len(listed),
            "images": [
                {**self._image(index, printed=number < _SHOWN), "detail": detail}
                for number, (index, detail) in enumerate(listed[:_LISTED])
            ],
        }

    def _other_formats(self) -> list[tuple[int, str]]:
        """Returns the images that are stored in another format than their name says, and both formats."""
        known, found = Image.registered_extensions(), []
        paths, _ = stored_paths(self.images)
        for index, (path, stored) in enumerate(zip(paths, self.facts.formats.tolist(), strict=True)):
            named = known.get(Path(path or "").suffix.lower(), stored)
            if stored and named != stored:
                found.append((index, f"{stored}, not {named}"))
        return found

    def _very_small(self) -> np.ndarray:
        sides = self._shorter_sides()
        smallest = _VERY_SMALL * np.median(sides[sides > 0]) if (sides > 0).any() else 0
        return np.flatnonzero((sides > 0) & (sides < smallest))

    def _group_findings(self) -> dict[str, dict[str, Any]]:
        found = {
            "in_two_splits": self._groups(self.duplicates, self.split_of),
            "two_labels": self._groups(self.duplicates, self.labels),
        }
        return found if self.looks is None else {**found, "similar": self._groups(self.similar, self.facts.digests)}

    def _groups(self, groups: list[np.ndarray], kinds: np.ndarray) -> dict[str, Any]:
        """Reports on the groups whose members differ in `kinds` (N,), first one member of each kind."""
        listed: list[dict[str, Any]] = []
        count = 0
        for group in groups:
            first = np.unique(kinds[group], return_index=True)[1]
            if len(first) == 1:
                continue
            count += 1
            if count <= _LISTED:
                ordered = group[np.concatenate([first, np.setdiff1d(np.arange(len(group)), first)])]
                images = [
                    self._image(index, printed=count <= _SHOWN and position < _SHOWN)
                    for position, index in enumerate(ordered[:_LISTED_MEMBERS].tolist())
                ]
                listed.append({"count": len(group), "images": images})
        return {"count": count, "groups": listed}

    def _proposals(self) -> dict[str, Any]:
        counts = np.bincount(self.labels[self.whole], minlength=len(self.class_names))
        small = np.flatnonzero(counts < self.min_images)
        very_small = set(self._very_small().tolist())
        train = self.whole & (self.split_of == self.names.index("train"))
        formats, sizes = self.facts.formats, self.facts.sizes
        return {
            "min_images": self.min_images,
            "small_classes": [
                {"name": self.class_names[label], "images": int(counts[label])} for label in small.tolist()
            ],
            "similar_names": similar_names(self.class_names),
            "leaks": leaks(self.labels[train], formats[train], sizes[train], self.class_names),
            "far_sizes": self._images([found for found in far_sizes(sizes) if found[0] not in very_small]),
            "rare_formats": self._images(rare_formats(formats)),
        }

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
    classes = [f"{of_class['train']:>15,}  {of_class['name']}" for of_class in by_count(report["classes"])]
    lines += classes if len(classes) <= 2 * _SHOWN else [*classes[:_SHOWN], f"{'...':>15}", *classes[-_SHOWN:]]

    for finding, meaning in IMAGE_FINDINGS.items():
        lines += _image_lines(meaning, report["findings"][finding])
    for finding, meaning in {**GROUP_FINDINGS, **SIMILAR}.items():
        found = report["findings"].get(finding, {"count": 0})
        if found["count"]:
            lines += ["", f"{meaning}: {found['count']:,}"]
            for group in found["groups"][:_SHOWN]:
                shown = [f"{place_of(image)}: {image['split']}, {image['class']}" for image in group["images"][:_SHOWN]]
                sign = "~" if finding in SIMILAR else "="
                lines += [f"  {shown[0]}", *(f"    {sign} {line}" for line in shown[1:])]
                lines += _and_more(group["count"], "    ")
            lines += _and_more(found["count"], "  ")
    lines += _proposal_lines(report["proposals"])
    for sentence, command in how_to_exclude(report.get("lists", {})):
        lines += ["", sentence, f"  {command}"]
    return "\n".join(lines)


def _proposal_lines(proposals: dict[str, Any]) -> list[str]:
    lists = {
        f"classes with fewer than {proposals['min_images']} images (give them more, or remove them)": [
            f"{small['name']}: {small['images']}" for small in proposals["small_classes"]
        ],
        "classes whose names differ in little (are they the same?)": [
            " = ".join(names) for names in proposals["similar_names"]
        ],
        "classes that a model can tell by the format or size of their images": [
            describe_leak(leak) for leak in proposals["leaks"]
        ],
    }
    lines = []
    for meaning, found in lists.items():
        if found:
            lines += ["", f"{meaning}: {len(found):,}", *(f"  {line}" for line in found[:_SHOWN])]
            lines += _and_more(len(found), "  ")
    for proposal, meaning in IMAGE_PROPOSALS.items():
        lines += _image_lines(meaning, proposals[proposal])
    return lines


def describe_leak(leak: dict[str, Any]) -> str:
    """Says what is alike in the images of a class, for an entry of the proposals' `leaks`."""
    others = f"{100 * leak['share_in_other_classes']:.0f} % in the others"
    return f"{leak['class']}: {leak['images']:,} of {leak['of']:,} are {leak['value']}, {others}"


def how_to_exclude(lists: dict[str, str]) -> list[tuple[str, str]]:
    """Says how to use the lists of `DataReport.write_lists`: sentences, each with an option or a command."""
    said = []
    if path := lists.get("two_labels"):
        edit = (
            f"To leave out images under two labels, delete the lines of those to keep from {path}. Add to each command:"
        )
        said.append((edit, f"--exclude {shlex.quote(path)}"))
    if path := lists.get("broken"):
        said.append(("To leave out broken images, add to each command:", f"--exclude {shlex.quote(path)}"))
    if len(lists) > 1:
        both = " ".join(shlex.quote(path) for path in lists.values())
        out = shlex.quote(str(Path(lists["broken"]).with_name("exclude.txt")))
        said.append(("The option takes a single file. To leave out both, join them:", f"cat {both} > {out}"))
    return said


def refusal(report: dict[str, Any]) -> str:
    """Returns why training may not start and what to do, for a report with broken images."""
    broken = sum(facts["broken"] for facts in report["splits"].values())
    excluded = f"--exclude {report['lists']['broken']}" if "broken" in report.get("lists", {}) else "--exclude FILE"
    message = (
        f"images that cannot be read: {broken:,}. Replace them, leave them out with {excluded}, or train "
        "with --on_broken_image skip, which leaves them out and says so in the results"
    )
    if lost := report["classes_without_readable_training_images"]:
        shown = ", ".join(lost[:_SHOWN]) + (" ..." if len(lost) > _SHOWN else "")
        message += f"; but then {len(lost)} class(es) have no training image ({shown})"
    return message


def by_count(classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorts classes by their training images, the most frequent first."""
    return sorted(classes, key=lambda of_class: -of_class["train"])


def place_of(image: dict[str, Any]) -> str:
    """Returns the name of an image of the report, with its place in a list if that is known."""
    name = image["path"] or f"row {image['row']} of {image['split']}"
    return f"{name} ({image['listed']})" if "listed" in image else name


def _image_lines(meaning: str, found: dict[str, Any]) -> list[str]:
    if not found["count"]:
        return []
    shown = [f"  {place_of(image)}: {image['detail']}" for image in found["images"][:_SHOWN]]
    return ["", f"{meaning}: {found['count']:,}", *shown, *_and_more(found["count"], "  ")]


def _and_more(count: int, indent: str) -> list[str]:
    return [f"{indent}and {count - _SHOWN:,} more"] if count > _SHOWN else []


@styled
def long_tail(classes: list[dict[str, Any]], title: str = "") -> Figure:
    """Plots the long tail: training images of each class, in descending order, on a logarithmic scale."""
    ordered = by_count(classes)
    counts = np.array([of_class["train"] for of_class in ordered])
    figure = Figure(figsize=(5.6, 3))
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for group in ("many", "medium", "few"):
        members = np.flatnonzero([of_class["group"] == group for of_class in ordered])
        if members.size:
            edges = np.arange(members[0], members[-1] + 2) + 0.5
            label = f"{group}-shot: {members.size:,} classes, {counts[members].sum():,} images"
            axes.stairs(counts[members], edges, baseline=0.5, fill=True, color=COLOURS[group], label=label)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set(
        xlabel="classes, most frequent first",
        ylabel="training images",
        title=title,
        xlim=(0.5, len(counts) + 0.5),
        ylim=(0.5, None),
    )
    axes.legend()
    return figure


def draw(classes: list[dict[str, Any]], title: str, picture: Path) -> None:
    """Writes the plot of `long_tail` to a PNG file."""
    save(long_tail(classes, title), picture, dpi=180)
