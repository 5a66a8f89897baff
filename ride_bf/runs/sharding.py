"""The settings of FSDP2, under which the processes share one network, and FSDP2 on CPUs."""

from collections.abc import Mapping

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from torch.distributed.fsdp import MixedPrecisionPolicy

# Variable that a launcher sets -> Accelerate's own value, the one that acts here, and what to do about another
_SETTINGS = {
    "FSDP_VERSION": ("1", "2", "set fsdp_version: 2"),
    "FSDP_STATE_DICT_TYPE": (
        "SHARDED_STATE_DICT",
        "SHARDED_STATE_DICT",
        "set fsdp_state_dict_type: SHARDED_STATE_DICT; the model in a checkpoint is whole all the same",
    ),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "false",
        "false",
        "Accelerate cannot send the buffers of a network that way; set fsdp_cpu_ram_efficient_loading: false",
    ),
    "FSDP_OFFLOAD_PARAMS": (
        "false",
        "false",
        "set fsdp_offload_params: false; --train_only lora saves memory",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "false",
        "false",
        "dropout would differ when a block runs again; set fsdp_activation_checkpointing: false",
    ),
}


def sharding_plugin(environment: Mapping[str, str]) -> FullyShardedDataParallelPlugin:
    """FSDP2 with the settings of the launcher. Raises ValueError for those that do not act."""
    for variable, (default, acts, remedy) in _SETTINGS.items():
        value = environment.get(variable, default)
        if value.lower() != acts.lower():
            raise ValueError(f"{variable}={value} cannot act: {remedy}")
    # With a policy of its own, Accelerate does not cast everything: `ride_bf.training.sharding` sets what is cast.
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


def shard_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Turns FSDP2 on for CPU processes. PyTorch has it for them, but Accelerate's state ignores it there.

    It sets what `AcceleratorState` sets for GPUs.
    """
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
