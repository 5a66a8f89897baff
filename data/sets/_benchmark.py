"""`Benchmark`: a public data set with annotation lists."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data.sets._data_set import DataSet

if TYPE_CHECKING:
    from datasets import DatasetDict


MARKER = "synthetic.json"  # data.synthesize writes it, because the counts of its data are not the published ones


@dataclass(frozen=True, kw_only=True)
class Benchmark(DataSet):
    """A benchmark with annotation lists, whose lines are `relative/path.jpg label`.

    The lists are next to the folders of the images. With "hf:USER/NAME" for the place, the images are in a data set on
    the Hub, see `data.hub_images`.

    Attributes:
        lists: split -> name of its list. The splits are train, test and, if there is one, validation.
        images: split -> published number of images.
        most, least: published number of training images of the largest and of the smallest class.
        other_lists: a hint for the error message if the lists are not the published ones.
        known_lists: split -> digest of its public list, see `data.annotation_lists.list_digest`, for those that we had.
        hub_ending: regular expression of what copies on the Hub append to an image's name, before the suffix.
        class_names: turns the names of the folders into readable class names; None: use the names of the folders.
    """

    num_classes: int
    lists: dict[str, str]
    images: dict[str, int]
    most: int
    least: int
    other_lists: str = ""
    known_lists: Mapping[str, str] = field(default_factory=dict)
    hub_ending: str | None = None
    class_names: Callable[[Sequence[str]], list[str]] | None = None

    def load(self, place: str | Path) -> "DatasetDict":
        from data.annotation_lists import load_benchmark
        from data.hub_ids import hub_id_of

        if (hub_id := hub_id_of(place)) is None:
            return load_benchmark(self, Path(place))
        from data.hub_images import load_hub_benchmark

        return load_hub_benchmark(self, hub_id)

    def is_in(self, folder: Path) -> bool:
        return (folder / self.lists["train"]).is_file()  # `load` reports the other lists if they are missing

    def list_files(self, place: str | Path) -> dict[str, Path]:
        from data.hub_ids import hub_id_of

        if (hub_id := hub_id_of(place)) is None:
            return {split: Path(place) / file for split, file in self.lists.items()}
        from data.hub_images import find_lists

        return find_lists(self, hub_id)

    def find_entry(self, place: str | Path, image: str) -> str | None:
        from data.annotation_lists import find_line
        from data.hub_ids import hub_id_of

        lists = self.list_files(place).values()
        if hub_id_of(place) is None:
            return find_line(list(lists), Path(place), image)
        from data.hub_images import find_listed

        return find_listed(self, lists, image)
