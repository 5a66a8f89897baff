"""Tar archives that are read while they are trained on; a data set on the Hub goes the same way."""

import io
import json
import tarfile
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

import train_accelerate
from data import (
    BROKEN,
    OnBrokenImage,
    TrainBatch,
    class_counts,
    class_labels,
    evaluation_batches,
    evaluation_processor,
    load_long_tailed,
    train_transform,
    training_batches,
)
from data.notices import DataNotice
from ride_bf.methods.samplers import LongTailedSampler

COUNTS = {"train": [12, 6, 3], "test": [2, 2, 2]}
SHARDS = 4


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_shards(folder, counts=COUNTS, label=lambda c: str(c), extension="cls", broken=()):
    """Archives whose images are of one shade each, 10 times their place among all images of the split."""
    folder.mkdir(exist_ok=True)
    for split, of_class in counts.items():
        labels = [c for c, count in enumerate(of_class) for _ in range(count)]
        for shard in range(SHARDS):
            with tarfile.open(folder / f"{split}-{shard:03d}.tar", "w") as tar:
                for index in range(shard, len(labels), SHARDS):
                    buffer = io.BytesIO()
                    Image.new("RGB", (16, 16), (10 * index,) * 3).save(buffer, "PNG")
                    content = buffer.getvalue()[:40] if (split, index) in broken else buffer.getvalue()
                    for name, data in (("png", content), (extension, label(labels[index]).encode())):
                        member = tarfile.TarInfo(f"{split}{index:04d}.{name}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    return folder


def stream(place, **options):
    return load_long_tailed("custom", place, streaming=True, **options)


def process(index=0, count=1):
    """What the loaders ask of an accelerator, as one of several processes would have it."""
    return SimpleNamespace(process_index=index, num_processes=count, device=torch.device("cpu"))


def batches_of(splits, accelerator, **options):
    transform = train_transform("inaturalist", 8, on_broken=options.pop("on_broken", None))
    finish = TrainBatch("digits", (0.0,) * 3, (1.0,) * 3)
    return training_batches(splits["train"], transform, finish, 4, accelerator, **options)


def shades(batches):
    """Place of each image among all images of the split, from its pixels."""
    return [round(255 * value / 10) for batch in batches for value in batch["pixel_values"][:, 0, 4, 4].tolist()]


def test_counts_names_and_lengths(tmp_path):
    splits = stream(write_shards(tmp_path / "tars"))
    assert set(splits) == {"train", "test"}
    assert class_counts(splits["train"]) == [12, 6, 3]
    assert splits["train"].features["label"].names == ["0", "1", "2"]
    assert len(splits["test"]) == 6


def test_classes_are_counted_once(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "tars")
    first = class_counts(stream(folder)["train"])
    monkeypatch.setattr("data.streams.tqdm", None)
    assert class_counts(stream(folder)["train"]) == first


def test_labels_that_are_names(tmp_path):
    names = ["zebra", "ant", "moose"]
    folder = write_shards(tmp_path / "tars", label=lambda c: names[c], extension="txt")
    splits = stream(folder, label_column="txt")
    assert splits["train"].features["label"].names == ["ant", "moose", "zebra"]
    assert class_counts(splits["train"]) == [6, 3, 12]
    processor = evaluation_processor(8, 8, (0.0,) * 3, (1.0,) * 3)
    (batch,) = evaluation_batches(splits["test"], processor, 8)
    assert sorted(batch["labels"].tolist()) == [0, 0, 1, 1, 2, 2]


def test_an_epoch_is_as_many_batches_as_the_images_make_and_epochs_differ(tmp_path):
    splits = stream(write_shards(tmp_path / "tars"))
    batches = batches_of(splits, process(), passes=2)
    assert len(batches) == 10
    epochs = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        epochs.append(shades(batches))
    assert [len(epoch) for epoch in epochs] == [40, 40]
    assert sorted(epochs[0][:21]) == list(range(21)), "each image once before any comes again"
    assert epochs[0] != epochs[1]
    batches.set_epoch(0)
    assert shades(batches) == epochs[0], "a resumed run sees the same order"


def test_processes_read_shards_of_their_own(tmp_path):
    splits = stream(write_shards(tmp_path / "tars"))
    seen = [set(shades(batches_of(splits, process(index, 2), passes=3))) for index in range(2)]
    assert seen[0] | seen[1] == set(range(21))
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_image_once(tmp_path, workers):
    splits = stream(write_shards(tmp_path / "tars"))
    processor = evaluation_processor(8, 8, (0.0,) * 3, (1.0,) * 3)
    batches = list(evaluation_batches(splits["test"], processor, 4, workers, Accelerator(cpu=True)))
    assert sorted(shades(batches)) == list(range(6))
    assert all(batch["labels"].tolist() == [place // 2 for place in shades([batch])] for batch in batches)


def test_broken_images(tmp_path):
    folder = write_shards(tmp_path / "tars", broken={("train", 3), ("test", 1)})
    splits = stream(folder)
    with pytest.raises(ValueError, match=r"train0003.png cannot be read"):
        shades(batches_of(splits, process()))
    skip = OnBrokenImage("skip", None, tmp_path / "broken.txt")
    assert set(shades(batches_of(splits, process(), on_broken=skip, passes=2))) == set(range(21)) - {3}
    processor = evaluation_processor(8, 8, (0.0,) * 3, (1.0,) * 3)
    (batch,) = evaluation_batches(splits["test"], processor, 8, on_broken=skip)
    assert sorted(batch["labels"].tolist()) == [BROKEN, 0, 1, 1, 2, 2]
    noted = (tmp_path / "broken.txt").read_text()
    assert "train0003.png" in noted
    assert "test0001.png" in noted


def test_a_run(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "tars")
    options = (
        f"--recipe digits_lt_resnet32 --dataset custom --data_dir {folder} --streaming --epochs 2 --batch_size 4 "
        "--image_size 8 --resize_size 8 "
        f"--depths 1 1 1 --hidden_sizes 4 4 4 --warmup_epochs 0 --reweight_epoch 1 --output_dir {tmp_path / 'out'}"
    )
    monkeypatch.setattr("sys.argv", ["train_accelerate.py", *options.split()])
    train_accelerate.main()
    results = json.loads((tmp_path / "out/test_results.json").read_text())
    assert results["train_class_counts"] == [12, 6, 3]
    assert len(results["test"]["per_class_accuracy"]) == 3


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda folder: (folder / "x.txt").write_text(""),
            {},
            r"empty has no tar archives to train on; .*train-\*.tar",
        ),
        (lambda folder: write_shards(folder, {"train": [2, 1]}), {}, r"no split for test, only train"),
        (lambda folder: write_shards(folder), {"label_column": "json"}, r"no column json, .*'cls'.*--label_column"),
        (lambda folder: write_shards(folder), {"validation_fraction": 0.1}, "a stream cannot be split"),
        (
            lambda folder: write_shards(folder, {"train": [2, 0, 1], "test": [1, 1, 1]}),
            {},
            r"classes without training images: 1;",
        ),
        (
            lambda folder: write_shards(folder, {"train": [2, 1], "test": [1, 1, 1]}),
            {},
            r"classes without training images: 2;",
        ),
    ],
)
def test_what_is_wrong_is_explained(tmp_path, change, options, message):
    (tmp_path / "empty").mkdir()
    change(tmp_path / "empty")
    with pytest.raises(ValueError, match=message):
        stream(tmp_path / "empty", **options)


