"""`DataSet`: what is known of a data set before any of it is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetDict

    from data.streams import ImageStream


@dataclass(frozen=True, kw_only=True)
class DataOption:
    """A keyword of a data set's `load`, which is also an option of the commands.

    Attributes:
        name: of the keyword, and with two dashes before it, of the option.
        kind: bool, int, float or str.
        help: what `--help` says.
        choices: the values that there are, if they are few.
    """

    name: str
    kind: type
    help: str
    choices: tuple[Any, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set by name. Subclasses define `load`.

    Attributes:
        name: as recipes and commands have it.
        title: as people write it.
        num_classes: None if that is only known once the data are read.
        options: what `load` takes beside the place.
        usual_place: where it is, relative to the working directory, if no other place is named; None if there is no
            such place.
        reads_files: whether it is at a place at all. If so and there is no usual one, a place must be named.
    """

    name: str
    title: str
    num_classes: int | None
    options: tuple[DataOption, ...] = ()
    usual_place: str | None = None
    reads_files: bool = True

    @property
    def option_names(self) -> list[str]:
        return [option.name for option in self.options]

    def place(self, data_dir: str | Path | None) -> str | Path | None:
        """Where it is: `data_dir`, or its usual place. Raises ValueError if that cannot be, or is not known."""
        if data_dir is not None and not self.reads_files:
            raise ValueError(f"{self.name} reads no files: data_dir {str(data_dir)!r} would do nothing; leave it out")
        if data_dir is None and self.usual_place is None and self.reads_files:
            raise ValueError(f"{self.name} needs to know where the images are: --data_dir PLACE")
        return self.usual_place if data_dir is None else data_dir

    def load(self, place: str | Path | None, **options: Any) -> "DatasetDict | dict[str, ImageStream]":
        """The splits, with the columns `image` and `label`; `train` is always among them."""
        raise NotImplementedError

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds its files; that is how `data.recognise` finds it."""
        return False

    def find_entry(self, place: str | Path, image: str) -> str | None:
        """Where the path of an image is listed, as "FILE, line N"; None if it is not, or there are no lists."""
        return None
