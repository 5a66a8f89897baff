"""Temperatures: found where they were put in, chosen by cross-validation, kept in the model, and used by readers."""

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace
from html import escape

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from test_evaluate import save_model
from test_onnx import needs_onnx
from tiny_run import COUNTS, NAMES, write_run
from transformers import AutoConfig, pipeline

from confidence_ride_bf import Confidence
from configuration_ride_bf import RideBfConfig
from data import load_long_tailed
from ride_bf import calibrate, classify, evaluate
from ride_bf.evaluation import confidence as measured
from ride_bf.evaluation import decoupling, routing
from ride_bf.evaluation.calibration import choose_temperatures, fit_temperature, temperature_for_each_class
from ride_bf.evaluation.classify import ImageClassifier
from ride_bf.evaluation.metrics import (
    calibration,
    class_wise_calibration,
    expected_calibration_error,
    shot_groups,
)
from ride_bf.evaluation.results import Predictions, read_results
from ride_bf.hub.card import Published, make_card
from ride_bf.hub.export import export
from ride_bf.hub.licences import Licence
from ride_bf.hub.onnx import export_onnx
from ride_bf.hub.run_files import read_saved_run
from ride_bf.runs.checkpoints import _write_manifest, damage
from ride_bf.runs.models import load_config, load_model

GROUPS = shot_groups([200, 150, 60, 30, 10, 5])
IMAGE = ROOT / "hub_cards" / "examples" / "digit_9.png"


