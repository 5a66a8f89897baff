"""Images and classes that an option leaves out: in training, in what a checkpoint records of it, and afterwards."""

import json
import shutil

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from test_nothing_vanishes import classes, error_of, load, paths, picture, write
from test_streams import write_shards
from test_training import train

from data import class_counts, load_long_tailed
from data.exclusion import content_line
from data.groups import content_digest
from data.notices import DataNotice
from ride_bf import calibrate, decouple, evaluate, publish
from ride_bf.evaluation.exclusion_lists import image_line
from ride_bf.evaluation.results import read_results
from ride_bf.runs.checkpoints import read_facts
from ride_bf.runs.provenance import load_splits_of, read_data

TINY = (
    *("--recipe", "digits_lt_resnet32", "--dataset", "custom"),
    *("--epochs", 1, "--batchformer", "none", "--batch_size", 16),
    *("--classifier", "linear", "--loss", "cross_entropy", "--num_experts", 1),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def place(tmp_path):
    return write(tmp_path / "set", *classes("cat", "dog", each=4))


def write_lines(path, *lines, encoding="utf-8"):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding=encoding)
    return path


class TestExclude:
    def test_images_of_a_folder(self, place, tmp_path):
        lines = ("# two of them", "", "train/cat/0.png", "./test/dog/1.png", "train\\dog\\2.png")
        loaded, told = load(place, exclude=write_lines(tmp_path / "out.txt", *lines))
        assert {split: class_counts(rows) for split, rows in loaded.items()} == {"train": [3, 3], "test": [4, 3]}
        assert not {str(place / name) for name in ("train/cat/0.png", "train/dog/2.png", "test/dog/1.png")} & {
            path for rows in loaded.values() for path in paths(rows)
        }
        assert told == [f"{tmp_path}/out.txt: 3 image(s) left out"]

    def test_names_that_look_like_comments_or_start_with_a_space(self, tmp_path):
        place = write(tmp_path / "set", *classes("# c", " l"))
        names = ["train/# c/0.png", "test/ l/1.png"]
        folder = write(tmp_path / "flat", *(f"{name}/{index}.png" for name in ("# c", " l") for index in range(3)))
        for where, excluded in ((place, names), (folder, ["# c/0.png", " l/1.png"])):
            lines = [image_line({"bytes": None, "path": f"{where}/{name}"}, str(where), 0) for name in excluded]
            loaded, _ = load(where, exclude=write_lines(tmp_path / "out.txt", *lines))
            left = {path for rows in loaded.values() for path in paths(rows)}
            assert not left & {f"{where}/{name}" for name in excluded}
            assert len(left) == len([*where.rglob("*.png")]) - 2

    def test_images_in_a_table(self, tmp_path):
        features = Features({"image": ImageFeature(), "label": Value("string")})
        for split in ("train", "test"):
            rows = {"image": [picture() for _ in range(6)], "label": ["a", "b"] * 3}
            Dataset.from_dict(rows, features).to_parquet(tmp_path / f"set/{split}.parquet")
        images = load(tmp_path / "set")[0]["train"].cast_column("image", ImageFeature(decode=False))["image"]
        line = content_line(content_digest(images[2]["bytes"]))
        loaded, _ = load(tmp_path / "set", exclude=write_lines(tmp_path / "out.txt", line))
        assert {split: class_counts(rows) for split, rows in loaded.items()} == {"train": [2, 3], "test": [3, 3]}

    def test_images_that_come_with_a_package(self, tmp_path):
        rows = load_long_tailed("digits_lt")["train"].cast_column("image", ImageFeature(decode=False))
        line = content_line(content_digest(rows[0]["image"]["bytes"]))
        with pytest.warns(DataNotice, match=r"1 image\(s\) left out"):
            left = load_long_tailed("digits_lt", exclude=write_lines(tmp_path / "out.txt", line))["train"]
        assert len(left) == len(rows) - 1

    def test_before_images_are_held_out(self, tmp_path):
        folder = write(tmp_path / "set", *(f"{name}/{index}.png" for name in ("cat", "dog") for index in range(11)))
        loaded, _ = load(folder, exclude=write_lines(tmp_path / "out.txt", "cat/0.png"))
        assert class_counts(loaded["test"]) == [2, 2]
        assert class_counts(loaded["train"]) == [8, 9]

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ([], "lists no image, so --exclude would do nothing; leave it out"),
            (["# train/cat/0.png"], "lists no image, so --exclude would do nothing; leave it out"),
            (["train/cat/9.png", "cat/0.png"], "lists 2 image(s) that are not in {place}: train/cat/9.png, cat/0.png."),
            (["content 0123456789abcdef"], "lists 1 image(s) that are not in {place}: content 0123456789abcdef."),
            ([f"train/cat/{n}.png" for n in range(4)], "lists all training images of cat; leave some of them in"),
            (classes("cat", "dog", splits=["test"], each=4), "lists all images of the test split; leave some of them"),
        ],
    )
    def test_what_is_wrong(self, place, tmp_path, lines, message):
        file = write_lines(tmp_path / "out.txt", *lines)
        assert error_of(place, exclude=file).startswith(f"{file} {message.format(place=place)}")

    def test_a_file_that_is_not_there(self, place, tmp_path):
        for name in ("gone.txt", "set"):
            message = error_of(place, exclude=tmp_path / name)
            assert message == (
                f"{tmp_path / name} is no file; --exclude names a file with a line for each image to leave out"
            )

    def test_another_encoding(self, place, tmp_path):
        file = write_lines(tmp_path / "out.txt", "train/käfer/1.png", encoding="latin1")
        assert error_of(place, exclude=file).startswith(f"{file} is not in UTF-8")

    def test_streams(self, tmp_path):
        with pytest.raises(ValueError, match=r"a stream cannot be split or searched .*: leave exclude out"):
            load_long_tailed("custom", write_shards(tmp_path / "x"), streaming=True, exclude="out.txt")


