"""Splits, their files and their mistakes; augmentation and the pixels that evaluation sees."""

import pickle
import re
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from data import (
    AUGMENTATIONS,
    DATA_SETS,
    DATASETS,
    class_counts,
    load_long_tailed,
)
from data.cifar import long_tailed_counts, long_tailed_subset
from ride_bf.recipes import RECIPES


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def digits():
    return load_long_tailed("digits_lt")


class TestDigits:
    def test_counts(self, digits):
        assert class_counts(digits["train"]) == [120, 78, 50, 33, 21, 14, 9, 6, 4, 2]
        assert class_counts(digits["validation"]) == [8] * 10
        assert class_counts(digits["test"]) == [50] * 10

    def test_splits_share_no_scan(self, digits):
        """Equal pixels would also show an image that is in two splits; scikit-learn's digits have no duplicates."""
        pixels = [row["image"].tobytes() for split in digits.values() for row in split]
        assert len(set(pixels)) == len(pixels) == 337 + 80 + 500

    def test_fixed_and_whole(self, digits):
        from sklearn.datasets import load_digits

        source = load_digits()
        first_test_nine = np.random.default_rng(0).permutation(1797)
        first_test_nine = first_test_nine[source.target[first_test_nine] == 9][0]
        image = digits["test"][450]["image"]
        assert image.size == (8, 8)
        assert np.array_equal(np.asarray(image), np.round(source.images[first_test_nine] * 255 / 16))
        assert digits["test"].features["label"].names == list("0123456789")


