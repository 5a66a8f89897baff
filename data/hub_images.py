"""Benchmarks whose images are in a data set on the Hub: its rows are mapped to the annotation lists by file name."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Image, concatenate_datasets
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from data.annotation_lists import read_annotation_list, read_benchmark
from data.columns import arrow_column, image_field
from data.hub_ids import HUB_PREFIX
from data.hub_loading import load_from_hub, why_not
from data.notices import notify, some
from data.rows import Rows
from data.sets._benchmark import Benchmark

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
MISSING, SEVERAL = -1, -2
_SUFFIX = r"(?i)\.(jpe?g|png|webp|bmp|gif|tiff?)$"


def load_hub_benchmark(benchmark: Benchmark, hub_id: str) -> DatasetDict:
    """Loads the splits that a benchmark's lists define, with the images that a data set on the Hub stores.

    The lists are read first, because the images may take hours to download. The rows are those of the Hub, in the order
    of the lists: nothing is decoded or copied. Raises FileNotFoundError, with their number and the first of them, if
    listed images are not found exactly once, and the errors of `find_lists`, `load_from_hub` and
    `data.annotation_lists.read_benchmark`.
    """
    named = read_benchmark(benchmark, find_lists(benchmark, hub_id))
    for notice in named.notices:
        notify(notice)
    listed = {split: file_names(rows.paths) for split, rows in named.splits.items()}
    stored = _join_splits(load_from_hub(hub_id), hub_id)
    places = _find_all(benchmark, hub_id, named.splits, pa.concat_arrays(list(listed.values())), stored)
    labels = np.full(len(stored), -1)
    labels[places] = np.concatenate([rows.labels for rows in named.splits.values()])
    # The label of every stored row is added before rows are selected: afterwards the images would be copied.
    stored = stored.select_columns(["image"]).add_column("label", labels, feature=ClassLabel(names=named.names))
    ends = np.cumsum([len(names) for names in listed.values()])[:-1]
    return DatasetDict({split: stored.select(rows) for split, rows in zip(listed, np.split(places, ends), strict=True)})


def find_lists(benchmark: Benchmark, hub_id: str) -> dict[str, Path]:
    """Returns split -> its list: in the benchmark's usual folder, or else in the Hub's repository of the images.

    Raises FileNotFoundError if lists are in neither, and ValueError if the repository is gated.
    """
    folder = Path(benchmark.usual_place or ".")
    if benchmark.is_in(folder):
        lists = {split: folder / file for split, file in benchmark.lists.items()}
        if missing := [str(path) for path in lists.values() if not path.is_file()]:
            raise FileNotFoundError(f"{benchmark.name} needs the lists {', '.join(missing)} too; put them there")
        return lists
    lists = {}
    for split, file in benchmark.lists.items():
        try:
            lists[split] = Path(hf_hub_download(hub_id, file, repo_type="dataset"))
        except (EntryNotFoundError, ConnectionError) as error:
            offline = isinstance(error, LocalEntryNotFoundError | ConnectionError)
            why = "cannot be reached and is not in the cache" if offline else "does not have it"
            raise FileNotFoundError(
                f"{benchmark.name} needs the list {file}, which is not in {folder}, and the repository {hub_id} {why}; "
                f"put the lists {', '.join(benchmark.lists.values())} into {folder}. The images need not be there"
            ) from error
        except HfHubHTTPError as error:  # it is gated, private, or does not exist
            raise ValueError(why_not(hub_id, error)) from error
    return lists


def find_listed(benchmark: Benchmark, lists: Iterable[Path], image: str) -> str | None:
    """Returns where an image is listed, as "FILE, line N", by the name that it has on the Hub."""
    stored = file_names(pa.array([image]), benchmark.hub_ending)
    for path in lists:
        rows = read_annotation_list(path)
        lines = np.flatnonzero(match_names(file_names(rows.paths), stored) == 0)
        if len(lines) == 1:
            return rows.where(int(lines[0]))
    return None


def _join_splits(loaded: DatasetDict, hub_id: str) -> Dataset:
    """Returns the rows of all splits: the image, called "image", and all columns of text.

    Lists need not respect the Hub's splits: the validation images of ImageNet-LT are training images of ImageNet.
    """
    features = next(iter(loaded.values())).features
    typed = [name for name, feature in features.items() if isinstance(feature, Image)]
    column = next((name for name in IMAGE_COLUMNS if name in (typed or features)), typed[0] if typed else None)
    if column is None:
        raise ValueError(f"{hub_id} has no column of images, only {list(features)}; expected one of {IMAGE_COLUMNS}")
    splits = []
    for name, rows in loaded.items():
        if column not in rows.features:
            raise ValueError(f"{hub_id}, split {name} has no column {column!r}, only {list(rows.features)}")
        text = [other for other in _text_columns(rows) if other in features and other not in (column, "image")]
        rows = rows.select_columns([column, *text])
        rows = rows if column == "image" else rows.rename_column(column, "image")
        splits.append(rows if isinstance(rows.features["image"], Image) else rows.cast_column("image", Image()))
    return concatenate_datasets(splits)


def _text_columns(rows: Dataset) -> list[str]:
    kinds = ("string", "large_string")
    return [name for name, feature in rows.features.items() if getattr(feature, "dtype", None) in kinds]


def _find_all(
    benchmark: Benchmark, hub_id: str, splits: dict[str, Rows], listed: pa.Array, stored: Dataset
) -> np.ndarray:
    """Returns the row of each listed image (N,), by the first source of names that has them all."""
    sources = {"the images' own paths": image_field(stored, "path")}
    sources |= {f"column {name!r}": arrow_column(stored, name) for name in _text_columns(stored)}
    best, of_best, example = None, "", ""
    for source, column in sources.items():
        names = pc.fill_null(column.cast(pa.string()).combine_chunks(), "")
        found = match_names(listed, file_names(names, benchmark.hub_ending))
        if (found >= 0).all():
            return found
        if best is None or (found >= 0).sum() > (best >= 0).sum():
            best, of_best = found, source
            example = next((name for name in names[:1].to_pylist() if name), "nothing")
    problems = []
    places = [(rows, index) for rows in splits.values() for index in range(len(rows.labels))]
    for code, what in ((MISSING, "are not in it"), (SEVERAL, "are not found exactly once, because names repeat")):
        if (wrong := np.flatnonzero(best == code)).size:
            shown = [f"{rows.paths[at].as_py()} ({rows.where(at)})" for rows, at in (places[index] for index in wrong)]
            problems.append(f"{wrong.size:,} of {len(best):,} listed images {what}, the first: {some(shown)}")
    raise FileNotFoundError(
        f"{HUB_PREFIX}{hub_id}: {'; '.join(problems)}. The best source of names is {of_best}, of {', '.join(sources)}; "
        f"its first name is {example!r}. Does this data set have all images of {benchmark.title}, under the names of "
        "the lists? Otherwise download the images, and name their folder with --data_dir"
    )


def file_names(paths: pa.Array, ending: str | None = None) -> pa.Array:
    """Returns paths (N,) as they are compared: with slashes, and without "./" at the start and suffix at the end.

    `ending` is a regular expression of what is removed after the suffix.

    Copies store images under other suffixes or without any, and the one of ImageNet adds the class to the name:
    n01440764_762_n01440764.JPEG.
    """
    plain = pc.replace_substring_regex(pc.replace_substring(paths, "\\", "/"), r"^(\.?/+)+", "")
    plain = pc.replace_substring_regex(plain, _SUFFIX, "")
    return plain if ending is None else pc.replace_substring_regex(plain, f"(?:{ending})$", "")


def match_names(listed: pa.Array, stored: pa.Array) -> np.ndarray:
    """Returns the index in `stored` for each of `listed` (N,), both from `file_names`; or MISSING or SEVERAL.

    Equal paths match. So do paths of which one ends in the other, as "airfield/1" in "train/a/airfield/1". Where
    folders differ, equal base names match, provided that no two listed images share one: those of ImageNet and
    iNaturalist are unique, and those of Places are not. SEVERAL also marks listed images that match one stored image.
    """
    found = _lookup(listed, stored)
    of_listed, of_stored = _depth(listed), _depth(stored)
    for depth in np.unique(np.concatenate([of_listed, of_stored]))[::-1].tolist():
        if (found != MISSING).all():
            break
        here, there = _last(listed, depth), _last(stored, depth)
        for pair in (
            (_only(here, of_listed == depth), _only(there, of_stored > depth)),
            (_only(here, of_listed > depth), _only(there, of_stored == depth)),
        ):
            found = np.where(found == MISSING, _lookup(*pair), found)
    bases = _last(listed, 1)
    if (found == MISSING).any() and len(pc.unique(bases)) == len(bases):
        found = np.where(found == MISSING, _lookup(bases, _last(stored, 1)), found)
    matched, counts = np.unique(found[found >= 0], return_counts=True)
    found[np.isin(found, matched[counts > 1])] = SEVERAL
    return found


def _lookup(listed: pa.Array, stored: pa.Array) -> np.ndarray:
    """Returns the index of each equal stored name, MISSING or SEVERAL. Nulls equal nothing."""
    counted = pc.value_counts(stored)
    repeated = counted.field("values").filter(pc.greater(counted.field("counts"), 1))
    found = pc.fill_null(pc.index_in(listed, value_set=stored, skip_nulls=True), MISSING).to_numpy().astype(np.int64)
    found[pc.is_in(listed, value_set=repeated, skip_nulls=True).to_numpy(zero_copy_only=False)] = SEVERAL
    return found


def _depth(names: pa.Array) -> np.ndarray:
    return pc.count_substring(names, "/").to_numpy() + 1


def _last(names: pa.Array, depth: int) -> pa.Array:
    """Returns the last `depth` parts of each path (N,)."""
    return pc.replace_substring_regex(names, rf"^.*/((?:[^/]*/){{{depth - 1}}}[^/]*)$", r"\1")


def _only(names: pa.Array, chosen: np.ndarray) -> pa.Array:
    return pc.if_else(pa.array(chosen), names, pa.scalar(None, pa.string()))
