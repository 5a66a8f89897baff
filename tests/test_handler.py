"""The endpoint's handler, loaded and called as Inference Endpoints' toolkit does."""

import base64
import gc
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hostile_images import encoded, hostile_images, resident_mebibytes, right_images, watched
from PIL import Image
from tiny_run import NAMES, write_run
from transformers import AutoImageProcessor
from transformers.utils import logging

from data import read_image
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.hub.export import export
from ride_bf.hub.run_files import read_saved_run

MOST_GROWTH = 64  # MiB that a thousand requests, or all hostile files, may leave behind


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("endpoint")
    export(read_saved_run(write_run(path / "run")), path / "repository", "user/name")
    return path / "repository"


@pytest.fixture(scope="module")
def module(folder):
    """The toolkit imports the file by its path and gives it the folder as a string."""
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["handler"] = loaded
    spec.loader.exec_module(loaded)
    yield loaded
    del sys.modules["handler"]


@pytest.fixture(scope="module")
def handler(module, folder):
    logging.disable_progress_bar()
    return module.EndpointHandler(str(folder))


def expected_answers(folder, content):
    """What the pipeline would say, by hand."""
    model = RideBfForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(read_image({"bytes": content, "path": None}), return_tensors="pt")["pixel_values"]
    probabilities = model(pixels).logits[0].softmax(dim=0)
    return [(NAMES[label], probabilities[label].item()) for label in probabilities.argsort(descending=True)]


def as_pairs(answers):
    return [(answer["label"], pytest.approx(answer["score"], abs=1e-5)) for answer in answers]


@pytest.mark.parametrize("name", list(right_images()))
def test_pixels_are_those_of_training(module, name):
    content = right_images()[name]
    pixels = torch.from_numpy(np.asarray(module.read_image(content)).copy()).permute(2, 0, 1)
    assert torch.equal(pixels, read_image({"bytes": content, "path": None}))


@pytest.mark.parametrize(
    "send",
    [
        lambda content: Image.open(io.BytesIO(content)).convert("RGB"),  # the toolkit, for a body of image/png
        lambda content: Image.open(io.BytesIO(content)),
        lambda content: content,
        lambda content: base64.b64encode(content).decode(),
        lambda content: "data:image/png;base64," + base64.b64encode(content).decode(),
        lambda content: base64.encodebytes(content).decode(),  # with a line break after 76 characters
        lambda content: " " + base64.encodebytes(content).decode().replace("\n", "\r\n\t"),
    ],
)
def test_every_way_to_send_an_image(handler, folder, send):
    content = right_images()["rgb.png"]
    answers = handler({"inputs": send(content)})
    assert expected_answers(folder, content) == as_pairs(answers)
    json.dumps(answers)


def test_an_upright_answer_for_a_rotated_photograph(handler, folder):
    content = right_images()["rotated.jpg"]
    decoded = Image.open(io.BytesIO(content)).convert("RGB")  # by the toolkit, which leaves the rotation to others
    assert expected_answers(folder, content) == as_pairs(handler({"inputs": decoded}))


def test_a_batch_is_its_images_one_by_one(handler, module):
    contents = [content for name, content in right_images().items()]
    assert len(contents) > module.IMAGES_AT_ONCE
    together = handler({"inputs": contents, "parameters": {"top_k": 2}})
    assert len(together) == len(contents)
    for content, answers in zip(contents, together, strict=True):
        (alone,) = handler({"inputs": [content], "parameters": {"top_k": 2}})
        assert [answer["label"] for answer in answers] == [answer["label"] for answer in alone]
        assert [a["score"] for a in answers] == pytest.approx([a["score"] for a in alone], abs=1e-5)


