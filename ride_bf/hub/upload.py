"""Uploads to the Hub in a single commit, by hand or while a run trains."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
    metadata_load,
    metadata_save,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # httpx's, or httpx2's
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from data.hub_ids import check_repo_id
from ride_bf.hub.export import HUB_CARDS
from ride_bf.hub.licences import OTHER, Licence, check_identifier
from ride_bf.hub.neighbours import NEIGHBOURS
from ride_bf.runs.run_folder import BROKEN_IMAGES

ROOT = Path(__file__).resolve().parent.parent.parent
# Files that an export may have. A later export without them deletes them, such as an ONNX file of old weights.
_OPTIONAL = (
    *("recipe.json", "results.json", "test_results.json", "report.html", "class_counts.json", "checkpoint.json"),
    *("plots/*", "examples/*", "shown/*", "model*.safetensors*", "model.onnx*", NEIGHBOURS),
)
# What to do in training, whose --push_license cannot name other terms
_OWN_TERMS = (
    "For terms of its own leave out --push_to_hub, and publish the finished run: python -m ride_bf.publish RUN "
    f"--repo_id USER/NAME --license {OTHER} --license_name NAME"
)


class PublishError(Exception):
    """The Hub could not be reached or refused the request. The message says what was not published."""


def check_login() -> None:
    """Raises ValueError if there is no token. It does not ask the Hub whether the token is valid."""
    if get_token() is None:
        raise ValueError("publishing needs a login: run hf auth login, or set HF_TOKEN in the environment")


def upload(folder: Path, repo_id: str, *, private: bool, revision: str | None = None, repo_type: str = "model") -> str:
    """Uploads the files in `folder` to a model or "space" repository, and creates the repository if needed.

    It makes a single commit. If anything fails, the repository stays as it was, or empty if it is new. Optional files
    of an earlier export that are not in `folder` are deleted, and it prints their names; other files in the repository
    stay. Returns the URL of the commit.

    Raises PublishError, and ValueError if `private` is set and the repository exists and is public.
    """
    api = HfApi()
    repository = {"repo_id": repo_id, "repo_type": repo_type}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    try:
        api.create_repo(
            **repository, private=private, exist_ok=True, space_sdk="gradio" if repo_type == "space" else None
        )
        if private and not api.repo_info(**repository).private:
            raise ValueError(
                f"{repo_id} exists and is public; make it private in its settings, or leave out --private "
                "(--push_private of the training command)"
            )
        if revision is not None:
            api.create_branch(**repository, branch=revision, exist_ok=True)
        there = api.list_repo_files(**repository, revision=revision)
        stale = [name for name in there if name not in names and any(fnmatch(name, kind) for kind in _OPTIONAL)]
        commit = api.create_commit(
            **repository,
            operations=[
                *(CommitOperationAdd(name, folder / name) for name in names),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message="Publish by ride_bf.publish",
            revision=revision,
        )
    except (HTTPError, OSError, RuntimeError) as error:
        raise PublishError(f"{repo_id} was not published: {_reason(error)}. You can run the command again") from error
    if stale:
        print(f"Deleted from {repo_id}, because this export does not have them: {', '.join(stale)}")
    if NEIGHBOURS in stale:
        squash = f"HfApi().super_squash_history({repo_id!r}{'' if revision is None else f', branch={revision!r}'})"
        print(f"Earlier commits still have the training images of {NEIGHBOURS}; {squash} of huggingface_hub drops them")
    return commit.commit_url


def published_license(repo_id: str, revision: str | None) -> Licence:
    """The licence on the card of the model that the repository has: of the branch `revision`, else of `main`.

    Raises ValueError without one, and PublishError if the Hub does not answer or refuses to.
    """
    card = _published_card(repo_id, revision)
    if revision is not None and not card.get("license"):  # of a new branch the repository has no card yet
        card = _published_card(repo_id, None)
    if not card.get("license"):
        raise ValueError(
            f"{repo_id} has no licence yet: pass --license, an identifier of the Hub such as mit or cc-by-nc-4.0. The "
            "terms of the training images may limit the choice"
        )
    return Licence(card["license"], card.get("license_name"), card.get("license_link"))


def _published_card(repo_id: str, revision: str | None) -> dict[str, Any]:
    """The metadata of the card that the Hub has; empty without a repository, branch or card."""
    try:
        return metadata_load(hf_hub_download(repo_id, "README.md", revision=revision)) or {}
    except (HTTPError, OSError, EntryNotFoundError) as error:
        absent = (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError)
        # Of these, the first is a file that only this machine does not have, and the second one that the Hub withholds.
        unknown = (LocalEntryNotFoundError, GatedRepoError)
        if isinstance(error, absent) and not isinstance(error, unknown):
            return {}
        raise PublishError(
            f"{repo_id} was not published: its licence cannot be read from the Hub: {_reason(error)}. Run the command "
            "again, or pass --license"
        ) from error


def is_private(repo_id: str) -> bool:
    """Whether a model's repository is private. Raises PublishError if the Hub cannot be reached."""
    try:
        return bool(HfApi().repo_info(repo_id).private)
    except (HTTPError, OSError) as error:
        raise PublishError(f"{repo_id} was published, but cannot be read: {_reason(error)}") from error