def drawn(images, classes=6, seed=0):
    """Logits (N, C), and labels that are drawn from their softmax: these logits are calibrated."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(temperature):
    logits, labels = drawn(20_000)
    assert fit_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.03)


def test_predictions_that_are_all_right_do_not_make_certain():
    """Of 80 images that are right, the rule of succession expects 81 in 82 of more."""
    labels = torch.arange(10).repeat(8)
    logits = 10 * torch.nn.functional.one_hot(labels).float()
    found = (logits / fit_temperature(logits, labels)).softmax(dim=1).amax(dim=1)
    assert found.mean().item() == pytest.approx(81 / 82, abs=1e-3)


def test_a_group_has_a_temperature_of_its_own_where_that_is_better():
    logits, labels = drawn(6000)
    same = choose_temperatures(2 * logits, labels, GROUPS)
    assert [found.used for found in same.values()] == ["all"] * 4
    assert temperature_for_each_class(same, GROUPS) == same["all"].temperature == pytest.approx(2, rel=0.05)
    few = torch.from_numpy(GROUPS["few"])[logits.argmax(dim=1)]
    chosen = choose_temperatures(torch.where(few[:, None], 3 * logits, logits), labels, GROUPS)
    assert [found.used for found in chosen.values()] == ["all", "none", "none", "own"]
    assert chosen["few"].temperature == pytest.approx(3, rel=0.1)
    assert chosen["many"].temperature == 1
    losses = chosen["few"].losses
    assert losses["own"] < losses["all"] < losses["none"]
    found = temperature_for_each_class(chosen, GROUPS)
    assert found == [chosen[name].temperature for name in ("many", "many", "medium", "medium", "few", "few")]


def test_a_group_that_is_calibrated_does_not_pay_for_the_others():
    """On the digits the temperature of all images made predictions of rare classes too unsure."""
    logits, labels = drawn(600)
    few = torch.from_numpy(GROUPS["few"])[logits.argmax(dim=1)]
    chosen = choose_temperatures(torch.where(few[:, None], logits, 4 * logits), labels, GROUPS)
    assert chosen["all"].used == chosen["many"].used == "all"
    assert chosen["all"].temperature > 1.5
    assert (chosen["few"].used, chosen["few"].temperature) == ("none", 1.0)
    found = temperature_for_each_class(chosen, GROUPS)
    assert found[4:] == [1.0, 1.0]
    assert min(found[:4]) > 1.5


def test_calibrated_logits_are_left_alone_and_few_images_decide_nothing():
    logits, labels = drawn(3000)
    assert choose_temperatures(logits, labels, GROUPS)["all"].temperature == pytest.approx(1, rel=0.05)
    few = choose_temperatures(logits[:30], labels[:30], GROUPS)
    assert not any(found.used == "own" for found in few.values())
    with pytest.raises(ValueError, match="4 images are too few to calibrate on; at least 5"):
        choose_temperatures(logits[:4], labels[:4], GROUPS)


def test_training_images_never_make_a_model_surer():
    logits, labels = drawn(2000)
    confidence, record = measured.calibrate(logits / 2, labels, [200, 150, 60, 30, 10, 5], "train")
    assert confidence.temperature == 1
    said = measured.describe_calibration(record)
    assert "the model was trained on these images" in said
    assert "so the scores stay as they are: they are not calibrated" in said
    assert measured.calibrate(logits / 2, labels, [200] * 6, "validation")[0].temperature == pytest.approx(0.5, rel=0.1)
    with pytest.raises(
        ValueError, match=r"--coverage 0\.9 cannot be promised from training images.*validation_fraction.*val-\*\.tar"
    ):
        measured.calibrate(logits, labels, [200] * 6, "train", coverage=0.9)
    splits = {"train": load_long_tailed("digits_lt")["train"]}
    images, split = measured.calibration_images(splits)
    assert (len(images), split) == (-(-len(splits["train"]) // 5), "train")


def test_probabilities_keep_the_order_and_sum_to_one():
    logits, _ = drawn(50)
    temperatures = [0.5, 1.0, 2.0, 3.0, 4.0, 5.0]
    probabilities = Confidence(temperature=temperatures).probabilities(logits)
    for row, own in zip(logits, probabilities, strict=True):
        torch.testing.assert_close(own, (row / temperatures[row.argmax()]).softmax(dim=0))
        assert row.argsort().tolist() == own.argsort().tolist()
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(50))
    torch.testing.assert_close(Confidence().probabilities(logits), logits.softmax(dim=1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": [1.0, 2.0]}, "temperature has 2 numbers, and the network 5 classes"),
        ({"warmth": 2.0}, r"unknown entries \['warmth'\]"),
        ({"coverage": 0.9}, "coverage and set_thresholds belong together"),
        ({"coverage": 90, "set_thresholds": 0.1}, "coverage must be between 0 and 1, not 90"),
    ],
)
def test_a_confidence_that_cannot_be_is_refused(values, message):
    with pytest.raises(StrictDataclassError) as refused:
        tiny_config(confidence=values)
    assert re.search(message, str(refused.value.__cause__))


def test_the_configuration_keeps_it_and_is_as_before_without(tmp_path):
    assert "confidence" not in tiny_config().to_dict()
    assert tiny_config().custom_pipelines == {}
    config = tiny_config(confidence={"temperature": [1.0, 2.0, 3.0, 4.0, 5.5]})
    config.save_pretrained(tmp_path)
    assert RideBfConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    elsewhere = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert elsewhere.confidence == config.confidence
    assert "image-classification" in elsewhere.custom_pipelines


def test_errors_of_a_group_are_those_of_its_classes():
    logits, labels = drawn(500)
    log_probabilities, labels = logits.log_softmax(dim=1).numpy(), labels.numpy()
    each = [class_wise_calibration(log_probabilities, labels, classes=np.arange(6) == label) for label in range(6)]
    few = class_wise_calibration(log_probabilities, labels, classes=GROUPS["few"])
    everything = class_wise_calibration(log_probabilities, labels)
    for name in few:
        assert few[name] == pytest.approx(np.mean([each[4][name], each[5][name]]))
        assert everything[name] == pytest.approx(np.mean([one[name] for one in each]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model of the digits that is far too sure of itself, in a folder of files whose changes are noticed."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    save_model(folder)
    _write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def calibrated(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    shutil.copytree(plain, folder)
    (folder / "modeling_ride_bf.py").write_text("# of an earlier version\n")
    (folder / "files.json").unlink()
    _write_manifest(folder)
    calibrate.main([str(folder), "--dataset", "digits_lt", "--coverage", "0.8"])
    return folder


def test_the_command_writes_the_configuration_and_changes_no_logits(plain, calibrated, images):
    config, before = load_config(calibrated).to_dict(), load_config(plain).to_dict()
    confidence = config.pop("confidence")
    assert config == before
    assert confidence["coverage"] == 0.8
    record = json.loads((calibrated / "calibration.json").read_text())
    assert (record["split"], record["images"]) == ("validation", 80)
    assert damage(calibrated) is None
    assert (calibrated / "modeling_ride_bf.py").read_bytes() == (ROOT / "modeling_ride_bf.py").read_bytes()
    assert (calibrated / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    with torch.no_grad():
        one, other = (load_model(folder).eval()(images).logits for folder in (plain, calibrated))
    assert torch.equal(one, other)


def test_pipeline_and_classify_give_calibrated_scores(plain, calibrated, capsys):
    found = {
        folder: pipeline("image-classification", model=str(folder), trust_remote_code=True)(
            Image.open(IMAGE).convert("RGB"), top_k=10
        )
        for folder in (plain, calibrated)
    }
    assert [one["label"] for one in found[plain]] == [one["label"] for one in found[calibrated]]
    assert found[plain][0]["score"] != pytest.approx(found[calibrated][0]["score"], abs=0.01)
    answer = ImageClassifier(calibrated).answer(IMAGE, 10)
    assert [one["label"] for one in answer.top] == [one["label"] for one in found[calibrated]]
    for one, other in zip(answer.top, found[calibrated], strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
    assert ImageClassifier(plain).answer(IMAGE, 3).in_set is None
    classify.main([str(calibrated), str(IMAGE)])
    assert f"; 80 % set: {', '.join(answer.in_set)}\n" in capsys.readouterr().out


def test_a_pipeline_applies_what_it_is_told_to_the_logits(plain, calibrated):
    image = Image.open(IMAGE).convert("RGB")
    raw = [
        pipeline("image-classification", model=str(folder), trust_remote_code=True)(image, function_to_apply="softmax")
        for folder in (plain, calibrated)
    ]
    assert raw[0] == raw[1]


def test_the_evaluation_has_the_errors_before_and_after(plain, calibrated, tmp_path, capsys):
    found = {}
    for folder in (plain, calibrated):
        arguments = [
            "--model",
            str(folder),
            "--dataset",
            "digits_lt",
            "--output_dir",
            str(tmp_path / folder.parent.name),
        ]
        evaluate.main(arguments)
        found[folder] = read_results(tmp_path / folder.parent.name)
    assert "confidence" not in found[plain]
    assert "Calibrated</h3>" not in (tmp_path / plain.parent.name / "report.html").read_text()
    assert found[plain]["metrics"] == found[calibrated]["metrics"]
    own = found[calibrated]["confidence"]
    images = Predictions.load(tmp_path / plain.parent.name / "predictions.npz")
    for group, mask in shot_groups(found[plain]["train_class_counts"]).items():
        rows = images.select(mask[images.predictions])  # of the predicted class
        bins = calibration(rows.confidences, rows.predictions == rows.labels)
        assert own["before"][group]["expected_calibration_error"] == expected_calibration_error(bins)
    for name in ("expected_calibration_error", "class_wise_calibration_error", "adaptive_calibration_error"):
        assert own["before"]["all"][name] == found[plain]["metrics"][name]
    assert own["before"]["all"]["loss"] == found[plain]["metrics"]["loss"]
    assert own["after"]["all"]["loss"] < own["before"]["all"]["loss"]
    assert own["after"]["all"]["expected_calibration_error"] < own["before"]["all"]["expected_calibration_error"]
    page = (tmp_path / calibrated.parent.name / "report.html").read_text()
    assert 'id="calibrated"' in page
    assert 'id="sets"' in page
    assert "calibration error" in capsys.readouterr().out


def test_a_change_of_the_logits_forgets_the_calibration(tmp_path):
    model = tiny_model(classifier="linear", confidence={"temperature": 2.0})
    decoupling.correct(model, "logit_adjustment", 0.5, [5, 4, 3, 2, 1])
    assert model.config.confidence is None
    config = tiny_config(router=True, router_top_k=4, confidence={"temperature": 2.0})
    config.save_pretrained(tmp_path)
    routing.set_threshold(config, 0.2, tmp_path)
    assert RideBfConfig.from_pretrained(tmp_path).confidence is None


def test_the_hub_s_cache_is_not_written_into(plain, tmp_path):
    """Its snapshots are links to files that other revisions and commands count on."""
    snapshot, blob = tmp_path / "snapshots" / "abc", tmp_path / "blobs" / "0123"
    shutil.copytree(plain, snapshot)
    blob.parent.mkdir()
    (snapshot / "config.json").rename(blob)
    (snapshot / "config.json").symlink_to(blob)
    before = blob.read_bytes()
    with pytest.raises(SystemExit, match=rf"config\.json is a link to {blob}, .* cp -rL {snapshot} DIR, and name DIR"):
        calibrate.main([str(snapshot), "--dataset", "digits_lt"])
    config = tiny_config(router=True, router_top_k=4)
    with pytest.raises(ValueError, match="is a link to"):
        routing.set_threshold(config, 0.2, snapshot)
    with pytest.raises(ValueError, match="user/model, on the Hub, cannot be changed"):
        routing.set_threshold(config, 0.2, "user/model")
    assert blob.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--coverage", "90"], "--coverage must be between 0 and 1, not 90"),
        (["MODEL", "--coverage_by", "class"], "--coverage_by class cannot act without --coverage"),
    ],
)
def test_options_that_cannot_act_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        calibrate.main(arguments)
    assert message in capsys.readouterr().err


def test_too_much_is_not_promised(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "model")
    with pytest.raises(SystemExit, match=r"80 calibration images cannot promise 99\.9 %, at most 98\.8 %"):
        calibrate.main([str(tmp_path / "model"), "--dataset", "digits_lt", "--coverage", "0.999"])
    with pytest.raises(
        SystemExit, match="user/model, on the Hub, cannot be changed; hf download user/model --local-dir"
    ):
        calibrate.main(["user/model"])
    assert load_config(tmp_path / "model").confidence is None


CONFIDENCE = {
    "temperature": [2.0, 2.0, 3.0, 4.0, 4.0],
    "coverage": 0.9,
    "set_thresholds": [0.1, 0.1, 0.1, 0.0, 0.5],
    "reject_known": 0.05,
    "known_score": "max_logit",
    "known_threshold": 1e6,  # no image reaches it
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A published model that is calibrated, and the probabilities that it must give for `IMAGE`."""
    home = tmp_path_factory.mktemp("published")
    run = write_run(home / "run")
    config = load_config(run)
    config.confidence = CONFIDENCE
    config.save_pretrained(run / "best")
    folder = home / "repository"
    export(read_saved_run(run), folder, "user/name", examples=[IMAGE])
    answer = ImageClassifier(run / "best").answer(IMAGE, 5)
    return folder, answer


