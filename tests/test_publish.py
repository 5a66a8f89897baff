"""From a run's folder to a page on the Hub, and from there to a stranger's process."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from hub_errors import hub_error
from huggingface_hub import ModelCard
from huggingface_hub.errors import GatedRepoError
from loopback_hub import TOKEN, LoopbackHub
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file
from test_training import train
from tiny_run import COUNTS, NAMES, write_run
from traces import traces

from data import evaluation_processor, load_long_tailed
from modeling_ride_bf import RideBfForImageClassification
from ride_bf import embed
from ride_bf.evaluation.compute import inference_cost, profile
from ride_bf.evaluation.embedding import read_embeddings
from ride_bf.evaluation.results import Predictions, describe_machine, write_results
from ride_bf.hub.card import Published, make_card
from ride_bf.hub.export import check_same_logits, export
from ride_bf.hub.licences import IDENTIFIERS, Licence
from ride_bf.hub.neighbours import NEIGHBOURS, _most_of_a_class
from ride_bf.hub.papers import published_results
from ride_bf.hub.run_files import read_saved_run
from ride_bf.hub.training_facts import _devices, _duration
from ride_bf.hub.upload import PublishError, RunPublisher, published_license
from ride_bf.publish import main as publish_main
from ride_bf.recipes import RECIPES
from ride_bf.runs.environment import web_address
from ride_bf.runs.provenance import describe_data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "image.jpg"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def exported(run, image, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export(read_saved_run(run), folder, "user/name", license=Licence("mit"), examples=[image])
    return folder


def pixel_values(seed=0):
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def test_the_export_has_no_batchformer_and_the_same_logits(run, exported):
    kept = load_file(run / "best" / "model.safetensors")
    published = load_file(exported / "model.safetensors")
    assert set(kept) - set(published) == {name for name in kept if name.startswith("batchformer.")} != set()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in published.items())
    assert json.loads((exported / "config.json").read_text())["batchformer"] == "none"
    whole = RideBfForImageClassification.from_pretrained(run / "best")
    light = RideBfForImageClassification.from_pretrained(exported)
    assert torch.equal(whole(pixel_values()).expert_logits, light(pixel_values()).expert_logits)


def test_an_export_with_other_logits_is_refused(run):
    model = RideBfForImageClassification.from_pretrained(run / "best")
    other = RideBfForImageClassification.from_pretrained(run / "best", batchformer="none")
    with torch.no_grad():
        other.classifiers[1].weight[0] += 0.1
    with pytest.raises(RuntimeError, match="logits of the exported model differ"):
        check_same_logits(model, other, pixel_values())


def test_what_is_published_lists_no_place_of_this_machine(run, exported, image):
    assert {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()} == {
        "LICENSE",
        "README.md",
        "checkpoint.json",
        "class_counts.json",
        "backbone_ride_bf.py",
        "confidence_ride_bf.py",
        "config.json",
        "configuration_ride_bf.py",
        "examples/image.jpg",
        "handler.py",
        "model.safetensors",
        "modeling_ride_bf.py",
        "plots/accuracy_by_class.png",
        "plots/training.png",
        "preprocessor_config.json",
        "recipe.json",
        "page_ride_bf.py",
        "requirements.txt",
        "shown/image.png",
        "test_results.json",
    }
    assert traces(exported, run, image.parent) == []
    assert json.loads((exported / "class_counts.json").read_text()) == {"train": COUNTS}


def test_the_same_export_twice_is_the_same_bytes(run, exported, image, tmp_path):
    export(read_saved_run(run), tmp_path, "user/name", license=Licence("mit"), examples=[image])
    for path in exported.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(exported)).read_bytes(), path


def test_the_cards_metadata_is_the_results(run, exported, image):
    metrics = json.loads((run / "test_results.json").read_text())["test"]
    data = ModelCard.load(exported / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "image-classification")
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        name: round(value, 6) for name, value in metrics.items() if name not in ("loss", "per_class_accuracy")
    }
    assert {(result.dataset_type, result.dataset_split) for result in data.eval_results} == {("imagenet_lt", "test")}
    model = RideBfForImageClassification.from_pretrained(exported)
    pixels = evaluation_processor(24, 24, (0.5,) * 3, (0.25,) * 3)(Image.open(image), return_tensors="pt")
    expected = model(pixels["pixel_values"]).logits[0].softmax(dim=0)
    (example,) = data.widget
    assert example["src"] == "examples/image.jpg"
    for answer in example["output"]:
        assert answer["score"] == pytest.approx(expected[NAMES.index(answer["label"])].item(), abs=1e-5)


def test_every_percentage_on_the_card_is_a_measured_one(run, exported):
    metrics = json.loads((run / "test_results.json").read_text())["test"]
    values = [value for name, value in metrics.items() if isinstance(value, float)] + metrics["per_class_accuracy"]
    card = (exported / "README.md").read_text()
    shown = re.findall(r"\d+\.\d %", card)
    assert len(shown) > 10
    assert set(shown) <= {f"{100 * value:.1f} %" for value in values}


def test_no_number_is_in_two_rows_of_the_tables(exported):
    card = (exported / "README.md").read_text()
    assert card.count("Balanced accuracy (mean over all classes) |") == 1
    assert "| Accuracy over all images |" in card
    assert "| all |" not in card


def test_hardware_and_time_in_words():
    start = {"device": "2 CPU cores", "num_processes": 2}
    assert _devices(start) == "2 CPU cores for 2 processes"
    assert _devices({"device": "NVIDIA H200", "num_processes": 1}) == "1 × NVIDIA H200"
    assert [_duration(seconds) for seconds in (0.3, 1.5, 180)] == ["less than a second", "1.5 seconds", "3.0 minutes"]


def card_of(run, folder, name="best", *, recipe=None, **contents):
    """The card of a copy of the run in `folder`, with another recipe, and with more in `facts` or `settings`."""
    shutil.copytree(run, folder)
    (folder / "best").rename(folder / name)
    if recipe is not None:
        (folder / "recipe.json").write_text(recipe.as_json())
    for path, content in ((folder / name / "checkpoint.json", "facts"), (folder / "run.json", "settings")):
        known = json.loads(path.read_text()) | contents.get(content, {})
        path.write_text(json.dumps({key: value for key, value in known.items() if value is not None}))
    return make_card(read_saved_run(folder / name), Published("user/name", Licence("mit"), 1))


UNCHANGED = RECIPES["imagenet_lt_resnet50"]
PAPERS = "### What the papers report"


def test_the_papers_numbers_stay_apart(run, tmp_path):
    card = card_of(run, tmp_path / "run", recipe=UNCHANGED)
    measured, papers = card.text.split(PAPERS)
    assert "54.1 (many 64.3, medium 51.4, few 35.1)" in papers
    assert "54.1" not in measured
    assert 0.541 not in [result.metric_value for result in card.data.eval_results]


@pytest.mark.parametrize(
    "recipe",
    [
        UNCHANGED.with_overrides(epochs=1),
        UNCHANGED.with_overrides(loss="focal", reweight_epoch=None),
        UNCHANGED.with_overrides(dataset="places_lt"),
        UNCHANGED.with_overrides(num_experts=2),
        RECIPES["places_lt_resnet152"],
    ],
    ids=["epochs", "loss", "data set", "network", "nothing published"],
)
def test_the_papers_report_nothing_of_a_changed_recipe(run, tmp_path, recipe):
    assert PAPERS not in card_of(run, tmp_path / "run", recipe=recipe).text


@pytest.mark.parametrize("settings", [{"teacher": "user/teacher"}, {"validation_fraction": 0.1}])
def test_the_papers_report_nothing_of_another_run_of_the_recipe(run, tmp_path, settings):
    assert PAPERS not in card_of(run, tmp_path / "run", recipe=UNCHANGED, settings=settings).text


@pytest.mark.parametrize(("options", "same"), [({}, True), ({"imbalance_factor": 10}, False)])
def test_the_papers_report_nothing_of_other_images(run, tmp_path, options, same):
    data = data_entry(dataset="cifar100_lt", options={**options, "skip_empty_rows": True})
    card = card_of(run, tmp_path / "run", recipe=RECIPES["cifar100_lt_resnet32"], facts={"data": data})
    assert (PAPERS in card.text) == same
    if same:
        text = " ".join(card.text.split())
        assert "for networks like this one on this data set, in percent" in text
        assert "unless another method is named: RIDE with expert assignment 48.6" in text


def test_every_recipe_says_what_is_published_or_that_nothing_is():
    assert published_results(RECIPES["imagenet_lt_resnet10"].description).startswith("45.7 (many 56.3")
    assert published_results(RECIPES["cifar100_lt_resnet32"].description).startswith("RIDE with expert assignment 48.6")
    for name in ("digits_lt_resnet32", "places_lt_resnet152", "imagenet_lt_resnet50_ride"):
        assert published_results(RECIPES[name].description) is None


def test_how_it_was_trained(exported):
    card = (exported / "README.md").read_text()
    for fact in (
        "5 classes: 391 images, 200 to 2 a class",
        "`imagenet_lt_resnet50`",
        "seed 7",
        "Started from: `stage1`",
        "epoch 3 of 4, chosen for its balanced accuracy on validation images",
        "- Hardware: 2 CPU cores, float32",
        "3.0 minutes",  # of the three epochs up to the checkpoint
        "commit `c0ffee`",
        "2 of its 5 classes had fewer than 20 training images, the rarest 2",
    ):
        assert fact in card, fact


def fact(card, subject):
    """What the section on the training says about a subject; None if it does not have it."""
    found = re.search(rf"^- {subject}: (.*)$", card.text, re.MULTILINE)
    return found and found[1]


@pytest.mark.parametrize(
    ("name", "facts", "said"),
    [
        ("best", {}, "epoch 3 of 4, chosen for its balanced accuracy on validation images"),
        ("last", {"balanced_accuracy": None}, "epoch 3 of 4, the last one saved"),
        ("checkpoints/step-00000012", {"balanced_accuracy": None}, "epoch 3 of 4"),
        ("renamed", {}, "epoch 3, chosen for its balanced accuracy on validation images"),
        (
            "corrected",
            {"balanced_accuracy": None, "correction": {"method": "tau_normalisation", "strength": 1}},
            "epoch 3",
        ),
    ],
)
def test_why_it_is_this_checkpoint(run, tmp_path, name, facts, said):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    shutil.copytree(run, tmp_path / "run", dirs_exist_ok=True)
    assert fact(card_of(tmp_path / "run", tmp_path / "copy", name, facts=facts), "Checkpoint") == said


@pytest.mark.parametrize(
    ("epoch", "time"),
    [
        (3, "3.0 minutes for the epochs up to this checkpoint, without evaluation"),
        (2.5, "2.0 minutes for the whole epochs before this checkpoint, without evaluation"),
        (0.5, None),
    ],
)
def test_the_time_is_that_of_whole_epochs(run, tmp_path, epoch, time):
    assert fact(card_of(run, tmp_path / "run", facts={"epoch": epoch}), "Time") == time


def test_what_was_trained_of_a_model_with_a_router(run, tmp_path):
    parameters = {"parameters": {"all": 1000, "trained": 10}}
    card = card_of(run, tmp_path / "run", recipe=RECIPES["imagenet_lt_resnet50_router"], facts=parameters)
    assert "loss `" not in card.text
    assert fact(card, "BatchFormer") is None, "there was none"
    trained = "only the routers, by binary cross-entropy, to tell whether a later expert is needed"
    assert fact(card, "Trained") == f"{trained}; 10 of 1,000 parameters (1.0 %)"
    assert "loss `ride`" in fact(card_of(run, tmp_path / "other", recipe=UNCHANGED), "Schedule")
    assert fact(card_of(run, tmp_path / "third", recipe=UNCHANGED), "BatchFormer") == "`insert`, only in training"


@pytest.mark.parametrize("router", [True, False])
def test_the_experts_of_a_router_are_measured_on_other_images(run, tmp_path, router):
    saved = read_saved_run(run)
    results = saved.results | {"experts": {"each": [{"accuracy": 0.5}] * 3}}
    config = type(saved.config).from_dict(saved.config.to_dict() | {"router": router, "router_top_k": 4})
    text = make_card(replace(saved, config=config, results=results), Published("a/b", Licence("mit"), 1)).text
    assert ("With a router, each expert is measured on the images that reached it" in text) == router
    assert ("Accuracy over these images, as the mean" in text) == router


def test_images_that_the_run_could_not_read_are_counted(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    lines = "a.png cannot be read: it is empty\n", "b.png cannot be read: it is empty\n"
    (tmp_path / "run/broken_images.txt").write_text("".join((*lines, lines[0])))  # the first one in two epochs
    card = card_of(tmp_path / "run", tmp_path / "copy")
    said = "2 images that the run could not read, in all splits; the counts of training images include them"
    assert fact(card, "Left out") == said
    assert "a.png" not in card.text
    assert fact(card_of(run, tmp_path / "whole"), "Left out") is None


def test_a_backbone_of_timm_needs_timm(run, tmp_path):
    published = Published("a/b", None, 1, oldest_transformers="5.17", oldest_timm="1.0.22")
    text = make_card(read_saved_run(run), published).text
    assert "It needs PyTorch, Transformers 5.17 or newer and timm 1.0.22 or newer." in text


def test_other_images_are_not_called_the_authors_own(run, tmp_path):
    own_images(run, tmp_path / "run", "someone/leaves")
    saved = read_saved_run(tmp_path / "run")
    results = saved.results | {"dataset": "custom", "other_images": True}
    card = make_card(replace(saved, results=results), Published("a/b", Licence("mit"), 1))
    assert "On the test split of other images of the same classes, another data set than the model" in card.text
    assert "own images" not in card.text
    assert {result.dataset_name for result in card.data.eval_results} == {"other images of the same classes"}


def test_what_the_images_are_and_what_a_prediction_costs(exported, image):
    card = ModelCard.load(exported / "README.md")
    model = RideBfForImageClassification.from_pretrained(exported)
    cost = inference_cost(profile(model.config, 24, 1))
    assert "What the images show: Photographs from the web" in card.text
    assert "Image size: 24 x 24 pixels" in card.text
    assert f"Multiply-adds of a prediction: {round(cost):,}\n" in card.text
    assert "needs PyTorch and Transformers 5.4 or newer" in card.text
    (picture,) = re.findall(r"!\[image\.jpg, which the model calls .+?\]\((shown/image\.png)\)", card.text)
    small, enlarged = Image.open(image).convert("RGB"), Image.open(exported / picture).convert("RGB")
    assert enlarged.size == (120, 90)
    assert enlarged.resize(small.size, Image.Resampling.NEAREST).tobytes() == small.tobytes()
    assert not re.search(r"!\[\]", card.text)


def data_entry(dataset="custom", data_dir=None, options=None, drawn=False):
    """What `checkpoint.json` says of the data."""
    counts = dict(zip(("train_class_counts", "class_names"), (COUNTS, NAMES), strict=True))
    splits = {"train": {"images": sum(COUNTS), "digest": "0"}, "test": {"images": 50, "digest": "1", "drawn": drawn}}
    return {"dataset": dataset, "data_dir": data_dir, "options": options or {}, "splits": splits, **counts}


def own_images(run, folder, data_dir, drawn=False, **published):
    """The card of a run on images of the user's own."""
    shutil.copytree(run, folder)
    data = data_entry(data_dir=data_dir, drawn=drawn)
    (folder / "best" / "checkpoint.json").write_text(json.dumps({"epoch": 3, "data": data}))
    recipe = json.loads((folder / "recipe.json").read_text()) | {"dataset": "custom"}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return make_card(read_saved_run(folder), Published("user/name", Licence("mit"), 1, **published))


