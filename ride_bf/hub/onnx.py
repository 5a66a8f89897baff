"""A network as an ONNX file, kept only if ONNX Runtime computes what PyTorch does."""

import copy
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from modeling_ride_bf import RideBfForImageClassification

OUTPUTS = ("logits", "expert_logits")
TOLERANCE = 1e-4  # of the largest logit; float32 sums in another order differ by less


class _Logits(nn.Module):
    def __init__(self, model: RideBfForImageClassification):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values)
        return tuple(outputs[name] for name in OUTPUTS)


def export_onnx(model: RideBfForImageClassification, images: Tensor, path: Path) -> float:
    """Writes an ONNX file with a dynamic batch: `pixel_values` (B, 3, height, width) to `OUTPUTS`, all in float32.

    `images` (B, 3, height, width), two or more, say the height and width, and are those on which ONNX Runtime's
    outputs are compared to PyTorch's: all of them, and one alone. Returns the largest difference. Raises ValueError for
    a network with a router, whose experts depend on the image, RuntimeError, keeping no file, for outputs that differ,
    and ModuleNotFoundError, with what to install, without the extras.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"ONNX needs {', '.join(missing)}: pip install -r requirements-extras.txt")
    if model.router is not None:
        raise ValueError("a network with a router runs other experts for other images, which an ONNX file cannot")
    network = _Logits(copy.deepcopy(model).float()).eval()
    torch.onnx.export(
        network,
        (images,),
        path,
        input_names=["pixel_values"],
        output_names=list(OUTPUTS),
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        external_data=False,
        dynamo=True,
        verbose=False,
    )
    difference = max(_difference(network, images, path), _difference(network, images[:1], path))
    with torch.no_grad():
        allowed = TOLERANCE * network(images)[1].abs().max().item()
    if not difference <= allowed:
        path.unlink()
        raise RuntimeError(
            f"ONNX Runtime's logits differ from PyTorch's by {difference:.2g}, more than {allowed:.2g}; no file is kept"
        )
    return difference


@torch.no_grad()
def _difference(network: _Logits, images: Tensor, path: Path) -> float:
    """The largest over all outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    computed = session.run(list(OUTPUTS), {"pixel_values": images.numpy()})
    pairs = zip(network(images), computed, strict=True)
    return max((expected - torch.from_numpy(output)).abs().max().item() for expected, output in pairs)
