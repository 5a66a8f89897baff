"""Annotation lists: the benchmarks' and one's own, and what is said of lists and folders that are wrong."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from datasets import ClassLabel
from PIL import Image

from data import DATA_SETS, class_counts, find_entry, load_long_tailed, recognise
from data.annotation_lists import class_names, imagenet_names, read_annotation_list
from ride_bf.benchmark.lists import make_list, measure
from ride_bf.evaluation.metrics import shot_groups

PUBLISHED = json.loads((ROOT / "data" / "class_counts.json").read_text())


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_images(folder, paths):
    for index, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), color=(index * 20 % 256, 40, 80)).save(folder / path)


TRAIN = ["train/a/air field/1.jpg", "train/a/air field/2.jpg", "train/b/bar/1.jpg", "train/l/library/indoor/1.jpg"]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A benchmark of three classes in the layout of Places-LT."""
    images = {"train": 4, "validation": 1, "test": 1}
    small = replace(DATA_SETS["places_lt"], num_classes=3, images=images, most=2, least=1)
    monkeypatch.setitem(DATA_SETS, "places_lt", small)
    folder = tmp_path / "Places LT"
    write_images(folder, [*TRAIN, "train/b/bar/9.jpg", "val/9.jpg"])
    (folder / "Places_LT_train.txt").write_text("".join(f"{p} {i}\n" for p, i in zip(TRAIN, [0, 0, 1, 2], strict=True)))
    (folder / "Places_LT_val.txt").write_text("train/b/bar/9.jpg 1\n")
    (folder / "Places_LT_test.txt").write_text("val/9.jpg 2\n")
    return folder


def test_rows_names_and_pixels(places):
    loaded = load_long_tailed("places_lt", places)
    assert set(loaded) == {"train", "validation", "test"}
    assert loaded["train"].features["label"] == ClassLabel(names=["air field", "bar", "library/indoor"])
    assert class_counts(loaded["train"]) == [2, 1, 1]
    expected = np.asarray(Image.open(places / TRAIN[1]))
    assert np.array_equal(np.asarray(loaded["train"][1]["image"]), expected)
    assert loaded["test"][0]["label"] == 2


def test_a_changed_list_is_read_anew(places):
    load_long_tailed("places_lt", places)
    (places / "Places_LT_test.txt").write_text("val/9.jpg 1\n")
    assert load_long_tailed("places_lt", places)["test"]["label"] == [1]


def test_an_unchanged_list_is_not_read_again(places, monkeypatch):
    first = load_long_tailed("places_lt", places)
    monkeypatch.setattr("data.annotation_lists.read_annotation_list", None)
    again = load_long_tailed("places_lt", places)
    assert again["train"][:] == first["train"][:]
    assert again["train"].features == first["train"].features


def test_windows_line_ends_tabs_byte_order_marks_and_empty_lines(places):
    lines = [f"{path}\t{label}" for path, label in zip(TRAIN, [0, 0, 1, 2], strict=True)]
    (places / "Places_LT_train.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", "  ", ""]).encode())
    assert load_long_tailed("places_lt", places)["train"]["label"] == [0, 0, 1, 2]


@pytest.mark.parametrize("shorter", [0, 1])
def test_more_paths_than_a_table_holds_are_refused(places, monkeypatch, shorter):
    """With the folder the paths take more than their list, which is refused before it is read, does."""
    whole = sum(len(f"{places.resolve()}/{path}") for path in TRAIN)
    monkeypatch.setattr("data.rows._MOST_BYTES", whole - shorter)
    if not shorter:
        assert len(load_long_tailed("places_lt", places)["train"]) == len(TRAIN)
        return
    with pytest.raises(
        ValueError, match=rf"has {whole} bytes of paths, and a split can have {whole - 1}: .*--streaming"
    ):
        load_long_tailed("places_lt", places)
    monkeypatch.setattr("data.rows._MOST_BYTES", 10)
    with pytest.raises(ValueError, match=r"Places_LT_train\.txt has .* bytes of paths"):
        read_annotation_list(places / "Places_LT_train.txt")


def rewrite(name, text):
    return lambda folder: (folder / name).write_text(text)


def append(name, text):
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


