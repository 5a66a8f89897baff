"""Your own images: lists, folders, a table, tar archives, or a data set on the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.sets._data_set import DataOption, DataSet

if TYPE_CHECKING:
    from datasets import DatasetDict

    from data.streams import ImageStream


@dataclass(frozen=True, kw_only=True)
class OwnImages(DataSet):
    """Images in a format that `data.split_names.EXPECTED` lists or, with `streaming`, `data.streams.EXPECTED`."""

    def place(self, data_dir: str | Path | None) -> str | Path:
        if data_dir is None:
            raise ValueError("your own images need --data_dir: a folder, a table or the id of a data set on the Hub")
        return data_dir

    def load(
        self, place: str | Path, *, streaming: bool = False, **options: Any
    ) -> "DatasetDict | dict[str, ImageStream]":
        if not streaming:
            from data.custom import load_custom

            return load_custom(place, **options)
        from data.hub_ids import hub_id_of
        from data.streams import load_streams

        columns = {name: options.pop(name, None) for name in ("image_column", "label_column", "skip_empty_rows")}
        if given := [f"--{name}" for name, value in options.items() if value]:
            raise ValueError(f"{', '.join(given)} cannot act with --streaming; leave it out")
        return load_streams(hub_id_of(place) or place, **columns)

    def list_files(self, place: str | Path) -> dict[str, Path]:
        from data.split_names import split_files

        files = split_files(Path(place), ".txt") if Path(place).is_dir() else {}
        return files if "train" in files else {}

    def find_entry(self, place: str | Path, image: str) -> str | None:
        from data.annotation_lists import find_line

        return find_line(list(self.list_files(place).values()), Path(place), image)


DATA_SETS = (
    OwnImages(
        name="custom",
        title="a data set of its own",
        num_classes=None,
        has_columns=True,
        options=(
            DataOption(
                name="image_column",
                kind=str,
                help="column of the images in a table or a data set on the Hub; image by default",
            ),
            DataOption(
                name="label_column",
                kind=str,
                help="column of the labels in a table or a data set on the Hub; label by default",
            ),
            DataOption(
                name="lists",
                kind=str,
                is_path=True,
                help="folder of lists train.txt, val.txt and test.txt, if they are not in --data_dir with the images",
            ),
            DataOption(
                name="allow_empty_classes",
                kind=bool,
                help="leave out classes whose folders have no images, instead of stopping",
            ),
            DataOption(
                name="streaming",
                kind=bool,
                help="read tar archives, or a data set on the Hub, image by image, and never store them",
            ),
        ),
    ),
)