def test_top_k(handler):
    content = right_images()["rgb.png"]
    for asked, given in ((1, 1), (3, 3), (99, 5)):
        assert len(handler({"inputs": content, "parameters": {"top_k": asked}})) == given
    assert len(handler({"inputs": content, "parameters": None})) == 5


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "a request is"),
        (b"bytes", "a request is"),
        ({"inputs": None}, "must be bytes, base64 or a PIL image, not NoneType"),
        ({"inputs": {"image": "x"}}, "not dict"),
        ({"inputs": []}, "1 to 64 images, not 0"),
        ({"inputs": [b""] * 65}, "not 65"),
        ({"inputs": "https://example.com/cat.jpg"}, "not fetched"),
        ({"inputs": "/etc/passwd"}, "not valid base64"),
        ({"inputs": "no base64!"}, "not valid base64"),
        ({"inputs": b"no image"}, "not an image; supported formats"),
        ({"inputs": "A" * 30_000_000}, "larger than 20 MiB"),
        ({"inputs": bytes(21 * 2**20)}, "larger than 20 MiB"),
        ({"inputs": [right_images()["rgb.png"], b"no image"]}, r"inputs\[1\]: not an image"),
        ({"inputs": right_images()["rgb.jpg"][:-300]}, "cannot be read: image file is truncated"),
        ({"inputs": hostile_images(22)["black.png"]}, "too many pixels; at most 178,956,970 are read"),
        ({"inputs": hostile_images(22)["just_too_many.png"]}, "too many pixels; at most 178,956,970 are read"),
        ({"inputs": hostile_images(22)["line.png"]}, "no side may be"),
        ({"inputs": right_images()["rgb.png"], "parameters": {"top_k": 0}}, "top_k must be"),
        ({"inputs": right_images()["rgb.png"], "parameters": {"top_k": "3"}}, "top_k must be"),
        ({"inputs": right_images()["rgb.png"], "parameters": {"top_k": True}}, "top_k must be"),
        ({"inputs": right_images()["rgb.png"], "parameters": {"topk": 3}}, "parameters can have"),
        ({"inputs": right_images()["rgb.png"], "parameters": [3]}, "parameters can have"),
    ],
)
def test_bad_requests_are_told_why(handler, module, request_, message):
    with pytest.raises(module.BadRequestError, match=message) as caught:
        handler(request_)
    assert len(str(caught.value)) < 500


def grey(width, height, kind):
    return encoded(Image.new("L", (width, height), 90), kind)


def test_the_pixels_of_a_request_are_bounded(handler, module, monkeypatch):
    monkeypatch.setattr(handler, "max_pixels", 1_000_000)
    one = grey(1000, 900, "PNG")
    assert len(handler({"inputs": one})) == 5
    with pytest.raises(module.BadRequestError, match="1,800,000 pixels together; at most 1,000,000 are read in a"):
        handler({"inputs": [one, one]})
    with pytest.raises(module.BadRequestError, match="2,700,000 pixels together"):
        handler({"inputs": [Image.open(io.BytesIO(one))] * 3})  # decoded by the toolkit
    with pytest.raises(module.BadRequestError, match=r"inputs\[1\]: not an image"):
        handler({"inputs": [one, b"no image"]})


def test_large_photographs_are_read_at_a_reduced_size_only_if_there_are_too_many(handler, module, monkeypatch):
    monkeypatch.setattr(handler, "max_pixels", 1_000_000)
    photograph = grey(1000, 900, "JPEG")
    sizes = []
    read = module._decode
    monkeypatch.setattr(module, "_decode", lambda *args, **options: sizes.append(read(*args, **options)) or sizes[-1])
    handler({"inputs": photograph})
    assert len(handler({"inputs": [photograph] * 4})) == 4
    assert len(handler({"inputs": [photograph] * 64, "parameters": {"top_k": 1}})) == 64
    assert [image.size for image in sizes] == [(1000, 900)] + [(500, 450)] * 4 + [(125, 113)] * 64


def test_a_photograph_with_damaged_metadata_is_counted_as_it_is_read(handler):
    content = bytearray(right_images()["rotated.jpg"])
    content[content.index(b"Exif") + 6 : content.index(b"Exif") + 14] = b"\xff" * 8
    assert len(handler({"inputs": [bytes(content)] * 2})) == 2


def test_a_photograph_at_a_reduced_size_is_upright(module):
    turned = Image.Exif()
    turned[274] = 6
    picture = Image.new("RGB", (800, 400), "blue")
    picture.paste("red", (0, 0, 400, 400))
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=turned)
    reduced = module.read_image(file.getvalue(), reduce_above=100_000)
    assert reduced.size == (200, 400)
    assert reduced.getpixel((100, 50))[0] > 200  # red is at the top
    assert reduced.getpixel((100, 350))[2] > 200


TOOLKIT = """
import importlib.util, io, json, sys
from PIL import Image

folder, requests = sys.argv[1:]
sys.path.insert(0, folder)
spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder + "/handler.py")
module = sys.modules["handler.EndpointHandler"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
handler = module.EndpointHandler(folder)


def answer(kind, body, query):
    if kind == "application/json":
        data = json.loads(body)
    else:
        data = {"inputs": Image.open(io.BytesIO(body)).convert("RGB")}
    if query and "parameters" not in data:
        data["parameters"] = {name: int(value) if value.isnumeric() else value for name, value in query.items()}
    return handler(data)


answers = []
for kind, body, query in json.load(open(requests)):
    try:
        answers.append(answer(kind, bytes.fromhex(body), query))
    except Exception as error:
        answers.append({"error": str(error)})
import transformers
print(json.dumps([transformers.__version__, answers]))
"""


