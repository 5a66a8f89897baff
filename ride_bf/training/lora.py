"""LoRA of a backbone by the peft library: it trains low-rank changes of weights, which a saved network has merged.

Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022.
"""

import copy
from collections.abc import Iterator, Sequence

from torch import nn

from modeling_ride_bf import RideBfForImageClassification
from ride_bf.recipes import TrainingRecipe
from ride_bf.training.blocks import backbone_parts

_OPTION = "--train_only lora"


def add_lora(model: RideBfForImageClassification, recipe: TrainingRecipe) -> None:
    """Adds LoRA to layers in the blocks of the backbone. It starts as no change, so the features stay equal.

    Raises ValueError without peft, for a backbone whose blocks are not known, and for `lora_target_modules` that the
    backbone does not have.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # takes seconds
    except ImportError as error:
        raise ValueError(f"{_OPTION} needs the package peft: pip install peft") from error
    names = _chosen(_layers(model), recipe.lora_target_modules)
    inject_adapter_in_model(LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=names), model)


def merged(model: nn.Module) -> nn.Module:
    """The network as it is saved: a copy with LoRA merged into its weights; the network itself if it has no LoRA.

    It is a copy because subtracting the change again would not give back every bit of the weights.
    """
    if not any(_adapted(model)):
        return model
    plain = copy.deepcopy(model)
    for name, layer in list(_adapted(plain)):
        layer.merge()
        plain.set_submodule(name, layer.get_base_layer())
    del plain.peft_config  # all that peft added to the network itself
    return plain


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of peft, by name. They are found without importing peft, which a run without LoRA does not need."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def _layers(model: RideBfForImageClassification) -> list[str]:
    """Names of the layers in the blocks of the backbone that can have LoRA: linear ones and convolutions.

    A convolution with groups is left out, because peft cannot merge it. So is a subclass, such as a convolution that
    standardises its weights, because it may use its weights in another way.
    """
    family, parts = backbone_parts(model, _OPTION)
    inside = {id(layer) for part in parts for block in family.blocks_of(part) for layer in block.modules()}
    return [
        name
        for name, layer in model.named_modules()
        if id(layer) in inside and (type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1))
    ]


def _chosen(layers: list[str], targets: Sequence[str]) -> list[str]:
    """The layers whose names end in one of `targets`; all of them if it is empty."""
    chosen = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in targets}
    if unknown := [target for target, names in chosen.items() if not names]:
        known = sorted({name.rpartition(".")[2] for name in layers})
        raise ValueError(
            f"lora_target_modules: no layer of the backbone's blocks is called {' or '.join(unknown)}; they are called "
            f"{', '.join(known)}"
        )
    return [name for names in chosen.values() for name in names] if targets else layers
