"""Splits, their files and their mistakes; augmentation and the pixels that evaluation sees."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from PIL import Image
from torchvision.transforms import v2

from data import (
    AUGMENTATIONS,
    DATASETS,
    class_counts,
    evaluation_processor,
    evaluation_transform,
    load_long_tailed,
    train_transform,
)
from data.annotation_lists import BENCHMARKS, Benchmark
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


def write_images(folder, paths):
    for index, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), color=(index * 20 % 256, 40, 80)).save(folder / path)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A benchmark of three classes in the layout of Places-LT."""
    benchmark = Benchmark("Places_LT", 3, BENCHMARKS["places_lt"].lists)
    monkeypatch.setitem(BENCHMARKS, "places_lt", benchmark)
    folder = tmp_path / "Places LT"
    train = ["train/air field/1.jpg", "train/air field/2.jpg", "train/bar/1.jpg", "train/canyon/1.jpg"]
    write_images(folder, [*train, "val/9.jpg"])
    (folder / "Places_LT_train.txt").write_text("".join(f"{p} {i}\n" for p, i in zip(train, [0, 0, 1, 2], strict=True)))
    (folder / "Places_LT_val.txt").write_text("train/bar/1.jpg 1\n")
    (folder / "Places_LT_test.txt").write_text("val/9.jpg 2\n")
    return folder


