"""One reader of images: what training, evaluation, classify, publisher and endpoint see of a file is equal."""

import io
import json
import shutil
import struct
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from conftest import tiny_model as residual_model
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from hostile_images import AVIF, encoded, images_of_unknown_range, right_images
from PIL import Image, ImageFile
from test_handler import folder, handler, module  # noqa: F401 (fixtures)
from tiny_run import write_run
from torchvision.io import decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import BitImageProcessor, ViTImageProcessor
from transformers.image_utils import load_image

from data import (
    MAX_IMAGE_PIXELS,
    BrokenImageError,
    OnBrokenImage,
    evaluation_batches,
    evaluation_processor,
    evaluation_transform,
    image_suffixes,
    load_long_tailed,
    read_image,
    reading,
    train_transform,
)
from data.formats import image_formats
from ride_bf import check_data, classify
from ride_bf.evaluation.classify import ImageClassifier
from ride_bf.hub.export import export
from ride_bf.hub.run_files import read_saved_run
from ride_bf.runs.provenance import describe_data, load_data_to_evaluate, load_splits_of
from ride_bf.training.arguments import parse_arguments
from ride_bf.training.loaders import RunLoaders

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


@pytest.mark.parametrize(("name", "content"), images_of_unknown_range().items())
def test_32_bit_numbers_are_refused(module, name, content):  # noqa: F811
    said = r"its pixels are 32-bit numbers whose range is not known \(.* to .*\); convert it to 8 or 16 bits"
    with pytest.raises(BrokenImageError, match=f"^{name} cannot be read: {said}$"):
        read_image({"bytes": content, "path": name})
    with pytest.raises(module.BadRequestError, match=f"^the image cannot be read: {said}$"):
        module.read_image(content)


def test_16_bit_grey_in_32_bits_is_read(module):  # noqa: F811
    """Older versions of PIL open it so."""
    grey = np.arange(0, 65536, 256, dtype=np.int32).reshape(16, 16)
    content = encoded(Image.fromarray(grey), "TIFF")
    seen = read_image({"bytes": content, "path": None})
    assert torch.equal(seen, pil_to_tensor(module.read_image(content)))
    assert seen[0].tolist() == (grey / 257).round().astype(int).tolist()


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
        ("{tmp}", "holds no model: there is no config.json. Name a run's"),
        ("{tmp}/none", "there is no folder"),
    ],
)
def test_what_is_no_model_is_said_in_one_line(tmp_path, place, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        classify.main([place.format(tmp=tmp_path), "image.png"])


@pytest.mark.parametrize("name", list(right_images()))
def test_a_bare_pipeline_differs_for_transparency_and_16_bit_grey_alone(tmp_path, name):
    """The README and the model card say so."""
    path = tmp_path / name
    path.write_bytes(right_images()[name])
    by_pipeline = pil_to_tensor(load_image(str(path)))
    with Image.open(path) as opened:
        transparent = opened.has_transparency_data
        grey_16 = opened.mode.startswith("I")
    assert torch.equal(by_pipeline, read_image({"bytes": None, "path": str(path)})) is not (transparent or grey_16)


@pytest.mark.parametrize("place", ["README.md", "hub_cards/model_card.md"])
def test_what_a_bare_pipeline_sees_is_said(place):
    words = " ".join((ROOT / place).read_text().split())
    assert "It ignores transparency, also that of a palette or a GIF" in words
    assert "cuts 16-bit grey off at 255" in words


def as_it_is(pixels):
    return pixels


@pytest.mark.parametrize("name", list(right_images()))
def test_every_reader_sees_the_same_pixels(folder, module, tmp_path, monkeypatch, name):  # noqa: F811
    content = right_images()[name]
    path = tmp_path / name
    path.write_bytes(content)
    processor = evaluation_processor(24, 24, (0.5,) * 3, (0.25,) * 3)
    seen = {"endpoint": pil_to_tensor(module.read_image(content))}
    for reader, transform in (
        ("training", train_transform("imagenet", 24)),
        ("evaluation", evaluation_transform(processor)),
    ):
        rows = replace(transform, prepare=as_it_is)({"image": [{"bytes": None, "path": str(path)}], "label": [0]})
        seen[reader] = rows["pixel_values"][0]
    with monkeypatch.context() as patched:  # the processor's input is what `classify` read
        patched.setattr("ride_bf.evaluation.classify.AutoImageProcessor.from_pretrained", lambda _: keep)
        seen["classify"] = ImageClassifier(folder).pixel_values(path)
    first = seen.pop("endpoint")
    assert {reader for reader, pixels in seen.items() if not torch.equal(pixels, first)} == set()


def keep(pixels, **_):
    return {"pixel_values": pixels}


def test_suffixes_are_those_of_what_can_be_read():
    suffixes = image_suffixes()
    usual = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".ppm", ".pgm"}
    assert usual <= suffixes
    assert (".avif" in suffixes) is AVIF
    assert not {".pdf", ".eps", ".ps", ".mpg", ".h5", ".txt", ".npy", ""} & suffixes


