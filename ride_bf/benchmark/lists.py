"""Measure what many images cost before the first one is read, for lists as long as those of ImageNet-LT and longer.

Each list names files that exist, each with an inode of its own, so it passes the same checks as real lists. The files
are empty: nothing here reads them. They have just been made, so the system has their names in memory. All of it is
measured in a separate process. The memory of a loader's worker is the part that it does not share.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ride_bf.benchmark.measure import command, machine, peak_bytes, write_results

ROOT = Path(__file__).resolve().parent.parent.parent
CLASSES = 1000


def run(options: argparse.Namespace) -> None:
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    rows = []
    for lines in options.lines:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            make_list(Path(folder), lines)
            rows.append({"lines": lines, **_in_a_process(Path(folder))})
    results = {"command": command(options), "machine": machine(), "rows": rows}
    write_results(options.results, "lists", results)
    print(table(rows))


def make_list(folder: Path, lines: int) -> None:
    """Writes lists with `lines` lines in random order and 1,000 classes, and the empty files that they name."""
    entries = []
    for label in range(CLASSES):
        path = f"train/n{label:08d}"
        (folder / path).mkdir(parents=True)
        opened = os.open(folder / path, os.O_RDONLY)
        for index in range(label, lines, CLASSES):
            name = f"n{label:08d}_{index}.JPEG"
            os.mknod(name, dir_fd=opened)  # less than half the time of opening and closing it
            entries.append(f"{path}/{name} {label}\n")
        os.close(opened)
    random.Random(0).shuffle(entries)
    (folder / "train.txt").write_text("".join(entries[CLASSES:]))
    (folder / "test.txt").write_text("".join(entries[:CLASSES]))


def _in_a_process(folder: Path) -> dict:
    command = [sys.executable, "-m", "ride_bf.benchmark", "lists", "--measure", str(folder)]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if completed.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {completed.returncode}:\n{completed.stderr[-3000:]}")
    return json.loads(completed.stdout.splitlines()[-1])


def measure(folder: Path) -> dict:
    """Measures seconds and MiB of reading the lists in `folder`, with an empty cache and a full one, and what follows.

    What follows is done once for a run or, the draws of an epoch, in each process and epoch.
    """
    import datasets
    from torch.utils.data import DataLoader

    from data import class_counts, class_labels, load_long_tailed, undecoded
    from data.digest import images_digest
    from data.groups import image_keys
    from data.loaders import Shuffle, settle_worker
    from ride_bf.methods.samplers import LongTailedSampler

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    datasets.disable_progress_bars()
    before, started = _memory("VmRSS"), time.perf_counter()
    load_long_tailed("custom", folder)
    built, peak = time.perf_counter() - started, _memory("VmHWM")
    started = time.perf_counter()
    splits = load_long_tailed("custom", folder)
    counts = class_counts(splits["train"])
    reloaded = time.perf_counter() - started
    rows = undecoded(splits["train"]).with_transform(_WorkerMemory())
    loader = DataLoader(
        rows,
        batch_size=1000,
        shuffle=True,
        num_workers=1,
        collate_fn=lambda batch: batch[0],
        worker_init_fn=settle_worker,
    )
    own = [reading["mib"] for reading in loader]
    train = splits["train"]
    labels = class_labels(train)
    sampler = LongTailedSampler(labels, CLASSES, "square_root", len(train))
    afterwards = {
        "class_counts": lambda: class_counts(train),
        "digest": lambda: images_digest(train),
        "shuffle": lambda: _exhaust(Shuffle(len(train), 1, 0)),
        "sampler": lambda: LongTailedSampler(labels, CLASSES, "square_root", len(train)),
        "sampler_epoch": lambda: _exhaust(sampler),
        "feature_keys": lambda: image_keys(train),
    }
    return {
        "images": sum(counts),
        "build_seconds": built,
        "build_peak_mib": peak - before,
        "process_peak_mib": peak,
        "reload_seconds": reloaded,
        "worker_first_batch_mib": own[0],
        "worker_last_batch_mib": own[-1],
        "afterwards": {name: _cost(call) for name, call in afterwards.items()},
    }


def _exhaust(draws: Iterable[int]) -> None:
    for _ in draws:
        pass


def _cost(call: Callable[[], object]) -> dict[str, float]:
    """Returns the seconds of a call and the MiB that it adds at its peak."""
    seconds = []

    def timed() -> None:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)

    added = peak_bytes(timed, torch.device("cpu"))
    return {"seconds": seconds[0], "mib": added / 2**20}


class _WorkerMemory:
    """Replaces a transform: returns the MiB that the worker shares neither with its parent nor with the disk cache."""

    def __call__(self, rows: dict) -> dict:
        return {"mib": [_memory("Private_Dirty", "smaps_rollup")] * len(rows["label"])}


def _memory(kind: str, source: str = "status") -> float:
    """Returns the MiB of this process from Linux's /proc/self."""
    lines = Path("/proc/self", source).read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{kind}:"))


def table(rows: list[dict]) -> str:
    """Returns the measurements as Markdown."""
    lines = ["| lines | build, cache and check | memory for it | reload | worker's own memory, first and last batch |"]
    lines.append("| --- | --- | --- | --- | --- |")
    lines += [
        f"| {row['lines']:,} | {row['build_seconds']:.2f} s | {row['build_peak_mib']:.0f} MiB "
        f"| {1000 * row['reload_seconds']:.0f} ms "
        f"| {row['worker_first_batch_mib']:.0f} and {row['worker_last_batch_mib']:.0f} MiB |"
        for row in rows
    ]
    names = list(rows[0]["afterwards"])
    lines += ["", "| " + " | ".join(["lines", *names]) + " |", "| --- " * (1 + len(names)) + "|"]
    for row in rows:
        costs = [f"{cost['seconds']:.2f} s, {cost['mib']:.0f} MiB" for cost in row["afterwards"].values()]
        lines.append("| " + " | ".join([f"{row['lines']:,}", *costs]) + " |")
    return "\n".join(lines)
