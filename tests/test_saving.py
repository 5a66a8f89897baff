"""A saved model, loaded as a stranger would: another process, another folder, none of this repository on its path."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file

from data import evaluation_processor
from modeling_ride_bf import RideBfForImageClassification, RideBfModel

NAMES = ["airfield", "bar", "canyon", "dam", "eatery"]

STRANGER = """
import json, sys, torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
from PIL import Image

folder, image, result, again = sys.argv[1:]
trusted = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trusted)
model = AutoModelForImageClassification.from_pretrained(folder, **trusted)
base = AutoModel.from_pretrained(folder, **trusted)
pixel_values = AutoImageProcessor.from_pretrained(folder)(Image.open(image), return_tensors="pt")["pixel_values"]
with torch.no_grad():
    logits = model(pixel_values).logits
    features = base(pixel_values).expert_features
answers = pipeline("image-classification", model=folder, **trusted)(image)
model.save_pretrained(again)
second = AutoModelForImageClassification.from_pretrained(again, **trusted)
json.dump(
    {
        "classes": [type(config).__name__, type(model).__name__, type(base).__name__],
        "training": model.training,
        "logits": logits[0].tolist(),
        "features": features[0].tolist(),
        "answers": answers,
        "logits_after_saving_again": second(pixel_values).logits[0].tolist(),
        "ours_on_path": [name for name in ("ride_bf", "modeling_ride_bf") if name in sys.modules],
    },
    open(result, "w"),
)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(
        "bottleneck",
        batchformer="shared_classifier",
        id2label=dict(enumerate(NAMES)),
        label2id={name: label for label, name in enumerate(NAMES)},
    )
    model.train()(torch.randn(8, 3, 24, 24))  # running statistics other than the first ones
    model.eval().save_pretrained(folder)
    processor = evaluation_processor(32, 24, (0.5,) * 3, (0.25,) * 3)
    processor.save_pretrained(folder)
    image = folder.parent / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(image)
    pixel_values = processor(Image.open(image), return_tensors="pt")["pixel_values"]
    return folder, model, image, pixel_values


def test_what_is_saved(saved):
    folder, *_ = saved
    assert {path.name for path in folder.iterdir()} == {
        "backbone_ride_bf.py",
        "confidence_ride_bf.py",
        "config.json",
        "configuration_ride_bf.py",
        "model.safetensors",
        "modeling_ride_bf.py",
        "page_ride_bf.py",
        "preprocessor_config.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}
    assert config["architectures"] == ["RideBfForImageClassification"]
    assert list(config["id2label"].values()) == NAMES


def test_a_stranger_loads_it(saved, tmp_path):
    folder, model, image, pixel_values = saved
    with torch.no_grad():
        expected = model(pixel_values)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    result, again = tmp_path / "result.json", tmp_path / "again"
    subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder), str(image), str(result), str(again)],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    seen = json.loads(result.read_text())
    assert seen["classes"] == ["RideBfConfig", "RideBfForImageClassification", "RideBfModel"]
    assert seen["training"] is False
    assert seen["ours_on_path"] == []
    torch.testing.assert_close(torch.tensor(seen["logits"]), expected.logits[0])
    torch.testing.assert_close(torch.tensor(seen["features"]), expected.expert_features[0])
    torch.testing.assert_close(torch.tensor(seen["logits_after_saving_again"]), expected.logits[0])
    probabilities = expected.logits[0].softmax(dim=0)
    assert [answer["label"] for answer in seen["answers"]] == [NAMES[i] for i in probabilities.argsort(descending=True)]
    assert [answer["score"] for answer in seen["answers"]] == pytest.approx(
        probabilities.sort(descending=True).values.tolist(), abs=1e-5
    )
    assert {path.name for path in again.iterdir()} >= {"modeling_ride_bf.py", "configuration_ride_bf.py"}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-2), (torch.bfloat16, 2e-1)])
def test_precisions(saved, dtype, tolerance):
    folder, model, _, pixel_values = saved
    loaded = RideBfForImageClassification.from_pretrained(folder, dtype=dtype)
    norm = loaded.ride_bf.experts[0].stages[0][0].layers[0].bn
    shortcut = loaded.ride_bf.experts[0].stages[0][0].shortcut.bn
    for statistics in (norm, shortcut):
        assert statistics.running_var.dtype == statistics.weight.dtype == torch.float32
    assert loaded.classifiers[0].weight.dtype == dtype
    with torch.no_grad():
        logits = loaded(pixel_values.to(dtype)).logits
        expected = model(pixel_values).logits
    assert logits.dtype == dtype
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=tolerance * scale)


def test_another_number_of_labels(saved):
    folder, model, *_ = saved
    loaded = RideBfForImageClassification.from_pretrained(folder, num_labels=7, ignore_mismatched_sizes=True)
    assert all(classifier.weight.shape == (7, 32) for classifier in loaded.classifiers)
    torch.testing.assert_close(loaded.classifiers[0].weight.norm(dim=1), torch.ones(7))
    assert len(loaded.config.id2label) == 7
    trunk = model.ride_bf.state_dict()
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in loaded.ride_bf.state_dict().items())


def test_missing_parts_are_initialised_not_left_as_they_lie_in_memory(saved, tmp_path):
    _, model, *_ = saved
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(("batchformer", "ride_bf.experts.1"))}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = RideBfForImageClassification.from_pretrained(tmp_path)
    fresh = loaded.ride_bf.experts[1].stages[0][0].layers[0]
    assert torch.equal(fresh.bn.running_mean, torch.zeros_like(fresh.bn.running_mean))
    assert torch.equal(fresh.bn.running_var, torch.ones_like(fresh.bn.running_var))
    assert 0.5 < fresh.convolution.weight.std().item() / (2 / fresh.convolution.out_channels) ** 0.5 < 1.5
    encoder = loaded.batchformer.layers[0]
    assert torch.equal(encoder.norm1.weight, torch.ones_like(encoder.norm1.weight))
    assert torch.equal(encoder.self_attn.in_proj_bias, torch.zeros_like(encoder.self_attn.in_proj_bias))
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())
    assert torch.equal(loaded.classifiers[0].weight, model.classifiers[0].weight)


def test_base_model_from_a_classifiers_checkpoint(saved):
    folder, model, _, pixel_values = saved
    base, report = RideBfModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    torch.testing.assert_close(base(pixel_values).expert_features, model(pixel_values).expert_features)
