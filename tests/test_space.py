"""The Space: what it says about images of every kind, without Gradio; and, with it, in a real browser."""

import gc
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from hostile_images import hostile_images, resident_mebibytes, right_images, watched
from hub_errors import hub_error
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from test_evaluate import save_model
from tiny_run import COUNTS, NAMES, write_run

from data import load_long_tailed
from ride_bf import embed
from ride_bf.evaluation.embedding import chosen_features, read_embeddings
from ride_bf.evaluation.metrics import shot_groups
from ride_bf.evaluation.neighbours import nearest
from ride_bf.hub.export import export
from ride_bf.hub.run_files import read_saved_run

SPACE = ROOT / "hub_cards" / "space"
MOST_GROWTH = 64  # MiB that all hostile files may leave behind


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("space")
    picture = path / "example.png"
    picture.write_bytes(right_images()["rgb.png"])
    export(read_saved_run(write_run(path / "run")), path / "repository", "user/name", examples=[picture])
    return path / "repository"


@pytest.fixture(scope="module")
def space():
    """The modules predict and page, as app.py imports them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SPACE))
        import page
        import predict

        yield predict, page
    for name in ("predict", "page"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(space, folder):
    return space[0].load(str(folder))


def test_metadata_and_requirements_are_those_of_the_repository():
    metadata = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert {"sdk", "sdk_version", "app_file", "models", "title", "license"} <= set(metadata)
    assert (SPACE / metadata["app_file"]).is_file()
    extras = (ROOT / "requirements-extras.txt").read_text()
    low, high = re.search(r"^gradio>=(\d+),<(\d+)", extras, re.MULTILINE).groups()
    assert int(low) <= int(metadata["sdk_version"].split(".")[0]) < int(high)
    core = (ROOT / "requirements.txt").read_text().splitlines()
    for path in (SPACE / "requirements.txt", ROOT / "hub_cards" / "requirements.txt"):
        wanted = [line for line in path.read_text().splitlines() if not line.startswith(("#", "--"))]
        assert wanted
        if path.parent == SPACE:
            assert set(wanted) <= set(core)
            assert "--extra-index-url https://download.pytorch.org/whl/cpu" in path.read_text().splitlines()
    assert re.fullmatch(r"3\.\d+", metadata["python_version"])


def test_without_gradio_it_says_what_to_install(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError(\"No module named 'gradio'\", name='gradio')")
    finished = subprocess.run(
        [sys.executable, str(SPACE / "app.py")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 1
    assert finished.stderr == "error: gradio is missing; pip install -r requirements-extras.txt\n"


def test_a_folder_that_is_no_publication(space, tmp_path):
    with pytest.raises(space[0].NoModelError, match="publish it with python -m"):
        space[0].load(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError, "as the secret HF_TOKEN"),  # what the Hub says of a private one as well
        (RevisionNotFoundError, "user/name has no branch or commit v2"),
    ],
)
def test_a_model_that_the_hub_does_not_give(space, monkeypatch, error, message):
    def refuse(model, revision):
        assert (model, revision) == ("user/name", "v2")
        raise hub_error(error, 404)

    monkeypatch.setattr(space[0], "snapshot_download", refuse)
    with pytest.raises(space[0].NoModelError, match=message):
        space[0].load("user/name", "v2")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("the Hub is out of reach"), "the Hub is out of reach"),
        (hub_error(HfHubHTTPError, 503), "refused"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_hub_that_fails_is_named_on_the_page(space, monkeypatch, error, reason):
    def fail(model, revision):
        raise error

    monkeypatch.setattr(space[0], "snapshot_download", fail)
    with pytest.raises(space[0].NoModelError, match=f"user/name could not be downloaded .*{reason}.* try again later"):
        space[0].load("user/name")


def test_predictions_are_the_networks(model, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(right_images()["rgb.png"])
    prediction = model.predict(path)
    probabilities, experts = model.handler.classify([Image.open(path)])
    assert [answer.name for answer in prediction.top] == [NAMES[c] for c in probabilities[0].argsort(descending=True)]
    assert [vote.label for vote in prediction.experts] == experts[0].argmax(dim=1).tolist()
    assert [vote.probability for vote in prediction.experts] == pytest.approx(experts[0].amax(dim=1).tolist())
    assert model.examples[0].name == "example.png"


def test_groups_are_those_of_the_metrics(space, model):
    by_mask = {label: group for group, mask in shot_groups(COUNTS).items() for label in mask.nonzero()[0].tolist()}
    assert {label: model.group(label) for label in range(5)} == by_mask
    predict, _ = space
    for count, group in ((19, "few"), (20, "medium"), (100, "medium"), (101, "many")):
        assert predict.Model("m", None, None, ValueError, counts=[count]).group(0) == group


def test_the_page_shows_five_bars_each_vote_and_the_tail(space, model):
    predict, page = space
    html = page.result(model, model.predict(right_images()["rgb.png"]))
    assert html.count('class="lt-bar ') == 5
    assert html.count('class="lt-vote ') == 3
    assert html.count("<rect ") == 5
    assert html.count(" lt-own") == 1
    answer = predict.Answer(4, NAMES[4], 0.625)
    html = page.result(model, predict.Prediction([answer], [answer, predict.Answer(0, NAMES[0], 0.5), None]))
    assert "few-shot class" in html
    assert "62.5 %" in html
    assert "No. 5 of 5 classes" in html
    assert "learned this class from just 2 training images" in html
    assert "1 of 2 agree" in html
    assert "not asked" in html


@pytest.mark.parametrize(
    ("votes", "explained"), [((0.78, 1.0, 0.61), True), ((0.9, 0.9, 0.9), False), ((1.0, 1.0, 1.0), False)]
)
def test_a_score_above_that_of_the_experts_is_explained(space, model, votes, explained):
    predict, page = space
    best = predict.Answer(0, NAMES[0], 1.0 if explained else min(votes))
    html = page.result(model, predict.Prediction([best], [predict.Answer(0, NAMES[0], vote) for vote in votes]))
    assert "Their logits are averaged" in html
    assert "It is not calibrated" in html
    assert ("a very sure expert counts for more" in html) is explained
    html = page.result(model, predict.Prediction([best], [best]))
    assert "averaged" not in html  # one expert is no ensemble


def test_names_and_messages_are_text_not_markup(space, model):
    predict, page = space
    answer = predict.Answer(1, NAMES[1], 1.0)
    for html in (page.result(model, predict.Prediction([answer], [answer])), page.failure("<b>x</b>", "<b>x</b>")):
        assert "<b>bar" not in html
        assert "<b>x" not in html
        assert "&lt;b&gt;" in html


def test_thousands_of_classes_make_a_drawing_of_bounded_size(space):
    predict, page = space
    handler = type("Handler", (), {"labels": [f"class {label}" for label in range(8142)]})
    model = predict.Model("m", None, handler, ValueError, counts=[1000 - label // 9 for label in range(8142)])
    answer = predict.Answer(7777, "class 7777", 0.5)
    html = page.result(model, predict.Prediction([answer], [answer]))
    assert html.count("<rect ") <= page.MOST_BARS + 1
    assert html.count(" lt-own") == 1
    assert "<b>class 7777</b>: 136 training images" in html


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A model of the digits beside its features."""
    place = tmp_path_factory.mktemp("digits")
    save_model(place / "model", depths=[1, 1, 1], hidden_sizes=[8, 16, 32])
    embed.main([str(place / "model"), "--dataset", "digits_lt", "--splits", "train"])
    return place / "model"


