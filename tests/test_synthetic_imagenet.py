"""A stand-in for ImageNet-LT, from the files to the test report, as a user would run it."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from data.synthesize import synthesize


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [[], ["--num_workers", "1", "--mixup_alpha", "0.2", "--auto_augment", "trivialaugment"]]
)
def test_two_epochs_through_accelerate_launch(tmp_path, extra):
    folder = tmp_path / "ImageNet_LT"
    facts = synthesize("imagenet_lt", 0.01, folder)
    broken = next((folder / "train").glob("*/*.JPEG"))
    broken.write_bytes(broken.read_bytes()[:5000])

    def launch(*options):
        command = (
            "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no "
            "--num_cpu_threads_per_process 2 train_accelerate.py --recipe imagenet_lt_resnet10 --epochs 2 "
            f"--batch_size 64 --warmup_epochs 0 --reweight_epoch 1 --data_dir {folder} --output_dir {tmp_path / 'out'}"
        )
        environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        environment.pop("OMP_NUM_THREADS")
        return subprocess.run(
            [sys.executable, *command.split(), *extra, *options],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )

    stopped = launch()
    assert stopped.returncode == 1
    message = f"error: {broken} cannot be read: "
    assert message in stopped.stderr, stopped.stderr[-3000:]
    assert "Traceback" not in stopped.stderr.split(message)[1]

    finished = launch("--on_broken_image", "skip", "--overwrite_output_dir")
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = json.loads((tmp_path / "out/test_results.json").read_text())
    assert results["train_class_counts"] == facts["class_counts"]
    assert len(results["broken_images"]) == 1
    assert results["broken_images"][0].startswith(str(broken))
    assert "_train.txt, line " in results["broken_images"][0]
    losses = [json.loads(line)["train_loss"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert losses[1] < losses[0]
    assert results["test"]["accuracy"] > 0.1, "no better than by chance"
