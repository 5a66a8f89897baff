"""Errors as `huggingface_hub` raises them when the Hub refuses something."""

import importlib

from huggingface_hub.errors import HfHubHTTPError, HTTPError

_CLIENT = importlib.import_module(HTTPError.__module__.partition(".")[0])  # httpx2, or httpx before huggingface_hub 2


def hub_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    """The error of a response with this HTTP status."""
    request = _CLIENT.Request("GET", "https://huggingface.co/x")
    return kind("refused", response=_CLIENT.Response(status, request=request))
