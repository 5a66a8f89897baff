"""What the card of a pre-trained model says about it: its licence and the data it saw."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from yaml import YAMLError

from data.hub_ids import is_hub_id

_CARD = "README.md"


@dataclass(frozen=True)
class BaseModel:
    """A pre-trained model, by its card. Nothing is concluded from its name.

    Attributes:
        has_card: whether it has a card that can be read.
        license: its licence; None if the card names none.
        datasets: the data sets that the card names.
    """

    has_card: bool = False
    license: str | None = None
    datasets: tuple[str, ...] = ()


def read_base_model(place: str) -> BaseModel:
    """Reads the card of a model, by its Hub id or folder. The cache may have it where the Hub cannot be reached."""
    path = _find_card(place)
    if path is None:
        return BaseModel()
    try:
        data = ModelCard.load(path).data
    except (OSError, ValueError, YAMLError):  # it is not in UTF-8, or its metadata are damaged
        return BaseModel()
    licences = _words(getattr(data, "license_name", None)) or _words(data.license)
    return BaseModel(has_card=True, license=", ".join(licences) or None, datasets=_words(data.datasets))


def _find_card(place: str) -> Path | None:
    if os.path.isdir(place):
        path = Path(place) / _CARD
        return path if path.is_file() else None
    if not is_hub_id(place):
        return None
    try:
        return Path(hf_hub_download(place, _CARD))
    except (OSError, HfHubHTTPError):  # it has none, or is neither within reach nor in the cache
        return None


def _words(value: Any) -> tuple[str, ...]:
    """A value of a card, which may be one word or a list of them."""
    words = value if isinstance(value, list) else [value]
    return tuple(" ".join(str(word).replace("`", "").split()) for word in words if word)
