"""`DataSet`: the facts about a data set that are known before it is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetDict

    from data.streams import ImageStream


@dataclass(frozen=True, kw_only=True)
class DataOption:
    """A keyword argument of a data set's `load` that is also an option of the commands.

    Attributes:
        name: of the argument and, after two dashes, of the option.
        kind: bool, int, float or str.
        help: its text in `--help`.
        choices: the allowed values, if they are limited.
        is_path: whether it is the path of a file or folder, which may be another one on another machine.
    """

    name: str
    kind: type
    help: str
    choices: tuple[Any, ...] | None = None
    is_path: bool = False

    @property
    def metavar(self) -> str:
        return "FILE" if self.is_path else "X" if self.kind is float else self.name.rpartition("_")[2].upper()


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A named data set. Subclasses define `load`.

    Attributes:
        name: its name in recipes and commands.
        title: its name for people.
        description: what its images show, in a sentence for model cards; empty if that is not known.
        num_classes: None if the number is not known before the data are read.
        options: arguments of `load` besides the place.
        usual_place: its default folder, relative to the working directory; None if it has no default.
        reads_files: whether it reads files. If it does and has no default folder, `--data_dir` is required.
        has_columns: whether `load` takes `group_column`, a column of a table, and `skip_empty_rows`.
    """

    name: str
    title: str
    num_classes: int | None
    description: str = ""
    options: tuple[DataOption, ...] = ()
    usual_place: str | None = None
    reads_files: bool = True
    has_columns: bool = False

    @property
    def option_names(self) -> list[str]:
        return [option.name for option in self.options]

    def place(self, data_dir: str | Path | None) -> str | Path | None:
        """Returns `data_dir` or the usual place. Raises ValueError if `data_dir` is missing or would do nothing."""
        if data_dir is not None and not self.reads_files:
            raise ValueError(f"{self.name} reads no files: data_dir {str(data_dir)!r} would do nothing; leave it out")
        if data_dir is None and self.usual_place is None and self.reads_files:
            raise ValueError(f"{self.name} needs to know where the images are: --data_dir PLACE")
        return self.usual_place if data_dir is None else data_dir

    def load(self, place: str | Path | None, **options: Any) -> "DatasetDict | dict[str, ImageStream]":
        """Loads the splits, with the columns `image` and `label`. There is always a `train` split."""
        raise NotImplementedError

    def is_in(self, folder: Path) -> bool:
        """Whether a folder contains its files. `data.recognise` asks each data set."""
        return False

    def list_files(self, place: str | Path) -> dict[str, Path]:
        """Returns split -> its annotation list, for data that have lists."""
        return {}

    def find_entry(self, place: str | Path, image: str) -> str | None:
        """Returns where an image is listed, as "FILE, line N", or None if it is not listed."""
        return None
