"""Tar archives that are read while they are trained on; a data set on the Hub goes the same way."""

import io
import json
import tarfile
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import train_accelerate
from data import (
    BROKEN,
    OnBrokenImage,
    TrainBatch,
    class_counts,
    class_labels,
    evaluation_batches,
    evaluation_processor,
    load_long_tailed,
    train_transform,
    training_batches,
)
from ride_bf.methods.samplers import LongTailedSampler

COUNTS = {"train": [12, 6, 3], "test": [2, 2, 2]}
SHARDS = 4


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_shards(folder, counts=COUNTS, label=lambda c: str(c), extension="cls", broken=()):
    """Archives whose images are of one shade each, 10 times their place among all images of the split."""
    folder.mkdir(exist_ok=True)
    for split, of_class in counts.items():
        labels = [c for c, count in enumerate(of_class) for _ in range(count)]
        for shard in range(SHARDS):
            with tarfile.open(folder / f"{split}-{shard:03d}.tar", "w") as tar:
                for index in range(shard, len(labels), SHARDS):
                    buffer = io.BytesIO()
                    Image.new("RGB", (16, 16), (10 * index,) * 3).save(buffer, "PNG")
                    content = buffer.getvalue()[:40] if (split, index) in broken else buffer.getvalue()
                    for name, data in (("png", content), (extension, label(labels[index]).encode())):
                        member = tarfile.TarInfo(f"{split}{index:04d}.{name}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    return folder


def stream(place, **options):
    return load_long_tailed("custom", place, streaming=True, **options)


def process(index=0, count=1):
    """What the loaders ask of an accelerator, as one of several processes would have it."""
    return SimpleNamespace(process_index=index, num_processes=count, device=torch.device("cpu"))


def batches_of(splits, accelerator, **options):
    transform = train_transform("inaturalist", 8, on_broken=options.pop("on_broken", None))
    finish = TrainBatch("digits", (0.0,) * 3, (1.0,) * 3)
    return training_batches(splits["train"], transform, finish, 4, accelerator, **options)


def shades(batches):
    """Place of each image among all images of the split, from its pixels."""
    return [round(255 * value / 10) for batch in batches for value in batch["pixel_values"][:, 0, 4, 4].tolist()]


def test_counts_names_and_lengths(tmp_path):
    splits = stream(write_shards(tmp_path / "tars"))
    assert set(splits) == {"train", "test"}
    assert class_counts(splits["train"]) == [12, 6, 3]
    assert splits["train"].features["label"].names == ["0", "1", "2"]
    assert len(splits["test"]) == 6


def test_classes_are_counted_once(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "tars")
    first = class_counts(stream(folder)["train"])
    monkeypatch.setattr("data.streams.tqdm", None)
    assert class_counts(stream(folder)["train"]) == first


def test_labels_that_are_names(tmp_path):
    names = ["zebra", "ant", "moose"]
    folder = write_shards(tmp_path / "tars", label=lambda c: names[c], extension="txt")
    splits = stream(folder, label_column="txt")
    assert splits["train"].features["label"].names == ["ant", "moose", "zebra"]
    assert class_counts(splits["train"]) == [6, 3, 12]
    processor = evaluation_processor(8, 8, (0.0,) * 3, (1.0,) * 3)
    (batch,) = evaluation_batches(splits["test"], processor, 8)
    assert sorted(batch["labels"].tolist()) == [0, 0, 1, 1, 2, 2]


def test_an_epoch_is_as_many_batches_as_the_images_make_and_epochs_differ(tmp_path):
    splits = stream(write_shards(tmp_path / "tars"))
    batches = batches_of(splits, process(), passes=2)
    assert len(batches) == 10
    epochs = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        epochs.append(shades(batches))
    assert [len(epoch) for epoch in epochs] == [40, 40]
    assert sorted(epochs[0][:21]) == list(range(21)), "each image once before any comes again"
    assert epochs[0] != epochs[1]
    batches.set_epoch(0)
    assert shades(batches) == epochs[0], "a resumed run sees the same order"


def test_processes_read_shards_of_their_own(tmp_path):
    splits = stream(write_shards(tmp_path / "tars"))
    seen = [set(shades(batches_of(splits, process(index, 2), passes=3))) for index in range(2)]
    assert seen[0] | seen[1] == set(range(21))
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_image_once(tmp_path, workers):
    splits = stream(write_shards(tmp_path / "tars"))
    processor = evaluation_processor(8, 8, (0.0,) * 3, (1.0,) * 3)
    batches = list(evaluation_batches(splits["test"], processor, 4, workers, Accelerator(cpu=True)))
    assert sorted(shades(batches)) == list(range(6))
    assert all(batch["labels"].tolist() == [place // 2 for place in shades([batch])] for batch in batches)


def test_broken_images(tmp_path):
    folder = write_shards(tmp_path / "tars", broken={("train", 3), ("test", 1)})
    splits = stream(folder)
    with pytest.raises(ValueError, match=r"train0003.png cannot be read"):
        shades(batches_of(splits, process()))
    skip = OnBrokenImage("skip", None, tmp_path / "broken.txt")
    assert set(shades(batches_of(splits, process(), on_broken=skip, passes=2))) == set(range(21)) - {3}
    processor = evaluation_processor(8, 8, (0.0,) * 3, (1.0,) * 3)
    (batch,) = evaluation_batches(splits["test"], processor, 8, on_broken=skip)
    assert sorted(batch["labels"].tolist()) == [BROKEN, 0, 1, 1, 2, 2]
    noted = (tmp_path / "broken.txt").read_text()
    assert "train0003.png" in noted
    assert "test0001.png" in noted


def test_a_run(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "tars")
    options = (
        f"--dataset custom --data_dir {folder} --streaming --epochs 2 --batch_size 4 --image_size 8 --resize_size 8 "
        f"--depths 1 1 1 --hidden_sizes 4 4 4 --warmup_epochs 0 --reweight_epoch 1 --output_dir {tmp_path / 'out'}"
    )
    monkeypatch.setattr("sys.argv", ["train_accelerate.py", *options.split()])
    train_accelerate.main()
    results = json.loads((tmp_path / "out/test_results.json").read_text())
    assert results["train_class_counts"] == [12, 6, 3]
    assert len(results["test"]["per_class_accuracy"]) == 3


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda folder: (folder / "x.txt").write_text(""), {}, r"empty has no tar archives; .*train-\*.tar"),
        (lambda folder: write_shards(folder, {"train": [2, 1]}), {}, r"no split for test, only train"),
        (lambda folder: write_shards(folder), {"label_column": "json"}, r"no column json, .*'cls'.*--label_column"),
        (lambda folder: write_shards(folder), {"validation_fraction": 0.1}, "a stream cannot be split"),
        (
            lambda folder: write_shards(folder, {"train": [2, 0, 1], "test": [1, 1, 1]}),
            {},
            r"classes without training images: \['1'\]",
        ),
        (
            lambda folder: write_shards(folder, {"train": [2, 1], "test": [1, 1, 1]}),
            {},
            r"classes without training images: \['2'\]",
        ),
    ],
)
def test_what_is_wrong_is_explained(tmp_path, change, options, message):
    (tmp_path / "empty").mkdir()
    change(tmp_path / "empty")
    with pytest.raises(ValueError, match=message):
        stream(tmp_path / "empty", **options)


def test_what_cannot_be_streamed(tmp_path):
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(ValueError, match=r"x.csv cannot be streamed"):
        stream(tmp_path / "x.csv")
    for place in ("user/name", "user/name.v2", "user/name.py"):
        with pytest.raises(ValueError, match=rf"'{place}' cannot be loaded from the Hub"):
            stream(place)
    for place in ("./name", "user/a--b", "user/name.git"):
        with pytest.raises(ValueError, match=f"{place} cannot be streamed"):
            stream(place)
    splits = stream(write_shards(tmp_path / "tars"))
    with pytest.raises(ValueError, match="cannot be drawn by class: with --streaming set --sampler instance"):
        class_labels(splits["train"])
    with pytest.raises(ValueError, match="set --sampler instance"):
        batches_of(splits, process(), sampler=LongTailedSampler(torch.zeros(3, dtype=int).numpy(), 1, "instance", 3))
