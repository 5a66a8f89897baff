"""Test-time views: the mean logits over several views of an image."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import tiny_model
from test_evaluate import PROCESSOR, run, save_model
from torchvision.transforms.v2.functional import five_crop
from transformers import BitImageProcessor

from data import evaluation_processor, load_long_tailed
from ride_bf.evaluation.results import Predictions
from ride_bf.evaluation.views import VIEWS, MeanOverViews


@pytest.fixture(autouse=True)
def no_precision_of_other_tests():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def seen(folder, name):
    """The views of all test images (V, N, 3, 8, 8), by transformers' own processor."""
    images = [image.convert("RGB") for image in load_long_tailed("digits_lt")["test"]["image"]]
    if name == "flip":
        pixels = PROCESSOR(images, return_tensors="pt")["pixel_values"]
        return torch.stack([pixels, pixels.flip(3)])
    larger = evaluation_processor(32, 32, PROCESSOR.image_mean, PROCESSOR.image_std)
    return torch.stack(five_crop(larger(images, return_tensors="pt")["pixel_values"], [8, 8]))


@pytest.mark.parametrize("name", ["flip", "five_crop"])
def test_the_mean_over_views_is_evaluated(tmp_path, name):
    model = save_model(tmp_path)
    results = run(tmp_path, "--views", name)
    assert results["views"] == name
    with torch.no_grad():
        outputs = [model(view) for view in seen(tmp_path, name)]
    logits = torch.stack([output.logits for output in outputs]).mean(0)
    experts = torch.stack([output.expert_logits for output in outputs]).mean(0)
    predicted = Predictions.load(tmp_path / "predictions.npz")
    assert np.array_equal(predicted.predictions, logits.argmax(1))
    assert np.array_equal(predicted.expert_predictions, experts.argmax(2))
    # the command runs batches of 64 in another memory layout, which rounds differently; the logits are large
    np.testing.assert_allclose(predicted.confidences, logits.softmax(1).amax(1), rtol=1e-4)
    assert name in (tmp_path / "report.html").read_text()
    assert run(tmp_path)["metrics"]["loss"] != results["metrics"]["loss"]


def test_one_view_is_recorded_as_such(tmp_path):
    save_model(tmp_path)
    assert run(tmp_path)["views"] == "centre"
    assert "mean logits of the views" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ten_crop", {}, "no views are called 'ten_crop'; there are centre, flip, five_crop"),
        ("flip", {"router": True}, "views flip cannot be averaged with a router"),
    ],
)
def test_what_cannot_be_averaged_is_refused(tmp_path, name, options, message):
    save_model(tmp_path, **options)
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, "--views", name)


@pytest.mark.parametrize("size", [{"shortest_edge": 40}, {"height": 40, "width": 40}])
def test_a_processor_without_a_crop_is_enlarged_too(size):
    processor = BitImageProcessor(size=size, do_center_crop=False)
    image = np.zeros((50, 50, 3), np.uint8)
    plain = processor(image, return_tensors="pt")["pixel_values"]
    enlarged = VIEWS["five_crop"].processor(processor)(image, return_tensors="pt")["pixel_values"]
    assert [side - 24 for side in enlarged.shape[2:]] == list(plain.shape[2:])
    assert MeanOverViews(tiny_model().eval(), "five_crop")(enlarged).logits.shape == (1, 5)