def write_space(folder: Path, repo_id: str, revision: str | None = None) -> None:
    """Fills the empty `folder` with the demo page of a published model, of a branch or commit if one is given."""
    shutil.copytree(HUB_CARDS / "space", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = metadata_load(folder / "README.md")
    metadata_save(folder / "README.md", {**metadata, "title": repo_id.rpartition("/")[2], "models": [repo_id]})
    (folder / "model.json").write_text(json.dumps({"model": repo_id, "revision": revision}) + "\n")


def _reason(error: BaseException) -> str:
    """The message of the Hub or the first cause, on one line. Hides the token in case a server sends it back."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    reason = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), causes[-1])
    message = " ".join(f"{type(reason).__name__}: {reason}".split())
    token = get_token()
    return message.replace(token, "***") if token else message


class RunPublisher:
    """Publishes a run every `every` epochs and at its end, each time in a separate process.

    So an error of the Hub causes only a warning, and a slow Hub does not slow the run down. A new push does not begin
    before the last one has ended. Without `repo_id`, and in all processes except the main one, it does nothing.
    """

    def __init__(
        self,
        run: Path,
        repo_id: str | None,
        license: str | None,
        every: int | None,
        private: bool,
        is_main_process: bool,
    ):
        """Raises ValueError for an invalid Hub id or licence, without licence or login, and for an `every` below 1."""
        if repo_id is None and (every is not None or private):
            raise ValueError("push_every and push_private need push_to_hub, the name of a repository: USER/NAME")
        if every is not None and every < 1:
            raise ValueError(f"push_every must be 1 or more, not {every}")
        if repo_id is not None:
            check_repo_id(repo_id, "--push_to_hub")
            if license is None:
                raise ValueError("--push_to_hub needs --push_license, an identifier of the Hub such as mit")
            if license == OTHER:
                raise ValueError(f"--push_license {OTHER} has no name. {_OWN_TERMS}")
            check_identifier(license, "--push_license", _OWN_TERMS)
            check_login()
        self.run, self.every = run.absolute(), every
        self.repo_id = repo_id if is_main_process else None
        self.options = ["--repo_id", str(repo_id), "--license", str(license), *(["--private"] * private)]
        self.push: subprocess.Popen | None = None
        self.copy, self.log = self.run / ".push", self.run / "push.log"

    def after_epoch(self, epochs_done: int) -> None:
        """Starts a push if it is due after this many epochs."""
        if self.repo_id is not None and self.every is not None and epochs_done % self.every == 0:
            if self.push is not None and self.push.poll() is not None:
                self._end()
            if self.push is None:
                self._begin()

    def after_training(self) -> None:
        """Publishes the finished run and waits until it is done."""
        if self.repo_id is not None:
            print(f"Publishing {self.repo_id} ...")
            self._end()
            self._begin()
            self._end()

    def _begin(self) -> None:
        """Starts to publish a copy of the run, so that training can continue."""
        published = "best" if (self.run / "best").is_dir() else "last"
        command = [sys.executable, "-m", "ride_bf.publish", str(self.copy), *self.options]
        try:
            shutil.rmtree(self.copy, ignore_errors=True)
            state = shutil.ignore_patterns("*.pkl", "*.bin", "training_state")
            shutil.copytree(self.run / published, self.copy / published, ignore=state)
            for path in (*self.run.glob("*.json*"), *self.run.glob(BROKEN_IMAGES)):
                shutil.copyfile(path, self.copy / path.name)
            with self.log.open("w") as log:
                self.push = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # leaves the GPUs to the run
                    stdout=log,
                    stderr=log,
                )
        except OSError as error:
            print(f"warning: the run was not published: {error}")

    def _end(self) -> None:
        """Waits for the current push, if there is one, and prints its outcome."""
        if self.push is None:
            return
        failed = self.push.wait() != 0
        last_words = (self.log.read_text().strip().splitlines() or ["it ended without a message"])[-1]
        again = shlex.join(["python", "-m", "ride_bf.publish", str(self.run), *self.options])
        print(f"warning: a push to the Hub failed: {last_words}\nTo publish by hand: {again}" if failed else last_words)
        shutil.rmtree(self.copy, ignore_errors=True)
        self.push = None
