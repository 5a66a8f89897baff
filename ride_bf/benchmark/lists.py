"""Measure reading and caching of annotation lists as long as those of ImageNet-LT and iNaturalist 2018.

Each list names empty files that exist, so it passes the same checks as real lists. Time, memory and the reload from the
cache are measured in a separate process. The memory of a loader's worker is the part that it does not share.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ride_bf.benchmark.measure import machine, write_results

ROOT = Path(__file__).resolve().parent.parent.parent


def run(options: argparse.Namespace) -> None:
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    rows = []
    for lines in options.lines:
        with tempfile.TemporaryDirectory() as folder:
            make_list(Path(folder), lines)
            rows.append({"lines": lines, **_in_a_process(Path(folder))})
    results = {"command": "python -m ride_bf.benchmark lists", "machine": machine(), "rows": rows}
    write_results(options.results, "lists", results)
    print(table(rows))


def make_list(folder: Path, lines: int) -> None:
    """Writes lists with `lines` lines in random order and 1,000 classes, and the empty files that they name."""
    entries = []
    for label in range(1000):
        (folder / f"train/n{label:08d}").mkdir(parents=True)
    for index in range(lines):
        path = f"train/n{index % 1000:08d}/n{index % 1000:08d}_{index}.JPEG"
        (folder / path).touch()
        entries.append(f"{path} {index % 1000}\n")
    random.Random(0).shuffle(entries)
    (folder / "train.txt").write_text("".join(entries[1000:]))
    (folder / "test.txt").write_text("".join(entries[:1000]))


def _in_a_process(folder: Path) -> dict:
    command = [sys.executable, "-m", "ride_bf.benchmark", "lists", "--measure", str(folder)]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if completed.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {completed.returncode}:\n{completed.stderr[-3000:]}")
    return json.loads(completed.stdout.splitlines()[-1])


def measure(folder: Path) -> dict:
    """Measures seconds and MiB of reading the lists in `folder`, first with an empty cache, then with a full one."""
    import datasets
    from torch.utils.data import DataLoader

    from data import class_counts, load_long_tailed, undecoded
    from data.loaders import settle_worker

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
    return {
        "images": sum(counts),
        "build_seconds": built,
        "build_peak_mib": peak - before,
        "process_peak_mib": peak,
        "reload_seconds": reloaded,
        "worker_first_batch_mib": own[0],
        "worker_last_batch_mib": own[-1],
    }


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
    return "\n".join(lines)
