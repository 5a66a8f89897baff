"""Backbones of transformers: every family against its own classifier, taken apart, saved, and with everything else."""

import copy
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import COUNTS, NAMES, write_run
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from backbone_ride_bf import FAMILIES, RideBfSkipped, family_name
from configuration_ride_bf import OWN_POOLING, RideBfConfig
from data import evaluation_processor
from modeling_ride_bf import RideBfForImageClassification, RideBfModel
from ride_bf.evaluation.compute import inference_cost, multiply_adds, profile
from ride_bf.evaluation.decoupling import correct, corrected_logits
from ride_bf.hub.export import TIMM, export
from ride_bf.hub.onnx import export_onnx
from ride_bf.hub.run_files import read_saved_run
from ride_bf.methods.losses import RideLoss
from ride_bf.methods.objectives import ClassificationObjective, SharedClassifierObjective
from ride_bf.methods.teacher import load_teacher
from ride_bf.recipes import RECIPES
from ride_bf.training.cost import activation_bytes, run_cost, training_flop
from ride_bf.training.freezing import set_train_mode, train_only
from ride_bf.training.start_weights import initialise_from

TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
VIT = {**TRANSFORMER, "image_size": 32, "patch_size": 8}
CONVNEXT = {"depths": [1, 1, 2], "hidden_sizes": [8, 12, 16], "layer_scale_init_value": 0.5}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
SWIN["drop_path_rate"] = 0.0  # so that a network gives the same in each call while it trains
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
TIMM_VIT = {"img_size": 32, "patch_size": 8, "dynamic_img_size": False}

# Every family that the experts can own blocks of, as small as it goes: model type, options.
BACKBONES = {
    "vit": ("vit", VIT),
    "deit": ("deit", VIT),
    "dinov2": ("dinov2", VIT),
    "dinov2_with_registers": ("dinov2_with_registers", VIT),
    "dinov3_vit": ("dinov3_vit", {**VIT, "num_register_tokens": 2, "pos_embed_rescale": None}),  # as SWIN
    "dinov3_convnext": ("dinov3_convnext", CONVNEXT),
    "clip": ("clip_vision_model", VIT),
    "siglip": ("siglip_vision_model", VIT),
    "siglip2": ("siglip2_vision_model", {**TRANSFORMER, "patch_size": 8, "num_patches": 16}),
    "convnext": ("convnext", {**CONVNEXT, "num_stages": 3}),
    "convnextv2": ("convnextv2", {**CONVNEXT, "num_stages": 3}),
    "swin": ("swin", SWIN),
    "swinv2": ("swinv2", SWIN),
    "resnet": ("resnet", RESNET),
    "timm_vit": ("timm_wrapper", {"architecture": "test_vit", "model_args": TIMM_VIT}),
    "timm_resnet": ("timm_wrapper", {"architecture": "test_resnet"}),
    "timm_convnext": ("timm_wrapper", {"architecture": "test_convnext"}),
    "timm_efficientnet": ("timm_wrapper", {"architecture": "test_efficientnet"}),
}
AS_A_WHOLE = ("vit", "clip", "resnet", "timm_efficientnet")  # one of each kind, for tests without own blocks
OF_TRANSFORMERS = [name for name in BACKBONES if not name.startswith("timm")]


def backbone_config(name):
    model_type, options = BACKBONES[name]
    if model_type == "timm_wrapper":
        pytest.importorskip("timm")
        options = {**options, "num_labels": 2}
    return AutoConfig.for_model(model_type, **options)


def tiny_config(name, **options):
    settings = {"num_labels": 5, "num_experts": 2, "classifier": "linear", "batchformer_dropout": 0.0}
    return RideBfConfig(backbone_config=backbone_config(name), **{**settings, **options})


def tiny_model(name, **options):
    torch.manual_seed(0)
    return RideBfForImageClassification(tiny_config(name, **options))


