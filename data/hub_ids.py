"""Ids on the Hugging Face Hub: one check for data sets, models and repositories to publish to."""

from difflib import get_close_matches
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


def refuse_missing(place: str | Path, kind: str = "folder") -> None:
    """Raises ValueError, with similar names, for "outputs/NAME" if the folder outputs is here, and NAME is not in it.

    It could be an id on the Hub, but it is rather a typo. `kind` is what it was to be.
    """
    path = Path(place)
    if path.exists() or path.parent == Path() or not path.parent.is_dir():
        return
    hint = f". If it is an id on the Hub, run the command where there is no folder {path.parent}"
    remedy = did_you_mean(path) or (hint if is_hub_id(place) else "; check the name")
    raise ValueError(f"there is no {kind} {place}{remedy}")


def did_you_mean(path: Path) -> str:
    """Returns "; did you mean ...?" with similar names in the folder of a missing path, or "" without such names."""
    if not path.parent.is_dir():
        return ""
    similar = get_close_matches(path.name, sorted(entry.name for entry in path.parent.iterdir()))
    return f"; did you mean {' or '.join(str(path.parent / name) for name in similar)}?" if similar else ""


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