def test_a_folder_of_classes_lists_every_image_that_can_be_read(tmp_path):
    names = [name for name in right_images() if name.endswith((".jfif", ".avif", ".ppm", ".gif", ".bmp", ".tif"))]
    for label in ("ant", "bee"):
        (tmp_path / label).mkdir()
        for name in names:
            (tmp_path / label / name).write_bytes(right_images()[name])
        (tmp_path / label / "notes.txt").write_text("no image")
    with pytest.warns(UserWarning, match="no test split"):
        splits = load_long_tailed("custom", tmp_path)
    assert sum(map(len, splits.values())) == 2 * len(names)


def turned_pixels():
    return torch.from_numpy(PIXELS.copy()).permute(2, 0, 1).rot90(-1, dims=(1, 2))


def exif_with(*entries):
    """An EXIF note whose first directory has these entries (tag, kind, count, value of 4 bytes)."""
    directory = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    return b"Exif\x00\x00II*\x00" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)


SIX = (274, 3, 1, b"\x06\x00\x00\x00")
ODD_NOTES = {
    "a resolution that is text": exif_with(SIX, (282, 2, 2, b"7\x00\x00\x00"), (296, 3, 1, b"\x02\x00\x00\x00")),
    "a resolution of a whole number": exif_with(SIX, (282, 3, 1, b"\x48\x00\x00\x00"), (296, 3, 1, bytes(4))),
    "an entry of no kind before it": exif_with((271, 99, 1, bytes(4)), SIX),
    "a text beyond the end before it": exif_with((271, 2, 99_999, b"\xff\xff\x00\x00"), SIX),
    "a directory beyond the end": exif_with(SIX, (34665, 4, 1, b"\xff\xff\xff\x7f")),
    "an odd number": exif_with(SIX, (33434, 5, 1, b"\x08\x00\x00\x00"), (282, 1, 3, b"\x01\x02\x03\x00")),
}


def lossless(kind, note):
    image = Image.fromarray(PIXELS)
    if kind == "png":
        return _with_chunk(encoded(image, "PNG"), b"eXIf", note[6:])
    return encoded(image, KINDS[kind], exif=note, **({"lossless": True} if kind == "webp" else {"quality": 95}))


@pytest.mark.parametrize("how", ODD_NOTES)
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_odd_note_turns_an_image_all_the_same(module, kind, how):  # noqa: F811
    content = lossless(kind, ODD_NOTES[how])
    seen = read_image({"bytes": content, "path": None})
    assert torch.equal(seen, pil_to_tensor(module.read_image(content)))
    upright = turned_pixels()
    assert seen.shape == upright.shape
    if kind != "jpg":
        assert torch.equal(seen, upright)


@pytest.mark.parametrize("error", [AttributeError, struct.error, IndexError, KeyError, ZeroDivisionError])
@pytest.mark.parametrize("kind", list(KINDS))
def test_no_error_of_pil_s_exif_reader_costs_pixels_or_orientation(module, monkeypatch, kind, error):  # noqa: F811
    content = lossless(kind, TURNED.tobytes())
    expected = read_image({"bytes": content, "path": None})

    def fail(_):
        raise error("damaged")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    monkeypatch.setattr(type(Image.open(io.BytesIO(lossless("png", TURNED.tobytes())))), "getexif", fail)
    assert torch.equal(read_image({"bytes": content, "path": None}), expected)
    assert torch.equal(pil_to_tensor(module.read_image(content)), expected)
    assert expected.shape == (3, 60, 40)


@pytest.mark.parametrize("chunk", [b"eXIf", b"gAMA", b"pHYs"])
def test_a_wrong_checksum_of_a_note_does_not_cost_the_pixels(module, chunk):  # noqa: F811
    bodies = {b"eXIf": TURNED.tobytes()[6:], b"gAMA": bytes(4), b"pHYs": bytes(9)}
    content = bytearray(_with_chunk(encoded(Image.fromarray(PIXELS), "PNG"), chunk, bodies[chunk]))
    content[content.index(b"IDAT") - 5] ^= 0xFF  # the last byte before the next chunk is one of the checksum
    expected = turned_pixels() if chunk == b"eXIf" else torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)
    assert torch.equal(read_image({"bytes": bytes(content), "path": None}), expected)
    assert torch.equal(pil_to_tensor(module.read_image(bytes(content))), expected)


