"""Serves the model on Hugging Face Inference Endpoints. Their toolkit looks for `EndpointHandler` in this file.

A request is `{"inputs": IMAGE, "parameters": {"top_k": 5}}`. IMAGE is an image as raw bytes or base64, or a list of
images. The answer is a list of `{"label": ..., "score": ...}`, best first, or a list of such lists. A request that
cannot be answered raises `BadRequestError`. The toolkit sends its message back as the `error` of the answer.

The scores of a calibrated model are calibrated. If it has sets of classes, the entry of a class also has `in_set`, and
all classes of the set are there, even beyond `top_k`. For an image that it rejects, the first entry is "none of the
classes", which has a label and a score only, before the nearest classes.

The images of a request may have as many pixels together as one image may have. JPEG files that are too large for that
are read at a half, a quarter or an eighth of their size; other images have the same pixels as in training.
"""

import base64
import binascii
import io
import json
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, features
from transformers import AutoImageProcessor, AutoModelForImageClassification

T = TypeVar("T")
MAX_BYTES = 20 * 2**20  # of one image file
MAX_PIXELS = 178_956_970  # of one image, if training did not have another limit; it takes up to 2 GiB of memory
MAX_ASPECT_RATIO = 50  # resizing an image's shorter side makes the longer one as many times as long
MAX_IMAGES = 64  # in one request
# Pillow reads all of these without another program. Pillow 11.0 to 11.2 cannot read AVIF.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", *(("AVIF",) if features.check("avif") else ()))
IMAGES_AT_ONCE = 16
TOP_K = 5
NONE_OF_THE_CLASSES = "none of the classes"


# Errors that Pillow raises for damaged files
_DECODER_ERRORS = (
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, SyntaxError, EOFError, AttributeError),
    *(ArithmeticError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
)

_ORIENTATION = 0x0112  # an EXIF tag
# Orientation -> how to turn the image upright. 1 is upright, and other values are damaged.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_METADATA = {0xE1, 0xE2, 0xED, 0xFE}  # markers of EXIF and XMP, colour profiles, Photoshop, and comments
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # the chunks that pixels depend on
# Tags of names, resolution, dates, XMP, IPTC, Photoshop, EXIF, colour profile and GPS
_TIFF_METADATA = {*range(269, 273), 282, 283, 296, 305, 306, 315, 316, 700, 33432, 33723, 34377, 34665, 34675, 34853}
_AVIF_EXIF = re.compile(rb"(infe.{8}(?:..)?)Exif", re.DOTALL)  # an entry that says that an item is EXIF data
_UNKNOWN_TAG = 65_000  # takes the place of a tag that is removed
_STRIP_PIXELS = 2**24  # converted at once, to limit memory

_pil_limit = threading.Lock()


class BadRequestError(ValueError):
    """A request that cannot be answered. The message tells the client why."""


class _LimitError(BadRequestError):
    """An image is too large or too narrow."""


def read_image(source: Any, max_pixels: int = MAX_PIXELS, reduce_above: int | None = None) -> Image.Image:
    """Reads an image as upright RGB. Transparent pixels become white; an animation gives its first frame.

    `source` is the bytes of a file, the same in base64 or as a data URL, or a PIL image. Raises BadRequestError for
    anything else, and for files that are not images, are cut off, have more than `max_pixels`, or exceed the limits
    above. Damaged metadata are ignored. A JPEG file of more than `reduce_above` pixels is read at a reduced size.
    """
    return _read(source, max_pixels, lambda image, note: _decode(image, max_pixels, note, reduce_above))


def count_pixels(source: Any, max_pixels: int = MAX_PIXELS, reduce_above: int | None = None) -> int:
    """How many pixels `read_image` would decode. It decodes none, so that some errors are found only later."""
    return _read(
        source, max_pixels, lambda image, _: image.width * image.height // _reduction(image, reduce_above) ** 2
    )


def _read(source: Any, max_pixels: int, look: Callable[[Image.Image, bytes], T]) -> T:
    """Returns `look(image, note)` for the opened image; see `_orientation` for `note`."""
    source = _as_file_or_image(source)
    try:
        with warnings.catch_warnings(action="ignore"), _pil_refuses_more_than(max_pixels):
            if isinstance(source, Image.Image):
                return look(source, b"")
            return _read_file(source, max_pixels, look)
    except BadRequestError:
        raise
    except _DECODER_ERRORS as error:
        raise BadRequestError(f"the image cannot be read: {error}"[:300]) from error


