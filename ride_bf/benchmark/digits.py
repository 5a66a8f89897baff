"""Compare the methods on the default images, with several seeds each, as a table and a plot.

Each run is a normal training command, so users can reproduce every number.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data import class_counts, load_long_tailed
from ride_bf.benchmark.measure import machine, write_results
from ride_bf.evaluation.metrics import shot_accuracy
from ride_bf.training.arguments import parse_arguments

ROOT = Path(__file__).resolve().parent.parent.parent

ONE_EXPERT = "--num_experts 1 --hidden_sizes 16 32 64 --batchformer none"
# Method -> its changes to the default recipe. Images, augmentation, steps and schedule are the same for all.
METHODS = {
    "cross-entropy": f"{ONE_EXPERT} --loss cross_entropy --classifier linear",
    "LDAM-DRW": f"{ONE_EXPERT} --loss ldam",
    "RIDE": "--batchformer none",
    "RIDE + BatchFormer": "",
}
NEAREST_NEIGHBOUR = "1-nearest neighbour"
COLUMNS = {
    "accuracy": "balanced",
    "many_shot_accuracy": "many",
    "medium_shot_accuracy": "medium",
    "few_shot_accuracy": "few",
}


def run(options: argparse.Namespace) -> None:
    if not options.plot_only:
        results = measure_digits(options.seeds, options.jobs, options.output_dir)
        write_results(options.results, results)
        print(digits_table(results))
    draw_digits(json.loads(options.results.read_text()), options.picture)
    print(options.picture)


def measure_digits(seeds: list[int], jobs: int, output_dir: Path) -> dict:
    """Runs the training command for each method and seed. Returns the test metrics."""
    runs = [(method, seed) for seed in seeds for method in METHODS]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    done = 0

    def run(item: tuple[str, int]) -> dict:
        nonlocal done
        method, seed = item
        folder = output_dir / method.replace(" ", "_") / f"seed_{seed}"
        started = time.perf_counter()
        metrics = train_once(METHODS[method].split(), seed, folder, threads)
        done += 1
        accuracy, seconds = 100 * metrics["accuracy"], time.perf_counter() - started
        print(f"{done}/{len(runs)} {method}, seed {seed}: {accuracy:.1f} % in {seconds:.0f} s", flush=True)
        return metrics

    with ThreadPoolExecutor(jobs) as pool:
        measured = list(pool.map(run, runs))
    splits = load_long_tailed("digits_lt")
    results: dict = {
        "command": f"python -m ride_bf.benchmark digits --seeds {' '.join(map(str, seeds))}",
        "machine": machine(),
        "class_counts": class_counts(splits["train"]),
        "methods": {NEAREST_NEIGHBOUR: {"options": "on the pixels", "runs": [nearest_neighbour(splits)]}},
    }
    for method in METHODS:
        own = [metrics for (name, _), metrics in zip(runs, measured, strict=True) if name == method]
        results["methods"][method] = {"options": METHODS[method], "runs": own}
    return results


def train_once(overrides: list[str], seed: int, folder: Path, threads: int) -> dict:
    """Runs the training command once, unless the run is already finished. Returns its test metrics."""
    arguments = [*overrides, "--seed", str(seed), "--output_dir", str(folder)]
    _, recipe = parse_arguments(arguments)
    finished, written = folder / "test_results.json", folder / "recipe.json"
    if not finished.is_file() or recipe.differences(written.read_text()):
        launch = (  # all options that a user's accelerate configuration could change
            "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no "
            f"--num_cpu_threads_per_process {threads}"
        )
        completed = subprocess.run(
            [sys.executable, *launch.split(), str(ROOT / "train_accelerate.py"), *arguments, "--overwrite_output_dir"],
            capture_output=True,
            text=True,
        )
        if completed.returncode:
            raise RuntimeError(f"{' '.join(arguments)} ended with {completed.returncode}:\n{completed.stderr[-3000:]}")
    return json.loads(finished.read_text())["test"]


def nearest_neighbour(splits) -> dict:
    """Returns the test metrics of a nearest-neighbour classifier on the pixels, with Euclidean distance."""
    from sklearn.neighbors import KNeighborsClassifier

    def pixels(split):
        return np.stack([np.asarray(image, dtype=np.float64).ravel() for image in split["image"]])

    train, test = splits["train"], splits["test"]
    classifier = KNeighborsClassifier(n_neighbors=1).fit(pixels(train), train["label"])
    return shot_accuracy(classifier.predict(pixels(test)), test["label"], class_counts(train))


def digits_table(results: dict) -> str:
    """Returns a Markdown table of mean and standard deviation over the seeds, and the gain from the BatchFormer."""
    lines = [f"| | {' | '.join(COLUMNS.values())} | runs |", f"| --- |{' --- |' * (len(COLUMNS) + 1)}"]
    for method, measured in results["methods"].items():
        cells = [_mean_and_deviation([run[column] for run in measured["runs"]]) for column in COLUMNS]
        lines.append(f"| {method} | {' | '.join(cells)} | {len(measured['runs'])} |")
    gains = {}
    for column, name in COLUMNS.items():
        values = {
            method: [100 * run[column] for run in results["methods"][method]["runs"]]
            for method in ("RIDE", "RIDE + BatchFormer")
        }
        if min(map(len, values.values())) > 1:
            error = sum(statistics.variance(runs) / len(runs) for runs in values.values()) ** 0.5
            gain = statistics.mean(values["RIDE + BatchFormer"]) - statistics.mean(values["RIDE"])
            gains[name] = f"{name} {gain:+.1f} ± {error:.1f}"
    if gains:
        lines += ["", f"Gain from adding the BatchFormer to RIDE, ± standard error: {', '.join(gains.values())}."]
    return "\n".join(lines)


def _mean_and_deviation(fractions: list[float]) -> str:
    mean = 100 * statistics.mean(fractions)
    return f"{mean:.1f}" if len(fractions) == 1 else f"{mean:.1f} ± {100 * statistics.stdev(fractions):.1f}"


def draw_digits(results: dict, picture: Path) -> None:
    """Plots the long tail, and the accuracy of each class by method with its standard deviation over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = results["class_counts"]
    classes = np.arange(len(counts))
    figure, (tail, accuracy) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(1, 2), layout="constrained")
    tail.bar(classes, counts, color="#8a8f98")
    tail.bar_label(tail.containers[0], fontsize=8)
    tail.set(title="The long tail", xlabel="digit", ylabel="training images", xticks=classes)
    colours = {"cross-entropy": "#c8553d", "RIDE": "#3d7ec8", "RIDE + BatchFormer": "#2a9d5c"}
    width = 0.8 / len(colours)
    for index, (method, colour) in enumerate(colours.items()):
        runs = np.array([run["per_class_accuracy"] for run in results["methods"][method]["runs"]]) * 100
        mean, deviation = runs.mean(axis=0), runs.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(counts))
        below, above = np.minimum(deviation, mean), np.minimum(deviation, 100 - mean)
        label = f"{method}: {mean.mean():.1f} %"
        position = classes + (index - 1) * width
        accuracy.bar(position, mean, width, yerr=(below, above), color=colour, label=label, error_kw={"lw": 0.8})
    accuracy.set(
        title="Accuracy on test images, 50 of each digit",
        xlabel="digit (training images)",
        ylabel="accuracy in %, ± standard deviation",
        xticks=classes,
        xticklabels=[f"{digit}\n({count})" for digit, count in zip(classes, counts, strict=True)],
        ylim=(0, 112),
        yticks=range(0, 101, 20),
    )
    accuracy.legend(loc="lower left", framealpha=0.95)
    for axes in (tail, accuracy):
        axes.spines[["top", "right"]].set_visible(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
