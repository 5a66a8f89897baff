"""A streamed run goes on in mid-epoch with the images it would have seen, and evaluation counts each image once."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from processes import TRAIN, Command, run, torchrun
from test_several_processes import IN_STEP_THREE
from test_streams import batches_of, process, stream, write_shards
from test_surviving import interrupted_at, without_speed
from test_training import assert_same_weights, train

COUNTS = {"train": [12, 6, 3], "test": [3, 2, 2]}


@pytest.fixture
def archives(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("test_streams.SHARDS", 3)
    return write_shards(tmp_path / "tars", COUNTS)


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in ("pixel_values", "labels"))


@pytest.mark.parametrize("workers", [0, 2, 5])
def test_an_epoch_goes_on_where_it_stopped(archives, workers):
    """With the same crops, whatever the random numbers were before. Of five workers, two have no archive to read."""
    splits = stream(archives)

    def batches():
        torch.manual_seed(np.random.default_rng().integers(2**31))
        return batches_of(splits, process(), passes=3, num_workers=workers)

    whole = batches()
    whole.set_epoch(1)
    expected = list(whole)
    assert len(expected) == 15
    for start in (1, 4, 14):
        resumed = batches()
        resumed.set_epoch(1)
        rest = list(resumed.batches_from(start))
        assert len(rest) == 15 - start
        assert all(map(equal, rest, expected[start:]))
        resumed.set_epoch(2)
        whole.set_epoch(2)
        assert all(map(equal, resumed, whole)), "the next epoch begins at its beginning"


def test_left_out_images_are_not_prepared(archives, monkeypatch):
    prepared = []
    splits = stream(archives)
    batches = batches_of(splits, process(), passes=3)
    collate = batches.loader.base_dataloader.collate_fn
    prepare = type(collate)._prepare
    monkeypatch.setattr(type(collate), "_prepare", lambda self, row: prepared.append(row) or prepare(self, row))
    list(batches.batches_from(14))
    assert len(prepared) <= 8, "one batch, and one that is fetched ahead"


def options(archives):
    return (
        *("--recipe", "digits_lt_resnet32", "--dataset", "custom", "--data_dir", archives, "--streaming"),
        *("--epochs", 2, "--batch_size", 4, "--passes_per_epoch", 3, "--image_size", 8, "--resize_size", 8),
        *("--depths", 1, 1, 1, "--hidden_sizes", 4, 4, 4, "--warmup_epochs", 0, "--reweight_epoch", 1),
        *("--augmentation", "inaturalist", "--report_to", "none"),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_stopped_in_mid_epoch(archives, tmp_path, monkeypatch, workers):
    given = (*options(archives), "--num_workers", workers)
    whole = train(tmp_path / "whole", *given)
    with monkeypatch.context() as patch:
        interrupted_at(20, patch)
        with pytest.raises(SystemExit):
            train(tmp_path / "out", *given)
    with pytest.raises(SystemExit, match=f"num_workers: {workers} -> 1"):
        train(tmp_path / "out", *given, "--num_workers", 1, "--resume")
    train(tmp_path / "out", *given, "--resume")
    assert_same_weights(tmp_path / "out/last", whole / "last")
    assert without_speed(tmp_path / "out") == without_speed(whole)


def test_two_processes_and_three_archives(archives, tmp_path):
    """Stopped and resumed in mid-epoch; then each of the seven test images is counted once."""
    script = tmp_path / "script.py"
    script.write_text(IN_STEP_THREE.format(root=str(ROOT), rank=1, what="os.kill(os.getpid(), signal.SIGTERM)"))
    environment = {"ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    run(*torchrun(2, TRAIN, *options(archives), "--output_dir", tmp_path / "whole"), **environment)
    stopped = Command(*torchrun(2, script, *options(archives), "--output_dir", tmp_path / "out"), **environment)
    assert "SIGTERM: stopped after step 5" in stopped.finish()[1]
    run(*torchrun(2, TRAIN, *options(archives), "--output_dir", tmp_path / "out", "--resume"), **environment)
    assert_same_weights(tmp_path / "out/last", tmp_path / "whole/last")
    assert without_speed(tmp_path / "out") == without_speed(tmp_path / "whole")
    evaluate = (ROOT / "ride_bf/evaluate.py", "--model", tmp_path / "out", "--batch_size", 2, "--output_dir", tmp_path)
    run(*torchrun(2, *evaluate), PYTHONPATH=str(ROOT), **environment)
    assert sorted(np.load(tmp_path / "predictions.npz")["labels"]) == [0, 0, 0, 1, 1, 2, 2]
