"""Create synthetic benchmarks: `python -m data.synthesize --like imagenet_lt --scale 0.01 --output_dir DIR`.

For tests, demonstrations and timings without the real benchmark. The images are real JPEG files, in the same folders
and lists, with the same sizes and the same long tail. Their pictures are drawn, so an accuracy on them shows only that
a network learns.
"""

import argparse
import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from data.sets import get_data_set
from data.sets._benchmark import MARKER
from data.writing import whole_file

_CHUNK = 32  # images that a worker draws between two progress reports
_SUPERCATEGORIES = (
    *("Actinopterygii", "Amphibia", "Animalia", "Arachnida", "Aves", "Bacteria", "Chromista"),
    *("Fungi", "Insecta", "Mammalia", "Mollusca", "Plantae", "Protozoa", "Reptilia"),
)


def _imagenet_path(split: str, label: int, index: int, _: int) -> str:
    synset = f"n{1_440_764 + 9_973 * label:08d}"  # ascending with the label, as in ImageNet
    if split == "test":
        return f"val/{synset}/ILSVRC2012_val_{50 * label + index + 1:08d}.JPEG"
    # the validation images are in the same folder as the training images
    return f"train/{synset}/{synset}_{2 * index + (split == 'validation')}.JPEG"


def _inaturalist_path(split: str, label: int, index: int, num_classes: int) -> str:
    supercategory = _SUPERCATEGORIES[label * len(_SUPERCATEGORIES) // num_classes]
    name = blake2b(f"{split}/{label}/{index}".encode(), digest_size=16).hexdigest()
    return f"train_val2018/{supercategory}/{label}/{name}.jpg"


def _places_path(split: str, label: int, index: int, _: int) -> str:
    if split == "test":
        return f"val/scene_{label:03d}/Places365_val_{100 * label + index + 1:08d}.jpg"
    return f"train/scene_{label:03d}/{2 * index + (split == 'validation') + 1:08d}.jpg"


@dataclass(frozen=True)
class Style:
    """Properties of the images of a benchmark.

    Attributes:
        held_out_per_class: split -> number of images in each class, for all splits but train.
        sizes: ((width, height), share of the images) for the most frequent sizes.
        quality: lower and upper bound of the JPEG quality.
        grey_share: share of grey images.
        path: (split, label, number of the image in its class and split, number of classes) -> path in the list.
    """

    held_out_per_class: dict[str, int]
    sizes: tuple[tuple[tuple[int, int], float], ...]
    quality: tuple[int, int]
    grey_share: float
    path: Callable[[str, int, int, int], str]


STYLES = {
    "imagenet_lt": Style(
        {"validation": 20, "test": 50},
        (
            *(((500, 375), 0.5), ((375, 500), 0.14), ((500, 333), 0.14), ((333, 500), 0.06)),
            *(((500, 500), 0.06), ((500, 400), 0.05), ((640, 480), 0.03), ((250, 250), 0.02)),
        ),
        (92, 97),
        0.015,
        _imagenet_path,
    ),
    "inaturalist18": Style({"test": 3}, (((800, 600), 0.7), ((600, 800), 0.3)), (90, 95), 0.0, _inaturalist_path),
    "places_lt": Style({"validation": 20, "test": 100}, (((256, 256), 1.0),), (70, 85), 0.005, _places_path),
}


@dataclass(frozen=True)
class _Picture:
    """An image to draw: its path, its class, and its own seed, so that any process draws the same image."""

    path: str  # relative to the output folder
    class_seed: int
    seed: tuple[int, ...]


def scaled_class_counts(like: str, scale: float) -> list[int]:
    """Returns the training images of each class (C,) of a synthetic version of the benchmark `like`.

    The real classes are sorted by their number of images, and those at round(scale * C) evenly spaced ranks are kept,
    at least two. The largest and the smallest class are always kept, so the imbalance factor does not change. The
    classes keep the order of their labels. Raises ValueError for an unknown benchmark or a scale outside (0, 1].
    """
    if like not in STYLES:
        raise ValueError(f"there is no synthetic {like!r}; choose from {', '.join(STYLES)}")
    if not 0 < scale <= 1:
        raise ValueError(f"scale is the share of the classes to keep, above 0 and up to 1, not {scale}")
    counts = np.asarray(_real_class_counts()[like])
    kept = max(2, round(scale * len(counts)))
    ranks = np.linspace(0, len(counts) - 1, kept).round().astype(int)
    labels = np.argsort(-counts, kind="stable")[ranks]
    return counts[np.sort(labels)].tolist()


def synthesize(
    like: str,
    scale: float,
    output_dir: str | Path,
    seed: int = 0,
    num_workers: int | None = None,
    *,
    image_scale: float = 1.0,
) -> dict:
    """Writes a synthetic benchmark. `load_long_tailed(like, output_dir)` then loads it.

    Args:
        like: a name in `STYLES`.
        scale: share of the classes to keep, each with its real number of training images; see `scaled_class_counts`.
        output_dir: the folder for the lists and the images. If it contains the same data already, nothing is done. If
            an earlier call was interrupted, the missing images are added.
        seed: of the pictures. Equal seeds give equal files, for any number of workers.
        num_workers: processes that draw; by default one for each core.
        image_scale: factor on the width and height of the images. Small images are faster to draw.

    Returns the contents of `synthetic.json`, which is written last: the arguments `like`, `scale`, `seed` and
    `image_scale`, `num_classes`, `class_counts` of the training split (C,) and `images`, the number in each split.
    Raises ValueError for impossible arguments, and FileExistsError if `output_dir` contains anything else.
    """
    counts = scaled_class_counts(like, scale)
    if not image_scale > 0:
        raise ValueError(f"image_scale is a factor on width and height, above 0, not {image_scale}")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers is the number of processes that draw, 1 or more, not {num_workers}")
    held_out = STYLES[like].held_out_per_class
    description = {
        "like": like,
        "scale": scale,
        "seed": seed,
        "image_scale": image_scale,
        "num_classes": len(counts),
        "images": {"train": sum(counts), **{split: number * len(counts) for split, number in held_out.items()}},
        "class_counts": counts,
    }
    output_dir = Path(output_dir)
    marker, unfinished = output_dir / MARKER, output_dir / f"{MARKER}.unfinished"
    if _read_json(marker) == description:
        return description
    if output_dir.is_dir() and any(output_dir.iterdir()) and (marker.exists() or _read_json(unfinished) != description):
        raise FileExistsError(
            f"{output_dir} is not empty and does not hold {like} at scale {scale}, seed {seed}, image scale "
            f"{image_scale}; name another folder or empty this one"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(description, indent=1) + "\n"
    _write(unfinished, text.encode())

    pictures = []
    for split_number, (split, list_name) in enumerate(get_data_set(like).lists.items()):
        lines = []
        for label, count in enumerate(counts):
            class_seed = int(np.random.SeedSequence([seed, label]).generate_state(1, np.uint64)[0])
            for index in range(count if split == "train" else held_out[split]):
                path = STYLES[like].path(split, label, index, len(counts))
                pictures.append(_Picture(path, class_seed, (seed, split_number, label, index)))
                lines.append(f"{path} {label}\n")
        _write(output_dir / list_name, "".join(lines).encode())
    for folder in {os.path.dirname(picture.path) for picture in pictures}:
        (output_dir / folder).mkdir(parents=True, exist_ok=True)

    draw = partial(_draw_to_files, output_dir, STYLES[like], image_scale)
    with tqdm(total=len(pictures), desc=f"drawing {like}", unit="image") as bar:
        for drawn in _in_processes(draw, pictures, num_workers or os.cpu_count() or 1):
            bar.update(drawn)
    _write(marker, text.encode())
    unfinished.unlink(missing_ok=True)
    return description


def make_image(rng: np.random.Generator, class_seed: int, size: tuple[int, int]) -> Image.Image:
    """Draws an RGB image of `size` (width, height) with one to three objects of a class on a random background.

    `class_seed` determines what all objects of the class share: the outline, two colours, and a texture with its
    frequency and direction. `rng` draws the rest: number, position, size, angle, brightness and shading of the objects,
    and the background. The background has the same energy in every octave, as photographs do (Field, 1987).
    """
    width, height = size
    luminance = _octave_noise(rng, width, height)  # (H, W), standard deviation about 1
    canvas = _colour_noise(rng, width, height)  # (3, H, W)
    canvas += np.multiply.outer(_uniform(rng, 18, 36) * _uniform(rng, 0.8, 1.2, 3), luminance)
    for _ in range(rng.integers(1, 4)):
        _paint_object(rng, _appearance(class_seed), canvas, luminance)
    np.clip(canvas, 0, 255, out=canvas)
    return Image.fromarray(np.ascontiguousarray(canvas.astype(np.uint8).transpose(1, 2, 0)))


def _uniform(rng: np.random.Generator, low: float, high: float, size: int | None = None) -> np.ndarray | np.float32:
    """Like `rng.uniform`, in the single precision of the pixels."""
    return np.float32(low) + np.float32(high - low) * rng.random(size, dtype=np.float32)


@dataclass(frozen=True)
class _Appearance:
    outline: np.ndarray  # (64,), radius by angle, at most 1
    colours: np.ndarray  # (2, 3), RGB
    frequencies: np.ndarray  # (2,), radians over an object's radius, along and across its axis
    sharpness: float  # of the texture: 1 a soft wave, large a hard edge


@lru_cache(maxsize=16_384)
def _appearance(class_seed: int) -> _Appearance:
    rng = np.random.default_rng(class_seed)
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    orders = np.arange(2, 8)[:, None]
    waves = rng.normal(0, 0.5, (6, 1)) / orders * np.cos(orders * angles + rng.uniform(0, 2 * np.pi, (6, 1)))
    outline = np.clip(1 + waves.sum(axis=0), 0.3, None)
    return _Appearance(
        outline=outline / outline.max(),
        colours=rng.uniform(10, 245, (2, 3)).astype(np.float32),
        frequencies=(rng.uniform(4, 30, 2) * rng.permutation([1, rng.choice([0, 0.3, 1])])).astype(np.float32),
        sharpness=float(rng.uniform(1, 5)),
    )


def _paint_object(rng: np.random.Generator, look: _Appearance, canvas: np.ndarray, luminance: np.ndarray) -> None:
    """Adds an object to the canvas (3, H, W), in place."""
    height, width = luminance.shape
    radius = _uniform(rng, 0.2, 0.45) * min(height, width)
    centre_x, centre_y = _uniform(rng, 0.2, 0.8) * width, _uniform(rng, 0.2, 0.8) * height
    left, top = max(0, int(centre_x - radius)), max(0, int(centre_y - radius))
    right, bottom = min(width, int(centre_x + radius) + 2), min(height, int(centre_y + radius) + 2)

    turn = _uniform(rng, 0, 2 * np.pi)
    angles = turn + np.linspace(0, 2 * np.pi, len(look.outline), endpoint=False)
    corners_x = centre_x - left + radius * look.outline * np.cos(angles)
    corners_y = centre_y - top + radius * look.outline * np.sin(angles)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).polygon(list(zip(corners_x.tolist(), corners_y.tolist(), strict=True)), fill=255)
    opacity = np.asarray(mask.filter(ImageFilter.BoxBlur(1)), dtype=np.float32) / 255  # (h, w), of the object's box

    x = (np.arange(left, right, dtype=np.float32) - centre_x) / radius  # (w,)
    y = ((np.arange(top, bottom, dtype=np.float32) - centre_y) / radius)[:, None]  # (h, 1)
    cosine, sine = np.cos(turn), np.sin(turn)
    along, across = look.frequencies
    wave = np.sin(x * (along * cosine) + y * (along * sine)) + np.sin(y * (across * cosine) - x * (across * sine))
    mix = np.clip(np.float32(0.5) + np.float32(0.5 * look.sharpness) * wave, 0, 1)
    light = _uniform(rng, 0, 2 * np.pi)
    shade = _uniform(rng, 0.75, 1.15) + x * (np.float32(0.2) * np.cos(light)) + y * (np.float32(0.2) * np.sin(light))
    shade = shade + np.float32(0.1) * luminance[top:bottom, left:right]
    for plane, first, second in zip(canvas[:, top:bottom, left:right], *look.colours, strict=True):
        plane += opacity * ((first + mix * (second - first)) * shade - plane)


def _octave_noise(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Returns noise (height, width) with equal variance in each octave of frequency, and about 1 in total."""
    levels = max(1, int(np.log2(max(1, min(width, height) / 3))))
    field = rng.standard_normal((3, 4), dtype=np.float32)
    for level in range(levels - 1, -1, -1):
        shape = (-(-width >> level), -(-height >> level))
        field = np.asarray(Image.fromarray(field).resize(shape, Image.Resampling.BILINEAR))
        field = field + rng.standard_normal(shape[::-1], dtype=np.float32)
    return field * np.float32((levels + 1) ** -0.5)


def _colour_noise(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Returns colours (3, height, width) that vary slowly over the image: JPEG drops fine detail of colour."""
    planes = []
    for _ in range(3):
        coarse = _uniform(rng, 60, 190) + _uniform(rng, 0, 40) * _octave_noise(rng, -(-width // 8), -(-height // 8))
        planes.append(np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)))
    return np.stack(planes)


def _draw_to_files(output_dir: Path, style: Style, image_scale: float, pictures: list[_Picture]) -> int:
    """Draws the pictures whose files do not exist yet. Returns len(pictures)."""
    sizes, shares = zip(*style.sizes, strict=True)
    for picture in pictures:
        path = output_dir / picture.path
        if path.exists():
            continue
        rng = np.random.default_rng(picture.seed)
        width, height = sizes[rng.choice(len(sizes), p=shares)]
        size = (max(8, round(width * image_scale)), max(8, round(height * image_scale)))
        quality = int(rng.integers(*style.quality, endpoint=True))
        grey = rng.random() < style.grey_share
        image = make_image(rng, picture.class_seed, size).convert("L" if grey else "RGB")
        jpeg = io.BytesIO()
        image.save(jpeg, format="JPEG", quality=quality)
        _write(path, jpeg.getvalue())
    return len(pictures)


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as written:
        written.write_bytes(content)


def _in_processes(draw: Callable[[list[_Picture]], int], pictures: list[_Picture], num_workers: int) -> Iterator[int]:
    chunks = [pictures[start : start + _CHUNK] for start in range(0, len(pictures), _CHUNK)]
    if num_workers == 1:
        yield from map(draw, chunks)
        return
    with ProcessPoolExecutor(num_workers) as pool:
        yield from pool.map(draw, chunks)


@lru_cache
def _real_class_counts() -> dict[str, list[int]]:
    return json.loads(Path(__file__).with_name("class_counts.json").read_text())


def _read_json(path: Path) -> object:
    """Returns the contents of a JSON file, or None if it does not exist or is not JSON."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--like", required=True, choices=STYLES, help="benchmark to imitate")
    parser.add_argument("--scale", type=float, default=0.01, help="share of its classes to keep (default 0.01)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the lists and images")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the pictures (default 0)")
    parser.add_argument("--num_workers", type=int, help="processes that draw; by default one for each core")
    options = parser.parse_args(arguments)
    try:
        written = synthesize(options.like, options.scale, options.output_dir, options.seed, options.num_workers)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    images = ", ".join(f"{number:,} {split}" for split, number in written["images"].items())
    counts = written["class_counts"]
    print(
        f"{options.output_dir}: {written['num_classes']} classes of {max(counts):,} to {min(counts)} images; {images}"
    )


if __name__ == "__main__":
    main()