def moved(model):
    """The model with weights that differ from their start, so that no part is zero, one, or equal to another."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_the_table_is_tested():
    assert {family_name(AutoModel.from_config(backbone_config(name))) for name in BACKBONES} == set(FAMILIES)


# --- What the network computes ----------------------------------------------------------------------------------------

TOWERS = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}  # of models whose configuration has two
NO_CLASSIFIER = ("dinov3_vit", "dinov3_convnext")  # in transformers


def own_classifier(name):
    """The family's own classifier of 5 classes, and its backbone and output layer."""
    config = backbone_config(name)
    config.num_labels = 5
    if name == "deit":
        config.architectures = ["DeiTForImageClassification"]  # it has two
    if name in TOWERS:
        config = getattr(transformers, f"{TOWERS[name]}Config")(vision_config=config.to_dict(), num_labels=5)
    torch.manual_seed(0)
    own = moved(AutoModelForImageClassification.from_config(config)).eval()
    if hasattr(own, "timm_model"):
        backbone = AutoModel.from_config(backbone_config(name))
        weights = own.state_dict()
        backbone.load_state_dict({key: weights[key] for key in backbone.state_dict()})
        return own, backbone, own.timm_model.get_classifier()
    classifier = own.classifier[1] if name == "resnet" else own.classifier
    return own, own.vision_model if name in TOWERS else own.base_model, classifier


def by_hand(name):
    """The same for families without one, as their authors' linear classifiers are."""
    torch.manual_seed(0)
    backbone = AutoModel.from_config(backbone_config(name)).eval()
    classifier = torch.nn.Linear(32 if name == "dinov3_vit" else 16, 5)

    def own(images):
        outputs = backbone(images)
        features = outputs.pooler_output
        if name == "dinov3_vit":  # 2 registers
            features = torch.cat([outputs.last_hidden_state[:, 0], outputs.last_hidden_state[:, 3:].mean(dim=1)], dim=1)
        return transformers.modeling_outputs.ImageClassifierOutput(logits=classifier(features))

    return own, backbone, classifier


