"""Compare the methods on the default images, with several seeds each, as a table and a plot.

Each run is a normal training command, so users can reproduce every number.
"""

import argparse
from pathlib import Path

import numpy as np

from data import class_counts, load_long_tailed
from ride_bf.benchmark.measure import machine, read_results, write_results
from ride_bf.benchmark.runs import Run, mean_and_deviation, train_all
from ride_bf.evaluation.comparison import paired_gain
from ride_bf.evaluation.metrics import shot_accuracy

ONE_EXPERT = "--num_experts 1 --hidden_sizes 16 32 64 --batchformer none"
# Method -> its changes to the default recipe. Images, augmentation, steps and schedule are the same for all.
METHODS = {
    "cross-entropy": f"{ONE_EXPERT} --loss cross_entropy --classifier linear",
    "LDAM-DRW": f"{ONE_EXPERT} --loss ldam",
    "RIDE": "--batchformer none",
    "RIDE + BatchFormer": "",
    "RIDE + gated BatchFormer": "--batchformer_layer_scale_init_value 0",
}
# Method -> the one that it is compared with
PAIRS = {
    "LDAM-DRW": "cross-entropy",
    "RIDE": "cross-entropy",
    "RIDE + BatchFormer": "RIDE",
    "RIDE + gated BatchFormer": "RIDE",
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
        runs = [run for method in METHODS for run in results["methods"][method]["runs"]]
        write_results(options.results, "digits", results, {run["commit"] for run in runs})
        print(digits_table(results))
    picture = options.picture or options.results.with_name("digits_lt.png")
    draw_digits(read_results(options, required=True), picture)
    print(picture)


def measure_digits(seeds: list[int], jobs: int, output_dir: Path) -> dict:
    """Runs the training command for each method and seed. Returns the test metrics."""
    runs = {
        (method, seed): Run(
            name=f"{method}, seed {seed}",
            options=(*options.split(), "--seed", str(seed)),
            folder=output_dir / method.replace(" ", "_") / f"seed_{seed}",
        )
        for seed in seeds
        for method, options in METHODS.items()
    }
    measured = dict(zip(runs, train_all(list(runs.values()), jobs), strict=True))
    splits = load_long_tailed("digits_lt")
    results: dict = {
        "command": f"python -m ride_bf.benchmark digits --seeds {' '.join(map(str, seeds))}",
        "machine": machine(),
        "class_counts": class_counts(splits["train"]),
        "methods": {NEAREST_NEIGHBOUR: {"options": "on the pixels", "runs": [nearest_neighbour(splits)]}},
    }
    for method, options in METHODS.items():
        results["methods"][method] = {"options": options, "runs": [measured[method, seed] for seed in seeds]}
    return results


def nearest_neighbour(splits) -> dict:
    """Returns the test metrics of a nearest-neighbour classifier on the pixels, with Euclidean distance."""
    from sklearn.neighbors import KNeighborsClassifier

    def pixels(split):
        return np.stack([np.asarray(image, dtype=np.float64).ravel() for image in split["image"]])

    train, test = splits["train"], splits["test"]
    classifier = KNeighborsClassifier(n_neighbors=1).fit(pixels(train), train["label"])
    return shot_accuracy(classifier.predict(pixels(test)), test["label"], class_counts(train))


def digits_table(results: dict) -> str:
    """Returns a Markdown table of mean ± standard deviation over the seeds, and gains in pairs of runs of a seed."""
    lines = [f"| | {' | '.join(COLUMNS.values())} | runs |", f"| --- |{' --- |' * (len(COLUMNS) + 1)}"]
    for method, measured in results["methods"].items():
        cells = [mean_and_deviation([run[column] for run in measured["runs"]]) for column in COLUMNS]
        lines.append(f"| {method} | {' | '.join(cells)} | {len(measured['runs'])} |")
    for method, other in PAIRS.items():
        if not results["methods"].keys() >= {method, other} or len(results["methods"][method]["runs"]) < 2:
            continue
        gains = []
        for column, name in COLUMNS.items():
            runs = [results["methods"][each]["runs"] for each in (other, method)]
            gain = paired_gain(*([100 * run[column] for run in own] for own in runs))
            gains.append(f"{name} {gain['mean']:+.1f} ± {gain['standard_error']:.1f}")
        lines += ["", f"{method} over {other}, in pairs of runs of a seed, ± standard error: {', '.join(gains)}."]
    return "\n".join(lines)


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
