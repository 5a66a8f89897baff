"""Benchmarks that are annotation lists, `relative/path.jpg label` a line, beside folders of images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, DatasetDict, Features, Image


@dataclass(frozen=True)
class Benchmark:
    """Where the lists of a public benchmark are, below its folder, and how many classes they name."""

    folder: str
    num_classes: int
    lists: dict[str, str]  # split -> file name


BENCHMARKS = {
    "imagenet_lt": Benchmark(
        "ImageNet_LT",
        1000,
        {"train": "ImageNet_LT_train.txt", "validation": "ImageNet_LT_val.txt", "test": "ImageNet_LT_test.txt"},
    ),
    "inaturalist18": Benchmark(
        "iNaturalist18", 8142, {"train": "iNaturalist18_train.txt", "test": "iNaturalist18_val.txt"}
    ),
    "places_lt": Benchmark(
        "Places_LT",
        365,
        {"train": "Places_LT_train.txt", "validation": "Places_LT_val.txt", "test": "Places_LT_test.txt"},
    ),
}

_IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def read_annotation_list(path: Path) -> tuple[list[str], np.ndarray]:
    """Relative paths (N,) and labels (N,) of a list, whose paths may hold spaces.

    Raises ValueError naming file, line number and line for anything but `relative/path label`.
    """
    paths, labels = [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        image, _, label = line.rstrip().rpartition(" ")
        if not image or not label.isdecimal():
            raise ValueError(f"{path}, line {number}: expected 'relative/path.jpg label', got {line!r}")
        paths.append(image)
        labels.append(int(label))
    if not paths:
        raise ValueError(f"{path} is empty; expected lines 'relative/path.jpg label'")
    return paths, np.asarray(labels, dtype=np.int64)


def class_names(paths: list[str], labels: np.ndarray, num_classes: int) -> list[str]:
    """One name a class: the folder its training images are in, or its number where folders and classes differ."""
    names: list[str | None] = [None] * num_classes
    for path, label in zip(paths, labels.tolist(), strict=True):
        if names[label] is None:
            names[label] = PurePosixPath(path).parent.name
    if None in names or len(set(names)) < num_classes:
        return [str(label) for label in range(num_classes)]
    return names


class _AnnotationListBuilder(datasets.ArrowBasedBuilder):
    """Lists to cached Arrow tables that hold paths, not pixels. A changed list is read anew."""

    VERSION = datasets.Version("1.0.0")

    def __init__(self, *, image_folder: str, names: list[str], **kwargs):
        self.image_folder = Path(image_folder)
        self.names = names
        super().__init__(**kwargs)

    def _info(self):
        return datasets.DatasetInfo(features=Features({"image": Image(), "label": ClassLabel(names=self.names)}))

    def _split_generators(self, dl_manager):
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"files": files})
            for split, files in self.config.data_files.items()
        ]

    def _generate_tables(self, files) -> Iterator[tuple]:
        for index, file in enumerate(files):
            paths, labels = read_annotation_list(Path(file))
            absolute = pa.array([str(self.image_folder / path) for path in paths])
            images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), absolute], fields=list(_IMAGE_TYPE))
            yield (0, index), pa.table({"image": images, "label": pa.array(labels)})


def load_annotation_lists(name: str, data_dir: Path) -> DatasetDict:
    """The splits of benchmark `name` whose lists and images are in `data_dir`. See `data.load_long_tailed`."""
    benchmark = BENCHMARKS[name]
    lists = {split: data_dir / file for split, file in benchmark.lists.items()}
    missing = [str(path) for path in lists.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{name} needs the lists {', '.join(missing)}, which are not there; "
            f"put them and the images into {data_dir}, or name another folder with --data_dir"
        )
    contents = {split: read_annotation_list(path) for split, path in lists.items()}
    for split, (paths, labels) in contents.items():
        if labels.max() >= benchmark.num_classes:
            line = int(labels.argmax()) + 1
            raise ValueError(
                f"{lists[split]}, line {line}: label {labels.max()} is not one of {name}'s 0 to "
                f"{benchmark.num_classes - 1}; is this another data set's list?"
            )
        # A look at a hundred of them: enough for a folder that is missing or wrong.
        looked_at = sorted({round(index) for index in np.linspace(0, len(paths) - 1, 100)})
        absent = [paths[index] for index in looked_at if not (data_dir / paths[index]).is_file()]
        if absent:
            raise FileNotFoundError(
                f"{len(absent)} of {len(looked_at)} images looked at in {lists[split]} are not there, the first "
                f"{absent[0]}; paths in a list are relative to {data_dir}"
            )
    train_paths, train_labels = contents["train"]
    empty = np.flatnonzero(np.bincount(train_labels, minlength=benchmark.num_classes) == 0)
    if empty.size:
        raise ValueError(
            f"{lists['train']} has no image of {empty.size} classes, the first {empty[:5].tolist()}; "
            f"{name} has {benchmark.num_classes}: is the list cut off?"
        )
    builder = _AnnotationListBuilder(
        image_folder=str(data_dir.resolve()),
        names=class_names(train_paths, train_labels, benchmark.num_classes),
        dataset_name=name,
        data_files={split: str(path.resolve()) for split, path in lists.items()},
    )
    builder.download_and_prepare()
    return builder.as_dataset()