def siglip2_inputs(images):
    """As its image processor makes them."""
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    patches = torch.stack([convert_image_to_patches(image, 8) for image in images])
    shapes = torch.tensor([[images.shape[2] // 8, images.shape[3] // 8]] * len(images))
    return {"pixel_values": patches, "spatial_shapes": shapes, "pixel_attention_mask": torch.ones(patches.shape[:2])}


@pytest.mark.parametrize("name", BACKBONES)
def test_one_expert_without_adapter_is_the_familys_own_classifier(name, images):
    own, backbone, classifier = by_hand(name) if name in NO_CLASSIFIER else own_classifier(name)
    model = RideBfForImageClassification.from_backbone(backbone, tiny_config(name, num_experts=1)).eval()
    model.classifiers[0].load_state_dict(classifier.state_dict())
    with torch.no_grad():
        expected = (own(**siglip2_inputs(images)) if name == "siglip2" else own(images)).logits
        outputs = model(images)
    assert outputs.expert_features.shape == (4, 1, model.config.feature_size)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(outputs.logits, expected, atol=1e-6, rtol=0)


def depth(name):
    backbone = AutoModel.from_config(backbone_config(name))
    return len(FAMILIES[family_name(backbone)].blocks_of(backbone))


@pytest.mark.parametrize("pooling", ["auto", "pooler"])
@pytest.mark.parametrize("name", BACKBONES)
def test_experts_with_own_blocks_start_from_the_backbones_own_features(name, pooling, images):
    torch.manual_seed(0)
    backbone = moved(AutoModel.from_config(backbone_config(name))).eval()
    features = []
    for layers in (0, 1, depth(name)):
        config = tiny_config(name, num_expert_layers=layers, backbone_pooling=pooling, expert_adapter_size=3)
        model = RideBfModel.from_backbone(backbone, config).eval()
        with torch.no_grad():
            features.append(model(images).expert_features)
    for other in features[1:]:
        torch.testing.assert_close(other, features[0])
    torch.testing.assert_close(features[0][:, 0], features[0][:, 1])


@pytest.mark.parametrize("name", BACKBONES)
def test_the_trunk_runs_once_and_owns_what_the_experts_do_not(name, images):
    model = tiny_model(name, num_expert_layers=1, num_experts=3).eval()
    family = FAMILIES[family_name(model.ride_bf.trunk.backbone)]
    shared, own = family.blocks_of(model.ride_bf.trunk.backbone), family.blocks_of(model.ride_bf.experts[0].tail)
    assert (len(shared), len(own)) == (depth(name) - 1, 1)
    calls = []
    for block in (shared[-1], *(family.blocks_of(expert.tail)[0] for expert in model.ride_bf.experts)):
        block.register_forward_hook(lambda block, inputs, output: calls.append(block))
    with torch.no_grad():
        model(images)
    assert len(calls) == len(set(calls)) == 4
    ids = [id(parameter) for expert in model.ride_bf.experts for parameter in expert.parameters()]
    assert len(ids) == len(set(ids)), "experts share a parameter"


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_learns(name, layers, images):
    options = {"batchformer": "insert", "classifier": "cosine", "expert_adapter_size": 3}
    model = moved(tiny_model(name, num_expert_layers=layers, **options)).train()
    loss = ClassificationObjective(RideLoss(COUNTS))(
        model(images), {"labels": torch.tensor([0, 1, 2, 3])}, reweight=True
    )
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{parameter_name} has no gradient"
        assert parameter.grad.isfinite().all(), f"{parameter_name} has a gradient that is not finite"
        assert parameter.grad.abs().sum() > 0, f"the gradient of {parameter_name} is zero"


# --- Options ----------------------------------------------------------------------------------------------------------


def test_poolings(images):
    torch.manual_seed(0)
    backbone = moved(AutoModel.from_config(backbone_config("vit"))).eval()
    with torch.no_grad():
        outputs = backbone(images)
        states = outputs.last_hidden_state
        expected = {
            "auto": states[:, 0],
            "cls": states[:, 0],
            "mean": states[:, 1:].mean(dim=1),
            "cls_mean": torch.cat([states[:, 0], states[:, 1:].mean(dim=1)], dim=1),
            "pooler": outputs.pooler_output,
        }
        for pooling, features in expected.items():
            for layers in (0, 2):
                config = tiny_config("vit", backbone_pooling=pooling, num_expert_layers=layers)
                model = RideBfModel.from_backbone(backbone, config).eval()
                assert config.feature_size == features.shape[1]
                torch.testing.assert_close(model(images).expert_features[:, 1], features)


def test_what_no_feature_needs_is_left_out():
    assert isinstance(tiny_model("vit").ride_bf.trunk.backbone.pooler, RideBfSkipped)
    assert tiny_model("vit", backbone_pooling="pooler").ride_bf.trunk.backbone.pooler.dense.weight.requires_grad
    trunk = tiny_model("vit", backbone_pooling="pooler", num_expert_layers=1).ride_bf.trunk.backbone
    assert trunk.pooler is trunk.layernorm is None
    assert "mask_token" not in dict(tiny_model("dinov3_vit").ride_bf.trunk.backbone.embeddings.named_parameters())


@pytest.mark.parametrize("name", ["resnet", "siglip", "timm_convnext"])
def test_a_class_token_that_there_is_not(name):
    with pytest.raises(ValueError, match=r"backbone_pooling 'cls_mean' needs a class token.*use 'auto', 'mean'"):
        tiny_model(name, backbone_pooling="cls_mean")


@pytest.mark.parametrize(
    ("model_type", "options", "feature_size"),
    [
        ("vit_msn", {**VIT}, 16),  # tokens and no pooler
        ("regnet", {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "groups_width": 4}, 12),
        ("mobilenet_v2", {"depth_multiplier": 0.1, "image_size": 32}, 1280),
    ],
)
def test_any_other_backbone_is_shared_as_a_whole(model_type, options, feature_size, images):
    nested = AutoConfig.for_model(model_type, **options)
    config = RideBfConfig(backbone_config=nested, num_labels=5, batchformer="insert")
    model = RideBfForImageClassification(config).eval()
    assert config.feature_size == model(images).expert_features.shape[2] == feature_size
    config = RideBfConfig(backbone_config=nested, num_labels=5, num_expert_layers=2)
    with pytest.raises(ValueError, match=rf"num_expert_layers 2 .*{model_type} .*=0, or one of vit"):
        RideBfForImageClassification(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [1, 1, 1, 1]}, r"depths \[1, 1, 1, 1\] describes the residual network.*leave it at \(3, 4, 6, 3\)"),
        ({"num_shared_stages": 1}, "num_shared_stages 1 describes the residual network"),
        ({"num_expert_layers": -1}, "num_expert_layers must be 0 or more, not -1"),
        ({"expert_adapter_size": -1}, "expert_adapter_size must be 0 or more, not -1"),
        ({"backbone_pooling": "max"}, "'auto', 'cls', 'mean'"),
        ({"batchformer": "insert", "batchformer_num_heads": 3}, "must divide the feature size 16"),
        ({"router": True, "router_top_k": 2}, "router=True needs num_expert_layers of 1 or more, not 0"),
        ({"backbone_config": {"hidden_size": 16}}, "model_type None, which this version of transformers does not know"),
        ({"backbone_config": {"model_type": "no_such"}}, "'no_such', which this version"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        RideBfConfig(**{"backbone_config": backbone_config("vit"), "num_labels": 5, **options})


@pytest.mark.parametrize("option", [{"backbone_pooling": "cls"}, {"num_expert_layers": 1}, {"expert_adapter_size": 8}])
def test_options_of_a_backbone_need_one(option):
    with pytest.raises(StrictDataclassError, match="is read only with a backbone_config; leave it at"):
        RideBfConfig(**option)


def test_more_blocks_than_there_are():
    with pytest.raises(ValueError, match="num_expert_layers must be 0 to 3, the blocks of this vit, not 4"):
        tiny_model("vit", num_expert_layers=4)


def test_a_backbone_that_reads_no_images():
    with pytest.raises(ValueError, match="the backbone bert reads input_ids, not images; choose a vision model"):
        RideBfModel(RideBfConfig(backbone_config=transformers.BertConfig(**TRANSFORMER), num_labels=5))


def test_a_pooler_that_there_is_not(images):
    nested = transformers.SiglipVisionConfig(**VIT, vision_use_head=False)
    for layers in (0, 1):
        config = RideBfConfig(backbone_config=nested, backbone_pooling="pooler", num_expert_layers=layers)
        with pytest.raises(ValueError, match="'pooler' needs a pooler_output, this backbone has none; use 'mean'"):
            RideBfModel(config)(images)


def test_a_device_map_does_not_split_what_the_backbone_keeps_together():
    for part in (tiny_model("vit"), tiny_model("vit", num_expert_layers=1)):
        assert {"ViTEmbeddings", "ViTLayer"} <= part._no_split_modules


def test_of_two_towers_the_error_names_the_one_to_take():
    two = transformers.CLIPConfig(vision_config=VIT)
    with pytest.raises(ValueError, match=r"pass its vision tower: backbone_config=config.vision_config"):
        RideBfConfig(backbone_config=two)


def test_the_weights_of_another_backbone_are_refused():
    config = tiny_config("vit", num_expert_layers=1)
    with pytest.raises(ValueError, match="the backbone is a ResNetModel, but backbone_config describes a ViTModel"):
        RideBfModel.from_backbone(AutoModel.from_config(backbone_config("resnet")), tiny_config("vit"))
    wider = AutoModel.from_config(transformers.ViTConfig(**{**VIT, "hidden_size": 24}))
    with pytest.raises(ValueError, match=r"another vit than backbone_config describes: \d+ weights differ, such as"):
        RideBfModel.from_backbone(wider, config)
    with pytest.raises(ValueError, match="the configuration describes a residual network; set"):
        RideBfModel.from_backbone(wider, RideBfConfig())


def test_the_given_configuration_and_backbone_stay_as_they_are():
    backbone = AutoModel.from_config(backbone_config("dinov3_vit"))
    before, weights = backbone.config.to_dict(), copy.deepcopy(backbone.state_dict())
    config = RideBfConfig(backbone_config=backbone.config, num_labels=5, num_expert_layers=1)
    moved(RideBfForImageClassification.from_backbone(backbone, config))
    assert backbone.config.to_dict() == before
    assert all(torch.equal(backbone.state_dict()[name], weights[name]) for name in weights)


# --- Images of another size -------------------------------------------------------------------------------------------


def test_siglip2_at_another_size_is_its_own_model():
    images = torch.randn(2, 3, 48, 24, generator=torch.Generator().manual_seed(1))
    backbone = moved(AutoModel.from_config(backbone_config("siglip2"))).eval()
    model = RideBfModel.from_backbone(backbone, tiny_config("siglip2", num_expert_layers=1)).eval()
    with torch.no_grad():
        expected = backbone(**siglip2_inputs(images)).last_hidden_state.mean(dim=1)
        torch.testing.assert_close(model(images).expert_features[:, 0], expected)


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "timm_vit"])
def test_another_size_and_shape(name, layers):
    model = tiny_model(name, num_expert_layers=layers).eval()
    for height, width in ((48, 48), (64, 40)):
        with torch.no_grad():
            features = model(torch.randn(2, 3, height, width)).expert_features
        assert features.isfinite().all()


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("timm_vit", (48, 48), r"48 x 48 pixels, but test_vit takes 32 x 32.*\{'img_size': \[48, 48\]\}"),
        ("siglip2", (36, 32), "36 x 32 pixels do not consist of patches of 8 x 8"),
        ("vit", (7, 32), "7 x 32 pixels are smaller than a patch of the backbone, 8 x 8"),
        ("dinov2", (32, 4), "32 x 4 pixels are smaller than a patch"),
    ],
)
@pytest.mark.parametrize("layers", [0, 1])
def test_a_size_that_cannot_be(name, size, message, layers):
    with pytest.raises(ValueError, match=message):
        tiny_model(name, num_expert_layers=layers)(torch.zeros(2, 3, *size))