@pytest.mark.parametrize("entry", [(282, 2, 2, b"7\x00\x00\x00"), (34665, 4, 1, b"\xff\xff\xff\x7f")])
def test_odd_entries_of_a_tiff_do_not_cost_the_pixels(module, entry):  # noqa: F811
    """A TIFF keeps its metadata among the facts about its pixels."""
    pixels = PIXELS.tobytes()
    facts = {256: 60, 257: 40, 259: 1, 262: 2, 273: 8, 277: 3, 278: 40, 279: len(pixels), 274: 6, 284: 1, 296: 3}
    entries = [(tag, 4, 1, struct.pack("<I", value)) for tag, value in facts.items()]
    depth = 8 + len(pixels) + 6 + 12 * (len(entries) + 2)
    entries += [entry, (258, 3, 3, struct.pack("<I", depth))]
    directory = b"".join(struct.pack("<HHI", *one[:3]) + one[3] for one in sorted(entries))
    header = b"II*\x00" + struct.pack("<I", 8 + len(pixels))
    content = header + pixels + struct.pack("<H", len(entries)) + directory + bytes(4) + struct.pack("<3H", 8, 8, 8)
    assert torch.equal(read_image({"bytes": content, "path": None}), turned_pixels())
    assert torch.equal(pil_to_tensor(module.read_image(content)), turned_pixels())


@pytest.mark.skipif(not AVIF, reason="PIL reads AVIF from 11.3")
def test_damaged_exif_data_of_avif_do_not_cost_the_pixels(module):  # noqa: F811
    exif = Image.Exif()
    exif[271] = "a camera"
    content = encoded(Image.fromarray(PIXELS), "AVIF", exif=exif)
    expected = read_image({"bytes": content, "path": None})
    damaged = content.replace(exif.tobytes()[6:14], b"no notes")
    assert damaged != content
    assert torch.equal(read_image({"bytes": damaged, "path": None}), expected)
    assert torch.equal(pil_to_tensor(module.read_image(damaged)), expected)


@pytest.mark.parametrize(("orientation", "fast"), [(None, True), (1, True), (0, True), (9, True), (6, False)])
def test_an_upright_jpeg_takes_the_fast_decoder(monkeypatch, orientation, fast):
    exif = Image.Exif()
    exif[271] = "a camera"
    if orientation is not None:
        exif[274] = orientation
    content = encoded(Image.fromarray(PIXELS), "JPEG", exif=exif, comment=b"tiff:Orientation")
    decoded = []

    def counted(*given, **named):
        decoded.append(given)
        return decode_jpeg(*given, **named)

    monkeypatch.setattr(reading, "simplejpeg", None)
    monkeypatch.setattr(reading, "decode_jpeg", counted)
    read_image({"bytes": content, "path": None})
    assert bool(decoded) is fast


OF_2400_PIXELS = {
    "a.jpg": encoded(Image.fromarray(PIXELS), "JPEG"),
    "turned.jpg": encoded(Image.fromarray(PIXELS), "JPEG", exif=TURNED),
    "a.png": encoded(Image.fromarray(PIXELS), "PNG"),
    "a.webp": encoded(Image.fromarray(PIXELS), "WEBP"),
    "a.gif": encoded(Image.fromarray(PIXELS), "GIF"),
    "a.tif": encoded(Image.fromarray(PIXELS), "TIFF", compression="tiff_lzw"),
    "a.bmp": encoded(Image.fromarray(PIXELS), "BMP"),
    **({"a.avif": encoded(Image.fromarray(PIXELS), "AVIF")} if AVIF else {}),
}