class TestAnnotationLists:
    def test_rows_names_and_pixels(self, places):
        loaded = load_long_tailed("places_lt", places)
        assert set(loaded) == {"train", "validation", "test"}
        assert loaded["train"].features["label"] == ClassLabel(names=["air field", "bar", "canyon"])
        assert class_counts(loaded["train"]) == [2, 1, 1]
        expected = np.asarray(Image.open(places / "train/air field/2.jpg"))
        assert np.array_equal(np.asarray(loaded["train"][1]["image"]), expected)
        assert loaded["test"][0]["label"] == 2

    def test_a_changed_list_is_read_anew(self, places):
        load_long_tailed("places_lt", places)
        (places / "Places_LT_test.txt").write_text("val/9.jpg 1\nval/9.jpg 0\n")
        assert load_long_tailed("places_lt", places)["test"]["label"] == [1, 0]

    def test_folders_that_are_not_classes_give_no_names(self, places):
        (places / "Places_LT_train.txt").write_text("val/9.jpg 0\nval/9.jpg 1\nval/9.jpg 2\n")
        names = load_long_tailed("places_lt", places)["train"].features["label"].names
        assert names == ["0", "1", "2"]

    @pytest.mark.parametrize(
        ("content", "error", "messages"),
        [
            ("train/bar/1.jpg\n", ValueError, ["Places_LT_train.txt, line 1", "relative/path.jpg label"]),
            ("train/bar/1.jpg 1\ntrain/bar/1.jpg one\n", ValueError, ["line 2", "'train/bar/1.jpg one'"]),
            ("", ValueError, ["Places_LT_train.txt is empty"]),
            ("\n\n", ValueError, ["Places_LT_train.txt is empty"]),
            ("train/bar/1.jpg 7\n", ValueError, ["line 1", "label 7", "0 to 2", "another data set"]),
            ("train/bar/1.jpg 1\n", ValueError, ["no image of 2 classes, the first [0, 2]", "cut off"]),
            ("train/bar/2.jpg 1\n", FileNotFoundError, ["train/bar/2.jpg", "relative to"]),
        ],
    )
    def test_a_wrong_list_is_explained(self, places, content, error, messages):
        (places / "Places_LT_train.txt").write_text(content)
        with pytest.raises(error) as info:
            load_long_tailed("places_lt", places)
        assert all(message in str(info.value) for message in messages), info.value

    def test_empty_lines_are_passed_over(self, places):
        with (places / "Places_LT_test.txt").open("a") as file:
            file.write("\n\n")
        assert len(load_long_tailed("places_lt", places)["test"]) == 1

    def test_a_list_of_another_encoding_is_named(self, places):
        (places / "Places_LT_train.txt").write_bytes("train/café/1.jpg 0\n".encode("latin-1"))
        with pytest.raises(ValueError, match=r"Places_LT_train.txt is not in UTF-8 .* at byte 9"):
            load_long_tailed("places_lt", places)

    def test_an_image_that_is_missing_further_down_is_noticed(self, places):
        (places / "train/bar/1.jpg").unlink()
        with pytest.raises(FileNotFoundError, match=r"1 of 4 images looked at in .* the first train/bar/1.jpg"):
            load_long_tailed("places_lt", places)

    def test_missing_lists_are_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"ImageNet_LT_train.txt.*ImageNet_LT_test.txt.*--data_dir"):
            load_long_tailed("imagenet_lt", tmp_path)


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
        with pytest.raises(FileNotFoundError, match=r"cifar-100-python.tar.gz.*data_dir"):
            load_long_tailed("cifar100_lt", tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"imbalance_factor": 0.01}, "1 or more, not 0.01"), ({"imbalance_type": "linear"}, "'exp' or 'step'")],
    )
    def test_impossible_options(self, cifar100, options, message):
        with pytest.raises(ValueError, match=message):
            load_long_tailed("cifar100_lt", cifar100, **options)


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"'imagenet'; there are digits_lt.*imagenet_lt"):
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


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_training_pixels(name, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).convert(mode)
    prepare = train_transform(name, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    torch.manual_seed(0)
    rows = prepare({"image": [image, image], "label": [3, 4]})
    first, second = rows["pixel_values"]
    assert first.shape == (3, 32, 32)
    assert first.dtype == torch.float32
    assert first.min() >= -2.0001
    assert first.max() <= 2.0001
    assert not torch.equal(first, second), "each image is augmented by itself"
    assert rows["labels"] == [3, 4]
    torch.manual_seed(0)
    assert torch.equal(prepare({"image": [image], "label": [3]})["pixel_values"][0], first)


def test_unknown_augmentation():
    with pytest.raises(ValueError, match="there are imagenet"):
        train_transform("autoaugment", 32, (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("name", RECIPES)
def test_evaluation_sees_what_torchvision_would(name):
    """The stock processor against Resize, CenterCrop, Normalize; on sizes whose crop has no half pixel to round."""
    recipe = RECIPES[name]
    pixels = np.random.default_rng(0).integers(0, 256, (recipe.resize_size * 2, recipe.resize_size * 2, 3))
    image = Image.fromarray(pixels.astype(np.uint8))
    processor = evaluation_processor(recipe.resize_size, recipe.image_size, recipe.image_mean, recipe.image_std)
    ours = evaluation_transform(processor)({"image": [image], "label": [0]})["pixel_values"][0]
    classic = v2.Compose(
        [
            v2.Resize(recipe.resize_size),
            v2.CenterCrop(recipe.image_size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(recipe.image_mean, recipe.image_std),
        ]
    )(image)
    assert ours.shape == (3, recipe.image_size, recipe.image_size)
    one_grey_level = 1 / 255 / min(recipe.image_std)
    assert (ours - classic).abs().max() <= one_grey_level * 1.01


def test_evaluation_processor_survives_saving(tmp_path):
    from transformers import AutoImageProcessor

    recipe = RECIPES["inaturalist18_resnet50"]
    processor = evaluation_processor(256, 224, recipe.image_mean, recipe.image_std)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 280, 3), dtype=np.uint8)).save(buffer, "PNG")
    image = Image.open(buffer)
    assert torch.equal(
        loaded(image, return_tensors="pt")["pixel_values"], processor(image, return_tensors="pt")["pixel_values"]
    )


def test_training_and_evaluation_see_the_same_under_transparency():
    transparent = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    processor = evaluation_processor(32, 32, (0.5,) * 3, (0.25,) * 3)
    evaluated = evaluation_transform(processor)({"image": [transparent], "label": [0]})["pixel_values"][0]
    trained = train_transform("inaturalist", 32, (0.5,) * 3, (0.25,) * 3)({"image": [transparent], "label": [0]})
    for pixels in (evaluated, trained["pixel_values"][0]):
        torch.testing.assert_close(pixels, torch.full((3, 32, 32), 2.0))  # white


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_transforms_can_be_sent_to_spawned_workers(name):
    processor = evaluation_processor(32, 32, (0.5,) * 3, (0.25,) * 3)
    for transform in (train_transform(name, 32, (0.5,) * 3, (0.25,) * 3), evaluation_transform(processor)):
        again = pickle.loads(pickle.dumps(transform))
        rows = again({"image": [Image.new("L", (40, 40))], "label": [1]})
        assert rows["pixel_values"][0].shape == (3, 32, 32)
