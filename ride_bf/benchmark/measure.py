"""Tools of the benchmarks: timing in turns, peak memory, and a description of the machine."""

import argparse
import ctypes
import gc
import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ride_bf.benchmark.stale import source_digests
from ride_bf.runs.environment import code_version


def default_precision() -> str:
    """Returns the default precision: fp16 on a GPU, else no mixed precision."""
    return "fp16" if torch.cuda.is_available() else "no"


def precision_name(mixed_precision: str) -> str:
    """Returns Accelerate's name of a precision, but for "no", which is fp32."""
    return "fp32" if mixed_precision == "no" else mixed_precision


def command(options: argparse.Namespace, **instead: Any) -> str:
    """Returns the command that repeats the measurement, without where its files go and where a backbone lies.

    `instead` are values that replace those of `options`.
    """
    words = ["python -m ride_bf.benchmark", options.name]
    for option, value in (vars(options) | instead).items():
        if option not in ("name", "results", "picture", "output_dir", "jobs") and value not in (None, False):
            values = [] if value is True else value if isinstance(value, list | tuple) else [value]
            if option == "backbone":
                values = [backbone_name(value)]
            words += [f"--{option}", *(shlex.quote(str(word)) for word in values)]
    return " ".join(words)


def backbone_name(backbone: str) -> str:
    """Returns the name of a backbone: for a folder without where it lies."""
    return Path(backbone).name if Path(backbone).is_dir() else backbone


def machine(device: torch.device | None = None) -> str:
    """Describes the machine of a measurement."""
    gpu = f"{torch.cuda.get_device_name(device)}, " if device is not None and device.type == "cuda" else ""
    return f"{gpu}{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"


def seconds_in_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, least_seconds: float | None = None
) -> dict[str, list[float]]:
    """Measures the seconds that each call takes, for each round.

    The calls take turns, so that other load on the machine affects all of them alike, and ratios within a round are
    meaningful. Two extra rounds come first. They warm up and find how often to repeat a short call, so that a turn
    takes at least `least_seconds`: by default half a second, and half of that on a GPU, where times vary less.
    """
    if least_seconds is None:
        least_seconds = 0.25 if device.type == "cuda" else 0.5

    def turn(call: Callable[[], object], repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        return (time.perf_counter() - started) / repeats

    for call in calls.values():
        turn(call, 1)
    repeats = {name: 1 + int(least_seconds / turn(call, 1)) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(turn(call, repeats[name]))
    return seconds


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Measures the peak memory of `call`, on top of the memory that is in use before it.

    On a GPU, PyTorch's allocator counts the bytes. On a CPU, with Linux and glibc, it is the resident memory of the
    process. On other systems the result is None.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if platform.libc_ver()[0] != "glibc" or not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory that is still resident would be reused unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see man 5 proc
    before = _resident_bytes("VmRSS")
    call()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    """Reads a field of the process's status, which is in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def read_results(options: argparse.Namespace, required: bool) -> dict[str, Any]:
    """The measurements of a benchmark in `--results`. Empty if the file is not there; an error if it is required.

    Raises ValueError if the file is of another benchmark.
    """
    if options.results.is_file():
        results = json.loads(options.results.read_text(encoding="utf-8"))
        if (of := results.get("benchmark", options.name)) != options.name:
            raise ValueError(
                f"{options.results} has results of the benchmark {of!r}, not of {options.name!r}; name another file by "
                "--results"
            )
        return results
    if required:
        raise ValueError(f"{options.results} is not there; measure first, or name another file by --results")
    return {}


def write_results(path: Path, benchmark: str, results: dict[str, Any], commits: Collection[str | None] = ()) -> None:
    """Writes the measurements of a benchmark as JSON, with the commit of the code and digests of its files.

    Args:
        path: of the file.
        benchmark: the name of the benchmark.
        results: the measurements.
        commits: those that the measurements are from, if they may be of earlier ones. Each has digests of its own.
            None stands for code outside a git repository; without any other, the digests are those of the files now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    known = results.get("sources", {})  # of a commit that this clone does not have
    sources: dict[str, Any] = {
        commit: source_digests(benchmark, commit) or known.get(commit, {}) for commit in sorted(filter(None, commits))
    }
    facts = {"benchmark": benchmark, **results, **code_version(), "sources": sources or source_digests(benchmark)}
    written = path.with_name(f".{path.name}")
    written.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    written.replace(path)
    print(path)