def test_own_images_are_described_by_their_author_or_not_at_all(run, tmp_path):
    card = own_images(run, tmp_path / "a", str(tmp_path))
    assert "What the images show: not described yet" in card.text
    assert str(tmp_path) not in str(card)
    assert card.data.datasets is None
    assert "- Trained on: the author's own images\n" in card.text
    card = own_images(run, tmp_path / "b", str(tmp_path), data_description="Leaves of trees, from above.")
    assert "What the images show: Leaves of trees, from above." in card.text
    for text in (card.text, str(card.data)):
        assert "a data set of its own" not in text


@pytest.mark.parametrize("drawn", [True, False])
def test_the_card_says_that_the_test_split_was_drawn(run, tmp_path, drawn):
    card = own_images(run, tmp_path / "run", str(tmp_path), drawn=drawn)
    assert (
        "This split was drawn at random, class by class, from the same images as the training" in card.text
    ) == drawn


@pytest.mark.parametrize("place", ["hf:someone/leaves", "someone/leaves"])
def test_a_data_set_of_the_hub_is_linked(run, tmp_path, place):
    card = own_images(run, tmp_path / "run", place)
    link = "[someone/leaves](https://huggingface.co/datasets/someone/leaves)"
    assert f"Trained on: {link}" in card.text
    assert f"What the images show: The card of {link} describes them." in card.text
    assert card.data.datasets == ["someone/leaves"]
    assert {(result.dataset_type, result.dataset_name) for result in card.data.eval_results} == {
        ("someone/leaves",) * 2
    }


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://user:token@github.com/a/b.git", "https://github.com/a/b"),
        ("git@gitlab.com:group/a/b.git", "https://gitlab.com/group/a/b"),
        ("ssh://git@codeberg.org:22/a/b", "https://codeberg.org/a/b"),
        ("/home/user/b.git", None),
        ("../b", None),
        ("file:///home/user/b", None),
        ("", None),
    ],
)
def test_the_source_of_the_code_is_an_address_without_secrets(remote, address):
    assert web_address(remote) == address


