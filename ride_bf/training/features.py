"""Features of a frozen backbone, computed once and kept on the disk."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from data import FinishedBatches
from data.columns import undecoded
from data.groups import image_keys
from data.splits import class_labels
from data.transforms import check_some_read
from data.writing import whole_file
from modeling_ride_bf import RideBfForImageClassification, RideBfModel
from ride_bf.runs.models import weights_digest

_ROWS_AT_ONCE = 4096  # that are copied, to limit memory
_IMAGES_AT_ONCE = 32  # on a CPU, where the feature maps of larger batches leave the caches: 30 % slower with 256


@dataclass(frozen=True)
class FeatureRows(TorchDataset):
    """Features of images, in place of the images.

    Attributes:
        features (V, N, D): of V views of each image; on the disk, read as they are needed.
        labels (N,): classes; negative for an image that could not be read.
        rows: the images, to name them.
        full_batch: size of a batch in training, which leaves out images that could not be read. None: keep them.
    """

    features: np.ndarray
    labels: np.ndarray
    rows: Dataset
    full_batch: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def paths(self, indices: list[int]) -> list[str]:
        """Returns the paths of images; for an image that is stored in the data set, its number."""
        images = undecoded(self.rows)[indices]["image"]
        return [image["path"] or f"image {index}" for index, image in zip(indices, images, strict=True)]

    def __getitems__(self, draws: list[int]) -> dict[str, Tensor]:
        """A batch: `pixel_values` (B, D) has features. A draw is number * N + row; the number chooses the view.

        Raises BrokenImageError if no image of a full batch of training could be read. A smaller batch is then empty.
        """
        numbers, index = np.divmod(np.asarray(draws), len(self.labels))
        if self.full_batch is not None:
            read = self.labels[index] >= 0
            check_some_read(np.count_nonzero(read), len(draws), self.full_batch)
            numbers, index = numbers[read], index[read]
        views = numbers // len(self.labels) % len(self.features)
        if not len(index):
            return {}
        return {
            "pixel_values": torch.from_numpy(np.array(self.features[views, index])),
            "labels": torch.from_numpy(self.labels[index]),
            "index": torch.from_numpy(index),
        }

    def __getitem__(self, draw: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([draw]).items()}


def feature_batches(rows: FeatureRows, batch_size: int, accelerator: Accelerator) -> FinishedBatches:
    """A loader of features for evaluation, in the order of the images. Each process gets its share."""
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=as_it_is)
    return FinishedBatches(accelerator.prepare(loader), as_it_is)


def as_it_is(batch: Any) -> Any:
    return batch


class FeatureCache:
    """Computes the pooled features of a frozen backbone, or reads them if they were computed before.

    Files lie in the cache of the `datasets` library. There is a folder for each backbone, its weights and its pooling,
    and way to read images; in it a file for each list of images: paths, sizes and times of the files, or the content of
    images in a table. An image seen as in evaluation is computed once for all lists in a folder.

    Args:
        model: the network before training.
        accelerator: each process computes its share.
    """

    def __init__(self, model: RideBfForImageClassification, accelerator: Accelerator):
        self.network, self.accelerator = model.ride_bf, accelerator
        shared = model.ride_bf.trunk.whole
        self.backbone = {"config": _facts(model.config.backbone_config), "pooling": model.config.pooling}
        self.backbone["weights"] = weights_digest(model.ride_bf.trunk if shared else model.ride_bf)

    def rows(
        self,
        split: Dataset,
        loader: Callable[[Dataset], FinishedBatches],
        still_broken: Callable[[dict], bool],
        facts: dict[str, Any],
        name: str,
        augmented_views: int = 0,
    ) -> FeatureRows:
        """Features of a split, (views, N, D).

        Args:
            split: the images.
            loader: makes a loader of images in their order, with negative labels for images that could not be read.
                `set_epoch` chooses the view. It is called only if there are features that are not on the disk.
            still_broken: whether an image, which could not be read when the features were computed, cannot be read
                now. It reports the image to this run.
            facts: how images are read and varied; part of the digest.
            name: of the split, for the progress bar.
            augmented_views: views of each image; 0: one, as in evaluation. An augmented view depends on the place of
                an image in its list, so another list needs its own.
        """
        keys = image_keys(split)
        folder = self._folder({**facts, "views": augmented_views})
        stored = _Stored(folder / hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest())
        found = stored.is_whole()
        if found:
            broken = np.flatnonzero(np.load(stored.labels) < 0)
            found = all([still_broken(row["image"]) for row in undecoded(split).select(broken)])
        if not self._everywhere([found]).all():
            known = _known(folder, keys) if not augmented_views else _Known.none(len(keys))
            known.keep(self._everywhere(known.mask))
            self._compute(split, loader, keys, known, augmented_views or 1, stored, name)
        features = np.load(stored.features, mmap_mode="r")
        labels = np.load(stored.labels)
        labels = np.where(labels < 0, labels, class_labels(split))
        return FeatureRows(features, labels, split)

    def _folder(self, facts: dict[str, Any]) -> Path:
        facts = {**facts, **self.backbone, "precision": self.accelerator.mixed_precision}
        digest = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16)
        return Path(datasets.config.HF_DATASETS_CACHE) / "features" / digest.hexdigest()

    def _everywhere(self, here: Sequence[bool] | np.ndarray) -> np.ndarray:
        """What holds in every process, of several things (N,): machines need not share a disk."""
        gathered = self.accelerator.gather(torch.tensor(np.asarray(here)[None], device=self.accelerator.device))
        return gathered.all(dim=0).cpu().numpy()

    def _compute(
        self,
        split: Dataset,
        loader: Callable[[Dataset], FinishedBatches],
        keys: np.ndarray,
        known: "_Known",
        views: int,
        stored: "_Stored",
        name: str,
    ) -> None:
        """Writes features (views, N, D) and labels (N,), batch by batch, so that no process holds them all.

        The files get their names when they are whole. If it fails, it leaves nothing.
        """
        missing = np.flatnonzero(~known.mask)
        batches = loader(split if len(missing) == len(split) else split.select(missing)) if len(missing) else None
        if self.accelerator.is_local_main_process:
            stored.features.parent.mkdir(parents=True, exist_ok=True)
            with (
                whole_file(stored.keys) as written_keys,
                whole_file(stored.labels) as written_labels,
                whole_file(stored.features) as written,
            ):
                labels = self._write_features(batches, missing, known, views, written, name)
                for path, values in ((written_labels, labels), (written_keys, keys)):
                    with path.open("wb") as file:  # np.save would add a suffix to a name
                        np.save(file, values)
        else:
            self._write_features(batches, missing, known, views, None, name)
        self.accelerator.wait_for_everyone()

    def _write_features(
        self,
        loader: FinishedBatches | None,
        missing: np.ndarray,
        known: "_Known",
        views: int,
        path: Path | None,
        name: str,
    ) -> np.ndarray:
        """Writes the features of `missing` rows from the loader, and the known ones, to `path` if this process writes.

        Returns labels (N,): 0, or negative for an image that could not be read.
        """
        labels, features = np.zeros(len(known.mask), dtype=np.int64), None
        width = known.width

        def room(width: int) -> np.ndarray:
            return np.lib.format.open_memmap(path, "w+", np.float32, (views, len(labels), width))

        if path is not None and width is not None:
            features = room(width)
            known.copy_to(features[0])
        for view in range(views if loader is not None else 0):
            loader.set_epoch(view)
            doing = f"features of the {name} images" + (f", view {view + 1} of {views}" if views > 1 else "")
            start = 0
            for pooled, own_labels in self._one_pass(loader, doing):
                rows = missing[start : start + len(pooled)]
                if path is not None:
                    if features is None:
                        features = room(pooled.shape[1])
                    features[view, rows] = pooled
                labels[rows] = np.minimum(own_labels, 0)
                start += len(pooled)
            if start != len(missing):
                raise RuntimeError(f"the loader gave {start:,} of {len(missing):,} {name} images")
        if features is not None:
            features.flush()
        return labels

    @torch.no_grad()
    def _one_pass(self, loader: FinishedBatches, doing: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features (B, D) and labels (B,) of the images of all processes, in order."""
        network, accelerator = self.network.eval(), self.accelerator
        bar = tqdm(loader, doing, total=len(loader), leave=False, disable=not accelerator.is_local_main_process)
        for batch in bar:
            images = batch["pixel_values"]
            parts = images.split(_IMAGES_AT_ONCE if images.device.type == "cpu" else len(images))
            with accelerator.autocast():
                pooled = torch.cat([start_features(network, part) for part in parts]).float()
            gathered = accelerator.gather_for_metrics({"features": pooled, "labels": batch["labels"]})
            yield gathered["features"].cpu().numpy(), gathered["labels"].cpu().numpy()


