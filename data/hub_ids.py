"""Ids on the Hugging Face Hub: one check for data sets, models and repositories to publish to."""

from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

HUB_PREFIX = "hf:"  # before the id of a data set on the Hub, where a folder could stand as well


def is_hub_id(place: str | Path) -> bool:
    """Whether `place` is a valid id, "user/name" or "name". The check is offline: the id need not exist."""
    try:
        validate_repo_id(str(place))
    except HFValidationError:
        return False
    return True


def hub_id_of(place: str | Path | None) -> str | None:
    """Returns the id in "hf:USER/NAME", or None for any other place. Raises ValueError if no valid id follows "hf:"."""
    if place is None or not str(place).startswith(HUB_PREFIX):
        return None
    hub_id = str(place).removeprefix(HUB_PREFIX)
    if not is_hub_id(hub_id):
        raise ValueError(f"{place}: {hub_id!r} is no id of a data set on the Hub; write {HUB_PREFIX}USER/NAME")
    return hub_id


def check_repo_id(repo_id: str, option: str) -> None:
    """Raises ValueError if a new repository cannot have this id. `option` is the option that it was given with.

    The check is offline. The id of a new repository must name its owner: "user/name".
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{option} {repo_id!r} is not a USER/NAME that the Hub accepts: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"{option} must be USER/NAME, not {repo_id!r}: add the user or organization that will own it")
