"""Whatever a folder, a table or a list holds is read, or an error or a notice names it."""

import os
import shutil
import tarfile
import unicodedata

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from test_training import train

from data import class_counts, load_long_tailed
from data.notices import printed_notices
from data.rows import GROUP
from data.tables import Columns, standardise
from ride_bf import check_data

SHADE = iter(range(10**6))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def picture(seed=None):
    """A small picture unlike any other, unless `seed` is given."""
    number = next(SHADE) if seed is None else seed
    return Image.new("RGB", (12, 10), (number % 251, number // 251 % 251, 7 * number % 256))


def write(folder, *names):
    """Writes a picture under each name; a name with another suffix gets a text."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".jpg", ".png"):
            picture().save(path, "PNG")
        else:
            path.write_text("text")
    return folder


def classes(*names, splits=("train", "test"), each=2):
    return [f"{split}/{name}/{index}.png" for split in splits for name in names for index in range(each)]


def load(place, **options):
    """The splits, and the notices of loading them."""
    with printed_notices(lambda _: None) as told:
        loaded = load_long_tailed("custom", place, **options)
    return loaded, told


def error_of(place, **options):
    """The message of the error. It names the place."""
    with pytest.raises((ValueError, OSError)) as error:
        load(place, **options)
    return str(error.value)


def paths(split):
    return [row["path"] for row in split.cast_column("image", ImageFeature(decode=False))["image"]]


def test_a_given_split_without_some_classes(tmp_path):
    place = write(tmp_path, *classes("ant", "bee", "cat"))
    write(place, "validation/bee/0.png")
    assert load(place)[1] == [f"{place}: the validation split has no images of 2 class(es): ant, cat"]


class TestFolders:
    def test_other_files_are_counted_by_suffix(self, tmp_path):
        folder = write(tmp_path, *classes("cat", "dog"), "train/cat/a.TXT", "train/cat/b.txt", "train/dog/raw.nef")
        loaded, told = load(write(folder, "test/dog/no_suffix"))
        assert class_counts(loaded["train"]) == [2, 2]
        (notice,) = told
        assert notice.startswith(f"{folder}: files that are no images of a known format are skipped: 2 .txt (such as ")
        assert "1 .nef (such as train/dog/raw.nef)" in notice
        assert "1 without suffix (such as test/dog/no_suffix)" in notice

    def test_files_outside_the_class_folders(self, tmp_path):
        folder = write(
            tmp_path, *classes("cat", "dog"), "train/lost.png", "beside.jpg", "train/labels.csv", "notes.pdf"
        )
        _, told = load(folder)
        assert f"{folder}: images outside the class folders are skipped: train/lost.png, beside.jpg" in told
        (others,) = [notice for notice in told if "known format" in notice]
        assert "1 .csv (such as train/labels.csv)" in others
        assert "1 .pdf (such as notes.pdf)" in others

    def test_hidden_images(self, tmp_path):
        folder = write(tmp_path, *classes("cat", "dog"), "train/cat/._0.png", "train/.trash/x/1.png", ".git/config")
        loaded, told = load(folder)
        assert class_counts(loaded["train"]) == [2, 2]
        assert told == [f"{folder}: hidden images and folders are skipped: train/.trash, train/cat/._0.png"]

    @pytest.mark.parametrize("file", [None, "notes.txt", ".hidden.png"])
    def test_a_class_without_images(self, tmp_path, file):
        folder = write(tmp_path, *classes("cat", "dog"), *([f"train/emu/{file}"] if file else []))
        (folder / "train/emu").mkdir(exist_ok=True)
        message = error_of(folder)
        assert message.startswith(f"{folder} has class folders without images: train/emu/.")
        assert "--allow_empty_classes" in message
        loaded, told = load(folder, allow_empty_classes=True)
        assert loaded["train"].features["label"].names == ["cat", "dog"]
        assert f"{folder}: classes without images are left out: train/emu/" in told

    def test_an_empty_class_of_the_test_is_named(self, tmp_path):
        folder = write(tmp_path, *classes("cat", "dog"), *classes("emu", splits=["train"]))
        (folder / "test/emu").mkdir()
        loaded, told = load(folder)
        assert class_counts(loaded["test"]) == [2, 2, 0]
        assert told == [
            f"{folder}: class folders without images: test/emu/",
            f"{folder}: the test split has no images of 1 class(es): emu",
        ]

    def test_classes_without_a_single_image_of_a_known_format(self, tmp_path):
        folder = write(tmp_path, "train/cat/1.xyz", "train/dog/1.xyz")
        assert error_of(folder).startswith(
            f"{folder} has no folders of images, only files of other kinds: 2 .xyz (such"
        )

    @pytest.mark.parametrize(
        ("files", "beside"),
        [
            (["train/1.png", "bus/1.png", "car/1.png", "car/2.png"], "bus/ (1 images), car/ (2 images)"),
            ([*classes("cat", "dog"), "extra/cat/1.png"], "extra/ (1 images)"),
            (["test/1.png", "bus/1.png"], "bus/ (1 images)"),
            ([*classes("cat", "dog"), "unlabelled/deep/down/1.JPG"], "unlabelled/ (1 images)"),
        ],
    )
    def test_folders_beside_the_splits(self, tmp_path, files, beside):
        message = error_of(write(tmp_path, *files))
        assert f"{tmp_path} has folders of images beside " in message
        assert f"which are no split: {beside}. Move them into" in message

    def test_folders_without_images_may_be_beside_the_splits(self, tmp_path):
        loaded, _ = load(write(tmp_path, *classes("cat", "dog"), "docs/a.txt"))
        assert len(loaded["train"]) == 4

    @pytest.mark.parametrize("names", [("val", "valid"), ("Train", "training"), ("test", "TEST")])
    def test_two_folders_of_one_split(self, tmp_path, names):
        message = error_of(write(tmp_path, *classes("cat", "dog", splits=["train", *names])))
        assert f"{tmp_path} has several folders for " in message
        assert message.endswith("; keep one")

    def test_case_does_not_matter(self, tmp_path):
        files = [f"{split}/{name}/IMG{index}.{'JPG' if index else 'Png'}"
                 for split in ("Train", "VALID", "tesT") for name in ("cat", "dog") for index in range(2)]  # fmt: skip
        loaded, told = load(write(tmp_path, *files))
        assert {split: class_counts(rows) for split, rows in loaded.items()} == {
            "train": [2, 2],
            "validation": [2, 2],
            "test": [2, 2],
        }
        assert told == []

    def test_a_folder_whose_name_has_the_signs_of_a_pattern(self, tmp_path):
        folder = write(tmp_path / "birds [2024] *?", *classes("a[1]", "b*"))
        loaded, _ = load(folder)
        assert loaded["train"].features["label"].names == ["a[1]", "b*"]


class TestLinks:
    """`tmp_path/set` is the data set, with links in it."""

    @pytest.fixture
    def place(self, tmp_path):
        return write(tmp_path / "set", *classes("cat", "dog"))

    @pytest.mark.parametrize(
        ("link", "target", "what"),
        [
            ("train/cat/up", "..", "in which it lies itself"),
            ("train/cat/self", ".", "in which it lies itself"),
            ("train/cat/all", "/", "in which it lies itself"),
            ("train/cat/set", "../..", "in which it lies itself"),
            ("train/cat/other", "../dog", "which is part of the data set"),
            ("test/cat/more", "../../train/cat", "which is part of the data set"),
            ("val", "train", "which is part of the data set"),
        ],
    )
    def test_a_link_to_images_that_are_read_already(self, place, link, target, what):
        (place / link).symlink_to(target)
        message = error_of(place)
        assert message.startswith(f"{place}/{link} is a link to the folder ")
        assert f", {what}: its images would be there twice. Remove the link" in message

    @pytest.mark.parametrize("second", ["emu", "emu/birds", "."])
    def test_two_links_to_the_same_images_in_two_splits(self, place, tmp_path, second):
        write(tmp_path / "store", "emu/birds/1.png", "emu/2.png")
        (place / "train/emu").symlink_to(tmp_path / "store/emu")
        (place / "test/emu").symlink_to(tmp_path / "store" / second)
        message = error_of(place)
        assert "test/emu is a link to the folder" in message
        assert "which has images of the link train/emu too" in message

    def test_a_loop_outside_the_data_set(self, place, tmp_path):
        write(tmp_path / "store", "emu/1.png")
        (tmp_path / "store/emu/again").symlink_to(tmp_path / "store")
        (place / "train/emu").symlink_to(tmp_path / "store/emu")
        assert "train/emu/again is a link to the folder" in error_of(place)

    def test_links_out_of_the_folder_are_followed_and_named(self, place, tmp_path):
        store = write(tmp_path / "store", "emu/1.png", "one.png")
        (place / "train/emu").symlink_to(store / "emu")
        (place / "train/cat/linked.png").symlink_to(store / "one.png")
        loaded, told = load(place)
        assert class_counts(loaded["train"]) == [3, 2, 1]
        assert told == [
            f"{place}: links to folders elsewhere are followed: train/emu -> {store}/emu",
            f"{place}: images that are links are read: train/cat/linked.png",
            f"{place}: the test split has no images of 1 class(es): emu",
        ]

    def test_links_that_lead_nowhere(self, place):
        (place / "train/cat/gone.png").symlink_to("/nowhere.png")
        assert error_of(place) == (
            f"{place}/train/cat/gone.png is a link to /nowhere.png, which is not there; restore it or remove the link"
        )
        (place / "train/cat/gone.png").unlink()
        (place / "train/cat/circle").symlink_to("circle")
        assert "train/cat/circle is a link to circle, which is not there" in error_of(place)

    def test_many_links(self, place, tmp_path):
        """Links are compared by their folders, not each with each."""
        for index in range(300):
            write(tmp_path / f"store/{index}", "1.png")
            (place / f"train/{index}").symlink_to(tmp_path / f"store/{index}")
        loaded, _ = load(place)
        assert len(loaded["train"]) == 304


LATIN1 = os.fsdecode("käfer".encode("latin1"))


class TestNamesThatAreNotUtf8:
    @pytest.mark.parametrize("name", [f"train/cat/{LATIN1}.png", f"train/{LATIN1}/1.png", f"test/cat/x/{LATIN1}/1.png"])
    def test_images_and_folders(self, tmp_path, name):
        message = error_of(write(tmp_path, *classes("cat", "dog"), name))
        assert r"k\xe4fer" in message
        assert "is not in UTF-8. Rename the files, for example by: convmv -r -f latin1 -t utf8 --notest" in message
        message.encode()

    def test_a_place(self, tmp_path):
        message = error_of(write(tmp_path / LATIN1, *classes("cat", "dog")))
        assert r"/k\xe4fer is not in UTF-8. Rename the files" in message
        assert message.endswith(f"--notest {tmp_path}")

    def test_files_that_are_skipped_can_be_named(self, tmp_path):
        _, told = load(write(tmp_path, *classes("cat", "dog"), f"train/cat/{LATIN1}.txt", f"train/cat/.{LATIN1}.png"))
        assert len(told) == 2
        for notice in told:
            assert r"k\udce4fer" in notice
            notice.encode()

    def test_a_list(self, tmp_path):
        folder = write(tmp_path, "a/1.png", f"a/{LATIN1}.png")
        (folder / "train.txt").write_text("a/1.png 0\na/käfer.png 1\n")
        message = error_of(folder)
        assert "images are missing: 1 of 2 train images, the first: a/käfer.png" in message
        assert r"k\xe4fer.png is there, but its name is not in UTF-8. Rename the files" in message

    def test_a_list_of_another_encoding(self, tmp_path):
        (tmp_path / "train.txt").write_text("a/käfer.png 1\n", encoding="latin1")
        assert "train.txt is not in UTF-8" in error_of(tmp_path)
        assert "iconv -f latin1 -t utf-8 train.txt" in error_of(tmp_path)


class TestLists:
    LINES = "a/0.png 0\na/1.png 0\nb/0.png 1\nb/1.png 1\n"

    @pytest.fixture
    def place(self, tmp_path):
        return write(tmp_path, *(f"{name}/{index}.png" for name in "ab" for index in range(2)))

    @pytest.mark.parametrize("start", ["", ".\\", "./"])
    def test_paths_as_windows_writes_them(self, place, start):
        lines = [f"{start}{line}".replace("/", "\\") for line in self.LINES.splitlines()]
        (place / "Train.TXT").write_text("\r\n".join(lines))
        loaded, _ = load(place)
        assert sum(map(len, loaded.values())) == 4
        assert all(os.path.exists(path) for path in paths(loaded["train"]))

    def test_a_name_with_a_backslash_keeps_it(self, place):
        picture().save(place / "x\\y.png")
        (place / "train.txt").write_text(f"{self.LINES}x\\y.png 1\n")
        (place / "test.txt").write_text("a/0.png 0\n".replace("a/0", "a/2"))
        picture().save(place / "a/2.png")
        assert str(place / "x\\y.png") in paths(load(place)[0]["train"])

    def test_a_path_out_of_the_folder_with_backslashes(self, place):
        (place / "train.txt").write_text(f"{self.LINES}..\\c.png 1\n")
        assert "train.txt, line 5: '../c.png' leads out of the data set's folder" in error_of(place)

    def test_the_same_image_written_in_two_ways(self, place):
        (place / "train.txt").write_text(f"{self.LINES}./a/0.png 1\n")
        assert "train.txt, line 5: 'a/0.png' is listed already" in error_of(place)

    def test_another_case(self, place):
        (place / "train.txt").write_text(self.LINES.replace("b/1.png", "b/1.PNG"))
        assert f"{place}/b/1.png is there: names are case-sensitive" in error_of(place)

    def test_another_form_of_an_accent(self, place):
        picture().save(place / unicodedata.normalize("NFD", "b/é.png"))
        (place / "train.txt").write_text(self.LINES + unicodedata.normalize("NFC", "b/é.png 1\n"))
        message = error_of(place)
        assert "is there, but its accents are stored in another way" in message
        assert f"convmv -r -f utf8 -t utf8 --nfc (or --nfd) --notest {place}/b" in message

    def test_two_lists_of_one_split(self, place):
        for name in ("train.txt", "val.txt", "valid.TXT"):
            (place / name).write_text(self.LINES)
        assert error_of(place) == f"{place} has several lists for validation: val.txt, valid.TXT; keep one"

    def test_tables_beside_lists_are_named(self, place):
        (place / "train.txt").write_text(self.LINES)
        for name in ("train.csv", "extra.CSV", "more.parquet", "trainval.txt", "class_names.csv"):
            (place / name).write_text("image,label\n")
        (place / "class_names.txt").write_text("a\nb\n")
        told = load(place)[1]
        others = "train.csv, class_names.csv, extra.CSV, more.parquet, trainval.txt"
        assert f"{place}: train.txt is read, so these are not: {others}" in told

    def test_images_without_a_class_in_a_folder_of_a_split_are_named(self, place):
        write(place, "test/0.png")
        (place / "train.txt").write_text(self.LINES)
        told = load(place)[1]
        assert f"{place}: train.txt is read, so the images in test/, which have no class folders, are not" in told

    def test_a_list_may_name_images_in_a_folder_of_another_split(self, place):
        write(place, "val/a/0.png", "val/b/0.png")
        (place / "train.txt").write_text(self.LINES)
        (place / "test.txt").write_text("val/a/0.png 0\nval/b/0.png 1\n")
        assert class_counts(load(place)[0]["test"]) == [1, 1]


OTHER_FORMATS = {
    "list": ("train.txt", "a/0.png 0\nb/0.png 1\n"),
    "table": ("train.csv", "image,label\na/0.png,0\nb/0.png,1\n"),
    "folders": (None, None),
}


@pytest.mark.parametrize("read", OTHER_FORMATS)
@pytest.mark.parametrize("other", ["test/", "val/", "test.txt", "test.csv", "val.parquet"])
def test_a_split_in_another_format_is_an_error(tmp_path, read, other):
    name, text = OTHER_FORMATS[read]
    if name is None:
        write(tmp_path, *classes("a", "b", splits=["train"]))
    else:
        write(tmp_path, "a/0.png", "b/0.png")
        (tmp_path / name).write_text(text)
    is_same = (read, other) in (("list", "test.txt"), ("table", "test.csv")) or (read == "folders" and other[-1] == "/")
    if is_same:
        other = "test.parquet"
    if other.endswith("/"):
        write(tmp_path, f"{other}a/1.png", f"{other}b/1.png")
    else:
        (tmp_path / other).write_text("")
    split = "validation" if other.startswith("val") else "test"
    assert f"which has no split for {split}, but {other} would be one in another format. Convert it" in error_of(
        tmp_path
    )


class TestSplitsElsewhere:
    """Splits that are not at the top of the folder are an error: they would be pooled, or be classes."""

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            (
                [f"{name}/{split}/0.png" for name in ("cat", "dog") for split in ("train", "test")],
                "has splits inside of the folder cat/, which would be a class: cat/test/, cat/train/. Move ",
            ),
            (
                [*(f"Data/{path}" for path in classes("cat", "dog")), "samples/x.png"],
                "has splits inside of the folder Data/, which would be a class: Data/test/, Data/train/. Name ",
            ),
            (
                ["training_set/cat/0.png", "training_set/dog/0.png", "test-set/cat/0.png", "test-set/dog/0.png"],
                "would be classes. Rename them to the splits' names alone, for example test-set/ to test/",
            ),
            (
                ["birds_train/cat/0.png", "birds_test/cat/0.png"],
                "folders with the names of splits, birds_test/, birds_train/",
            ),
            (
                ["cat/0.png", "dog/0.png", "test_images/0.png"],
                "folders with the names of splits, test_images/, and no folder",
            ),
        ],
    )
    def test_hidden_splits(self, tmp_path, files, message):
        assert message in error_of(write(tmp_path, *files))

    def test_classes_named_after_trains(self, tmp_path):
        files = ["bullet_train/0.png", "train_station/0.png", "vehicle/train/0.png", "vehicle/bus/0.png"]
        loaded, told = load(write(tmp_path, *[name.replace("0.", f"{n}.") for name in files for n in range(5)]))
        assert loaded["train"].features["label"].names == ["bullet_train", "train_station", "vehicle"]
        assert (
            f"{tmp_path}: images in folders below a class folder have its class: vehicle/bus/, vehicle/train/" in told
        )

    def test_a_split_without_class_folders(self, tmp_path):
        message = error_of(write(tmp_path, *classes("cat", "dog", splits=["train"]), "test/0.png"))
        assert message.startswith(
            f"{tmp_path}/test has images but no class folders: sort its images into {tmp_path}/test/CLASS/"
        )

    def test_archives_without_streaming(self, tmp_path):
        assert "train on archives with --streaming, or unpack them for this command" in error_of(
            write(tmp_path, "train-0.tar", "test-0.tar")
        )

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            (["a/cat/0.png", "a/dog/0.png"], "If its folders cat/, dog/ are the classes: --data_dir "),
            (
                ["im/0.png", "metadata.csv", "train.jsonl"],
                "This was not read: metadata.csv, train.jsonl. If it has the labels",
            ),
        ],
    )
    def test_why_there_is_one_class(self, tmp_path, files, message):
        said = error_of(write(tmp_path, *files))
        assert f"has one class only, {files[0].split('/')[0]!r}" in said
        assert message in said

    def test_output_of_commands_is_no_class(self, tmp_path):
        output = ["report/check_data.json", "report/long_tail.png", "outputs/a/run.json", "outputs/a/curve.png"]
        loaded, told = load(write(tmp_path, *[f"{name}/{n}.png" for name in "ab" for n in range(5)], *output))
        assert loaded["train"].features["label"].names == ["a", "b"]
        assert f"{tmp_path}: output folders of earlier commands are skipped: outputs/a/, report/" in told


def write_table(folder, labels, name="train.csv", header="image,label"):
    lines = [f"im/{index}.png,{label}" for index, label in enumerate(labels)]
    write(folder, *(f"im/{index}.png" for index in range(len(labels))))
    (folder / name).write_text("\n".join([header, *lines, ""]))
    return folder


class TestCells:
    @pytest.mark.parametrize(
        ("labels", "names", "told"),
        [
            (["0", "1", "2"], ["0", "1", "2"], False),
            (["2", "10", "0", "1", *map(str, range(3, 10))], [str(n) for n in range(11)], False),
            (["010", "020"], ["010", "020"], True),
            (["00", "01", "02"], ["00", "01", "02"], True),
            (["5", "7"], ["5", "7"], True),
            (["9", "10"], ["9", "10"], True),
            (["True", "False"], ["False", "True"], False),
            (["1.0", "2.0"], ["1.0", "2.0"], False),
            (["NA", "null", "nan", "None"], ["NA", "None", "nan", "null"], False),
            (["1e3", "0x10"], ["0x10", "1e3"], False),
            (["2024-01-01", "12:30"], ["12:30", "2024-01-01"], False),
        ],
    )
    def test_a_label_is_the_text_of_its_cell(self, tmp_path, labels, names, told):
        folder = write_table(tmp_path, labels * 2)
        loaded, notices = load(folder)
        assert loaded["train"].features["label"].names == names
        said = [notice for notice in notices if "so they are the names of classes" in notice]
        assert bool(said) == told
        assert all(notice.startswith(f"{folder}/train.csv: ") for notice in said)

    def test_an_image_may_be_called_by_a_number_or_na(self, tmp_path):
        for name in ("NA", "1.0", "2", "True"):
            picture().save(tmp_path / name, "PNG")
        (tmp_path / "train.csv").write_text("image,label\nNA,0\n1.0,1\n2,0\nTrue,1\n")
        loaded, _ = load(tmp_path)
        names = [os.path.basename(path) for split in loaded.values() for path in paths(split)]
        assert sorted(names) == ["1.0", "2", "NA", "True"]

    def test_a_label_below_0(self, tmp_path):
        message = error_of(write_table(tmp_path, ["0", "1", "-1"]))
        assert message == (f"{tmp_path}/train.csv: label -1 is no class; give these images a label or leave them out")

    @pytest.mark.parametrize(
        ("kind", "labels", "names"),
        [
            (pa.int8(), [3, 4], ["3", "4"]),
            (pa.uint64(), [0, 1], ["0", "1"]),
            (pa.bool_(), [True, False], ["False", "True"]),
            (pa.float32(), [0.0, 1.0], ["0", "1"]),
            (pa.large_string(), ["b", "a"], ["a", "b"]),
            (pa.string_view(), ["b", "a"], ["a", "b"]),
            (pa.dictionary(pa.int8(), pa.string()), ["b", "a"], ["a", "b"]),
        ],
    )
    def test_types_of_parquet(self, tmp_path, kind, labels, names):
        write(tmp_path, *(f"{index}.png" for index in range(4)))
        images = pa.array([f"{index}.png" for index in range(4)], kind if "string" in str(kind) else pa.string())
        table = pa.table({"image": images, "label": pa.array(labels * 2, kind)})
        pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
        loaded, _ = load(tmp_path)
        assert loaded["train"].features["label"].names == names
        assert sum(map(len, loaded.values())) == 4

    def test_labels_of_no_kind(self, tmp_path):
        write(tmp_path, "0.png")
        table = pa.table({"image": ["0.png"], "label": [0.5]})
        pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
        assert "train.parquet: column 'label' holds double; expected names or whole numbers" in error_of(tmp_path)

    def test_two_columns_of_one_name(self, tmp_path):
        write_table(tmp_path, ["a,b", "b,a"], header="image,label,label")
        assert error_of(tmp_path) == f"{tmp_path}/train.csv has several columns 'label'; rename all but one"

    def test_a_cell_of_several_lines_in_a_long_table(self, tmp_path):
        write(tmp_path, "0.png", "1.png")
        text = "x\n" * 600_000  # longer than what is parsed at once
        (tmp_path / "train.csv").write_text(f'image,note,label\n0.png,"{text}",a\n1.png,"{text}",b\n')
        (tmp_path / "test.csv").write_text("image,label\n2.png,a\n")
        write(tmp_path, "2.png")
        assert class_counts(load(tmp_path)[0]["train"]) == [1, 1]


class TestEmptyCells:
    @pytest.mark.parametrize("column", ["image", "label"])
    @pytest.mark.parametrize("suffix", ["csv", "parquet"])
    def test_paths(self, tmp_path, column, suffix):
        write(tmp_path, *(f"{index}.png" for index in range(6)))
        rows = {"image": [f"{index}.png" for index in range(6)], "label": [0, 1, 0, 1, 0, 1]}
        rows[column][3] = None
        if suffix == "csv":
            lines = [
                "image,label",
                *(f"{i or ''},{'' if n is None else n}" for i, n in zip(*rows.values(), strict=True)),
            ]
            (tmp_path / "train.csv").write_text("\n".join(lines))
        else:
            pyarrow.parquet.write_table(pa.table(rows), tmp_path / "train.parquet")
        assert error_of(tmp_path) == (
            f"{tmp_path}/train.{suffix}: column {column!r} is empty in row 4; fill them, or leave "
            "these rows out with --on_broken_image skip"
        )
        loaded, told = load(tmp_path, skip_empty_rows=True)
        assert sum(map(len, loaded.values())) == 5
        assert f"{tmp_path}/train.{suffix}: rows without image or label are left out: row 4" in told

    @pytest.mark.parametrize("kind", [Value("string"), ClassLabel(names=["a", "b"]), Value("float64"), Value("int64")])
    @pytest.mark.parametrize("column", ["image", "label"])
    def test_images_in_a_table(self, tmp_path, column, kind):
        values = {"string": ["a", "b"], "float64": [0.0, 1.0]}.get(kind.dtype, [0, 1])
        values = ["a", "b"] if kind == Value("string") else values
        rows = {"image": [picture() for _ in range(6)], "label": values * 3}
        rows[column][1] = None
        Dataset.from_dict(rows, Features({"image": ImageFeature(), "label": kind})).to_parquet(
            tmp_path / "train.parquet"
        )
        assert f"{tmp_path}, split train: column {column!r} is empty in row 2; fill" in error_of(tmp_path)
        loaded, told = load(tmp_path, skip_empty_rows=True)
        assert sum(map(len, loaded.values())) == 5
        assert f"{tmp_path}, split train: rows without image or label are left out: row 2" in told

    def test_a_split_of_empty_rows(self, tmp_path):
        write_table(tmp_path, ["0", "1", "0"])
        (tmp_path / "test.csv").write_text("image,label\nim/2.png,\n")
        (tmp_path / "train.csv").write_text("image,label\nim/0.png,0\nim/1.png,1\n")
        message = error_of(tmp_path, skip_empty_rows=True)
        assert message.startswith(f"{tmp_path}/test.csv: no row of the test split has an image and a label; fill them")

    def test_a_table_without_labels(self, tmp_path):
        write_table(tmp_path, ["0", "1", "0", "1"])
        (tmp_path / "test.csv").write_text("image\nim/0.png\n")
        message = error_of(tmp_path)
        assert message.startswith(
            f"{tmp_path}/test.csv has no column 'label', only ['image']; name it with --label_column"
        )
        assert message.endswith("or move a table without it out of the folder")


class TestTables:
    def test_case_does_not_matter(self, tmp_path):
        write_table(tmp_path, ["a", "b"], name="TRAIN.CSV")
        shutil.copytree(tmp_path / "im", tmp_path / "more")
        (tmp_path / "Test.Csv").write_text("image,label\nmore/0.png,a\n")
        assert class_counts(load(tmp_path)[0]["test"]) == [1, 0]

    @pytest.mark.parametrize(
        "names", [("val.csv", "valid.csv"), ("test.csv", "TEST.csv"), ("x_train.csv", "train.csv")]
    )
    def test_two_tables_of_one_split(self, tmp_path, names):
        write_table(tmp_path, ["a", "b"])
        for name in names:
            (tmp_path / name).write_text("image,label\n")
        assert f"{tmp_path} has several tables for " in error_of(tmp_path)

    def test_tables_of_no_split_are_named(self, tmp_path):
        write_table(tmp_path, ["a", "b"] * 2)
        for name in ("train-1.csv", "extra.CSV", "more.parquet", "class_names.txt"):
            (tmp_path / name).write_text("")
        told = load(tmp_path)[1]
        others = "class_names.txt, extra.CSV, train-1.csv, more.parquet"
        assert f"{tmp_path}: train.csv is read, so these are not: {others}" in told

    def test_only_tables_of_no_split(self, tmp_path):
        write_table(tmp_path, ["a", "b"], name="images.csv")
        message = error_of(tmp_path)
        assert ".csv (such as images.csv)" in message or "has one class only" in message

    def test_a_folder_with_the_signs_of_a_pattern(self, tmp_path):
        folder = tmp_path / "birds [2024]"
        folder.mkdir()
        write_images_table(folder / "train.parquet", "abab")
        write_images_table(folder / "Test.PARQUET", "ab")
        assert {split: class_counts(rows) for split, rows in load(folder)[0].items()} == {
            "train": [2, 2],
            "test": [1, 1],
        }
        (tmp_path / "a::b").mkdir()
        shutil.copy(folder / "train.parquet", tmp_path / "a::b")
        assert "train.parquet has '::' in its name, where the library datasets ends a path; rename it" in error_of(
            tmp_path / "a::b"
        )


def write_images_table(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = Features({"image": ImageFeature(), "label": Value("string")})
    Dataset.from_dict({"image": [picture() for _ in labels], "label": list(labels)}, features).to_parquet(path)


WRONG_FILES = {
    "a file is missing": (
        lambda folder: (folder / "train-00001-of-00002.parquet").unlink(),
        "train-00000-of-00002.parquet is one of 2 files of a table, and number 1 is missing; download all of them",
    ),
    "one file and several": (
        lambda folder: write_images_table(folder / "train.parquet", "ab"),
        "has several tables for train: ",
    ),
    "another version": (
        lambda folder: write_images_table(folder / "train-00000-of-00003.parquet", "ab"),
        "has several tables for train: ",
    ),
    "a damaged file": (
        lambda folder: (folder / "train-00001-of-00002.parquet").write_bytes(b"PAR1"),
        "train-00001-of-00002.parquet is no Parquet file, or is damaged",
    ),
    "a pointer": (
        lambda folder: (folder / "test-00001-of-00002.parquet").write_text("version https://git-lfs.github.com/x"),
        "test-00001-of-00002.parquet is only the pointer of a file in Git LFS; download the file itself by: git",
    ),
}


class TestTablesOfSeveralFiles:
    NAMES = ("{}-00000-of-00002", "{}-00001-of-00002")

    def write_shards(self, folder, names=NAMES):
        for split, labels in (("train", "abbb"), ("test", "ab")):
            for name in names:
                write_images_table(folder / f"{name.format(split)}.parquet", labels)
        return folder

    @pytest.mark.parametrize("below", [".", "data", "birds [2024]"])
    def test_a_clone_of_a_data_set_on_the_hub(self, tmp_path, below):
        write(tmp_path, "README.md", ".gitattributes")
        self.write_shards(tmp_path / below)
        loaded, told = load(tmp_path)
        assert {split: class_counts(rows) for split, rows in loaded.items()} == {"train": [2, 6], "test": [2, 2]}
        assert told == ([] if below == "." else [f"{tmp_path}: the tables in {below}/ are read"])

    def test_names_with_a_hash(self, tmp_path):
        names = ("{}-00000-of-00002-a09b74b3ef9c3b56", "{}-00001-of-00002-1234567890abcdef")
        assert class_counts(load(self.write_shards(tmp_path, names))[0]["train"]) == [2, 6]

    @pytest.mark.parametrize("suffix", ["csv", "parquet"])
    def test_tables_of_paths(self, tmp_path, suffix):
        write(tmp_path, *(f"im/{index}.png" for index in range(8)))
        for shard in range(2):
            rows = {"image": [f"im/{4 * shard + index}.png" for index in range(4)], "label": ["01", "01", "2", "2"]}
            rows["label"][1] = None if shard else "01"
            file = tmp_path / f"train-{shard:05d}-of-00002.{suffix}"
            if suffix == "parquet":
                pyarrow.parquet.write_table(pa.table(rows), file)
            else:
                lines = [f"{image},{label or ''}" for image, label in zip(*rows.values(), strict=True)]
                file.write_text("\n".join(["image,label", *lines]))
        assert f"train-00001-of-00002.{suffix}: column 'label' is empty in row 2" in error_of(tmp_path)
        loaded, _ = load(tmp_path, skip_empty_rows=True)
        assert sum(map(len, loaded.values())) == 7
        assert loaded["train"].features["label"].names == ["01", "2"]
        (tmp_path / "im/7.png").unlink()
        shutil.rmtree(tmp_path / "cache")
        assert "im/7.png (" in error_of(tmp_path, skip_empty_rows=True)

    @pytest.mark.parametrize("case", WRONG_FILES)
    def test_what_is_wrong(self, tmp_path, case):
        change, message = WRONG_FILES[case]
        change(self.write_shards(tmp_path))
        said = error_of(tmp_path)
        assert message in said
        assert str(tmp_path) in said

    def test_other_columns_in_one_file(self, tmp_path):
        self.write_shards(tmp_path)
        Dataset.from_dict({"img": ["a"], "label": ["a"]}).to_parquet(tmp_path / "train-00001-of-00002.parquet")
        assert "train-00001-of-00002.parquet has no column 'image', only ['img', 'label']" in error_of(tmp_path)

    @pytest.mark.parametrize("file", ["train-00001-of-00002", "test-00000-of-00002"])
    def test_labels_of_another_kind_in_one_file(self, tmp_path, file):
        self.write_shards(tmp_path)
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=["x", "y"])})
        rows = Dataset.from_dict({"image": [picture()], "label": [0]}, features)
        rows.to_parquet(tmp_path / f"{file}.parquet")
        message = error_of(tmp_path)
        assert f"{tmp_path}/{file}.parquet: column 'label' has the classes x, y" in message
        assert f"but text in {tmp_path}/train-00000-of-00002.parquet; write the same kind in all files" in message

    def test_other_names_of_classes_in_one_file(self, tmp_path):
        for split, names in (("train", ["x", "y"]), ("test", ["y", "x"])):
            features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
            rows = Dataset.from_dict({"image": [picture(), picture()], "label": [0, 1]}, features)
            rows.to_parquet(tmp_path / f"{split}.parquet")
        assert "test.parquet: column 'label' has the classes y, x, but the classes x, y in " in error_of(tmp_path)

    def test_one_file_of_several_is_no_table(self, tmp_path):
        self.write_shards(tmp_path)
        message = error_of(tmp_path / "train-00000-of-00002.parquet")
        assert message.endswith(f"is one of several files of a table; name their folder, {tmp_path}")

    def test_several_configurations(self, tmp_path):
        for name in ("large", "small"):
            self.write_shards(tmp_path / name)
        assert error_of(tmp_path) == (
            f"{tmp_path} has tables in large/, small/; name one of these folders: --data_dir {tmp_path}/large"
        )

    def test_a_table_in_a_class_folder_is_no_data_set(self, tmp_path):
        folder = write(tmp_path, *(f"{name}/{index}.png" for name in ("cat", "dog") for index in range(3)))
        (folder / "cat/train.csv").write_text("image,label\n")
        loaded, told = load(folder)
        assert sum(map(len, loaded.values())) == 6
        assert any("1 .csv (such as cat/train.csv)" in notice for notice in told)


class TestHub:
    def test_splits_that_are_not_used(self):
        rows = Dataset.from_dict({"image": [picture(), picture()], "label": ["010", "020"]})
        with printed_notices(lambda _: None) as told:
            loaded = standardise({"train": rows, "test": rows, "extra": rows, "test2": rows}, "user/name")
        assert loaded["train"].features["label"].names == ["010", "020"]
        assert told == [
            "user/name: splits that are not used: extra, test2",
            "user/name: the labels are not 0 to 1, so they are the names of classes: 010, 020",
        ]

    @pytest.mark.parametrize("names", [("val", "valid"), ("Validation", "dev"), ("test", "Test")])
    def test_two_splits_of_one_meaning(self, names):
        rows = Dataset.from_dict({"image": [picture(), picture()], "label": [0, 1]})
        with pytest.raises(ValueError, match=r"user/name has several splits for (validation|test), one of them"):
            standardise({"train": rows, **dict.fromkeys(names, rows)}, "user/name")


def command(main, *arguments):
    """The message with which a command ends. There is no traceback: the code is a text or 2."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, str)
    return end.value.code


def test_errors_of_commands_are_one_line_without_a_traceback(tmp_path):
    folder = write(tmp_path / "set", "train/1.png", "bus/1.png", "car/1.png")
    said = command(check_data.main, "--data_dir", folder, "--output_dir", tmp_path / "out", "--num_workers", 1)
    assert said.startswith(f"error: {folder} has folders of images beside train/, which are no split: bus/ (1 images)")
    with pytest.raises(SystemExit) as end:
        train(tmp_path / "run", "--dataset", "custom", "--data_dir", folder, "--dry_run")
    assert end.value.code == said


class TestColumns:
    @pytest.mark.parametrize("stored", ["csv", "tsv", "parquet", "images"])
    def test_a_column_of_splits(self, tmp_path, stored):
        """The only table may have the split of each row, and then no other split is drawn."""
        write(tmp_path, *(f"{index}.png" for index in range(7)))
        rows = {
            "image": [f"{index}.png" for index in range(7)],
            "label": ["a", "b", "a", "b", "a", "b", "a"],
            "Split": ["train", "train", "VAL", "test ", "test", "valid", "training"],
        }
        path = tmp_path / ("train.parquet" if stored == "images" else f"train.{stored}")

        def store():
            if stored == "images":
                images = [picture(index) for index in range(7)]
                Dataset.from_dict({**rows, "image": images}).to_parquet(path)
            elif stored == "parquet":
                pyarrow.parquet.write_table(pa.table(rows), path)
            else:
                separator = {"csv": ",", "tsv": "\t"}[stored]
                path.write_text("\n".join(separator.join(line) for line in [rows, *zip(*rows.values(), strict=True)]))

        store()
        loaded, _ = load(tmp_path)
        assert {split: class_counts(of_split) for split, of_split in loaded.items()} == {
            "train": [2, 1],
            "validation": [1, 1],
            "test": [1, 1],
        }
        assert loaded["test"][0]["label"] == 1
        if stored == "images":
            assert loaded["test"][1]["image"].getpixel((0, 0)) == picture(4).getpixel((0, 0))
        rows["Split"][3] = "fold 1"
        store()
        assert "column 'split' has 'fold 1', which is no split, in row 4; write train, val or test" in error_of(
            tmp_path
        )
        rows["Split"] = ["test"] * 7
        store()
        assert "column 'split' has no row for train" in error_of(tmp_path)

    def test_the_hub_s_converted_layout(self, tmp_path):
        write_images_table(tmp_path / "0.parquet", "abab")
        for name in ("train/0000", "train/0001", "test/0000"):
            (tmp_path / "set/default" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "0.parquet", tmp_path / f"set/default/{name}.parquet")
        for place in (tmp_path / "set", tmp_path / "set/default"):
            assert {split: len(rows) for split, rows in load(place)[0].items()} == {"train": 8, "test": 4}
        (tmp_path / "set/default/train/0000.parquet").unlink()
        assert "train has 0001.parquet, but number 0 is missing; download all files" in error_of(tmp_path / "set")

    def test_the_only_class_is_named(self, tmp_path):
        write_table(tmp_path, ["owl", "owl"])
        assert "has one class only, 'owl'; a classifier needs at least two" in error_of(tmp_path)
        (tmp_path / "train.csv").unlink()
        write_images_table(tmp_path / "train.parquet", "aa")
        assert "has one class only, 'a'; a classifier needs at least two" in error_of(tmp_path)

    def test_images_beside_the_folder_of_tables(self, tmp_path):
        (tmp_path / "data").mkdir()
        write_images_table(tmp_path / "data/train.parquet", "abab")
        message = error_of(write(tmp_path, "assets/0.png"))
        assert message.startswith(f"{tmp_path} has tables in data/ and images beside them. To read the tables, name")
        assert f"--data_dir {tmp_path}/data. " in message

    def test_images_inside_of_the_folder_of_tables(self, tmp_path):
        (tmp_path / "data").mkdir()
        write_table(tmp_path / "data", ["a", "b"] * 5)
        loaded, told = load(tmp_path)
        assert sum(class_counts(loaded["train"])) + len(loaded["test"]) == 10
        assert f"{tmp_path}: the tables in data/ are read" in told

    def test_archives_whose_images_have_another_suffix(self, tmp_path):
        for split, suffix in (("train", "png"), ("test", "jpg")):
            with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
                for index in range(4):
                    picture().save(tmp_path / "image", "PNG")
                    (tmp_path / "label").write_text(str(index % 2))
                    tar.add(tmp_path / "image", f"{index}.{suffix}")
                    tar.add(tmp_path / "label", f"{index}.cls")
        message = error_of(tmp_path, streaming=True)
        assert f"{tmp_path}/test-0.tar has images .jpg, but {tmp_path}/train-0.tar has .png. The suffix" in message

    def test_a_column_of_splits_in_files_of_splits(self, tmp_path):
        write(tmp_path, *(f"{index}.png" for index in range(4)))
        (tmp_path / "train.csv").write_text("image,label,split\n0.png,a,x\n1.png,b,x\n")
        (tmp_path / "test.csv").write_text("image,label\n2.png,a\n3.png,b\n")
        assert (
            f"{tmp_path}: the files are the splits, so the column 'split' of the tables is not used"
            in load(tmp_path)[1]
        )

    @pytest.mark.parametrize(
        ("name", "lines"), [("train.csv", "image,label\r{},a\r{},b"), ("train.txt", "{} 0\r{} 1\r")]
    )
    def test_old_line_ends(self, tmp_path, name, lines):
        write(tmp_path, *(f"{index}.png" for index in range(4)))
        (tmp_path / name).write_bytes(lines.format("0.png", "1.png").encode())
        (tmp_path / name.replace("train", "test")).write_bytes(lines.format("2.png", "3.png").encode())
        assert class_counts(load(tmp_path)[0]["train"]) == [1, 1]

    def test_columns_of_other_kinds(self, tmp_path):
        pyarrow.parquet.write_table(pa.table({"image": [1, 2], "label": ["a", "b"]}), tmp_path / "train.parquet")
        message = error_of(tmp_path)
        assert message.endswith(
            "'image' holds int64; expected images or their paths. Name their column with --image_column"
        )
        images = [picture(), picture()]
        rows = {"image": images, "label": ["a", "b"], "who": [[1], [2]]}
        Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
        assert "'who' holds list<" in error_of(tmp_path, group_by="who")

    def test_empty_groups_are_images_of_their_own(self):
        rows = Dataset.from_dict(
            {"image": [picture() for _ in range(4)], "label": [0, 1, 0, 1], "who": ["", " ", "x ", "x"]},
            Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"]), "who": Value("string")}),
        )
        loaded = standardise({"train": rows}, "place", Columns(group="who"))
        assert loaded["train"][GROUP][:] == [None, None, "x", "x"]
