"""Digits-LT: scikit-learn's handwritten digits with a long tail."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.sets._data_set import DataSet

if TYPE_CHECKING:
    from datasets import DatasetDict


@dataclass(frozen=True, kw_only=True)
class DigitsLT(DataSet):
    """The images come with scikit-learn, so the data set has no folder."""

    def load(self, place: None = None) -> "DatasetDict":
        from data.digits import load_digits_lt

        return load_digits_lt()


DATA_SETS = (
    DigitsLT(
        name="digits_lt",
        title="Digits-LT",
        description="Handwritten digits, scanned and reduced to 8 x 8 pixels, from scikit-learn's `load_digits`.",
        num_classes=10,
        reads_files=False,
    ),
)