def test_what_cannot_be_streamed(tmp_path):
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(ValueError, match=r"x.csv cannot be streamed"):
        stream(tmp_path / "x.csv")
    for place in ("user/name", "user/name.v2", "user/name.py"):
        with pytest.raises(ValueError, match=rf"'{place}' cannot be loaded from the Hub"):
            stream(place)
    for place in ("./name", "user/a--b", "user/name.git"):
        with pytest.raises(ValueError, match=f"{place} cannot be streamed"):
            stream(place)
    splits = stream(write_shards(tmp_path / "tars"))
    with pytest.raises(ValueError, match="cannot be drawn by class: with --streaming set --sampler instance"):
        class_labels(splits["train"])
    with pytest.raises(ValueError, match="set --sampler instance"):
        batches_of(splits, process(), sampler=LongTailedSampler(torch.zeros(3, dtype=int).numpy(), 1, "instance", 3))


def write_archive(path, files):
    """An archive of `files`, name -> content; a number is a small picture of that shade, a text is itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            if isinstance(content, int):
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (content,) * 3).save(buffer, "PNG")
                content = buffer.getvalue()
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path.parent


def pairs(labels, prefix="k", image="png"):
    """Files of an archive: an image and its label for each of `labels`; None leaves the label out."""
    files = {}
    for index, label in enumerate(labels):
        files[f"{prefix}{index}.{image}"] = index
        if label is not None:
            files[f"{prefix}{index}.cls"] = label
    return files


def write_splits(folder, train=("0", "1", "0", "1"), test=("0", "1"), names=("train-0.tar", "test-0.tar")):
    for name, labels in zip(names, (train, test), strict=True):
        write_archive(folder / name, pairs(labels, prefix=name[:2].lower()))
    return folder


class TestArchives:
    @pytest.mark.parametrize("folder", ["birds [2024]", "a*b?", ".hidden/[x]"])
    def test_the_path_is_no_pattern(self, tmp_path, folder):
        assert class_counts(stream(write_splits(tmp_path / folder))["train"]) == [2, 2]

    @pytest.mark.parametrize(
        "names",
        [
            ("Train-0.TAR", "TEST-0.tar"),
            ("training_0.tar", "testing_0.tar"),
            ("birds-train-0.tar", "birds-eval-0.tar"),
            ("train/0000.tar", "test/0000.tar"),
        ],
    )
    def test_names(self, tmp_path, names):
        splits = stream(write_splits(tmp_path / "x", names=names))
        assert {split: class_counts(rows) for split, rows in splits.items()} == {"train": [2, 2], "test": [1, 1]}

    def test_an_archive_is_read_once_though_two_names_of_its_split_begin_alike(self, tmp_path):
        write_splits(tmp_path / "x", names=("training-0.tar", "testing-0.tar"))
        write_archive(tmp_path / "x/validation-0.tar", pairs("01", prefix="v"))
        splits = stream(tmp_path / "x")
        assert {split: len(list(rows.rows)) for split, rows in splits.items()} == {
            "train": 4,
            "validation": 2,
            "test": 2,
        }

    def test_archives_of_no_split_are_named(self, tmp_path):
        folder = write_splits(tmp_path / "x")
        write_archive(folder / "extra-0.tar", pairs("01"))
        write_archive(folder / "more/0.tar", pairs("01"))
        (folder / "train-1.tar.gz").write_bytes(b"")
        with pytest.warns(
            DataNotice, match=r"are not read: extra-0.tar, more/0.tar, train-1.tar.gz \(unpack it"
        ) as told:
            stream(folder)
        assert str(folder) in str(told[0].message)

    @pytest.mark.parametrize(
        ("write", "message"),
        [
            (
                lambda folder: [write_archive(folder / f"{name}-0.tar", pairs("01")) for name in ("val", "valid")],
                r"x has archives of several names for validation: val-0.tar, valid-0.tar; keep one name",
            ),
            (
                lambda folder: write_archive(folder / "train-test-0.tar", pairs("01")),
                r"train-test-0.tar has the names of several splits, train and test; keep one",
            ),
            (
                lambda folder: (folder / "train-1.tar").write_text("version https://git-lfs.github.com/spec/v1\n"),
                r"train-1.tar is only the pointer of a file in Git LFS; .*git lfs pull",
            ),
            (
                lambda folder: (folder / "test-1.tar").write_bytes((folder / "test-0.tar").read_bytes()[:700]),
                r"test-1.tar is no tar archive, or is damaged: .*; replace it",
            ),
        ],
    )
    def test_what_is_wrong(self, tmp_path, write, message):
        write(write_splits(tmp_path / "x"))
        with pytest.raises(ValueError, match=message):
            stream(tmp_path / "x")

    def test_only_other_archives(self, tmp_path):
        write_archive(tmp_path / "x/birds.tar", pairs("01"))
        with pytest.raises(ValueError, match=r"x has no tar archives to train on, only birds.tar; streaming reads"):
            stream(tmp_path / "x")

    def test_colons_in_a_path(self, tmp_path):
        with pytest.raises(ValueError, match=r"a::b.* has '::' in its name.*; rename it"):
            stream(write_splits(tmp_path / "a::b"))


class TestKeysOfArchives:
    def test_a_dot_in_every_key(self, tmp_path):
        files = {"train.0001.jpg": 1, "train.0001.cls": "0", "train.0002.jpg": 2, "train.0002.cls": "1"}
        write_archive(tmp_path / "x/train-0.tar", files)
        write_archive(tmp_path / "x/test-0.tar", files)
        with pytest.raises(ValueError, match=r"train-0.tar: train.0001.jpg has a dot in its key.* 'train'") as error:
            stream(tmp_path / "x")
        assert "Rename the files of the archive, for example to train_0001.jpg" in str(error.value)

    def test_a_dot_in_a_later_key(self, tmp_path):
        folder = write_splits(tmp_path / "x", train="010101")
        write_archive(folder / "train-1.tar", {**pairs("01", "a"), "b.7.png": 1, "b.7.cls": "0", **pairs("1", "c")})
        with pytest.raises(ValueError, match=r"train-1.tar: b.7.png has a dot in its key"):
            stream(folder)

    def test_a_column_with_a_dot(self, tmp_path):
        for split in ("train", "test"):
            files = {f"{k}.{kind}": k if kind != "cls" else str(k) for k in range(2) for kind in ("left.png", "cls")}
            write_archive(tmp_path / f"x/{split}-0.tar", files)
        assert len(stream(tmp_path / "x", image_column="left.png")["train"]) == 2

    def test_suffixes_in_upper_case(self, tmp_path):
        for split in ("train", "test"):
            write_archive(tmp_path / f"x/{split}-0.tar", pairs("01", image="PNG"))
        assert class_counts(stream(tmp_path / "x")["test"]) == [1, 1]

    @pytest.mark.parametrize("extra", [{"l.jpg": 1, "l.cls": "1"}, {"l.png": 1}])
    def test_an_image_unlike_the_first_ones(self, tmp_path, extra):
        folder = write_splits(tmp_path / "x")
        write_archive(folder / "train-0.tar", {**pairs("01", "a"), **extra, **pairs("01", "m")})
        with pytest.raises(ValueError, match=r"train-0.tar: l has the files .*, but other images have .cls and .png;"):
            stream(folder)


class TestLabelsOfStreams:
    def test_numbers_with_zeros_are_names(self, tmp_path):
        folder = write_splits(tmp_path / "x", train=("010", "10", "020\n", "10"), test=("010", "020"))
        with pytest.warns(DataNotice, match=r"not 0 to 2, so they are the names of classes: 010, 10, 020"):
            splits = stream(folder)
        assert splits["train"].names == ["010", "10", "020"]
        assert class_counts(splits["train"]) == [1, 2, 1]

    def test_names(self, tmp_path):
        splits = stream(write_splits(tmp_path / "x", train=("True", "NA", "NA\n", "1.0"), test=("NA", "True")))
        assert splits["train"].names == ["1.0", "NA", "True"]
        processor = evaluation_processor(8, 8, (0.0,) * 3, (1.0,) * 3)
        (batch,) = evaluation_batches(splits["test"], processor, 8)
        assert batch["labels"].tolist() == [1, 2]

    def test_streams_and_tables_agree(self, tmp_path):
        labels = ["02", "1", "02", "11"]
        write_splits(tmp_path / "x", train=labels, test=labels[:1])
        (tmp_path / "y").mkdir()
        for index in range(5):
            Image.new("RGB", (8, 8), (index,) * 3).save(tmp_path / f"y/{index}.png")
        lines = [f"{index}.png,{label}\n" for index, label in enumerate([*labels, "1"])]
        (tmp_path / "y/train.csv").write_text("image,label\n" + "".join(lines[:4]))
        (tmp_path / "y/test.csv").write_text("image,label\n" + lines[4])
        with pytest.warns(DataNotice, match="names of classes: 1, 02, 11"):
            table = load_long_tailed("custom", tmp_path / "y")["train"]
        with pytest.warns(DataNotice, match="names of classes: 1, 02, 11"):
            streamed = stream(tmp_path / "x")["train"]
        assert (streamed.names, class_counts(streamed)) == (table.features["label"].names, class_counts(table))

    def test_rows_without_label(self, tmp_path):
        folder = write_splits(tmp_path / "x", train="01010101")
        write_archive(folder / "train-1.tar", {**pairs("01", "a"), "lost.png": 7, **pairs("1", "z")})
        with pytest.raises(ValueError, match=r"split train: 1 row\(s\) have no image or no label") as error:
            stream(folder)
        assert "row 11 (lost.png)" in str(error.value)
        assert "--on_broken_image skip" in str(error.value)
        with pytest.warns(DataNotice, match=r"split train: 1 row\(s\) without image or label are left out"):
            splits = stream(folder, skip_empty_rows=True)
        assert class_counts(splits["train"]) == [5, 6]
        assert len(list(splits["train"].rows)) == 11
        assert len(shades(batches_of(splits, process()))) == 8, "two full batches of the eleven rows"

    def test_no_label_in_the_test(self, tmp_path):
        folder = write_splits(tmp_path / "x", test=("-1", "-1"))
        with (
            pytest.warns(DataNotice, match="the split test has no labels and is not used"),
            pytest.raises(ValueError, match=r"no split for test"),
        ):
            stream(folder)

    def test_one_class(self, tmp_path):
        with pytest.raises(ValueError, match="has one class only, cat"):
            stream(write_splits(tmp_path / "x", train=("cat", "cat"), test=("cat",)))

    def test_a_label_of_another_encoding(self, tmp_path):
        with pytest.raises(ValueError, match=r"x has a label that is not in UTF-8"):
            stream(write_splits(tmp_path / "x", train=(b"k\xe4fer", "ant"), test=("ant",)))


def test_splits_of_a_streamed_data_set_on_the_hub(tmp_path, monkeypatch):
    def builder(**splits):
        rows = Dataset.from_dict({"image": ["a.png", "b.png"], "label": [0, 1]}).cast_column("image", ImageFeature())
        streams = {split: rows.to_iterable_dataset() for split in splits}
        return SimpleNamespace(as_streaming_dataset=lambda: streams, cache_dir=str(splits))

    monkeypatch.setattr("data.streams.load_dataset_builder", lambda place: builder(train=1, test=1, extra=1))
    with pytest.warns(DataNotice, match=r"user/name: splits that are not used: extra"):
        assert set(stream("user/name")) == {"train", "test"}
    monkeypatch.setattr("data.streams.load_dataset_builder", lambda place: builder(train=1, val=1, valid=1, test=1))
    with pytest.raises(ValueError, match=r"user/name has several splits for validation, one of them valid; keep one"):
        stream("user/name")
