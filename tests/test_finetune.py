"""When a backbone learns: rates that fall towards the images, frozen batch normalisation, and stochastic depth."""

import json

import pytest
import torch
from conftest import tiny_model as residual_model
from test_backbones import AS_A_WHOLE, BACKBONES, VIT, backbone_config, depth, moved, tiny_model
from test_optimizer import rates
from test_pretrained import RESNET, probe_options, vit_processor, write_backbone, write_images
from test_training import train
from transformers import AutoConfig, AutoModel, ConvNextImageProcessor

from backbone_ride_bf import FAMILIES, family_name
from configuration_ride_bf import RideBfConfig
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.recipes import RECIPES
from ride_bf.runs.models import load_model
from ride_bf.training.arguments import parse_arguments
from ride_bf.training.backbone import Backbone, with_drop_path
from ride_bf.training.freezing import set_train_mode, train_only
from ride_bf.training.lora import add_lora
from ride_bf.training.optimizer import make_optimizer

RECIPE = RECIPES["finetune"].with_overrides(layer_learning_rate_decay=0.5, weight_decay=0.0, learning_rate=1.0)
# Families whose networks have no stochastic depth in transformers
NO_DROP_PATH = ("vit", "deit", "clip", "siglip", "siglip2", "resnet")


# --- The learning rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layers"), [*((name, 1) for name in BACKBONES), *((name, 0) for name in AS_A_WHOLE)])
def test_each_block_has_half_the_rate_of_the_next(name, layers):
    model = tiny_model(name, num_expert_layers=layers, expert_adapter_size=3, batchformer="insert")
    found = {key: rate for key, (rate, _) in rates(model, RECIPE).items()}
    assert found.keys() == dict(model.named_parameters()).keys()
    family = FAMILIES[family_name(model.ride_bf.trunk.backbone)]
    parts = [(model.ride_bf.trunk.backbone, layers)]
    parts += [(expert.tail, 0) for expert in model.ride_bf.experts if expert.tail is not None]
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    expected = dict.fromkeys(found, 1.0)
    for part, above in parts:
        for key, parameter in part.named_parameters():
            expected[names[id(parameter)]] = 1.0 if key.startswith(family.last) else 0.5 ** (depth(name) + 1)
        for index, block in enumerate(family.blocks_of(part)[::-1]):
            for parameter in block.parameters():
                expected[names[id(parameter)]] = 0.5 ** (above + index + 1)
    assert found == pytest.approx(expected)
    heads = [key for key in found if key.startswith(("classifiers.", "batchformer.")) or ".adapter." in key]
    assert {found[key] for key in heads} == {1.0}
    if family.first:
        assert min(found.values()) == 0.5 ** (depth(name) + 1)


def test_with_other_factors_and_with_lora():
    model = tiny_model("vit")
    found = rates(model, RECIPE.with_overrides(head_learning_rate_factor=10.0))
    assert found["classifiers.0.weight"][0] == 10
    assert found["ride_bf.trunk.backbone.layers.2.mlp.fc1.weight"][0] == 0.5
    pytest.importorskip("peft")
    add_lora(model, RECIPES["lora"])
    train_only(model, "lora")
    found = {key: rate for key, (rate, _) in rates(model, RECIPE).items()}
    assert {rate for key, rate in found.items() if ".layers.0." in key} == {0.5**3}
    assert {rate for key, rate in found.items() if ".layers.2." in key} == {0.5}


def test_no_decay_is_one_rate():
    model = tiny_model("vit")
    assert {rate for rate, _ in rates(model, RECIPE.with_overrides(layer_learning_rate_decay=1.0)).values()} == {1.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--layer_learning_rate_decay 0.7",
            "it needs --backbone or --init_from, and this run has no --backbone and no",
        ),
        (
            "--recipe probe --layer_learning_rate_decay 0.7",
            "--train_only all or lora, and this run has --train_only hea",
        ),
        ("--recipe finetune --layer_learning_rate_decay 0", "must be above 0 and at most 1, not 0.0"),
        ("--recipe finetune --layer_learning_rate_decay 1.1", "must be above 0 and at most 1, not 1.1"),
        ("--drop_path 0.1", "--drop_path 0.1 cannot act: it needs --backbone or --init_from"),
        ("--recipe probe --drop_path 0.1", "--drop_path 0.1 cannot act: it needs --train_only all or lora"),
        ("--recipe lora --freeze_batch_norm", "--freeze_batch_norm cannot act: it needs --train_only all"),
        ("--freeze_batch_norm", "--freeze_batch_norm cannot act: it needs --backbone or --init_from"),
        ("--recipe finetune --drop_path 1", "drop_path must be 0 or more and less than 1, not 1.0"),
        ("--recipe finetune --lora_rank 4", "--lora_rank 4 cannot act: it needs --train_only lora"),
        (
            "--recipe probe --lora_target_modules a b",
            "--lora_target_modules a b cannot act: it needs --train_only lora",
        ),
        ("--recipe lora --lora_rank 0", "lora_rank must be 1 or more, not 0"),
    ],
)
def test_options_that_cannot_act(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(arguments.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        "--recipe probe --layer_learning_rate_decay 1",
        "--recipe finetune --layer_learning_rate_decay 0.7 --drop_path 0.1",
        "--recipe lora --layer_learning_rate_decay 0.7 --drop_path 0 --lora_rank 4 --lora_alpha 8",
        "--recipe lora --lora_target_modules q_proj v_proj",
        "--recipe digits_lt_resnet32 --dataset custom --data_dir x --init_from model --layer_learning_rate_decay 0.7",
    ],
)
def test_options_that_act(arguments):
    parse_arguments(arguments.split())


