"""The teacher of a distillation."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from transformers import AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel
from transformers.image_utils import PILImageResampling
from transformers.modeling_outputs import ImageClassifierOutput

from data import prepared_size
from ride_bf.runs.models import check_weights, class_names, find_model, load_processor, loading_errors

# A colour whose channels differ from each other, from black and from white
_COLOUR = (40, 120, 200)


class Teacher(nn.Module):
    """An image classifier that sees the student's images with its own size and normalisation.

    The student's augmented pixels are converted to the teacher's size and normalisation on their device. The teacher
    sees all of the student's crop; the cropping of its own processor is meant for whole images. If both processors
    have the same size and normalisation, the teacher gets the student's pixels unchanged.

    Args:
        model: returns `logits` (B, C) for pixel values (B, 3, height, width).
        processor: the teacher's image processor.
        student_processor: the student's image processor, which made the pixel values.
        order: for each class of the student, its index among the teacher's logits (C,); None: the same order.
        autocast: the context in which the model runs, such as `Accelerator.autocast`.

    Raises ValueError for an image processor that does not simply scale and shift each channel.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: BaseImageProcessor,
        student_processor: BaseImageProcessor,
        order: Sequence[int] | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        super().__init__()
        self.model, self.autocast = model, autocast
        size = prepared_size(student_processor)
        if size is None:
            raise ValueError("the student's image processor does not give all images one size; set a crop_size in it")
        student_black, student_white, _ = _shown(student_processor, size)
        black, white, self.size = _shown(processor, size)
        self.same_pixels = self.size == size and torch.equal(black, student_black) and torch.equal(white, student_white)
        bicubic = getattr(processor, "resample", None) == PILImageResampling.BICUBIC
        self.interpolation = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
        for name, values in (
            ("student_black", student_black),
            ("student_white", student_white),
            ("black", black),
            ("white", white),
        ):
            self.register_buffer(name, values[:, None, None], persistent=False)
        self.register_buffer("order", None if order is None else torch.tensor(order), persistent=False)

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """Returns `logits` (B, C), in the student's order of classes, for its pixel values (B, 3, height, width)."""
        with self.autocast():
            logits = self.model(self.view(pixel_values)).logits
        return ImageClassifierOutput(logits=logits if self.order is None else logits[:, self.order])

    def view(self, pixel_values: Tensor) -> Tensor:
        """Converts the student's pixel values to the teacher's (B, 3, own height, own width)."""
        if self.same_pixels:
            return pixel_values
        shares = (pixel_values - self.student_black) / (self.student_white - self.student_black)  # 0: black, 1: white
        if pixel_values.shape[-2:] != self.size:
            shares = F.resize(shares, list(self.size), self.interpolation, antialias=True).clamp(0, 1)
        return self.black + shares * (self.white - self.black)


def _shown(processor: BaseImageProcessor, size: tuple[int, int]) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The values (3,) that an image processor gives black and white, and the height and width of its output.

    They are measured on images of one colour, because image processors name their settings differently. Raises
    ValueError unless the values of a third colour lie between them as linear scaling predicts.
    """
    made = []
    for colour in ((0, 0, 0), (255, 255, 255), _COLOUR):
        pixels = processor(Image.new("RGB", size[::-1], colour), return_tensors="pt")["pixel_values"][0]
        made.append(pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2].float())
    black, white, found = made
    expected = black + torch.tensor(_COLOUR) / 255 * (white - black)
    if (white == black).any() or not torch.allclose(found, expected, rtol=0, atol=1e-3 * (white - black).abs().max()):
        raise ValueError(
            f"{type(processor).__name__} does more to colours than to scale and shift each channel; training "
            "cannot repeat that: choose another teacher"
        )
    return black, white, tuple(pixels.shape[1:])


def load_teacher(
    place: str | Path,
    names: Sequence[str],
    student_processor: BaseImageProcessor,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Teacher:
    """Loads an image classifier to learn from, of any kind that transformers loads. Its own code is run.

    `place` is the folder of a model or a run, or a Hub id. `names` are the student's classes (C,). Raises ValueError,
    with one line, for files that are missing or damaged, and unless the teacher has the same classes. Their order may
    differ. If the teacher's classes have no names, they are assumed to be in the student's order.
    """
    place = find_model(place)
    with loading_errors(place):
        model, report = AutoModelForImageClassification.from_pretrained(
            place,
            dtype=torch.float32,  # like the student; autocast makes it faster
            trust_remote_code=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        check_weights(report)
    order = class_order(model, names, f"the teacher {place}")
    return Teacher(model.eval(), load_processor(place), student_processor, order, autocast)


def describe_teacher(teacher: Teacher) -> str:
    """Says what a teacher that `load_teacher` gave is shown, and by which rule its classes are the student's."""
    shown = "the student's own pixels" if teacher.same_pixels else "{} x {} pixels of its own".format(*teacher.size)
    named = class_names(teacher.model.config) is not None
    rule = "found by their names" if named else "taken by their place, as they have no names"
    return f"The teacher {teacher.model.config.name_or_path} is shown {shown}; its classes are {rule}"


def class_order(model: PreTrainedModel, names: Sequence[str], who: str) -> list[int] | None:
    """For each of `names` (C,), its index among a model's classes; None if the order is the same or there are no names.

    Raises ValueError unless the classes are the same. The error calls the model `who`.
    """
    own = class_names(model.config)
    if own is None and model.config.num_labels == len(names):
        return None
    if own is None or len(own) != len(names) or set(own) != set(names):
        only_model = [name for name in own or [] if name not in set(names)][:3]
        only_data = [name for name in names if name not in set(own or [])][:3]
        raise ValueError(
            f"{who} has {model.config.num_labels} classes, the data {len(names)}; only the model has {only_model}, "
            f"only the data have {only_data}. It must know the same classes by the same "
            "names; --class_names gives them"
        )
    return None if own == list(names) else [own.index(name) for name in names]
