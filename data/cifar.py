"""Long-tailed CIFAR-10 and CIFAR-100, from the files that their authors distribute."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from data.hub_loading import load_from_hub
from data.sets.cifar_lt import CifarLT


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a CIFAR file: dicts and lists with numpy arrays. It refuses to construct anything else."""

    # numpy 1 wrote numpy.core, numpy 2 writes numpy._core
    ALLOWED = frozenset(
        {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
        | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    )

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file contains")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def long_tailed_counts(
    num_classes: int, images_per_class: int, imbalance_factor: float, imbalance_type: str
) -> list[int]:
    """Returns the training images of each class, from `images_per_class` to `images_per_class / imbalance_factor`.

    With `imbalance_type` "exp" the counts decay exponentially over the classes. With "step" the second half of the
    classes is rare. Raises ValueError for another type, or for a factor below 1.
    """
    if imbalance_factor < 1:
        raise ValueError(f"imbalance_factor is the largest class over the smallest, 1 or more, not {imbalance_factor}")
    share = 1.0 / imbalance_factor
    if imbalance_type == "exp":
        return [int(images_per_class * share ** (label / (num_classes - 1))) for label in range(num_classes)]
    if imbalance_type == "step":
        half = num_classes // 2
        return [images_per_class] * half + [int(images_per_class * share)] * (num_classes - half)
    raise ValueError(f"imbalance_type must be 'exp' or 'step', not {imbalance_type!r}")


def long_tailed_subset(labels: np.ndarray, counts: list[int]) -> np.ndarray:
    """Returns the indices of the standard subset, class by class, as CIFAR-LT papers since Cao et al., 2019, draw it.

    numpy's legacy generator, seeded with 0, shuffles the indices of one class after the other. The first `counts[c]`
    of each class are kept.
    """
    generator = np.random.RandomState(0)
    chosen = []
    for label, count in enumerate(counts):
        indices = np.flatnonzero(labels == label)
        generator.shuffle(indices)
        chosen.append(indices[:count])
    return np.concatenate(chosen)


def load_cifar_lt(files: CifarLT, data_dir: Path, imbalance_factor: float, imbalance_type: str) -> DatasetDict:
    """Loads `train`, the standard long-tailed subset, and `test`, all 10,000 images. See `data.load_long_tailed`."""
    counts = long_tailed_counts(files.num_classes, files.images_per_class, imbalance_factor, imbalance_type)
    if not (data_dir / files.folder).exists() and not (data_dir / files.archive).exists():
        try:
            return load_hub_copy(files, counts)
        except ValueError as error:
            raise FileNotFoundError(
                f"neither {data_dir / files.folder} nor {data_dir / files.archive} exists; put {files.archive} from "
                f"the CIFAR page of the University of Toronto into {data_dir}, or name another folder with --data_dir. "
                f"The Hub's copy, {files.hub_id}, cannot be loaded either: {error}"
            ) from error
    names = _read(files, data_dir, files.meta)[files.names_key]
    batches = [_read(files, data_dir, part) for part in files.train]
    images = np.concatenate([batch["data"] for batch in batches])
    labels = np.concatenate([batch[files.label_key] for batch in batches])
    wanted = files.images_per_class * len(names)
    if len(labels) != wanted or len(images) != wanted:
        raise ValueError(
            f"{files.name} has {wanted} training images; {data_dir} has {len(images)} and {len(labels)} labels"
        )
    subset = long_tailed_subset(labels, counts)
    test = _read(files, data_dir, files.test)
    return DatasetDict(
        train=_to_dataset(images[subset], labels[subset], names),
        test=_to_dataset(test["data"], np.asarray(test[files.label_key]), names),
    )


def load_hub_copy(files: CifarLT, counts: list[int]) -> DatasetDict:
    """Loads `files.hub_id`, a copy on the Hub. Its images must be in the same order as in the files.

    `counts` (C,) are the training images to keep of each class. Raises ValueError if the copy cannot be loaded, or if
    it has not all images and labels of CIFAR.
    """
    loaded = load_from_hub(files.hub_id)
    splits = {}
    for split in ("train", "test"):
        features = loaded[split].features if split in loaded else {}
        image = next((name for name in ("img", "image") if name in features), None)
        label = next((name for name in (files.hub_label, "label") if name in features), None)
        if image is None or not isinstance(features.get(label), ClassLabel):
            there = {name: list(rows.features) for name, rows in loaded.items()}
            raise ValueError(
                f"{files.hub_id} needs the splits train and test with the columns img or image, and {files.hub_label} "
                f"or label with names of classes; it has {there}"
            )
        rows = loaded[split].select_columns([image, label])
        renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
        splits[split] = rows.rename_columns(renamed) if renamed else rows
    labels = splits["train"].with_format("arrow")["label"].to_numpy()
    found = np.bincount(labels, minlength=files.num_classes).tolist()
    if found != [files.images_per_class] * files.num_classes:
        raise ValueError(
            f"{files.hub_id} is no copy of the data set of {files.name}: {files.num_classes} classes with "
            f"{files.images_per_class} training images each expected, {len(found)} with {min(found)} to {max(found)} "
            "found. The default copy is loaded without --data_dir"
        )
    subset = long_tailed_subset(labels, counts)
    return DatasetDict(train=splits["train"].select(subset), test=splits["test"])


def _read(files: CifarLT, data_dir: Path, member: str) -> dict:
    folder, archive = data_dir / files.folder, data_dir / files.archive
    in_folder = (folder / member).is_file()
    if not in_folder and not archive.is_file():
        raise FileNotFoundError(f"{folder / member} is missing; unpack {files.archive} again")
    source = folder if in_folder else archive
    expected = (files.names_key,) if member == files.meta else ("data", files.label_key)
    try:
        if in_folder:
            content = (folder / member).read_bytes()
        else:
            with tarfile.open(archive) as tar:
                content = tar.extractfile(f"{files.folder}/{member}").read()
        loaded = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        return {key: loaded[key] for key in expected}
    except (pickle.UnpicklingError, tarfile.TarError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{member} in {source} is not a CIFAR file, or is damaged: {error!r}") from error


def _to_dataset(images: np.ndarray, labels: np.ndarray, names: list[str]) -> Dataset:
    pixels = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (N, 3072) -> (N, 32, 32, 3)
    return Dataset.from_dict(
        {"image": [_uncompressed(image) for image in pixels], "label": labels.tolist()},
        features=Features({"image": Image(), "label": ClassLabel(names=list(names))}),
    )


def _uncompressed(pixels: np.ndarray) -> dict:
    """Stores pixels (32, 32, 3) as a PPM file, which is much faster to write than PNG, and faster to read."""
    return {"bytes": b"P6 32 32 255\n" + pixels.tobytes(), "path": None}
