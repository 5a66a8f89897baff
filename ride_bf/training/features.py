"""Features of a frozen backbone, computed once and kept on the disk."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from data import FinishedBatches
from data.columns import undecoded
from data.groups import file_facts
from data.splits import class_labels
from data.writing import whole_file
from modeling_ride_bf import RideBfForImageClassification, RideBfModel


@dataclass(frozen=True)
class FeatureRows(TorchDataset):
    """Features of images, in place of the images.

    Attributes:
        features (V, N, D): of V views of each image; on the disk, read as they are needed.
        labels (N,): classes; negative for an image that could not be read.
        rows: the images, to name them.
        drop_broken: leave out images that could not be read, as training does.
    """

    features: np.ndarray
    labels: np.ndarray
    rows: Dataset
    drop_broken: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def paths(self, indices: list[int]) -> list[str]:
        """Returns the paths of images; for an image that is stored in the data set, its number."""
        images = undecoded(self.rows)[indices]["image"]
        return [image["path"] or f"image {index}" for index, image in zip(indices, images, strict=True)]

    def __getitems__(self, draws: list[int]) -> dict[str, Tensor]:
        """A batch: `pixel_values` (B, D) has features. A draw is number * N + row; the number chooses the view."""
        numbers, index = np.divmod(np.asarray(draws), len(self.labels))
        if self.drop_broken:
            read = self.labels[index] >= 0
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

    Files lie in the cache of the `datasets` library. Their names are digests of the backbone, its weights and its
    pooling, of how images are read, and of the images: paths, sizes and times of the files, or the content of images in
    a table.

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
        loaders: Callable[[], FinishedBatches],
        still_broken: Callable[[dict], bool],
        facts: dict[str, Any],
        name: str,
        views: int = 1,
    ) -> FeatureRows:
        """Features of a split, (views, N, D).

        Args:
            split: the images.
            loaders: makes a loader of all images in their order, with negative labels for images that could not be
                read. `set_epoch` chooses the view. It is called only if the features are not on the disk.
            still_broken: whether an image, which could not be read when the features were computed, cannot be read
                now. It reports the image to this run.
            facts: how images are read and varied; part of the digest.
            name: of the split, for the progress bar.
        """
        path = self._path(split, {**facts, "views": views})
        labels_path = path.with_suffix(".labels.npy")
        found = path.is_file() and labels_path.is_file()
        if found:
            broken = np.flatnonzero(np.load(labels_path) < 0)
            found = all([still_broken(row["image"]) for row in undecoded(split).select(broken)])
        if not self._everywhere(found):
            self._compute(loaders(), len(split), views, path, labels_path, name)
        features = np.load(path, mmap_mode="r")
        labels = np.load(labels_path)
        labels = np.where(labels < 0, labels, class_labels(split))
        return FeatureRows(features, labels, split)

    def _path(self, split: Dataset, facts: dict[str, Any]) -> Path:
        digest = hashlib.blake2b(digest_size=16)
        facts = {**facts, **self.backbone, "precision": self.accelerator.mixed_precision}
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        digest.update(file_facts(split).encode())
        return Path(datasets.config.HF_DATASETS_CACHE) / "features" / f"{digest.hexdigest()}.npy"

    def _everywhere(self, here: bool) -> bool:
        """Whether it holds in every process: machines need not share a disk."""
        return bool(self.accelerator.gather(torch.tensor([here], device=self.accelerator.device)).all())

    def _compute(
        self, loader: FinishedBatches, count: int, views: int, path: Path, labels_path: Path, name: str
    ) -> None:
        """Writes features (views, count, D) and labels (count,), batch by batch, so that no process holds them all.

        The files get their names when they are whole. If it fails, it leaves nothing.
        """
        writes = self.accelerator.is_local_main_process
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as written, whole_file(labels_path) as written_labels:
                labels = self._write_features(loader, (views, count), written, name)
                with written_labels.open("wb") as file:  # np.save would add a suffix to a name
                    np.save(file, labels)
        else:
            self._write_features(loader, (views, count), None, name)
        self.accelerator.wait_for_everyone()

    def _write_features(
        self, loader: FinishedBatches, shape: tuple[int, int], path: Path | None, name: str
    ) -> np.ndarray:
        """Writes the features of `shape` (views, count) to `path`, if this process writes. Returns labels (count,)."""
        views, count = shape
        labels, features = np.zeros(count, dtype=np.int64), None
        for view in range(views):
            loader.set_epoch(view)
            doing = f"features of the {name} images" + (f", view {view + 1} of {views}" if views > 1 else "")
            start = 0
            for pooled, own_labels in self._one_pass(loader, doing):
                if path is not None:
                    if features is None:
                        features = np.lib.format.open_memmap(path, "w+", np.float32, (*shape, pooled.shape[1]))
                    features[view, start : start + len(pooled)] = pooled
                labels[start : start + len(pooled)] = own_labels
                start += len(pooled)
            if start != count:
                raise RuntimeError(f"the loader gave {start:,} of {count:,} {name} images")
        if features is not None:
            features.flush()
        return labels

    @torch.no_grad()
    def _one_pass(self, loader: FinishedBatches, doing: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features (B, D) and labels (B,) of the images of all processes, in order."""
        network, accelerator = self.network.eval(), self.accelerator
        bar = tqdm(loader, doing, total=len(loader), leave=False, disable=not accelerator.is_local_main_process)
        for batch in bar:
            with accelerator.autocast():
                pooled = start_features(network, batch["pixel_values"]).float()
            gathered = accelerator.gather_for_metrics({"features": pooled, "labels": batch["labels"]})
            yield gathered["features"].cpu().numpy(), gathered["labels"].cpu().numpy()


def start_features(network: RideBfModel, pixel_values: Tensor) -> Tensor:
    """The features (B, D) that all experts have before training, not standardised."""
    if network.trunk.whole:
        return network.pooled_features(pixel_values)
    return network(pixel_values).expert_features[:, 0]


def _facts(config: PreTrainedConfig) -> dict[str, Any]:
    """What a backbone's configuration says about its features, without the place and the version that it came from."""
    left_out = {"_name_or_path", "transformers_version", "dtype"}
    return {name: value for name, value in config.to_dict().items() if name not in left_out}


def weights_digest(module: nn.Module) -> str:
    """A digest of the parameters and buffers of a module."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