class TestLists:
    @pytest.fixture
    def lists(self, place, tmp_path):
        for split in ("train", "test"):
            lines = [
                f"{split}/{name}/{index}.png {label}" for label, name in enumerate(("cat", "dog")) for index in (0, 1)
            ]
            write_lines(tmp_path / f"lists/{split}.txt", "# made by hand", *lines)
        return tmp_path / "lists"

    def test_lists_elsewhere(self, place, lists):
        write_lines(lists / "class_names.txt", "a cat", "a dog")
        loaded, _ = load(place, lists=str(lists))
        assert {split: class_counts(rows) for split, rows in loaded.items()} == {"train": [2, 2], "test": [2, 2]}
        assert loaded["train"].features["label"].names == ["a cat", "a dog"]
        write_lines(lists / "class_names.txt", "cat", "dog")
        assert load(place, lists=str(lists))[0]["train"].features["label"].names == ["cat", "dog"]

    def test_a_comment_after_the_first_image_is_a_line(self, place, lists):
        write_lines(lists / "train.txt", "train/cat/0.png 0", "# train/cat/1.png 0", "train/dog/0.png 1")
        assert "train.txt" in error_of(place, lists=str(lists))

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["cat"], "class_names.txt has 1 names, but the labels of {lists}/train.txt are 0 to 1; give each label a"),
            (["cat", "dog", "emu"], "class_names.txt has 3 names, but the labels of {lists}/train.txt are 0 to 1;"),
            (["cat", "", "dog"], "class_names.txt, line 2 has an empty line; each class needs a name of its own"),
            (["cat", "cat "], "class_names.txt, line 2 has the name 'cat' of line 1, again; each class needs a name"),
        ],
    )
    def test_wrong_names_of_classes(self, place, lists, names, message):
        write_lines(lists / "class_names.txt", *names)
        assert error_of(place, lists=str(lists)).startswith(f"{lists}/{message.format(lists=lists)}")

    def test_many_names_of_classes(self, place, lists):
        """They are looked up, not compared each with each."""
        names = [f"class {number}" for number in range(20_000)]
        write_lines(lists / "class_names.txt", *names)
        assert "has 20000 names" in error_of(place, lists=str(lists))

    def test_what_is_wrong(self, place, lists, tmp_path):
        gone = tmp_path / "gone"
        assert error_of(place, lists=str(gone)).startswith(f"{gone} has no list train.txt; write lists with python -m")
        assert error_of(gone, lists=str(lists)).startswith(
            f"{gone} is not a folder; --data_dir names the folder of the"
        )
        for options, given in (
            ({"allow_empty_classes": True}, "no class folders, so --allow_empty_classes"),
            ({"image_column": "x"}, "no columns, so --image_column x"),
            ({"group_by": "x"}, "no columns, so --group_by x"),
        ):
            assert error_of(place, lists=str(lists), **options) == (
                f"{lists}/train.txt has {given} would do nothing; leave it out"
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--allow_empty_classes"], "--allow_empty_classes cannot act: it needs --dataset custom"),
        (["--lists", "x"], "--lists x cannot act: it needs --dataset custom"),
        (
            [*TINY, "--data_dir", "TARS", "--streaming", "--lists", "x"],
            "--lists cannot act with --streaming",
        ),
        (
            [*TINY, "--data_dir", "TARS", "--streaming", "--allow_empty_classes"],
            "--allow_empty_classes cannot act with --streaming; leave it out",
        ),
    ],
)
def test_options_that_cannot_act_are_errors(tmp_path, options, message, capsys):
    tars = write_shards(tmp_path / "tars") if "TARS" in options else None
    with pytest.raises(SystemExit) as end:
        train(tmp_path / "run", *(tars if option == "TARS" else option for option in options))
    assert message in (end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err)