@pytest.mark.parametrize("expert", [None, 1])
def test_the_page_shows_the_published_training_images(space, digits, tmp_path, expert):
    predict, page = space
    words = [] if expert is None else ["--expert", "1"]
    model, rows = shutil.copytree(digits, tmp_path / "model"), load_long_tailed("digits_lt")
    if words:
        embed.main([str(model), "--dataset", "digits_lt", "--splits", "train", *words])
    export(read_saved_run(model), tmp_path / "shown", "user/name", neighbours={"dataset": "digits_lt"})
    shown = predict.load(str(tmp_path / "shown"))
    file = io.BytesIO()
    rows["test"][0]["image"].save(file, "PNG")
    prediction = shown.predict(file.getvalue())
    assert len(prediction.nearest) == 5
    # the published ones, compared by the command that compares all of them
    embedded = read_embeddings(model / "embeddings.parquet", "train")
    _, features = shown.handler.answer_with_features([file.getvalue()])
    distances, _ = nearest(shown.training_images.features.numpy(), chosen_features(features, expert).numpy())
    np.testing.assert_allclose([image.similarity for image in prediction.nearest], 1 - distances[0], atol=1e-3)
    # a training image is nearest to itself
    row = next(row for row, label in enumerate(embedded.labels) if label == "9")
    file = io.BytesIO()
    rows["train"][int(embedded.rows[row])]["image"].save(file, "PNG")
    first = shown.predict(file.getvalue()).nearest[0]
    assert (first.name, first.similarity) == ("9", pytest.approx(1, abs=1e-3))
    assert Image.open(io.BytesIO(first.picture)).size == (96, 96)
    html = page.result(shown, prediction)
    assert html.count('<img alt="Training image of the class ') == 5
    assert "Nearest training images" in html


