"""What check_data finds, says and returns, each on data that has it."""

import base64
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from markupsafe import escape
from PIL import Image, ImageColor

from data.exclusion import content_line
from data.groups import content_digest
from data.sets import DATA_SETS
from data.synthesize import STYLES, synthesize
from ride_bf.check_data import main
from ride_bf.evaluation import image_facts
from ride_bf.evaluation.data_page import PAGE, write_data_page
from ride_bf.evaluation.data_report import (
    GROUP_FINDINGS,
    IMAGE_FINDINGS,
    IMAGE_PROPOSALS,
    SIMILAR,
    draw,
    duplicates,
    summary,
)
from ride_bf.evaluation.exclusion_lists import ListedGroup, image_line, write_list
from ride_bf.evaluation.image_facts import FactCache, ImageFacts, _read_in_processes, inspect_image, read_facts
from ride_bf.evaluation.plots import COLOURS

COUNTS = [2, 101, 4, 20]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A stand-in for Places-LT: 4 classes, 127 images to train on, 1 a class for validation and 2 for the test."""
    folder = tmp_path_factory.mktemp("master") / "Places_LT"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.synthesize._real_class_counts", lambda: {"places_lt": COUNTS})
        style = replace(STYLES["places_lt"], held_out_per_class={"validation": 1, "test": 2})
        patch.setitem(STYLES, "places_lt", style)
        synthesize("places_lt", 1, folder, num_workers=1, image_scale=0.125)
    return folder


@pytest.fixture
def places(master, tmp_path):
    return shutil.copytree(master, tmp_path / "Places_LT")


def listed(places, split, label):
    """Files of a class in a split, in the list's order, and their line numbers."""
    lines = (places / DATA_SETS["places_lt"].lists[split]).read_text().splitlines()
    return [
        (places / line.rsplit(" ", maxsplit=1)[0], number)
        for number, line in enumerate(lines, start=1)
        if line.endswith(f" {label}")
    ]


def run(folder, *options):
    """Runs the command on a folder: its report."""
    out = folder.parent / "report"
    main(["--data_dir", str(folder), "--output_dir", str(out), "--num_workers", "1", *options])
    return json.loads((out / "check_data.json").read_text(encoding="utf-8"))


def run_refused(folder, capsys, *options):
    """The same, of data with which training may not start: the report, what is printed, and the error."""
    with pytest.raises(SystemExit) as info:
        run(folder, *options)
    assert isinstance(info.value.code, str), "a message, which makes the exit code 1"
    report = folder.parent / "report" / "check_data.json"
    return json.loads(report.read_text()) if report.exists() else None, capsys.readouterr().out, info.value.code


class TestSoundData:
    def test_report(self, places, capsys):
        report = run(places)
        assert report["dataset"] == "places_lt"
        assert report["data_dir"] == str(places)
        assert report["may_start"] is True
        assert report["imbalance_factor"] == 50.5
        assert report["shot_groups"] == {
            "many": {"classes": 1, "training_images": 101},
            "medium": {"classes": 1, "training_images": 20},
            "few": {"classes": 2, "training_images": 6},
        }
        assert report["splits"] == {
            split: {
                "images": images,
                "classes": 4,
                "broken": 0,
                "shorter_side": {"smallest": 32, "median": 32, "largest": 32},
            }
            for split, images in {"train": 127, "validation": 4, "test": 8}.items()
        }
        assert [of_class["train"] for of_class in report["classes"]] == COUNTS
        assert report["classes"][1]["group"] == "many"
        assert report["classes"][1]["name"].endswith("scene_001")
        assert (report["classes"][1]["validation"], report["classes"][1]["test"]) == (1, 2)
        assert report["classes_without_readable_training_images"] == []
        assert {finding: found["count"] for finding, found in report["findings"].items()} == dict.fromkeys(
            ("broken", "other_format", "turned", "very_small", "in_two_splits", "two_labels"), 0
        )
        output = capsys.readouterr().out
        assert "imbalance factor (largest over smallest class): 50.5" in output
        table = output[output.index("training images  class") :]
        assert table.index(" 101  ") < table.index(" 20  ") < table.index(" 4  ") < table.index(" 2  ")
        assert output.endswith("Training may start.\n")

    def test_it_only_reads(self, places):
        before = {path: path.stat().st_mtime_ns for path in places.rglob("*")}
        run(places)
        assert {path: path.stat().st_mtime_ns for path in places.rglob("*")} == before

    def test_any_number_of_processes(self, places):
        assert run(places) == run(places, "--num_workers", "2")

    def test_images_without_files(self, tmp_path, capsys):
        main(["--dataset", "digits_lt", "--output_dir", str(tmp_path / "report"), "--num_workers", "1"])
        report = json.loads((tmp_path / "report" / "check_data.json").read_text())
        assert report["imbalance_factor"] == 60
        assert [report["splits"][split]["images"] for split in ("train", "validation", "test")] == [337, 80, 500]
        assert report["may_start"] is True
        assert "Training may start." in capsys.readouterr().out

    def test_picture(self, tmp_path):
        classes = [
            {"train": count, "group": group} for count, group in ((5, "few"), (500, "many"), (50, "medium"), (4, "few"))
        ]
        draw(classes, "a tail", tmp_path / "tail.png")
        pixels = np.asarray(Image.open(tmp_path / "tail.png").convert("RGB")).reshape(-1, 3)
        areas = [
            (pixels == colour).all(axis=1).sum()
            for colour in (ImageColor.getrgb(COLOURS[group]) for group in ("many", "medium", "few"))
        ]
        many, medium, few = areas
        assert many > medium > few / 2 > 1000  # one, one and two bars, each lower than the one before


