"""How the benchmarks measure: time in turns, peak memory, and the machine they ran on."""

import argparse
import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ride_bf.runs.environment import code_version


def default_precision() -> str:
    """That of a measurement for which none is named: fp16 on a GPU."""
    return "fp16" if torch.cuda.is_available() else "no"


def command(options: argparse.Namespace) -> str:
    """What would make the measurement again."""
    words = ["python -m ride_bf.benchmark", options.name]
    for option, value in vars(options).items():
        if option not in ("name", "results") and value not in (None, False):
            values = [] if value is True else value if isinstance(value, list | tuple) else [value]
            words += [f"--{option}", *map(str, values)]
    return " ".join(words)


def machine(device: torch.device | None = None) -> str:
    """What a measurement was made on."""
    gpu = f"{torch.cuda.get_device_name(device)}, " if device is not None and device.type == "cuda" else ""
    return f"{gpu}{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"


def seconds_in_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, least_seconds: float = 0.5
) -> dict[str, list[float]]:
    """Seconds that each call takes, by round.

    The calls take turns, so that whatever else the machine does falls on all alike and a quotient of two of them means
    something, round by round. Two rounds before warm up and find how often a short call is repeated, at least
    `least_seconds` a turn.
    """

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
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that `call` holds at a time beyond what is held before it.

    On a GPU as PyTorch's allocator counts it; on a CPU, under Linux with glibc, what the process has resident;
    elsewhere None.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if platform.libc_ver()[0] != "glibc" or not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what is free but still resident would be used again without being seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: man 5 proc
    before = _resident_bytes("VmRSS")
    call()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    """A field of the process's status, which is in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Writes measurements as JSON, with the commit of the code that made them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**results, **code_version()}, indent=1) + "\n")
    print(path)
