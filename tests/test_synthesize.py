"""Stand-ins for the benchmarks: the shape of the tail, the layout, the pictures, and what an interruption leaves."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from data.sets import DATA_SETS
from data.synthesize import MARKER, STYLES, main, make_image, scaled_class_counts, synthesize

COUNTS = [3, 12, 5, 40, 7]  # of a benchmark small enough for a test, as synthesised at scale 1


@pytest.fixture
def small_benchmarks(monkeypatch):
    counts = {name: COUNTS for name in ("imagenet_lt", "inaturalist18", "places_lt")}
    monkeypatch.setattr("data.synthesize._real_class_counts", lambda: counts)


def write(output_dir, like="imagenet_lt", scale=1.0, num_workers=1, image_scale=0.05, **options):
    return synthesize(like, scale, output_dir, num_workers=num_workers, image_scale=image_scale, **options)


def read_list(path):
    """Paths and labels."""
    lines = [line.rsplit(" ", maxsplit=1) for line in path.read_text().splitlines()]
    return [path for path, _ in lines], [int(label) for _, label in lines]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def half_a_file(path, content):
    with path.open("wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError("No space left on device")


class TestClassCounts:
    @pytest.mark.parametrize(
        ("like", "num_classes", "images", "largest", "smallest"),
        [
            ("imagenet_lt", 1000, 115_846, 1280, 5),
            ("inaturalist18", 8142, 437_513, 1000, 2),
            ("places_lt", 365, 62_500, 4980, 5),
        ],
    )
    def test_the_whole_and_parts_of_it(self, like, num_classes, images, largest, smallest):
        whole = scaled_class_counts(like, 1)
        assert (len(whole), sum(whole), max(whole), min(whole)) == (num_classes, images, largest, smallest)
        for scale in (0.5, 0.1, 0.02):
            part = scaled_class_counts(like, scale)
            assert len(part) == round(scale * num_classes)
            assert (max(part), min(part)) == (largest, smallest)
            # every class of the sorted part is one of the sorted whole's, at its share of the way down
            ordered = sorted(whole, reverse=True)
            for position, count in enumerate(sorted(part, reverse=True)):
                assert count == ordered[round(position * (num_classes - 1) / (len(part) - 1))]

    def test_one_hundredth_of_imagenet_lt(self):
        counts = scaled_class_counts("imagenet_lt", 0.01)
        assert sorted(counts, reverse=True) == [1280, 247, 157, 116, 85, 63, 43, 30, 17, 5]

    def test_the_labels_do_not_follow_the_counts(self):
        counts = scaled_class_counts("imagenet_lt", 0.05)
        falls = sum(first > second for first, second in pairwise(counts))
        assert 15 < falls < 35  # of 49

    def test_never_fewer_than_two_classes(self):
        assert sorted(scaled_class_counts("places_lt", 1e-6)) == [5, 4980]


@pytest.mark.usefixtures("small_benchmarks")
class TestLayout:
    @pytest.mark.parametrize(
        ("like", "patterns", "held_out"),
        [
            (
                "imagenet_lt",
                {
                    "train": r"train/(n\d{8})/\1_\d+\.JPEG",
                    "validation": r"train/(n\d{8})/\1_\d+\.JPEG",
                    "test": r"val/n\d{8}/ILSVRC2012_val_\d{8}\.JPEG",
                },
                {"validation": 20, "test": 50},
            ),
            (
                "inaturalist18",
                {split: r"train_val2018/[A-Z][a-z]+/LABEL/[0-9a-f]{32}\.jpg" for split in ("train", "test")},
                {"test": 3},
            ),
            (
                "places_lt",
                {
                    "train": r"train/\w+/\d{8}\.jpg",
                    "validation": r"train/\w+/\d{8}\.jpg",
                    "test": r"val/\w+/Places365_val_\d{8}\.jpg",
                },
                {"validation": 20, "test": 100},
            ),
        ],
    )
    def test_lists_and_files(self, tmp_path, like, patterns, held_out):
        written = write(tmp_path, like)
        everywhere = []
        for split, list_name in DATA_SETS[like].lists.items():
            paths, labels = read_list(tmp_path / list_name)
            expected = COUNTS if split == "train" else [held_out[split]] * len(COUNTS)
            assert np.bincount(labels).tolist() == expected
            assert written["images"][split] == sum(expected)
            for path, label in zip(paths, labels, strict=True):
                assert re.fullmatch(patterns[split].replace("LABEL", str(label)), path), path
            everywhere += paths
        assert len(set(everywhere)) == len(everywhere)
        images = set(contents(tmp_path)) - set(DATA_SETS[like].lists.values()) - {MARKER}
        assert images == set(everywhere)

    def test_a_class_has_one_folder_for_all_splits(self, tmp_path):
        write(tmp_path)
        folders = {}
        for list_name in DATA_SETS["imagenet_lt"].lists.values():
            for path, label in zip(*read_list(tmp_path / list_name), strict=True):
                folders.setdefault(label, set()).add(path.split("/")[1])
        assert all(len(names) == 1 for names in folders.values())
        assert [min(folders[label]) for label in range(5)] == sorted(min(names) for names in folders.values())

    def test_marker(self, tmp_path):
        written = write(tmp_path, seed=3)
        assert json.loads((tmp_path / MARKER).read_text()) == written
        assert written == {
            "like": "imagenet_lt",
            "scale": 1.0,
            "seed": 3,
            "image_scale": 0.05,
            "num_classes": 5,
            "images": {"train": sum(COUNTS), "validation": 100, "test": 250},
            "class_counts": COUNTS,
        }

    @pytest.mark.parametrize(
        ("like", "width_and_height", "kilobytes"),
        [("imagenet_lt", (250, 640), 110), ("inaturalist18", (600, 800), 225), ("places_lt", (256, 256), 18)],
    )
    def test_files_are_jpegs_of_realistic_sizes(self, tmp_path, monkeypatch, like, width_and_height, kilobytes):
        splits = DATA_SETS[like].lists
        monkeypatch.setattr("data.synthesize._real_class_counts", lambda: {like: [12, 8]})
        monkeypatch.setitem(STYLES, like, replace(STYLES[like], held_out_per_class=dict.fromkeys(splits, 1)))
        write(tmp_path, like, image_scale=1.0)
        sizes = []
        for path in (*tmp_path.rglob("*.JPEG"), *tmp_path.rglob("*.jpg")):
            with Image.open(path) as image:
                assert image.format == "JPEG"
                assert image.mode in ("RGB", "L")
                assert all(width_and_height[0] <= side <= width_and_height[1] for side in image.size)
            sizes.append(path.stat().st_size / 1000)
        assert np.mean(sizes) == pytest.approx(kilobytes, rel=0.2)


@pytest.mark.usefixtures("small_benchmarks")
class TestWriting:
    def test_equal_for_any_number_of_workers_and_another_for_another_seed(self, tmp_path):
        for name, options in {"one": {}, "two": {"num_workers": 2}, "other": {"seed": 1}}.items():
            write(tmp_path / name, **options)
        one, two, other = (contents(tmp_path / name) for name in ("one", "two", "other"))
        assert one == two
        assert set(one) == set(other)
        same = [path for path in one if one[path] == other[path]]
        assert sorted(same) == sorted(DATA_SETS["imagenet_lt"].lists.values())

    def test_no_two_images_are_equal(self, tmp_path):
        write(tmp_path)
        images = [content for path, content in contents(tmp_path).items() if path.endswith(".JPEG")]
        assert len(set(images)) == len(images)

    def test_finished_data_is_left_alone(self, tmp_path):
        first = write(tmp_path)
        times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert write(tmp_path) == first
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times

    def test_an_interrupted_run_is_completed(self, tmp_path, monkeypatch):
        write(tmp_path / "whole")

        drawn = 0

        def interrupted(*arguments):
            nonlocal drawn
            drawn += 1
            if drawn > 40:
                raise KeyboardInterrupt
            return make_image(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr("data.synthesize.make_image", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path / "cut")
        cut = contents(tmp_path / "cut")
        assert MARKER not in cut
        assert sum(path.endswith(".JPEG") for path in cut) == 40
        with monkeypatch.context() as patch:  # the disk is full, in the middle of a file
            patch.setattr("pathlib.Path.write_bytes", half_a_file)
            with pytest.raises(OSError, match="No space left"):
                write(tmp_path / "cut")
        assert contents(tmp_path / "cut") == cut
        with pytest.raises(FileExistsError):
            write(tmp_path / "cut", seed=1)
        write(tmp_path / "cut")
        assert contents(tmp_path / "cut") == contents(tmp_path / "whole")

    def test_two_at_once(self, tmp_path, monkeypatch):
        """The second begins, and ends, while the first is at its first image."""
        write(tmp_path / "alone")
        begun = []

        def first_image(*arguments):
            if not begun:
                begun.append(True)
                write(tmp_path / "shared")
            return make_image(*arguments)

        monkeypatch.setattr("data.synthesize.make_image", first_image)
        write(tmp_path / "shared")
        assert begun
        assert contents(tmp_path / "shared") == contents(tmp_path / "alone")

    def test_other_things_are_not_written_over(self, tmp_path):
        write(tmp_path / "data")
        (tmp_path / "own").mkdir()
        (tmp_path / "own" / "notes.txt").write_text("mine")
        for folder, options in (("data", {"seed": 1}), ("data", {"image_scale": 0.1}), ("own", {})):
            before = contents(tmp_path / folder)
            with pytest.raises(FileExistsError, match=rf"{folder} is not empty .* name another folder"):
                write(tmp_path / folder, **options)
            assert contents(tmp_path / folder) == before

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"like": "imagenet"}, "no synthetic 'imagenet'; choose from imagenet_lt, inaturalist18, places_lt"),
            ({"scale": 0}, "above 0 and up to 1, not 0"),
            ({"scale": 1.5}, "above 0 and up to 1, not 1.5"),
            ({"image_scale": 0}, "image_scale .* above 0, not 0"),
            ({"num_workers": 0}, "num_workers .* 1 or more, not 0"),
        ],
    )
    def test_impossible_arguments(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "new", **options)
        assert not (tmp_path / "new").exists()

    def test_command(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("data.synthesize._real_class_counts", lambda: {"inaturalist18": [4, 2]})
        arguments = ["--like", "inaturalist18", "--output_dir", str(tmp_path / "new"), "--num_workers", "1"]
        main(arguments)
        assert "2 classes of 4 to 2 images; 6 train, 6 test" in capsys.readouterr().out
        with pytest.raises(SystemExit, match=r"error: .*new is not empty"):
            main([*arguments, "--seed", "1"])


class TestPictures:
    def test_fixed_by_seeds(self):
        def pixels(seed, class_seed):
            return np.asarray(make_image(np.random.default_rng(seed), class_seed, (60, 40)))

        assert pixels(0, 1).shape == (40, 60, 3)
        assert np.array_equal(pixels(0, 1), pixels(0, 1))
        assert not np.array_equal(pixels(0, 1), pixels(1, 1))
        assert not np.array_equal(pixels(0, 1), pixels(0, 2))

    def test_a_photographs_spectrum(self):
        """Amplitude falls about as 1 / frequency, so that a decoder has the work that it has with photographs."""
        spectrum = np.zeros((256, 256))
        for seed in range(8):
            image = np.asarray(make_image(np.random.default_rng(seed), seed, (256, 256)).convert("L"), dtype=float)
            spectrum += np.abs(np.fft.fft2(image - image.mean())) ** 2
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(256, 1 / 256), np.fft.fftfreq(256, 1 / 256)))
        edges = 2.0 ** np.arange(2, 8)
        power = [spectrum[(frequency >= low) & (frequency < high)].mean() for low, high in pairwise(edges)]
        slope = np.polyfit(np.log(edges[:-1]), 0.5 * np.log(power), 1)[0]
        assert -1.5 < slope < -0.7

    def test_a_class_can_be_learnt(self):
        """Nearest class mean of colour histograms, 8 images a class to learn from and 8 to test, chance 1 in 8."""

        def features(label, index):
            image = make_image(np.random.default_rng([label, index]), label, (64, 48))
            bins = (np.asarray(image) // 64).reshape(-1, 3) @ [16, 4, 1]
            return np.sqrt(np.bincount(bins, minlength=64) / len(bins))

        images = np.array([[features(label, index) for index in range(16)] for label in range(8)])  # (8, 16, 64)
        means = images[:, :8].mean(axis=1)  # (8, 64)
        nearest = ((images[:, 8:, None] - means) ** 2).sum(axis=-1).argmin(axis=-1)  # (8, 8)
        accuracy = (nearest == np.arange(8)[:, None]).mean()
        assert 0.35 < accuracy < 0.99  # it can be learnt, and is not given away
