"""LoRA: in every family, merged in what is saved, and in runs."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_model as residual_model
from processes import run
from safetensors.torch import load_file
from test_backbones import AS_A_WHOLE, BACKBONES, VIT, depth, moved, tiny_model
from test_pretrained import (
    RESNET,
    after,
    by_two_processes,
    changed,
    losses,
    probe_options,
    vit_processor,
    write_backbone,
    write_images,
)
from test_pretrained import VIT as VIT_WITH_DROPOUT
from test_surviving import assert_same_run, interrupted_at
from test_training import train
from tiny_run import COUNTS
from transformers import AutoConfig, AutoModel, ConvNextImageProcessor

from configuration_ride_bf import RideBfConfig
from modeling_ride_bf import RideBfForImageClassification
from ride_bf import evaluate, publish
from ride_bf.evaluation.compute import profile
from ride_bf.methods.losses import RideLoss
from ride_bf.methods.objectives import ClassificationObjective
from ride_bf.recipes import RECIPES
from ride_bf.runs.models import load_model, to_fast_layout
from ride_bf.training.cost import run_cost, training_flop
from ride_bf.training.ema import WeightAverage
from ride_bf.training.freezing import is_of_adapter, is_of_lora, parameter_counts, set_train_mode, train_only
from ride_bf.training.lora import add_lora, merged

pytest.importorskip("peft")
RECIPE = RECIPES["lora"].with_overrides(lora_rank=2)


@pytest.fixture
def pixels():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def with_lora(model, recipe=RECIPE):
    """The network with LoRA, as a run makes it."""
    add_lora(model, recipe)
    train_only(model, "lora")
    return to_fast_layout(model)


def shift_lora(model):
    """LoRA starts as no change; after this it makes one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def adapted_layers(model):
    return {name.partition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


# --- In every family --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layers"), [*((name, 1) for name in BACKBONES), *((name, 0) for name in AS_A_WHOLE)])
def test_every_family_learns_by_lora_and_is_saved_without_it(name, layers, pixels, tmp_path):
    plain = moved(tiny_model(name, num_expert_layers=layers, expert_adapter_size=3, batchformer="insert")).eval()
    with torch.no_grad():
        before = plain(pixels).logits
    keys = plain.state_dict().keys()
    model = with_lora(plain)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, before, atol=1e-5, rtol=0)
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    set_train_mode(shift_lora(model))
    outputs = model(pixels)
    ClassificationObjective(RideLoss(COUNTS))(outputs, {"labels": torch.arange(4)}, reweight=True).backward()
    for key, parameter in model.named_parameters():
        head = key.startswith(("classifiers.", "batchformer.")) or is_of_adapter(key)
        assert parameter.requires_grad == (head or is_of_lora(key)), key
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == parameter.requires_grad, key
    for key, buffer in model.named_buffers():
        assert key not in base or torch.equal(buffer, base[key]), f"{key} is of the backbone's norms"

    saved = merged(model.eval())
    with torch.no_grad():
        logits = saved(pixels).logits
        torch.testing.assert_close(logits, model(pixels).logits, atol=1e-5, rtol=1e-5)
    assert (logits - before).abs().max() > 1e-3
    assert saved.state_dict().keys() == keys
    assert any(map(is_of_lora, model.state_dict())), "the network that trains keeps it"
    saved.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.json"):
        assert not [word for word in ("lora", "peft") if word in path.read_text().lower()], path
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path).eval()(pixels).logits, logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("name", ["dinov2", "swin", "timm_resnet", "timm_efficientnet"])
def test_lora_is_in_every_block_and_nowhere_else(name, layers):
    model = with_lora(tiny_model(name, num_expert_layers=layers))
    family, trunk = model.ride_bf.trunk.family, model.ride_bf.trunk.backbone
    parts = [trunk, *(expert.tail for expert in model.ride_bf.experts if expert.tail is not None)]
    names = {id(module): key for key, module in model.named_modules()}
    blocks = tuple(f"{names[id(block)]}." for part in parts for block in family.blocks_of(part))
    assert len(blocks) == depth(name) + layers, "two experts"
    adapted = adapted_layers(model)
    assert all(layer.startswith(blocks) for layer in adapted)
    assert all(any(layer.startswith(block) for layer in adapted) for block in blocks)