def test_class_names_break_neither_tables_nor_the_page(exported):
    card = (exported / "README.md").read_text().split("---\n", 2)[2]
    assert "<b>bar" not in card
    assert "| air\\|field | 200 |" in card


def test_without_results_the_card_has_no_numbers(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "test_results.json").unlink()
    saved = read_saved_run(tmp_path / "run")
    card = make_card(saved, Published("user/name", Licence("mit"), 1))
    assert card.data.eval_results is None
    assert not re.search(r"\d %", card.text)
    assert "has not been evaluated" in card.text


def test_a_whole_evaluation_is_shown_with_its_intervals_and_report(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    truth, rng = np.repeat(np.arange(5), 10), np.random.default_rng(3)
    images = Predictions(
        labels=truth,
        predictions=np.where(rng.random(50) < 0.7, truth, 0),
        label_ranks=rng.integers(0, 5, 50),
        confidences=rng.random(50),
        losses=rng.random(50),
        expert_predictions=rng.integers(0, 5, (50, 3)),
    )
    facts = {"dataset": "places_lt", "split": "test", "class_names": NAMES, "dataset_options": {}}
    facts |= {
        "model": str(tmp_path / "run" / "best"),
        "images_digest": "",
        "machine": describe_machine(torch.device("cpu")),
    }
    speed = {"images_per_second": 1.0, "seconds": 1.0, "batch_size": 1, "num_processes": 1, "num_workers": 0}
    facts["speed"] = {**speed, "mixed_precision": "no"}
    results = write_results(tmp_path / "run" / "best", facts, images, COUNTS)
    export(read_saved_run(tmp_path / "run"), tmp_path / "out", "user/name")

    card = ModelCard.load(tmp_path / "out" / "README.md")
    shown = {result.metric_type: result.metric_value for result in card.data.eval_results}
    for name in ("few_shot_accuracy", "expected_calibration_error"):
        assert shown[name] == round(results["metrics"][name], 6)
    low, high = results["confidence_intervals"]["few_shot_accuracy"]
    accuracy = results["metrics"]["few_shot_accuracy"]
    assert f"| {100 * accuracy:.1f} % ({100 * low:.1f} to {100 * high:.1f}) |" in card.text
    third = results["experts"]["each"][2]
    assert f"| 3 | {100 * third['accuracy']:.1f} % | {100 * third['balanced_accuracy']:.1f} % |" in card.text
    pictures = re.findall(r"\]\((plots/.*?)\)", card.text)
    assert len(pictures) == 4
    assert all((tmp_path / "out" / picture).is_file() for picture in pictures)
    assert "user/name" in (tmp_path / "out" / "report.html").read_text()
    assert traces(tmp_path / "out", tmp_path) == []


def test_traces_are_found_in_text_in_pictures_and_in_archives(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", place=np.array(str(ROOT).encode()))
    note = PngInfo()
    note.add_text("made in", str(tmp_path), zip=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "b.png", pnginfo=note)
    (tmp_path / "c.txt").write_text(str(tmp_path))
    found = {trace.partition(":")[0] for trace in traces(tmp_path, tmp_path)}
    assert found == {"a.npz", "b.png", "c.txt"}


def test_a_checkpoint_alone_is_enough(run, tmp_path):
    shutil.copytree(run / "best", tmp_path / "elsewhere")
    saved = read_saved_run(tmp_path / "elsewhere")
    export(saved, tmp_path / "out", "user/name", keep_batchformer=True)
    assert json.loads((tmp_path / "out" / "class_counts.json").read_text()) == {"train": COUNTS}
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(run / "best" / "model.safetensors").keys()
    )
    assert "came without the files of its run" not in (tmp_path / "out" / "README.md").read_text()  # the epoch is known


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: shutil.rmtree(run / "best"), "holds no model"),
        (lambda run: (run / "metrics.jsonl").write_text('{"epoch": 1'), "metrics.jsonl is damaged"),
        (lambda run: (run / "best" / "checkpoint.json").write_text("{"), "checkpoint.json is damaged"),
        (lambda run: (run / "best" / "results.json").write_text('{"format_version": 0}'), "has format_version 0"),
    ],
)
def test_damaged_runs_are_named(run, tmp_path, break_it, message):
    shutil.copytree(run, tmp_path / "run")
    break_it(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        read_saved_run(tmp_path / "run")


def test_results_of_another_model_or_checkpoint_are_not_shown(tmp_path):
    write_run(tmp_path / "other", class_names=["a", "b", "c", "d", "e"])
    with pytest.raises(ValueError, match="of other classes"):
        read_saved_run(tmp_path / "other")
    write_run(tmp_path / "last", checkpoint="last")
    assert read_saved_run(tmp_path / "last").results is None


def test_examples_must_be_images_with_names_of_their_own(image, tmp_path):
    run = write_run(tmp_path / "run")
    saved = read_saved_run(run)
    with pytest.raises(ValueError, match="is no image of a known format; name another with --examples"):
        export(saved, tmp_path / "a", "user/name", examples=[run / "recipe.json"])
    with pytest.raises(ValueError, match=r"several called image\.jpg"):
        export(saved, tmp_path / "b", "user/name", examples=[image, image])
    (run / "best" / "checkpoint.json").write_text(json.dumps({"data": data_entry() | {"max_image_pixels": 100}}))
    with pytest.raises(ValueError, match="pixels, and at most 100 are read; name another with --examples"):
        export(read_saved_run(run), tmp_path / "c", "user/name", examples=[image])


IMPOSSIBLE = ("name", "a/b/c", "user/na me", "user/", "-/x", "user/a--b", "user/name.git", "user/.name", "user/café")


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A run on photographs with metadata, of which one breaks after they were embedded: its folder and theirs."""
    place = tmp_path_factory.mktemp("own")
    names, rng = ["ant", "bee", "cicada", "dragonfly", "earwig"], np.random.default_rng(3)
    exif = Image.Exif()
    exif[0x010E] = "taken by Sekretarius"
    for split in ("train", "test"):
        for number, name in enumerate(names):
            for index in range(6 - number if split == "train" else 1):
                path = place / "photographs" / split / name / f"{name}_{index}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                colours = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
                Image.fromarray(colours).resize((200, 150)).save(path, exif=exif, comment="taken by Sekretarius")
    folder = write_run(place / "run", names=names)
    data = describe_data(load_long_tailed("custom", place / "photographs"), "custom", place / "photographs")
    facts = {"epoch": 3, "data": data.as_dict(), "train_class_counts": data.train_class_counts}
    (folder / "best" / "checkpoint.json").write_text(json.dumps(facts))
    (folder / "test_results.json").unlink()
    embed.main([str(folder)])
    (place / "photographs/train/bee/bee_2.jpg").write_bytes(b"broken by Sekretarius")
    return folder, place / "photographs"


def published_neighbours(folder):
    tensors = load_file(folder / NEIGHBOURS)
    pictures = np.split(tensors["pictures"].numpy(), tensors["picture_ends"].tolist()[:-1])
    return tensors["features"], tensors["labels"].tolist(), [picture.tobytes() for picture in pictures]


def dry_run(run, folder, *more):
    return [str(run), "--repo_id", "user/name", "--dry_run", "--output_dir", str(folder), *more]


@pytest.fixture(scope="module")
def without_and_with(own_run, tmp_path_factory):
    """The files that are published without training images and with them, and what the command says of the latter."""
    place = tmp_path_factory.mktemp("published")
    publish_main(dry_run(own_run[0], place / "bare"))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        publish_main(dry_run(own_run[0], place / "shown", "--publish_neighbours"))
    return place / "bare", place / "shown", said.getvalue()


class TestTrainingImages:
    def test_they_stay_here_unless_asked_for(self, own_run, without_and_with):
        run, place = own_run
        bare, shown, said = without_and_with
        assert said.count(f"  {NEIGHBOURS}\n") == 1
        assert f"{NEIGHBOURS} has small copies of 19 of the 20 training images, at most 50 a class" in said
        assert "1 cannot be read and were left out" in said
        *_, pictures = published_neighbours(shown)
        photographs = [path.read_bytes() for path in place.rglob("*.jpg")]
        for path in (path for path in bare.rglob("*") if path.is_file()):
            content = path.read_bytes()
            assert not any(other in content for other in (*pictures, *photographs)), path
            other = (shown / path.relative_to(bare)).read_bytes()
            assert path.name == "README.md" or content == other, path  # the option changes no other file
        assert not (bare / NEIGHBOURS).exists()
        for folder in (bare, shown):
            assert traces(folder, run, place) == []
            for path in folder.rglob("*.*"):
                assert not path.is_file() or not re.search(rb"Sekretarius|bee_\d", path.read_bytes()), path
        cards = [(folder / "README.md").read_text() for folder in (bare, shown)]
        assert "raining images]" not in cards[0]
        assert NEIGHBOURS not in cards[0]
        assert "has small copies of 19 of the 20 training images, at most 50 a class and 96 pixels a\nside" in cards[1]

    def test_they_are_those_of_the_embeddings(self, own_run, without_and_with):
        run, place = own_run
        features, labels, pictures = published_neighbours(without_and_with[1])
        assert sorted(labels) == [0] * 6 + [1] * 4 + [2] * 4 + [3] * 3 + [4] * 2
        split = load_long_tailed("custom", place)["train"]
        embedded = read_embeddings(run / "best" / "embeddings.parquet", "train")
        assert features.dtype == torch.float16
        seen = set()
        for feature, label, content in zip(features, labels, pictures, strict=True):
            place_of = int((embedded.features @ feature.float().numpy()).argmax())
            np.testing.assert_allclose(feature, embedded.features[place_of], atol=1e-3)
            assert embedded.labels[place_of] == split.features["label"].int2str(label)
            picture = Image.open(io.BytesIO(content))
            assert (picture.format, picture.size) == ("JPEG", (96, 72))
            assert set(picture.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
            expected = split[int(embedded.rows[place_of])]["image"].resize((96, 72))
            assert np.abs(np.asarray(picture, dtype=int) - np.asarray(expected, dtype=int)).mean() < 10
            seen.add(place_of)
        assert len(seen) == 19

    def test_few_of_a_class_and_always_the_same(self, own_run, tmp_path, monkeypatch):
        monkeypatch.setattr("ride_bf.hub.neighbours._MOST_OF_A_CLASS", 3)
        for name in ("one", "two"):
            publish_main(dry_run(own_run[0], tmp_path / name, "--publish_neighbours"))
        assert (tmp_path / "one" / NEIGHBOURS).read_bytes() == (tmp_path / "two" / NEIGHBOURS).read_bytes()
        labels = published_neighbours(tmp_path / "one")[1]
        assert np.bincount(labels).tolist() == [3, 3, 3, 3, 2]

    @pytest.mark.parametrize(("most", "expected"), [(10_000, 50), (122, 50), (121, 49), (42, 13), (3, 1)])
    def test_the_file_stays_small(self, most, expected):
        assert _most_of_a_class([500, 60, 20, 2], most) == expected

    def test_what_is_missing_is_named(self, own_run, run, tmp_path):
        options = dry_run(run, tmp_path / "out", "--publish_neighbours")
        with pytest.raises(
            SystemExit, match=r"embeddings.parquet does not exist; python -m ride_bf.embed .*/best writes"
        ):
            publish_main(options)
        with pytest.raises(SystemExit, match="2"):
            publish_main(dry_run(run, tmp_path / "out", "--data_dir", str(tmp_path)))
        moved = shutil.copytree(own_run[0], tmp_path / "moved")
        facts = json.loads((moved / "best" / "checkpoint.json").read_text())
        facts["data"]["data_dir"] = str(tmp_path / "gone")
        (moved / "best" / "checkpoint.json").write_text(json.dumps(facts))
        with pytest.raises(SystemExit, match=r"which are not there: .* give their new place with --data_dir"):
            publish_main(dry_run(moved, tmp_path / "a", "--publish_neighbours"))
        publish_main(dry_run(moved, tmp_path / "b", "--publish_neighbours", "--data_dir", str(own_run[1])))
        assert len(published_neighbours(tmp_path / "b")[1]) == 19

    def test_a_copy_of_the_model_has_none(self, without_and_with, tmp_path):
        bare, shown, _ = without_and_with
        RideBfForImageClassification.from_pretrained(shown).save_pretrained(tmp_path / "copy")
        assert not (tmp_path / "copy" / NEIGHBOURS).exists()
        assert (tmp_path / "copy" / "README.md").read_text() == (bare / "README.md").read_text()

    def test_a_later_publication_without_them_deletes_them(self, own_run, hub, publish):
        code, output = publish(own_run[0], "--repo_id", "user/shown-images", "--publish_neighbours")
        assert code == 0, output
        assert NEIGHBOURS in hub.repositories["user/shown-images"].files
        assert "Deleted" not in output
        code, output = publish(own_run[0], "--repo_id", "user/shown-images")
        assert code == 0, output
        assert NEIGHBOURS not in hub.repositories["user/shown-images"].files
        assert f"Deleted from user/shown-images, because this export does not have them: {NEIGHBOURS}\n" in output
        assert "Earlier commits still have" in output
        assert "HfApi().super_squash_history('user/shown-images')" in output
        assert output.splitlines()[-1].startswith("Published: ")


@pytest.mark.parametrize("option", ["--repo_id", "--space"])
@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("repo_id", IMPOSSIBLE)
def test_impossible_names_are_refused_before_anything_is_written(repo_id, dry, option, run, tmp_path):
    names = {"--repo_id": "user/name", option: repo_id}
    arguments = [f"{name}={value}" for name, value in names.items()] + ["--dry_run"] * dry
    with pytest.raises(SystemExit, match=f"error: {option} .*USER/NAME"):
        publish_main([str(run), *arguments, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
@pytest.mark.parametrize("repo_id", IMPOSSIBLE)
def test_training_refuses_impossible_names(repo_id, dry, tmp_path, monkeypatch):
    monkeypatch.setattr("ride_bf.hub.upload.get_token", lambda: TOKEN)
    with pytest.raises(SystemExit, match=r"error: --push_to_hub .*USER/NAME"):
        train(tmp_path / "out", f"--push_to_hub={repo_id}", *dry)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("repo_id", ["user/name", "user/name.v2", "user.name/resnet_1.0-b"])
def test_possible_names(repo_id, monkeypatch, tmp_path):
    monkeypatch.setattr("ride_bf.hub.upload.get_token", lambda: TOKEN)
    assert RunPublisher(tmp_path, repo_id, "mit", None, False, True).repo_id == repo_id


def test_a_run_that_could_not_publish_stops_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("ride_bf.hub.upload.get_token", lambda: None)
    with pytest.raises(ValueError, match="hf auth login"):
        RunPublisher(tmp_path, "user/name", "mit", None, False, True)
    with pytest.raises(ValueError, match="push_to_hub"):
        RunPublisher(tmp_path, None, None, 3, False, True)
    monkeypatch.setattr("ride_bf.hub.upload.get_token", lambda: TOKEN)
    with pytest.raises(ValueError, match="push_every must be"):
        RunPublisher(tmp_path, "user/name", "mit", 0, False, True)
    with pytest.raises(ValueError, match="needs --push_license"):
        RunPublisher(tmp_path, "user/name", None, None, False, True)
    for license, problem in (("other", "--push_license other has no name"), ("foo", "--push_license: the Hub knows")):
        with pytest.raises(ValueError, match=f"{problem}.* publish the finished run: python -m ride_bf.publish RUN"):
            RunPublisher(tmp_path, "user/name", license, None, False, True)


def test_a_push_takes_the_list_of_broken_images_along(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/broken_images.txt").write_text("a.png cannot be read: it is empty\n")
    monkeypatch.setattr("ride_bf.hub.upload.get_token", lambda: TOKEN)
    publisher = RunPublisher(tmp_path / "run", "user/name", "mit", 1, False, True)
    monkeypatch.setattr("ride_bf.hub.upload.subprocess.Popen", lambda *arguments, **options: None)
    publisher.after_epoch(1)
    assert read_saved_run(publisher.copy).broken_images == 1


# With a Hub. huggingface_hub reads its endpoint when it is imported: whoever is to see this one has its own process.

PUBLISHER = """
import contextlib, io, json, sys, time

time.sleep = lambda seconds: None  # between one try of the client and the next
from ride_bf.publish import main

for line in sys.stdin:
    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main(json.loads(line))
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, output.getvalue()]), flush=True)
"""

STRANGER = """
import json, sys, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