def test_a_model_without_training_images_and_a_damaged_file(space, model, folder, tmp_path):
    predict, page = space
    prediction = model.predict(right_images()["rgb.png"])
    assert prediction.nearest is None
    assert "<img" not in page.result(model, prediction)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / predict.NEIGHBOURS).write_bytes(b"cut off")
    with pytest.raises(predict.NoModelError, match=r"neighbours.safetensors is damaged: .* Publish the model again"):
        predict.load(str(tmp_path / "copy"))


def test_without_counts_there_is_no_tail(space, model, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "class_counts.json").unlink()
    bare = space[0].load(str(tmp_path / "copy"))
    html = space[1].result(bare, bare.predict(right_images()["rgb.png"]))
    assert "<svg" not in html
    assert html.count('class="lt-bar lt-all"') == 5


@pytest.mark.parametrize(
    "name", ["cmyk.jpg", "palette_transparent.png", "sixteen_bit.png", "animated.gif", "rotated.jpg", "one_bit.png"]
)
def test_images_of_every_kind_have_the_right_answer(model, name, tmp_path):
    path = tmp_path / "upload"  # a name without a suffix: what counts is what is in it
    path.write_bytes(right_images()[name])
    probabilities, _ = model.handler.classify([right_images()[name]])
    assert model.predict(path).top[0].probability == pytest.approx(probabilities.max().item())


def test_hostile_files_have_an_answer_or_a_message(space, model, tmp_path):
    predict, page = space
    files = hostile_images(200)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    model.predict(right_images()["rgb.png"])
    before, messages = resident_mebibytes(), []
    with watched() as done:
        for name in files:
            try:
                assert "lt-bar" in page.result(model, model.predict(tmp_path / name))
            except predict.NoPredictionError as error:
                messages.append(page.failure("No answer", str(error)))
    gc.collect()
    assert 100 < len(messages) < 200
    assert all(len(message) < 700 for message in messages)
    assert done == []
    assert resident_mebibytes() - before < MOST_GROWTH
    with pytest.raises(predict.NoPredictionError, match="cannot be read: No such file"):
        model.predict(tmp_path / "missing.png")


# In a browser: `make extras`.

FOR_CONTAINERS = ["--no-sandbox", "--disable-dev-shm-usage"]  # root has no sandbox; /dev/shm may be small
EXTRAS = all(importlib.util.find_spec(name) for name in ("gradio", "playwright"))


def chromium():
    """The path of Debian's browser, or of the one that `playwright install chromium` left; None without either."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        with sync_playwright() as playwright:
            found = playwright.chromium.executable_path
    return found if Path(found).exists() else None


CHROMIUM = chromium() if EXTRAS else None


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The Space of the demo checkpoint, if there is one, or of a tiny network."""
    home = tmp_path_factory.mktemp("home")
    run = ROOT / os.environ.get("SPACE_TEST_RUN", "outputs/demo")
    if not run.is_dir():
        run = write_run(home / "run", names=["0", "1", "2", "3", "4"])
    page = home / "user-digits"
    export(read_saved_run(run), page, "user/demo", examples=sorted(ROOT.glob("hub_cards/examples/*.png")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MODEL": str(page), "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    environment |= {"GRADIO_TEMP_DIR": str(home / "uploads"), "TMPDIR": str(home)}
    before = sorted(path.name for path in SPACE.iterdir() if path.name != "__pycache__")
    log = (home / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, str(SPACE / "app.py")], cwd=home, env=environment, stdout=log, stderr=log
    )
    for _ in range(120):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert process.poll() is None, (home / "log").read_text()
        time.sleep(0.5)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()
    assert sorted(path.name for path in SPACE.iterdir() if path.name != "__pycache__") == before


@pytest.mark.skipif(not EXTRAS, reason="needs requirements-extras.txt")
@pytest.mark.parametrize("marked", [{}, {"meta": {"_type": "gradio.FileData"}}])
def test_a_program_cannot_have_files_of_the_server_read(address, marked):
    path = str(ROOT / "hub_cards" / "examples" / "digit_5.png")
    body = json.dumps({"data": [{"path": path, **marked}], "session_hash": "program"}).encode()
    request = urllib.request.Request(
        f"{address}/gradio_api/run/predict", body, headers={"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert b"lt-bar" not in refused.value.read()


@pytest.mark.skipif(not EXTRAS, reason="needs requirements-extras.txt")
def test_a_program_gets_json(address):
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False, analytics_enabled=False)
    picture = str(ROOT / "hub_cards" / "examples" / "digit_5.png")
    answer = client.predict(handle_file(picture), api_name="/predict")
    assert [set(entry) for entry in answer["classes"]] == [{"label", "score"}] * 5
    assert len(answer["experts"]) == 3
    assert answer["group"] in ("many", "medium", "few")
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ["/predict"]


LONG = ["a class of butterflies whose name goes on and on without an end " + letter for letter in "abcde"]


@pytest.mark.skipif(not CHROMIUM, reason="needs requirements-extras.txt and chromium: make extras")
@pytest.mark.parametrize("width", [390, 1280])
def test_long_names_leave_room_for_their_bars(space, width):
    """The page's HTML and style without Gradio, for names that the served model does not have."""
    from playwright.sync_api import sync_playwright

    predict, page = space
    handler = type("Handler", (), {"labels": LONG})
    model = predict.Model("m", None, handler, ValueError, counts=COUNTS)
    answers = [predict.Answer(label, name, 0.2) for label, name in enumerate(LONG)]
    picture = (ROOT / "hub_cards" / "examples" / "digit_5.png").read_bytes()
    images = [predict.Neighbour(label, name.replace(" ", "_"), 0.9, picture) for label, name in enumerate(LONG)]
    html = page.result(model, predict.Prediction(answers, answers[:3], nearest=images))
    style = (SPACE / "style.css").read_text()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FOR_CONTAINERS)
        shown = browser.new_page(viewport={"width": width, "height": 800})
        shown.set_content(f"<style>{style}</style><body class='gradio-container' style='font-size:16px'>{html}")
        assert shown.locator("img").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)") == [96] * 5
        tracks = shown.locator(".lt-track").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
        assert min(tracks) >= 60
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        sizes = shown.evaluate(
            """() => [...document.querySelectorAll('*')].filter(one => one.childNodes.length && !one.closest('style')
            && [...one.childNodes].some(node => node.nodeType == 3 && node.data.trim()) && !one.closest('svg'))
            .map(one => parseFloat(getComputedStyle(one).fontSize))"""
        )
        assert min(sizes) >= 12
        assert shown.locator("svg text").count() == 0  # text in a drawing shrinks with it
        browser.close()