def test_some_layers_only():
    recipe = RECIPE.with_overrides(lora_target_modules=("q_proj", "mlp.fc2"))
    assert {name.rpartition(".")[2] for name in adapted_layers(with_lora(tiny_model("siglip"), recipe))} == {
        "q_proj",
        "fc2",
    }
    recipe = RECIPE.with_overrides(lora_target_modules=("query", "q_proj", "proj"))
    with pytest.raises(ValueError, match=r"no layer of the .* is called query or proj; they are called fc1, fc2, k_pr"):
        with_lora(tiny_model("siglip"), recipe)


def test_rank_and_alpha():
    def change(**options):
        model = tiny_model("vit")
        start = model.ride_bf.trunk.backbone.layers[0].mlp.fc1.weight.detach().clone()
        torch.manual_seed(5)
        model = merged(shift_lora(with_lora(model, RECIPE.with_overrides(**options))))
        return model.ride_bf.trunk.backbone.layers[0].mlp.fc1.weight.detach() - start

    assert torch.linalg.matrix_rank(change(lora_rank=3), atol=1e-5) == 3
    torch.testing.assert_close(change(lora_rank=3, lora_alpha=6.0), 2 * change(lora_rank=3, lora_alpha=3.0))


def test_the_average_is_evaluated_merged(pixels):
    model = shift_lora(with_lora(tiny_model("vit")))
    weights = WeightAverage(model, 0.5)
    for _ in range(2):
        weights.update()
        shift_lora(model)
    evaluated = weights.evaluated.eval()
    assert not any(map(is_of_lora, evaluated.state_dict()))
    with torch.no_grad():
        logits = evaluated(pixels).logits
        torch.testing.assert_close(logits, weights.averaged.module.eval()(pixels).logits, atol=1e-5, rtol=0)
        assert (logits - model.eval()(pixels).logits).abs().max() > 1e-3


def test_without_lora_nothing_is_copied():
    model = tiny_model("vit")
    assert merged(model) is model


def test_where_lora_cannot_be(monkeypatch, tmp_path):
    other = RideBfConfig(backbone_config=AutoConfig.for_model("vit_msn", **VIT), num_labels=5)
    with pytest.raises(
        ValueError, match=r"--train_only lora needs the blocks .* of vit_msn are not known; .* one of vit"
    ):
        add_lora(RideBfForImageClassification(other), RECIPE)
    with pytest.raises(ValueError, match="--train_only lora needs a pre-trained backbone, and this is a residual netw"):
        add_lora(residual_model(), RECIPE)
    with pytest.raises(SystemExit, match="train_only lora needs a trained backbone: name it with --backbone, or a mod"):
        train(tmp_path / "out", "--train_only", "lora", "--batchformer", "none")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"^--train_only lora needs the package peft: pip install peft$"):
        add_lora(tiny_model("vit"), RECIPE)


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 1), ("adamw", 2)])
def test_the_memory_of_a_run_is_that_of_what_learns(optimizer, states):
    wide = AutoConfig.for_model("vit", **{**VIT, "hidden_size": 512, "intermediate_size": 1024})
    model = with_lora(RideBfForImageClassification(RideBfConfig(backbone_config=wide, num_labels=5)))
    counts = parameter_counts(model)
    assert 0 < counts["trained"] < 0.05 * counts["all"]
    recipe = RECIPE.with_overrides(optimizer=optimizer, image_size=32, batch_size=1, ema_decay=0)
    said = run_cost(model, recipe, batches_per_epoch=1, draws_per_epoch=1)
    expected = 4 * (counts["all"] + (1 + states) * counts["trained"]) / 2**30
    assert f"{expected:.2f} GiB for weights, gradients and optimizer" in said