def test_networks_without_known_blocks_have_no_decay():
    with pytest.raises(
        ValueError, match=r"--layer_learning_rate_decay 0.5 needs a pre-trained backbone, and this is a r"
    ):
        make_optimizer(residual_model(), RECIPE)
    other = RideBfConfig(backbone_config=AutoConfig.for_model("vit_msn", **VIT), num_labels=5)
    with pytest.raises(ValueError, match="those of vit_msn are not known; leave it out, or use one of vit, deit"):
        make_optimizer(RideBfForImageClassification(other), RECIPE)


# --- Batch normalisation ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def finetune(output_dir, backbone, files, *options):
    given = probe_options(backbone, files, "--warmup_epochs", 0, *options)[2:]
    return train(output_dir, "--recipe", "finetune", *given)


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_normalisation_is_kept_if_asked_for(tmp_path, files, frozen):
    processor = ConvNextImageProcessor(size={"shortest_edge": 24}, crop_pct=0.75)
    place = write_backbone(tmp_path / "resnet", "resnet", RESNET, processor)
    out = finetune(tmp_path / "out", place, files, *(() if frozen else ("--no_freeze_batch_norm",)))
    base, saved = AutoModel.from_pretrained(place), load_model(out / "last").ride_bf.trunk.backbone
    norms = tuple(name for name, module in base.named_modules() if isinstance(module, torch.nn.BatchNorm2d))
    assert len(norms) > 4
    for name, tensor in base.state_dict().items():
        kept = torch.equal(tensor, saved.state_dict()[name])
        assert kept == (frozen and name.rpartition(".")[0] in norms), name


# --- Stochastic depth -------------------------------------------------------------------------------------------------


def backbone_of(name):
    config = backbone_config(name)
    if name == "timm_efficientnet":  # no block of the small one has a path around it
        config = AutoConfig.for_model("timm_wrapper", architecture="efficientnet_lite0", num_labels=2)
    return Backbone(place=name, config=config, processor=None)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in NO_DROP_PATH])
def test_paths_are_dropped_in_training_alone(name, tmp_path):
    before = backbone_of(name)
    described = before.config.to_dict()
    config = with_drop_path(before, 0.6).config
    assert before.config.to_dict() == described, "it is a copy"
    torch.manual_seed(0)
    model = moved(RideBfForImageClassification(RideBfConfig(backbone_config=config, num_labels=5, num_experts=2)))
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def gives_the_same_again():
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        with torch.no_grad():
            return torch.equal(model(pixels).logits, model(pixels).logits)

    set_train_mode(model)
    assert not gives_the_same_again()
    model.eval()
    assert gives_the_same_again()
    train_only(model, "heads")
    set_train_mode(model)
    assert gives_the_same_again(), "a frozen backbone is as in evaluation"
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    timm = config.model_type == "timm_wrapper"
    assert (written["backbone_config"]["model_args"] if timm else written["backbone_config"])["drop_path_rate"] == 0.6
    assert "drop_path" not in str({key: value for key, value in written.items() if key != "backbone_config"})


@pytest.mark.parametrize("name", NO_DROP_PATH)
def test_a_family_without_it_is_named(name):
    model_type = BACKBONES[name][0]
    with pytest.raises(
        ValueError, match=f"--drop_path 0.1 cannot act: the backbone {model_type} has no stochastic dep"
    ):
        with_drop_path(backbone_of(name), 0.1)


def test_a_network_of_timm_without_it_is_named():
    pytest.importorskip("timm")
    config = AutoConfig.for_model("timm_wrapper", architecture="vgg11", num_labels=2)
    with pytest.raises(ValueError, match="the backbone vgg11 has no stochastic depth; leave it out"):
        with_drop_path(Backbone(place="x", config=config, processor=None), 0.1)


def test_none_keeps_the_backbones_own():
    swin = backbone_of("swin")
    assert with_drop_path(swin, None) is swin
    assert with_drop_path(backbone_of("swinv2"), 0.0).config.drop_path_rate == 0


def test_a_run_that_finetunes(tmp_path, files):
    options = {**VIT, "image_size": 16, "num_hidden_layers": 2}
    place = write_backbone(tmp_path / "dinov2", "dinov2", options, vit_processor())
    out = finetune(tmp_path / "out", place, files, "--drop_path", 0.2)
    model = load_model(out / "last")
    assert model.config.backbone_config.drop_path_rate == 0.2
    counts = json.loads((out / "last/checkpoint.json").read_text())["parameters"]
    assert counts["trained"] == counts["all"] == sum(parameter.numel() for parameter in model.parameters())
    vit = write_backbone(tmp_path / "vit", "vit", options, vit_processor())
    with pytest.raises(SystemExit, match="the backbone vit has no stochastic depth; leave it out"):
        finetune(tmp_path / "no", vit, files, "--drop_path", 0.2)
    with pytest.raises(SystemExit, match="--freeze_batch_norm cannot act: the network has no batch normalisation; lea"):
        finetune(tmp_path / "no", vit, files, "--freeze_batch_norm")
    assert not (tmp_path / "no").exists()
