"""The data sets by name. Each file of this folder describes one data set, or several similar ones.

To add a data set, add a file with a tuple `DATA_SETS` of `DataSet`s. `load_long_tailed`, the options of the commands,
their `--help` and the errors then know it. A benchmark with annotation lists is a `Benchmark` with the names of its
lists and its published counts, as in `imagenet_lt.py`. For another format, write a subclass of `DataSet` with its own
`load`. `--help` imports these files, so import slow modules inside functions.
"""

import importlib
import pkgutil

from data.sets._data_set import DataOption, DataSet

CUSTOM = "custom"  # your own images
PERCEPTUAL = "perceptual"
# Options of `load_long_tailed` for every data set that is not a stream
SPLIT_OPTIONS = (
    DataOption(
        name="validation_fraction",
        kind=float,
        help="share of the training images to hold out for validation, for a data set without a validation split",
    ),
    DataOption(
        name="group_by",
        kind=str,
        help="what else to keep in one split when images are held out, besides equal images: perceptual, for images "
        "that look alike, or a column of a table, such as patient or camera",
    ),
    DataOption(
        name="exclude",
        kind=str,
        is_path=True,
        help="file with a line for each image to leave out, as check_data writes it",
    ),
)


def read_data_sets() -> dict[str, DataSet]:
    """Reads the data sets of all files in this folder. Raises ValueError if two have the same name."""
    found: dict[str, DataSet] = {}
    for file in pkgutil.iter_modules(__path__):
        if file.name.startswith("_"):
            continue
        for data_set in importlib.import_module(f"{__name__}.{file.name}").DATA_SETS:
            if data_set.name in found:
                raise ValueError(f"two data sets are called {data_set.name!r}; the second is in {file.name}.py")
            found[data_set.name] = data_set
    return found


DATA_SETS: dict[str, DataSet] = read_data_sets()


def get_data_set(name: str) -> DataSet:
    """Returns the data set with this name. Raises ValueError, with the known names, for any other."""
    if name not in DATA_SETS:
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(DATA_SETS)}")
    return DATA_SETS[name]


def data_options() -> dict[str, DataOption]:
    """Returns the options of all data sets, by name."""
    return {option.name: option for data_set in DATA_SETS.values() for option in data_set.options}


def with_option(name: str) -> list[str]:
    """Returns the names of the data sets that have an option."""
    return [data_set.name for data_set in DATA_SETS.values() if name in data_set.option_names]


__all__ = [
    "CUSTOM",
    "DATA_SETS",
    "PERCEPTUAL",
    "SPLIT_OPTIONS",
    "DataOption",
    "DataSet",
    "data_options",
    "get_data_set",
    "read_data_sets",
    "with_option",
]