def test_channels_are_those_of_the_backbone():
    nested = transformers.ViTConfig(**VIT, num_channels=1)
    model = RideBfForImageClassification(RideBfConfig(backbone_config=nested, num_labels=5)).eval()
    assert model(torch.zeros(2, 1, 32, 32)).logits.shape == (2, 5)
    with pytest.raises(ValueError, match=r"\(batch, 1, height, width\)"):
        model(torch.zeros(2, 3, 32, 32))


# --- Saved and loaded -------------------------------------------------------------------------------------------------

STRANGER = """
import sys, torch
from pathlib import Path
from transformers import AutoModel, AutoModelForImageClassification

folder, result = map(Path, sys.argv[1:])
pixel_values = torch.load(folder / "images.pt")
seen = {}
places = [path for path in folder.iterdir() if path.is_dir()]
for place in sorted(places, key=lambda path: path.name.startswith("timm")):
    model = AutoModelForImageClassification.from_pretrained(place, trust_remote_code=True)
    base = AutoModel.from_pretrained(place, trust_remote_code=True)
    for part in (model, base):
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = tensor.data.clone()  # a file's tensors are aligned in another way, which changes the last bit
    with torch.no_grad():
        seen[place.name] = model(pixel_values).logits, base(pixel_values).expert_features, model.state_dict()
    assert place.name.startswith("timm") or not {"timm", "peft"} & set(sys.modules), place.name
assert not {"ride_bf", "modeling_ride_bf", "backbone_ride_bf"} & set(sys.modules)
torch.save(seen, result)
"""


