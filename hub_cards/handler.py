"""Serves the model on Hugging Face Inference Endpoints. Their toolkit looks for `EndpointHandler` in this file.

A request is `{"inputs": IMAGE, "parameters": {"top_k": 5}}`. IMAGE is an image as raw bytes or base64, or a list of
images. The answer is a list of `{"label": ..., "score": ...}`, best first, or a list of such lists. A request that
cannot be answered raises `BadRequestError`. The toolkit sends its message back as the `error` of the answer.
"""

import base64
import binascii
import io
import struct
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification

MAX_BYTES = 20 * 2**20  # of one image file
MAX_PIXELS = 50_000_000  # of one image; decoding such an image takes up to a gigabyte
MAX_ASPECT_RATIO = 50  # resizing an image's shorter side makes the longer one as many times as long
MAX_IMAGES = 64  # in one request
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow reads all of these without another program
IMAGES_AT_ONCE = 16
TOP_K = 5


# Errors that Pillow raises for damaged files
_DECODER_ERRORS = (OSError, RuntimeError, ValueError, TypeError, LookupError, SyntaxError, EOFError, struct.error)


class BadRequestError(ValueError):
    """A request that cannot be answered. The message tells the client why."""


def read_image(source: Any) -> Image.Image:
    """Reads an image as upright RGB. Transparent pixels become white; an animation gives its first frame.

    `source` is the bytes of a file, the same in base64 or as a data URL, or a PIL image. Raises BadRequestError for
    anything else, and for files that are not images, are cut off, or exceed the limits above.
    """
    if isinstance(source, str):
        source = _decode_base64(source)
    if isinstance(source, bytes | bytearray):
        source = _open(source)
    if not isinstance(source, Image.Image):
        raise BadRequestError(f"an image must be bytes, base64 or a PIL image, not {type(source).__name__}")
    width, height = source.size
    if width * height > MAX_PIXELS:
        raise BadRequestError(f"the image has {width} x {height} pixels; at most {MAX_PIXELS:,} are read")
    if width == 0 or height == 0 or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BadRequestError(
            f"the image has {width} x {height} pixels; no side may be {MAX_ASPECT_RATIO} times the other"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata, which is not needed
            return _to_rgb(_upright(source))
    except (*_DECODER_ERRORS, ArithmeticError, MemoryError) as error:
        raise BadRequestError(f"the image cannot be read: {error}") from error


def _decode_base64(text: str) -> bytes:
    if text.startswith(("http://", "https://")):
        raise BadRequestError("images are not fetched from URLs; send the image itself, in base64")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise BadRequestError(f"the image file is larger than {MAX_BYTES // 2**20} MiB")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequestError(f"the image is text, but not valid base64: {error}") from error


def _open(content: bytes | bytearray) -> Image.Image:
    """Opens an image file without decoding it."""
    if len(content) > MAX_BYTES:
        raise BadRequestError(f"the image file is larger than {MAX_BYTES // 2**20} MiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about many pixels; their number is checked next
            return Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadRequestError(f"the image has far more pixels than the {MAX_PIXELS:,} that are read") from error
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, OverflowError) as error:
        raise BadRequestError(f"not an image; supported formats: {', '.join(FORMATS)}") from error


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data say. Damaged EXIF data are ignored."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except _DECODER_ERRORS:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts the image as in training and evaluation."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


class EndpointHandler:
    """Loads the model in the folder `path` and runs its code."""

    def __init__(self, path: str = ""):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = AutoImageProcessor.from_pretrained(path)
        model = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True)
        self.model = model.to(self.device).eval()
        self.max_bytes = MAX_BYTES
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
        probabilities, _ = self.classify(batch)
        scores, classes = probabilities.topk(top_k, dim=1)
        answers = [
            [{"label": self.labels[label], "score": score} for label, score in zip(*row, strict=True)]
            for row in zip(classes.tolist(), scores.tolist(), strict=True)
        ]
        return answers if isinstance(inputs, list | tuple) else answers[0]

    def _top_k(self, parameters: Any) -> int:
        if not isinstance(parameters, dict) or set(parameters) - {"top_k"}:
            raise BadRequestError(f'parameters can have "top_k", the number of classes; got {parameters!r}'[:300])
        top_k = parameters.get("top_k", TOP_K)
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise BadRequestError(f"top_k must be a whole number of 1 or more, not {top_k!r}"[:300])
        return min(top_k, len(self.labels))

    @torch.inference_mode()
    def classify(self, images: list | tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns probabilities (N, C), and those of each expert (N, E, C), NaN for experts that a router did not run.

        `images` are anything that `read_image` takes. Raises BadRequestError, with the index of the image if there are
        several.
        """
        mean, experts = [], []
        for start in range(0, len(images), IMAGES_AT_ONCE):
            pixel_values = [self._prepare(images, index) for index in range(start, len(images))[:IMAGES_AT_ONCE]]
            outputs = self.model(torch.cat(pixel_values).to(self.device, self.model.dtype))
            mean.append(outputs.logits.float().softmax(dim=-1).cpu())
            experts.append(outputs.expert_logits.float().softmax(dim=-1).cpu())
        return torch.cat(mean), torch.cat(experts)

    def _prepare(self, images: list | tuple, index: int) -> torch.Tensor:
        """The pixels of one image (1, 3, height, width). Only one image at a time is held in its full size."""
        try:
            image = read_image(images[index])
        except BadRequestError as error:
            raise BadRequestError(f"inputs[{index}]: {error}" if len(images) > 1 else str(error)) from error
        return self.processor(image, return_tensors="pt")["pixel_values"]
