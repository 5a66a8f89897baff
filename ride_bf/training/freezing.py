"""Freezes all but one part of a network."""

from torch import nn

# Part of the network that can be trained alone -> prefixes of the names of its parameters. The adapters of the experts
# are heads too, and LoRA is named after the layers that have it: see `is_of_part`.
TRAINABLE_PARTS: dict[str, tuple[str, ...]] = {
    "all": ("",),
    "heads": ("classifiers.", "batchformer."),
    "lora": ("classifiers.", "batchformer."),
    "classifiers": ("classifiers.",),
    "class_scales": ("classifiers.",),
    "router": ("router.",),
}


def train_only(model: nn.Module, part: str) -> None:
    """Freezes every parameter outside `part`, a key of `TRAINABLE_PARTS`. Raises ValueError if the network has none."""
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_of_part(name, part))
        trained += parameter.requires_grad
    if not trained:
        raise ValueError(f"the network has no {part} to train")
    if part == "class_scales":
        _train_only_scales(model)


def freeze_batch_norm(model: nn.Module) -> int:
    """Freezes the batch normalisation; `set_train_mode` then keeps its statistics too. Returns how many layers it is.

    A pre-trained network whose layers took the statistics of the batches would give other features than those that the
    classifiers start from.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.requires_grad_(False)
    return len(layers)


def is_of_part(name: str, part: str) -> bool:
    """Whether the parameter of this name is of a part, a key of `TRAINABLE_PARTS`."""
    if part == "lora" and is_of_lora(name):
        return True
    return name.startswith(TRAINABLE_PARTS[part]) or (part in ("heads", "lora") and is_of_adapter(name))


def is_of_adapter(name: str) -> bool:
    """Whether the parameter of this name is of an expert's adapter."""
    return name.startswith("ride_bf.experts.") and ".adapter." in name


def is_of_lora(name: str) -> bool:
    """Whether the parameter of this name is of LoRA, as peft names it."""
    return ".lora_A." in name or ".lora_B." in name


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """How many parameters the network has in training, with LoRA, and how many of them are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {"all": sum(size for size, _ in sizes), "trained": sum(size for size, trained in sizes if trained)}


def _train_only_scales(model: nn.Module) -> None:
    """Learnable weight scaling: trains only the length of each class's weights. Kang et al., 2020, section 4.3.

    Let w = f w0. A step of SGD on f moves w along w0, by the gradient's component on w0 times |w0|^2. A step on w with
    that gradient does the same, also with momentum and weight decay. So the scale needs no parameter of its own, and
    the saved classifier is an ordinary one. Raises ValueError for cosine classifiers, which ignore the length.
    """
    if model.config.classifier != "linear":
        raise ValueError(
            "class_scales needs --classifier linear, and --init_from a model that was trained with it: a cosine "
            "classifier has no lengths to learn"
        )
    for classifier in model.classifiers:
        classifier.bias.requires_grad_(False)
        start = classifier.weight.detach().clone()
        classifier.weight.register_hook(
            lambda gradient, start=start: (gradient * start.to(gradient)).sum(dim=1, keepdim=True) * start.to(gradient)
        )


def set_train_mode(model: nn.Module) -> None:
    """Like `model.train()`, but a part whose parameters are all frozen stays as in evaluation.

    So a frozen backbone keeps the statistics of its norms and has no dropout.
    """
    model.train()
    _frozen_parts_to_evaluation(model)


def _frozen_parts_to_evaluation(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        _frozen_parts_to_evaluation(child)
