"""A training batch of one image, which BatchNorm cannot normalise where a feature map is one pixel: none comes about
by chance, and one that is asked for is refused before the training."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from conftest import tiny_model
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from test_training import assert_same_weights, read_metrics, train
from torch.utils.data import BatchSampler, SequentialSampler

from data import BrokenImageError, OnBrokenImage, TrainBatch, train_transform, training_batches
from data.loaders import JoiningBatchSampler
from data.streams import StreamCollate
from ride_bf.recipes import RECIPES
from ride_bf.training.batch_norm import check_batch_norm, has_single_pixels
from ride_bf.training.freezing import train_only

# Four stages with a stride of 2 each but the first: images of 8 pixels end as feature maps of one
ONE_PIXEL = ("--depths", 1, 1, 1, 1, "--hidden_sizes", 4, 4, 4, 8, "--epochs", 2)


@pytest.mark.parametrize("batch_size", range(1, 8))
@pytest.mark.parametrize("images", range(20))
def test_only_a_last_image_that_is_alone_changes_batches(images, batch_size):
    usual = list(BatchSampler(range(images), batch_size, drop_last=False))
    joined = JoiningBatchSampler(range(images), batch_size, drop_last=False)
    assert len(joined) == len(list(joined))
    if images > batch_size > 1 and images % batch_size == 1:
        assert list(joined) == [*usual[:-2], usual[-2] + usual[-1]]
    else:
        assert list(joined) == usual


def rows_of(count, broken=()):
    """Images of noise, which differ by their labels, 0 to count - 1."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 12, 12, 3), generator=generator, dtype=torch.uint8)
    images = [Image.fromarray(image.numpy()) for image in pixels]
    images = [{"bytes": b"no image"} if place in broken else image for place, image in enumerate(images)]
    return Dataset.from_dict({"image": images, "label": list(range(count))}).cast_column("image", ImageFeature())


def batches_of(rows, batch_size, accelerator=None, skip=False, **options):
    transform = train_transform("inaturalist", 8, on_broken=OnBrokenImage("skip" if skip else "stop"))
    finish = TrainBatch("digits", (0.0,) * 3, (1.0,) * 3)
    return training_batches(rows, transform, finish, batch_size, accelerator or Accelerator(cpu=True), **options)