image, result = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained("user/name", trust_remote_code=True)
pixel_values = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
answers = pipeline("image-classification", model="user/name", trust_remote_code=True)(image)
from huggingface_hub import ModelCard
card = ModelCard.load("user/name")
exec(card.text.split("```python")[1].split("```")[0].replace("image.jpg", image))
json.dump(
    {
        "logits": model(pixel_values).logits.tolist(),
        "answers": answers,
        "card": card.data.to_dict(),
        "ours": [name for name in ("ride_bf", "modeling_ride_bf") if name in sys.modules],
    },
    open(result, "w"),
)
"""


def environment(hub, home, **options):
    """That of a process which knows this Hub and, of this repository, nothing."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    return {**kept, **hub.environment(home, **options)}


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as started:
        yield started


@pytest.fixture(scope="module")
def publish(hub, tmp_path_factory):
    """`python -m ride_bf.publish` with some arguments: exit code and output."""
    process = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=environment(hub, tmp_path_factory.mktemp("publisher")),
    )

    def call(*arguments, license="mit"):
        hub.requests.clear()
        arguments += () if license is None or "--license" in arguments else ("--license", license)
        process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        process.stdin.flush()
        code, output = json.loads(process.stdout.readline())
        assert TOKEN not in output
        assert TOKEN not in str(code)
        return code, output

    yield call
    process.stdin.close()
    process.wait()


