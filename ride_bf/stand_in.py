"""Until `data` has these: what training reads an image with, and where images are listed."""

import io
from pathlib import Path

import torch
from datasets import Dataset, Image
from PIL import Image as PilImage
from PIL import ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

from data import DATASETS
from data.annotation_lists import BENCHMARKS


class BrokenImageError(ValueError):
    pass


def read_image(image: dict) -> torch.Tensor:
    try:
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        with PilImage.open(io.BytesIO(content)) as opened:
            return pil_to_tensor(ImageOps.exif_transpose(opened).convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        name = image["path"] or "an image stored in the data set"
        raise BrokenImageError(f"{name} cannot be read: {error}") from error


def undecoded(split: Dataset) -> Dataset:
    return split.cast_column("image", Image(decode=False))


def recognise(data_dir: str | Path) -> str:
    for name, benchmark in BENCHMARKS.items():
        if all((Path(data_dir) / file).is_file() for file in benchmark.lists.values()):
            return name
    return next((name for name in DATASETS if name.startswith("cifar") and Path(data_dir).is_dir()), "custom")


def find_entry(name: str, data_dir: str | Path | None, image: str) -> str | None:
    if name not in BENCHMARKS:
        return None
    folder = Path(data_dir or Path("data") / BENCHMARKS[name].folder)
    relative = Path(image).relative_to(folder.resolve()).as_posix()
    for file in BENCHMARKS[name].lists.values():
        for number, line in enumerate((folder / file).read_text().splitlines(), start=1):
            if line.rpartition(" ")[0] == relative:
                return f"{folder / file}, line {number}"
    return None
