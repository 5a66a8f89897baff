"""One's own images: lists, folders, tables and data sets on the Hub."""

import csv
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from data import class_counts, load_long_tailed
from data.tables import Columns, standardise


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_image(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), color=(shade % 256, 40, 80)).save(path)


def write_classes(folder, counts, suffix=".jpg"):
    """Writes `counts` images of each class, no two of them equal."""
    for number, (name, count) in enumerate(counts.items()):
        for index in range(count):
            write_image(folder / name / f"{index}{suffix}", shade=5 * index + 60 * number)


COUNTS = {"ant lion": 10, "bee": 5, "cicada": 2, "dragonfly": 1}


def custom(place, **options):
    return load_long_tailed("custom", place, **options)


def test_folders_of_splits(tmp_path):
    folder = tmp_path / "insects"
    for split, counts in (("train", COUNTS), ("val", {"bee": 1}), ("Test", {"ant lion": 2, "bee": 1})):
        write_classes(folder / split, counts)
    loaded = custom(folder)
    assert list(loaded) == ["train", "validation", "test"]
    assert loaded["train"].features["label"] == ClassLabel(names=list(COUNTS))
    assert class_counts(loaded["train"]) == [10, 5, 2, 1]
    assert loaded["test"]["label"] == [0, 0, 1]
    assert np.array_equal(
        np.asarray(loaded["train"][3]["image"]), np.asarray(Image.open(folder / "train/ant lion/3.jpg"))
    )


def test_folders_without_splits_get_a_test_split_that_stays(tmp_path):
    write_classes(tmp_path / "x", COUNTS)
    with pytest.warns(UserWarning, match=r"has no test split: 4 of its 18 training images, 0 to 50 % of each class"):
        first = custom(tmp_path / "x")
    assert class_counts(first["train"]) == [8, 4, 1, 1]
    assert class_counts(first["test"]) == [2, 1, 1, 0]
    with pytest.warns(UserWarning, match="no test split"):
        again = custom(tmp_path / "x", validation_fraction=0.3)
    paths = [
        {row["path"] for row in split.cast_column("image", ImageFeature(decode=False))["image"]}
        for split in again.values()
    ]
    assert class_counts(again["validation"]) == [2, 1, 0, 0]
    assert len(set.union(*paths)) == sum(map(len, paths)) == 18
    assert again["test"][:]["label"] == first["test"][:]["label"]


def test_a_changed_folder_is_read_anew(tmp_path):
    write_classes(tmp_path / "x/train", COUNTS)
    write_classes(tmp_path / "x/test", COUNTS)
    assert class_counts(custom(tmp_path / "x")["train"]) == [10, 5, 2, 1]
    write_image(tmp_path / "x/train/cicada/more/deep.PNG")
    write_image(tmp_path / "x/train/cicada/.hidden.png")
    (tmp_path / "x/train/cicada/notes.txt").write_text("no image")
    (tmp_path / "x/train/readme.jpg").write_text("beside the classes")
    assert class_counts(custom(tmp_path / "x")["train"]) == [10, 5, 3, 1]


def test_lists_without_a_validation_list(tmp_path):
    write_classes(tmp_path / "im", COUNTS)
    names = list(COUNTS)
    lines = [f"im/{name}/{i}.jpg {names.index(name)}" for name in names for i in range(COUNTS[name])]
    (tmp_path / "my-train.txt").write_text("\n".join(lines[1:]))
    (tmp_path / "my_test.txt").write_text(lines[0])
    loaded = custom(tmp_path)
    assert list(loaded) == ["train", "test"]
    assert class_counts(loaded["train"]) == [9, 5, 2, 1]
    assert loaded["train"].features["label"].names == names


