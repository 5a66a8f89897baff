"""Ids on the Hugging Face Hub: one check for data sets, models and repositories to publish to."""

from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id


def is_hub_id(place: str | Path) -> bool:
    """Whether `place` is a valid id, "user/name" or "name". The check is offline: the id need not exist."""
    try:
        validate_repo_id(str(place))
    except HFValidationError:
        return False
    return True


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