def test_a_stranger_loads_every_family_to_the_last_bit(images, tmp_path):
    """Another process, another folder, offline, without peft, and without timm unless the backbone is timm's."""
    expected = {}
    for name in BACKBONES:
        for layers in (0, 1) if name in AS_A_WHOLE else (1,):
            options = {"expert_adapter_size": 3, "batchformer": "shared_classifier"}
            model = moved(tiny_model(name, num_expert_layers=layers, **options))
            with torch.no_grad():
                model.train()(images)  # running statistics other than the first ones
                outputs = model.eval()(images)
            model.save_pretrained(tmp_path / "written" / f"{name} {layers}")
            expected[f"{name} {layers}"] = outputs.logits, outputs.expert_features, model.state_dict()
    torch.save(images, tmp_path / "written" / "images.pt")
    (tmp_path / "written").rename(tmp_path / "moved")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "moved"), str(tmp_path / "seen.pt")]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    seen = torch.load(tmp_path / "seen.pt")
    assert seen.keys() == expected.keys()
    for name, (logits, features, weights) in expected.items():
        assert weights.keys() == seen[name][2].keys(), name
        assert all(torch.equal(weights[key], seen[name][2][key]) for key in weights), name
        assert torch.equal(seen[name][0], logits), name
        assert torch.equal(seen[name][1], features), name


def test_the_configuration_holds_the_backbones(tmp_path):
    model = tiny_model("dinov2", num_expert_layers=1)
    model.config.backbone_config._name_or_path = "/home/somebody/dinov2"
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["backbone_config"]["model_type"] == "dinov2"
    assert written["backbone_config"]["hidden_size"] == 16
    assert (written["num_expert_layers"], written["backbone_pooling"]) == (1, "auto")
    assert "depths" not in written
    assert "somebody" not in (tmp_path / "config.json").read_text()
    loaded = RideBfConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == model.config.to_dict()
    assert type(loaded.backbone_config) is transformers.Dinov2Config


def test_the_configuration_of_a_residual_network_has_nothing_new():
    assert not {"backbone_config", "backbone_pooling", "num_expert_layers"} & set(RideBfConfig().to_dict())


@pytest.mark.parametrize("name", ["dinov3_vit", "resnet", "swinv2", "convnextv2"])
def test_missing_parts_are_initialised_as_the_family_does_it(name, images, tmp_path):
    model = moved(tiny_model(name, num_expert_layers=1))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if not key.startswith("ride_bf.experts.1.")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = RideBfForImageClassification.from_pretrained(tmp_path).eval()
    outputs = loaded(images)
    assert outputs.logits.isfinite().all()
    assert outputs.logits.abs().max() < 1e3
    for key, tensor in loaded.ride_bf.experts[1].state_dict().items():
        if "norm" in key and key.endswith("weight"):
            assert torch.equal(tensor, torch.ones_like(tensor)), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit", "clip", "resnet", "timm_resnet", "timm_efficientnet"])
