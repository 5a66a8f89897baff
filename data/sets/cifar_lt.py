"""CIFAR-10-LT and CIFAR-100-LT. Cao et al., 2019, from Krizhevsky's CIFAR."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.sets._data_set import DataOption, DataSet

if TYPE_CHECKING:
    from datasets import DatasetDict


@dataclass(frozen=True, kw_only=True)
class CifarLT(DataSet):
    """The files that CIFAR's authors distribute, of which a long tail is kept.

    Attributes:
        hub_id, hub_label: of the Hub's copy, and its column of labels.
        folder, archive: where the files are, below the place, unpacked and packed.
        train, test, meta: names of the files.
        label_key, names_key: what the files call the labels and the names of the classes.
        images_per_class: in the whole training set.
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
            help="images of the largest class over those of the smallest; 100 if it is not given",
        ),
        DataOption(
            name="imbalance_type",
            kind=str,
            choices=("exp", "step"),
            help="exp (if it is not given): the classes decay exponentially; step: the second half of them is rare",
        ),
    )

    def load(self, place: str | Path, imbalance_factor: float = 100, imbalance_type: str = "exp") -> "DatasetDict":
        from data.cifar import load_cifar_lt

        return load_cifar_lt(self, Path(place), imbalance_factor, imbalance_type)

    def is_in(self, folder: Path) -> bool:
        return (folder / self.folder).is_dir() or (folder / self.archive).is_file()


DATA_SETS = (
    CifarLT(
        name="cifar10_lt",
        title="CIFAR-10-LT",
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
