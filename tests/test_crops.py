"""Random crops of JPEG files that are decoded at a lower scale."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_transforms import encoded, turned
from torchvision.transforms import v2

from data import BrokenImageError, read_image, train_transform
from data.crops import ScaledCrop
from ride_bf.training.arguments import parse_arguments

LIMIT = 10**8


def photo(width, height, channels=3):
    """A picture with detail of all sizes, as photographs have it."""
    rng, picture = np.random.default_rng(0), np.zeros((height, width, channels))
    for cells in (4, 16, 64, 256):
        noise = rng.integers(0, 256, (cells, cells, channels), dtype=np.uint8).squeeze()
        resized = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        picture += np.asarray(resized).reshape(height, width, channels) / 4
    return Image.fromarray(picture.astype(np.uint8).squeeze())


def both(file, size, seed):
    """The crop of the full image, the scaled one, and the next random number after each."""
    torch.manual_seed(seed)
    full, after_full = v2.RandomResizedCrop(size)(read_image(file)), torch.rand(())
    torch.manual_seed(seed)
    return full, ScaledCrop(size)(file, LIMIT), after_full, torch.rand(())


PLAIN = encoded(photo(640, 480), quality=90)
# those that libjpeg scales
LARGE = {
    "plain": PLAIN,
    "grey": encoded(photo(640, 480, 1), quality=90),
    "progressive": encoded(photo(640, 480), quality=90, progressive=True),
    "odd size": encoded(photo(641, 477), quality=90),
    "several images": encoded(
        photo(640, 480), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))], quality=90
    ),
    **{f"orientation {turn}": encoded(photo(640, 480), quality=90, exif=turned(turn)) for turn in range(2, 9)},
}


@pytest.mark.parametrize("name", LARGE)
def test_a_scaled_crop_is_close_to_that_of_the_full_image(name):
    for seed in range(8):
        full, scaled, after_full, after_scaled = both(LARGE[name], 32, seed)
        assert after_full == after_scaled
        assert scaled.shape == full.shape
        # measured: 0.7 to 1.6 grey levels; 3.6 between two crops of the full image that are 2 of 480 pixels apart
        assert (full.int() - scaled.int()).abs().float().mean() < 2


@pytest.mark.parametrize(
    "file",
    [
        encoded(photo(60, 50), quality=90),
        encoded(photo(640, 480), "PNG"),
        encoded(photo(640, 480).convert("CMYK"), quality=90),
        encoded(photo(60, 50), quality=90, exif=turned(6)),
    ],
    ids=["small", "png", "cmyk", "small and turned"],
)
def test_at_full_scale_the_pixels_are_equal(file):
    for seed in range(4):
        full, scaled, *_ = both(file, 32, seed)
        assert torch.equal(full, scaled)


def test_a_photo_is_decoded_at_an_eighth(monkeypatch):
    asked = []
    draft = Image.Image.draft
    monkeypatch.setattr(
        "PIL.JpegImagePlugin.JpegImageFile.draft", lambda self, *given: asked.append(given[1]) or draft(self, *given)
    )
    torch.manual_seed(0)
    for _ in range(20):
        ScaledCrop(32)(PLAIN, LIMIT)
    assert (80, 60) in asked


@pytest.mark.parametrize("content", [PLAIN["bytes"][:5000], b"", b"no image"])
def test_broken_files(content):
    file = {"bytes": content, "path": "a.jpg"}
    torch.manual_seed(0)
    with pytest.raises(BrokenImageError) as scaled:
        ScaledCrop(8)(file, LIMIT)
    with pytest.raises(BrokenImageError) as full:
        read_image(file)
    assert str(scaled.value).split(":")[0] == str(full.value).split(":")[0]


def test_the_transform_and_the_option():
    rows = {"image": [PLAIN], "label": [3]}
    for policy in ("none", "randaugment"):
        torch.manual_seed(0)
        prepared = train_transform("imagenet", 32, policy, jpeg_scaling=True)(rows)
        assert prepared["pixel_values"][0].shape == (3, 32, 32)
        assert prepared["labels"] == [3]
    with pytest.raises(ValueError, match="'digits' takes no random crops"):
        train_transform("digits", 32, jpeg_scaling=True)
    assert parse_arguments(["--recipe", "imagenet_lt_resnet50", "--jpeg_scaling"])[1].jpeg_scaling
    with pytest.raises(SystemExit):
        parse_arguments(["--recipe", "cifar100_lt_resnet32", "--jpeg_scaling"])
