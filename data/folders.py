"""Class folders: images in `CLASS/`, below a folder for each split or at the top."""

import hashlib
import os
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from data.formats import image_suffixes
from data.notices import notify, some
from data.rows import NamedRows, Rows, check_labels, check_utf8, class_codes, load_rows
from data.split_names import EXPECTED, folders_of_splits, split_in_name, split_of

# A folder with such a file was written by one of our commands, as an --output_dir: its pictures are no data.
_WRITTEN = {"check_data.json", "run.json", "checkpoint.json"}


@dataclass
class _Links:
    """Links to folders outside the data set, which are followed, of all splits.

    Attributes:
        to: real path of a folder -> the link to it.
        around: real path of every folder around these -> one of the links.
    """

    to: dict[str, str] = field(default_factory=dict)
    around: dict[str, str] = field(default_factory=dict)

    def overlapping(self, real: str) -> str | None:
        """Returns a link to images that are in or below the folder `real`, or to a folder that it is in."""
        return next((self.to[folder] for folder in (real, *_parents(real)) if folder in self.to), self.around.get(real))

    def add(self, real: str, link: str) -> None:
        self.to[real] = link
        for folder in _parents(real):
            self.around.setdefault(folder, link)


@dataclass
class _Found:
    """What a folder of classes holds.

    Attributes:
        images: paths relative to the data set's folder, sorted by folder and name.
        classes: names of all folders of classes, also of those without images.
        skipped: suffix of a file that is no image -> number of such files, with an example.
        hidden: hidden files and folders, whose names start with a dot.
        beside: images that lie beside the folders of the classes and so have no class.
        links: links to folders that are followed.
        linked_files: images that are links to files.
        merged: folders with images below the folder of a class.
        written: output folders of our commands.
    """

    images: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    links: _Links = field(default_factory=_Links)
    linked_files: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    def hide(self, entry: os.DirEntry, name: str) -> None:
        if _is_image(entry.name) or (entry.is_dir() and count_images(entry.path)):
            self.hidden.append(name)

    def skip(self, name: str) -> None:
        suffix = os.path.splitext(name)[1].lower() or "without suffix"
        self.skipped[suffix] += 1
        self.example.setdefault(suffix, name)


def load_folders(place: Path, allow_empty_classes: bool = False) -> DatasetDict:
    """Loads the images of class folders. Every file that is not read is counted in a `data.notices.DataNotice`.

    Raises ValueError for a folder of a class without images, unless `allow_empty_classes`; for folders beside those of
    the splits; for two folders of one split; for links to a folder that is part of the data set already; and for names
    that are not UTF-8. Raises PermissionError for a folder that cannot be read.
    """
    splits = folders_of_splits(place)
    if splits:
        _refuse_folders_beside(place, splits)
    else:
        _refuse_hidden_splits(place)
    tops = {split: f"{name}/" for split, name in splits.items()} or {"train": ""}
    links = _Links()
    found = {split: _scan(place, top, links) for split, top in tops.items()}
    names = sorted({path[len(tops["train"]) :].split("/")[0] for path in found["train"].images})
    _check_and_tell(place, tops, found, names, allow_empty_classes)

    def read() -> NamedRows:
        rows = {}
        for split, of_split in found.items():
            top = place / tops[split]
            classes = pa.array([path[len(tops[split]) :].split("/")[0] for path in of_split.images], pa.string())
            rows[split] = Rows(pa.array(of_split.images, pa.string()), class_codes(classes, names, top), top)
        check_labels(rows, len(names))
        return NamedRows(rows, names)

    # The tables are built from the files' names. A hash of the names shows whether they have changed.
    digest = hashlib.blake2b(digest_size=16)
    for split, of_split in found.items():
        digest.update("\0".join([split, *of_split.images, ""]).encode())
    return load_rows("custom", place, [], read, key=digest.hexdigest())


