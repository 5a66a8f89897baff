"""Self-contained HTML pages with figures and small pictures, in light and dark colours."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import PIL.Image
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from torchvision.transforms.v2.functional import to_pil_image

from data import MAX_IMAGE_PIXELS, BrokenImageError, read_image
from ride_bf.evaluation.plots import COLOURS, save

_DARK = {  # replacements of COLOURS on a dark page
    "ink": "#e6eaf0",
    "muted": "#98a3b3",
    "line": "#333d4b",
    "all": "#8e9bae",
    "many": "#6aa9f0",
    "medium": "#3fc2ae",
    "few": "#f59357",
    "accent": "#9296f5",
}


_SIDE = 144  # pixels of the longer side of a thumbnail; a page shows it at half the size or a little more
_BYTES, _QUALITIES = 6_000, (80, 60, 40, 20, 10)  # of a thumbnail: a page with hundreds of them stays below 5 MB


def write_page(path: Path, template: str, contents: dict[str, Any]) -> Path:
    """Writes a page from a template in this folder, which gets `contents` and the `colours`. Returns its path."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    colours = {name: (colour, _DARK[name]) for name, colour in COLOURS.items()}
    page = templates.get_template(template).render(colours=colours, **contents)
    path.write_text(page, encoding="utf-8")
    return path


def to_svg(name: str, figure: Figure | None) -> str | None:
    """Returns a figure as an SVG element that uses the page's variables for its colours."""
    if figure is None:
        return None
    buffer = io.StringIO()
    save(figure, buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration and the doctype
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, value in COLOURS.items():
        svg = svg.replace(value, f"var(--{colour})")
    # Ids must be unique: several figures share the page.
    svg = re.sub(r'((?:id="|href="#|url\(#))', rf"\1{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name.replace("_", " ")}" ', 1)


def thumbnail(image: dict[str, Any], max_image_pixels: int = MAX_IMAGE_PIXELS) -> str | None:
    """Returns a small picture of what training sees of an image, as the source of an HTML image.

    `image` is a value that `data.read_image` takes. Returns None if it cannot be read.
    """
    try:
        picture = to_pil_image(read_image(image, max_image_pixels))
    except BrokenImageError:
        return None
    picture.thumbnail((_SIDE, _SIDE))
    return picture_source(picture, _BYTES)


def picture_source(picture: PIL.Image.Image, most_bytes: int | None = None) -> str:
    """Returns a picture as the source of an HTML image; of `most_bytes` if the lowest quality allows it."""
    return f"data:image/jpeg;base64,{base64.b64encode(as_jpeg(picture, most_bytes)).decode()}"


def as_jpeg(picture: PIL.Image.Image, most_bytes: int | None = None) -> bytes:
    """Returns a picture as a JPEG file; of `most_bytes` if the lowest quality allows it."""
    for quality in _QUALITIES:
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=quality)
        if most_bytes is None or file.tell() <= most_bytes:
            break
    return file.getvalue()
