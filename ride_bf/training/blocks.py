"""The blocks of a backbone in a network: the shared ones in the trunk, then those that each expert has for itself."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from backbone_ride_bf import FAMILIES, Family
from modeling_ride_bf import RideBfBlock, RideBfForImageClassification


def backbone_parts(model: RideBfForImageClassification, needed_by: str) -> tuple[Family, list[PreTrainedModel]]:
    """How the backbone is taken apart, and its parts: that of the trunk, then that of each expert that has one.

    Raises ValueError, which names the option `needed_by`, for a network without a backbone, or with one whose blocks
    are not known.
    """
    if model.config.backbone_config is None:
        raise ValueError(f"{needed_by} needs a pre-trained backbone, and this is a residual network: set --backbone")
    trunk = model.ride_bf.trunk
    if trunk.family is None:
        raise ValueError(
            f"{needed_by} needs the blocks of the backbone, and those of {trunk.family_name} are not known; leave it "
            f"out, or use one of {', '.join(FAMILIES)}"
        )
    return trunk.family, _parts(model)


def _parts(model: RideBfForImageClassification) -> list[PreTrainedModel]:
    tails = (expert.tail for expert in model.ride_bf.experts)
    return [model.ride_bf.trunk.backbone, *(tail for tail in tails if tail is not None)]


def blocks(model: RideBfForImageClassification) -> Iterator[nn.Module]:
    """The blocks of any network.

    Of a backbone whose blocks are not known, these are the modules that transformers keeps together on a device.
    """
    family = None if model.config.backbone_config is None else model.ride_bf.trunk.family
    if family is None:
        names = {RideBfBlock.__name__, *(model._no_split_modules or ())}
        yield from (module for module in model.modules() if type(module).__name__ in names)
        return
    for part in _parts(model):
        for block in family.blocks_of(part):
            yield from block.children() if type(block) is nn.Sequential else (block,)


def depths_from_top(model: RideBfForImageClassification, needed_by: str) -> dict[str, int]:
    """Name of each parameter of the backbone -> how far below the classifiers it is.

    It is 0 after the blocks, 1 in the last block, and so on; the largest before the blocks. A hierarchical backbone has
    stages instead of blocks. Raises the errors of `backbone_parts`.
    """
    family, parts = backbone_parts(model, needed_by)
    own = len(family.blocks_of(parts[-1])) if len(parts) > 1 else 0
    total = len(family.blocks_of(parts[0])) + own
    after = tuple(f"{name}." for name in family.last)
    depths: dict[int, int] = {}
    for part in parts:
        top = own + 1 if part is parts[0] else 1  # the depth of its last block
        blocks = family.blocks_of(part)
        depths |= {id(p): 0 if name.startswith(after) else total + 1 for name, p in part.named_parameters()}
        for depth, block in enumerate(reversed(blocks), top):
            depths |= {id(parameter): depth for parameter in block.parameters()}
    return {name: depths[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in depths}
