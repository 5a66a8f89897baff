"""`Benchmark`: a public data set of annotation lists."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.sets._data_set import DataSet

if TYPE_CHECKING:
    from datasets import DatasetDict


MARKER = "synthetic.json"  # data.synthesize leaves it in a folder whose counts are not the published ones


@dataclass(frozen=True, kw_only=True)
class Benchmark(DataSet):
    """A benchmark whose lists, `relative/path.jpg label` a line, lie beside the folders of its images.

    Attributes:
        lists: split -> name of its list. The splits are train, test and, if there is one, validation.
        images: split -> how many images are published of it.
        most, least: training images of the commonest class and of the rarest one, as published.
        other_lists: what to say if the lists are not the published ones.
        class_names: the names that people know, from the names of the folders; None: the folders' names.
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
        return (folder / self.lists["train"]).is_file()  # another list that is missing is then asked for

    def find_entry(self, place: str | Path, image: str) -> str | None:
        from data.annotation_lists import find_line

        return find_line([Path(place) / file for file in self.lists.values()], Path(place), image)