class _Stored:
    """The files of a list of images: features (V, N, D), labels (N,), negative if not read, and keys of images (N,)."""

    def __init__(self, stem: Path):
        self.features, self.labels, self.keys = (
            stem.with_name(stem.name + suffix) for suffix in (".npy", ".labels.npy", ".keys.npy")
        )

    def is_whole(self) -> bool:
        return all(path.is_file() for path in (self.features, self.labels, self.keys))


@dataclass
class _Known:
    """Images whose features other lists have.

    Attributes:
        mask (N,): which.
        places (N, 2): number of the list, and the row in it.
        lists: features (1, M, D) of each list.
    """

    mask: np.ndarray
    places: np.ndarray
    lists: list[np.ndarray]

    @classmethod
    def none(cls, count: int) -> "_Known":
        return cls(np.zeros(count, dtype=bool), np.zeros((count, 2), dtype=np.int64), [])

    @property
    def width(self) -> int | None:
        """D, or None if no image is known."""
        return self.lists[self.places[self.mask][0, 0]].shape[2] if self.mask.any() else None

    def keep(self, mask: np.ndarray) -> None:
        self.mask = self.mask & mask

    def copy_to(self, features: np.ndarray) -> None:
        """Copies what is known to its rows of features (N, D)."""
        for number, own in enumerate(self.lists):
            rows = np.flatnonzero(self.mask & (self.places[:, 0] == number))
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                some = rows[start : start + _ROWS_AT_ONCE]
                features[some] = own[0, self.places[some, 1]]