def test_half_precision_keeps_batch_normalisation_in_float32(name, dtype, images, tmp_path):
    model = tiny_model(name, num_expert_layers=1).eval()
    model.save_pretrained(tmp_path)
    loaded = RideBfForImageClassification.from_pretrained(tmp_path, dtype=dtype).eval()
    for key, module in loaded.named_modules():
        norm = isinstance(module, torch.nn.BatchNorm2d)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                assert tensor.dtype == (torch.float32 if norm else dtype), key
    with torch.no_grad():
        logits, expected = loaded(images).logits, model(images).logits
    assert logits.dtype == dtype
    tolerance = 0.02 if dtype == torch.float16 else 0.1
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_a_network_can_be_pickled_and_copied(images):
    model = moved(tiny_model("dinov3_vit", num_expert_layers=1)).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images).logits, model(images).logits)


# --- With everything else ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [0, 1])
def test_attention_implementations(layers, images, tmp_path):
    model = moved(tiny_model("vit", num_expert_layers=layers)).eval()
    model.save_pretrained(tmp_path)
    eager = RideBfForImageClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for part, expected in ((model, "sdpa"), (eager, "eager")):
        nested = [module for module in part.modules() if isinstance(module, transformers.ViTModel)]
        assert len(nested) == 1 + (2 if layers else 0)
        assert {module.config._attn_implementation for module in nested} == {expected}
    with torch.no_grad():
        torch.testing.assert_close(eager(images).logits, model(images).logits)
        model.set_attn_implementation("eager")
        assert torch.equal(eager(images).logits, model(images).logits)


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("name", ["vit", "dinov3_vit", "swin", "timm_vit", "timm_resnet", "timm_efficientnet"])
def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(name, layers, images):
    plain = moved(tiny_model(name, num_expert_layers=layers)).train()
    checkpointed = copy.deepcopy(plain)
    newer = "activation_checkpointing_enable"  # its name since transformers 5.23
    getattr(checkpointed, newer if hasattr(checkpointed, newer) else "gradient_checkpointing_enable")()
    kept = {}
    for model in (plain, checkpointed):

        def count(tensor, model=model):
            kept[model] = kept.get(model, 0) + tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(images).logits.square().sum()
        loss.backward()
    assert kept[checkpointed] < 0.8 * kept[plain], "nothing was checkpointed"
    for (key, expected), actual in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, msg=key)
    for (key, expected), actual in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(actual, expected), key
    with torch.no_grad():
        assert torch.equal(checkpointed.eval()(images).logits, plain.eval()(images).logits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "the backbone resnet has no gradient checkpointing; use smaller batches"),
        ("timm_mobilenet", "count each batch twice in the batch normalisation of timm_wrapper MobileNetV3"),
    ],
)
def test_gradient_checkpointing_that_there_is_not(name, message, monkeypatch):
    monkeypatch.setitem(BACKBONES, "timm_mobilenet", ("timm_wrapper", {"architecture": "mobilenetv3_small_050"}))
    model = tiny_model(name)
    newer = "activation_checkpointing_enable"
    with pytest.raises(ValueError, match=message):
        getattr(model, newer if hasattr(model, newer) else "gradient_checkpointing_enable")()


@pytest.mark.parametrize("name", ["dinov3_vit", "siglip2", "timm_vit"])
def test_it_compiles_without_a_break(name, images):
    model = moved(tiny_model(name, num_expert_layers=1, expert_adapter_size=3)).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, model(images).logits)


@pytest.mark.parametrize("gate", [None, 0.5], ids=["post-norm", "gated"])
@pytest.mark.parametrize("mode", ["insert", "shared_classifier"])
@pytest.mark.parametrize("layers", [0, 1])
def test_batchformer(layers, mode, gate, images):
    options = {"expert_adapter_size": 3, "classifier": "cosine", "batchformer_layer_scale_init_value": gate}
    model = moved(tiny_model("vit", num_expert_layers=layers, batchformer=mode, **options)).train()
    criterion = RideLoss(COUNTS)
    objective = (SharedClassifierObjective if mode == "shared_classifier" else ClassificationObjective)(criterion)
    objective(model(images), {"labels": torch.tensor([0, 1, 2, 3])}, reweight=True).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        together = model.eval()(images).logits
        alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "dinov3_vit", "swin", "siglip2", "timm_resnet"])
