"""What a launcher is asked for is what runs, or the command refuses before it does anything."""

import os

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from conftest import ROOT
from processes import Command, torchrun
from test_training import SMALL_ARGUMENTS, train

from ride_bf import decouple, route
from ride_bf import evaluate as evaluate_command
from ride_bf.runs.engine import start_accelerator

LAUNCHED = {"ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_MIXED_PRECISION": "no"}  # by accelerate launch

REFUSED = [
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP cannot act .* --multi_gpu"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed cannot act"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM cannot act"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "a parallelism_config cannot"),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8 cannot act here; take one of no, fp16, bf16"),
    ({"ACCELERATE_MIXED_PRECISION": "int8"}, "mixed_precision int8 cannot act"),
    ({"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "true"}, "fp16 needs a GPU"),
    ({"ACCELERATE_DYNAMO_BACKEND": "ipex"}, "dynamo_backend ipex is not installed; .* inductor"),
    ({"ACCELERATE_DYNAMO_BACKEND": "TENSORRT"}, "dynamo_backend tensorrt is not installed"),
    ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "has started 2 processes, but each of them would run alone"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "has started 4 processes, .*torchrun --nproc_per_node 4"),
    ({**LAUNCHED, "MASTER_ADDR": "127.0.0.1"}, "was asked for several processes and has started one"),
    ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1 asks for GPUs, and PyTorch .* finds none"),
]
ALLOWED = [
    {},
    {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": ""},
    {"ACCELERATE_MIXED_PRECISION": "bf16"},
    {"ACCELERATE_DYNAMO_BACKEND": "inductor"},
    {"MASTER_ADDR": "node1"},  # of a cluster: nobody asked accelerate launch for anything
    LAUNCHED,
    {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    {"CUDA_VISIBLE_DEVICES": "0", "ACCELERATE_USE_CPU": "true"},
    {"CUDA_VISIBLE_DEVICES": ""},
]


@pytest.fixture(autouse=True)
def new_state():
    reset()
    yield
    reset()


def reset():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def without_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(("environment", "message"), REFUSED)
def test_what_would_be_ignored_is_refused(environment, message, monkeypatch, without_gpus):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        start_accelerator()


@pytest.mark.parametrize("environment", ALLOWED)
def test_what_is_not_asked_for_is_not_refused(environment, monkeypatch, without_gpus):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert start_accelerator().num_processes == 1


@pytest.mark.parametrize(
    "command",
    [
        lambda out: train(out / "run"),
        lambda out: evaluate_command.main(["--model", str(out)]),
        lambda out: route.main([str(out)]),
        lambda out: decouple.main(["logit_adjustment", str(out), "--output_dir", str(out / "new")]),
    ],
    ids=["train", "evaluate", "route", "decouple"],
)
def test_every_command_refuses_before_it_does_anything(command, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SystemExit, match="error: DeepSpeed cannot act"):
        command(tmp_path)
    assert not list(tmp_path.iterdir())


def test_accumulation_that_the_environment_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(SystemExit, match=r"STEPS=4 cannot act, .* are made for 2: unset it"):
        train(tmp_path / "out", "--gradient_accumulation_steps", 2)
    assert start_accelerator().num_processes == 1, "evaluation accumulates nothing"


def test_only_a_command_that_trains_names_options_of_training(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"or with --train_only lora or heads$"):
        start_accelerator(can_shard=True)
    with pytest.raises(ValueError, match=r"MULTI_GPU in the configuration file$"):
        start_accelerator()


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (
            {},
            "use accelerate launch --mixed_precision no, or set ACCELERATE_MIXED_PRECISION=no for torchrun and python",
        ),
        ({"mixed_precision": "fp16"}, "on a CPU use --mixed_precision no;"),
    ],
)
def test_the_option_for_the_precision_is_that_of_the_launcher_or_the_command(options, remedy, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=f"^fp16 needs a GPU; .*{remedy}"):
        start_accelerator(**options)


def test_gpus(monkeypatch):
    """On one GPU of an older kind, as PyTorch describes it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes on this machine need 4 GPUs, and PyTorch finds 1"):
        start_accelerator()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(ValueError, match="bf16 needs a newer GPU: Tesla V100 only emulates it"):
        start_accelerator()


@pytest.mark.parametrize("words", ["--cpu --num_processes 2", "--cpu --num_processes 1"])
def test_accelerate_launch_starts_one_process_of_several(words, monkeypatch):
    """In the environment that `accelerate launch` makes for it."""
    arguments = launch_command_parser().parse_args([*words.split(), "train_accelerate.py"])
    _, environment = prepare_simple_launcher_cmd_env(_validate_launch_command(arguments)[0])
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])
    if words.endswith("1"):
        assert start_accelerator().num_processes == 1
    else:
        with pytest.raises(ValueError, match="was asked for several processes and has started one"):
            start_accelerator()


@pytest.mark.parametrize(
    ("environment", "message"),
    [({}, "has started 2 processes, but each"), ({"ACCELERATE_USE_FSDP": "true"}, "FSDP_VERSION=1 cannot act")],
)
def test_two_processes_that_would_be_something_else(tmp_path, environment, message):
    environment = {"ACCELERATE_USE_CPU": "true" if environment else "false", **environment}
    command = (ROOT / "train_accelerate.py", *SMALL_ARGUMENTS, "--output_dir", tmp_path / "out")
    code, printed = Command(*torchrun(2, *command), **environment).finish()
    assert code != 0
    assert printed.count("error: ") == 1, printed
    assert message in printed