@pytest.mark.skipif(not CHROMIUM, reason="needs requirements-extras.txt and chromium: make extras")
def test_in_a_browser(address, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    broken = {"text.png": "not an image", "black.png": "too many pixels"}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FOR_CONTAINERS)
        page = browser.new_page(viewport={"width": 1180, "height": 900})
        page.goto(address)
        expect(page.locator("#answer .lt-empty")).to_be_visible(timeout=30_000)

        def send(path):
            page.reload()
            expect(page.locator("#answer .lt-empty")).to_be_visible(timeout=30_000)
            page.set_input_files("#image input[type=file]", str(path))

        send(ROOT / "hub_cards" / "examples" / "digit_5.png")
        expect(page.locator("#answer .lt-bar")).to_have_count(5, timeout=30_000)
        expect(page.locator("#answer .lt-vote")).to_have_count(3)
        assert page.locator("#answer .lt-own").count() == 1
        names = page.locator("button.gallery-item, .gallery button").evaluate_all(
            "buttons => buttons.map(button => button.innerText || button.ariaLabel)"
        )
        assert names == ["digit 1", "digit 5", "digit 9"]
        assert page.locator("#answer").get_attribute("aria-live") == "polite"
        page.wait_for_timeout(500)
        page.screenshot(path=os.environ.get("SPACE_TEST_SCREENSHOT", tmp_path / "space.png"), full_page=True)

        for name, message in broken.items():
            (tmp_path / name).write_bytes(hostile_images(30)[name])
            send(tmp_path / name)
            expect(page.locator("#answer .lt-failure")).to_contain_text(message, timeout=30_000)
        (tmp_path / "page.html").write_bytes(hostile_images(30)["page.html"])
        send(tmp_path / "page.html")  # by its name no image: does not leave the browser
        expect(page.locator(".toast-body")).to_contain_text(re.compile("only image", re.IGNORECASE), timeout=30_000)

        rotated = tmp_path / "photograph.jpg"  # with what a telephone writes
        rotated.write_bytes(right_images()["rotated.jpg"])
        send(rotated)
        expect(page.locator("#answer .lt-bar")).to_have_count(5, timeout=30_000)
        clear = page.locator("#image button[aria-label*=lear], #image button[aria-label*=emove]").first
        clear.click()
        expect(page.locator("#answer .lt-empty")).to_be_visible(timeout=30_000)
        page.locator("button.gallery-item, .gallery button").first.click()  # an example
        expect(page.locator("#answer .lt-bar")).to_have_count(5, timeout=30_000)
        clear.click()
        page.set_input_files("#image input[type=file]", str(tmp_path / "text.png"))  # in the same session
        expect(page.locator("#answer .lt-failure")).to_contain_text("not an image", timeout=30_000)
        browser.close()
