"""Loads data sets from the Hub, and says why one cannot be loaded."""

import datasets
from datasets import DatasetDict
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError


def load_from_hub(hub_id: str) -> DatasetDict:
    """Loads all splits of a data set on the Hub, downloaded or from the cache.

    Raises ValueError, with the remedy, if it is gated, does not exist or is not cached.
    """
    try:
        return datasets.load_dataset(hub_id)
    except (datasets.exceptions.DatasetNotFoundError, HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(why_not(hub_id, error)) from error


def is_gated(error: BaseException) -> bool:
    """Whether the terms of the data set have to be accepted, or the user has to log in."""
    # `datasets` hides the cause of its error, so that only its text tells
    return isinstance(error, GatedRepoError) or "is a gated dataset" in str(error)


def why_not(hub_id: str, error: Exception) -> str:
    """Returns why a data set cannot be loaded from the Hub, and the remedy, from the error of a library."""
    said = " ".join(str(error).split())
    if is_gated(error):
        return (
            f"{hub_id} is gated: accept its terms at https://huggingface.co/datasets/{hub_id}, and log in with "
            f"`hf auth login` ({said})"
        )
    if isinstance(error, ConnectionError | LocalEntryNotFoundError) or datasets.config.HF_HUB_OFFLINE:
        return (
            f"{hub_id} is not in the cache, and the Hub cannot be reached ({said}); load it once with a connection and "
            "without HF_HUB_OFFLINE"
        )
    return (
        f"{hub_id} cannot be loaded from the Hub ({said}); is the id right? If it is private, log in with "
        "`hf auth login`"
    )