def write_csv(path, rows, header=("image", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def test_a_table_of_paths_and_names(tmp_path):
    write_classes(tmp_path / "im", {**COUNTS, 'comma, "quote"': 2})
    names = [*COUNTS, 'comma, "quote"']
    rows = [(f"im/{name}/{i}.jpg", name) for name in names for i in range({**COUNTS, names[-1]: 2}[name])]
    write_csv(tmp_path / "images.csv", rows)
    with pytest.warns(UserWarning, match=r"images.csv has no test split"):
        loaded = custom(tmp_path / "images.csv")
    assert loaded["train"].features["label"].names == sorted(names)
    assert class_counts(loaded["train"]) == [8, 4, 1, 1, 1]

    table = pa.table({"file": [row[0] for row in rows], "species": [names.index(row[1]) for row in rows]})
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    pyarrow.parquet.write_table(table.slice(1), tmp_path / "train.parquet")
    pyarrow.parquet.write_table(table.slice(0, 1), tmp_path / "test.parquet")
    loaded = custom(tmp_path, image_column="file", label_column="species")
    assert class_counts(loaded["train"]) == [9, 5, 2, 1, 2]
    assert loaded["test"]["label"] == [0]
    assert loaded["test"][0]["image"].size == (12, 10)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_as_spreadsheets_save_it(tmp_path, delimiter):
    write_classes(tmp_path / "im", {"bee; wasp": 2, "käfer, groß": 2})
    for split, index in (("train", 0), ("test", 1)):
        with (tmp_path / f"{split}.csv").open("w", newline="", encoding="utf-8-sig") as file:
            rows = [(f"im/{name}/{index}.jpg", name) for name in ("bee; wasp", "käfer, groß")]
            csv.writer(file, delimiter=delimiter).writerows([("image", "label"), *rows])
    loaded = custom(tmp_path)
    assert loaded["train"].features["label"].names == ["bee; wasp", "käfer, groß"]
    assert class_counts(loaded["test"]) == [1, 1]


def test_names_of_figures_alone(tmp_path):
    write_classes(tmp_path / "im", {"1": 2, "2": 2, "x": 1})
    write_csv(tmp_path / "train.csv", [("im/1/0.jpg", "1"), ("im/2/0.jpg", "2"), ("im/x/0.jpg", "x")])
    write_csv(tmp_path / "test.csv", [("im/1/1.jpg", "1"), ("im/2/1.jpg", "2")])
    loaded = custom(tmp_path)
    assert loaded["train"].features["label"].names == ["1", "2", "x"]
    assert class_counts(loaded["test"]) == [1, 1, 0]


def test_a_table_of_categories(tmp_path):
    write_classes(tmp_path / "im", {"ant": 2, "bee": 2})
    for split, index in (("train", 0), ("test", 1)):
        labels = pa.array(["bee", "ant"]).dictionary_encode()
        table = pa.table({"image": [f"im/bee/{index}.jpg", f"im/ant/{index}.jpg"], "label": labels})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    assert custom(tmp_path)["test"]["label"] == [1, 0]


def test_a_table_with_the_images_in_it(tmp_path):
    features = Features({"picture": ImageFeature(), "kind": ClassLabel(names=["a", "b"])})
    images = [Image.new("RGB", (3, 4), (shade, 0, 0)) for shade in range(5)]
    for split, labels in (("train", [0, 1, 0, 0, 1]), ("validation", [1] * 5), ("test", [0] * 5)):
        rows = Dataset.from_dict({"picture": images, "kind": labels}, features=features)
        rows.to_parquet(tmp_path / f"{split}.parquet")
    loaded = custom(tmp_path, image_column="picture", label_column="kind")
    assert list(loaded) == ["train", "validation", "test"]
    assert loaded["train"].features["label"].names == ["a", "b"]
    assert loaded["train"][4]["image"].getpixel((0, 0)) == (4, 0, 0)


def hub_like(**splits):
    features = Features({"image": ImageFeature(), "label": Value("string"), "id": Value("int64")})
    image = Image.new("RGB", (3, 4))
    rows = {
        split: Dataset.from_dict({"image": [image] * len(labels), "label": labels, "id": range(len(labels))}, features)
        for split, labels in splits.items()
    }
    return DatasetDict(rows)


class TestStandardise:
    def test_names_of_splits_columns_and_classes(self):
        loaded = standardise(hub_like(train=["b", "a", "b"], valid=["a"], extra=["c"]), "user/name")
        assert list(loaded) == ["train", "validation"]
        assert list(loaded["train"].features) == ["image", "label"]
        assert loaded["train"].features["label"].names == ["a", "b"]
        assert loaded["train"]["label"] == [1, 0, 1]

    def test_a_split_without_labels_is_left_out(self):
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
        image = Image.new("RGB", (3, 4))
        train = Dataset.from_dict({"image": [image] * 2, "label": [0, 1]}, features=features)
        test = Dataset.from_dict({"image": [image], "label": [-1]}, features=features)
        assert list(standardise(DatasetDict(train=train, test=test), "user/name")) == ["train"]

    def test_a_class_of_the_test_alone(self):
        with pytest.raises(ValueError, match=r"user/name, split test has 1 class\(es\) without training images, 'c'"):
            standardise(hub_like(train=["a", "b"], test=["c"]), "user/name")

    def test_no_training_split(self):
        with pytest.raises(ValueError, match=r"user/name has no training split, only extra"):
            standardise(hub_like(extra=["a"]), "user/name")

    def test_missing_columns(self):
        with pytest.raises(
            ValueError, match=r"no column 'img', only \['image', 'label', 'id'\]; name it with --image_c"
        ):
            standardise(hub_like(train=["a", "b"]), "user/name", Columns(image="img"))


HUB_IDS = ("user/name", "food101", "user/name.v2", "user.name/imagenet_1.0", "food.101")
NO_HUB_IDS = ("/images", "/data/images", "./name", "../name", "~/name", "a/b/c", "name/", "user/na me", "user/name.git")


@pytest.mark.parametrize("place", HUB_IDS)
def test_the_hub_is_asked_for_every_id_that_it_accepts(place, monkeypatch):
    asked = []
    answer = hub_like(train=["a", "b"], test=["a"])
    monkeypatch.setattr("datasets.load_dataset", lambda name: asked.append(name) or answer)
    assert class_counts(custom(place)["train"]) == [1, 1]
    assert asked == [place]


@pytest.mark.parametrize("place", [*NO_HUB_IDS, "user/a--b", "user/a..b"])
def test_the_hub_is_asked_for_no_other_place(place, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", None)
    with pytest.raises(FileNotFoundError, match="does not exist; expected one of"):
        custom(place)


def test_a_data_set_that_needs_code_is_explained():
    with pytest.raises(ValueError, match=r"no data set of that id to load \(Dataset scripts are no longer supported"):
        custom("user/name.py")


def folder_with(tmp_path, *files):
    for file in files:
        write_image(tmp_path / file)
    return tmp_path


def table_with(tmp_path, text, name="train.csv", encoding="utf-8"):
    (tmp_path / name).write_text(text, encoding=encoding)
    return tmp_path


WRONG = {
    "no place": (lambda tmp: None, ["--data_dir: a folder, a table or the id"]),
    "a typo in a path": (
        lambda tmp: (tmp / "photos").mkdir() or tmp / "fotos",
        ["fotos does not exist; did you mean", "photos?"],
    ),
    "a folder that is not there": (lambda tmp: tmp / "nothing", ["nothing does not exist", "train/CLASS/*.jpg"]),
    "an id that the Hub does not give out": (
        lambda tmp: "user/name",
        ["'user/name' does not exist here, and the Hub has no data set of that id"],
    ),
    "a table that is not there": (lambda tmp: "images.csv", ["'images.csv' does not exist here", "the path of one"]),
    "an empty folder": (lambda tmp: tmp, ["has no folders of images", "expected one of: lists"]),
    "splits without training images": (lambda tmp: folder_with(tmp, "val/a/1.jpg"), ["has val but no folder train"]),
    "images without classes": (
        lambda tmp: folder_with(tmp, "train/1.jpg"),
        ["has no folders of images, but 1 image(s) without a class, such as train/1.jpg", "own/train/CLASS/"],
    ),
    "the folder of a class": (
        lambda tmp: folder_with(tmp, "ant/1.jpg", "ant/2.jpg", "bee/1.jpg") / "ant",
        [
            "ant has no folders of images, but 2 image(s) ",
            "name the folder above: --data_dir /",
            "own; expected one of",
        ],
    ),
    "one class": (lambda tmp: folder_with(tmp, "train/a/1.jpg"), ["has one class only"]),
    "a class of the test alone": (
        lambda tmp: folder_with(tmp, "train/a/1.jpg", "train/b/1.jpg", "test/c/1.jpg"),
        ["1 class(es) without training images, 'c'", "'a', 'b'"],
    ),
    "another kind of file": (lambda tmp: table_with(tmp, "", "x.json") / "x.json", ["x.json is not a table", ".csv"]),
    "other columns": (
        lambda tmp: table_with(tmp, "file,label\n1.jpg,a\n"),
        ["train.csv has no column 'image', only ['file', 'label']; name it with --image_column"],
    ),
    "an empty cell": (lambda tmp: table_with(tmp, "image,label\n1.jpg,1\n2.jpg,\n"), ["'label' is empty in row 2;"]),
    "an empty name": (lambda tmp: table_with(tmp, "image,label\n1.jpg,a\n2.jpg, \n"), ["'label' is empty in row 2;"]),
    "another encoding": (
        lambda tmp: table_with(tmp, "image,label\n1.jpg,kä\n", encoding="latin1"),
        ["train.csv is not in UTF-8", "iconv -f latin1"],
    ),
    "another encoding, as spreadsheets have it": (
        lambda tmp: table_with(tmp, "image,label\n1.jpg,a\n", encoding="utf-16"),
        ["train.csv is not in UTF-8", "iconv -f utf-16"],
    ),
    "one image a class": (
        lambda tmp: folder_with(tmp, "train/a/1.jpg", "train/b/1.jpg"),
        ["no class has a second image"],
    ),
    "no rows": (lambda tmp: table_with(tmp, "image,label\n"), ["train.csv has no rows"]),
    "an empty table": (lambda tmp: table_with(tmp, ""), ["train.csv cannot be read as csv"]),
    "rows of different length": (lambda tmp: table_with(tmp, "image,label\na,b,c\n"), ["cannot be read as csv"]),
    "an image twice in a table": (
        lambda tmp: table_with(tmp, "image,label\n1.jpg,0\n1.jpg,1\n"),
        ["'1.jpg' is listed already", "train.csv, row 1, label 0; here 1"],
    ),
    "no Parquet": (lambda tmp: table_with(tmp, "x", "train.parquet"), ["train.parquet is no Parquet file"]),
    "two training lists": (
        lambda tmp: table_with(table_with(tmp, "a 0\n", "a_train.txt"), "a 0\n", "b_train.txt"),
        ["several lists for train: a_train.txt, b_train.txt; keep one"],
    ),
    "a table's missing images": (
        lambda tmp: table_with(tmp, "image,label\n1.jpg,a\n2.jpg,b\n"),
        ["2 of 2 train images, the first: 1.jpg", "train.csv, row 1"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_place_is_explained(tmp_path, case):
    make, messages = WRONG[case]
    folder = tmp_path / "own"
    folder.mkdir()
    with pytest.raises((ValueError, FileNotFoundError)) as info:
        custom(make(folder))
    for message in messages:
        assert message in str(info.value), info.value


@pytest.mark.parametrize("options", [{"image_column": "file"}, {"label_column": "image"}])
def test_columns_are_refused_where_there_are_none(tmp_path, options):
    folder = folder_with(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg", "train/b/2.jpg")
    (name, value) = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{folder} has no columns, so --{name} {value} would do nothing"):
        custom(folder, **options)
    (folder / "train.txt").write_text("train/a/1.jpg 0\ntrain/a/2.jpg 0\ntrain/b/1.jpg 1\ntrain/b/2.jpg 1\n")
    with pytest.raises(ValueError, match=f"{folder}/train.txt has no columns, so --{name} {value} would do nothing"):
        custom(folder, **options)


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    scandir = os.scandir

    def scan(folder):
        if str(folder).endswith("ant lion"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    write_classes(tmp_path / "train", COUNTS)
    monkeypatch.setattr("data.folders.os.scandir", scan)
    with pytest.raises(PermissionError, match=r"train/ant lion cannot be read \(Permission denied\); remedy: chmod"):
        custom(tmp_path)
