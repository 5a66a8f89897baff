"""ONNX files: the same logits from ONNX Runtime, or none."""

import importlib.util
import json

import pytest
import torch
from conftest import tiny_model
from tiny_run import write_run
from traces import traces

from ride_bf.hub import onnx as onnx_export
from ride_bf.hub.export import export
from ride_bf.hub.run_files import read_saved_run

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs requirements-extras.txt",
)


def test_without_the_extras_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"onnx, onnxscript, onnxruntime: pip install -r requirements-extras"):
        onnx_export.export_onnx(tiny_model(), torch.randn(2, 3, 24, 24), tmp_path / "model.onnx")


@needs_onnx
def test_a_network_with_a_router_is_refused(tmp_path):
    with pytest.raises(ValueError, match="router"):
        onnx_export.export_onnx(tiny_model(router=True, router_top_k=2), torch.randn(2, 3, 24, 24), tmp_path / "m.onnx")


@needs_onnx
@pytest.mark.parametrize("network", ["cifar", "bottleneck", "resnext"])
def test_any_number_of_images_gives_pytorchs_logits(network, tmp_path):
    import onnxruntime

    model = tiny_model(network)
    model.train()(torch.randn(8, 3, 24, 24))  # running statistics other than the first ones
    model.eval()
    onnx_export.export_onnx(model, torch.randn(2, 3, 24, 24), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [axis.shape[0] for axis in session.get_inputs()] == ["batch"]
    for batch in (1, 3, 7):
        images = torch.randn(batch, 3, 24, 24)
        logits, expert_logits = session.run(["logits", "expert_logits"], {"pixel_values": images.numpy()})
        with torch.no_grad():
            expected = model(images)
        torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(expert_logits), expected.expert_logits, rtol=1e-4, atol=1e-4)


@needs_onnx
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    whole = onnx_export._difference

    def another_network(network, images, path):
        with torch.no_grad():
            network.model.classifiers[0].weight[0].add_(1)
        return whole(network, images, path)

    monkeypatch.setattr(onnx_export, "_difference", another_network)
    with pytest.raises(RuntimeError, match="no file is kept"):
        onnx_export.export_onnx(tiny_model().eval(), torch.randn(2, 3, 24, 24), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_published_with_its_size_on_the_card_and_twice_the_same(tmp_path):
    saved = read_saved_run(write_run(tmp_path / "run"))
    for name in ("first", "second"):
        export(saved, tmp_path / name, "user/name", onnx=True)
    assert traces(tmp_path / "first", tmp_path) == []
    assert b"stack_trace" not in (tmp_path / "first" / "model.onnx").read_bytes()
    assert (tmp_path / "first" / "model.onnx").read_bytes() == (tmp_path / "second" / "model.onnx").read_bytes()
    assert "(any number of images, 3, 24, 24)" in (tmp_path / "first" / "README.md").read_text()
    assert json.loads((tmp_path / "first" / "config.json").read_text())["dtype"] == "float32"