class TestBrokenImages:
    def test_training_may_leave_them_out(self, places, capsys):
        listed(places, "train", 1)[0][0].write_bytes(b"")
        report = run(places, "--on_broken_image", "skip")
        assert report["may_start"] is True
        assert report["findings"]["broken"]["count"] == 1
        assert capsys.readouterr().out.endswith("Training may start with --on_broken_image skip.\n")

    def test_but_not_all_of_a_class(self, places, capsys):
        for path, _ in listed(places, "train", 0):
            path.write_bytes(b"")
        report, output, error = run_refused(places, capsys, "--on_broken_image", "skip")
        assert report["may_start"] is False
        assert "Training may start" not in output
        assert "but then 1 class(es) have no training image" in error

    def test_rows_of_a_table_without_a_label(self, places, capsys):
        images = [path.relative_to(places) for label in (0, 2) for path, _ in listed(places, "train", label)]
        (places / "one.csv").write_text(
            "image,label\n" + "".join(f"{path},{path.parent}\n" for path in images) + "x,\n"
        )
        _, _, error = run_refused(places / "one.csv", capsys)
        assert "is empty in row 7; fill them, or leave these rows out with --on_broken_image skip" in error
        report = run(places / "one.csv", "--on_broken_image", "skip")
        assert report["notices"][0].endswith("rows without image or label are left out: row 7")
        assert sum(facts["images"] for facts in report["splits"].values()) == 6

    def test_truncated_and_no_image(self, places, capsys):
        (first, first_line), (_, _), (third, third_line) = listed(places, "train", 1)[:3]
        first.write_bytes(first.read_bytes()[:400])
        third.write_text("<html>404 Not Found</html>")
        in_test, test_line = listed(places, "test", 0)[0]
        in_test.write_bytes(b"")
        report, output, error = run_refused(places, capsys)
        assert error.startswith("error: images that cannot be read: 3.")
        assert "--on_broken_image skip" in error
        assert "Training may start" not in output
        assert report["may_start"] is False
        assert {split: facts["broken"] for split, facts in report["splits"].items()} == {
            "train": 2,
            "validation": 0,
            "test": 1,
        }
        broken = report["findings"]["broken"]
        assert broken["count"] == 3
        lists = {split: places / file for split, file in DATA_SETS["places_lt"].lists.items()}
        expected = [
            (first, f"{lists['train']}, line {first_line}"),
            (third, f"{lists['train']}, line {third_line}"),
            (in_test, f"{lists['test']}, line {test_line}"),
        ]
        assert [(image["path"], image["listed"]) for image in broken["images"]] == [
            (str(path), place) for path, place in expected
        ]
        assert (broken["images"][1]["split"], broken["images"][1]["row"]) == ("train", third_line - 1)
        assert (broken["images"][2]["split"], broken["images"][2]["row"]) == ("test", test_line - 1)
        for path, place in expected:
            assert f"{path} ({place}): " in output

    def test_one_that_vanishes_after_loading_is_broken(self, tmp_path):
        facts = inspect_image({"bytes": None, "path": str(tmp_path / "gone.jpg")})
        assert "No such file" in facts.error
        assert facts.digest == 0

    def test_a_class_that_would_be_lost_is_named(self, places, capsys):
        for path, _ in listed(places, "train", 0):
            path.write_bytes(b"nothing")
        report, _, error = run_refused(places, capsys)
        (lost,) = report["classes_without_readable_training_images"]
        assert lost.endswith("scene_000")
        assert f"but then 1 class(es) have no training image ({lost})" in error

    def test_many_are_counted_and_some_shown(self, places, capsys):
        for path, _ in listed(places, "train", 3)[:8]:
            path.write_bytes(b"nothing")
        report, output, _ = run_refused(places, capsys)
        assert "images that cannot be read: 8" in output
        assert "  and 3 more" in output
        assert output.count("Places_LT_train.txt, line") == 5
        assert len(report["findings"]["broken"]["images"]) == 8
        assert sum("listed" in image for image in report["findings"]["broken"]["images"]) == 5


