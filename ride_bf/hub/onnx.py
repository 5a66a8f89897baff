"""Exports a network to an ONNX file. The file is kept only if ONNX Runtime and PyTorch agree."""

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configuration_ride_bf import RideBfConfig
from modeling_ride_bf import RideBfForImageClassification

OUTPUTS = ("logits", "expert_logits")
PROBABILITIES = "probabilities"  # a third output of a calibrated model
TOLERANCE = 1e-4  # relative to the largest logit; summing float32 in another order differs by less
_NOTES = {"doc_string", "metadata_props"}


def output_names(config: RideBfConfig) -> tuple[str, ...]:
    """The names of the outputs of a model's ONNX file."""
    return OUTPUTS if config.confidence is None else (*OUTPUTS, PROBABILITIES)


class _Logits(nn.Module):
    def __init__(self, model: RideBfForImageClassification):
        super().__init__()
        self.model = model
        self.confidence = None if model.config.confidence is None else model.confidence
        self.outputs = output_names(model.config)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values)
        logits = tuple(outputs[name] for name in OUTPUTS)
        return logits if self.confidence is None else (*logits, self.confidence.probabilities(outputs.logits))


def export_onnx(model: RideBfForImageClassification, images: Tensor, path: Path) -> float:
    """Writes an ONNX file with a dynamic batch: `pixel_values` (B, 3, height, width) to `OUTPUTS`, all in float32.

    A calibrated model also has `PROBABILITIES` (B, C).

    `images` (B, 3, height, width), with B 2 or more, give the height and width. The outputs of ONNX Runtime and
    PyTorch are compared on all of them and on the first one alone. Returns the largest difference. The file holds the
    network and none of the exporter's notes, which name the folders of this machine.

    Raises ValueError for a network with a router, because its experts depend on the image. Raises RuntimeError and
    keeps no file if the outputs differ. Raises ModuleNotFoundError, with what to install, if a package is missing.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"ONNX needs {', '.join(missing)}: pip install -r requirements-extras.txt")
    if model.router is not None:
        raise ValueError("a network with a router chooses its experts for each image; an ONNX file cannot do that")
    network = _Logits(copy.deepcopy(model).float()).eval()
    if model.config.backbone_config is not None:
        # The exporter cannot take every backbone's fused attention apart. ONNX Runtime fuses it again.
        network.model.set_attn_implementation("eager")
    torch.onnx.export(
        network,
        (images,),
        path,
        input_names=["pixel_values"],
        output_names=list(network.outputs),
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        external_data=False,
        dynamo=True,
        verbose=False,
    )
    _without_notes(path)
    difference = max(_difference(network, images, path), _difference(network, images[:1], path))
    with torch.no_grad():
        allowed = TOLERANCE * network(images)[1].abs().max().item()
    if not difference <= allowed:
        path.unlink()
        raise RuntimeError(
            f"ONNX Runtime's logits differ from PyTorch's by {difference:.2g}, more than {allowed:.2g}; no file is kept"
        )
    return difference


def _without_notes(path: Path) -> None:
    """Removes what torch notes beside each part of the network, such as stack traces with the paths of source files."""
    import onnx

    model = onnx.load(path)
    _strip(model)
    onnx.save(model, path)


def _strip(part: Any) -> None:
    """Clears the notes of a part of an ONNX model and of all parts in it: graphs, nodes, values, functions."""
    for name in _NOTES.intersection(part.DESCRIPTOR.fields_by_name):
        part.ClearField(name)
    for field, value in part.ListFields():
        if field.message_type is not None:
            for inner in value if isinstance(value, Sequence) else [value]:
                _strip(inner)


@torch.no_grad()
def _difference(network: _Logits, images: Tensor, path: Path) -> float:
    """The largest difference over all outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    computed = session.run(list(network.outputs), {"pixel_values": images.numpy()})
    pairs = zip(network(images), computed, strict=True)
    return max((expected - torch.from_numpy(output)).abs().max().item() for expected, output in pairs)
