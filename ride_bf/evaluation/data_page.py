"""`check_data.html`: the contents of a `check_data.json` as a self-contained page, with small pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data import CUSTOM
from data.exclusion import below, folder_of
from ride_bf.evaluation.data_report import (
    GROUP_FINDINGS,
    IMAGE_FINDINGS,
    IMAGE_PROPOSALS,
    SIMILAR,
    by_count,
    describe_leak,
    how_to_exclude,
    long_tail,
)
from ride_bf.evaluation.pages import thumbnail, to_svg, write_page

PAGE = "check_data.html"
_IMAGES, _GROUPS, _ALIKE = (
    24,
    24,
    4,
)  # images and groups of a finding that the page shows, and images of a similar group
_NAMED = 6  # images of a group of duplicates that are named
_LINES = 50  # classes of a proposal, and broken images, that the page lists
_CLASSES = 10_000  # rows of the table of classes
_HEADINGS = {
    "turned": "Turned images",
    "very_small": "Very small images",
    "other_format": "Formats that the name does not say",
    "far_sizes": "Unusual sizes and shapes",
    "rare_formats": "Rare formats",
    "two_labels": "Equal images with several labels",
    "in_two_splits": "Equal images in several splits",
    "similar": "Images that look alike",
}


def write_data_page(report: dict[str, Any], pixels_of: Callable[[dict[str, Any]], dict], folder: Path) -> Path:
    """Writes `check_data.html` into `folder`. Returns its path.

    `report` is the content of `check_data.json`. `pixels_of` returns the image of one of its entries, for `read_image`.
    """
    findings, proposals = report["findings"], report["proposals"]
    images = {
        **{name: findings[name] for name in IMAGE_FINDINGS},
        **{name: proposals[name] for name in IMAGE_PROPOSALS},
    }
    groups = {name: findings[name] for name in (*GROUP_FINDINGS, *SIMILAR) if name in findings}
    meanings = {**IMAGE_FINDINGS, **GROUP_FINDINGS, **SIMILAR, **IMAGE_PROPOSALS}
    thumbnails = _Thumbnails(pixels_of)
    name = _Names(report["data_dir"])
    broken = images.pop("broken")
    classes = by_count(report["classes"])
    return write_page(
        folder / PAGE,
        "data_page.jinja",
        {
            "report": report,
            "title": f"Data check of {_title(report)}",
            "splits": list(report["splits"]),
            "tiles": _tiles(report),
            "tail": to_svg("long_tail", long_tail(report["classes"])),
            "how_to": how_to_exclude(report.get("lists", {})),
            "broken": {
                "count": broken["count"],
                "images": [{"name": name.of(image), **image} for image in broken["images"][:_LINES]],
            },
            "groups": [
                {
                    "id": finding,
                    "heading": _HEADINGS[finding],
                    "meaning": meanings[finding],
                    "count": found["count"],
                    "groups": [
                        {
                            "count": group["count"],
                            "pictures": [
                                {"source": thumbnails.of(image), "alt": _alt(image, name)}
                                for image in group["images"][: _ALIKE if finding in SIMILAR else 1]
                            ],
                            "images": [{"name": name.of(image), **image} for image in group["images"][:_NAMED]],
                        }
                        for group in found["groups"][:_GROUPS]
                    ],
                }
                for finding, found in groups.items()
                if found["count"]
            ],
            "images": [
                {
                    "id": finding,
                    "heading": _HEADINGS[finding],
                    "meaning": meanings[finding],
                    "count": found["count"],
                    "images": [
                        {
                            "name": name.of(image),
                            "source": thumbnails.of(image),
                            "alt": _alt(image, name),
                            **image,
                        }
                        for image in found["images"][:_IMAGES]
                    ],
                }
                for finding, found in images.items()
                if found["count"]
            ],
            "proposals": _class_proposals(proposals),
            "classes": classes[:_CLASSES],
        },
    )


def _title(report: dict[str, Any]) -> str:
    if report["dataset"] != CUSTOM or report["data_dir"] is None:
        return report["dataset"]
    return Path(report["data_dir"]).resolve().name or report["data_dir"]


def _tiles(report: dict[str, Any]) -> list[dict[str, Any]]:
    findings = report["findings"]
    values = {
        "Images": (sum(facts["images"] for facts in report["splits"].values()), "in all splits", "all"),
        "Classes": (len(report["classes"]), f"imbalance factor {report['imbalance_factor']:g}", "all"),
        "Unreadable": (findings["broken"]["count"], "images", "few"),
        "In several splits": (findings["in_two_splits"]["count"], "groups of equal images", "few"),
        "Several labels": (findings["two_labels"]["count"], "groups of equal images", "few"),
    }
    return [
        {"name": name, "value": f"{value:,}", "note": note, "tone": tone if value else "medium"}
        for name, (value, note, tone) in values.items()
    ]


def _class_proposals(proposals: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns heading, note, number and lines of each proposal about classes that there is."""
    least = proposals["min_images"]
    found: list[tuple[str, str, Sequence[str]]] = [
        (
            f"Fewer than {least} images",
            "Such a class cannot be learned and tested. Give it more images, or remove it.",
            [f"{small['name']}: {small['images']}" for small in proposals["small_classes"]],
        ),
        (
            "Names that differ in little",
            "If they mean the same, put their images into one class.",
            [" = ".join(names) for names in proposals["similar_names"]],
        ),
        (
            "One format or size in a class",
            "A model can tell such a class by how its images were made. Convert all images alike.",
            [describe_leak(leak) for leak in proposals["leaks"]],
        ),
    ]
    return [
        {"heading": heading, "note": note, "count": len(lines), "lines": lines[:_LINES]}
        for heading, note, lines in found
        if lines
    ]


class _Names:
    """Names images for people: by the path below the data set's folder, or by the row."""

    def __init__(self, data_dir: str | None):
        self.folder = folder_of(data_dir)

    def of(self, image: dict[str, Any]) -> str:
        if image["path"] is None:
            return f"row {image['row']} of {image['split']}"
        return below(image["path"], self.folder)


def _alt(image: dict[str, Any], name: _Names) -> str:
    return f"{name.of(image)}, an image of the class {image['class']}"


class _Thumbnails:
    """Small pictures as training sees the images: upright, with transparency on white."""

    def __init__(self, pixels_of: Callable[[dict[str, Any]], dict]):
        self.pixels_of = pixels_of
        self.made: dict[tuple[str, int], str | None] = {}

    def of(self, image: dict[str, Any]) -> str | None:
        """Returns the picture as the source of an HTML image; None if the image cannot be read any more."""
        key = (image["split"], image["row"])
        if key not in self.made:
            self.made[key] = thumbnail(self.pixels_of(image))
        return self.made[key]