def test_published_and_loaded_by_a_stranger(run, image, hub, publish, tmp_path):
    code, output = publish(run, "--repo_id", "user/name", "--examples", image)
    assert code == 0, output
    assert len([path for method, path in hub.requests if "/commit/" in path]) == 1
    files = hub.repositories["user/name"].files
    assert {"README.md", "model.safetensors", "handler.py", "examples/image.jpg"} <= set(files)
    assert not any(TOKEN.encode() in content for content in files.values())

    result = tmp_path / "result.json"
    stranger = subprocess.run(
        [sys.executable, "-c", STRANGER, str(image), str(result)],
        cwd=tmp_path,
        env=environment(hub, tmp_path / "home", token=None),
        check=True,
        capture_output=True,
        text=True,
    )
    seen = json.loads(result.read_text())
    assert seen["ours"] == []
    model = RideBfForImageClassification.from_pretrained(run / "best").eval()
    expected = model(pixel_values()).logits
    torch.testing.assert_close(torch.tensor(seen["logits"]), expected)
    assert seen["answers"][0]["label"] in NAMES
    assert [line.rsplit(" ", 1)[0] for line in stranger.stdout.splitlines()] == [
        answer["label"] for answer in seen["answers"][:3]
    ]  # the card's own five lines
    metrics = json.loads((run / "test_results.json").read_text())["test"]
    (index,) = seen["card"]["model-index"]
    values = {metric["type"]: metric["value"] for metric in index["results"][0]["metrics"]}
    assert values["few_shot_accuracy"] == round(metrics["few_shot_accuracy"], 6)
    assert seen["card"]["pipeline_tag"] == "image-classification"

    code, output = publish(run, "--repo_id", "user/name", "--examples", image)
    assert (code, hub.uploads()) == (0, [])