def test_the_endpoint_says_what_classify_says(published):
    folder, expected = published
    spec = importlib.util.spec_from_file_location("handler_of_a_calibrated_model", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(str(folder))
    none, *answers = handler({"inputs": IMAGE.read_bytes()})
    assert none == {"label": "none of the classes", "score": 1.0}
    assert [answer["label"] for answer in answers] == [answer["label"] for answer in expected.top]
    for answer, own in zip(answers, expected.top, strict=True):
        assert answer["score"] == pytest.approx(own["score"], abs=1e-5)
    assert [answer["label"] for answer in answers if answer["in_set"]] == expected.in_set
    json.dumps(answers)
    # the set is whole, even with fewer answers; class 3 is in every set
    _, *fewer = handler({"inputs": IMAGE.read_bytes(), "parameters": {"top_k": 1}})
    assert [answer["label"] for answer in fewer] == expected.in_set
    assert NAMES[3] in expected.in_set
    probabilities, experts = handler.classify([IMAGE.read_bytes()])
    logits = handler.model(handler._prepare([IMAGE.read_bytes()], 0, None)).expert_logits[0]
    temperature = CONFIDENCE["temperature"][probabilities[0].argmax()]
    torch.testing.assert_close(experts[0], (logits / temperature).softmax(dim=-1), atol=1e-5, rtol=1e-4)


@pytest.fixture
def page_code(monkeypatch):
    """The modules `page` and `predict` of the demo page."""
    monkeypatch.syspath_prepend(str(ROOT / "hub_cards" / "space"))
    for name in ("page", "predict"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import page
    import predict

    for name in ("page", "predict"):
        monkeypatch.setitem(sys.modules, name, sys.modules[name])  # and removed after the test
    return page, predict


def test_the_page_and_the_card_say_it(published, page_code):
    folder, expected = published
    page, predict = page_code
    model = predict.load(str(folder))
    prediction = model.predict(IMAGE)
    assert [answer.name for answer in prediction.in_set] == expected.in_set
    assert prediction.rejected
    shown = page.result(model, prediction)
    assert "None of the classes: this image looks unlike what the model has learned" in shown
    assert (
        f"In 90 % of cases the true class is in such a set: <b>{', '.join(map(escape, expected.in_set))}</b>" in shown
    )
    assert "It is calibrated" in shown
    card = " ".join((folder / "README.md").read_text().split())
    assert (
        "are calibrated on validation images, and the model gives sets of classes that hold the true one in 90 %"
        in card
    )
    assert "to reject at most 5 % of the images of its own classes. How many images of none of the classes" in card


def with_results(run, **changes):
    """The run with an evaluation of its calibration and of 40 images of no class."""
    run = write_run(run)
    config = load_config(run)
    config.confidence = CONFIDENCE
    config.save_pretrained(run / "best")
    rejected = {"promised": 0.05, "score": "max_logit", "all": 0.04}
    ece = "expected_calibration_error"
    test = json.loads((run / "test_results.json").read_text())["test"]
    results = {
        **{"dataset": "custom", "split": "test", "class_names": NAMES, "train_class_counts": COUNTS},
        "metrics": {**test, ece: 0.234},
        "confidence": {
            "temperature": changes.get("temperature", CONFIDENCE["temperature"]),
            **{"before": {"all": {ece: 0.234}}, "after": {"all": {ece: 0.2679}}, "rejected": rejected},
        },
        "unknown": {
            **{"images": 40, "rejected": 0.025, "score": "max_logit"},
            "scores": {"max_logit": {"all": {"auroc": 0.613}}},
        },
    }
    return replace(read_saved_run(run), results=results, results_name="results.json")


def test_the_card_has_the_errors_before_and_after_and_what_became_of_unknown_images(tmp_path):
    card = make_card(with_results(tmp_path), Published("a/b", Licence("mit"), 1, onnx_size=(24, 24)))
    assert "| Expected calibration error before calibration | 23.4 % |" in card.text
    assert "| Expected calibration error of the calibrated scores | 26.8 % |" in card.text
    (shipped,) = (one.metric_value for one in card.data.eval_results if one.metric_type.endswith("calibration_error"))
    assert shipped == 0.2679
    text = " ".join(card.text.split())
    assert "Of 40 test images of none of the classes, 2.5 % were rejected (AUROC of the score: 61.3 %)" in text
    assert "gives `logits`, `expert_logits` and `probabilities`, checked" in text
    assert "The probabilities are calibrated." in text


def test_the_card_takes_nothing_from_the_evaluation_of_another_calibration(tmp_path):
    card = make_card(with_results(tmp_path, temperature=2.0), Published("a/b", Licence("mit"), 1))
    assert "| Expected calibration error before calibration | 23.4 % |" in card.text
    assert "| Expected calibration error of the calibrated scores | not measured |" in card.text
    assert not any("calibration" in one.metric_type for one in card.data.eval_results)
    assert "61.3" not in card.text


def test_the_card_of_a_model_that_calibration_left_as_it_was(tmp_path):
    saved = with_results(tmp_path)
    saved.config.confidence = {**CONFIDENCE, "temperature": 1.0}
    card = make_card(saved, Published("a/b", Licence("mit"), 1, onnx_size=(24, 24)))
    assert "| Expected calibration error | 23.4 % |" in card.text
    (shipped,) = (one.metric_value for one in card.data.eval_results if one.metric_type.endswith("calibration_error"))
    assert shipped == 0.234
    for claim in ("before calibration", "of the calibrated scores", "probabilities are calibrated"):
        assert claim not in card.text


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_card_of_a_model_that_was_calibrated_on_training_images(tmp_path, temperature):
    saved = with_results(tmp_path)
    saved.config.confidence = {"temperature": temperature, "calibrated_on": "train"}
    text = " ".join(make_card(saved, Published("a/b", None, 1, onnx_size=(24, 24))).text.split())
    assert ("No temperature was better on training images." in text) == (temperature == 1)
    assert ("the scores are calibrated on training images, so they are still too high" in text) == (temperature == 2)
    assert "The probabilities are calibrated" not in text


@pytest.mark.parametrize("temperature", [1.0, [1.0] * len(NAMES)])
def test_without_a_temperature_no_text_says_that_the_model_is_calibrated(tmp_path, page_code, temperature):
    page, predict = page_code
    run = write_run(tmp_path / "run")
    config = load_config(run)
    config.confidence = {**CONFIDENCE, "temperature": temperature}
    config.save_pretrained(run / "best")
    export(read_saved_run(run), tmp_path / "repository", "user/name")
    card = " ".join((tmp_path / "repository/README.md").read_text().split())
    assert "the scores are not calibrated. No temperature was better on validation images. The model gives sets" in card
    assert "are calibrated" not in card
    model = predict.load(str(tmp_path / "repository"))
    assert not model.is_calibrated
    assert "It is not calibrated" in page.result(model, model.predict(IMAGE))


@needs_onnx
def test_an_onnx_file_has_calibrated_probabilities(tmp_path, images):
    model = tiny_model(confidence={"temperature": [2.0, 2.0, 3.0, 4.0, 4.0]}).eval()
    export_onnx(model, images, tmp_path / "model.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    logits, _, probabilities = map(torch.from_numpy, session.run(None, {"pixel_values": images.numpy()}))
    assert [output.name for output in session.get_outputs()] == ["logits", "expert_logits", "probabilities"]
    torch.testing.assert_close(probabilities, model.confidence.probabilities(logits), atol=1e-5, rtol=1e-4)