class TestOnesOwnImages:
    def test_folders(self, places, capsys):
        """Without lists there is a path and no line."""
        folder = shutil.copytree(places / "train", places.parent / "own" / "train")
        shutil.copytree(places / "val", places.parent / "own" / "test")
        broken = next(iter((folder / "scene_002").iterdir()))
        broken.write_bytes(b"nothing")
        report, output, _ = run_refused(folder.parent, capsys)
        assert report["dataset"] == "custom"
        ((image,),) = [report["findings"]["broken"]["images"]]
        assert (image["path"], image["class"]) == (str(broken), "scene_002")
        assert "listed" not in image
        assert f"  {broken}: " in output

    def test_images_in_a_table(self, places, capsys):
        """They have no path of their own, whatever name is stored beside them."""
        files = [path for label in range(4) for path, _ in listed(places, "train", label)[:2]]
        rows = {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in files],
            "label": [label for label in range(4) for _ in range(2)],
        }
        rows["image"][5]["bytes"] = rows["image"][5]["bytes"][:300]
        features = Features({"image": datasets.Image(), "label": Value("int64")})
        folder = places.parent / "table"
        folder.mkdir()
        Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
        Dataset.from_dict(rows, features=features).select([0]).to_parquet(folder / "test.parquet")
        report, output, _ = run_refused(folder, capsys)
        (image,) = report["findings"]["broken"]["images"]
        assert (image["path"], image["split"], image["row"]) == (None, "train", 5)
        assert "  row 5 of train: " in output
        (group,) = report["findings"]["in_two_splits"]["groups"]
        assert [(image["split"], image["row"]) for image in group["images"]] == [("train", 0), ("test", 0)]


