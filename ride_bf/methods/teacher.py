"""The teacher of a distillation."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForImageClassification, PreTrainedModel

from ride_bf.runs.models import check_classes, check_exists


def load_teacher(folder: str | Path, class_names: Sequence[str]) -> PreTrainedModel:
    """An image classifier to learn from, of any kind that transformers loads; code that comes with it is run.

    Raises ValueError if its classes are not `class_names`, in that order; unnamed ones are taken on trust.
    """
    check_exists(folder)
    teacher = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    check_classes(teacher, class_names, f"the teacher {folder}")
    return teacher