def published(run, folder):
    """Publishes a run into a folder: the record of the data in it. No file names a folder of the run or the data."""
    publish.main([str(run), "--repo_id", "user/name", "--dry_run", "--output_dir", str(folder)])
    for path in folder.rglob("*"):
        assert path.is_dir() or str(run.parent).encode() not in path.read_bytes(), path
    return json.loads((folder / "checkpoint.json").read_text())["data"]


def test_a_run_without_excluded_images_and_empty_classes(place, tmp_path, monkeypatch):
    (place / "train/emu").mkdir()
    write_lines(tmp_path / "out.txt", "train/cat/0.png")
    monkeypatch.chdir(tmp_path)
    options = ("--data_dir", "set", "--exclude", "out.txt", "--allow_empty_classes")
    run = train(tmp_path / "run", *TINY, *options)
    data = read_data(run)
    assert data.options == {"exclude": str(tmp_path / "out.txt"), "allow_empty_classes": True}
    assert (data.class_names, data.train_class_counts) == (["cat", "dog"], [3, 4])
    settings = json.loads((run / "run.json").read_text())
    assert (settings["exclude"], settings["allow_empty_classes"]) == ("out.txt", True)

    monkeypatch.chdir("/")
    evaluate.main(["--model", str(run)])
    results = read_results(run / "last")
    recorded = {"exclude": "out.txt", "allow_empty_classes": True}
    assert results["dataset_options"] == results["training_data"]["options"] == recorded
    assert results["training_data"]["images"] == 7
    assert published(run, tmp_path / "hub")["options"] == recorded
    assert "exclude out.txt" in (tmp_path / "hub/README.md").read_text()

    # The published model knows the file's name but not its place.
    splits, _ = load_splits_of(tmp_path / "hub", data_dir=place, exclude=tmp_path / "out.txt")
    assert class_counts(splits["train"]) == [3, 4]
    (tmp_path / "out.txt").rename(tmp_path / "moved.txt")
    shutil.copytree(run / "last", tmp_path / "alone")
    with pytest.raises(SystemExit, match=r"was trained with --exclude .*out.txt, which is not there; .*its new place"):
        evaluate.main(["--model", str(tmp_path / "alone")])
    evaluate.main(["--model", str(run), "--exclude", str(tmp_path / "moved.txt")])
    write_lines(tmp_path / "moved.txt", "train/cat/1.png")
    with pytest.raises(SystemExit, match=r"the data in .* are not those that .* was trained on"):
        evaluate.main(["--model", str(run), "--exclude", str(tmp_path / "moved.txt")])