def _refuse_folders_beside(place: Path, splits: dict[str, str]) -> None:
    """Raises ValueError for folders with images beside the folders of the splits: their images would vanish."""
    beside = []
    for entry in _entries(place):
        if entry.name in splits.values() or _is_hidden(entry) or not entry.is_dir():
            continue
        if images := count_images(entry.path):
            beside.append(f"{entry.name}/ ({images:,} images)")
    if beside:
        known = ", ".join(f"{name}/" for name in splits.values())
        raise ValueError(
            f"{place} has folders of images beside {known}, which are no split: {some(beside)}. Move them into one of "
            f"the splits or out of {place}. If {known} are classes themselves, move all folders into {place}/train/"
        )
    if "train" not in splits:
        raise ValueError(f"{place} has {', '.join(sorted(splits.values()))} but no folder train; {EXPECTED}")


def _refuse_hidden_splits(place: Path) -> None:
    """Raises ValueError for splits that would be pooled, as DIR/CLASS/train/, or be classes, as DIR/test_images/."""
    tops = [entry for entry in _entries(place) if entry.is_dir() and not _is_hidden(entry)]
    like = {entry.name: found for entry in tops if (found := split_in_name(entry.name))[0] is not None}
    like = {name: found for name, found in like.items() if count_images(place / name)}
    known = {split for split, _ in like.values()}
    if len(known) > 1 or any(certain for _, certain in like.values()):
        name, (split, _) = next(iter(like.items()))
        raise ValueError(
            f"{place} has folders with the names of splits, {some([f'{name}/' for name in like])}, and no folder "
            f"train. They would be classes. Rename them to the splits' names alone, for example {name}/ to {split}/"
        )
    for top in tops:
        below = [entry for entry in _entries(top.path) if entry.is_dir() and not _is_hidden(entry)]
        named = {entry.name: split for entry in below if (split := split_of(entry.name)) is not None}
        # A class vehicle/ may well have a folder train/ beside bus/ and car/.
        if not named or (len(set(named.values())) == 1 and len(named) < len(below)):
            continue
        named = [name for name in named if count_images(f"{top.path}/{name}")]
        if not named:
            continue
        if has_class_folders(f"{top.path}/{named[0]}"):
            remedy = f"Name the folder of the splits: --data_dir {top.path}"
        else:
            remedy = f"Move the images to {place}/{named[0]}/{top.name}/ and so on, or rename the folders"
        raise ValueError(
            f"{place} has splits inside of the folder {top.name}/, which would be a class: "
            f"{some([f'{top.name}/{name}/' for name in named])}. {remedy}"
        )


def has_class_folders(folder: str | Path) -> bool:
    """Whether a folder has folders with images."""
    return any(entry.is_dir() and not _is_hidden(entry) and count_images(entry.path) for entry in _entries(folder))


def load_unlabelled(folder: Path) -> Dataset:
    """The images in and below a folder, with the columns of a split; the label of all is 0, which means nothing.

    Hidden files and folders are left out, and other files counted in a notice. Raises ValueError if there are no
    images.
    """
    if not folder.is_dir():
        raise ValueError(f"--unknown_dir {folder} is not a folder; name one with images")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    images = [str(path) for path in paths if _is_image(path.name)]
    if not images:
        raise ValueError(f"--unknown_dir {folder} has no images; it has {len(paths):,} other files")
    others = [str(path.relative_to(folder)) for path in paths if not _is_image(path.name)]
    if others:
        notify(f"files in {folder} that are no images are left out: {some(others)}")
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["unknown"])})
    columns = {"image": [{"path": path, "bytes": None} for path in images], "label": [0] * len(images)}
    return Dataset.from_dict(columns, features=features)


def count_images(folder: str | Path) -> int:
    """Returns the number of images in and below a folder, without the output folders of our commands.

    A notice names such folders.
    """
    found, passed_over = 0, []
    for inner, below, files in os.walk(folder):
        if _WRITTEN.isdisjoint(files):
            found += sum(map(_is_image, files))
        else:
            passed_over.append(inner)
            below.clear()
    if passed_over:
        notify(f"output folders of earlier commands are skipped: {some(passed_over)}")
    return found


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_suffixes()


