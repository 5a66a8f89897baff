"""A teacher sees the student's images as its own image processor shows images."""

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model
from PIL import Image
from torch import nn
from transformers import (
    BitImageProcessor,
    ConvNextImageProcessor,
    MobileViTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)
from transformers.modeling_outputs import ImageClassifierOutput

from data import EvaluationBatch, evaluation_processor
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.methods.losses import CrossEntropyLoss
from ride_bf.methods.objectives import ClassificationObjective, DistillationObjective
from ride_bf.methods.teacher import Teacher, describe_teacher, load_teacher
from ride_bf.recipes.recipe import IMAGENET_MEAN, IMAGENET_STD

SIZE = 24
STUDENT = evaluation_processor(28, SIZE, IMAGENET_MEAN, IMAGENET_STD)


class Echo(nn.Module):
    """Keeps what it is shown, and answers with the mean of each channel."""

    def forward(self, pixel_values):
        self.seen = pixel_values
        return ImageClassifierOutput(logits=pixel_values.mean(dim=(2, 3)))


def images(count=16, size=SIZE):
    """Smooth pictures, uint8 (N, 3, size, size): resizing leaves most of them."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8)


def as_student(pixels):
    """The pixel values that the student is given of uint8 pixels."""
    return EvaluationBatch(STUDENT.image_mean, STUDENT.image_std)({"pixel_values": pixels})["pixel_values"]


def shown_by(processor, pixels):
    """What an image processor makes of the same images, each as a file of its own."""
    files = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    return processor(files, return_tensors="pt")["pixel_values"]


def without_crop(size, mean=(0.5,) * 3, std=(0.5,) * 3):
    """One that resizes to the size itself, so that it has nothing to crop."""
    return evaluation_processor(size, size, mean, std)


@pytest.mark.parametrize("resize", [SIZE, 28, 256])
def test_equal_processors_give_the_very_pixels(resize):
    pixels = as_student(images())
    teacher = Teacher(Echo(), evaluation_processor(resize, SIZE, IMAGENET_MEAN, IMAGENET_STD), STUDENT)
    teacher(pixels)
    assert teacher.model.seen is pixels


@pytest.mark.parametrize(
    "processor",
    [
        without_crop(32),
        without_crop(SIZE),
        without_crop(16, (0.0,) * 3, (1.0,) * 3),
        ViTImageProcessor(size={"height": 30, "width": 36}),
        ConvNextImageProcessor(size={"shortest_edge": 400}),  # bicubic
        BitImageProcessor(do_resize=False, do_center_crop=False, do_normalize=False),
        BitImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False),
    ],
    ids=lambda processor: f"{type(processor).__name__} {processor.size}",
)
def test_any_other_processor_is_repeated(processor):
    pixels = images()
    expected = shown_by(processor, pixels)
    teacher = Teacher(Echo(), processor, STUDENT)
    seen = teacher.view(as_student(pixels))
    assert seen.shape == expected.shape
    whole_number = (shown_by(processor, torch.full_like(pixels[:1], 1)) - shown_by(processor, pixels[:1] * 0)).max()
    # Files are resized to whole numbers, in each of two passes; the teacher's view is not rounded.
    difference = (seen - expected).abs()
    assert difference.mean() < whole_number / 2
    assert difference.max() < 4 * whole_number


def test_what_the_students_augmentation_left_fills_the_teachers_picture():
    """Its own processor would cut an eighth off each whole image; of the student's crop nothing is cut off."""
    pixels = images()
    teacher = Teacher(Echo(), evaluation_processor(36, 32, (0.5,) * 3, (0.5,) * 3), STUDENT)
    assert torch.allclose(teacher.view(as_student(pixels)), shown_by(without_crop(32), pixels), atol=0.03)


