"""Cost of a network: parameters and multiply-adds of each part, counted on meta tensors."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from configuration_ride_bf import RideBfConfig
from modeling_ride_bf import RideBfForImageClassification


def multiply_adds(call: Callable[[], object]) -> int:
    """Counts the multiply-adds of matrix products and convolutions while `call` runs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() // 2


def profile(config: RideBfConfig, image_size: int, window: int) -> dict[str, dict[str, int]]:
    """Returns `parameters` and `multiply_adds` for one image, for each part of the network.

    In the BatchFormer, `window` images attend to each other. It costs compute only in training, and is counted for all
    experts together.
    """
    with torch.device("meta"), torch.no_grad():
        model = RideBfForImageClassification(config).eval()
        image = torch.empty(1, config.num_channels, image_size, image_size)
        feature = torch.empty(1, config.feature_size)
        features = torch.empty(window, config.num_experts, config.feature_size)
        logits = torch.empty(1, config.num_labels)
        states, context = model.ride_bf.trunk(image)
    calls: dict[str, Callable[[], object]] = {"trunk": lambda: model.ride_bf.trunk(image)}
    for number, (expert, classifier) in enumerate(zip(model.ride_bf.experts, model.classifiers, strict=True), start=1):
        calls[f"expert {number}"] = lambda expert=expert: expert(states[-1], **context)
        calls[f"classifier {number}"] = lambda classifier=classifier: classifier(feature)
    if model.router is not None:
        decisions = range(config.num_experts - 1)
        calls["router"] = lambda: [model.router(index, feature, logits) for index in decisions]
    if model.batch_module is not None:
        model.batch_module.train()
        calls["BatchFormer"] = lambda: model.batch_module(features)
    parts = {
        name: {"parameters": _parameters(part), "multiply_adds": multiply_adds(calls[name])}
        for name, part in network_parts(model).items()
    }
    if "BatchFormer" in parts:
        parts["BatchFormer"]["multiply_adds"] //= window
    return parts


def network_parts(model: RideBfForImageClassification) -> dict[str, nn.Module]:
    """The parts of a network: trunk, experts and classifiers, and the router and the BatchFormer if it has them."""
    parts: dict[str, nn.Module] = {"trunk": model.ride_bf.trunk}
    for number, (expert, classifier) in enumerate(zip(model.ride_bf.experts, model.classifiers, strict=True), start=1):
        parts |= {f"expert {number}": expert, f"classifier {number}": classifier}
    others = {"router": model.router, "BatchFormer": model.batch_module}
    return parts | {name: part for name, part in others.items() if part is not None}


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def inference_cost(parts: dict[str, dict[str, int]], shares: list[float] | None = None) -> float:
    """Returns the multiply-adds of a prediction.

    With a router, `shares` are the shares of the images that used 1, 2, ... experts. Raises ValueError if there is not
    one share for each expert, or if they do not sum to 1.
    """
    experts = [name for name in parts if name.startswith("expert ")]
    if shares is None:
        shares = [0.0] * (len(experts) - 1) + [1.0]
    if len(shares) != len(experts) or abs(sum(shares) - 1) > 1e-3:
        raise ValueError(f"shares {shares} must be {len(experts)} numbers, one for each expert, that sum to 1")
    cost = float(parts["trunk"]["multiply_adds"])
    router = parts.get("router", {"multiply_adds": 0})["multiply_adds"] / max(1, len(experts) - 1)
    for number in range(1, len(experts) + 1):
        used = sum(shares[number - 1 :])  # share of images that reach this expert
        decides = router if number < len(experts) else 0
        own = parts[f"expert {number}"]["multiply_adds"] + parts[f"classifier {number}"]["multiply_adds"]
        cost += used * (own + decides)
    return cost


def table(parts: dict[str, dict[str, int]], shares: list[float] | None = None) -> str:
    lines = [f"{'part':<16} {'parameters':>14} {'multiply-adds/image':>22}"]
    lines += [f"{name:<16} {cost['parameters']:>14,} {cost['multiply_adds']:>22,}" for name, cost in parts.items()]
    total = sum(cost["parameters"] for name, cost in parts.items() if name != "BatchFormer")
    lines += ["", f"{'a prediction':<16} {total:>14,} {round(inference_cost(parts)):>22,}"]
    if shares is not None:
        shown = ", ".join(f"{100 * share:.1f} %" for share in shares)
        lines.append(f"if {shown} of the images use 1, 2, ... experts: {round(inference_cost(parts, shares)):,}")
    if "BatchFormer" in parts:
        lines.append("The BatchFormer is used in training only.")
    return "\n".join(lines)