def test_a_run_costs_the_gradients_of_inputs():
    """Of the weights of the layers that have LoRA, few learn."""
    model = with_lora(RideBfForImageClassification(RideBfConfig(backbone_config=AutoConfig.for_model("vit", **VIT))))
    trunk = profile(model.config, 32, 1)["trunk"]["multiply_adds"]
    counts = parameter_counts(model.ride_bf.trunk)
    assert 0 < counts["trained"] < counts["all"] / 5
    recipe = RECIPE.with_overrides(image_size=32)
    of_nine = training_flop(model, recipe, 10) - training_flop(model, recipe, 10, seen_once=1)
    assert of_nine == pytest.approx(9 * trunk * (4 + 2 * counts["trained"] / counts["all"]))


# --- In a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """It has dropout."""
    folder = tmp_path_factory.mktemp("backbones") / "tiny-vit"
    return write_backbone(folder, "vit", VIT_WITH_DROPOUT, vit_processor())


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """It has batch normalisation."""
    processor = ConvNextImageProcessor(size={"shortest_edge": 24}, crop_pct=0.75)
    return write_backbone(tmp_path_factory.mktemp("backbones") / "tiny-resnet", "resnet", RESNET, processor)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def lora_options(backbone, files, *options):
    small = ("--lora_rank", 2, "--warmup_epochs", 0, "--learning_rate", 0.01)
    return ("--recipe", "lora", *probe_options(backbone, files, *small, *options)[2:])


def lora(output_dir, backbone, files, *options):
    return train(output_dir, *lora_options(backbone, files, *options))


OWN_BLOCKS = ("--num_experts", 2, "--num_expert_layers", 1, "--expert_adapter_size", 4, "--ema_decay", 0.9)
ACCUMULATED = ("--gradient_accumulation_steps", 2, "--batchformer", "shared_classifier")


@pytest.mark.parametrize(("name", "options"), [("vit", (*OWN_BLOCKS, *ACCUMULATED)), ("resnet", ())])
def test_stopped_in_mid_epoch_and_resumed(name, options, tmp_path, request, files, monkeypatch):
    """Bit for bit: the training state has the weights before they are merged."""
    place = request.getfixturevalue(name)
    whole = lora(tmp_path / "whole", place, files, *options)
    with monkeypatch.context() as patch:
        interrupted_at(4, patch)
        with pytest.raises(SystemExit):
            lora(tmp_path / "out", place, files, *options)
    assert json.loads((tmp_path / "out/last/checkpoint.json").read_text())["epoch"] % 1 > 0
    lora(tmp_path / "out", place, files, *options, "--resume")
    assert_same_run(tmp_path / "out", whole)
    left, right = (
        load_file(out / "last/training_state/model.safetensors") for out in (tmp_path / "out", tmp_path / "whole")
    )
    assert any(map(is_of_lora, left))
    assert all(torch.equal(tensor, right[key]) for key, tensor in left.items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, resnet, files):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        return lora(folder / "out", resnet, files)


def test_the_weights_of_layers_change_and_norms_stay(trained, resnet):
    saved = load_model(trained / "last")
    base = AutoModel.from_pretrained(resnet).state_dict()
    kept = {key for key, tensor in saved.ride_bf.trunk.backbone.state_dict().items() if torch.equal(tensor, base[key])}
    new = {key for key, module in saved.ride_bf.trunk.backbone.named_modules() if isinstance(module, torch.nn.Conv2d)}
    in_blocks = {f"{key}.weight" for key in new if key.startswith("encoder.")}
    assert base.keys() - kept == in_blocks