def served(folder, tmp_path, *requests, path=""):
    """What Inference Endpoints' toolkit would answer: it loads the file by its path and reads bodies by their type."""
    (tmp_path / "requests.json").write_text(json.dumps([[kind, body.hex(), query] for kind, body, query in requests]))
    finished = subprocess.run(
        [sys.executable, "-c", TOOLKIT, str(folder), str(tmp_path / "requests.json")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(path), "HF_MODULES_CACHE": str(tmp_path / "modules")},
        check=True,
        stdout=subprocess.PIPE,
    )
    return json.loads(finished.stdout.splitlines()[-1])


def test_the_toolkit_serves_it(folder, tmp_path):
    content = right_images()["rgb.png"]
    text = base64.b64encode(content).decode()
    bodies = [{"inputs": text}, {"inputs": [text, text], "parameters": {"top_k": 2}}, {"inputs": "https://x.org/a.png"}]
    requests = [("application/json", json.dumps(body).encode(), {}) for body in bodies]
    _, answers = served(folder, tmp_path, ("image/png", content, {"top_k": "3"}), *requests)
    image, one, two, error = answers
    expected = expected_answers(folder, content)
    assert expected == as_pairs(one)
    assert expected[:3] == as_pairs(image)
    assert [expected[:2]] * 2 == [as_pairs(own) for own in two]
    assert "not fetched" in error["error"]


@pytest.mark.slow
def test_the_oldest_transformers_of_its_requirements(folder, tmp_path):
    """Needs the package index. The other packages are those of this environment."""
    lowest = re.search(r"transformers>=([\d.]+)", (folder / "requirements.txt").read_text())[1]
    old = tmp_path / "old"
    packages = [f"transformers=={lowest}.0", "tokenizers==0.22.2", "huggingface_hub==1.33.0"]
    install = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--no-deps", "--target", old]
    subprocess.run([*install, *packages], check=True)
    content = right_images()["rgb.png"]
    version, (answers,) = served(folder, tmp_path, ("image/png", content, {}), path=old)
    assert version == f"{lowest}.0"
    assert expected_answers(folder, content) == as_pairs(answers)


def test_hostile_files_are_refused_or_read(handler, module):
    files = hostile_images(200)
    assert len(files) == 200
    handler({"inputs": right_images()["rgb.png"]})
    before, refused = resident_mebibytes(), 0
    with watched() as done:
        for content in files.values():
            try:
                answers = handler({"inputs": content})
                assert len(answers) == 5
            except module.BadRequestError:
                refused += 1
    gc.collect()
    assert 100 < refused < 200  # some changed bytes do no harm
    assert done == []
    assert resident_mebibytes() - before < MOST_GROWTH


def test_a_thousand_requests(handler):
    images = [encoded(Image.new("RGB", (32 + step, 48)), "PNG") for step in range(10)]
    for step in range(100):
        handler({"inputs": images[step % 10]})
    gc.collect()
    before, started = resident_mebibytes(), time.perf_counter()
    for step in range(1000):
        assert len(handler({"inputs": images[step % 10], "parameters": {"top_k": 1}})) == 1
    gc.collect()
    assert resident_mebibytes() - before < MOST_GROWTH
    print(f"{1000 / (time.perf_counter() - started):.0f} requests/s, {resident_mebibytes() - before:+.1f} MiB")


def test_all_that_an_answer_can_have_costs_little_more_than_the_bare_answer(module, folder, tmp_path):
    """Scores, set and "none of the classes" in at most 1.3 times the time; the best of rounds in turns, of CPU time."""
    calibrated = shutil.copytree(folder, tmp_path / "calibrated")
    config = json.loads((calibrated / "config.json").read_text())
    classes = len(NAMES)
    config["confidence"] = {
        "temperature": [2.0] * classes,
        "coverage": 0.9,
        "set_thresholds": [0.1] * classes,
        "reject_known": 0.05,
        "known_score": "energy",
        "known_threshold": 1e9,  # rejects
    }
    (calibrated / "config.json").write_text(json.dumps(config))
    handlers = {"bare": module.EndpointHandler(str(folder)), "all": module.EndpointHandler(str(calibrated))}
    content = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)), "JPEG")
    request = {"inputs": content, "parameters": {"top_k": 3}}
    assert handlers["all"](request)[0] == {"label": "none of the classes", "score": 1.0}
    assert "in_set" in handlers["all"](request)[1]
    seconds = {name: [] for name in handlers}
    for _ in range(20):
        for name, handler in handlers.items():
            started = time.process_time()
            handler(request)
            seconds[name].append(time.process_time() - started)
    assert min(seconds["all"]) < 1.3 * min(seconds["bare"])
