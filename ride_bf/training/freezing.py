"""Freezes all but one part of a network."""

from torch import nn

# Part of the network that can be trained alone -> prefixes of the names of its parameters.
TRAINABLE_PARTS: dict[str, tuple[str, ...]] = {
    "all": ("",),
    "classifiers": ("classifiers.",),
    "class_scales": ("classifiers.",),
    "router": ("router.",),
}


def train_only(model: nn.Module, part: str) -> None:
    """Freezes every parameter outside `part`, a key of `TRAINABLE_PARTS`. Raises ValueError if the network has none."""
    prefixes = TRAINABLE_PARTS[part]
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
        trained += parameter.requires_grad
    if not trained:
        raise ValueError(f"the network has no {part} to train")
    if part == "class_scales":
        _train_only_scales(model)


def _train_only_scales(model: nn.Module) -> None:
    """Learnable weight scaling: trains only the length of each class's weights. Kang et al., 2020, section 4.3.

    Let w = f w0. A step of SGD on f moves w along w0, by the gradient's component on w0 times |w0|^2. A step on w with
    that gradient does the same, also with momentum and weight decay. So the scale needs no parameter of its own, and
    the saved classifier is an ordinary one. Raises ValueError for cosine classifiers, which ignore the length.
    """
    if model.config.classifier != "linear":
        raise ValueError("class_scales needs --classifier linear: a cosine classifier has no lengths to learn")
    for classifier in model.classifiers:
        classifier.bias.requires_grad_(False)
        start = classifier.weight.detach().clone()
        classifier.weight.register_hook(
            lambda gradient, start=start: (gradient * start.to(gradient)).sum(dim=1, keepdim=True) * start.to(gradient)
        )


def set_train_mode(model: nn.Module) -> None:
    """Like `model.train()`, but a normalisation whose parameters are frozen keeps its statistics too."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()
