"""Benchmarks with their images in a data set on the Hub: names, lists, and what is said of copies that do not fit."""

import io
import json
import re
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from hub_errors import hub_error
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from PIL import Image
from test_training import train

from data import DATA_SETS, class_counts, find_entry, list_facts, load_long_tailed, recognise, undecoded
from data.annotation_lists import list_digest, read_annotation_list
from data.digest import images_digest
from data.hub_images import MISSING, SEVERAL, file_names, match_names
from data.hub_loading import load_from_hub
from ride_bf import check_data, evaluate
from ride_bf.evaluation.results import read_results
from ride_bf.runs.provenance import load_splits_of, read_data

HUB = "hf:user/name"
LISTS = {
    "train": [
        ("train/n01440764/n01440764_7.JPEG", 0),
        ("train/n01440764/n01440764_3.JPEG", 0),
        ("train/n01443537/n01443537_1.JPEG", 1),
    ],
    "validation": [("train/n01443537/n01443537_2.JPEG", 1)],
    "test": [("val/n01440764/ILSVRC2012_val_00000009.JPEG", 0), ("val/n01443537/ILSVRC2012_val_00000005.JPEG", 1)],
}
# as ILSVRC/imagenet-1k stores them, with more images than the lists have, and in another order
STORED = {
    "train": [
        *("n01443537_2_n01443537", "n01443537_1_n01443537", "n01440764_3_n01440764", "n01440764_4_n01440764"),
        "n01440764_7_n01440764",
    ],
    "validation": ["ILSVRC2012_val_00000005_n01443537", "ILSVRC2012_val_00000009_n01440764"],
    "test": ["ILSVRC2012_test_00000001"],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def jpeg(name):
    """An image whose content depends on its name."""
    pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "JPEG")
    return stored.getvalue()


def copy(stored=STORED, suffix=".JPEG", **columns):
    """A data set as the Hub's: the images have their names as paths or, if `columns` is given, in other columns."""
    features = Features({"image": ImageFeature(), "label": Value("int64"), **dict.fromkeys(columns, Value("string"))})
    splits = {}
    for split, names in stored.items():
        images = [{"bytes": jpeg(name), "path": None if columns else f"{name}{suffix}"} for name in names]
        rows = {"image": images, "label": [-1] * len(names)}
        rows |= {column: [form(name) for name in names] for column, form in columns.items()}
        splits[split] = Dataset.from_dict(rows, features=features)
    return DatasetDict(splits)


