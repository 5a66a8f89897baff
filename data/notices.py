"""Notices: what a data set's loading left out or decided, for the user to know."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_SHOWN = 5  # names in a message


class DataNotice(UserWarning):
    """Something about the data that is no error: files that were skipped, images that were held out."""


def notify(message: str) -> None:
    """Issues a `DataNotice`. Commands print it, see `printed_notices`; other programs get a Python warning."""
    # A file name that is not UTF-8 could not be printed.
    warnings.warn(message.encode(errors="backslashreplace").decode(), DataNotice, stacklevel=3)


@contextmanager
def printed_notices(output: Callable[[str], object] = print) -> Iterator[list[str]]:
    """Passes each notice of the block to `output`, once. Yields the list that collects them."""
    collected: list[str] = []
    usual = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None):
        if not issubclass(category, DataNotice):
            usual(message, category, filename, lineno, file, line)
        elif str(message) not in collected:
            collected.append(str(message))
            output(f"note: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", DataNotice)
        warnings.showwarning = show
        yield collected


def some(names: Sequence[str]) -> str:
    """Joins the first few names of a sequence, with the number of the others: "a, b, c and 4 more"."""
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else shown