def _scan(place: Path, top: str, links: _Links) -> _Found:
    """Finds the images below `place/top`CLASS/, at any depth. `links` are those of all splits."""
    found = _Found(links=links)
    root = os.path.realpath(place)
    if top and (place / top).is_symlink():
        _check_link(top.rstrip("/"), os.path.realpath(place / top), root, (root,), found)
    for entry in _entries(place / top if top else place):
        name = f"{top}{entry.name}"
        if _is_hidden(entry):
            found.hide(entry, name)
        elif _is_folder(entry):
            check_utf8(f"{place}/{name}", "the folder")
            before = len(found.images), len(found.written)
            _scan_class(entry, name, root, (os.path.realpath(place / top),), found)
            # A folder with nothing but our output, such as outputs/, is no class.
            if len(found.images) > before[0] or len(found.written) == before[1]:
                found.classes.append(entry.name)
        elif _is_image(entry.name):
            found.beside.append(name)
        else:
            found.skip(name)
    return found


def _files_in(place: Path) -> _Found:
    """Finds the files that are in a folder itself, none of which is read."""
    found = _Found()
    for entry in _entries(place):
        if _is_hidden(entry):
            found.hide(entry, entry.name)
        elif _is_image(entry.name):
            found.beside.append(entry.name)
        elif not entry.is_dir():
            found.skip(entry.name)
    return found


def _scan_class(folder: os.DirEntry, relative: str, root: str, above: tuple[str, ...], found: _Found) -> None:
    """Adds the images in and below a folder. `above` are the real paths of the folders that it is in."""
    real = os.path.join(above[-1], folder.name)
    if folder.is_symlink():
        real = os.path.realpath(folder.path)
        _check_link(relative, real, root, above, found)
    inner, entries = [], _entries(folder.path)
    if not _WRITTEN.isdisjoint(entry.name for entry in entries):
        found.written.append(f"{relative}/")
        return
    is_merged = len(above) > 1
    for entry in entries:
        name = f"{relative}/{entry.name}"
        if _is_hidden(entry):
            found.hide(entry, name)
        elif _is_folder(entry):
            inner.append((entry, name))
        elif _is_image(entry.name) and entry.is_file():
            check_utf8(f"{root}/{name}", "the file")
            found.images.append(name)
            if is_merged:
                found.merged.append(f"{relative}/")
                is_merged = False  # a folder is named once
            if entry.is_symlink():
                found.linked_files.append(name)
        else:
            found.skip(name)
    for entry, name in inner:
        _scan_class(entry, name, root, (*above, real), found)


def _check_link(relative: str, real: str, root: str, above: tuple[str, ...], found: _Found) -> None:
    """Raises ValueError for a link to a folder that is read already: its images would be there twice."""
    again = found.links.overlapping(real)
    if any(_is_in(folder, real) for folder in (root, *above)):
        what = "in which it lies itself"
    elif _is_in(real, root):
        what = "which is part of the data set"
    elif again is not None:
        what = f"which has images of the link {again} too"
    else:
        found.links.add(real, relative)
        return
    raise ValueError(
        f"{root}/{relative} is a link to the folder {real}, {what}: its images would be there twice. Remove the link"
    )


def _is_in(path: str, folder: str) -> bool:
    """Whether a real path is a folder or is below it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _parents(path: str) -> list[str]:
    return [str(parent) for parent in Path(path).parents]


def _is_hidden(entry: os.DirEntry) -> bool:
    return entry.name.startswith(".")


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one. Raises ValueError for a link that leads nowhere."""
    if entry.is_symlink() and not os.path.exists(entry.path):
        raise ValueError(
            f"{entry.path} is a link to {os.readlink(entry.path)}, which is not there; restore it or remove the link"
        )
    return entry.is_dir()