def test_a_teacher_of_another_size_and_normalisation_keeps_its_answers(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10)
    teacher = ResNetForImageClassification(config)
    own = without_crop(32)
    pixels = images(200)
    with torch.no_grad():
        for module in teacher.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        features = teacher.resnet(shown_by(own, pixels)).pooler_output.flatten(1)
        teacher.classifier[1].weight.copy_(teacher.classifier[1].weight / features.std(dim=0))
        teacher.eval()
        logits = teacher(shown_by(own, pixels)).logits
        teacher.classifier[1].bias.sub_(logits.mean(dim=0))  # answers of all kinds
        expected = teacher(shown_by(own, pixels)).logits
    assert len(expected.argmax(dim=1).unique()) > 4
    teacher.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    loaded = load_teacher(tmp_path, [str(label) for label in range(10)], STUDENT)
    assert f"{tmp_path} is shown 32 x 32 pixels of its own" in describe_teacher(loaded)
    with torch.no_grad():
        answers = loaded(as_student(pixels)).logits
    assert (answers.argmax(dim=1) == expected.argmax(dim=1)).float().mean() > 0.98
    with torch.no_grad():
        before = teacher(as_student(pixels)).logits  # as it was shown them once
    assert (before.argmax(dim=1) == expected.argmax(dim=1)).float().mean() < 0.9


def test_mixed_images_stay_mixed():
    """A blend of two images is the blend of what the teacher is shown of each."""
    one, other = as_student(images()).split(8)
    teacher = Teacher(Echo(), without_crop(32), STUDENT)
    mixed = teacher.view(0.7 * one + 0.3 * other)
    torch.testing.assert_close(mixed, 0.7 * teacher.view(one) + 0.3 * teacher.view(other), rtol=0, atol=1e-5)


def test_a_processor_that_cannot_be_repeated_is_refused():
    with pytest.raises(ValueError, match="MobileViTImageProcessor does more to colours than to scale and shift"):
        Teacher(Echo(), MobileViTImageProcessor(size={"shortest_edge": 32}), STUDENT)


def named(*names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}


def test_the_teachers_classes_are_found_by_their_names(tmp_path):
    torch.manual_seed(0)
    model = RideBfForImageClassification(tiny_config(num_labels=3, **named("cicada", "ant", "bee"))).eval()
    model.save_pretrained(tmp_path)
    STUDENT.save_pretrained(tmp_path)
    pixels = as_student(images())
    teacher = load_teacher(tmp_path, ["ant", "bee", "cicada"], STUDENT)
    with torch.no_grad():
        assert torch.equal(
            teacher(pixels).logits,
            load_teacher(tmp_path, ["cicada", "ant", "bee"], STUDENT)(pixels).logits[:, [1, 2, 0]],
        )
    for names in (["ant", "bee", "wasp"], ["ant", "bee"], ["ant", "bee", "cicada", "wasp"]):
        with pytest.raises(
            ValueError, match=r"only the data have (\['wasp'\]|\[\])\. It must know the same classes by .*--class_names"
        ):
            load_teacher(tmp_path, names, STUDENT)


def test_a_teacher_whose_classes_have_no_names_needs_as_many(tmp_path):
    tiny_model(num_labels=3).save_pretrained(tmp_path)
    STUDENT.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, ["ant", "bee", "cicada"], STUDENT)
    assert teacher.order is None
    assert describe_teacher(teacher).endswith(
        "is shown the student's own pixels; its classes are taken by their place, as they have no names"
    )
    with pytest.raises(ValueError, match="has 3 classes, the data 2"):
        load_teacher(tmp_path, ["ant", "bee"], STUDENT)


def test_a_teacher_without_an_image_processor_is_refused(tmp_path):
    tiny_model(num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be loaded: .*image processor"):
        load_teacher(tmp_path, ["ant", "bee"], STUDENT)


def test_it_runs_in_the_runs_precision_and_the_divergence_in_float32(tmp_path):
    tiny_model(num_labels=3).half().save_pretrained(tmp_path)  # saved in another precision yet
    STUDENT.save_pretrained(tmp_path)
    names = ["ant", "bee", "cicada"]
    teacher = load_teacher(tmp_path, names, STUDENT, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert teacher.model.dtype == torch.float32
    pixels = as_student(images(4))
    precisions = []
    teacher.model.ride_bf.trunk.stem[0].convolution.register_forward_hook(
        lambda module, inputs, output: precisions.append(output.dtype)
    )
    objective = DistillationObjective(ClassificationObjective(CrossEntropyLoss()), teacher)
    outputs = tiny_model(num_labels=3).train()(pixels)
    loss = objective(outputs, {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 0])})
    assert precisions == [torch.bfloat16]
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert np.isfinite(loss.item())
