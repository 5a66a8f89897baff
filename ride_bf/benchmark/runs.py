"""Many training runs at the same time, each of them a normal training command."""

import json
import multiprocessing
import os
import runpy
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ride_bf.runs.checkpoints import BEST, LAST, OLDER
from ride_bf.runs.run_folder import ENVIRONMENT, LOST_LOSS, METRICS, TEST_RESULTS
from ride_bf.training.collapse import WARNING_START

_TRAIN = Path(__file__).resolve().parent.parent.parent / "train_accelerate.py"
_LOG, _OPTIONS = "command.log", "command_options.txt"
# What a run imports. The server does it once, and the processes of the runs are forked from it.
_IMPORTED = ["torch.utils.tensorboard", "datasets", "modeling_ride_bf", "data", "ride_bf.training.setup"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training command.

    Attributes:
        name: what is printed when it is finished.
        options: of the command, but for `--output_dir`.
        folder: for its output. A finished run in it, with the same options, is not trained again.
        mixed_precision: that Accelerate trains in, as `accelerate launch --mixed_precision` sets it.
        inputs: a digest of the files that the options name. With others in their place, a run is trained again.
        keeps_model: whether its checkpoints stay when it is finished. Hundreds of runs can fill a disk.
        may_diverge: whether a loss that is not finite ends the run as one with an accuracy of 0, not as an error.
    """

    name: str
    options: tuple[str, ...]
    folder: Path
    mixed_precision: str = "no"
    inputs: str = ""
    keeps_model: bool = True
    may_diverge: bool = False


def train_all(runs: Sequence[Run], jobs: int) -> list[dict[str, Any]]:
    """Trains the runs, `jobs` at the same time, which share the cores. Returns the results of each, see `read_run`.

    Raises ValueError for a run that fails, with the end of what it printed. No further run is started then.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # the server reads it when it imports torch
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_IMPORTED)
    finished = {run for run in runs if _is_finished(run)}
    missing = [run for run in runs if run not in finished]
    if finished:
        folder = os.path.commonpath([run.folder for run in finished])
        count = f"{len(finished)} finished run{'s are' if len(finished) > 1 else ' is'}"
        print(f"{count} reused; delete {folder} to train again", flush=True)
    with ProcessPoolExecutor(jobs, mp_context=server, max_tasks_per_child=1) as pool:
        started = {pool.submit(_train, run): run for run in missing}
        try:
            for number, future in enumerate(as_completed(started), 1):
                seconds, run = future.result(), started[future]
                accuracy = 100 * read_run(run.folder)["balanced_accuracy"]
                print(f"{number}/{len(missing)} {run.name}: {accuracy:.1f} % in {seconds:.0f} s", flush=True)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)  # else all that wait would be trained first
            raise
    return [read_run(run.folder) for run in runs]


def read_run(folder: Path) -> dict[str, Any]:
    """The test metrics of a finished run, and facts of its training.

    `commit`: of the code. `modified`: if files differed from it. `seconds`: of training. With a BatchFormer,
    `batchformer_cosine`: how alike it made the images at the end, and `batchformer_warned`: whether that was warned of.
    """
    start = json.loads((folder / ENVIRONMENT).read_text())[-1]
    metrics = folder / METRICS  # a run that diverges in its first epoch has none
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    facts = {"commit": start.get("commit"), "seconds": sum(line.get("seconds", 0.0) for line in lines)}
    if start.get("modified"):
        facts["modified"] = True
    if lines and "batchformer_cosine" in lines[-1]:
        facts["batchformer_cosine"] = lines[-1]["batchformer_cosine"]
        facts["batchformer_warned"] = WARNING_START in (folder / _LOG).read_text()
    return {**json.loads((folder / TEST_RESULTS).read_text())["test"], **facts}


def mean_and_deviation(fractions: Sequence[float]) -> str:
    """Mean ± standard deviation in percent, for a table. A single number has no deviation; "–" stands for none."""
    if not fractions:
        return "–"
    mean = 100 * statistics.mean(fractions)
    return f"{mean:.1f}" if len(fractions) == 1 else f"{mean:.1f} ± {100 * statistics.stdev(fractions):.1f}"


def _is_finished(run: Run) -> bool:
    noted = run.folder / _OPTIONS
    return (run.folder / TEST_RESULTS).is_file() and noted.is_file() and noted.read_text() == _noted(run)


def _noted(run: Run) -> str:
    """What is noted of a finished run. Its recipe has what the backbone decides too."""
    return "".join(f"{line}\n" for line in (*run.options, run.mixed_precision, run.inputs))


def _train(run: Run) -> float:
    """Trains in this process, which does nothing else. Returns the seconds that it took."""
    started = time.perf_counter()
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / _LOG
    os.environ["ACCELERATE_MIXED_PRECISION"] = run.mixed_precision
    sys.argv = [str(_TRAIN), *run.options, "--output_dir", str(run.folder), "--overwrite_output_dir"]
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        runpy.run_path(str(_TRAIN), run_name="__main__")
    except SystemExit as error:
        if run.may_diverge and (run.folder / LOST_LOSS).is_file():
            (run.folder / TEST_RESULTS).write_text(json.dumps({"test": {"balanced_accuracy": 0.0}}))
        elif error.code not in (None, 0):
            raise ValueError(f"{' '.join(sys.argv)}\nended: {error.code}\n{log.read_text()[-3000:]}") from None
    except Exception as error:  # a traceback of another process may not be readable here
        raise ValueError(f"{' '.join(sys.argv)}\nended: {error!r}\n{log.read_text()[-3000:]}") from None
    (run.folder / _OPTIONS).write_text(_noted(run))
    if not run.keeps_model:
        for name in (LAST, BEST, OLDER):
            shutil.rmtree(run.folder / name, ignore_errors=True)
    return time.perf_counter() - started