PUSHER = """
import sys, torch
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("user/name", trust_remote_code=True)
model.push_to_hub("other/same")
with torch.no_grad():
    model.classifiers[0].weight[0, 0] += 1
model.push_to_hub("other/changed")
model.push_to_hub("other/changed")
model.save_pretrained(f"{sys.argv[1]}/saved", push_to_hub=True, repo_id="other/saved")
assert "ride_bf" not in sys.modules
"""


def check_card_of_changed(text, place):
    card = ModelCard(text)
    assert (card.data.license, card.data.base_model) == ("mit", "user/name")
    assert "has not been measured" in card.text
    assert "%" not in card.text
    assert str(place) not in card.content


def test_a_model_that_is_pushed_again_has_a_card_that_is_true(run, image, hub, publish, tmp_path):
    code, output = publish(run, "--repo_id", "user/name", "--examples", image)
    assert code == 0, output
    files = hub.repositories["user/name"].files
    subprocess.run(
        [sys.executable, "-c", PUSHER, str(tmp_path)],
        cwd=tmp_path,
        env=environment(hub, tmp_path / "home"),
        check=True,
        capture_output=True,
    )
    same = hub.repositories["other/same"].files
    assert same["README.md"].decode() == files["README.md"].decode().replace('model="user/name"', 'model="other/same"')
    assert set(same) - {".gitattributes"} == set(files) - {".gitattributes"}
    anew = {"README.md", "config.json", "model.safetensors"}
    assert all(same[name] == content for name, content in files.items() if name not in anew)
    for name in ("changed", "saved"):
        changed = hub.repositories[f"other/{name}"].files
        check_card_of_changed(changed["README.md"].decode(), tmp_path)
        assert {"handler.py", "LICENSE", "requirements.txt"} <= set(changed)
        assert not {name for name in changed if name.endswith((".png", ".jpg", "results.json", "report.html"))}


