"""How splits are drawn: what belongs together stays together, and lists fix what was drawn."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw
from test_left_out import TINY
from test_nothing_vanishes import classes, error_of, load, paths, picture, write
from test_training import train

from data import class_counts, class_labels, load_long_tailed
from data import make_splits as command
from data.digest import images_digest
from data.drawing import draw_share, long_tail
from data.groups import equal_images, group_images, image_keys, join_groups, similar_images
from data.notices import DataNotice, printed_notices
from data.splits import make_splits
from ride_bf import evaluate
from ride_bf.evaluation.data_report import load_to_check
from ride_bf.evaluation.leakage import also_trained_on, describe_leakage
from ride_bf.evaluation.results import read_results
from ride_bf.runs.provenance import read_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def copy(source, *targets):
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())


def random_groups(seed):
    """Labels of a long tail (N,), and groups (N,): some of one class, some across two."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 60, size=rng.integers(2, 9))
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    groups = np.arange(len(labels))
    for _ in range(rng.integers(0, 1 + len(labels) // 3)):
        across = rng.random() < 0.2
        of = np.arange(len(labels)) if across else np.flatnonzero(labels == rng.integers(len(counts)))
        members = rng.choice(of, size=min(len(of), rng.integers(2, 5)), replace=False)
        joined = np.isin(groups, groups[members])
        if joined.sum() <= 8:
            groups[joined] = groups[members].min()
    return labels, groups


def earlier_rule(labels, fraction, seed=0):
    """Class by class, on its own: the images that come first in a random order of all."""
    drawn = np.zeros(len(labels), dtype=bool)
    order = np.random.default_rng(seed).permutation(len(labels))
    for label in np.unique(labels):
        members = [index for index in order if labels[index] == label]
        drawn[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return drawn


class TestDrawShare:
    @pytest.mark.parametrize("seed", range(40))
    def test_groups(self, seed):
        labels, groups = random_groups(seed)
        fraction = (0.1, 0.2, 0.5)[seed % 3]
        drawn = draw_share(labels, fraction, groups, seed)
        of_group = [np.unique(drawn[groups == group]) for group in np.unique(groups)]
        assert all(len(values) == 1 for values in of_group), "a group is separated"
        counts = np.bincount(labels)
        number = np.bincount(labels[drawn], minlength=len(counts))
        assert (number < counts).all(), "each class keeps an image to train on"
        largest = [max(np.sum(groups == group) for group in groups[labels == label]) for label in range(len(counts))]
        assert (np.abs(number - fraction * counts) <= np.maximum(largest, 1)).all()
        assert np.array_equal(drawn, draw_share(labels, fraction, groups, seed)), "the same every time"
        renamed = np.random.default_rng(seed).permutation(groups.max() + 1)[groups]
        assert np.array_equal(drawn, draw_share(labels, fraction, renamed, seed)), "numbers of groups mean nothing"

    @pytest.mark.parametrize("seed", range(6))
    def test_without_groups_it_is_the_earlier_rule(self, seed):
        labels, _ = random_groups(seed)
        for fraction in (0.05, 0.2, 0.5):
            expected = earlier_rule(labels, fraction, seed)
            assert np.array_equal(draw_share(labels, fraction, seed=seed), expected)
            numbers = np.random.default_rng(seed).permutation(len(labels))  # each image is a group
            assert np.array_equal(draw_share(labels, fraction, numbers, seed), expected)

    def test_the_whole_share_of_a_class_is_drawn_where_its_groups_are_small(self):
        labels = np.repeat([0, 1], [1000, 100])
        groups = np.arange(1100) // 2
        number = np.bincount(labels[draw_share(labels, 0.2, groups)])
        assert number.tolist() == [200, 20]

    def test_a_class_of_one_group_is_not_drawn(self):
        drawn = draw_share(np.array([0, 0, 0, 1, 1, 1]), 0.2, np.array([7, 7, 7, 1, 2, 3]))
        assert not drawn[:3].any()
        assert drawn[3:].sum() == 1

    def test_a_class_of_two_groups_gives_the_smaller(self):
        drawn = draw_share(np.zeros(10, dtype=int), 0.1, np.array([0] * 6 + [1] * 4))
        assert drawn.tolist() == [False] * 6 + [True] * 4

    def test_what_is_wrong(self):
        for fraction in (0, 1, -0.1, float("nan")):
            with pytest.raises(ValueError, match=f"must be between 0 and 1, not {fraction}"):
                draw_share(np.array([0, 0]), fraction)
        for labels, groups in (([0, 1], None), ([0, 0, 1, 1], [0, 0, 1, 1]), ([0, 1, 0, 1], [0, 0, 0, 0])):
            with pytest.raises(ValueError, match=r"no class has a second image that could be held out \(equal images"):
                draw_share(np.array(labels), 0.5, None if groups is None else np.array(groups))

    def test_images_that_stay(self):
        labels = np.repeat([0, 1], 10)
        stay = np.arange(20) % 2 == 0
        drawn = draw_share(labels, 0.4, stay=stay)
        assert np.bincount(labels[drawn]).tolist() == [4, 4]
        assert not (drawn & stay).any()
        groups = np.arange(20) // 2  # each has an image that stays
        with pytest.raises(ValueError, match="no class has"):
            draw_share(labels, 0.4, groups, stay=stay)


class TestLongTail:
    @pytest.mark.parametrize("factor", [0.5, float("nan"), float("inf")])
    def test_a_factor_is_a_number_from_1_on(self, factor):
        with pytest.raises(ValueError, match=f"not {factor}; set --long_tail 100"):
            long_tail(np.array([0, 0, 1]), factor)

    @pytest.mark.parametrize("factor", [1, 2, 10, 100])
    def test_sizes(self, factor):
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 500))
        kept = long_tail(labels, factor)
        expected = [int(500 * factor ** (-place / 4) + 1e-9) for place in range(5)]
        assert np.bincount(labels[kept]).tolist() == expected
        assert np.array_equal(kept, np.unique(kept)), "in their order"
        assert np.array_equal(kept, long_tail(labels, factor))
        if factor > 1:
            assert not np.array_equal(kept, long_tail(labels, factor, seed=1))

    @pytest.mark.parametrize("seed", range(10))
    def test_any_classes(self, seed):
        labels, _ = random_groups(seed)
        counts = np.bincount(labels)
        left = np.bincount(labels[long_tail(labels, 10, seed)], minlength=len(counts))
        assert (left >= 1).all()
        assert (left <= counts).all()
        assert left.max() == counts.max()
        assert left.argsort(kind="stable")[-1] in np.flatnonzero(counts == counts.max())

    def test_what_is_wrong(self):
        with pytest.raises(ValueError, match=r"largest class over the smallest, a number from 1 on, not 0.01"):
            long_tail(np.array([0, 1]), 0.01)


def stored(images, labels):
    """A table with the images in it."""
    features = Features({"image": ImageFeature(), "label": Value("string")})
    return Dataset.from_dict({"image": images, "label": labels}, features)


class TestEqualImages:
    @pytest.fixture
    def place(self, tmp_path):
        """20 images in two classes; 0.png to 3.png of one are files of the other too, and two have other names."""
        folder = write(tmp_path / "set", *classes("cat", "dog", splits=["x"], each=10))
        folder = folder / "x"
        for index in range(4):
            copy(folder / f"cat/{index}.png", folder / f"dog/{index}.png")
        copy(folder / "cat/5.png", folder / "cat/copy of 5.png", folder / "cat/deep/5.png")
        return folder

    def test_they_stay_together_whatever_their_names_and_classes(self, place):
        loaded, told = load(place, validation_fraction=0.3)
        contents = {split: {Path(path).read_bytes() for path in paths(rows)} for split, rows in loaded.items()}
        assert sum(map(len, loaded.values())) == 22
        assert sum(map(len, contents.values())) == len(set.union(*contents.values())) == 16
        assert f"{place}: equal images stay in one split: 11 images in 5 groups, the largest of 3" in told

    def test_images_of_a_given_split_are_drawn_for_no_other(self, tmp_path):
        place = write(tmp_path / "set", *classes("cat", "dog", splits=["train"], each=10))
        for index in range(5):
            copy(place / f"train/cat/{index}.png", place / f"validation/cat/{index}.png")
        write(place, "validation/dog/0.png")
        loaded, told = load(place)
        contents = {split: {Path(path).read_bytes() for path in paths(rows)} for split, rows in loaded.items()}
        assert class_counts(loaded["test"]) == [2, 2]
        assert not contents["test"] & (contents["validation"] | contents["train"])
        assert (
            f"{place}: 5 training image(s) are equal to images of the given validation split; they stay in train, and "
            "none of them is drawn for another split"
        ) in told

    def test_nothing_is_left_to_draw_beside_a_given_split(self, tmp_path):
        place = write(tmp_path / "set", *classes("cat", "dog", splits=["train"], each=3))
        for path in sorted((place / "train").rglob("*.png")):
            copy(path, place / "validation" / path.relative_to(place / "train"))
        assert "(6 of 6) are in one group with images of a given split" in error_of(place)

    def test_numbers(self, place):
        rows = load_long_tailed("custom", place)["train"]
        groups = equal_images([rows])
        contents = [Path(path).read_bytes() for path in paths(rows)]
        for one in range(len(rows)):
            for other in range(len(rows)):
                assert (groups[one] == groups[other]) == (contents[one] == contents[other])

    def test_equal_lengths_and_ends_are_no_equal_contents(self, tmp_path):
        (tmp_path / "a").mkdir()
        end = b"e" * 5000
        files = {"1": b"x" + end, "2": b"y" + end, "3": b"x" + end, "4": b"x" + end[:-1] + b"f", "5": b"", "6": b""}
        for name, content in files.items():
            (tmp_path / f"a/{name}.png").write_bytes(content)
        rows = Dataset.from_dict({"image": [str(tmp_path / f"a/{name}.png") for name in files]})
        groups = equal_images([rows.cast_column("image", ImageFeature())])
        assert [int(np.flatnonzero(groups == group)[0]) for group in groups] == [0, 1, 0, 3, 4, 4]

    def test_files_that_cannot_be_read_are_equal_to_none(self, tmp_path):
        rows = Dataset.from_dict({"image": [str(tmp_path / "1.png"), str(tmp_path / "2.png")]})
        assert len(set(equal_images([rows.cast_column("image", ImageFeature())]))) == 2

    def test_files_and_images_in_tables(self, tmp_path):
        one, two = picture(), picture()
        one.save(tmp_path / "1.png")
        table = stored([one, two, one], ["a", "a", "b"])
        files = Dataset.from_dict({"image": [str(tmp_path / "1.png")]}).cast_column("image", ImageFeature())
        groups = equal_images([table, files])
        assert groups[0] == groups[2] != groups[1]
        assert groups[3] == groups[0]

    def test_rows_that_were_selected(self):
        images = [picture() for _ in range(3)]
        rows = stored([images[0], images[1], images[0], images[2]], list("abab")).select([3, 2, 0])
        groups = equal_images([rows])
        assert groups[1] == groups[2] != groups[0]

    def test_a_changed_file_is_read_anew(self, tmp_path):
        for name in "123":
            picture(seed=5).save(tmp_path / f"{name}.png")
        rows = Dataset.from_dict({"image": [str(tmp_path / f"{name}.png") for name in "123"]})
        rows = rows.cast_column("image", ImageFeature())
        assert len(set(equal_images([rows]))) == 1
        picture(seed=6).save(tmp_path / "2.png")
        assert len(set(equal_images([rows]))) == 2
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("data.groups._refine", None)  # the second time from the cache
            assert len(set(equal_images([rows]))) == 2

    def test_no_images(self):
        assert equal_images([stored([], [])]).shape == (0,)


class TestGroupBy:
    @pytest.fixture
    def table(self, tmp_path):
        """30 photos of 10 animals in two classes, 3 each; the last photo is of an animal without a name."""
        names = [f"{index}.png" for index in range(31)]
        write(tmp_path / "set", *names)
        animals = [f"animal {index // 3}" for index in range(30)]
        rows = {"image": names, "label": ["cat"] * 15 + ["dog"] * 16, "animal": [*animals, None], "age": [1.5] * 31}
        pyarrow.parquet.write_table(pa.table(rows), tmp_path / "set/train.parquet")
        return tmp_path / "set"

    def test_a_column_of_a_table(self, table):
        loaded, told = load(table, group_by="animal", validation_fraction=0.25)
        animals = {
            split: {int(path.split("/")[-1][:-4]) // 3 for path in paths(rows)} for split, rows in loaded.items()
        }
        assert sum(map(len, loaded.values())) == 31
        assert sum(map(len, animals.values())) == len(set.union(*animals.values())) == 11
        assert list(loaded["train"].features) == ["image", "label"]
        said = [notice for notice in told if "stay in one split" in notice]
        assert said == [
            f"{table}: equal images, and images with the same 'animal', stay in one split: 30 images in 10 groups, the "
            "largest of 3"
        ]

    def test_a_column_of_a_table_with_the_images_in_it(self, tmp_path):
        rows = stored([picture() for _ in range(24)], ["a", "b"] * 12)
        rows = rows.add_column("camera", [index // 4 for index in range(24)])
        (tmp_path / "set").mkdir()
        rows.to_parquet(tmp_path / "set/train.parquet")
        groups = np.repeat(np.arange(6), 4)
        loaded, _ = load(tmp_path / "set", group_by="camera")
        drawn = draw_share(np.array([0, 1] * 12), 0.2, groups)
        assert len(loaded["test"]) == drawn.sum() == 4

    def test_a_run_knows_its_groups(self, table, tmp_path):
        run = train(tmp_path / "run", *TINY, "--data_dir", table, "--group_by", "animal")
        data = read_data(run)
        assert data.options == {"group_by": "animal"}
        assert data.splits["test"].digest == images_digest(load(table, group_by="animal")[0]["test"])
        assert data.splits["test"].digest != images_digest(load(table)[0]["test"])
        evaluate.main(["--model", str(run)])
        assert read_results(run / "last")["dataset_options"] == {"group_by": "animal"}
        with pytest.raises(SystemExit, match="was trained with --group_by animal, not perceptual"):
            evaluate.main(["--model", str(run), "--group_by", "perceptual"])

    def test_given_splits_with_the_same_values(self, table):
        write(table, "test/0.png", "test/1.png", "test/2.png")
        rows = {
            "image": [f"test/{index}.png" for index in range(3)],
            "label": ["cat", "dog", "dog"],
            "animal": ["animal 0", "animal 9", None],
            "age": [1.5] * 3,
        }
        pyarrow.parquet.write_table(pa.table(rows), table / "test.parquet")
        shared = "2 value(s) of 'animal' are in train and in test: animal 0, animal 9"
        assert error_of(table, group_by="animal").endswith(f"leave it out; {shared}")
        loaded, told = load(table, group_by="animal", validation_fraction=0.4)
        assert f"{table}: {shared}" in told
        alone = f"{table}: 6 training image(s) are in one group with images of the given test split; they stay in train"
        assert any(notice.startswith(alone) for notice in told)
        numbers = {int(Path(path).stem) for path in paths(loaded["validation"])}
        assert not numbers & {*range(3), *range(27, 30)}
        with printed_notices(lambda _: None) as told:
            load_to_check("custom", table, group_by="animal")
        assert told == [f"{table}: {shared}"]

    def test_a_column_that_leaves_nothing_to_draw(self, table):
        rows = pyarrow.parquet.read_table(table / "train.parquet")
        everyone = pa.array(["same"] * len(rows))
        pyarrow.parquet.write_table(rows.append_column("site", everyone), table / "train.parquet")
        assert error_of(table, group_by="site") == (
            f"{table}: --group_by site leaves no class with a second group that could be held out; name another "
            "column, leave --group_by out, or provide a separate split"
        )

    @pytest.mark.parametrize("column", ["image", "label"])
    def test_the_columns_of_the_images_and_labels_are_no_groups(self, table, column):
        assert f"--group_by {column} names the column of the {column}s" in error_of(table, group_by=column)

    def test_equal_images_join_groups(self):
        assert join_groups(np.array([0, 0, 1, 2, 3]), np.array([5, 6, 6, 7, 8])).tolist() == [0, 0, 0, 1, 2]
        one = picture()
        rows = stored([one, picture(), one, picture()], list("abab")).add_column("group", ["x", "x", "y", "z"])
        groups = group_images([rows], "camera")
        assert groups[0] == groups[1] == groups[2] != groups[3]

    def test_what_is_wrong(self, table, tmp_path):
        there = r"['image', 'label', 'animal', 'age']"
        assert f"has no column 'species', only {there}; name it with --group_by" in error_of(table, group_by="species")
        assert "column 'age' holds double; expected names or whole numbers" in error_of(table, group_by="age")
        folder = write(tmp_path / "folders", *classes("cat", "dog", splits=["x"]))
        message = f"{folder / 'x'} has no columns, so --group_by animal would do nothing; leave it out"
        assert error_of(folder / "x", group_by="animal") == message
        with pytest.raises(
            ValueError, match="digits_lt has no columns, so group_by must be 'perceptual', not 'animal'"
        ):
            load_long_tailed("digits_lt", group_by="animal")
        (table / "test.csv").write_text("")
        split = write(tmp_path / "split", *classes("cat", "dog"))
        for by in ("perceptual", "animal"):
            assert "would do nothing" in error_of(split, group_by=by)


def drawing(seed):
    """A picture with structure."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = rng.integers(0, 80, 2).tolist()
        draw.rectangle((x, y, x + 10 + seed % 7, y + 12), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image


class TestPerceptual:
    def test_hashes(self):
        hashes = np.array([0, 0, 0x0F0F0F0F0F0F0F0F, 0x0F0F0F0F0F0F0F00, 0x0F0F0F0F0F0F0E00, 1, 1 << 63], np.uint64)
        groups = similar_images(hashes)
        assert groups[2] == groups[3] == groups[4], "4 bits, and a chain"
        assert len(set(groups.tolist())) == 5, "broken and blank images are alone"

    @pytest.mark.parametrize("seed", range(3))
    def test_against_each_with_each(self, seed):
        rng = np.random.default_rng(seed)
        first = rng.integers(0, 2**63, 60, dtype=np.uint64)
        flipped = [
            np.uint64(sum(1 << int(bit) for bit in rng.choice(64, rng.integers(1, 9), replace=False))) for _ in first
        ]
        hashes = np.concatenate([first, first ^ np.array(flipped)])
        expected = np.arange(len(hashes))
        for one in range(len(hashes)):
            for other in range(one):
                if np.bitwise_count(hashes[one] ^ hashes[other]) <= 4:
                    expected[expected == expected[one]] = expected[other]
        groups = similar_images(hashes)
        assert len(set(zip(groups.tolist(), expected.tolist(), strict=True))) == len(set(groups.tolist()))
        assert len(set(groups.tolist())) == len(set(expected.tolist())) < len(hashes)

    def test_images_that_look_alike_stay_together(self, tmp_path):
        pytest.importorskip("imagehash")
        for index in range(8):
            folder = tmp_path / f"set/{'ab'[index % 2]}"
            folder.mkdir(parents=True, exist_ok=True)
            image = drawing(index)
            image.save(folder / f"{index}.png")
            image.resize((64, 64)).save(folder / f"{index} small.png")
            image.save(folder / f"{index} again.jpg", quality=80)
        for shade in ("white", "black", "grey"):
            Image.new("RGB", (64, 64), shade).save(tmp_path / f"set/a/{shade}.png")
        loaded, told = load(tmp_path / "set", group_by="perceptual")
        numbers = [
            {path.split("/")[-1].split(".")[0].split(" ")[0] for path in paths(rows)} for rows in loaded.values()
        ]
        assert sum(map(len, loaded.values())) == 27
        assert not set.intersection(*numbers)
        said = f"{tmp_path}/set: equal or similar images stay in one split: 24 images in 8 groups, the largest of 3"
        assert said in told
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("data.groups.similar_images", lambda hashes: np.arange(len(hashes)))
            apart, _ = load(tmp_path / "set", group_by="perceptual")
        assert [paths(rows) for rows in apart.values()] != [paths(rows) for rows in loaded.values()]

    def test_without_the_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "imagehash", None)
        folder = write(tmp_path / "set", *classes("a", "b", splits=["x"])) / "x"
        message = r"--group_by perceptual needs the package ImageHash; install it: pip install imagehash"
        with pytest.raises(ModuleNotFoundError, match=message):
            load(folder, group_by="perceptual")
        with pytest.raises(SystemExit, match=message):
            command.main(["--data_dir", str(folder), "--output_dir", str(tmp_path / "o"), "--group_by", "perceptual"])
        with pytest.raises(SystemExit, match=message):
            train(tmp_path / "run", *TINY, "--data_dir", folder, "--group_by", "perceptual")


class TestMakeSplits:
    @pytest.fixture
    def place(self, tmp_path):
        names = [
            f"{name}/{index}.png" for name, count in (("cat", 20), ("dog", 10), ("# emu", 2)) for index in range(count)
        ]
        folder = write(tmp_path / "my set", *names)
        copy(folder / "cat/0.png", folder / "cat/0 again.png", folder / "dog/0 again.png")
        return folder

    def make(self, place, tmp_path, *options):
        out = tmp_path / "lists"
        command.main(["--data_dir", str(place), "--output_dir", str(out), *map(str, options)])
        return out

    def test_the_same_splits_as_the_automatic_ones(self, place, tmp_path, capsys):
        automatic, _ = load(place, validation_fraction=0.125)
        out = self.make(place, tmp_path, "--validation", 0.1)
        assert sorted(path.name for path in out.iterdir()) == ["class_names.txt", "test.txt", "train.txt", "val.txt"]
        listed, told = load(place, lists=str(out))
        assert told == [f"{place}: the validation split has no images of 1 class(es): # emu"]
        for split, rows in automatic.items():
            assert images_digest(listed[split]) == images_digest(rows)
        assert (out / "class_names.txt").read_text() == "# emu\ncat\ndog\n"
        assert listed["train"].features["label"].names == ["# emu", "cat", "dog"]
        assert sum(map(len, listed.values())) == 34
        printed = capsys.readouterr().out
        assert f"note: {place}: equal images stay in one split: 3 images in 1 groups, the largest of 3" in printed
        assert f"--data_dir {shlex.quote(str(place))} --lists {out}" in printed

    def test_lists_name_their_command(self, place, tmp_path):
        out = self.make(place, tmp_path, "--seed", 3)
        for split in ("train", "test"):
            first = (out / f"{split}.txt").read_text().splitlines()[0]
            words = shlex.split(first.partition(", by: ")[2])
            assert words[:3] == ["python", "-m", "data.make_splits"]
        written = {path.name: path.read_bytes() for path in out.iterdir()}
        command.main([*words[3:], "--overwrite"])
        again = {path.name: path.read_bytes() for path in out.iterdir()}
        assert {name: text.partition(b"\n")[2] for name, text in again.items()} == {
            name: text.partition(b"\n")[2] for name, text in written.items()
        }

    def test_shares_and_seeds(self, place):
        with printed_notices(lambda _: None):
            splits = {seed: make_splits(place, test=0.3, validation=0.3, seed=seed) for seed in (0, 1)}
        for made in splits.values():
            assert [class_counts(made[split])[2] for split in ("train", "validation", "test")] == pytest.approx(
                [4.4, 3.3, 3.3], abs=1
            )
            assert sum(map(len, made.values())) == 34
        assert paths(splits[0]["test"]) != paths(splits[1]["test"])

    def test_a_long_tail_is_drawn_of_the_training_images_alone(self, place, tmp_path):
        with printed_notices(lambda _: None):
            whole = make_splits(place)
        out = self.make(place, tmp_path, "--long_tail", 10)
        thin, _ = load(place, lists=str(out))
        assert images_digest(thin["test"]) == images_digest(whole["test"])
        assert set(paths(thin["train"])) < set(paths(whole["train"]))
        counts = sorted(class_counts(thin["train"]))
        assert counts == [1, int(counts[-1] * 10**-0.5 + 1e-9), max(class_counts(whole["train"]))]

    def test_rows_of_a_table_without_a_label(self, tmp_path):
        folder = write(tmp_path / "set", *(f"im/{index}.png" for index in range(24)))
        rows = [f"im/{index}.png,{'ab'[index % 2]}" for index in range(24)]
        (folder / "images.csv").write_text("\n".join(["image,label", *rows, "im/0.png,"]))
        options = ["--data_dir", str(folder / "images.csv"), "--output_dir", str(tmp_path / "lists")]
        with pytest.raises(SystemExit, match="is empty in row 25; fill them, or leave these rows out with --on_broken"):
            command.main(options)
        command.main([*options, "--on_broken_image", "skip"])
        lists = [(tmp_path / "lists" / f"{split}.txt").read_text().splitlines()[1:] for split in ("train", "test")]
        assert sorted(line.partition(" ")[0] for lines in lists for line in lines) == sorted(
            f"im/{n}.png" for n in range(24)
        )

    def test_a_table_with_groups_and_excluded_images(self, tmp_path):
        folder = write(tmp_path / "set", *(f"im/{index}.png" for index in range(24)))
        lines = [f"im/{index}.png,{'ab'[index % 2]},camera {index // 4}" for index in range(24)]
        (folder / "images.csv").write_text("\n".join(["image,label,camera", *lines]))
        (tmp_path / "out.txt").write_text("im/0.png\n")
        options = ("--group_by", "camera", "--exclude", tmp_path / "out.txt")
        out = self.make(folder / "images.csv", tmp_path, *options)
        listed, _ = load(folder, lists=str(out))
        cameras = [{int(path.split("/")[-1][:-4]) // 4 for path in paths(rows)} for rows in listed.values()]
        assert sum(map(len, listed.values())) == 23
        assert not set.intersection(*cameras)

    def test_training_from_the_lists(self, place, tmp_path):
        out = self.make(place, tmp_path, "--validation", 0.2)
        run = train(tmp_path / "run", *TINY, "--data_dir", place, "--lists", out)
        data = read_data(run)
        assert data.class_names == ["# emu", "cat", "dog"]
        assert sum(split.images for split in data.splits.values()) == 34
        listed, _ = load(place, lists=str(out))
        assert {name: split.digest for name, split in data.splits.items()} == {
            name: images_digest(rows) for name, rows in listed.items()
        }

    def test_into_the_folder_of_the_images(self, place):
        automatic, _ = load(place)
        command.main(["--data_dir", str(place), "--output_dir", str(place)])
        listed, _ = load(place)
        assert images_digest(listed["test"]) == images_digest(automatic["test"])

    def test_lists_that_are_replaced_are_not_read(self, place, tmp_path):
        command.main(["--data_dir", str(place), "--output_dir", str(place)])
        before = {path.name: path.read_bytes() for path in place.glob("*.txt")}
        with pytest.raises(SystemExit, match=r"--test 0.6 and --validation 0.4 leave no images"):
            command.main(["--data_dir", str(place), "--output_dir", str(place), "--overwrite", "--test", "0.6",
                          "--validation", "0.4"])  # fmt: skip
        assert {path.name: path.read_bytes() for path in place.glob("*.txt")} == before
        command.main(["--data_dir", str(place), "--output_dir", str(place), "--seed", "7", "--overwrite"])
        again = {path.name: path.read_bytes() for path in place.glob("*.txt")}
        for path in place.glob("*.txt"):
            path.unlink()
        drawn = self.make(place, tmp_path, "--seed", 7)
        for name in ("train.txt", "test.txt"):
            assert again[name].splitlines()[1:] == (drawn / name).read_bytes().splitlines()[1:]
            assert again[name].splitlines()[1:] != before[name].splitlines()[1:]
        assert not list(place.glob(".earlier*"))

    def test_a_seed_without_a_draw(self, tmp_path):
        folder = write(tmp_path / "set", *classes("cat", "dog", each=5))
        with pytest.raises(SystemExit, match=r"--seed 7 would do nothing: .* has a test split of its own"):
            self.make(folder, tmp_path, "--seed", 7)
        assert self.make(folder, tmp_path, "--seed", 7, "--long_tail", 2).is_dir()

    def test_lists_of_other_classes_are_kept(self, place, tmp_path):
        command.main(["--data_dir", str(place), "--output_dir", str(place)])
        (place / "class_names.txt").write_text("emu\na cat\na dog\n")
        before = {path.name: path.read_bytes() for path in place.glob("*.txt")}
        with pytest.raises(SystemExit, match="has other classes without the lists in it"):
            command.main(["--data_dir", str(place), "--output_dir", str(place), "--overwrite"])
        assert {path.name: path.read_bytes() for path in place.glob("*.txt")} == before

    def test_a_file_in_place_of_the_output_folder(self, place, tmp_path, capsys):
        (tmp_path / "lists").write_text("")
        with pytest.raises(SystemExit):
            self.make(place, tmp_path)
        assert f"--output_dir {tmp_path}/lists is a file; name a folder" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--long_tail", "nan"], "a number from 1 on, not nan"),
            (["--test", "0"], "--test must be between 0 and 1, not 0.0"),
            (["--validation", "1.5"], "--validation must be between 0 and 1, not 1.5"),
            (["--test", "0.6", "--validation", "0.4"], "--test 0.6 and --validation 0.4 leave no images for training"),
            (["--seed", "-1"], "--seed must be 0 or more, not -1"),
            (["--long_tail", "0.1"], "error: the factor of a long tail is the largest class over the smallest"),
            (["--group_by", "camera"], "has no columns, so --group_by camera would do nothing; leave it out"),
            (["--exclude", "gone.txt"], "error: gone.txt is no file; --exclude names a file"),
            (["--image_column", "x"], "has no columns, so --image_column x would do nothing; leave it out"),
        ],
    )
    def test_what_is_wrong(self, place, tmp_path, options, message, capsys):
        with pytest.raises(SystemExit) as end:
            self.make(place, tmp_path, *options)
        assert message in (end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err)
        assert not (tmp_path / "lists").exists()

    def test_splits_that_are_there(self, tmp_path):
        folder = write(tmp_path / "set", *classes("cat", "dog", each=5))
        for options, message in (
            (["--test", 0.2], f"{folder} has a test split of its own; leave --test out"),
            (["--group_by", "perceptual"], "group_by perceptual would do nothing: no split is taken"),
        ):
            with pytest.raises(SystemExit, match=re.escape(message)):
                self.make(folder, tmp_path, *options)
        out = self.make(folder, tmp_path, "--validation", 0.2)
        with pytest.raises(
            SystemExit, match=r"lists has train.txt, val.txt, test.txt, class_names.txt already; pass --o"
        ):
            self.make(folder, tmp_path)
        listed, _ = load(folder, lists=str(out))
        assert {split: len(rows) for split, rows in listed.items()} == {"train": 8, "validation": 2, "test": 10}

    def test_what_a_list_cannot_name(self, tmp_path):
        (tmp_path / "set").mkdir()
        stored([picture() for _ in range(6)], ["a", "b"] * 3).to_parquet(tmp_path / "set/train.parquet")
        with pytest.raises(SystemExit, match=r"set has images that are not files in it, so a list cannot name them"):
            self.make(tmp_path / "set", tmp_path)
        folder = write(tmp_path / "odd", *classes("a", "b", splits=["x"], each=3)) / "x"
        picture().save(folder / "a/new\nline.png")
        with pytest.raises(SystemExit, match=r"does not fit on a line of a list; rename the file"):
            self.make(folder, tmp_path)
        assert not (tmp_path / "lists").exists()


class TestLeakage:
    @pytest.fixture
    def place(self, tmp_path):
        return write(tmp_path / "set", *classes("cat", "dog", each=6))

    def test_a_run_that_is_tested_on_training_images(self, place, tmp_path, capsys):
        copy(place / "train/cat/0.png", place / "test/cat/0.png", place / "test/dog/9.png")
        run = train(tmp_path / "run", *TINY, "--data_dir", place)
        evaluate.main(["--model", str(run)])
        results = read_results(run / "last")
        assert results["also_trained_on"]["images"] == 2
        labels = np.array([0] * 6 + [1] * 7)
        seen = np.isin(np.arange(13), (0, 12))
        predictions = np.load(run / "last/predictions.npz")
        right = predictions["predictions"] == labels
        assert results["metrics"]["accuracy"] == pytest.approx(right.mean())
        assert results["also_trained_on"]["metrics_without"]["accuracy"] == pytest.approx(right[~seen].mean())
        said = "2 of the 13 images are equal to a training image. Without them: accuracy"
        assert f"note: {said}" in capsys.readouterr().out
        assert said in (run / "last/report.html").read_text()

    def test_a_run_that_is_not(self, place, tmp_path, capsys):
        run = train(tmp_path / "run", *TINY, "--data_dir", place)
        capsys.readouterr()
        evaluate.main(["--model", str(run)])
        assert read_results(run / "last")["also_trained_on"] == {"images": 0}
        assert "equal to a training image" not in capsys.readouterr().out

    def test_which_images(self, place):
        copy(place / "train/cat/3.png", place / "test/dog/2.png")
        splits, _ = load(place)
        seen = also_trained_on(splits["test"], splits["train"])
        assert [
            path[len(str(place)) + 1 :] for path, is_seen in zip(paths(splits["test"]), seen, strict=True) if is_seen
        ] == ["test/dog/2.png"]
        assert also_trained_on(splits["test"], None) is None

    def test_all_images(self):
        said = describe_leakage({"num_images": 3, "also_trained_on": {"images": 3}})
        assert said == "3 of the 3 images are equal to a training image, so these numbers say nothing about new images"
        assert describe_leakage({"num_images": 3}) is None


def test_automatic_splits_are_those_before_groups(tmp_path):
    """Images without an equal one: the same test images as ever."""
    folder = write(tmp_path / "set", *(f"{name}/{index}.png" for name in "abc" for index in range(9)))
    with pytest.warns(
        DataNotice,
        match="has no test split: 6 of its 27 training images, 22.2 % of each class, drawn at random with seed 0",
    ):
        loaded = load_long_tailed("custom", folder)
    labels = np.repeat([0, 1, 2], 9)
    assert np.array_equal(class_labels(loaded["test"]), labels[earlier_rule(labels, 0.2)])
    everything = [str(folder / f"{name}/{index}.png") for name in "abc" for index in range(9)]
    assert paths(loaded["test"]) == [
        path for path, drawn in zip(everything, earlier_rule(labels, 0.2), strict=True) if drawn
    ]


def test_keys_of_images_keep_their_order_whatever_thread_computes_them(tmp_path):
    files = [tmp_path / f"{index}.jpg" for index in range(1500)]  # more than a thread gets at once
    for index, file in enumerate(files[:-1]):
        file.write_bytes(bytes(index % 7))
    images = [{"bytes": None, "path": str(file)} for file in files] + [{"bytes": b"stored", "path": None}]
    rows = Dataset.from_dict({"image": images}, Features({"image": ImageFeature(decode=False)}))
    keys = image_keys(rows)
    assert keys.shape == (1501,)
    assert keys.dtype == "V16"
    assert len(set(keys.tolist())) == 1501
    picked = np.random.default_rng(0).permutation(1501)[:1200]
    assert (image_keys(rows.select(picked)) == keys[picked]).all()
    files[3].write_bytes(b"another size")
    assert np.flatnonzero(image_keys(rows) != keys).tolist() == [3]
