"""Ways to run the experts of a network at the same time, or with fewer launches: which of them is worth its code?

The experts of a RIDE network have equal shapes. One after the other, each of them may be too small to fill a GPU, and
each of their kernels is launched from Python. Compared with the network as it is:

- streams: every expert runs on a CUDA stream of its own.
- grouped: the experts are one network, whose convolutions have a group for each expert.
- CUDA graphs: the forward and the backward pass of the whole network are recorded once and replayed.
- compiled: `torch.compile`, as `accelerate launch --dynamo_backend inductor` does it.
- compiled, CUDA graphs: the same with `--dynamo_mode reduce-overhead`.
"""

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn

from modeling_ride_bf import RideBfExpert, RideBfForImageClassification, RideBfOutput, RideBfZeroPadShortcut
from ride_bf.benchmark.measure import precision_name, seconds_in_turns
from ride_bf.benchmark.train import OURS, step_inputs, this_repository
from ride_bf.recipes import TrainingRecipe

STREAMS, GROUPED, GRAPHS = "streams", "grouped", "CUDA graphs"
COMPILED, COMPILED_GRAPHS = "compiled", "compiled, CUDA graphs"


def measure_side_by_side(
    recipe: TrainingRecipe, accelerator: Accelerator, rounds: int, compiled: bool
) -> dict[str, Any]:
    """Measures seconds per step by round of each way. On a CPU, there are only those that need no GPU."""
    device = accelerator.device
    config, counts, batch = step_inputs(recipe, device)
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {OURS: lambda model: model, GROUPED: group_experts}
    if device.type == "cuda":
        ways |= {STREAMS: put_on_streams, GRAPHS: partial(record, batch=batch, accelerator=accelerator)}
    if compiled:
        ways[COMPILED] = torch.compile
    if compiled and device.type == "cuda":
        ways[COMPILED_GRAPHS] = partial(torch.compile, mode="reduce-overhead")
    steps, failed = {}, {}
    for name, wrap in ways.items():
        try:
            step = this_repository(recipe, config, counts, batch, accelerator, wrap).step
            step()
        except Exception as error:  # what cannot run is a result too
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            steps[name] = step
    return {
        "recipe": recipe.name,
        "batch_size": recipe.batch_size,
        "image_size": recipe.image_size,
        "precision": precision_name(accelerator.mixed_precision),
        "seconds_by_round": seconds_in_turns(steps, rounds, device),
        "failed": failed,
    }


class _Slice(nn.Module):
    """Stands for one expert of a grouped network; the first of them computes for all."""

    def __init__(self, whole: "_Grouped", index: int):
        super().__init__()
        self.whole, self.index = whole, index

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.index == 0:
            self.whole.compute(hidden_state)
        return self.whole.features[self.index], []


class _Grouped(nn.Module):
    """Experts as one network with a group of channels for each."""

    def __init__(self, expert: RideBfExpert, number: int):
        super().__init__()
        self.expert, self.number = _widen(copy.deepcopy(expert), number), number
        self.features: tuple[Tensor, ...] = ()

    def compute(self, hidden_state: Tensor) -> None:
        features, _ = self.expert(hidden_state.repeat(1, self.number, 1, 1))
        self.features = features.chunk(self.number, dim=1)


def _widen(module: nn.Module, number: int) -> nn.Module:
    """Puts `number` groups in place of each convolution, with as many times the channels. Returns the module itself."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            wide = nn.Conv2d(
                number * child.in_channels,
                number * child.out_channels,
                child.kernel_size,
                child.stride,
                child.padding,
                groups=number * child.groups,
                bias=child.bias is not None,
            )
        elif isinstance(child, nn.BatchNorm2d):
            wide = nn.BatchNorm2d(number * child.num_features, child.eps, child.momentum)
        elif isinstance(child, RideBfZeroPadShortcut):
            wide = _GroupedShortcut(child, number)
        else:
            wide = _widen(child, number)
        setattr(module, name, wide)
    return module


class _GroupedShortcut(nn.Module):
    """Pads the channels of each group."""

    def __init__(self, shortcut: RideBfZeroPadShortcut, number: int):
        super().__init__()
        self.shortcut, self.number = shortcut, number

    def forward(self, hidden_state: Tensor) -> Tensor:
        return torch.cat([self.shortcut(group) for group in hidden_state.chunk(self.number, dim=1)], dim=1)


def group_experts(model: RideBfForImageClassification) -> RideBfForImageClassification:
    """Replaces the experts by one network with grouped convolutions, with new weights: its speed counts."""
    experts = model.ride_bf.experts
    whole = _Grouped(experts[0], len(experts)).to(memory_format=torch.channels_last)
    model.ride_bf.experts = nn.ModuleList(_Slice(whole, index) for index in range(len(experts)))
    return model


class _OnStream(nn.Module):
    """Runs an expert on a stream of its own. The last one waits for all."""

    def __init__(self, expert: nn.Module, stream: torch.cuda.Stream, waits_for: list[torch.cuda.Stream]):
        super().__init__()
        self.expert, self.stream, self.waits_for = expert, stream, waits_for

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, list[Tensor]]:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = self.expert(hidden_state)
        hidden_state.record_stream(self.stream)
        for stream in self.waits_for:
            current.wait_stream(stream)
        return outputs


def put_on_streams(model: RideBfForImageClassification) -> RideBfForImageClassification:
    """Gives every expert a CUDA stream of its own."""
    experts = model.ride_bf.experts
    streams = [torch.cuda.Stream() for _ in experts]
    waits = [[]] * (len(experts) - 1) + [streams]
    model.ride_bf.experts = nn.ModuleList(map(_OnStream, experts, streams, waits))
    return model


class _Logits(nn.Module):
    """The network with a tuple of tensors for its output, as recording needs it."""

    def __init__(self, model: RideBfForImageClassification):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values)
        streams = (outputs.expert_logits, outputs.batchformer_expert_logits)
        return tuple(logits.float() for logits in streams if logits is not None)


class _Recorded(nn.Module):
    def __init__(self, graphed: nn.Module):
        super().__init__()
        self.graphed = graphed

    def forward(self, pixel_values: Tensor) -> RideBfOutput:
        logits = self.graphed(pixel_values)
        second = logits[1] if len(logits) > 1 else None
        return RideBfOutput(logits=logits[0].mean(dim=1), expert_logits=logits[0], batchformer_expert_logits=second)


def record(model: RideBfForImageClassification, batch: dict[str, Tensor], accelerator: Accelerator) -> nn.Module:
    """Records the network's forward and backward pass as CUDA graphs."""
    network = _Logits(model.to(accelerator.device))
    with accelerator.autocast(AutocastKwargs(cache_enabled=False)):
        graphed = torch.cuda.make_graphed_callables(network, (batch["pixel_values"],))
    return _Recorded(graphed)


def side_by_side_report(results: dict[str, Any]) -> str:
    """The ways as a Markdown table: images/s, and how many times the speed of the network as it is, by round."""
    seconds, size = results["seconds_by_round"], results["image_size"]
    lines = [
        f"{results['recipe']}: {results['batch_size']} images of {size} x {size} pixels a step, {results['precision']}",
        "",
        "| | images/s | against as it is |",
        "| --- | --- | --- |",
    ]
    for name, values in seconds.items():
        ratios = [one / other for one, other in zip(seconds[OURS], values, strict=True)]
        images = results["batch_size"] / statistics.median(values)
        shown = f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {name} | {images:.0f} | {shown} |")
    lines += [f"\n{name} did not run: {error}" for name, error in results["failed"].items()]
    return "\n".join(lines)