class TestCifar:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ((10, 5000, 100, "exp"), [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),
            ((10, 5000, 200, "exp"), [5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25]),
            ((10, 5000, 100, "step"), [5000] * 5 + [50] * 5),
            ((10, 5000, 1, "exp"), [5000] * 10),
        ],
    )
    def test_counts(self, arguments, expected):
        assert long_tailed_counts(*arguments) == expected

    @pytest.mark.parametrize("classes", [10, 100])
    @pytest.mark.parametrize("factor", [10, 50, 100, 200])
    def test_the_factors_of_papers(self, classes, factor):
        """The totals are frozen. The smallest class of both types is the largest over the factor, rounded down."""
        totals = {
            10: {10: 20_431, 50: 13_996, 100: 12_406, 200: 11_203},
            100: {10: 19_573, 50: 12_608, 100: 10_847, 200: 9_502},
        }
        largest = 50_000 // classes
        decaying = long_tailed_counts(classes, largest, factor, "exp")
        assert sum(decaying) == totals[classes][factor]
        assert decaying == sorted(decaying, reverse=True)
        assert (decaying[0], decaying[-1]) == (largest, largest // factor)
        half = classes // 2
        step = long_tailed_counts(classes, largest, factor, "step")
        assert step == [largest] * half + [largest // factor] * half

    def test_the_factors_are_named_where_they_are_chosen(self):
        options = {option.name: option for option in DATA_SETS["cifar100_lt"].options}
        for factor in ("10", "50", "100", "200"):
            for text in (options["imbalance_factor"].help, RECIPES["cifar100_lt_resnet32"].description):
                assert re.search(rf"\b{factor}\b", text)
        assert options["imbalance_type"].choices == ("exp", "step")

    def test_cifar100_counts(self):
        counts = long_tailed_counts(100, 500, 100, "exp")
        assert (sum(counts), counts[0], counts[-1]) == (10_847, 500, 5)
        assert [sum(c > 100 for c in counts), sum(c < 20 for c in counts)] == [35, 30]

    def test_standard_subset(self):
        """The rule of the papers, with numpy's global generator as they use it."""
        labels = np.random.default_rng(3).permutation(np.repeat(np.arange(4), 25))
        state = np.random.get_state()
        np.random.seed(0)
        expected = []
        for label, count in enumerate([20, 9, 4, 2]):
            indices = np.where(labels == label)[0]
            np.random.shuffle(indices)
            expected.extend(indices[:count])
        np.random.set_state(state)
        assert long_tailed_subset(labels, [20, 9, 4, 2]).tolist() == expected
        assert np.array_equal(np.random.get_state()[1], state[1]), "the global generator must not be touched"

    @pytest.fixture
    def cifar100(self, tmp_path):
        rng = np.random.default_rng(0)
        folder = tmp_path / "cifar-100-python"
        folder.mkdir()

        def write(name, content):
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))

        labels = rng.permutation(np.repeat(np.arange(100), 500)).tolist()
        data = np.zeros((50_000, 3072), dtype=np.uint8)
        data[:, 0] = labels  # the label in the first red pixel
        data[:, 1024] = 7  # green
        data[:, 2], data[:, 3] = np.divmod(np.arange(50_000), 256)  # no two images are equal
        write("train", {"data": data, "fine_labels": labels, "coarse_labels": labels, "filenames": ["x"]})
        write("test", {"data": data[:300], "fine_labels": labels[:300]})
        write("meta", {"fine_label_names": [f"name{label}" for label in range(100)]})
        return tmp_path

    def test_folder_and_archive(self, cifar100):
        loaded = load_long_tailed("cifar100_lt", cifar100)
        train = loaded["train"]
        assert class_counts(train) == long_tailed_counts(100, 500, 100, "exp")
        assert train["label"][:500] == [0] * 500, "the subset is in the order of the classes"
        pixels = np.asarray(train[10_846]["image"])
        assert pixels.shape == (32, 32, 3)
        assert pixels[0, 0].tolist() == [99, 7, 0]
        assert train.features["label"].names[3] == "name3"
        assert set(loaded) == {"train", "test"}

        with tarfile.open(cifar100 / "cifar-100-python.tar.gz", "w:gz", compresslevel=1) as tar:
            tar.add(cifar100 / "cifar-100-python", "cifar-100-python")
        for file in (cifar100 / "cifar-100-python").iterdir():
            file.unlink()
        again = load_long_tailed("cifar100_lt", cifar100, imbalance_factor=10, imbalance_type="step")
        assert class_counts(again["train"]) == [500] * 50 + [50] * 50

    def test_validation_is_taken_from_the_training_images(self, cifar100):
        held_out = load_long_tailed("cifar100_lt", cifar100, validation_fraction=0.2)
        counts = class_counts(held_out["train"]), class_counts(held_out["validation"])
        assert [a + b for a, b in zip(*counts, strict=True)] == long_tailed_counts(100, 500, 100, "exp")
        assert counts[1][0] == 100
        assert min(counts[1]) == 1

    def test_a_pickle_that_executes_is_refused(self, cifar100, tmp_path):
        class Hostile:
            def __reduce__(self):
                return (open, (str(tmp_path / "written"), "w"))

        (cifar100 / "cifar-100-python" / "meta").write_bytes(pickle.dumps({"fine_label_names": Hostile()}))
        with pytest.raises(ValueError, match=r"meta in .* asks for (_io|io).open"):
            load_long_tailed("cifar100_lt", cifar100)
        assert not (tmp_path / "written").exists()

    def test_a_damaged_file_is_named(self, cifar100):
        path = cifar100 / "cifar-100-python" / "test"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"test in .* is damaged"):
            load_long_tailed("cifar100_lt", cifar100)

    @pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x1f\x8b\x08\x00cut off"])
    def test_a_damaged_archive_is_named(self, tmp_path, content):
        (tmp_path / "cifar-100-python.tar.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"meta in .*cifar-100-python.tar.gz is not a CIFAR file, or is damaged"):
            load_long_tailed("cifar100_lt", tmp_path)

    def test_a_file_without_its_entries_is_named(self, cifar100):
        (cifar100 / "cifar-100-python" / "test").write_bytes(pickle.dumps({"data": []}))
        with pytest.raises(ValueError, match=r"test in .* KeyError\('fine_labels'\)"):
            load_long_tailed("cifar100_lt", cifar100)

    def test_a_file_with_too_few_images_is_named(self, cifar100):
        path = cifar100 / "cifar-100-python" / "train"
        content = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps({"data": content["data"][:9], "fine_labels": content["fine_labels"][:9]}))
        with pytest.raises(ValueError, match=r"has 50000 training images; .* has 9 and 9 labels"):
            load_long_tailed("cifar100_lt", cifar100)

    def test_missing_files_are_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"cifar-100-python.tar.gz.*data_dir.*uoft-cs/cifar100, cannot"):
            load_long_tailed("cifar100_lt", tmp_path)

    def test_a_folder_that_is_not_whole(self, cifar100):
        (cifar100 / "cifar-100-python" / "meta").unlink()
        with pytest.raises(FileNotFoundError, match=r"cifar-100-python/meta is missing; unpack"):
            load_long_tailed("cifar100_lt", cifar100)

    def test_the_hub_s_copy_is_the_same_subset(self, cifar100, tmp_path_factory, monkeypatch):
        """The Hub's tables hold the files' images in their order; here such a table on disk takes their place."""
        expected = load_long_tailed("cifar100_lt", cifar100, imbalance_factor=200)
        copy = tmp_path_factory.mktemp("hub") / "cifar100"
        copy.mkdir()
        for split in ("train", "test"):
            content = pickle.loads((cifar100 / "cifar-100-python" / split).read_bytes())
            pixels = content["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            features = Features(
                {"img": ImageFeature(), "fine_label": ClassLabel(names=[f"name{c}" for c in range(100)])}
            )
            chosen = slice(None) if split == "test" else slice(0, 50_000)
            rows = {"img": [Image.fromarray(image) for image in pixels[chosen]], "fine_label": content["fine_labels"]}
            Dataset.from_dict(rows, features=features).to_parquet(copy / f"{split}.parquet")
        monkeypatch.setitem(DATA_SETS, "cifar100_lt", replace(DATA_SETS["cifar100_lt"], hub_id=str(copy)))
        loaded = load_long_tailed("cifar100_lt", tmp_path_factory.mktemp("empty"), imbalance_factor=200)
        assert loaded["train"]["label"] == expected["train"]["label"]
        assert loaded["train"].features["label"] == expected["train"].features["label"]
        for row in (0, 5000, 9501):
            assert loaded["train"][row]["image"].tobytes() == expected["train"][row]["image"].tobytes()

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"imbalance_factor": 0.01}, "1 or more, not 0.01"), ({"imbalance_type": "linear"}, "'exp' or 'step'")],
    )
    def test_impossible_options(self, cifar100, options, message):
        with pytest.raises(ValueError, match=message):
            load_long_tailed("cifar100_lt", cifar100, **options)


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"'imagenet'; there are cifar10_lt.*imagenet_lt"):
        load_long_tailed("imagenet")
    with pytest.raises(ValueError, match="has no options"):
        load_long_tailed("imagenet_lt", imbalance_factor=10)
    with pytest.raises(ValueError, match=r"digits_lt has no options \['foo'\]; it has none"):
        load_long_tailed("digits_lt", foo=1)
    with pytest.raises(ValueError, match="a validation split of its own"):
        load_long_tailed("digits_lt", validation_fraction=0.1)


def test_class_counts_needs_class_labels():
    from datasets import Dataset

    with pytest.raises(TypeError, match="ClassLabel"):
        class_counts(Dataset.from_dict({"label": [0, 1]}))


def test_every_recipe_names_a_data_set_and_an_augmentation():
    for recipe in RECIPES.values():
        assert recipe.dataset in DATASETS
        assert recipe.augmentation in AUGMENTATIONS