def test_a_router_runs_experts_only_where_they_are_needed(name, images):
    model = moved(tiny_model(name, num_expert_layers=1, num_experts=3, router=True, router_top_k=3)).eval()
    images = torch.cat([images, -images, 3 * images])
    with torch.no_grad():
        everything = model._forward_all(images, output_hidden_states=None)
        for output_layer in model.router.output_layers:
            output_layer.bias -= everything.router_logits.median()
        everything = model._forward_all(images, output_hidden_states=True)
        routed = model(images, output_hidden_states=True)
    used = 1 + (everything.router_logits > 0).long().cumprod(dim=1).sum(dim=1)
    assert torch.equal(routed.num_experts_used, used)
    assert used.unique().numel() > 1
    for image, number in enumerate(used.tolist()):
        expected = everything.expert_logits[image, :number]
        torch.testing.assert_close(routed.expert_logits[image, :number], expected, rtol=1e-4, atol=1e-5)
        assert routed.expert_logits[image, number:].isnan().all()
    assert [state.shape for state in routed.hidden_states] == [state.shape for state in everything.hidden_states]
    with torch.no_grad():
        for output_layer in model.router.output_layers:
            output_layer.bias -= 1000
        alone = model(images, output_hidden_states=True)
    assert alone.num_experts_used.tolist() == [1] * len(images), "no image goes on"
    torch.testing.assert_close(alone.logits, everything.expert_logits[:, 0], rtol=1e-4, atol=1e-5)
    assert alone.expert_logits[:, 1:].isnan().all()


def test_hidden_states(images):
    states = tiny_model("vit")(images, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(4, 17, 16), (4, 16)]
    states = tiny_model("vit", num_expert_layers=2)(images, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(4, 17, 16), (4, 2, 17, 16), (4, 2, 17, 16)]


@pytest.mark.parametrize("name", BACKBONES)
def test_profile_counts_every_part_once(name):
    config = tiny_config(name, num_expert_layers=1, expert_adapter_size=3, batchformer="insert")
    with torch.device("meta"):  # on a CPU torch does not count attention
        model, image = RideBfForImageClassification(config).eval(), torch.zeros(1, 3, 32, 32)
    parts = profile(config, 32, window=4)
    assert set(parts) == {"trunk", "expert 1", "expert 2", "classifier 1", "classifier 2", "BatchFormer"}
    assert sum(part["parameters"] for part in parts.values()) == sum(tensor.numel() for tensor in model.parameters())
    assert inference_cost(parts) == multiply_adds(lambda: model(image))


def test_dry_run_cost():
    model = tiny_model("timm_resnet", num_expert_layers=1)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert activation_bytes(model, 32) > 0
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    recipe = RECIPES["digits_lt_resnet32"].with_overrides(image_size=32, resize_size=32)
    assert "multiply-adds an image" in run_cost(model, recipe, batches_per_epoch=2, draws_per_epoch=64)


def test_what_does_not_learn_costs_less():
    """2 for each multiply-add of the forward pass, and 4 more where something learns."""
    model = tiny_model("vit", expert_adapter_size=3)
    recipe = RECIPES["digits_lt_resnet32"].with_overrides(image_size=32, resize_size=32)
    parts = {name: part["multiply_adds"] for name, part in profile(model.config, 32, recipe.window_size).items()}
    heads = sum(count for name, count in parts.items() if name != "trunk")
    assert training_flop(model, recipe, 10) == 60 * (parts["trunk"] + heads)
    train_only(model, "heads")
    assert training_flop(model, recipe, 10) == 20 * parts["trunk"] + 60 * heads
    assert training_flop(model, recipe, 10, seen_once=3) == 6 * parts["trunk"] + 60 * heads
    train_only(model, "classifiers")
    classifiers = sum(count for name, count in parts.items() if name.startswith("classifier"))
    assert training_flop(model, recipe, 10) == 20 * (parts["trunk"] + heads - classifiers) + 60 * classifiers


def test_two_streams_through_the_classifiers_cost_twice():
    recipe = RECIPES["digits_lt_resnet32"].with_overrides(image_size=32, resize_size=32)
    inserted, shared = (tiny_model("vit", batchformer=mode) for mode in ("insert", "shared_classifier"))
    parts = profile(shared.config, 32, recipe.window_size)
    classifiers = sum(part["multiply_adds"] for name, part in parts.items() if name.startswith("classifier"))
    assert training_flop(shared, recipe, 10) - training_flop(inserted, recipe, 10) == pytest.approx(60 * classifiers)