STRANGER = """
import sys
sys.modules["peft"] = None  # an import of it fails
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.ones(2, 3, 24, 24)).logits, sys.argv[2])
"""


def test_a_checkpoint_loads_without_peft(trained, tmp_path):
    (tmp_path / "stranger.py").write_text(STRANGER)
    run(tmp_path / "stranger.py", trained / "best", tmp_path / "logits.pt", HF_HOME=str(tmp_path / "hf"))
    with torch.no_grad():
        expected = load_model(trained / "best").eval()(torch.ones(2, 3, 24, 24)).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=0)
    for path in (trained / "best").iterdir():
        assert path.suffix not in (".py", ".json") or b"peft" not in path.read_bytes(), path


def test_what_was_trained_is_recorded_and_told(trained, tmp_path):
    model = with_lora(load_model(trained / "last"))
    counts = parameter_counts(model)
    assert counts["trained"] < counts["all"]
    assert json.loads((trained / "best/checkpoint.json").read_text())["parameters"] == counts
    evaluate.main(["--model", str(trained), "--output_dir", str(tmp_path / "measured")])
    assert json.loads((tmp_path / "measured/results.json").read_text())["parameters"] == counts
    publish.main([str(trained), "--repo_id", "a/b", "--dry_run", "--output_dir", str(tmp_path / "page")])
    card = (tmp_path / "page/README.md").read_text()
    assert "It was adapted by LoRA of rank 2, which is merged into its weights" in card
    share = 100 * counts["trained"] / counts["all"]
    assert f"Trained: {counts['trained']:,} of {counts['all']:,} parameters ({share:.1f} %)" in card


def test_evaluation_of_the_saved_model_is_that_of_the_run(trained, tmp_path):
    evaluate.main(["--model", str(trained / "last"), "--split", "validation", "--output_dir", str(tmp_path / "out")])
    metrics = json.loads((tmp_path / "out/results.json").read_text())["metrics"]
    assert metrics["loss"] == pytest.approx(losses(trained)[-1][1], rel=1e-5)


def test_another_run_goes_on_from_it(trained, files, tmp_path):
    """By heads alone, and by LoRA again: its base then has what the first one learned."""
    for part in ("heads", "lora"):
        options = after(trained, files, "--train_only", part, "--num_experts", 1, "--cosine_scale", 25)
        rank = ("--lora_rank", 2) if part == "lora" else ()
        out = train(tmp_path / part, *options, *rank)
        learned = {name for name in changed(trained, out) if not name.startswith("classifiers.")}
        assert (learned == set()) == (part == "heads")
        assert all(".encoder." in name and name.endswith("convolution.weight") for name in learned)


def test_two_processes_equal_one(tmp_path, resnet, files):
    """22 training images in batches of 22, so that none has to be repeated."""
    options = lora_options(resnet, files, "--batch_size", 22, "--augmentation", "none", *OWN_BLOCKS)
    by_two_processes(tmp_path, *options)
    one = train(tmp_path / "one", *options)
    assert np.allclose(losses(one), losses(tmp_path / "two"), rtol=1e-5, atol=0)


def test_the_features_it_starts_from_are_those_of_a_probe(tmp_path, resnet, files, monkeypatch):
    """Whatever LoRA's own numbers are, since it starts as no change."""
    train(tmp_path / "probe", *probe_options(resnet, files))
    written = set((tmp_path / "cache/features").iterdir())
    lora(tmp_path / "out", resnet, files, "--seed", 1, "--max_steps", 1)
    assert set((tmp_path / "cache/features").iterdir()) == written


def test_a_dry_run_says_what_learns(trained, tmp_path, resnet, files, capsys):
    lora(tmp_path / "out", resnet, files, "--dry_run")
    counts = json.loads((trained / "last/checkpoint.json").read_text())["parameters"]
    assert f"{counts['all']:,} parameters, {counts['trained']:,} of them trained; 22 train" in capsys.readouterr().out
