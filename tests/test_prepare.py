"""A copy to train on: smaller images, with the same splits, labels and order of classes."""

import io
import json
import shlex
from dataclasses import replace

import datasets
import numpy as np
import pytest
from PIL import Image
from processes import run

from data import BrokenImageError, class_counts, load_long_tailed, read_image, undecoded
from data import prepare as module
from data.prepare import main
from data.splits import class_labels
from data.synthesize import STYLES, synthesize
from ride_bf.training.arguments import check_starting_models, parse_arguments

CLASSES = ("zebra", "ant", "moose")
NUMBERS = {"train": (5, 4, 2), "test": (2, 1, 1)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """Lists whose classes are not in the order of their names; images of one shade each, some turned, small or PNG."""
    place = tmp_path / "photos"
    shade = 0
    for split, numbers in NUMBERS.items():
        lines = []
        for label, (name, number) in enumerate(zip(CLASSES, numbers, strict=True)):
            (place / name).mkdir(parents=True, exist_ok=True)
            for index in range(number):
                kind = ("jpg", "png", "jpeg")[index % 3]
                path = f"{name}/{split} {index}.{kind}"
                exif = Image.Exif()
                if index == 3:
                    exif[0x0112] = 6
                size = (40, 30) if index == 2 else (160, 120)
                Image.new("RGB", size, (shade := shade + 10,) * 3).save(place / path, exif=exif)
                lines.append(f"{path} {label}\n")
        (place / f"{split}.txt").write_text("".join(lines))
    (place / "class_names.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return place


def prepared(folder, *options):
    output_dir = folder.parent / "copy"
    main([*given(folder, output_dir), "--shorter_side", "60", "--num_workers", "1", *map(str, options)])
    return output_dir


def given(folder, output_dir):
    return ("--data_dir", str(folder), "--output_dir", str(output_dir))


def content(rows):
    """Size, shade and label of each image."""
    found = []
    for row in undecoded(rows):
        pixels = read_image(row["image"])
        found.append((*pixels.shape[1:], round(pixels.float().mean().item()), row["label"]))
    return found


def test_lists_and_files(folder, capsys):
    output_dir = prepared(folder)
    before, after = (load_long_tailed("custom", place) for place in (folder, output_dir))
    assert after["train"].features["label"].names == list(CLASSES)
    for split in NUMBERS:
        assert class_counts(after[split]) == list(NUMBERS[split])
        assert np.array_equal(class_labels(after[split]), class_labels(before[split]))
        for (_, _, shade, label), (height, width, other, same) in zip(
            content(before[split]), content(after[split]), strict=True
        ):
            assert (shade, label) == (other, same)
            assert (width, height) in {(80, 60), (60, 80), (40, 30)}
    assert (output_dir / "zebra/train 2.jpeg").read_bytes() == (folder / "zebra/train 2.jpeg").read_bytes()
    assert Image.open(output_dir / "zebra/train 1.png.jpg").format == "JPEG"
    assert Image.open(output_dir / "zebra/train 3.jpg").size == (60, 80), "upright"
    assert "train.txt" in {path.name for path in output_dir.iterdir()}
    assert f"--data_dir {output_dir}" in capsys.readouterr().out


@pytest.mark.parametrize("file_format", ["folder", "webdataset"])
def test_several_processes(folder, file_format):
    alone = prepared(folder, "--format", file_format)
    several = folder.parent / "several"
    options = ("--shorter_side", 60, "--num_workers", 2, "--format", file_format)
    run("data.prepare", *given(folder, several), *options)
    for path in (path for path in alone.rglob("*") if path.is_file() and path.suffix != ".txt"):
        assert (several / path.relative_to(alone)).read_bytes() == path.read_bytes()


def test_archives(folder, capsys, monkeypatch):
    output_dir = prepared(folder, "--format", "webdataset")
    said = capsys.readouterr().out
    assert f"--streaming --class_names {output_dir}/class_names.txt" in said
    monkeypatch.setattr("data.streams._count", None)  # the counts are there
    splits = load_long_tailed("custom", output_dir, streaming=True)
    before = load_long_tailed("custom", folder)
    assert (output_dir / "class_names.txt").read_text().splitlines() == list(CLASSES)
    for split in NUMBERS:
        assert class_counts(splits[split]) == list(NUMBERS[split])
        found = sorted(
            (round(read_image(row["image"]).float().mean().item()), splits[split].codes[row["label"]])
            for row in splits[split].rows
        )
        assert found == sorted((shade, label) for _, _, shade, label in content(before[split]))


@pytest.mark.parametrize("recipe", ["probe", "finetune_experts", "imagenet_lt_resnet50"])
def test_training_takes_what_is_printed(folder, capsys, recipe):
    prepared(folder, "--format", "webdataset")
    options = shlex.split(capsys.readouterr().out.partition("train_accelerate.py ")[2])
    assert options[:2] == ["--data_dir", str(folder.parent / "copy")]
    run, chosen = parse_arguments([*options, "--recipe", recipe])
    check_starting_models(run, chosen)
    assert run.dataset_options["streaming"]


def test_other_archives_are_counted(folder):
    output_dir = prepared(folder, "--format", "webdataset")
    first = sorted(output_dir.glob("train-*.tar"))[0]
    first.unlink()
    assert sum(class_counts(load_long_tailed("custom", output_dir, streaming=True)["train"])) < 11


@pytest.mark.parametrize("file_format", ["folder", "webdataset"])
def test_it_goes_on_where_it_stopped(folder, monkeypatch, file_format):
    copy = module.CopyOptions.copy
    options = ("--format", file_format)
    stopped = folder.parent / "stopped"
    stopped.touch()

    def dies(self, image):
        if stopped.exists() and "moose" in image["path"]:
            raise RuntimeError("the machine is switched off")
        return copy(self, image)

    monkeypatch.setattr(module.CopyOptions, "copy", dies)
    with pytest.raises(RuntimeError, match="switched off"):
        prepared(folder, *options)
    output_dir = folder.parent / "copy"
    assert not (output_dir / "prepare.json").exists()
    assert not (output_dir / "class_names.txt").exists()
    stopped.unlink()
    prepared(folder, *options)
    splits = load_long_tailed("custom", output_dir, **({"streaming": True} if file_format == "webdataset" else {}))
    assert class_counts(splits["train"]) == list(NUMBERS["train"])
    monkeypatch.setattr(module.CopyOptions, "copy", None)
    prepared(folder, *options)  # nothing to do
    with pytest.raises(SystemExit, match="does not hold this copy"):
        prepared(folder, *options, "--quality", 50)


@pytest.mark.parametrize("file_format", ["folder", "webdataset"])
def test_broken_images_are_named(folder, file_format):
    broken = folder / "zebra/train 0.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(BrokenImageError) as error:
        read_image({"bytes": None, "path": str(broken)})
    options = ("--format", file_format)
    with pytest.raises(SystemExit) as stopped:
        prepared(folder, *options)
    assert "1 image(s) cannot be read; repair them, or leave them out with --on_broken_image skip" in str(stopped.value)
    assert str(error.value) in str(stopped.value)
    output_dir = prepared(folder, *options, "--on_broken_image", "skip")
    assert (output_dir / "broken_images.txt").read_text().splitlines() == [str(error.value)]
    splits = load_long_tailed("custom", output_dir, **({"streaming": True} if file_format == "webdataset" else {}))
    assert class_counts(splits["train"]) == [4, 4, 2]


def test_a_benchmark_keeps_its_lists(tmp_path, monkeypatch):
    monkeypatch.setattr("data.synthesize._real_class_counts", lambda: {"places_lt": [3, 2]})
    held_out = replace(STYLES["places_lt"], held_out_per_class={"validation": 1, "test": 1})
    monkeypatch.setitem(STYLES, "places_lt", held_out)
    synthesize("places_lt", 1.0, tmp_path / "places", image_scale=0.2, num_workers=1)
    main(
        [
            *("--data_dir", str(tmp_path / "places"), "--output_dir", str(tmp_path / "copy")),
            *("--dataset", "places_lt", "--shorter_side", "20", "--num_workers", "1"),
        ]
    )
    for path in (tmp_path / "places").glob("*.txt"):
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
    assert load_long_tailed("places_lt", tmp_path / "copy")["train"][0]["image"].size == (20, 20)


def test_images_in_a_table(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (100, 80), (9, 9, 9)).save(buffer, "PNG")
    rows = {"image": [{"bytes": buffer.getvalue(), "path": None}] * 4, "label": ["b", "a", "b", "a"]}
    for split in ("train", "test"):
        path = tmp_path / f"table/{split}.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(
            rows, datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
        ).to_parquet(path)
    main(
        [
            "--data_dir",
            str(tmp_path / "table"),
            "--output_dir",
            str(tmp_path / "copy"),
            *["--shorter_side", "40", "--num_workers", "1"],
        ]
    )
    splits = load_long_tailed("custom", tmp_path / "copy")
    assert splits["train"].features["label"].names == ["a", "b"]
    assert splits["train"]["label"] == [1, 0, 1, 0]
    assert splits["test"][0]["image"].size == (50, 40)
    assert json.loads((tmp_path / "copy/prepare.json").read_text())["quality"] == 90


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quality", "100"], "--quality must be 1 to 95, not 100"),
        (["--shorter_side", "0"], "--shorter_side must be 1 or more, not 0"),
        (["--output_dir", "{}/copy"], "where it would be read as images"),
    ],
)
def test_wrong_options(folder, capsys, options, message):
    with pytest.raises(SystemExit):
        prepared(folder, *(word.format(folder) for word in options))
    assert message in capsys.readouterr().err
