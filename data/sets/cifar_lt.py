"""CIFAR-10-LT and CIFAR-100-LT: long-tailed subsets of Krizhevsky's CIFAR, after Cao et al., 2019."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from data.sets._data_set import DataOption, DataSet

if TYPE_CHECKING:
    from datasets import DatasetDict


@dataclass(frozen=True, kw_only=True)
class CifarLT(DataSet):
    """A long-tailed subset of CIFAR, from the files that CIFAR's authors distribute.

    Attributes:
        hub_id, hub_label: id of the Hub's copy, and its column of labels. "hf:USER/NAME" as the place names another
            copy, with the images in the same order: the standard subset depends on it.
        folder, archive: names of the unpacked folder and of the archive, inside `data_dir`.
        train, test, meta: names of the files.
        label_key, names_key: keys of the labels and of the class names in the files.
        images_per_class: in the complete training set.
    """

    num_classes: int
    hub_id: str
    hub_label: str
    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    meta: str
    label_key: str
    names_key: str
    images_per_class: int
    usual_place: str | None = "data"
    options: tuple[DataOption, ...] = (
        DataOption(
            name="imbalance_factor",
            kind=float,
            help="images of the largest class divided by those of the smallest: 100 by default; papers also use 10, 50 "
            "and 200",
        ),
        DataOption(
            name="imbalance_type",
            kind=str,
            choices=("exp", "step"),
            help="exp (default): class sizes decay exponentially; step: the second half of the classes is rare",
        ),
    )

    def load(self, place: str | Path, imbalance_factor: float = 100, imbalance_type: str = "exp") -> "DatasetDict":
        from data.cifar import load_cifar_lt, load_hub_copy, long_tailed_counts
        from data.hub_ids import hub_id_of

        if (hub_id := hub_id_of(place)) is not None:
            counts = long_tailed_counts(self.num_classes, self.images_per_class, imbalance_factor, imbalance_type)
            return load_hub_copy(replace(self, hub_id=hub_id), counts)
        return load_cifar_lt(self, Path(place), imbalance_factor, imbalance_type)

    def is_in(self, folder: Path) -> bool:
        return (folder / self.folder).is_dir() or (folder / self.archive).is_file()


DATA_SETS = (
    CifarLT(
        name="cifar10_lt",
        title="CIFAR-10-LT",
        description="Photographs of 32 x 32 pixels, each of one animal or vehicle.",
        num_classes=10,
        hub_id="uoft-cs/cifar10",
        hub_label="label",
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        label_key="labels",
        names_key="label_names",
        images_per_class=5000,
    ),
    CifarLT(
        name="cifar100_lt",
        title="CIFAR-100-LT",
        description="Photographs of 32 x 32 pixels, each of one animal, plant, object or scene.",
        num_classes=100,
        hub_id="uoft-cs/cifar100",
        hub_label="fine_label",
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        train=("train",),
        test="test",
        meta="meta",
        label_key="fine_labels",
        names_key="fine_label_names",
        images_per_class=500,
    ),
)
