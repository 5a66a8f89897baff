"""A stand-in for ImageNet-LT, from the files to the test report, as a user would run it."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import train_accelerate
from data.synthesize import synthesize

TINY = (
    "--epochs 1 --batch_size 128 --image_size 32 --resize_size 36 --depths 1 1 --hidden_sizes 4 8 "
    "--num_shared_stages 1 --mixup_alpha 0.2 --cutmix_alpha 1 --auto_augment trivialaugment"
)


def break_one_image(folder):
    path = min((folder / "train").glob("*/*.JPEG"))
    path.write_bytes(path.read_bytes()[:300])
    return path


def test_broken_images_stop_a_run_or_are_left_out_and_listed(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "ImageNet_LT"
    synthesize("imagenet_lt", 0.003, folder, image_scale=0.1)
    broken = break_one_image(folder)
    options = f"--recipe imagenet_lt_resnet10 {TINY} --data_dir {folder} --output_dir {tmp_path / 'out'}"
    monkeypatch.setattr("sys.argv", ["train_accelerate.py", *options.split()])
    with pytest.raises(SystemExit, match=rf"^error: {broken} cannot be read: .*_train.txt, line \d+\)\. .*image skip$"):
        train_accelerate.main()

    monkeypatch.setattr("sys.argv", [*sys.argv, "--on_broken_image", "skip"])
    train_accelerate.main()
    (listed,) = json.loads((tmp_path / "out/test_results.json").read_text())["broken_images"]
    assert listed.startswith(f"{broken} cannot be read: ")
    assert "_train.txt, line " in listed


@pytest.mark.slow
def test_two_epochs_through_accelerate_launch(tmp_path):
    """At full size: about three minutes on two cores."""
    folder = tmp_path / "ImageNet_LT"
    facts = synthesize("imagenet_lt", 0.01, folder)
    broken = break_one_image(folder)
    command = (
        "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no "
        f"--num_cpu_threads_per_process {os.cpu_count()} train_accelerate.py --recipe imagenet_lt_resnet10 --epochs 2 "
        f"--batch_size 64 --learning_rate 0.05 --warmup_epochs 0 --on_broken_image skip --data_dir {folder} "
        f"--output_dir {tmp_path / 'out'}"
    )
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    environment.pop("OMP_NUM_THREADS")
    finished = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = json.loads((tmp_path / "out/test_results.json").read_text())
    assert results["train_class_counts"] == facts["class_counts"]
    assert [line.split(" cannot")[0] for line in results["broken_images"]] == [str(broken)]
    losses = [json.loads(line)["train_loss"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert losses[1] < losses[0]
    assert results["test"]["accuracy"] > 0.12, "no better than by chance, one in ten"