@pytest.mark.parametrize("name", ["swin", "siglip2"])
def test_onnx(name, images, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model = moved(tiny_model(name, num_expert_layers=1, expert_adapter_size=3)).eval()
    assert export_onnx(model, images, tmp_path / "model.onnx") < 1e-4
    assert model.config.backbone_config._attn_implementation == "sdpa", "the exported one is a copy"


def test_a_run_starts_from_another_with_the_same_backbone_only(tmp_path):
    start = moved(tiny_model("vit", num_expert_layers=1))
    start.save_pretrained(tmp_path)
    model = tiny_model("vit", num_expert_layers=1)
    initialise_from(model, tmp_path)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in start.state_dict().items())
    with pytest.raises(ValueError, match="num_expert_layers 1 there, 0 here"):
        initialise_from(tiny_model("vit"), tmp_path)
    with pytest.raises(ValueError, match="backbone_config vit there, dinov2 here"):
        initialise_from(tiny_model("dinov2", num_expert_layers=1), tmp_path)


@pytest.mark.parametrize("name", ["dinov2", "timm_efficientnet"])
def test_a_published_model_and_its_handler(name, tmp_path):
    """The folder holds what an endpoint needs, and the endpoint answers as the network does."""
    run = write_run(tmp_path / "run")
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {label: place for place, label in enumerate(NAMES)}}
    model = moved(tiny_model(name, num_expert_layers=1, batchformer="insert", **labels)).eval()
    model.save_pretrained(run / "best")
    evaluation_processor(32, 32, (0.5,) * 3, (0.25,) * 3).save_pretrained(run / "best")
    folder = tmp_path / "published"
    export(read_saved_run(run), folder, "user/name")
    needed = (folder / "requirements.txt").read_text()
    assert (TIMM in needed) == (name == "timm_efficientnet")
    assert f"{TIMM} " in (ROOT / "requirements-extras.txt").read_text()
    assert all((folder / f"{file}.py").is_file() for file in ("backbone_ride_bf", "modeling_ride_bf", "handler"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    spec = importlib.util.spec_from_file_location("handler_of_a_backbone", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answers = module.EndpointHandler(str(folder))({"inputs": image})
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        probabilities = model(pixels).logits[0].softmax(dim=0)
    expected = {NAMES[label]: probability.item() for label, probability in enumerate(probabilities)}
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(expected, abs=1e-5)


def test_a_teacher_with_a_backbone(tmp_path, images):
    model = moved(tiny_model("vit", num_expert_layers=1)).eval()
    model.save_pretrained(tmp_path)
    processor = evaluation_processor(32, 32, (0.5,) * 3, (0.25,) * 3)
    processor.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, [f"class {label}" for label in range(5)], processor)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images).logits, model(images).logits)


@pytest.mark.parametrize("method", ["tau_normalisation", "logit_adjustment"])
def test_decoupling(method, images):
    model = moved(tiny_model("vit", num_expert_layers=1)).eval()
    with torch.no_grad():
        features = model(images).expert_features
        expected = corrected_logits(features, model.classifiers, method, 0.7, COUNTS)
        correct(model, method, 0.7, COUNTS)
        torch.testing.assert_close(model(images).expert_logits, expected)


@pytest.mark.parametrize("name", ["vit", "timm_resnet"])
def test_only_the_classifiers_train(name, images):
    """The rest keeps its weights, and its norm statistics."""
    model = moved(tiny_model(name, num_expert_layers=1))
    train_only(model, "classifiers")
    before = copy.deepcopy(model.state_dict())
    set_train_mode(model)
    optimizer = torch.optim.SGD([tensor for tensor in model.parameters() if tensor.requires_grad], lr=0.1)
    model(images, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"classifiers.{expert}.{kind}" for expert in (0, 1) for kind in ("weight", "bias")}


def test_the_page_about_backbones(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "backbones.md").read_text()
    monkeypatch.chdir(tmp_path)
    backbone = AutoModel.from_config(backbone_config("dinov2"))
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda place: backbone)
    code = page.partition("## Build a network in Python")[2].partition("```python\n")[2].partition("```")[0]
    exec(code, names := {})
    loaded = RideBfForImageClassification.from_pretrained(tmp_path / "outputs" / "dinov2")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in names["model"].state_dict().items())
    documented = page.partition("## Families")[2].partition("## What")[0]
    assert set(re.findall(r"`(\w+)`", documented)) >= {name.split()[0] for name in FAMILIES}
    for row in documented.splitlines():
        types = [
            word for word in re.findall(r"`(\w+)`", row.partition("|")[2].partition("|")[0]) if word in OWN_POOLING
        ]
        assert all(f"| `{OWN_POOLING[model_type]}` |" in row for model_type in types)
