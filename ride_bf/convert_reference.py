"""Between the parameter names of the authors' code and ours."""

import re
from collections.abc import Mapping

from torch import Tensor

# In a block of theirs: conv1, bn1, conv2, ...; downsample.0 and .1.
# In one of ours: layers.0.convolution, layers.0.bn, layers.1.convolution, ...; shortcut.convolution and .bn.
_BLOCK_NAMES = (
    (re.compile(r"conv(\d+)"), lambda m: f"layers.{int(m[1]) - 1}.convolution"),
    (re.compile(r"bn(\d+)"), lambda m: f"layers.{int(m[1]) - 1}.bn"),
    (re.compile(r"downsample\.0"), lambda m: "shortcut.convolution"),
    (re.compile(r"downsample\.1"), lambda m: "shortcut.bn"),
)


def _convert_block_name(name: str) -> str:
    for pattern, ours in _BLOCK_NAMES:
        match = pattern.match(name)
        if match:
            return ours(match) + name[match.end() :]
    raise KeyError(f"no part of a residual block is called {name!r}")


def convert_key(key: str, num_shared_stages: int) -> str:
    """The name in `RideBfForImageClassification` of a parameter or buffer of the authors' multi-expert networks.

    `key` has no `module.` or `backbone.` before it. Raises KeyError for a name their networks do not have.
    """
    if match := re.fullmatch(r"(conv|bn)1\.(\w+)", key):
        return f"ride_bf.trunk.stem.0.{'convolution' if match[1] == 'conv' else 'bn'}.{match[2]}"
    if match := re.fullmatch(r"layer(\d+)\.(\d+)\.(.+)", key):  # a shared stage
        return f"ride_bf.trunk.stages.{int(match[1]) - 1}.{match[2]}.{_convert_block_name(match[3])}"
    if match := re.fullmatch(r"layer(\d+)s\.(\d+)\.(\d+)\.(.+)", key):  # an expert's own stage
        stage = int(match[1]) - 1 - num_shared_stages
        return f"ride_bf.experts.{match[2]}.stages.{stage}.{match[3]}.{_convert_block_name(match[4])}"
    if match := re.fullmatch(r"linears\.(\d+)\.(weight|bias)", key):
        return f"classifiers.{match[1]}.{match[2]}"
    if match := re.fullmatch(r"encoder_layers\.layers\.(\d+)\.(.+)", key):
        return f"batchformer.layers.{match[1]}.{match[2]}"
    if match := re.fullmatch(r"encoder_layers\.(.+)", key):
        return f"batchformer.layers.0.{match[1]}"
    raise KeyError(f"no parameter of the authors' networks is called {key!r}")


def convert_state_dict(reference: Mapping[str, Tensor], num_shared_stages: int, cosine: bool) -> dict[str, Tensor]:
    """The authors' parameters under our names; their cosine weights (D, C) are transposed to (C, D)."""
    converted = {}
    for key, tensor in reference.items():
        name = convert_key(key, num_shared_stages)
        converted[name] = tensor.t().contiguous() if cosine and name.startswith("classifiers.") else tensor
    return converted
