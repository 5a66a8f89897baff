"""One reader of images: what training, evaluation, classify, publisher and endpoint see of a file is equal."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from hostile_images import encoded, right_images
from PIL import Image
from test_handler import folder, handler, module  # noqa: F401 (fixtures)
from torchvision.transforms.v2.functional import pil_to_tensor

from data import evaluation_batches, read_image
from ride_bf import classify
from ride_bf.evaluation.classify import ImageClassifier

PIXELS = np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)
TURNED = Image.Exif()
TURNED[274] = 6
KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def damaged(kind, how):
    """A file whose pixels are whole and whose EXIF note is not."""
    note = TURNED.tobytes()
    bodies = {
        "cut off": note[:-9],
        "garbage": note[:6] + bytes(range(40)),
        "offset beyond the end": note[:6] + b"II*\x00" + struct.pack("<I", 90_000),
        "endless": note[:6] + b"MM\x00*" + struct.pack(">IH", 8, 65535) + b"\x01\x12\x00\x03" * 3,
        "empty": b"Exif\x00\x00",
    }
    body = bodies[how]
    image = Image.fromarray(PIXELS)
    if kind == "png":
        return _with_chunk(encoded(image, "PNG"), b"eXIf", body[6:])
    return encoded(image, KINDS[kind], exif=body, **({"lossless": True} if kind == "webp" else {"quality": 95}))


def _with_chunk(png, name, body):
    end = png.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return png[:end] + chunk + png[end:]


@pytest.mark.parametrize("how", ["cut off", "garbage", "offset beyond the end", "endless", "empty"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_damaged_note_does_not_cost_the_pixels(module, kind, how):  # noqa: F811
    content = damaged(kind, how)
    with Image.open(io.BytesIO(content)) as plain:
        plain.load()
        expected = pil_to_tensor(plain.convert("RGB"))
    seen = read_image({"bytes": content, "path": None})
    by_endpoint = pil_to_tensor(module.read_image(content))
    assert torch.equal(seen, by_endpoint)
    # a note that is cut off may still say how the image lies
    turned = expected.rot90(-1, dims=(1, 2))
    assert torch.equal(seen, expected) or (how == "cut off" and torch.equal(seen, turned))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_turned_as_by_pil(module, orientation):  # noqa: F811
    exif = Image.Exif()
    exif[274] = orientation
    content = encoded(Image.fromarray(PIXELS), "JPEG", exif=exif)
    assert torch.equal(read_image({"bytes": content, "path": None}), pil_to_tensor(module.read_image(content)))


def test_adobe_s_note_turns_a_jpeg_too(module):  # noqa: F811
    note = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    content = encoded(Image.fromarray(PIXELS), "JPEG", xmp=note)
    seen = read_image({"bytes": content, "path": None})
    assert torch.equal(seen, pil_to_tensor(module.read_image(content)))
    assert seen.shape == (3, 60, 40)


@pytest.mark.parametrize("name", list(right_images()))
def test_classify_sees_what_evaluation_sees(folder, tmp_path, name):  # noqa: F811
    path = tmp_path / name
    path.write_bytes(right_images()[name])
    classifier = ImageClassifier(folder)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict({"image": [str(path)], "label": [0]}, features=features)
    (batch,) = evaluation_batches(rows, classifier.processor, 1)
    assert torch.equal(classifier.pixel_values(path), batch["pixel_values"])
    assert torch.equal(classifier.pixel_values(path.read_bytes()), batch["pixel_values"])


@pytest.mark.parametrize("name", ["sixteen_bit.png", "transparent.png", "palette_transparent.png", "rotated.jpg"])
def test_classify_the_page_and_the_endpoint_answer_alike(folder, handler, tmp_path, capsys, name):  # noqa: F811
    path = tmp_path / name
    path.write_bytes(right_images()[name])
    answers = ImageClassifier(folder)(path, 3)
    by_endpoint = handler({"inputs": path.read_bytes(), "parameters": {"top_k": 3}})
    assert [answer["label"] for answer in answers] == [answer["label"] for answer in by_endpoint]
    assert [answer["score"] for answer in answers] == pytest.approx([own["score"] for own in by_endpoint], abs=1e-5)
    classify.main([str(folder), str(path), "--top_k", "1"])
    assert capsys.readouterr().out == f"{path}: {answers[0]['label']} ({100 * answers[0]['score']:.1f} %)\n"


def test_a_broken_file_is_named_and_the_others_are_classified(folder, tmp_path, capsys):  # noqa: F811
    whole, broken = tmp_path / "whole.png", tmp_path / "broken.png"
    whole.write_bytes(right_images()["rgb.png"])
    broken.write_bytes(right_images()["rgb.png"][:200])
    with pytest.raises(SystemExit) as stopped:
        classify.main([str(folder), str(broken), str(tmp_path / "nothing.png"), str(whole)])
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{whole}: ")
    assert printed.err.startswith(f"error: {broken} cannot be read: ")
    assert f"error: {tmp_path / 'nothing.png'} cannot be read: " in printed.err


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{tmp}", "holds no model: there is no config.json. Name a run's output folder"),
        ("{tmp}/none", "does not exist"),
    ],
)
def test_what_is_no_model_is_said_in_one_line(tmp_path, place, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        classify.main([place.format(tmp=tmp_path), "image.png"])