class TestOtherFindings:
    def only(self, report, finding):
        counts = {name: found["count"] for name, found in report["findings"].items() if found["count"]}
        assert counts == {finding: 1}
        assert report["may_start"] is True
        return report["findings"][finding]

    def test_other_format(self, places, capsys):
        path, line = listed(places, "train", 1)[4]
        Image.open(path).save(path, format="PNG")
        (image,) = self.only(run(places), "other_format")["images"]
        assert image["path"] == str(path)
        assert image["detail"] == "PNG, not JPEG"
        assert f"{path} ({places / 'Places_LT_train.txt'}, line {line}): PNG, not JPEG" in capsys.readouterr().out

    def test_turned(self, places, capsys):
        path, _ = listed(places, "validation", 2)[0]
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(path).save(path, exif=exif)
        (image,) = self.only(run(places), "turned")["images"]
        assert (image["path"], image["split"], image["detail"]) == (str(path), "validation", "EXIF orientation 6")
        assert "they are turned when read" in capsys.readouterr().out

    @pytest.mark.parametrize("orientation", [1, 0, 9])
    def test_other_values_of_exif_turn_nothing(self, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        Image.new("RGB", (9, 7)).save(file, format="JPEG", exif=exif)
        facts = inspect_image({"bytes": file.getvalue(), "path": None})
        assert (facts.error, facts.orientation, facts.width, facts.height) == (None, 1, 9, 7)

    def test_a_jpeg_too_large_for_pil(self, monkeypatch):
        """Training reads it, so it is no finding."""
        file = io.BytesIO()
        Image.new("RGB", (9, 7)).save(file, format="JPEG")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        with pytest.raises(Image.DecompressionBombError):
            Image.open(file)
        facts = inspect_image({"bytes": file.getvalue(), "path": "large.jpg"})
        assert (facts.error, facts.format, facts.width, facts.height) == (None, "JPEG", 9, 7)

    def test_very_small(self, places, capsys):
        path, _ = listed(places, "train", 3)[1]
        Image.new("RGB", (40, 3), "red").save(path)
        report = run(places)
        (image,) = self.only(report, "very_small")["images"]
        assert (image["path"], image["detail"]) == (str(path), "40 x 3 pixels")
        assert report["splits"]["train"]["shorter_side"] == {"smallest": 3, "median": 32, "largest": 32}
        assert "images that are very small compared to the others: 1" in capsys.readouterr().out

    def test_the_same_in_two_splits(self, places, capsys):
        trained_on, _ = listed(places, "train", 1)[7]
        tested_on, line = listed(places, "test", 1)[1]
        shutil.copy(trained_on, tested_on)
        (group,) = self.only(run(places), "in_two_splits")["groups"]
        assert group["count"] == 2
        assert [(image["path"], image["split"]) for image in group["images"]] == [
            (str(trained_on), "train"),
            (str(tested_on), "test"),
        ]
        assert f"    = {tested_on} ({places / 'Places_LT_test.txt'}, line {line}): test, " in capsys.readouterr().out

    def test_the_same_under_two_labels(self, places):
        one, _ = listed(places, "train", 1)[7]
        other, _ = listed(places, "train", 2)[0]
        shutil.copy(one, other)
        (group,) = self.only(run(places), "two_labels")["groups"]
        assert [(image["path"], image["class"][-3:]) for image in group["images"]] == [
            (str(one), "001"),
            (str(other), "002"),
        ]

    def test_the_same_under_one_label_of_one_split_is_no_finding(self, places):
        first, second, *_ = [path for path, _ in listed(places, "train", 1)]
        shutil.copy(first, second)
        assert not any(found["count"] for found in run(places)["findings"].values())

    def test_a_placeholder_in_many_places_is_one_group(self, places, capsys):
        """As sites serve it in place of images that are gone. Each kind of place is shown before more of the same."""
        placeholder, *others = [path for path, _ in listed(places, "train", 1)[:60]]
        for path in (*others, listed(places, "train", 3)[0][0], listed(places, "test", 0)[0][0]):
            shutil.copy(placeholder, path)
        report = run(places)
        (across,) = report["findings"]["in_two_splits"]["groups"]
        (mixed,) = report["findings"]["two_labels"]["groups"]
        assert (across["count"], mixed["count"]) == (62, 62)
        assert len(across["images"]) == len(mixed["images"]) == 20
        assert [image["split"] for image in across["images"][:2]] == ["train", "test"]
        assert [image["class"][-3:] for image in mixed["images"][:3]] == ["000", "001", "003"]
        output = capsys.readouterr().out
        assert output.count("    and 57 more") == 2

    def test_broken_images_are_not_each_others_duplicates(self, places, capsys):
        for split in ("train", "test"):
            listed(places, split, 1)[0][0].write_bytes(b"")
        report, _, _ = run_refused(places, capsys)
        assert report["findings"]["broken"]["count"] == 2
        assert report["findings"]["in_two_splits"]["count"] == 0


class TestDataOptions:
    def test_those_of_training_act_and_notices_are_kept(self, places, capsys):
        """Class folders without a test split, with a file that is no image."""
        folder = shutil.copytree(places / "train", places.parent / "own")
        (folder / "scene_001" / "notes.doc").write_text("seen on Monday")
        report = run(folder, "--dataset", "custom", "--validation_fraction", "0.1")
        assert report["options"] == {"validation_fraction": 0.1}
        assert set(report["splits"]) == {"train", "validation", "test"}
        assert any(".doc" in notice for notice in report["notices"])
        assert any("no test split" in notice for notice in report["notices"])
        output = capsys.readouterr().out
        page = (folder.parent / "report" / PAGE).read_text()
        for notice in report["notices"]:
            assert f"note: {notice}\n" in output
            assert str(escape(notice)) in page

    def test_a_column_that_does_not_exist_is_an_error(self, places, capsys):
        table = places.parent / "table"
        table.mkdir()
        (table / "train.csv").write_text("image,label\n1.jpg,cat\n")
        with pytest.raises(SystemExit, match=r"no column 'kind'.*--label_column"):
            run(table, "--label_column", "kind")

    def test_streams_are_not_read(self, capsys):
        with pytest.raises(SystemExit) as info:
            main(["--dataset", "custom", "--data_dir", "someone/images", "--streaming"])
        assert info.value.code == 2
        error = capsys.readouterr().err
        assert "--streaming: the images of a stream are read only while training" in error
        assert "leave --streaming out" in error
        assert "--on_broken_image skip" in error

    def test_small_classes(self, places, capsys):
        for path, _ in listed(places, "train", 0)[:1]:
            path.write_bytes(b"nothing")
        report, output, _ = run_refused(places, capsys, "--min_images", "6")
        assert [(small["name"][-3:], small["images"]) for small in report["proposals"]["small_classes"]] == [("000", 4)]
        assert "classes with fewer than 6 images (give them more, or remove them): 1\n" in output
        assert run_refused(places, capsys)[0]["proposals"]["small_classes"] == []

    def test_least_number_of_images(self, capsys):
        with pytest.raises(SystemExit):
            main(["--dataset", "digits_lt", "--min_images", "0"])
        assert "1 or more, not 0" in capsys.readouterr().err


class TestListsToExclude:
    def lines(self, path):
        return [line for line in path.read_text().splitlines() if line and not line.startswith("# ")]

    def test_two_labels_and_broken(self, places, capsys):
        one, other = listed(places, "train", 1)[7][0], listed(places, "train", 2)[0][0]
        shutil.copy(one, other)
        broken, _ = listed(places, "test", 0)[0]
        broken.write_bytes(b"nothing")
        folder = shutil.copytree(places, places.parent / "own", ignore=shutil.ignore_patterns("*.json", "Places_LT*"))
        for split in ("train", "test"):
            shutil.copy(places / f"Places_LT_{split}.txt", folder / f"{split}.txt")
        report, output, error = run_refused(folder, capsys)
        out = folder.parent / "report"
        assert report["lists"] == {"two_labels": str(out / "two_labels.txt"), "broken": str(out / "broken.txt")}
        assert self.lines(out / "two_labels.txt") == [str(path.relative_to(places)) for path in (one, other)]
        assert "\n# scene_001, scene_002\n" in (out / "two_labels.txt").read_text()
        assert self.lines(out / "broken.txt") == [str(broken.relative_to(places))]
        assert f"--exclude {out / 'two_labels.txt'}\n" in output
        assert f"--exclude {out / 'broken.txt'}" in error
        both = out / "both.txt"
        keep_one = (out / "two_labels.txt").read_text().replace(f"{one.relative_to(places)}\n", "")
        both.write_text(keep_one + (out / "broken.txt").read_text())
        report = run(folder, "--exclude", str(both))
        assert (report["may_start"], report["lists"]) == (True, {})
        assert report["findings"]["two_labels"]["count"] == 0
        assert report["splits"]["train"]["images"] == sum(COUNTS) - 1
        assert sorted(path.name for path in out.glob("*.txt")) == ["both.txt"], "lists of an earlier check are gone"

    def test_images_in_a_table(self, places):
        """One line leaves out every copy, because the table has no paths."""
        files = [path for label in range(4) for path, _ in listed(places, "train", label)[:2]]
        contents = [path.read_bytes() for path in files]
        contents[3] = contents[5]
        images = [{"bytes": content, "path": None} for content in contents]
        features = Features({"image": datasets.Image(), "label": Value("int64")})
        folder = places.parent / "table"
        folder.mkdir()
        rows = Dataset.from_dict({"image": images, "label": [0, 0, 1, 1, 2, 2, 3, 3]}, features=features)
        rows.to_parquet(folder / "train.parquet")
        rows.select([0]).to_parquet(folder / "test.parquet")
        file = Path(run(folder)["lists"]["two_labels"])
        assert self.lines(file) == [content_line(content_digest(contents[5]))]
        assert "every copy" in file.read_text()
        assert run(folder, "--exclude", str(file))["splits"]["train"]["images"] == 6

    def test_a_list_without_a_line_is_not_written(self, tmp_path):
        path = tmp_path / "broken.txt"
        assert write_list(path, "Broken.", [ListedGroup("cut off", [None])], place=None) is None
        assert not path.exists()

    def test_an_edited_or_used_list_is_kept(self, tmp_path):
        path = tmp_path / "two_labels.txt"
        groups = [ListedGroup("cat, dog\n", ["cat/1.jpg", "dog/1.jpg", None])]
        assert write_list(path, "Two labels.", groups, place=tmp_path) == path
        assert write_list(path, "Two labels.", groups, place=tmp_path) == path
        assert "\n# 1 more, whose names a list cannot hold" in path.read_text()
        assert write_list(path, "Two labels.", groups, place=tmp_path, in_use=path) == tmp_path / "two_labels_2.txt"
        edited = path.read_text().replace("dog/1.jpg\n", "")
        path.write_text(edited)
        assert write_list(path, "Two labels.", groups, place=tmp_path) == tmp_path / "two_labels_2.txt"
        assert write_list(path, "Two labels.", [], place=tmp_path) is None
        assert [file.name for file in tmp_path.iterdir()] == ["two_labels.txt"]
        assert path.read_text() == edited

    def test_a_list_of_other_data_is_kept(self, tmp_path):
        path, groups = tmp_path / "two_labels.txt", [ListedGroup("cat, dog", ["cat/1.jpg", "dog/1.jpg"])]
        for place in (tmp_path / "a", tmp_path / "b", "hf:user/a", None):
            path.unlink(missing_ok=True)
            assert write_list(path, "Two labels.", groups, place=place) == path
            text = path.read_text()
            for other in {tmp_path / "c", tmp_path / "a/b", "hf:user/b", None} - {place}:
                assert write_list(path, "Two labels.", groups, place=other) == tmp_path / "two_labels_2.txt"
                assert write_list(path, "Two labels.", [], place=other) is None
                assert [file.name for file in tmp_path.iterdir()] == ["two_labels.txt"]
            assert path.read_text() == text

    def test_a_check_of_other_data_keeps_the_list(self, places):
        """Both checks write into the same folder."""
        shutil.copy(listed(places, "train", 1)[7][0], listed(places, "train", 2)[0][0])
        folders = [
            shutil.copytree(places, places.parent / name, ignore=shutil.ignore_patterns("*.json", "Places_LT*"))
            for name in ("own", "other")
        ]
        for folder in folders:
            for split in ("train", "test"):
                shutil.copy(places / f"Places_LT_{split}.txt", folder / f"{split}.txt")
        file = Path(run(folders[0])["lists"]["two_labels"])
        text = file.read_text()
        assert run(folders[1])["lists"]["two_labels"] == str(file.with_name("two_labels_2.txt"))
        changed = folders[1] / listed(places, "train", 2)[0][0].relative_to(places)
        shutil.copy(listed(places, "train", 2)[1][0], changed)  # without a list to write
        assert run(folders[1])["lists"] == {}
        assert file.read_text() == text
        assert [path.name for path in file.parent.glob("*.txt")] == ["two_labels.txt"]

    @pytest.mark.parametrize(
        ("path", "line"),
        [
            ("/d/cat/1.jpg", "cat/1.jpg"),
            ("/else/1.jpg", "/else/1.jpg"),
            ("/d/# 1.jpg", "./# 1.jpg"),
            ("/d/ cat/1.jpg", "./ cat/1.jpg"),
            ("/d/content 0123456789abcdef", "./content 0123456789abcdef"),
            ("/d/cat/1.jpg ", None),
            ("/d/cat\n/1.jpg", None),
        ],
    )
    def test_what_a_line_can_hold(self, path, line):
        assert image_line({"bytes": None, "path": path}, "/d", 7) == line


class TestPage:
    def test_thumbnails_as_training_sees_the_images(self, places):
        """Upright, on white; the page asks for nothing else, and names are escaped."""
        upright = Image.new("RGBA", (40, 80), (0, 0, 0, 0))
        upright.paste((200, 0, 0, 255), (0, 0, 40, 40))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise
        folder = shutil.copytree(places / "train", places.parent / "own")
        (folder / "scene_000").rename(folder / "<b>scene")
        path = folder / "<b>scene" / "a & b.png"
        upright.rotate(90, expand=True).save(path, exif=exif)
        report = run(folder, "--dataset", "custom")
        assert report["findings"]["turned"]["count"] == 1
        page = (folder.parent / "report" / PAGE).read_text()
        assert "<b>scene" not in page
        card, *_ = re.findall(
            r'<img src="data:image/jpeg;base64,([^"]+)" alt="&lt;b&gt;scene/a &amp; b.png, an image of the class', page
        )
        shown = Image.open(io.BytesIO(base64.b64decode(card)))
        assert shown.size == (40, 80)
        assert np.abs(np.array(shown.getpixel((20, 10))) - (200, 0, 0)).max() < 20
        assert np.array(shown.getpixel((20, 70))).min() > 235
        sources = set(re.findall(r"""(?:src|href)=["']?([^"' >]{1,16})""", page))
        assert {source for source in sources if not source.startswith(("data:image/jpeg", "#"))} == set()

    def test_its_size_is_bounded(self, tmp_path):
        """Whatever is found: here ten thousand of everything, each picture of noise."""
        noise = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 255, (144, 144, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(noise, format="PNG")
        images = [
            {"path": f"/d/{'x' * 60}/{row}.jpg", "split": "train", "row": row, "class": "c" * 30, "detail": "d" * 60}
            for row in range(1_000)
        ]
        of_images = {"count": 10_000, "images": images}
        of_groups = {"count": 10_000, "groups": [{"count": 500, "images": images[n : n + 20]} for n in range(980)]}
        name = "n" * 30
        leak = {"class": name, "kind": "size", "value": "9 x 9 pixels", "images": 9, "of": 9}
        report = {
            "dataset": "custom",
            "data_dir": "/d",
            "may_start": False,
            "notices": ["one"],
            "splits": {split: {"images": 100_000} for split in ("train", "validation", "test")},
            "imbalance_factor": 100.0,
            "classes": [
                {"name": f"{name} {label}", "group": "many", "train": 200, "validation": 1, "test": 1}
                for label in range(10_000)
            ],
            "findings": {finding: of_images for finding in IMAGE_FINDINGS}
            | {finding: of_groups for finding in (*GROUP_FINDINGS, *SIMILAR)},
            "proposals": {
                "min_images": 2,
                "small_classes": [{"name": name, "images": 1}] * 10_000,
                "similar_names": [[name, name]] * 10_000,
                "leaks": [{**leak, "share_in_other_classes": 0.0}] * 10_000,
                **{proposal: of_images for proposal in IMAGE_PROPOSALS},
            },
        }
        page = write_data_page(report, lambda _: {"bytes": noise.getvalue(), "path": None}, tmp_path)
        assert 1_000_000 < page.stat().st_size < 5_000_000


class TestCache:
    @pytest.fixture
    def asked(self, monkeypatch):
        """The numbers of images that each check reads."""
        numbers = []

        def spy(images, indices, *rest):
            numbers.append(len(indices))
            return _read_in_processes(images, indices, *rest)

        monkeypatch.setattr("ride_bf.evaluation.image_facts._read_in_processes", spy)
        return numbers

    def rows(self, paths):
        images = Dataset.from_dict({"image": [{"path": str(path), "bytes": None} for path in paths]})
        return images.cast_column("image", datasets.Image(decode=False))

    def files(self, places, count):
        return [path for path, _ in listed(places, "train", 1)[:count]]

    def equal(self, one, other):
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one) if name != "errors")
        assert one.errors == other.errors

    def test_a_second_check_reads_what_changed(self, places, asked):
        files = self.files(places, 20)
        files[4].write_bytes(b"nothing")
        first = read_facts(self.rows(files), 1, "d")
        second = read_facts(self.rows(files), 1, "d")
        self.equal(first, second)
        Image.new("RGB", (7, 9)).save(files[2])
        os.utime(files[3], (1, 1))
        changed = read_facts(self.rows([*files, *self.files(places, 22)[20:]]), 1, "d")
        assert changed.sizes[2].tolist() == [7, 9]
        assert changed.sizes[3].tolist() == first.sizes[3].tolist()
        assert asked == [20, 1, 1 + 2 + 2], "the broken one is always read again"
        read_facts(self.rows(files), 1, "other data")
        assert asked[-1] == 20

    def test_equal_contents_are_decoded_once(self):
        file = io.BytesIO()
        Image.new("RGB", (9, 7)).save(file, format="PNG")
        image = {"bytes": file.getvalue(), "path": None}
        known = ImageFacts(content_digest(file.getvalue()), 1, 2, "XYZ")
        assert inspect_image(image, {known.digest: known}) is known
        assert inspect_image(image, {}).format == "PNG"

    def test_images_in_a_table_are_known_by_their_content(self, places, monkeypatch):
        images = [{"bytes": path.read_bytes(), "path": "a.jpg"} for path in self.files(places, 3)]
        rows = Dataset.from_dict({"image": images}).cast_column("image", datasets.Image(decode=False))
        first = read_facts(rows, 1, "d")
        assert set(FactCache("d").of_contents) == set(first.digests.tolist())
        assert FactCache("d").of_files == {}
        self.equal(read_facts(rows, 1, "d"), first)
        self.equal(read_facts(rows.select([2, 0, 1]).select([1, 2, 0]), 1, "d"), first)
        assert len(list(FactCache("d").folder.iterdir())) == 1, "nothing new to keep"

    def test_a_check_that_was_stopped_continues(self, places, asked, monkeypatch, capsys):
        def stopped(*arguments):
            reading = _read_in_processes(*arguments)
            yield next(reading)
            yield next(reading)
            raise KeyboardInterrupt

        monkeypatch.setattr("ride_bf.evaluation.image_facts._CHUNK", 10)
        spy = image_facts._read_in_processes
        monkeypatch.setattr("ride_bf.evaluation.image_facts._read_in_processes", stopped)
        with pytest.raises(SystemExit) as info:
            run(places)
        assert info.value.code == 130
        assert "stopped: the same command continues where it stopped" in capsys.readouterr().err
        monkeypatch.setattr("ride_bf.evaluation.image_facts._read_in_processes", spy)
        report = run(places)
        total = sum(facts["images"] for facts in report["splits"].values())
        assert asked == [total - 20]

    def test_parts_are_written_while_reading(self, places, monkeypatch):
        """So a check that is killed has kept them."""
        kept = []

        def watched(*arguments):
            for done in _read_in_processes(*arguments):
                yield done
                kept.append(len(FactCache("d").of_files))

        monkeypatch.setattr("ride_bf.evaluation.image_facts._CHUNK", 10)
        monkeypatch.setattr("ride_bf.evaluation.image_facts._SAVE_EVERY", 0)
        monkeypatch.setattr("ride_bf.evaluation.image_facts._read_in_processes", watched)
        read_facts(self.rows(self.files(places, 30)), 1, "d")
        assert kept == [10, 20, 30]

    def test_a_damaged_part_costs_only_time(self, places, asked):
        rows = self.rows(self.files(places, 5))
        first = read_facts(rows, 1, "d")
        (part,) = FactCache("d").folder.iterdir()
        part.write_bytes(part.read_bytes()[:100])
        self.equal(read_facts(rows, 1, "d"), first)
        assert asked == [5, 5]

    def test_a_cache_that_cannot_be_written_is_a_warning(self, places, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
        with pytest.warns(UserWarning, match="cannot be kept in"):
            facts = read_facts(self.rows(self.files(places, 2)), 1, "d")
        assert facts.sizes.min() > 0

    def test_a_dead_process_is_named(self, places, monkeypatch):
        monkeypatch.setattr("ride_bf.evaluation.image_facts.inspect_image", lambda *_: os._exit(9))
        for workers, remedy in ((3, "with fewer --num_workers than 3"), (1, "with more free memory")):
            with pytest.raises(ChildProcessError, match=f"run the same command again, {remedy}: it continues"):
                read_facts(self.rows(self.files(places, 2)), workers, "d")


def test_images_that_look_alike(places, capsys):
    """Only if asked for, and though the splits are given."""
    pytest.importorskip("imagehash")
    drawing = np.kron(np.random.default_rng(0).integers(0, 255, (6, 6)), np.ones((16, 16))).astype(np.uint8)
    one, other = listed(places, "train", 1)[0][0], listed(places, "test", 2)[0][0]
    Image.fromarray(drawing).convert("RGB").save(one, quality=95)
    Image.fromarray(drawing).convert("RGB").resize((90, 90)).save(other, quality=60)
    assert "similar" not in run(places)["findings"]
    found = run(places, "--group_by", "perceptual")["findings"]["similar"]
    groups = [{image["path"] for image in group["images"]} for group in found["groups"]]
    assert {str(one), str(other)} in groups
    assert "images that look alike but are not equal" in capsys.readouterr().out
    assert "Images that look alike" in (places.parent / "report" / PAGE).read_text()


def test_duplicates_against_a_comparison_of_all():
    digests = np.random.default_rng(0).integers(0, 30, 60).astype(np.uint64)
    expected = {
        tuple(np.flatnonzero(digests == value).tolist())
        for value in digests.tolist()
        if value != 0 and (digests == value).sum() > 1
    }
    found = [tuple(group.tolist()) for group in duplicates(digests)]
    assert len(expected) > 5
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert list(duplicates(np.zeros(4, dtype=np.uint64))) == []


class TestRefusals:
    def test_wrong_lists(self, places, capsys):
        with (places / "Places_LT_train.txt").open("a") as file:
            file.write("train/scene_000/1.jpg\n")
        report, _, error = run_refused(places, capsys)
        assert report is None
        assert "Places_LT_train.txt, line 128" in error

    def test_missing_images(self, places, capsys):
        path, _ = listed(places, "test", 3)[1]
        path.unlink()
        report, _, error = run_refused(places, capsys)
        assert report is None
        assert path.name in error

    def test_missing_folder(self, tmp_path, capsys):
        _, _, error = run_refused(tmp_path / "nowhere", capsys)
        assert error.startswith("error: ")

    def test_arguments(self, capsys):
        for arguments, message in (
            ([], "name the data: --data_dir, --dataset or both"),
            (["--dataset", "digits_lt", "--num_workers", "0"], "1 or more, not 0"),
        ):
            with pytest.raises(SystemExit) as info:
                main(arguments)
            assert info.value.code == 2
            assert message in capsys.readouterr().err


def test_the_classes_of_a_long_table_are_cut_short():
    classes = [{"name": f"class{label}", "group": "many", "train": 200 + label, "test": 1} for label in range(30)]
    nothing = {finding: {"count": 0} for finding in ("broken", "other_format", "turned", "very_small")}
    nothing |= {finding: {"count": 0} for finding in ("in_two_splits", "two_labels")}
    proposals = {"min_images": 2, "small_classes": [], "similar_names": [], "leaks": []}
    proposals |= {proposal: {"count": 0} for proposal in ("far_sizes", "rare_formats")}
    report = {"splits": {}, "shot_groups": {}, "imbalance_factor": 229 / 200, "classes": classes}
    shown = summary({**report, "findings": nothing, "proposals": proposals})
    names = [line.split()[-1] for line in shown.splitlines() if "class" in line and line.split()[0].isdigit()]
    assert names == [f"class{label}" for label in (29, 28, 27, 26, 25, 4, 3, 2, 1, 0)]
