"""A run's output folder as training leaves it, of a network that is made in no time."""

import json

import numpy as np
import torch
from conftest import tiny_model

from data import evaluation_processor
from ride_bf.evaluation.metrics import shot_accuracy
from ride_bf.recipes import RECIPES

NAMES = ["air|field", "<b>bar</b>", "canyon", "dam", "eatery"]
COUNTS = [200, 120, 50, 19, 2]


def write_run(folder, names=NAMES, **test):
    """Writes it into `folder`; `test` are further entries of test_results.json. Returns the folder."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    model = tiny_model(batchformer="shared_classifier", **labels)
    model.train()(torch.randn(8, 3, 24, 24))  # running statistics other than the first ones
    model.save_pretrained(folder / "best")
    evaluation_processor(24, 24, (0.5,) * 3, (0.25,) * 3).save_pretrained(folder / "best")
    facts = {"epoch": 3, "train_class_counts": COUNTS, "balanced_accuracy": 0.5}
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(5), 10)
    guesses = np.where(rng.random(50) < 0.6, truth, rng.integers(0, 5, 50))
    recipe = RECIPES["imagenet_lt_resnet50"].with_overrides(epochs=4)
    start = {"commit": "c0ffee", "modified": False, "device": "2 CPU cores", "num_processes": 1, "precision": "no"}
    contents = {
        "best/checkpoint.json": facts,
        "recipe.json": json.loads(recipe.as_json()),
        "run.json": {"seed": 7, "data_dir": str(folder), "init_from": str(folder / "stage1"), "teacher": None},
        "environment.json": [{**start, "versions": {"torch": "2.0"}}],
        "test_results.json": {
            "recipe": "imagenet_lt_resnet50",
            "checkpoint": "best",
            "epoch": 3,
            "class_names": names,
            "train_class_counts": COUNTS,
            "test": {"loss": 1.0, **shot_accuracy(guesses, truth, COUNTS)},
            **test,
        },
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    lines = [
        {"epoch": epoch, "train_loss": 1 / epoch, "validation_balanced_accuracy": epoch / 10, "seconds": 61.0}
        for epoch in (1, 2, 3, 4)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