def two_processes(index):
    """What the loaders ask of an accelerator, as one of two processes has it."""

    def prepare(loader):
        return prepare_data_loader(loader, num_processes=2, process_index=index, put_on_device=False)

    return SimpleNamespace(num_processes=2, process_index=index, device=torch.device("cpu"), prepare=prepare)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_last_image_joins_and_a_resumed_epoch_has_the_same_batches(workers):
    batches = batches_of(rows_of(13), 4, num_workers=workers)
    for epoch in range(2):
        batches.set_epoch(epoch)
        whole = list(batches)
        assert [len(batch["labels"]) for batch in whole] == [4, 4, 5]
        assert len(batches) == 3
        assert sorted(torch.cat([batch["labels"] for batch in whole]).tolist()) == list(range(13))
        for start in range(4):
            batches.set_epoch(epoch)
            rest = list(batches.batches_from(start))
            assert len(rest) == 3 - start
            for batch, expected in zip(rest, whole[start:], strict=True):
                assert torch.equal(batch["index"], expected["index"])
                assert torch.equal(batch["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("images", range(1, 14))
def test_every_batch_of_two_processes_is_full(images):
    """Accelerate completes the last ones with images of the first, so none is joined."""
    shares = [list(batches_of(rows_of(images), 4, two_processes(index))) for index in range(2)]
    assert len(shares[0]) == len(shares[1]) == -(-images // 4)
    assert {len(batch["labels"]) for share in shares for batch in share} == {2}


def test_runs_with_and_without_workers_and_accumulation(tmp_path):
    """337 images in batches of 56 leave one; in steps of 112 from two batches too."""
    runs = [
        train(tmp_path / str(number), *ONE_PIXEL, *options)
        for number, options in enumerate((("--batch_size", 56), ("--batch_size", 56, "--num_workers", 2)))
    ]
    assert_same_weights(runs[0] / "last", runs[1] / "last")
    assert [line["step"] for line in read_metrics(runs[0])] == [6, 12]
    accumulated = ("--batch_size", 112, "--gradient_accumulation_steps", 2, "--batchformer_window", 7)
    train(tmp_path / "accumulated", *ONE_PIXEL, *accumulated)
    assert [line["step"] for line in read_metrics(tmp_path / "accumulated")] == [3, 6]


def write_folder(folder, counts, broken=()):
    for name, count in counts.items():
        for place in range(count):
            path = folder / name / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (20 * place, 30, 40)).save(path)
            if f"{name}/{place}" in broken:
                path.write_bytes(path.read_bytes()[:40])
    return folder


OWN = ("--recipe", "digits_lt_resnet32", "--dataset", "custom", *ONE_PIXEL)
OWN += ("--augmentation", "inaturalist", "--reweight_epoch", 1)


def test_a_folder_of_64_images_in_batches_of_63(tmp_path):
    for split, count in (("train", 32), ("test", 2)):
        write_folder(tmp_path / "images" / split, {"a": count, "b": count})
    train(tmp_path / "out", *OWN, "--data_dir", tmp_path / "images", "--batch_size", 63)
    assert [line["step"] for line in read_metrics(tmp_path / "out")] == [1, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_are_left_out_leave_no_batch_of_one(tmp_path, workers):
    write_folder(tmp_path / "images/train", {"a": 4, "b": 3}, broken={"a/1"})
    write_folder(tmp_path / "images/test", {"a": 1, "b": 1})
    options = ("--data_dir", tmp_path / "images", "--batch_size", 2, "--on_broken_image", "skip")
    train(tmp_path / "out", *OWN, *options, "--num_workers", workers)
    assert [line["step"] for line in read_metrics(tmp_path / "out")] == [3, 6]
    results = json.loads((tmp_path / "out/test_results.json").read_text())
    assert len(results["broken_images"]) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_the_only_image_that_is_left_comes_in_two_augmentations(workers):
    rows = rows_of(9, broken=(1, 2, 3, 4))
    batches = batches_of(rows, 3, skip=True, num_workers=workers, sampler=SequentialSampler(rows))
    first, second, third = batches
    assert first["labels"].tolist() == [0, 0]
    assert first["index"].tolist() == [0, 0]
    assert not torch.equal(*first["pixel_values"])
    assert second["labels"].tolist() == [5, 5]
    assert third["labels"].tolist() == [6, 7, 8]
    batches.set_epoch(0)
    again = next(batches.batches_from(1))
    assert torch.equal(again["pixel_values"], second["pixel_values"]), "of the draw's number alone"
    whole = next(iter(batches_of(rows.select([0, 5, 6]), 3, sampler=SequentialSampler(range(3)))))
    assert torch.equal(whole["pixel_values"][0], first["pixel_values"][0]), "the first is as it always was"


def test_a_batch_that_was_to_be_of_one_image_stays_so():
    assert [len(batch["labels"]) for batch in batches_of(rows_of(3), 1, skip=True)] == [1, 1, 1]
    with pytest.raises(BrokenImageError, match=r"none of a batch's 1 images .*or set a larger --batch_size"):
        list(batches_of(rows_of(3, broken=(1,)), 1, skip=True))


def test_of_a_stream_too():
    images = rows_of(3, broken=(0, 2)).cast_column("image", ImageFeature(decode=False))
    transform = train_transform("inaturalist", 8, on_broken=OnBrokenImage("skip"))
    batch = StreamCollate(transform, {0: 0, 1: 1, 2: 2}, leave_out=True)(list(images))
    assert batch["labels"].tolist() == [1, 1]
    assert not torch.equal(*batch["pixel_values"])
    single = StreamCollate(transform, {1: 1}, leave_out=True)([images[1]])
    assert single["labels"].tolist() == [1]


REFUSED = {
    "one image a batch": (("--batch_size", 1), "--batch_size 2 or more"),
    "one image of those accumulated": (
        ("--batch_size", 8, "--gradient_accumulation_steps", 8),
        "--batch_size 16 or more",
    ),
}


@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_joined_is_refused_before_the_training(tmp_path, case, dry):
    options, remedy = REFUSED[case]
    with pytest.raises(SystemExit, match=rf"1 image .*at image_size 8 .*; set {remedy}, or a larger --image_size"):
        train(tmp_path / "out", *ONE_PIXEL, *options, *dry)
    assert not (tmp_path / "out/run.json").exists()


def recipe(**options):
    return RECIPES["digits_lt_resnet32"].with_overrides(image_size=8, resize_size=8, **options)


def one_pixel_model():
    return tiny_model(depths=[1, 1, 1, 1], hidden_sizes=[4, 4, 4, 8])


def test_the_share_of_a_process_counts():
    model = one_pixel_model()
    check_batch_norm(model, recipe(batch_size=4), 100, num_processes=2)
    with pytest.raises(ValueError, match=r"4 process\(es\).*--batch_size 8 or more"):
        check_batch_norm(model, recipe(batch_size=4), 100, num_processes=4)
    check_batch_norm(model, recipe(batch_size=4), 1, num_processes=2)  # Accelerate completes the batch
    with pytest.raises(ValueError, match=r"1 images\).*--passes_per_epoch 2 or more"):
        check_batch_norm(model, recipe(batch_size=4), 1, num_processes=1)


def test_only_networks_that_fail_are_refused():
    model = one_pixel_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.training
    assert has_single_pixels(model, 8)
    assert not has_single_pixels(model, 9)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    check_batch_norm(model, recipe(batch_size=1).with_overrides(image_size=16, resize_size=16), 100, 1)
    train_only(model, "classifiers")
    assert not has_single_pixels(model, 8), "a frozen BatchNorm keeps its statistics"


@pytest.mark.parametrize("network", ["cifar", "imagenet_basic", "bottleneck"])
@pytest.mark.parametrize("image_size", [1, 2, 4, 8, 16])
def test_has_single_pixels_tells_what_torch_refuses(network, image_size):
    model = tiny_model(network)
    if has_single_pixels(model, image_size):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            model.train()(torch.randn(1, 3, image_size, image_size))
    else:
        model.train()(torch.randn(1, 3, image_size, image_size))
