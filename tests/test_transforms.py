"""From image files to what the network sees: reading, augmentation, normalisation, and images that are broken."""

import io
import multiprocessing
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from scipy.stats import ks_2samp
from torch.utils.data import DataLoader, SequentialSampler
from torchvision import transforms as classic
from torchvision.transforms import v2

from data import (
    AUGMENTATIONS,
    AUTO_AUGMENT,
    BROKEN,
    BrokenImageError,
    EvaluationBatch,
    FinishedBatches,
    OnBrokenImage,
    TrainBatch,
    evaluation_batches,
    evaluation_processor,
    evaluation_transform,
    leave_out_broken,
    read_image,
    train_transform,
    training_batches,
)
from data.batches import color_jitter, draw_jitter
from data.loaders import settle_worker
from ride_bf.recipes import RECIPES
from ride_bf.training.features import FeatureRows

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(width=40, height=30, channels=3, seed=0):
    """Smooth noise, as photographs have it; white noise shows nothing but the rounding of a resize."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, channels), dtype=np.uint8).squeeze()
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, file_format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


GREY_16 = Image.fromarray((np.arange(40 * 30, dtype=np.uint16) * 54).reshape(30, 40))
FILES = {
    "jpeg": (noise(), "JPEG", {"quality": 90}),
    "jpeg without chroma subsampling": (noise(), "JPEG", {"subsampling": 0}),
    "grey jpeg": (noise(channels=1), "JPEG", {}),
    "progressive jpeg": (noise(), "JPEG", {"progressive": True}),
    "cmyk jpeg": (noise().convert("CMYK"), "JPEG", {}),
    **{f"jpeg, orientation {turn}": (noise(), "JPEG", {"exif": turned(turn)}) for turn in range(2, 9)},
    "png": (noise(), "PNG", {}),
    "png, orientation 6": (noise(), "PNG", {"exif": turned(6)}),
    "palette png": (noise().convert("P"), "PNG", {}),
    "black and white png": (noise().convert("1"), "PNG", {}),
    "webp": (noise(), "WEBP", {"lossless": True}),
    "gif": (noise(), "GIF", {}),
    "animated gif": (noise(), "GIF", {"save_all": True, "append_images": [noise(seed=1)]}),
    "tiff": (noise(), "TIFF", {}),
    "bmp": (noise(), "BMP", {}),
}


@pytest.mark.parametrize("case", FILES)
def test_pixels_are_those_of_pil(case):
    image, file_format, options = FILES[case]
    file = encoded(image, file_format, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file["bytes"]))).convert("RGB"))
    pixels = read_image(file)
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (3, *expected.shape[:2]))
    assert np.array_equal(pixels.permute(1, 2, 0), expected)


def test_without_the_fast_decoders_pil_reads_the_same(monkeypatch):
    files = [encoded(image, "JPEG", **options) for image, kind, options in FILES.values() if kind == "JPEG"]
    expected = [read_image(file) for file in files]
    for decoder in ("simplejpeg", "decode_jpeg"):
        monkeypatch.setattr(f"data.reading.{decoder}", None)
        assert all(torch.equal(read_image(file), pixels) for file, pixels in zip(files, expected, strict=True))


def test_an_image_is_read_from_its_path(tmp_path):
    noise().save(tmp_path / "a.png")  # a PNG by content, whatever its name
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    pixels = read_image({"bytes": None, "path": str(tmp_path / "a.jpg")})
    assert torch.equal(pixels, v2.functional.pil_to_tensor(noise()))


def test_what_is_transparent_lies_on_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    for file in (encoded(image, "PNG"), encoded(image.convert("LA"), "PNG"), encoded(image, "GIF")):
        assert read_image(file).unique().tolist() == [255]


def test_sixteen_bits_of_grey_are_scaled_to_eight():
    expected = (np.asarray(GREY_16) / 257).round()
    assert np.array_equal(read_image(encoded(GREY_16, "PNG"))[1], expected)


JPEG = encoded(noise(400, 300))["bytes"]
EXIF = Image.Exif()
EXIF.update({0x0112: 6, 0x010E: "text"})
TURNED = encoded(noise(40, 30).convert("CMYK"), exif=EXIF)["bytes"]
BROKEN_FILES = {
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    "cut off jpeg": JPEG[: len(JPEG) // 2],
    "header of a jpeg": JPEG[:30],
    "cut off png": encoded(noise(400, 300), "PNG")["bytes"][:3000],
    "jpeg of zeros": b"\xff\xd8" + bytes(3000),
    "bomb": encoded(Image.new("1", (20_000, 10_000)), "PNG")["bytes"],
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_file_is_named(tmp_path, case):
    (tmp_path / "broken.jpg").write_bytes(BROKEN_FILES[case])
    with pytest.raises(BrokenImageError, match=r"broken.jpg cannot be read: \S"):
        read_image({"bytes": None, "path": str(tmp_path / "broken.jpg")})


@pytest.mark.parametrize(("content", "reason"), [(b"", "it is empty"), (b"<html>", "it is no image of a known format")])
def test_what_is_no_image_is_described_alike_each_time(content, reason):
    with pytest.raises(BrokenImageError) as info:
        read_image({"bytes": content, "path": "x.jpg"})
    assert str(info.value) == f"x.jpg cannot be read: {reason}"


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BrokenImageError, match=r"none.jpg cannot be read: there is no such file$"):
        read_image({"bytes": None, "path": str(tmp_path / "none.jpg")})
    with pytest.raises(BrokenImageError, match=rf"{tmp_path} cannot .*: it is a folder; .* such as {tmp_path}/\*.png$"):
        read_image({"bytes": None, "path": str(tmp_path)})
    with pytest.raises(BrokenImageError, match="an image stored in the data set cannot be read"):
        read_image({"bytes": b"x", "path": None})


class TestColorJitter:
    images = torch.stack([v2.functional.pil_to_tensor(noise(seed=seed)) for seed in range(12)])

    def test_each_image_is_changed_as_by_torchvision(self):
        """Every image by factors and in an order of its own; values 0 to 1 are torchvision's for floats."""
        torch.manual_seed(0)
        factors, order = draw_jitter(12, 0.4)
        change = (v2.functional.adjust_brightness, v2.functional.adjust_contrast, v2.functional.adjust_saturation)
        ours = color_jitter(self.images.float(), factors, order) / 255
        for image, factor, steps, got in zip(self.images, factors, order, ours, strict=True):
            expected = image.float() / 255
            for step in steps.tolist():
                expected = change[step](expected, factor[step].item())
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)

    def test_pil_differs_by_its_rounding_alone(self):
        torch.manual_seed(1)
        factors, order = draw_jitter(12, 0.4)
        ours = color_jitter(self.images.float(), factors, order)
        names = ("adjust_brightness", "adjust_contrast", "adjust_saturation")
        for seed, (factor, steps, got) in enumerate(zip(factors, order, ours, strict=True)):
            expected = noise(seed=seed)
            for step in steps.tolist():
                expected = getattr(classic.functional, names[step])(expected, factor[step].item())
            difference = (got - v2.functional.pil_to_tensor(expected)).abs()
            # PIL cuts off to whole numbers three times, and its grey is a whole number too; a factor of 1.4 in between
            assert difference.max() <= 5

    def test_factors_and_orders(self):
        torch.manual_seed(0)
        factors, order = draw_jitter(6000, 0.4)
        for column in factors.T.numpy():
            uniform = np.random.default_rng(0).uniform(0.6, 1.4, 6000)
            assert ks_2samp(column, uniform).pvalue > 0.01
        orders, counts = order.unique(dim=0, return_counts=True)
        assert len(orders) == 6
        assert counts.min() > 850  # 1000 expected, standard deviation 29


