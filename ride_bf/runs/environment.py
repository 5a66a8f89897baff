"""Describes the environment of a run: code, machine and libraries."""

import os
import re
import socket
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

_ROOT = Path(__file__).resolve().parent.parent.parent


def describe_environment(accelerator: Accelerator) -> dict[str, Any]:
    """The time, host, process, commit of this code, devices, precision and library versions of a run."""
    on_gpu = accelerator.device.type == "cuda"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "process": os.getpid(),
        **code_version(),
        "device": torch.cuda.get_device_name(accelerator.device) if on_gpu else f"{os.cpu_count()} CPU cores",
        "num_processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
    }


def code_version() -> dict[str, Any]:
    """The `commit` of this code, whether files were `modified` since, and the address of its `source`.

    All are None outside its git repository. The source is what it was cloned from, if that is on the web.
    """
    if _git("rev-parse", "--show-toplevel") != str(_ROOT):  # no repository, or this folder is inside another one
        return {"commit": None, "modified": None, "source": None}
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "modified": None if changes is None else bool(changes),
        "source": web_address(_git("remote", "get-url", "origin") or ""),
    }


def web_address(remote: str) -> str | None:
    """The address of a git remote in a browser, without a name or token in it; None for a folder of this machine."""
    found = re.fullmatch(
        r"(?:https?://|ssh://)?(?:[^@/]*@)?([\w-]+(?:\.[\w-]+)+)(?::\d+)?[:/](.+?)(?:\.git)?/?", remote
    )
    return f"https://{found[1]}/{found[2]}" if found else None


def _git(*arguments: str) -> str | None:
    try:
        finished = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout.strip() if finished.returncode == 0 else None