LISTED = "".join(f"{path} {label}\n" for path, label in zip(TRAIN, [0, 0, 1, 2], strict=True))
WRONG = {
    "no label": (rewrite("Places_LT_train.txt", "train/b/bar/1.jpg\n"), ["Places_LT_train.txt, line 1", "got 'train"]),
    "a name for a label": (append("Places_LT_train.txt", "train/x.jpg bar\n"), ["line 5", "'train/x.jpg bar'"]),
    "a negative label": (append("Places_LT_train.txt", "train/x.jpg -1\n"), ["line 5", "whole number from 0"]),
    "a fraction": (append("Places_LT_train.txt", "train/x.jpg 1.5\n"), ["line 5", "1.5"]),
    "only a label": (append("Places_LT_train.txt", "3\n"), ["line 5", "relative/path.jpg label"]),
    "many such lines": (append("Places_LT_train.txt", "a\nb\nc\n"), ["line 5", "2 more lines are wrong too"]),
    "columns in another order": (rewrite("Places_LT_train.txt", "0 train/b/bar/1.jpg\n"), ["line 1", "expected lines"]),
    "nothing": (rewrite("Places_LT_train.txt", ""), ["Places_LT_train.txt is empty"]),
    "nothing but empty lines": (rewrite("Places_LT_train.txt", "\n \n"), ["Places_LT_train.txt is empty"]),
    "a label too many": (
        append("Places_LT_train.txt", "train/x.jpg 7\n"),
        ["line 5: label 7", "0 to 2", "another data set's", "count from 1"],
    ),
    "a label too many in the test list": (
        rewrite("Places_LT_test.txt", "val/9.jpg 3\n"),
        ["test.txt, line 1: label 3"],
    ),
    "a class without images": (
        rewrite("Places_LT_train.txt", LISTED.replace(" 1\n", " 2\n")),
        ["no image of 1 of 3 classes, the first [1]", "without gaps", "cut off"],
    ),
    "counting from 1": (
        rewrite("Places_LT_train.txt", LISTED.replace(" 2\n", " 3\n").replace(" 1\n", " 2\n").replace(" 0\n", " 1\n")),
        ["label 3 is not one of 0 to 2", "count from 1"],
    ),
    "an image twice": (
        append("Places_LT_train.txt", f"{TRAIN[0]} 1\n"),
        ["line 5", "is listed already", "train.txt, line 1, label 0; here 1", "1 duplicate line(s)"],
    ),
    "a test image trained on": (
        rewrite("Places_LT_test.txt", f"{TRAIN[2]} 1\n"),
        ["two splits, train", "line 3", "test.txt, line 1", "tested on its training images"],
    ),
    "a path out of the folder": (append("Places_LT_train.txt", "../secret.jpg 1\n"), ["line 5", "leads out of"]),
    "a path out of it on the way": (append("Places_LT_train.txt", "train/../../x.jpg 1\n"), ["line 5", "leads out of"]),
    "an absolute path": (append("Places_LT_train.txt", "/data/x.jpg 1\n"), ["line 5", "'/data/x.jpg'", "relative"]),
    "a path of Windows": (append("Places_LT_train.txt", "C:\\x.jpg 1\n"), ["line 5", "leads out of"]),
    "the other training list": (
        rewrite("Places_LT_train.txt", LISTED.replace(f"{TRAIN[1]} 0\n", "")),
        ["train images 4 expected, 3 found", "commonest class 2 expected, 1 found", "two training lists", "custom"],
    ),
    "a shorter test list": (
        rewrite("Places_LT_val.txt", "train/b/bar/9.jpg 1\nval/8.jpg 1\n"),
        ["validation images 1 expected, 2 found"],
    ),
    "another encoding": (
        lambda folder: (folder / "Places_LT_train.txt").write_bytes("train/café/1.jpg 0\n".encode("latin-1")),
        ["Places_LT_train.txt is not in UTF-8", "at byte 9", "iconv"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_list_is_explained(places, case):
    change, messages = WRONG[case]
    change(places)
    with pytest.raises(ValueError) as info:  # noqa: PT011
        load_long_tailed("places_lt", places)
    for message in messages:
        assert message in str(info.value), info.value


MISSING = {
    "one": (
        lambda folder: (folder / TRAIN[2]).unlink(),
        ["1 of 4 train images, the first: train/b/bar/1.jpg (", "train.txt, line 3)", "only in part", "case-sensitive"],
    ),
    "of two splits": (
        lambda folder: [(folder / path).unlink() for path in (TRAIN[0], "val/9.jpg")],
        ["1 of 4 train images", "1 of 1 test images, the first: val/9.jpg"],
    ),
    "all, in a folder below": (
        lambda folder: [
            (folder / "images").mkdir(),
            (folder / "train").rename(folder / "images/train"),
            (folder / "val").rename(folder / "images/val"),
        ],
        ["4 of 4 train images", "seem to be in", "images: move them up", "--data_dir"],
    ),
    "all, not unpacked": (
        lambda folder: [(folder / "train").rename(folder.parent / "t"), (folder / "val").rename(folder.parent / "v")],
        ["There is no train/ in it: have the images been unpacked"],
    ),
    "all, another data set's": (
        lambda folder: [path.rename(path.with_suffix(".png")) for path in [*folder.rglob("*.jpg")]],
        ["None of the images exists: does the list belong to these images?"],
    ),
    "a file where a folder should be": (
        lambda folder: [(folder / "val/9.jpg").unlink(), (folder / "val").rmdir(), (folder / "val").write_text("")],
        ["1 of 1 test images"],
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_missing_images_are_explained(places, case):
    change, messages = MISSING[case]
    change(places)
    with pytest.raises(FileNotFoundError) as info:
        load_long_tailed("places_lt", places)
    for message in [*messages, f"looked for in {places}"]:
        assert message in str(info.value), info.value


def test_at_most_five_missing_images_are_shown(tmp_path):
    (tmp_path / "train.txt").write_text("".join(f"x/{index}.jpg {index % 2}\n" for index in range(9)))
    with pytest.raises(
        FileNotFoundError, match=r"9 of 9 train images, the first: x/0.jpg .*x/4.jpg \(\S+ line 5\)\."
    ) as i:
        load_long_tailed("custom", tmp_path)
    assert "x/5.jpg" not in str(i.value)


def test_images_that_go_missing_once_cached_are_noticed(places):
    load_long_tailed("places_lt", places)
    (places / TRAIN[2]).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 train images are .* any more: .*bar/1.jpg. Put"):
        load_long_tailed("places_lt", places)


def test_an_unreadable_folder_is_named(places, monkeypatch):
    def refuse(folder):  # chmod does not keep root out, as which tests in a container run
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("data.rows.os.scandir", refuse)
    with pytest.raises(PermissionError, match=r"permission to read .*train/a/air field is missing; .*chmod"):
        load_long_tailed("places_lt", places)


def test_missing_lists_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ImageNet_LT_train.txt.*ImageNet_LT_test.txt.*--data_dir.*custom"):
        load_long_tailed("imagenet_lt", tmp_path)


def test_where_an_image_is_listed(places):
    assert find_entry("places_lt", places, str(places / TRAIN[3])) == f"{places}/Places_LT_train.txt, line 4"
    assert find_entry("places_lt", places, str(places / "val/9.jpg")) == f"{places}/Places_LT_test.txt, line 1"
    assert find_entry("places_lt", places, str(places / "val/8.jpg")) is None
    assert find_entry("places_lt", places, "/elsewhere/9.jpg") is None
    assert find_entry("digits_lt", None, "x.jpg") is None


def test_a_folder_is_recognised(places, tmp_path):
    assert recognise(places) == "places_lt"
    (places / "Places_LT_val.txt").unlink()
    assert recognise(places) == "places_lt"  # loading then says which list is missing
    assert recognise(tmp_path) == "custom"


def test_what_synthetic_data_says_of_itself_is_expected_of_it(places):
    (places / "Places_LT_train.txt").write_text(LISTED.replace(f"{TRAIN[1]} 0\n", ""))
    facts = {"num_classes": 3, "class_counts": [1, 1, 1], "images": {"train": 3, "validation": 1, "test": 1}}
    (places / "synthetic.json").write_text(json.dumps(facts))
    assert class_counts(load_long_tailed("places_lt", places)["train"]) == [1, 1, 1]
    facts["images"]["test"] = 2
    (places / "synthetic.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="test images 2 expected, 1 found"):
        load_long_tailed("places_lt", places)
    (places / "synthetic.json").write_text("{}")
    with pytest.raises(ValueError, match=r"synthetic.json is damaged \(KeyError.*data.synthesize"):
        load_long_tailed("places_lt", places)


FACTS = {  # training images, largest and smallest class, many-, medium- and few-shot classes
    "imagenet_lt": (1000, 115_846, 1280, 5, 385, 479, 136),
    "inaturalist18": (8142, 437_513, 1000, 2, 842, 4076, 3224),
    "places_lt": (365, 62_500, 4980, 5, 131, 163, 71),
}


@pytest.mark.parametrize("name", FACTS)
def test_published_counts(name):
    counts = PUBLISHED[name]
    groups = shot_groups(counts)
    sizes = [int(groups[group].sum()) for group in ("many", "medium", "few")]
    assert (len(counts), sum(counts), max(counts), min(counts), *sizes) == FACTS[name]
    benchmark = DATA_SETS[name]
    assert (benchmark.num_classes, benchmark.images["train"], benchmark.most, benchmark.least) == FACTS[name][:4]


PATHS = {
    "imagenet_lt": lambda label, index: f"train/n{1440764 + label:08d}/n{1440764 + label:08d}_{index}.JPEG",
    "inaturalist18": lambda label, index: f"train_val2018/Plantae/{label}/{label:04x}{index:028x}.jpg",
    "places_lt": lambda label, index: f"train/{'abcde'[label % 5]}/{'abcde'[label % 5]} {label}/{index:08d}.jpg",
}


@pytest.mark.parametrize("name", FACTS)
def test_lists_of_the_benchmarks_shape_load_to_the_published_numbers(name, tmp_path, monkeypatch):
    """Lists as long as the real ones, in random order; the images they name are not made for it."""
    rng = random.Random(0)
    path = PATHS[name]
    lines = [f"{path(label, i)} {label}" for label, count in enumerate(PUBLISHED[name]) for i in range(count)]
    rng.shuffle(lines)
    benchmark = DATA_SETS[name]
    for split, file in benchmark.lists.items():
        if split != "train":
            labels = (index % benchmark.num_classes for index in range(benchmark.images[split]))
            other = [
                f"{path(label, 10_000 + i)} {label}".replace("/", f"/{split}", 1) for i, label in enumerate(labels)
            ]
            (tmp_path / file).write_text("\n".join(other))
    (tmp_path / benchmark.lists["train"]).write_text("\n".join(lines))
    monkeypatch.setattr("data.rows.check_files", lambda splits, folder: None)
    loaded = load_long_tailed(name, tmp_path)
    assert class_counts(loaded["train"]) == PUBLISHED[name]
    assert {split: len(rows) for split, rows in loaded.items()} == benchmark.images
    line = lines[12_345].rpartition(" ")
    row = loaded["train"].data.column("image")[12_345].as_py()
    assert row == {"bytes": None, "path": str(tmp_path / line[0])}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read as Linux tells it")
def test_a_worker_keeps_little_memory_of_its_own(tmp_path):
    """However many batches it has made; 437,513 lines are measured by `python -m ride_bf.benchmark lists`."""
    make_list(tmp_path, 30_000)
    facts = measure(tmp_path)
    assert facts["images"] == 29_000
    assert facts["worker_last_batch_mib"] < 50


class TestNames:
    def rows(self, tmp_path, paths):
        path = tmp_path / "list.txt"
        path.write_text("".join(f"{image} {label}\n" for label, image in enumerate(paths)))
        return read_annotation_list(path)

    @pytest.mark.parametrize(
        ("paths", "names"),
        [
            (["train/n01440764/1.JPEG", "train/n01443537/1.JPEG"], ["n01440764", "n01443537"]),
            (["train_val2018/Plantae/0/a.jpg", "train_val2018/Aves/1/b.jpg"], ["Plantae/0", "Aves/1"]),
            (["train/a/attic/1.jpg", "train/l/library/indoor/1.jpg"], ["attic", "library/indoor"]),
            (["cat/1.jpg", "dog/x/1.jpg"], ["cat", "dog/x"]),
            (["images/1.jpg", "images/2.jpg"], ["0", "1"]),  # no folder a class
            (["1.jpg", "2.jpg"], ["0", "1"]),
            (["train/a/1.jpg", "val/a/1.jpg"], ["train/a", "val/a"]),
        ],
    )
    def test_names_from_folders(self, tmp_path, paths, names):
        assert class_names(self.rows(tmp_path, paths), len(names)) == names

    def test_imagenet(self):
        synsets = ["n01440764", *(f"n{2000000 + index:08d}" for index in range(998)), "n15075141"]
        names = imagenet_names(synsets)
        assert (names[0], names[285], names[999]) == ("tench", "Egyptian cat", "toilet tissue")
        assert len(set(names)) == 1000
        assert imagenet_names(synsets[:-1]) == synsets[:-1]
        swapped = [synsets[0], synsets[2], synsets[1], *synsets[3:]]
        assert imagenet_names(swapped) == swapped
