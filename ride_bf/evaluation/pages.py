"""Self-contained HTML pages with figures, in light and dark colours."""

import io
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

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