def test_a_run_keeps_the_list_of_excluded_images(place, tmp_path, capsys):
    file = write_lines(tmp_path / "out.txt", "# wrong labels", "train/cat/0.png")
    options = (*TINY, "--epochs", 2, "--data_dir", place, "--exclude", file)
    assert not (train(tmp_path / "run", *options, "--dry_run") / "excluded_images.txt").exists()
    run = train(tmp_path / "run", *options, "--max_steps", 1)
    before = file.read_bytes()
    assert (run / "excluded_images.txt").read_bytes() == before

    def later_commands():
        evaluate.main(["--model", str(run)])
        assert class_counts(load_splits_of(run / "last")[0]["train"]) == [3, 4]
        train(run, *options, "--resume")
        assert read_data(run).options == {"exclude": str(file)}
        assert read_data(run).train_class_counts == [3, 4]

    write_lines(file, "train/cat/1.png", "train/dog/1.png")
    with pytest.warns(DataNotice, match="has changed since the run began"):
        later_commands()
    assert f"note: {file} has changed since the run began, which goes by its copy {run}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="train had 7 images in training and has 6 here"):
        evaluate.main(["--model", str(run), "--exclude", str(file)])
    file.unlink()
    later_commands()
    train(run, *TINY, "--data_dir", place, "--overwrite_output_dir")
    assert not (run / "excluded_images.txt").exists()


def test_a_run_on_lists_elsewhere(place, tmp_path, monkeypatch):
    for split in ("train", "val", "test"):
        names = [(name, label, "test" if split == "val" else split) for label, name in enumerate(("cat", "dog"))]
        kept = range(2) if split == "val" else range(2, 4)
        lines = [f"{of}/{name}/{index}.png {label}" for name, label, of in names for index in kept]
        write_lines(tmp_path / f"lists/{split}.txt", *lines)
    monkeypatch.chdir(tmp_path)
    run = train(tmp_path / "run", *TINY, "--data_dir", "set", "--lists", "lists")
    data = read_data(run)
    assert data.options == {"lists": str(tmp_path / "lists")}
    assert {name: split.images for name, split in data.splits.items()} == {"train": 4, "validation": 4, "test": 4}
    monkeypatch.chdir("/")
    evaluate.main(["--model", str(run)])
    assert read_results(run / "best")["dataset_options"] == {"lists": "lists"}
    assert published(run, tmp_path / "hub")["options"] == {"lists": "lists"}
    shutil.move(tmp_path / "lists", tmp_path / "moved")
    with pytest.raises(SystemExit, match=r"was trained with --lists .*lists, which is not there; .*give its new place"):
        evaluate.main(["--model", str(run)])
    command = [
        "logit_adjustment",
        str(run),
        "--output_dir",
        str(tmp_path / "better"),
        "--lists",
        str(tmp_path / "moved"),
    ]
    decouple.main(command)
    assert read_data(tmp_path / "better").train_class_counts == [2, 2]


def test_a_run_that_skips_rows_without_image_or_label(tmp_path, capsys):
    rows = {"image": [f"im/{index}.png" for index in range(16)], "label": ["cat", "dog"] * 8}
    write(tmp_path / "set", *rows["image"])
    rows["label"][3] = rows["image"][10] = ""
    lines = [f"{image},{label}" for image, label in zip(*rows.values(), strict=True)]
    write_lines(tmp_path / "set/train.csv", "image,label", *lines)
    with pytest.raises(SystemExit, match=r"train.csv: column 'image' is empty in row 11; fill them, or leave"):
        train(tmp_path / "run", *TINY, "--data_dir", tmp_path / "set")
    run = train(tmp_path / "run", *TINY, "--data_dir", tmp_path / "set", "--on_broken_image", "skip")
    assert (
        f"note: {tmp_path}/set/train.csv: rows without image or label are left out: row 4, 11"
        in capsys.readouterr().out
    )
    data = read_data(run)
    assert data.options == {"skip_empty_rows": True}
    assert sum(split.images for split in data.splits.values()) == 14
    evaluate.main(["--model", str(run)])
    results = read_results(run / "last")
    assert results["images_digest"] == data.splits["test"].digest
    assert results["dataset_options"] == {"skip_empty_rows": True}
    assert published(run, tmp_path / "hub")["options"] == {"skip_empty_rows": True}
    assert "skip_empty_rows" not in json.loads((run / "run.json").read_text())
    train(tmp_path / "run", *TINY, "--data_dir", tmp_path / "set", "--on_broken_image", "skip", "--resume",
          "--allow_changes", "epochs", "--epochs", 2)  # fmt: skip
    assert read_facts(run / "last")["epoch"] == 2