def test_a_copy_keeps_its_card_and_no_files_of_others(exported, tmp_path):
    clone = shutil.copytree(exported, tmp_path / "clone")
    for name, content in {
        "examples/mine.png": b"",
        "notes.txt": b"",
        "report.html": b"data:image/jpeg;base64,",
    }.items():
        (clone / name).write_bytes(content)
    model = RideBfForImageClassification.from_pretrained(clone)
    model.half().save_pretrained(tmp_path / "same")
    saved = {path.relative_to(tmp_path / "same") for path in (tmp_path / "same").rglob("*") if path.is_file()}
    assert saved == {path.relative_to(exported) for path in exported.rglob("*") if path.is_file()}
    assert (tmp_path / "same" / "README.md").read_text() == (exported / "README.md").read_text()
    model.config.id2label = {**model.config.id2label, 0: "another"}
    model.save_pretrained(tmp_path / "renamed")
    check_card_of_changed((tmp_path / "renamed" / "README.md").read_text(), tmp_path)
    RideBfForImageClassification(model.config).save_pretrained(clone)  # where it was loaded from: nothing is changed
    assert (clone / "README.md").read_text() == (exported / "README.md").read_text()
    (clone / "README.md").unlink()
    RideBfForImageClassification.from_pretrained(clone).save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "README.md").exists()


@pytest.mark.parametrize(("method", "part"), [("PUT", "/lfs/"), ("POST", "/commit/"), ("POST", "/preupload/")])
def test_a_hub_that_breaks_off_leaves_no_half_repository(run, hub, publish, method, part):
    name = f"user/broken-{part.strip('/')}"
    hub.objects.clear()
    hub.fail(method, part, times=1000)
    code, output = publish(run, "--repo_id", name)
    assert "was not published" in code, output
    assert "You can run the command again" in code
    assert hub.repositories[name].files == {}
    hub.failures.clear()
    code, output = publish(run, "--repo_id", name)
    assert code == 0, output
    assert "model.safetensors" in hub.repositories[name].files

    before = dict(hub.repositories[name].files)
    hub.fail(method, part, times=1000)
    hub.objects.clear()  # as if the weights were new
    publish(run, "--repo_id", name, "--keep_batchformer")
    assert hub.repositories[name].files == before
    hub.failures.clear()


def test_a_passing_failure_is_none(run, hub, publish):
    hub.objects.clear()
    hub.fail("PUT", "/lfs/", times=2)
    code, output = publish(run, "--repo_id", "user/passing")
    assert code == 0, output


def test_branches_and_private_repositories(run, hub, publish):
    code, output = publish(run, "--repo_id", "user/private", "--private", "--revision", "trial")
    assert code == 0, output
    repository = hub.repositories["user/private"]
    assert repository.private
    assert repository.files == {}
    assert "model.safetensors" in repository.branches["trial"]

    publish(run, "--repo_id", "user/public")
    code, output = publish(run, "--repo_id", "user/public", "--private", "--keep_batchformer")
    assert "exists and is public" in code
    assert "leave out --private (--push_private of the training command)" in code
    assert hub.uploads() == []


def test_files_that_an_export_no_longer_has_are_deleted_and_others_kept(run, hub, publish):
    publish(run, "--repo_id", "user/stale")
    hub.repositories["user/stale"].files.update({"model.onnx": b"of other weights", "mine.txt": b"kept"})
    code, output = publish(run, "--repo_id", "user/stale")
    assert code == 0, output
    assert "model.onnx" not in hub.repositories["user/stale"].files
    assert hub.repositories["user/stale"].files["mine.txt"] == b"kept"


def test_a_space_of_the_model(run, hub, publish):
    code, output = publish(run, "--repo_id", "user/shown", "--space", "user/page")
    assert code == 0, output
    space = hub.repositories["spaces/user/page"]
    assert space.sdk == "gradio"
    files = {"README.md", "app.py", "model.json", "predict.py", "page.py", "style.css", "requirements.txt"}
    assert set(space.files) == files
    assert json.loads(space.files["model.json"]) == {"model": "user/shown", "revision": None}
    assert f"Page: {hub.endpoint}/spaces/user/page" in output
    assert "HF_TOKEN" not in output
    metadata = yaml.safe_load(space.files["README.md"].decode().split("---")[1])
    assert (metadata["models"], metadata["app_file"]) == (["user/shown"], "app.py")


def test_a_space_of_a_branch_of_a_private_model(run, hub, publish):
    code, output = publish(run, "--repo_id", "user/hidden", "--private", "--revision", "v2", "--space", "user/own")
    assert code == 0, output
    space = hub.repositories["spaces/user/own"]
    assert space.private
    assert json.loads(space.files["model.json"]) == {"model": "user/hidden", "revision": "v2"}
    assert f"the secret HF_TOKEN, which may read it, at {hub.endpoint}/spaces/user/own/settings" in output


def test_the_licence_is_asked_for_once(run, hub, publish):
    code, output = publish(run, "--repo_id", "user/licensed", license=None)
    assert "user/licensed has no licence yet: pass --license" in code
    assert hub.uploads() == []
    assert publish(run, "--repo_id", "user/licensed", license="apache-2.0")[0] == 0
    code, output = publish(run, "--repo_id", "user/licensed", "--keep_batchformer", license=None)
    assert code == 0, output
    assert b"license: apache-2.0" in hub.repositories["user/licensed"].files["README.md"]


def test_a_new_branch_has_the_licence_of_the_model(run, hub, publish):
    assert publish(run, "--repo_id", "user/branched", license="apache-2.0")[0] == 0
    code, output = publish(run, "--repo_id", "user/branched", "--revision", "trial", license=None)
    assert code == 0, output
    assert b"license: apache-2.0" in hub.repositories["user/branched"].branches["trial"]["README.md"]