def _as_file_or_image(source: Any) -> bytes | Image.Image:
    if isinstance(source, str):
        source = _decode_base64(source)
    if not isinstance(source, bytes | bytearray | Image.Image):
        raise BadRequestError(f"an image must be bytes, base64 or a PIL image, not {type(source).__name__}")
    if isinstance(source, Image.Image):
        return source
    if len(source) > MAX_BYTES:
        raise BadRequestError(f"the image file is larger than {MAX_BYTES // 2**20} MiB")
    return bytes(source)


def _reduction(image: Image.Image, reduce_above: int | None) -> int:
    """By how much the sides of an opened image are divided; 1 for all formats but JPEG, and MPO, which contains it."""
    if reduce_above is None or image.format not in ("JPEG", "MPO"):
        return 1
    pixels = image.width * image.height
    return next((factor for factor in (1, 2, 4) if pixels // factor**2 <= reduce_above), 8)


def _read_file(content: bytes, max_pixels: int, look: Callable[[Image.Image, bytes], T]) -> T:
    try:
        with _open(content, max_pixels) as image:
            return look(image, b"")
    except _LimitError:
        raise
    except Exception:  # Pillow raises many kinds of errors for damaged metadata
        bare, note = _without_metadata(content)
        if bare == content:
            raise
    with _open(bare, max_pixels) as image:
        return look(image, note)


def _open(content: bytes, max_pixels: int) -> Image.Image:
    """Opens an image file without decoding it."""
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _LimitError(f"the image has too many pixels; at most {max_pixels:,} are read") from error
    except Exception as error:
        raise BadRequestError(f"not an image; supported formats: {', '.join(FORMATS)}") from error


def _decode(image: Image.Image, max_pixels: int, note: bytes, reduce_above: int | None) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise _LimitError(f"the image has {width} x {height} pixels; at most {max_pixels:,} are read")
    if width == 0 or height == 0 or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise _LimitError(f"the image has {width} x {height} pixels; no side may be {MAX_ASPECT_RATIO} times the other")
    if (factor := _reduction(image, reduce_above)) > 1:
        image.draft(None, (width // factor, height // factor))
    image.load()
    # Pillow turns a TIFF image while it loads it, and then forgets the orientation
    turn = _TURNS.get(_orientation(image, note))
    return _to_rgb(image if turn is None else image.transpose(turn))


@contextmanager
def _pil_refuses_more_than(pixels: int) -> Iterator[None]:
    """Changes Pillow's limit, which holds for the whole program, if it is another one."""
    if Image.MAX_IMAGE_PIXELS is not None and pixels == 2 * Image.MAX_IMAGE_PIXELS:
        yield
        return
    with _pil_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels / 2
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _decode_base64(text: str) -> bytes:
    if text.startswith(("http://", "https://")):
        raise BadRequestError("images are not fetched from URLs; send the image itself, in base64")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    text = "".join(text.split())  # many programs break lines
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise BadRequestError(f"the image file is larger than {MAX_BYTES // 2**20} MiB")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequestError(f"the image is text, but not valid base64: {error}") from error


def _orientation(image: Image.Image, note: bytes = b"") -> int:
    """Returns the EXIF orientation of an opened image, 1 to 8; 1 if there is none, or if it cannot be read.

    `note` are EXIF data of the image that Pillow does not know.
    """
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises many kinds of errors for damaged metadata
        value = None
    if value is None:  # Pillow gives up at the first damaged entry
        value = _orientation_in(note or image.info.get("exif") or b"")
    return value if value in _TURNS else 1


def _orientation_in(note: bytes) -> int | None:
    """Looks for the orientation in the first directory of EXIF data, whatever else is damaged in them."""
    note = note.removeprefix(b"Exif\x00\x00")
    order = {b"II": "little", b"MM": "big"}.get(note[:2])
    if order is None:
        return None
    start = int.from_bytes(note[4:8], order)
    for entry in _entries(note, start, order):
        tag, kind = (int.from_bytes(entry[place : place + 2], order) for place in (0, 2))
        if tag == _ORIENTATION:
            return int.from_bytes(entry[8 : 8 + {1: 1, 3: 2, 4: 4}.get(kind, 0)], order)
    return None


def _entries(content: bytes, start: int, order: Literal["little", "big"]) -> Iterator[bytes]:
    """Yields the entries of 12 bytes of a TIFF directory, as far as they are there."""
    count = int.from_bytes(content[start : start + 2], order)
    for place in range(start + 2, min(start + 2 + 12 * count, len(content) - 11), 12):
        yield content[place : place + 12]


def _without_metadata(content: bytes) -> tuple[bytes, bytes]:
    """Returns a JPEG, PNG, TIFF or AVIF file without its metadata, and the EXIF data of a JPEG or PNG file.

    Other files are returned unchanged, with b"".
    """
    if content[:2] == b"\xff\xd8":
        return _jpeg_without_metadata(content)
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return _png_without_metadata(content)
    if content[:4] in (b"II*\x00", b"MM\x00*"):
        return _tiff_without_metadata(content), b""
    if content[4:8] == b"ftyp":  # AVIF turns images by another property, so its EXIF data are not needed
        return _AVIF_EXIF.sub(rb"\1free", content), b""
    return content, b""


def _jpeg_without_metadata(content: bytes) -> tuple[bytes, bytes]:
    kept, note, place = [content[:2]], b"", 2
    while content[place : place + 1] == b"\xff" and len(content) >= place + 4:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker in (0xD8, 0xD9, 0xDA):  # the pixels start
            break
        segment = content[place : place + 2 + length]
        if marker not in _JPEG_METADATA:
            kept.append(segment)
        elif not note and segment[4:10] == b"Exif\x00\x00":
            note = segment[10:]
        place += 2 + length
    return b"".join([*kept, content[place:]]), note


def _png_without_metadata(content: bytes) -> tuple[bytes, bytes]:
    kept, note, place = [content[:8]], b"", 8
    while place + 8 <= len(content):
        length, kind = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        if kind in _PNG_PIXELS:
            kept.append(content[place : place + 12 + length])
        elif not note and kind == b"eXIf":
            note = content[place + 8 : place + 8 + length]
        place += 12 + length
    return b"".join(kept), note


def _tiff_without_metadata(content: bytes) -> bytes:
    order = "little" if content[:1] == b"I" else "big"
    start = int.from_bytes(content[4:8], order)
    bare = bytearray(content)
    for number, entry in enumerate(_entries(content, start, order)):
        if int.from_bytes(entry[:2], order) in _TIFF_METADATA:
            place = start + 2 + 12 * number
            bare[place : place + 12] = _UNKNOWN_TAG.to_bytes(2, order) + (1).to_bytes(2, order) + bytes(8)
    return bytes(bare)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts a loaded image as in training and evaluation. Raises BadRequestError for 32-bit numbers."""
    _check_range(image)
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // max(1, width))
    if height <= rows:
        return _strip_to_rgb(image)
    converted = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        converted.paste(_strip_to_rgb(image.crop((0, top, width, min(top + rows, height)))), (0, top))
    return converted


def _check_range(image: Image.Image) -> None:
    """Raises BadRequestError for fractions, and for whole numbers beyond 16 bits: which is white is not known."""
    if image.mode == "F" or (image.mode == "I" and not 0 <= image.getextrema()[0] <= image.getextrema()[1] <= 65535):
        low, high = image.getextrema()
        raise BadRequestError(
            "the image cannot be read: its pixels are 32-bit numbers whose range is not known "
            f"({low:g} to {high:g}); convert it to 8 or 16 bits"
        )


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey: Pillow would clip it at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def _limit_in_training(folder: Path) -> int:
    """The largest number of pixels of an image that was read in training, if `checkpoint.json` says it."""
    facts = folder / "checkpoint.json"
    data = json.loads(facts.read_text(encoding="utf-8")).get("data") if facts.is_file() else None
    return (data or {}).get("max_image_pixels", MAX_PIXELS)


@contextmanager
def _naming(index: int, images: list | tuple) -> Iterator[None]:
    """Names an image that cannot be read by its index, if there are several."""
    try:
        yield
    except BadRequestError as error:
        raise BadRequestError(f"inputs[{index}]: {error}" if len(images) > 1 else str(error)) from error


class Answers(NamedTuple):
    """What a model says about N images.

    Attributes:
        probabilities (N, C): calibrated, if the model is.
        expert_probabilities (N, E, C): with the same temperature; NaN for experts that a router did not run.
        in_set (N, C): whether a class is in the set that holds the true one in a promised share of the cases; None for
            a model without sets.
        rejected (N,): whether the image is of none of the classes; None for a model that does not say.
    """

    probabilities: torch.Tensor
    expert_probabilities: torch.Tensor
    in_set: torch.Tensor | None
    rejected: torch.Tensor | None


class EndpointHandler:
    """Loads the model in the folder `path` and runs its code."""

    def __init__(self, path: str = ""):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = AutoImageProcessor.from_pretrained(path)
        model = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True)
        self.model = model.to(self.device).eval()
        self.confidence = model.config.confidence  # see RideBfConfig
        self.max_bytes = MAX_BYTES
        self.max_pixels = _limit_in_training(Path(path))
        self.labels = [str(model.config.id2label[label]) for label in range(model.config.num_labels)]

    def __call__(self, data: dict[str, Any]) -> list:
        """Answers a request. Raises BadRequestError."""
        if not isinstance(data, dict) or "inputs" not in data:
            raise BadRequestError('a request is {"inputs": IMAGE or [IMAGE, ...], "parameters": {"top_k": 5}}')
        top_k = self._top_k(data.get("parameters") or {})
        inputs = data["inputs"]
        batch = inputs if isinstance(inputs, list | tuple) else [inputs]
        if not 1 <= len(batch) <= MAX_IMAGES:
            raise BadRequestError(f"a request has 1 to {MAX_IMAGES} images, not {len(batch)}")
        answers = self._ranked(self.answer(batch), top_k)
        return answers if isinstance(inputs, list | tuple) else answers[0]

    def _ranked(self, found: Answers, top_k: int) -> list[list[dict[str, Any]]]:
        """The likeliest classes of each image, best first, and after them the others of its set."""
        answers = []
        for index, probabilities in enumerate(found.probabilities):
            scores, classes = probabilities.sort(descending=True, stable=True)
            ranked = list(zip(classes.tolist(), scores.tolist(), strict=True))
            if found.in_set is None:
                answer = [{"label": self.labels[label], "score": score} for label, score in ranked[:top_k]]
            else:
                inside = found.in_set[index].tolist()
                answer = [
                    {"label": self.labels[label], "score": score, "in_set": inside[label]}
                    for place, (label, score) in enumerate(ranked)
                    if place < top_k or inside[label]
                ]
            if found.rejected is not None and found.rejected[index]:
                answer.insert(0, {"label": NONE_OF_THE_CLASSES, "score": 1.0})  # a decision, so its score is 1
            answers.append(answer)
        return answers

    def _top_k(self, parameters: Any) -> int:
        if not isinstance(parameters, dict) or set(parameters) - {"top_k"}:
            raise BadRequestError(f'parameters can have "top_k", the number of classes; got {parameters!r}'[:300])
        top_k = parameters.get("top_k", TOP_K)
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise BadRequestError(f"top_k must be a whole number of 1 or more, not {top_k!r}"[:300])
        return min(top_k, len(self.labels))

    def classify(self, images: list | tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """The first two of `answer`."""
        return self.answer(images)[:2]

    def answer(self, images: list | tuple) -> Answers:
        """The first of `answer_with_features`."""
        return self.answer_with_features(images)[0]

    @torch.inference_mode()
    def answer_with_features(self, images: list | tuple) -> tuple[Answers, torch.Tensor]:
        """Returns what the model says about N images, which are anything that `read_image` takes.

        The second value are the experts' features (N, E, D). Raises BadRequestError, with the index of the image if
        there are several.
        """
        mean, experts, features = [], [], []
        reduce_above = self._reduce_above(images)
        for start in range(0, len(images), IMAGES_AT_ONCE):
            batch = range(start, len(images))[:IMAGES_AT_ONCE]
            pixel_values = [self._prepare(images, index, reduce_above) for index in batch]
            outputs = self.model(torch.cat(pixel_values).to(self.device, self.model.dtype))
            mean.append(outputs.logits.float().cpu())
            experts.append(outputs.expert_logits.float().cpu())
            features.append(outputs.expert_features.float().cpu())
        logits, expert_logits, confidence = torch.cat(mean), torch.cat(experts), self.model.confidence
        answers = Answers(
            probabilities=confidence.probabilities(logits),
            expert_probabilities=(expert_logits / confidence.temperatures(logits)[:, None]).softmax(dim=-1),
            in_set=None if confidence.coverage is None else confidence.prediction_sets(logits),
            rejected=None if confidence.reject_known is None else confidence.rejected(logits),
        )
        return answers, torch.cat(features)

    def _reduce_above(self, images: list | tuple) -> int | None:
        """How many pixels a JPEG file may have to be read in full; None if all images of the request are."""
        if len(images) == 1:
            return None
        for reduce_above in (None, self.max_pixels // len(images)):
            pixels = 0
            for index, image in enumerate(images):
                with _naming(index, images):
                    pixels += count_pixels(image, self.max_pixels, reduce_above)
            if pixels <= self.max_pixels:
                return reduce_above
        raise BadRequestError(
            f"the images have {pixels:,} pixels together; at most {self.max_pixels:,} are read in a request: send "
            "fewer or smaller ones"
        )

    def _prepare(self, images: list | tuple, index: int, reduce_above: int | None) -> torch.Tensor:
        """The pixels of one image (1, 3, height, width). Only one image at a time is held in its full size."""
        with _naming(index, images):
            image = read_image(images[index], self.max_pixels, reduce_above)
        return self.processor(image, return_tensors="pt")["pixel_values"]