def _entries(folder: str | Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise PermissionError(f"{folder} cannot be read ({error.strerror}); remedy: chmod -R u+rX {folder}") from error


def _check_and_tell(
    place: Path, tops: dict[str, str], found: dict[str, _Found], names: list[str], allow_empty: bool
) -> None:
    """Raises ValueError for classes without training images. Issues a notice for everything that is not read."""
    found = dict(found)
    if all(tops.values()):
        found["beside the splits"] = _files_in(place)
    skipped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for of_split in found.values():
        skipped.update(of_split.skipped)
        examples |= of_split.example
    others = some([f"{count:,} {suffix} (such as {examples[suffix]})" for suffix, count in skipped.most_common()])
    if not names and ".tar" in skipped:
        raise ValueError(
            f"{place} has tar archives, such as {examples['.tar']}, and no folders of images; train on "
            "archives with --streaming, or unpack them for this command"
        )
    if not names and (beside := found["train"].beside):
        remedy = f"If it is the folder of one class, name the folder above: --data_dir {Path(place).absolute().parent}"
        if tops["train"]:
            remedy = f"Sort them into {place}/{tops['train']}CLASS/"
        raise ValueError(
            f"{place} has no folders of images, but {len(beside):,} image(s) without a class, such as {beside[0]}. "
            f"{remedy}; {EXPECTED}"
        )
    if not names:
        hint = f", only files of other kinds: {others}" if skipped else ""
        raise ValueError(f"{place} has no folders of images{hint}; {EXPECTED}")
    for split, top in tops.items():
        if split != "train" and not found[split].images:
            what = "images but no class folders" if found[split].beside else "no images in class folders"
            raise ValueError(
                f"{place}/{top.rstrip('/')} has {what}: sort its images into {place}/{top}CLASS/, or move {top} out of "
                f"{place}"
            )
    empty = {split: _empty_classes(found[split], top) for split, top in tops.items()}
    if empty["train"] and not allow_empty:
        hint = f" These files are no images of a known format: {others}." if skipped else ""
        raise ValueError(
            f"{place} has class folders without images: {some(empty['train'])}.{hint} Add images, remove the folders, "
            "or leave these classes out with --allow_empty_classes"
        )
    if len(names) == 1:
        raise ValueError(_why_one_class(place, f"{tops['train']}{names[0]}", names[0]))
    for what, listed in (
        ("classes without images are left out", empty.pop("train")),
        ("class folders without images", list(chain(*empty.values()))),
        ("images outside the class folders are skipped", list(chain(*(of.beside for of in found.values())))),
        ("hidden images and folders are skipped", list(chain(*(of.hidden for of in found.values())))),
        (
            "links to folders elsewhere are followed",
            [f"{link} -> {real}" for real, link in found["train"].links.to.items()],
        ),
        ("output folders of earlier commands are skipped", list(chain(*(of.written for of in found.values())))),
        ("images in folders below a class folder have its class", list(chain(*(of.merged for of in found.values())))),
        ("images that are links are read", list(chain(*(of.linked_files for of in found.values())))),
    ):
        if listed:
            notify(f"{place}: {what}: {some(listed)}")
    if skipped:
        notify(f"{place}: files that are no images of a known format are skipped: {others}")


def _why_one_class(place: Path, folder: str, name: str) -> str:
    """Explains a single class: by a table that was not read, or by a folder around the classes."""
    said = f"{place} has one class only, {name!r}, the folder {folder}/; a classifier needs at least two"
    inner = [f"{entry.name}/" for entry in _entries(place / folder) if entry.is_dir() and count_images(entry.path)]
    if inner:
        return f"{said}. If its folders {some(inner)} are the classes: --data_dir {place / folder}"
    suffixes = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".xlsx")
    unread = [entry.name for entry in _entries(place) if entry.name.lower().endswith(suffixes) and entry.is_file()]
    if unread:
        return (
            f"{said}. This was not read: {some(unread)}. If it has the labels, call it train.csv, with the columns "
            "image and label"
        )
    return said


def _empty_classes(found: _Found, top: str) -> list[str]:
    with_images = {path[len(top) :].split("/")[0] for path in found.images}
    return [f"{top}{name}/" for name in found.classes if name not in with_images]
