"""The data sets by name: every file of this folder describes one, or some that are alike.

A file has a tuple `DATA_SETS` of `DataSet`s; that is all it takes for a name to be known to `load_long_tailed`, to the
options of the commands, to their `--help` and to the errors. A benchmark of annotation lists is a `Benchmark` with the
names of its lists and its published counts, as in `imagenet_lt.py`; one in another form is a subclass of `DataSet` with
a `load` of its own. The files are imported to answer `--help`: what takes long to import is imported within functions.
"""

import importlib
import pkgutil

from data.sets._data_set import DataOption, DataSet

CUSTOM = "custom"  # one's own images


def read_data_sets() -> dict[str, DataSet]:
    """The data sets of the files in this folder. Raises ValueError for two of one name."""
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
    """The data set of this name. Raises ValueError, with the names that there are, for another one."""
    if name not in DATA_SETS:
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(DATA_SETS)}")
    return DATA_SETS[name]


def data_options() -> dict[str, DataOption]:
    """The options of all data sets by name."""
    return {option.name: option for data_set in DATA_SETS.values() for option in data_set.options}


def with_option(name: str) -> list[str]:
    """The names of the data sets that have an option."""
    return [data_set.name for data_set in DATA_SETS.values() if name in data_set.option_names]


__all__ = [
    "CUSTOM",
    "DATA_SETS",
    "DataOption",
    "DataSet",
    "data_options",
    "get_data_set",
    "read_data_sets",
    "with_option",
]
