"""FSDP2: a network divided among the processes trains, saves and resumes as a whole one, or the run is refused."""

import shutil
from types import SimpleNamespace

import pytest
from conftest import ROOT, tiny_model
from processes import TRAIN, Command, torchrun
from test_backbones import BACKBONES
from test_backbones import tiny_model as tiny_network
from test_pretrained import VIT, vit_processor, write_backbone, write_images
from test_several_processes import (
    WITH_FIXED_NORMS,
    assert_equal_to_rounding,
    assert_metrics_equal_to_rounding,
    assert_weights_equal_to_rounding,
)
from test_surviving import without_speed
from test_training import SMALL_ARGUMENTS, assert_same_weights, read_metrics, train

from ride_bf.runs.checkpoints import check_loadable
from ride_bf.runs.models import load_model
from ride_bf.runs.sharding import sharding_plugin
from ride_bf.training.blocks import blocks
from ride_bf.training.sharding import check_sharding

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def finish(processes, script, output_dir, *options, **environment):
    command = (script, "--output_dir", output_dir, *options)
    launched = Command(*torchrun(processes, *command), ACCELERATE_USE_CPU="true", **environment)
    return launched.finish()


def launch(*arguments, **environment):
    code, printed = finish(*arguments, **environment)
    assert code == 0, printed[-3000:]
    return arguments[2]


def test_processes_that_share_a_network_equal_one(tmp_path):
    """Windows across processes, clipping, sampler and metrics; resumed in mid-epoch by as many, and by four."""
    start = train(tmp_path / "start", "--epochs", 1) / "last"
    script = tmp_path / "script.py"
    script.write_text(WITH_FIXED_NORMS.format(root=str(ROOT)))
    options = (*SMALL_ARGUMENTS, "--init_from", start, "--batch_size", 40, "--epochs", 2, "--learning_rate", 0.01)
    options += ("--sampler", "class_balanced", "--batchformer_window", 16, "--batchformer_dropout", 0)
    options += ("--max_grad_norm", 5, "--eval_steps", 4, "--eval_batch_size", 39, "--ema_decay", 0.8)
    one = launch(1, script, tmp_path / "one", *options, "--max_steps", 8)
    options += ("--max_steps", 11)
    whole = launch(2, script, tmp_path / "whole", *options, "--save_steps", 8, "--keep_last", 3, **FSDP)
    assert_weights_equal_to_rounding(one / "last", whole / "checkpoints/step-00000008")
    assert_metrics_equal_to_rounding(read_metrics(one)[0], read_metrics(whole)[0])

    after_step_8 = tmp_path / "after_step_8"
    shutil.copytree(whole, after_step_8, ignore=shutil.ignore_patterns("last", "best"))
    for name in ("last", "best"):
        shutil.copytree(whole / "checkpoints/step-00000008", after_step_8 / name)
    as_many, more = (shutil.copytree(after_step_8, tmp_path / name) for name in ("as_many", "more"))
    resume = (*options, "--resume", "--allow_changes", "num_processes")
    launch(2, script, as_many, *resume, **FSDP)
    assert_same_weights(whole / "last", as_many / "last")
    assert without_speed(whole) == without_speed(as_many)
    launch(4, script, more, *resume, **FSDP)
    assert_equal_to_rounding(whole, more)
    settings = (after_step_8 / "run.json").read_bytes()
    with pytest.raises(SystemExit, match="was written under FSDP, and its optimizer can only be read that way"):
        train(after_step_8, *resume)
    assert (after_step_8 / "run.json").read_bytes() == settings


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("backbones") / "vit", "vit", VIT, vit_processor())


@pytest.mark.parametrize(
    "options",
    [
        ("--recipe", "lora", "--gradient_accumulation_steps", 2, "--batchformer", "insert"),
        ("--recipe", "finetune", "--num_expert_layers", 1, "--ema_decay", 0.8, "--optimizer", "sgd"),
    ],
    ids=["lora", "finetune"],
)
def test_a_backbone_that_is_shared_equals_a_whole_one(tmp_path, vit, options):
    images = write_images(tmp_path / "images")
    options += ("--backbone", vit, "--data_dir", images, "--epochs", 2, "--batch_size", 8, "--learning_rate", 0.01)
    whole = launch(2, TRAIN, tmp_path / "whole", *options)
    shared = launch(2, TRAIN, tmp_path / "shared", *options, **FSDP)
    assert_weights_equal_to_rounding(whole / "last", shared / "last")  # with LoRA merged, by the names of a whole one
    for line, same in zip(read_metrics(whole), read_metrics(shared), strict=True):
        assert line["validation_loss"] == pytest.approx(same["validation_loss"], rel=1e-5)
    load_model(shared)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_blocks_of_every_family_are_units(name):
    """None of them holds the whole trunk, so that no process ever gathers it at once."""
    model = tiny_network(name, num_expert_layers=1)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    assert len(sizes) > 1
    assert max(sizes) < sum(p.numel() for p in model.parameters())


def test_the_blocks_of_a_residual_network_are_units():
    assert {type(block).__name__ for block in blocks(tiny_model())} == {"RideBfBlock"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP_VERSION=1 cannot act: set fsdp_version: 2"),
        ({"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, "set fsdp_state_dict_type: SHARDED_STATE_DICT"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "set fsdp_cpu_ram_efficient_loading: false"),
        ({"FSDP_OFFLOAD_PARAMS": "True"}, "set fsdp_offload_params: false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set fsdp_activation_checkpointing: false"),
    ],
)
def test_settings_that_do_not_act(settings, message):
    with pytest.raises(ValueError, match=message):
        sharding_plugin({**FSDP, **settings})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_only": "router"}, "--train_only router cannot act under FSDP.*--multi_gpu"),
        ({"train_only": "class_scales"}, "--train_only class_scales cannot act"),
    ],
)
def test_what_a_shared_network_cannot_do(changes, message):
    recipe = SimpleNamespace(**{"train_only": "all", **changes})
    with pytest.raises(ValueError, match=message):
        check_sharding(recipe, SimpleNamespace(is_fsdp2=True))
    check_sharding(recipe, SimpleNamespace(is_fsdp2=False))


def test_a_checkpoint_of_the_other_kind(tmp_path):
    (tmp_path / "training_state").mkdir()
    (tmp_path / "training_state/optimizer.bin").touch()
    check_loadable(tmp_path, sharded=False)
    with pytest.raises(ValueError, match=r"was written without FSDP.*launch with --multi_gpu, or start.*--init_from"):
        check_loadable(tmp_path, sharded=True)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "one process has nobody to share its network with"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 cannot act under FSDP.*--mixed_precision bf16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "inductor"}, "dynamo_backend inductor cannot act under FSDP"),
    ],
)
def test_launches_that_are_refused(tmp_path, monkeypatch, environment, message):
    for name, value in {**FSDP, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=message):
        train(tmp_path / "out")
    assert not (tmp_path / "out").exists()