def _known(folder: Path, keys: np.ndarray) -> _Known:
    """The images with `keys` (N,) that lists in a folder have features of."""
    known = _Known.none(len(keys))
    for path in sorted(folder.glob("*.keys.npy")):
        stored = _Stored(path.with_name(path.name.removesuffix(".keys.npy")))
        if not stored.is_whole() or known.mask.all():
            continue
        theirs, read = np.load(stored.keys), np.load(stored.labels) >= 0
        row_of = {key: row for row, key in enumerate(theirs.tolist()) if read[row]}
        rows = np.array([row_of.get(key, -1) for key in keys.tolist()], dtype=np.int64)
        new = ~known.mask & (rows >= 0)
        known.places[new] = np.stack([np.full(new.sum(), len(known.lists)), rows[new]], axis=1)
        known.mask |= new
        known.lists.append(np.load(stored.features, mmap_mode="r"))
    return known


def start_features(network: RideBfModel, pixel_values: Tensor) -> Tensor:
    """The features (B, D) that all experts have before training, not standardised."""
    if network.trunk.whole:
        return network.pooled_features(pixel_values)
    return network(pixel_values).expert_features[:, 0]


def _facts(config: PreTrainedConfig) -> dict[str, Any]:
    """What a backbone's configuration says about its features, without the place and the version that it came from."""
    left_out = {"_name_or_path", "transformers_version", "dtype"}
    return {name: value for name, value in config.to_dict().items() if name not in left_out}