def write_lists(folder, lists=LISTS, of="imagenet_lt"):
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in lists.items():
        (folder / DATA_SETS[of].lists[split]).write_text("".join(f"{path} {label}\n" for path, label in lines))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A small ImageNet-LT whose lists are in its usual folder, and the answers of the Hub, by id."""
    folder = tmp_path / "ImageNet_LT"
    small = replace(
        DATA_SETS["imagenet_lt"],
        usual_place=str(folder),
        num_classes=2,
        images={"train": 3, "validation": 1, "test": 2},
        most=2,
        least=1,
        known_lists={},
    )
    monkeypatch.setitem(DATA_SETS, "imagenet_lt", small)
    write_lists(folder)
    answers = {"user/name": copy()}

    def load_dataset(name):
        if isinstance(answers[name], Exception):
            raise answers[name]
        return answers[name]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return answers


def contents(split):
    return [row["image"]["bytes"] for row in undecoded(split)]


class TestLoading:
    def test_the_lists_say_which_images_are_in_which_split(self, hub):
        loaded = load_long_tailed("imagenet_lt", HUB)
        assert list(loaded) == ["train", "validation", "test"]
        for split, lines in LISTS.items():
            assert loaded[split]["label"] == [label for _, label in lines]
        assert list(loaded["train"].features) == ["image", "label"]
        assert loaded["train"].features["label"] == ClassLabel(names=["n01440764", "n01443537"])
        names = ["n01440764_7_n01440764", "n01440764_3_n01440764", "n01443537_1_n01443537"]
        assert contents(loaded["train"]) == [jpeg(name) for name in names], "the very bytes of the Hub"
        assert contents(loaded["validation"]) == [jpeg("n01443537_2_n01443537")], "of the Hub's training images"
        assert contents(loaded["test"]) == [jpeg(name) for name in STORED["validation"][::-1]]
        assert loaded["train"][0]["image"].size == (10, 12)

    def test_the_images_are_not_copied(self, hub):
        stored = hub["user/name"]["train"].data.column("image").chunk(0).field("bytes").buffers()[2].address
        loaded = load_long_tailed("imagenet_lt", HUB)["train"].data.column("image").chunk(0)
        assert loaded.field("bytes").buffers()[2].address == stored

    @pytest.mark.parametrize(
        "columns",
        [
            {"file_name": lambda name: f"{name}.JPEG"},
            {"caption": lambda name: "a fish", "image_id": lambda name: name.rpartition("_n")[0] or name},
            {"path": lambda name: f"ILSVRC\\{name}.jpg"},
        ],
    )
    def test_names_in_a_column(self, hub, columns):
        expected = load_long_tailed("imagenet_lt", HUB)
        hub["user/name"] = copy(**columns)
        loaded = load_long_tailed("imagenet_lt", HUB)
        assert {split: contents(rows) for split, rows in loaded.items()} == {
            split: contents(rows) for split, rows in expected.items()
        }

    def test_the_lists_of_the_repository(self, hub, tmp_path, monkeypatch):
        repository = tmp_path / "repository"
        (tmp_path / "ImageNet_LT").rename(repository)
        monkeypatch.setattr("data.hub_images.hf_hub_download", lambda name, file, repo_type: str(repository / file))
        assert class_counts(load_long_tailed("imagenet_lt", HUB)["train"]) == [2, 1]
        assert list_facts("imagenet_lt", HUB)["test"]["file"] == str(repository / "ImageNet_LT_test.txt")

    def test_where_an_image_is_listed(self, hub, tmp_path):
        line = f"{tmp_path}/ImageNet_LT/ImageNet_LT_train.txt, line 2"
        assert find_entry("imagenet_lt", HUB, "n01440764_3_n01440764.JPEG") == line
        assert find_entry("imagenet_lt", HUB, "n01440764_4_n01440764.JPEG") is None

    def test_an_image_can_be_left_out(self, hub, tmp_path):
        (tmp_path / "exclude.txt").write_text("n01440764_3_n01440764.JPEG\n")
        loaded = load_long_tailed("imagenet_lt", HUB, exclude=tmp_path / "exclude.txt")
        assert class_counts(loaded["train"]) == [1, 1]

    def test_the_place_is_the_hub_s_for_your_own_images_too(self, hub):
        assert recognise(HUB) == "custom"
        features = Features({"image": ImageFeature(), "label": Value("string")})
        rows = {"image": [{"bytes": jpeg(name), "path": None} for name in "abc"], "label": ["x", "y", "x"]}
        hub["user/name"] = DatasetDict(dict.fromkeys(("train", "test"), Dataset.from_dict(rows, features=features)))
        assert class_counts(load_long_tailed("custom", HUB)["train"]) == [2, 1]

    @pytest.mark.parametrize("name", ["imagenet_lt", "custom", "cifar100_lt"])
    def test_a_place_that_is_no_id(self, hub, name):
        with pytest.raises(ValueError, match=r"hf:/data/x: '/data/x' is no id of a data set on the Hub; write hf:USER"):
            load_long_tailed(name, "hf:/data/x")


def error_of(hub, kind=FileNotFoundError):
    with pytest.raises(kind) as info:
        load_long_tailed("imagenet_lt", HUB)
    return str(info.value)


class TestErrors:
    def test_images_that_are_not_there(self, hub):
        hub["user/name"] = copy({"train": STORED["train"][1:]})
        message = error_of(hub)
        assert message.startswith(
            "hf:user/name: 3 of 6 listed images are not in it, the first: train/n01443537/n01443537_2.JPEG ("
        )
        for said in ("val.txt, line 1)", "val/n01443537/ILSVRC2012_val_00000005.JPEG (", "the images' own paths"):
            assert said in message

    def test_images_that_are_there_twice(self, hub):
        hub["user/name"] = copy(STORED | {"more": ["n01440764_7_n01440764", "n01440764_3"]})
        message = error_of(hub)
        assert "2 of 6 listed images are not found exactly once" in message
        assert "the first: train/n01440764/n01440764_7.JPEG (" in message
        assert "not in it" not in message

    def test_names_of_another_kind(self, hub):
        hub["user/name"] = copy({"train": ["0001", "0002"]}, file=lambda name: f"{name}.png")
        message = error_of(hub)
        assert "6 of 6 listed images are not in it" in message
        assert "Does this data set have all images of ImageNet-LT" in message

    def test_no_images(self, hub):
        hub["user/name"] = DatasetDict(train=Dataset.from_dict({"text": ["a"]}))
        assert re.match(r"user/name has no column of images, only \['text'\]; expected one", error_of(hub, ValueError))

    def test_lists_with_other_counts_are_noticed_before_images_are_loaded(self, hub, tmp_path):
        write_lists(tmp_path / "ImageNet_LT", {"test": LISTS["test"][:1]})
        del hub["user/name"]
        assert "test images 2 expected, 1 found" in error_of(hub, ValueError)

    def test_a_list_that_is_not_with_the_others(self, hub, tmp_path):
        (tmp_path / "ImageNet_LT/ImageNet_LT_val.txt").unlink()
        assert re.search(r"needs the lists \S+ImageNet_LT_val.txt too; put them there", error_of(hub))

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (EntryNotFoundError("404"), "does not have it; put the lists ImageNet_LT_train.txt, "),
            (None, "cannot be reached and is not in the cache; put the lists"),  # what the client itself raises
        ],
    )
    def test_no_lists(self, hub, tmp_path, monkeypatch, error, message):
        (tmp_path / "ImageNet_LT").rename(tmp_path / "elsewhere")
        if error is not None:
            monkeypatch.setattr("data.hub_images.hf_hub_download", raising(error))
        assert f"not in {tmp_path}/ImageNet_LT, and the repository user/name {message}" in error_of(hub)

    def test_a_gated_data_set(self, hub, tmp_path, monkeypatch):
        remedy = "user/name is gated: accept its terms at https://huggingface.co/datasets/user/name, and log in with"
        hub["user/name"] = datasets.exceptions.DatasetNotFoundError(
            "Dataset 'user/name' is a gated dataset on the Hub."
        )
        assert remedy in error_of(hub, ValueError)
        for place in (HUB, "user/name"):
            with pytest.raises(ValueError, match=re.escape(remedy)):
                load_long_tailed("custom", place)
        (tmp_path / "ImageNet_LT").rename(tmp_path / "elsewhere")
        monkeypatch.setattr("data.hub_images.hf_hub_download", raising(hub_error(GatedRepoError, 401)))
        assert remedy in error_of(hub, ValueError)

    def test_no_connection(self, hub):
        hub["user/name"] = ConnectionError("Couldn't reach 'user/name' on the Hub (OfflineModeIsEnabled)")
        assert "user/name is not in the cache, and the Hub cannot be reached (Couldn't" in error_of(hub, ValueError)

    def test_what_the_library_says_offline_is_understood(self):
        message = r"^nobody/nothing is not in the cache, and the Hub cannot be reached \(.*; load it once with"
        with pytest.raises(ValueError, match=message):
            load_from_hub("nobody/nothing")

    def test_no_such_data_set(self, hub, tmp_path, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        hub["user/name"] = datasets.exceptions.DatasetNotFoundError("Dataset 'user/name' doesn't exist on the Hub")
        assert "user/name cannot be loaded from the Hub (Dataset 'user/name' doesn't exist" in error_of(hub, ValueError)
        (tmp_path / "ImageNet_LT").rename(tmp_path / "elsewhere")
        monkeypatch.setattr("data.hub_images.hf_hub_download", raising(hub_error(RepositoryNotFoundError, 404)))
        assert "is the id right? If it is private, log in" in error_of(hub, ValueError)


def raising(error):
    def call(*arguments, **options):
        raise error

    return call


ENDING = DATA_SETS["imagenet_lt"].hub_ending
PLACES = ["train/a/airfield/1.jpg", "train/b/bar/1.jpg", "train/l/library/indoor/2.jpg", "val/9.jpg"]


class TestNames:
    @pytest.mark.parametrize(
        ("listed", "stored", "expected"),
        [
            (["train/a/1.jpg"], ["x.jpg", "train/a/1.jpg"], [1]),
            (["train/a/1.jpg"], ["./train/a/1.png"], [0]),
            (["train/a/1.jpg"], ["train\\a\\1"], [0]),
            (["train/a/1.jpg"], ["1.jpg"], [0]),
            (["train/a/1.jpg"], ["data/train/a/1.jpg"], [0]),
            (["train/a/1.jpg"], ["images/1.jpg"], [0]),  # the base name is unique
            (["train/a/1.jpg"], ["images/1.jpg", "thumbs/1.jpg"], [SEVERAL]),
            (["train/a/1.jpg"], ["thumbs/train/a/1.jpg", "train/a/1.jpg"], [1]),  # an equal path comes first
            (["train/a/1.jpg"], ["1.jpg", "a/1.jpg"], [1]),  # then the longer end
            (["train/a/1.jpg"], ["train/a/1.jpg", "train/a/1.png"], [SEVERAL]),
            (["train/a/1.jpg"], ["train/a/11.jpg", ""], [MISSING]),
            (["train/a/1.jpg", "train/b/1.jpg"], ["1.jpg"], [SEVERAL, SEVERAL]),
            (["train/a/1.jpg", "train/b/1.jpg"], ["x/a/1.jpg", "c/1.jpg"], [MISSING, MISSING]),
            (PLACES, ["9.jpg", "bar/1.jpg", "airfield/1.jpg", "library/indoor/2.jpg"], [2, 1, 3, 0]),
            (PLACES, ["x/val/9.jpg", "b/bar/1.jpg", "a/airfield/1.jpg", "l/library/indoor/2.jpg"], [2, 1, 3, 0]),
            # of Places, a base name alone proves nothing: that 2 is another class's
            (PLACES, ["9.jpg", "bar/1.jpg", "airfield/1.jpg", "field/2.jpg"], [2, 1, MISSING, 0]),
        ],
    )
    def test_matches(self, listed, stored, expected):
        assert match_names(file_names(pa.array(listed)), file_names(pa.array(stored))).tolist() == expected

    def test_the_class_in_imagenet_s_names(self):
        names = ["n01440764_762_n01440764.JPEG", "ILSVRC2012_val_00000001_n01440764.JPEG", "n01440764_762", "a.jpeg"]
        expected = ["n01440764_762", "ILSVRC2012_val_00000001", "n01440764_762", "a"]
        assert file_names(pa.array(names), ENDING).to_pylist() == expected
        assert file_names(pa.array(names[:1])).to_pylist() == ["n01440764_762_n01440764"]


class TestDigests:
    def digest(self, tmp_path, content):
        (tmp_path / "list.txt").write_bytes(content)
        return list_digest(read_annotation_list(tmp_path / "list.txt"))

    def test_the_digest_is_of_the_lines(self, tmp_path):
        plain = self.digest(tmp_path, b"a/1.jpg 0\nb/2.jpg 1\n")
        assert plain == "44d866d8b2fbaf9e3e1c43433655908b"  # of b2sum -l 128
        for same in (
            b"a/1.jpg 0\r\nb/2.jpg 1",
            b"\xef\xbb\xbfa/1.jpg\t0\n\n./b/2.jpg  1\n\n",
            b"# x\na/1.jpg 0\nb\\2.jpg 1",
        ):
            assert self.digest(tmp_path, same) == plain
        for other in (b"a/1.jpg 0\nb/2.jpg 0\n", b"b/2.jpg 1\na/1.jpg 0\n", b"a/1.jpg 0\n"):
            assert self.digest(tmp_path, other) != plain

    def test_lists_that_are_not_the_published_ones_are_named_by_digest(self, hub, tmp_path):
        write_lists(tmp_path / "ImageNet_LT", {"train": LISTS["train"][:1] + LISTS["train"][2:]})
        digest = list_facts("imagenet_lt", None)["train"]["digest"]
        assert f"Found: ImageNet_LT_train.txt (2 images, digest {digest})" in error_of(hub, ValueError)

    def test_the_public_list_is_known(self, hub, monkeypatch, tmp_path, recwarn):
        digest = list_facts("imagenet_lt", HUB)["validation"]["digest"]
        known = replace(DATA_SETS["imagenet_lt"], known_lists={"validation": digest})
        monkeypatch.setitem(DATA_SETS, "imagenet_lt", known)
        assert [facts["known"] for facts in list_facts("imagenet_lt", HUB).values()] == [None, True, None]
        load_long_tailed("imagenet_lt", HUB)
        assert not any("public validation list" in str(warning.message) for warning in recwarn.list)
        write_lists(tmp_path / "ImageNet_LT", {"validation": [(LISTS["validation"][0][0], 0)]})
        with pytest.warns(UserWarning, match=rf"public validation list .* other lines .* not {digest}\): results may"):
            load_long_tailed("imagenet_lt", HUB)
        assert list_facts("imagenet_lt", HUB)["validation"]["known"] is False

    def test_equal_totals_with_other_classes(self, tmp_path, monkeypatch):
        counts = tmp_path / "class_counts.json"
        counts.write_text(json.dumps({"imagenet_lt": [1, 3, 2]}))
        monkeypatch.setattr("data.annotation_lists.CLASS_COUNTS", counts)
        images = {"train": 6, "validation": 1, "test": 1}
        changes = {"num_classes": 3, "images": images, "most": 3, "least": 1, "usual_place": str(tmp_path)}
        monkeypatch.setitem(DATA_SETS, "imagenet_lt", replace(DATA_SETS["imagenet_lt"], **changes, known_lists={}))
        lines = [
            (f"train/{label}/{index}.jpg", label) for label, count in enumerate([1, 2, 3]) for index in range(count)
        ]
        write_lists(tmp_path, {"train": lines, "validation": [("train/0/9.jpg", 0)], "test": [("val/1.jpg", 0)]})
        message = r"training images of 2 classes differ, of class 1 \(3 expected, 2 found\), 2 \(2 expected, 3 found\)"
        with pytest.raises(ValueError, match=message):
            load_long_tailed("imagenet_lt", HUB)


class TestCommands:
    def test_training_and_evaluation(self, hub, tmp_path, monkeypatch):
        options = ("--batch_size", 4, "--epochs", 1, "--batchformer", "none")
        out = train(tmp_path / "out", "--dataset", "imagenet_lt", "--data_dir", HUB, *options)
        data = read_data(out)
        assert data.data_dir == HUB == data.without_place().data_dir
        assert data.train_class_counts == [2, 1]
        monkeypatch.chdir(tmp_path)
        evaluate.main(["--model", str(out)])
        results = read_results(next(path.parent for path in out.glob("*/results.json")))
        assert results["images_digest"] == images_digest(load_long_tailed("imagenet_lt", HUB)["test"])
        _, known = load_splits_of(out)
        assert known == data

    def test_check_data(self, hub, tmp_path, capsys):
        arguments = ["--data_dir", HUB, "--dataset", "imagenet_lt", "--num_workers", "1"]
        check_data.main([*arguments, "--output_dir", str(tmp_path / "report")])
        report = json.loads((tmp_path / "report/check_data.json").read_text())
        facts = list_facts("imagenet_lt", HUB)
        assert report["annotation_lists"] == facts
        assert {split: of_list["images"] for split, of_list in facts.items()} == {
            "train": 3,
            "validation": 1,
            "test": 2,
        }
        printed = capsys.readouterr().out
        assert f"ImageNet_LT_train.txt: 3 images, digest {facts['train']['digest']}\n" in printed
        assert "Training may start." in printed


class TestCifar:
    def copied(self, image="image", label="label", each=5, classes=3):
        names = [f"class {number}" for number in range(classes)]
        features = Features({image: ImageFeature(), label: ClassLabel(names=names)})
        labels = list(range(classes)) * each
        images = [{"bytes": jpeg(str(index)), "path": None} for index in range(len(labels))]
        return DatasetDict(
            dict.fromkeys(("train", "test"), Dataset.from_dict({image: images, label: labels}, features=features))
        )

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        small = replace(DATA_SETS["cifar100_lt"], num_classes=3, images_per_class=5)
        monkeypatch.setitem(DATA_SETS, "cifar100_lt", small)

    @pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label")])
    def test_another_copy(self, hub, columns):
        hub["user/name"] = self.copied(*columns)
        loaded = load_long_tailed("cifar100_lt", HUB, imbalance_factor=5)
        assert class_counts(loaded["train"]) == [5, 2, 1]
        assert list(loaded["test"].features) == ["image", "label"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"each": 4}, "3 classes with 5 training images each expected, 3 with 4 to 4 found"),
            ({"classes": 4}, "3 classes with 5 training images each expected, 4 with 5 to 5 found"),
            ({"image": "picture"}, r"needs the splits train and test .* it has \{'train': \['picture', 'label'\]"),
        ],
    )
    def test_what_is_no_copy(self, hub, options, message):
        hub["user/name"] = self.copied(**options)
        with pytest.raises(ValueError, match=message):
            load_long_tailed("cifar100_lt", HUB)