def test_an_evaluation_that_skips_broken_images(place, tmp_path, capsys):
    run = train(tmp_path / "run", *TINY, "--data_dir", place, "--on_broken_image", "skip")
    assert "broken_images_left_out" not in read_results_of(run)
    (place / "test/cat/1.png").write_text("broken")
    results = read_results_of(run)  # as in training
    assert (results["num_images"], results["broken_images_left_out"]) == (7, 1)
    assert results["metrics"]["per_class_images"] == [3, 4]
    assert "note: 1 more image(s) cannot be read and are left out" in capsys.readouterr().out
    assert results["also_trained_on"]["images"] == 0
    with pytest.raises(SystemExit, match=r"cat/1\.png cannot be read: .*--on_broken_image skip"):
        read_results_of(run, "--on_broken_image", "stop")
    for path in (place / "test").rglob("*.png"):
        path.write_text("broken")
    with pytest.raises(SystemExit, match="none of the 8 images of the split can be read"):
        read_results_of(run)
    published(run, tmp_path / "hub")
    card = (tmp_path / "hub/README.md").read_text()
    assert "skip" not in card
    assert "1 image(s) of the evaluated split" in card
    assert "1 epoch, " in card


@pytest.mark.parametrize("trained_with", ["skip", "stop"])
def test_later_commands_leave_out_broken_images_as_in_training(trained_with, tmp_path, capsys):
    place = write(tmp_path / "set", *classes("cat", "dog", splits=("train", "val", "test"), each=12))
    run = train(tmp_path / "run", *TINY, "--data_dir", place, "--on_broken_image", trained_with)
    for split in ("val", "test"):
        (place / split / "cat/1.png").write_text("broken")
    later = {
        calibrate: [str(run)],
        decouple: ["logit_adjustment", str(run), "--output_dir", str(tmp_path / "other")],
    }
    for command, options in later.items():
        if trained_with == "stop":
            with pytest.raises(SystemExit, match=r"cat/1\.png cannot be read: .*, or leave out broken images: --on_"):
                command.main(options)
            options = [*options, "--on_broken_image", "skip"]
        capsys.readouterr()
        command.main(options)
        assert "1 image(s) that cannot be read are left out\n" in capsys.readouterr().out


def test_other_images_without_a_label_are_left_out(place, tmp_path):
    run = train(tmp_path / "run", *TINY, "--data_dir", place)
    rows = [f"im/{index}.png,{'cat' if index % 2 else 'dog'}" for index in range(8)]
    other = write(tmp_path / "other", *(row.partition(",")[0] for row in rows))
    write_lines(other / "train.csv", "image,label", *rows[:5])
    write_lines(other / "test.csv", "image,label", "im/5.png,cat", "im/6.png,dog", "im/7.png,")
    options = ("--other_images", "--data_dir", str(other))
    with pytest.raises(SystemExit, match=r"empty in row 3; fill them, or leave these rows out with --on_broken_image"):
        read_results_of(run, *options)
    assert read_results_of(run, *options, "--on_broken_image", "skip")["num_images"] == 2


def read_results_of(run, *options):
    evaluate.main(["--model", str(run), *options])
    return read_results(run / "last")


def test_a_run_on_a_stream_that_skips_rows(tmp_path):
    from test_streams import pairs, write_archive, write_splits

    folder = write_splits(tmp_path / "tars", train="0101010101", test="01")
    write_archive(folder / "train-1.tar", {**pairs("0101", "a"), "lost.png": 7, **pairs("01", "z")})
    options = ("--data_dir", folder, "--streaming", "--batch_size", 8)
    with pytest.raises(SystemExit, match=r"split train: 1 row\(s\) have no image or no label"):
        train(tmp_path / "run", *TINY, *options)
    run = train(tmp_path / "run", *TINY, *options, "--on_broken_image", "skip")
    assert read_data(run).train_class_counts == [8, 8]
    evaluate.main(["--model", str(run)])
    assert read_results(run / "last")["dataset_options"] == {"streaming": True, "skip_empty_rows": True}