def test_a_licence_that_cannot_be_asked_for_is_not_called_missing(run, hub, publish, monkeypatch):
    assert publish(run, "--repo_id", "user/silent", license="apache-2.0")[0] == 0
    monkeypatch.setattr(hub, "failures", {("HEAD", "user/silent/resolve"): 100})
    code, _ = publish(run, "--repo_id", "user/silent", "--keep_batchformer", license=None)
    assert "user/silent was not published: its licence cannot be read from the Hub" in code
    assert "Run the command again, or pass --license" in code
    assert hub.uploads() == []


def test_a_licence_that_the_hub_withholds_is_not_called_missing(monkeypatch):
    def refuse(*place, **revision):
        raise hub_error(GatedRepoError, 403)

    monkeypatch.setattr("ride_bf.hub.upload.hf_hub_download", refuse)
    with pytest.raises(PublishError, match="its licence cannot be read from the Hub: GatedRepoError"):
        published_license("user/name", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--license", "Apache-2"], "knows no licence 'Apache-2'; similar ones are .*apache-2.0"),
        (["--license", "foo"], "--license other --license_name NAME"),
        (["--license", "other"], "needs --license_name"),
        (["--license", "mit", "--license_name", "x"], "the others have neither"),
        (["--license_link", "https://x.org"], "cannot act without --license other"),
    ],
)
def test_a_licence_that_the_hub_refuses_is_refused_before_anything_is_written(run, tmp_path, options, message):
    command = [str(run), "--repo_id", "user/name", "--dry_run", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=message):
        publish_main([*command, *options])
    assert not (tmp_path / "out").exists()


def test_terms_of_ones_own_are_named_and_kept(run, hub, publish):
    terms = ["--license", "other", "--license_name", "own-terms", "--license_link", "https://x.org/terms"]
    for options in (terms, []):  # later publications keep them
        code, output = publish(run, "--repo_id", "user/terms", *options, license=None)
        assert code == 0, output
        card = ModelCard(hub.repositories["user/terms"].files["README.md"].decode())
        assert card.data.to_dict().items() >= {"license": "other", "license_name": "own-terms"}.items()
        assert card.data.license_link == "https://x.org/terms"
        assert "The licence of the weights is [`own-terms`](https://x.org/terms)." in card.text
    assert {"mit", "apache-2.0", "cc-by-nc-2.0", "cc-by-nc-4.0", "openrail++"} < IDENTIFIERS
    assert not any(name.endswith("-") for name in IDENTIFIERS)


def test_a_dry_run_asks_nothing_of_the_hub(run, hub, publish, tmp_path):
    options = ("--repo_id", "user/dry", "--dry_run", "--output_dir", tmp_path / "out")
    code, output = publish(run, *options, license=None)
    assert code == 0, output
    assert "No licence has been chosen" in (tmp_path / "out" / "README.md").read_text()
    assert hub.requests == []
    assert (tmp_path / "out" / "README.md").is_file()
    assert "model.safetensors" in output
    code, _ = publish(run, "--repo_id", "user/dry", "--dry_run", "--output_dir", tmp_path / "out")
    assert "is not empty" in code


def test_a_dry_run_shows_the_files_of_the_space_too(run, hub, publish, tmp_path):
    options = ("--repo_id", "user/dry", "--dry_run", "--output_dir", tmp_path / "out", "--space", "user/page")
    code, output = publish(run, *options, license=None)
    assert code == 0, output
    assert hub.requests == []
    model, page = output.split("Files of Space user/page:\n")
    assert "Files of user/dry:" in model
    assert "model.safetensors" in model
    written = {str(path.relative_to(tmp_path / "out_space")) for path in (tmp_path / "out_space").rglob("*.*")}
    assert {"app.py", "README.md", "model.json"} <= written
    assert all(f"  {name}\n" in page for name in written)
    assert not (tmp_path / "out" / "app.py").exists()
    shutil.rmtree(tmp_path / "out")
    code, _ = publish(run, *options, license=None)
    assert "out_space is not empty" in code


def test_a_token_that_is_refused_is_a_message_without_it(run, hub, publish, monkeypatch):
    monkeypatch.setattr(hub, "token", "another")
    code, _ = publish(run, "--repo_id", "user/name", "--keep_batchformer")  # `publish` looks for the token in it
    assert "was not published" in code
    assert "Bearer ***" in code
    assert hub.uploads() == []


def test_training_publishes_on_its_way_and_outlives_a_push_that_fails(hub, tmp_path):
    hub.fail("POST", "/commit/", times=1)
    small = "--epochs 2 --depths 1 1 1 --image_size 8 --resize_size 8 --passes_per_epoch 1 --batch_size 64"
    options = "--push_to_hub user/run --push_license cc-by-4.0 --push_every 1 --push_private"
    finished = subprocess.run(
        [
            sys.executable,
            "train_accelerate.py",
            *small.split(),
            *options.split(),
            "--output_dir",
            str(tmp_path / "out"),
        ],
        cwd=ROOT,
        env=environment(hub, tmp_path),
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("warning: a push to the Hub failed") == 1, finished.stdout
    assert "Published: " in finished.stdout.splitlines()[-1]
    assert TOKEN not in finished.stdout + finished.stderr
    repository = hub.repositories["user/run"]
    assert repository.private
    assert yaml.safe_load(repository.files["README.md"].decode().split("---")[1])["license"] == "cc-by-4.0"
    results = json.loads((tmp_path / "out" / "test_results.json").read_text())
    assert json.loads(repository.files["test_results.json"])["metrics"] == results["test"]
    model = RideBfForImageClassification.from_pretrained(tmp_path / "out" / "best")
    published = tmp_path / "published.safetensors"
    published.write_bytes(repository.files["model.safetensors"])
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in load_file(published).items())
    assert not (tmp_path / "out" / ".push").exists()


def test_a_last_push_that_fails_says_how_to_repeat_it(run, hub, publish, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "run")
    for name, value in {**hub.environment(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    RunPublisher(tmp_path / "run", "user/by-hand", "mit", None, True, True).after_training()
    said = capsys.readouterr().out
    assert "warning: a push to the Hub failed" in said
    code, output = publish(*re.search(r"python -m ride_bf\.publish (.*)", said)[1].split())
    assert code == 0, output
    assert "model.safetensors" in hub.repositories["user/by-hand"].files
    assert hub.repositories["user/by-hand"].private, "the run was not to be public"
