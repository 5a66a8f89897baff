"""A builder for `datasets` that reads tar archives in WebDataset's format, with labels as text."""

from datasets.packaged_modules.webdataset.webdataset import WebDataset

LABEL_COUNTS = "label_counts.json"  # of archives, beside them, so that a stream need not be read to count its labels


def _text(content: bytes) -> str | None:
    return content.decode("utf-8").strip() or None


class TarArchives(WebDataset):
    """`datasets` reads the file .cls of an image as a number. Then 010 becomes 10, and a name is an error."""

    DECODERS = {**WebDataset.DECODERS, "cls": _text}  # noqa: RUF012  the library's class has such a table