@pytest.mark.parametrize("name", OF_2400_PIXELS)
def test_one_limit_for_every_format(module, tmp_path, monkeypatch, name):  # noqa: F811
    content = OF_2400_PIXELS[name]
    (tmp_path / name).write_bytes(content)
    image = {"bytes": None, "path": str(tmp_path / name)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pil_s in (89_478_485, 1_500, 10, None):  # PIL would warn about the second and refuse the third
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pil_s)
            pixels = read_image(image, 2_400)
            assert torch.equal(pixels, pil_to_tensor(module.read_image(content, 2_400)))
            assert pixels.shape[1:].numel() == 2_400
            assert pil_s == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # the header says it
    monkeypatch.setattr(reading, "decode_jpeg", None)
    monkeypatch.setattr(reading, "simplejpeg", None)
    said = r"2,400 pixels, and at most 2,399 are read; .*set --max_image_pixels 2400$"
    for pil_s in (89_478_485, 10, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pil_s)
        with pytest.raises(BrokenImageError, match=f"{name} cannot be read: it has {said}"):
            read_image(image, 2_399)
        with pytest.raises(module.BadRequestError, match="too many pixels; at most 2,399 are read"):
            module.read_image(content, 2_399)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_header_of_too_many_pixels_is_refused_at_once(kind):
    content = bytearray(encoded(Image.fromarray(PIXELS), kind))
    if kind == "JPEG":
        place = content.index(b"\xff\xc0") + 5
        content[place : place + 4] = struct.pack(">HH", 20000, 20000)
    else:
        place = content.index(b"IHDR") + 4
        content[place : place + 8] = struct.pack(">II", 20000, 20000)
        content[place + 13 : place + 17] = struct.pack(">I", zlib.crc32(content[place - 4 : place + 13]))
    with pytest.raises(BrokenImageError, match=r"400,000,000 pixels, and at most 178,956,970 are .*_pixels 400000000"):
        read_image({"bytes": bytes(content), "path": None})


def test_a_large_image_is_converted_in_strips(module, monkeypatch):  # noqa: F811
    for name in ("transparent.png", "sixteen_bit.png", "palette_transparent.gif", "rgb.png"):
        content = right_images()[name]
        expected = read_image({"bytes": content, "path": None})
        with monkeypatch.context() as patched:
            patched.setattr(reading, "_STRIP_PIXELS", 60 * 7)
            patched.setattr(module, "_STRIP_PIXELS", 60 * 7)
            assert torch.equal(read_image({"bytes": content, "path": None}), expected)
            assert torch.equal(pil_to_tensor(module.read_image(content)), expected)


@pytest.fixture
def images_of_two_sizes(tmp_path):
    """Classes of small images, and one test image of 2,400 pixels."""
    for split in ("train", "test"):
        for label in ("ant", "bee"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (20, 20)).save(tmp_path / split / label / f"{number}.png")
    (tmp_path / "test/bee/large.png").write_bytes(OF_2400_PIXELS["a.png"])
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_and_its_workers_keep_the_limit(images_of_two_sizes, tmp_path, num_workers):
    given = {"--data_dir": images_of_two_sizes, "--output_dir": tmp_path, "--num_workers": num_workers}
    given |= {"--recipe": "digits_lt_resnet32", "--dataset": "custom", "--max_image_pixels": 2399, "--batch_size": 2}
    words = [str(word) for pair in given.items() for word in pair]
    run, recipe = parse_arguments(words)
    splits = load_long_tailed("custom", images_of_two_sizes)
    processor = evaluation_processor(24, 24, (0.5,) * 3, (0.25,) * 3)
    loaders = RunLoaders(splits, processor, run, recipe, Accelerator(cpu=True), residual_model()).make()
    assert next(iter(loaders["train"]))["labels"].shape == (2,)
    with pytest.raises(BrokenImageError, match=r"large.png cannot be read: it has 2,400 pixels.*2,399 are"):
        list(loaders["test"])


def test_check_data_keeps_the_limit(images_of_two_sizes, tmp_path, capsys):
    words = ["--data_dir", str(images_of_two_sizes), "--output_dir", str(tmp_path / "out"), "--num_workers", "1"]
    check_data.main(words)
    with pytest.raises(SystemExit, match="images that cannot be read: 1"):
        check_data.main([*words, "--max_image_pixels", "2399"])
    assert "large.png: it has 2,400 pixels" in capsys.readouterr().out


def test_a_checkpoint_knows_the_limit(images_of_two_sizes, folder, module, tmp_path, capsys):  # noqa: F811
    splits = load_long_tailed("custom", images_of_two_sizes)
    data = describe_data(splits, "custom", images_of_two_sizes, max_image_pixels=2_399)
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "checkpoint.json").write_text(json.dumps({"data": data.as_dict()}))
    assert load_splits_of(model)[1].max_image_pixels == 2_399
    assert load_splits_of(model, max_image_pixels=7)[1].max_image_pixels == 7
    assert load_data_to_evaluate(model).max_image_pixels == 2_399
    assert load_data_to_evaluate(model, max_image_pixels=7).max_image_pixels == 7
    with pytest.raises(SystemExit):
        classify.main([str(model), str(images_of_two_sizes / "test/bee/large.png")])
    assert "at most 2,399 are read" in capsys.readouterr().err
    classify.main([str(model), str(images_of_two_sizes / "test/bee/large.png"), "--max_image_pixels", "2400"])
    with pytest.raises(module.BadRequestError, match="at most 2,399 are read"):
        module.EndpointHandler(str(model))({"inputs": OF_2400_PIXELS["a.png"]})


