"""`Benchmark`: a public data set with annotation lists."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.sets._data_set import DataSet

if TYPE_CHECKING:
    from datasets import DatasetDict


MARKER = "synthetic.json"  # data.synthesize writes it, because the counts of its data are not the published ones


@dataclass(frozen=True, kw_only=True)
class Benchmark(DataSet):
    """A benchmark whose lists are next to the folders of its images. A list has lines `relative/path.jpg label`.

    Attributes:
        lists: split -> name of its list. The splits are train, test and, if there is one, validation.
        images: split -> published number of images.
        most, least: published number of training images of the largest and of the smallest class.
        other_lists: a hint for the error message if the lists are not the published ones.
        class_names: turns the names of the folders into readable class names; None: use the names of the folders.
    """

    num_classes: int
    lists: dict[str, str]
    images: dict[str, int]
    most: int
    least: int
    other_lists: str = ""
    class_names: Callable[[Sequence[str]], list[str]] | None = None

    def load(self, place: str | Path) -> "DatasetDict":
        from data.annotation_lists import load_benchmark

        return load_benchmark(self, Path(place))

    def is_in(self, folder: Path) -> bool:
        return (folder / self.lists["train"]).is_file()  # `load` reports the other lists if they are missing

    def find_entry(self, place: str | Path, image: str) -> str | None:
        from data.annotation_lists import find_line

        return find_line([Path(place) / file for file in self.lists.values()], Path(place), image)
