"""Training a part of a network and leaving the rest as it is."""

from torch import nn

# What a later stage of training may learn -> the prefixes of its parameters.
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
    """Learnable weight scaling: of each class's weights only the length learns. Kang et al., 2020, section 4.3.

    With w = f w0, a step of SGD on f moves w along w0 by its gradient's component on w0 times |w0|^2; so does a step
    on w with that gradient, momentum and weight decay included. The scale needs no parameter of its own, and what is
    saved is an ordinary classifier. Raises ValueError for cosine classifiers, which length does not change.
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