def test_an_older_checkpoint_has_the_usual_limit(images_of_two_sizes, folder, tmp_path):  # noqa: F811
    data = describe_data(load_long_tailed("custom", images_of_two_sizes), "custom", images_of_two_sizes).as_dict()
    del data["max_image_pixels"]
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "checkpoint.json").write_text(json.dumps({"data": data}))
    assert load_splits_of(model)[1].max_image_pixels == MAX_IMAGE_PIXELS == 178_956_970
    assert module_limit(model) == MAX_IMAGE_PIXELS


def module_limit(model):
    return ImageClassifier(model).max_image_pixels


def test_the_endpoint_has_the_same_limit_and_rules(module):  # noqa: F811
    assert module.MAX_PIXELS == MAX_IMAGE_PIXELS
    assert set(module.FORMATS) <= set(image_formats())
    for name in (
        "_JPEG_METADATA",
        "_PNG_PIXELS",
        "_TIFF_METADATA",
        "_AVIF_EXIF",
        "_TURNS",
        "_STRIP_PIXELS",
        "_DECODER_ERRORS",
    ):
        assert getattr(module, name) == getattr(reading, name.replace("_DECODER", "DECODER"))


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_a_limit_is_a_positive_number(capsys, number):
    with pytest.raises(SystemExit):
        classify.main(["model", "image.png", "--max_image_pixels", number])
    assert "--max_image_pixels" in capsys.readouterr().err


PROCESSORS = {
    "no crop": lambda: BitImageProcessor(size={"shortest_edge": 24}, do_center_crop=False),
    "no crop, one size": lambda: BitImageProcessor(size={"height": 24, "width": 30}, do_center_crop=False),
    "neither": lambda: BitImageProcessor(do_resize=False, do_center_crop=False),
    "no crop_size": lambda: ViTImageProcessor(size={"height": 24, "width": 24}),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_image_processors_without_a_crop(tmp_path, module, capsys, kind):  # noqa: F811
    """A model with one is published, classified with and served."""
    run = write_run(tmp_path / "run")
    PROCESSORS[kind]().save_pretrained(run / "best")
    (tmp_path / "page").mkdir()
    path = tmp_path / "image.png"
    path.write_bytes(OF_2400_PIXELS["a.png"])
    export(read_saved_run(run), tmp_path / "page", "user/name", examples=[path])
    answers = ImageClassifier(tmp_path / "page")(path, 3)
    by_endpoint = module.EndpointHandler(str(tmp_path / "page"))({"inputs": path.read_bytes()})[:3]
    assert [answer["label"] for answer in answers] == [answer["label"] for answer in by_endpoint]
    assert [answer["score"] for answer in answers] == pytest.approx([own["score"] for own in by_endpoint], abs=1e-5)
    classify.main([str(run), str(path), "--top_k", "1"])
    assert capsys.readouterr().out.startswith(f"{path}: {answers[0]['label']} (")


def test_images_of_different_sizes_make_no_batch():
    image, tall = ({"bytes": encoded(Image.new("RGB", size), "PNG"), "path": None} for size in ((30, 24), (24, 50)))
    processor = PROCESSORS["no crop"]()
    features = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=["a", "b"])})

    def batches(*images):
        return list(evaluation_batches(Dataset.from_dict({"image": images, "label": [0, 1]}, features), processor, 2))

    (batch,) = batches(image, image)
    assert batch["pixel_values"].shape == (2, 3, 24, 30)
    with pytest.raises(BrokenImageError, match=r'30 x 24 .* --crop whole; .*"crop_size".*or use --batch_size 1$'):
        batches(image, tall)
    broken = {"bytes": b"", "path": "x.png"}
    with pytest.raises(BrokenImageError, match=r"x\.png cannot be read"):
        list(
            evaluation_batches(
                Dataset.from_dict({"image": [image, broken], "label": [0, 1]}, features),
                processor,
                2,
                on_broken=OnBrokenImage("skip"),
            )
        )