@pytest.mark.parametrize(("name", "size"), [("imagenet", 32), ("inaturalist", 32), ("cifar", 40)])
def test_the_distribution_is_that_of_torchvision_s_classic_transforms(name, size):
    """Mean, contrast and symmetry of many draws of one image against PIL's way, by Kolmogorov and Smirnov.

    For what is published; the augmentation of the digits is ours, and has no other way to be held against.
    """
    steps = {
        "imagenet": [
            classic.RandomResizedCrop(size),
            classic.RandomHorizontalFlip(),
            classic.ColorJitter(0.4, 0.4, 0.4, 0),
        ],
        "inaturalist": [classic.RandomResizedCrop(size), classic.RandomHorizontalFlip()],
        "cifar": [
            classic.RandomCrop(size, padding=size // 8),
            classic.RandomHorizontalFlip(),
            classic.RandomRotation(15),
        ],
    }[name]
    image = noise(40, 40, seed=5)
    draws = 600
    torch.manual_seed(0)
    reference = classic.Compose([*steps, classic.ToTensor(), classic.Normalize(MEAN, STD)])
    expected = torch.stack([reference(image) for _ in range(draws)])
    rows = train_transform(name, size)({"image": [encoded(image, "PNG")] * draws, "label": [0] * draws})
    batch = {"pixel_values": torch.stack(rows["pixel_values"]), "labels": torch.tensor(rows["labels"])}
    got = TrainBatch(name, MEAN, STD)(batch)["pixel_values"]
    assert got.shape == expected.shape
    statistics = {
        "mean": lambda images: images.mean(dim=(1, 2, 3)),
        "deviation": lambda images: images.std(dim=(1, 2, 3)),
        "left against right": lambda images: images[..., : size // 2].mean(dim=(1, 2, 3)) - images.mean(dim=(1, 2, 3)),
        "top against bottom": lambda images: images[..., : size // 2, :].mean(dim=(1, 2, 3)),
        "red against blue": lambda images: (images[:, 0] - images[:, 2]).mean(dim=(1, 2)),
    }
    for statistic, of in statistics.items():
        assert ks_2samp(of(got).numpy(), of(expected).numpy()).pvalue > 0.005, statistic


def test_half_of_the_images_are_mirrored_each_by_itself():
    torch.manual_seed(0)
    image = torch.arange(8, dtype=torch.uint8).expand(1000, 3, 8, 8)
    finished = TrainBatch("inaturalist", (0.0,) * 3, (1 / 255,) * 3)({"pixel_values": image, "labels": None})
    mirrored = finished["pixel_values"][:, 0, 0, 0] > 3
    assert 450 < mirrored.sum() < 550
    assert torch.equal(TrainBatch("digits", (0.0,) * 3, (1 / 255,) * 3)({"pixel_values": image})["pixel_values"], image)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("policy", AUTO_AUGMENT)
def test_training_pixels(name, policy):
    transform = train_transform(name, 32, policy, processor=evaluation_processor(32, 32, MEAN, STD))
    file = encoded(noise(), "PNG")
    torch.manual_seed(0)
    rows = transform({"image": [file, file], "label": [3, 4]})
    first, second = rows["pixel_values"]
    assert (first.dtype, first.shape) == (torch.uint8, (3, 32, 32))
    varies = AUGMENTATIONS[name].varies or policy != "none"
    assert torch.equal(first, second) != varies, "each image is augmented by itself, if at all"
    assert rows["labels"] == [3, 4]
    torch.manual_seed(0)
    assert torch.equal(transform({"image": [file], "label": [3]})["pixel_values"][0], first)


def test_unknown_names():
    with pytest.raises(ValueError, match="no augmentation is called 'autoaugment'; there are imagenet"):
        train_transform("autoaugment", 32)
    with pytest.raises(ValueError, match="no policy is called 'augmix'; there are none, randaugment"):
        train_transform("imagenet", 32, "augmix")
    with pytest.raises(ValueError, match="'none' leaves images to the image processor: pass processor"):
        train_transform("none", 32)


class TestMixing:
    labels = torch.tensor([0, 1, 2, 2])
    pixels = torch.tensor([0, 60, 120, 200], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 16, 16)

    def mix(self, **alphas):
        torch.manual_seed(3)
        finish = TrainBatch("digits", (0.0,) * 3, (1 / 255,) * 3, **alphas)
        return finish({"pixel_values": self.pixels, "labels": self.labels})

    def test_mixup(self):
        batch = self.mix(mixup_alpha=1.0)
        share = batch["label_weight"]
        assert 0 < share < 1
        values = torch.tensor([0.0, 60, 120, 200])
        mixed_with = (batch["pixel_values"][:, 0, 0, 0] - share * values) / (1 - share)
        partners = [(values - value).abs().argmin().item() for value in mixed_with]
        assert torch.allclose(values[partners], mixed_with, atol=1e-3)
        assert batch["mixed_labels"].tolist() == self.labels[partners].tolist()
        assert torch.equal(batch["labels"], self.labels)

    def test_cutmix(self):
        batch = self.mix(cutmix_alpha=1.0)
        values = torch.tensor([0.0, 60, 120, 200])
        for pixels, own, label in zip(batch["pixel_values"], values, batch["mixed_labels"], strict=True):
            cut_in = pixels[0] != own
            assert (1 - cut_in.float().mean()).item() == pytest.approx(batch["label_weight"].item(), abs=1e-6)
            assert self.labels[(values == pixels[0][cut_in][0]).nonzero()[0, 0]] == label

    def test_each_batch_gets_one_of_them(self):
        torch.manual_seed(0)
        finish = TrainBatch("digits", (0.0,) * 3, (1.0,) * 3, mixup_alpha=1.0, cutmix_alpha=1.0)
        batches = [finish({"pixel_values": self.pixels, "labels": self.labels}) for _ in range(40)]
        cut = sum(len(batch["pixel_values"][1, 0].unique()) > 1 for batch in batches)
        assert 8 < cut < 32

    def test_one_image_is_mixed_with_itself(self):
        finish = TrainBatch("digits", (0.0,) * 3, (1.0,) * 3, mixup_alpha=1.0)
        batch = finish({"pixel_values": self.pixels[:1], "labels": self.labels[:1]})
        assert batch["mixed_labels"].tolist() == [0]


# a backbone decides itself how it sees images
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.backbone is None])
def test_evaluation_sees_what_torchvision_would(name):
    """The stock processor against Resize, CenterCrop, Normalize; on sizes whose crop has no half pixel to round."""
    recipe = RECIPES[name]
    image = noise(recipe.resize_size * 2, recipe.resize_size * 2)
    processor = evaluation_processor(recipe.resize_size, recipe.image_size, recipe.image_mean, recipe.image_std)
    ours = one_batch([image], processor)["pixel_values"][0]
    reference = classic.Compose(
        [
            classic.Resize(recipe.resize_size),
            classic.CenterCrop(recipe.image_size),
            classic.ToTensor(),
            classic.Normalize(recipe.image_mean, recipe.image_std),
        ]
    )(image)
    assert ours.shape == (3, recipe.image_size, recipe.image_size)
    one_grey_level = 1 / 255 / min(recipe.image_std)
    assert (ours - reference).abs().max() <= one_grey_level * 1.01


def one_batch(images, processor, **options):
    features = Features({"image": ImageFeature(), "label": ClassLabel(num_classes=3)})
    rows = Dataset.from_dict({"image": images, "label": [1] * len(images)}, features=features)
    (batch,) = evaluation_batches(rows, processor, batch_size=len(images), **options)
    return batch


@pytest.mark.parametrize("size", [(40, 30), (31, 67), (20, 20), (16, 300), (33, 33)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_evaluation_is_the_saved_processor_to_the_last_bit(tmp_path, size, mode):
    """So that a measured accuracy is that of what `pipeline` does with the same files."""
    from transformers import AutoImageProcessor

    evaluation_processor(28, 24, MEAN, STD).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    image = noise(*size).convert(mode)
    file = encoded(image, "JPEG" if mode in ("RGB", "CMYK") else "PNG")
    decoded = Image.open(io.BytesIO(file["bytes"])).convert("RGB")
    expected = processor(decoded, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(one_batch([file], processor)["pixel_values"][0], expected)


@pytest.mark.parametrize("switched_off", ["do_resize", "do_center_crop", "do_rescale", "do_normalize"])
def test_a_processor_s_switches_are_heeded(switched_off):
    processor = evaluation_processor(28, 24, MEAN, STD)
    setattr(processor, switched_off, False)
    image = noise(30, 40)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(one_batch([image], processor)["pixel_values"][0], expected, atol=1e-5, rtol=1e-5)


def test_training_and_evaluation_see_the_same_under_transparency():
    transparent = encoded(Image.new("RGBA", (32, 32), (255, 0, 0, 0)), "PNG")
    processor = evaluation_processor(32, 32, (0.5,) * 3, (0.25,) * 3)
    for transform in (evaluation_transform(processor), train_transform("inaturalist", 32)):
        pixels = torch.stack(transform({"image": [transparent], "label": [0]})["pixel_values"])
        finished = EvaluationBatch((0.5,) * 3, (0.25,) * 3)({"pixel_values": pixels})["pixel_values"]
        torch.testing.assert_close(finished, torch.full((1, 3, 32, 32), 2.0))  # white


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_transforms_can_be_sent_to_spawned_workers(name):
    processor = evaluation_processor(32, 32, MEAN, STD)
    for transform in (train_transform(name, 32, processor=processor), evaluation_transform(processor)):
        again = pickle.loads(pickle.dumps(transform))
        rows = again({"image": [encoded(noise(), "PNG")], "label": [1]})
        assert rows["pixel_values"][0].shape == (3, 32, 32)


class TestBroken:
    rows = {"image": [{"bytes": JPEG[:500], "path": "/d/x.jpg"}, encoded(noise())], "label": [1, 2]}  # noqa: RUF012

    def test_stop_names_path_line_and_remedies(self):
        stop = OnBrokenImage(find_entry=lambda path: f"list.txt, line 7 of {path}")
        with pytest.raises(BrokenImageError, match=r"/d/x.jpg cannot .*line 7 of /d/x.jpg\).*check_data.*image skip"):
            train_transform("imagenet", 16, on_broken=stop)(self.rows)

    def test_skip_leaves_it_out_and_notes_it(self, tmp_path):
        skip = OnBrokenImage("skip", lambda path: None, tmp_path / "broken.txt")
        rows = train_transform("imagenet", 16, on_broken=skip)(self.rows)
        assert rows["labels"] == [BROKEN, 2]
        batch = leave_out_broken([dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)])
        assert batch["labels"].tolist() == [2]
        assert batch["pixel_values"].shape == (1, 3, 16, 16)
        assert (tmp_path / "broken.txt").read_text().startswith("/d/x.jpg cannot be read: ")

    def test_a_batch_of_nothing_else(self):
        with pytest.raises(BrokenImageError, match="none of a batch's 2 images can be read"):
            leave_out_broken([{"pixel_values": torch.zeros(1), "labels": BROKEN}] * 2)

    def test_a_batch_of_features_of_nothing_else(self):
        """Else one of several processes would wait for the others, which take a step."""
        labels = np.array([BROKEN, BROKEN, 0, 1])
        rows = FeatureRows(np.ones((1, 4, 3), np.float32), labels, Dataset.from_dict({}), full_batch=2)
        assert rows.__getitems__([0, 2])["index"].tolist() == [2]
        assert rows.__getitems__([1]) == {}  # the end of an epoch
        with pytest.raises(BrokenImageError, match="none of a batch's 2 images can be read"):
            rows.__getitems__([0, 1])

    def test_the_last_few_images_of_an_epoch_may_all_be_broken(self):
        rows = Dataset.from_dict({"image": [encoded(noise())] * 4 + self.rows["image"][:1], "label": [0, 1, 0, 1, 0]})
        batches = training_batches(
            rows.cast_column("image", ImageFeature(decode=False)),
            train_transform("imagenet", 16, on_broken=OnBrokenImage("skip")),
            TrainBatch("imagenet", (0.5,) * 3, (0.5,) * 3),
            batch_size=2,
            accelerator=Accelerator(cpu=True),
            sampler=SequentialSampler(range(5)),
        )
        assert [batch["labels"].tolist() for batch in batches] == [[0, 1], [0, 1]]


def test_finished_batches_pass_epochs_on_and_may_end_early():
    class Endless:
        epoch, dataset = 0, ()

        def __iter__(self):
            while True:
                yield {"pixel_values": self.epoch}

        def set_epoch(self, epoch):
            self.epoch = epoch

    batches = FinishedBatches(Endless(), lambda batch: {"pixel_values": batch["pixel_values"] + 1}, num_batches=3)
    batches.set_epoch(4)
    assert len(batches) == 3
    assert [batch["pixel_values"] for batch in batches] == [5, 5, 5]


def run_program(path, source):
    path.write_text(source)
    finished = subprocess.run(
        [sys.executable, str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stdout


def test_a_program_ends_though_a_worker_is_left(tmp_path):
    """A worker ignores SIGTERM from others; one whose loader is still held at the end must not keep the program."""
    printed = run_program(
        tmp_path / "left.py",
        "import atexit\n"
        "from torch.utils.data import DataLoader\n"
        "from data.loaders import settle_worker\n"
        "loader = DataLoader(range(9), num_workers=1, persistent_workers=True, worker_init_fn=settle_worker)\n"
        "batches = iter(loader)\n"
        "next(batches)\n"
        "atexit.register(lambda: print('held to the end', batches is not None))\n",
    )
    assert "held to the end True" in printed


HOST = """
import atexit, multiprocessing, os, signal, sys, time


def child():
    def put_away(*_):
        print("put away", flush=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, put_away)
    ready.set()
    time.sleep(60)


def ended(number, frame):
    pass


ready = multiprocessing.get_context("fork").Event()
process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
process.start()
ready.wait()
signal.signal(signal.SIGCHLD, ended)
atexit.register(lambda: print("handler kept", signal.getsignal(signal.SIGCHLD) is ended))

import data
"""


def test_a_program_that_imports_data_keeps_its_own_children(tmp_path):
    """They get the SIGTERM that multiprocessing sends them at the end, and the program's handlers stay."""
    printed = run_program(tmp_path / "host.py", HOST)
    assert "put away" in printed
    assert "handler kept True" in printed


HOST_WITH_A_WORKER = (
    HOST
    + """
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

rows = {"image": [Image.new("RGB", (9, 9))] * 8, "label": [0, 1] * 4}
processor = data.evaluation_processor(8, 8, (0.5,) * 3, (0.5,) * 3)
batches = iter(data.evaluation_batches(Dataset.from_dict(rows), processor, 2, num_workers=1))
print("first batch", next(batches)["labels"].tolist())
print("children", len(multiprocessing.active_children()))
"""
)


def test_a_worker_that_is_left_ends_beside_the_programs_own_children(tmp_path):
    printed = run_program(tmp_path / "host.py", HOST_WITH_A_WORKER)
    assert "first batch [0, 1]" in printed
    assert "children 2" in printed
    assert "put away" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Python cannot tell who sent a signal")
def test_workers_take_the_end_from_their_own_process_alone():
    before = set(multiprocessing.active_children())
    batches = iter(
        DataLoader(range(8), num_workers=2, worker_init_fn=settle_worker, prefetch_factor=1, persistent_workers=True)
    )
    assert [next(batches).item(), next(batches).item()] == [0, 1]  # one from each: both are under way
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        for name in ("TERM", "INT", "USR1"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert [item.item() for item in batches] == [*range(2, 8)]
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()
        worker.join(timeout=30)
    assert [worker.exitcode for worker in workers] == [0, 0]
