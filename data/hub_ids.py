"""What counts as an id on the Hugging Face Hub: one rule for data sets, models and what is published."""

from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id


def is_hub_id(place: str | Path) -> bool:
    """Whether the Hub accepts `place` as an id, "user/name" or "name". The Hub is not asked if it has it."""
    try:
        validate_repo_id(str(place))
    except HFValidationError:
        return False
    return True


def check_repo_id(repo_id: str, option: str) -> None:
    """Raises ValueError for an id that the Hub would not give a new repository. `option` is where it was given.

    The Hub is not asked. A new repository needs its owner in the id, "user/name".
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{option} {repo_id!r} is no USER/NAME that the Hub accepts: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"{option} must be USER/NAME, not {repo_id!r}: add the user or organization that will own it")
