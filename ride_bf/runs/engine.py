"""Makes an Accelerator that does what its launcher was asked for, or says why it cannot.

Accelerate ignores settings that do not fit the devices: FSDP on CPUs, fp16 on a CPU, a second process of
`accelerate launch --cpu`. The run would succeed, but it would not be the run that was asked for.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import str_to_bool

_FSDP = "ACCELERATE_USE_FSDP"
# A launcher's variable -> what it asks for. All of these split the network over the processes.
_SPLIT_NETWORKS = {
    _FSDP: "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
# The number of processes that a launcher has started: torchrun and `accelerate launch`, and MPI
_STARTED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_PRECISIONS = ("no", "fp16", "bf16")
_GREATER_NETWORKS = (
    "; a network that is too large trains under FSDP2 (configs/fsdp.yaml), or with --train_only lora or heads"
)
_ON_CPU = "on CPUs start them with ACCELERATE_USE_CPU=true torchrun --nproc_per_node"


def start_accelerator(*, can_shard: bool = False, **options: Any) -> Accelerator:
    """Returns `Accelerator(**options)`, once it is sure that it runs what was asked for.

    Compares the variables that launchers set, and `options`, with the Accelerator's state. Raises ValueError, with
    what to take instead, if they differ. `can_shard`: whether the command can divide its network among the processes.
    """
    environment = os.environ
    precision = options.get("mixed_precision") or environment.get("ACCELERATE_MIXED_PRECISION", "no")
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    shards = can_shard and _asks(environment, _FSDP)
    _check_network_is_whole(environment, but_for=_FSDP if shards else None, trains=can_shard)
    _check_gpus(environment)
    _check_names(precision, backend)
    accelerator = _start_sharded(environment, precision, backend, options) if shards else Accelerator(**options)
    _check_processes(accelerator, environment)
    _check_precision(accelerator, precision, of_command="mixed_precision" in options)
    if "gradient_accumulation_steps" in options:
        _check_accumulation(accelerator, options["gradient_accumulation_steps"])
    return accelerator


def _asks(environment: Mapping[str, str], name: str) -> bool:
    return bool(str_to_bool(environment.get(name) or "false"))


def _use_precision(precision: str, of_command: bool = False) -> str:
    """How to run in another precision. `of_command`: the command has the option, which else is its launcher's."""
    if of_command:
        return f"use --mixed_precision {precision}"
    return (
        f"use accelerate launch --mixed_precision {precision}, or set ACCELERATE_MIXED_PRECISION={precision} for "
        "torchrun and python"
    )


def _check_network_is_whole(environment: Mapping[str, str], but_for: str | None, trains: bool) -> None:
    for variable, engine in _SPLIT_NETWORKS.items():
        if variable != but_for and _asks(environment, variable):
            raise ValueError(
                f"{engine} cannot act ({variable}={environment[variable]}): every process holds the whole network. "
                "Launch with --multi_gpu, or distributed_type: MULTI_GPU in the configuration file"
                f"{_GREATER_NETWORKS if trains else ''}"
            )


def _start_sharded(
    environment: Mapping[str, str], precision: str, backend: str, options: dict[str, Any]
) -> Accelerator:
    """An Accelerator that divides the network among the processes."""
    from ride_bf.runs.sharding import shard_on_cpu, sharding_plugin  # of a run that asks for it

    if precision == "fp16":
        raise ValueError(f"fp16 cannot act under FSDP: its loss scaling is not tested there; {_use_precision('bf16')}")
    if backend != "no":
        raise ValueError(f"dynamo_backend {backend} cannot act under FSDP; set it to no")
    plugin = sharding_plugin(environment)
    accelerator = Accelerator(fsdp_plugin=plugin, **options)
    if accelerator.num_processes == 1:
        raise ValueError(
            "FSDP cannot act: one process has nobody to share its network with; launch several, or without FSDP"
        )
    if accelerator.device.type == "cpu":
        shard_on_cpu(accelerator, plugin)
    return accelerator


def _check_gpus(environment: Mapping[str, str]) -> None:
    """Compares the GPUs that were asked for with those that there are."""
    if _asks(environment, "ACCELERATE_USE_CPU"):
        return
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if visible not in ("", "-1", "NoDevFiles") and not torch.cuda.is_available():
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={visible} asks for GPUs, and PyTorch {torch.__version__} finds none: install a "
            "PyTorch for this driver, or unset it to train on a CPU"
        )
    started, gpus = int(environment.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if torch.cuda.is_available() and started > gpus:
        raise ValueError(
            f"{started} processes on this machine need {started} GPUs, and PyTorch finds {gpus}; launch with "
            f"--num_processes {gpus} for each machine, or torchrun --nproc_per_node {gpus}"
        )


def _check_names(precision: str, backend: str) -> None:
    if precision not in _PRECISIONS:
        raise ValueError(f"mixed_precision {precision} cannot act here; take one of {', '.join(_PRECISIONS)}")
    if backend != "no" and backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ValueError(
            f"dynamo_backend {backend} is not installed; PyTorch {torch.__version__} has {', '.join(known)}"
        )


def _check_processes(accelerator: Accelerator, environment: Mapping[str, str]) -> None:
    running = accelerator.num_processes
    started = max(int(environment.get(name) or 1) for name in _STARTED)
    if started != running:
        raise ValueError(
            f"the launcher has started {started} processes, but each of them would run alone on "
            f"{accelerator.device.type}; {_ON_CPU} {started}"
        )
    # `accelerate launch` for a CPU starts one process, whatever --num_processes is. Only this address shows it.
    by_accelerate = "ACCELERATE_DYNAMO_BACKEND" in environment
    if running == 1 and by_accelerate and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise ValueError(
            "accelerate launch was asked for several processes and has started one, as it always does with --cpu or "
            f"use_cpu; {_ON_CPU} N. For one process pass --num_processes 1 --num_machines 1, and unset MASTER_ADDR"
        )


def _check_precision(accelerator: Accelerator, asked: str, of_command: bool) -> None:
    device = accelerator.device
    if asked == "fp16" and device.type == "cpu":
        raise ValueError(f"fp16 needs a GPU; on a CPU {_use_precision('no', of_command)}; bf16 runs there too")
    if asked == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"bf16 needs a newer GPU: {torch.cuda.get_device_name(device)} only emulates it; "
            f"{_use_precision('fp16', of_command)}"
        )
    if asked not in ("no", accelerator.mixed_precision):
        raise ValueError(
            f"mixed_precision {asked} was asked for, and {accelerator.mixed_precision} would run; "
            f"{_use_precision(accelerator.mixed_precision, of_command)}"
        )


def _check_accumulation(accelerator: Accelerator, asked: int) -> None:
    if accelerator.gradient_accumulation_steps != asked:
        raise ValueError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={accelerator.gradient_accumulation_steps} cannot act, because the "
            f"batches of this run are made for {asked}: unset it and pass --gradient_accumulation_steps to the command"
        )
