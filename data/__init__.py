"""Long-tailed image data through the `datasets` library, and its augmentation.

This folder is also where users put the benchmarks: `data/ImageNet_LT/`, `data/iNaturalist18/`, `data/Places_LT/`,
`data/cifar-100-python/`.
"""

from data.batches import EvaluationBatch, FinishedBatches, TrainBatch
from data.loaders import evaluation_batches, training_batches
from data.reading import BrokenImageError, read_image
from data.splits import (
    CUSTOM,
    DATASETS,
    NUM_CLASSES,
    class_counts,
    class_labels,
    find_entry,
    load_long_tailed,
    recognise,
    undecoded,
)
from data.streams import ImageStream
from data.transforms import (
    AUGMENTATIONS,
    AUTO_AUGMENT,
    BROKEN,
    OnBrokenImage,
    evaluation_processor,
    evaluation_transform,
    leave_out_broken,
    train_transform,
)

__all__ = [
    "AUGMENTATIONS",
    "AUTO_AUGMENT",
    "BROKEN",
    "CUSTOM",
    "DATASETS",
    "NUM_CLASSES",
    "BrokenImageError",
    "EvaluationBatch",
    "FinishedBatches",
    "ImageStream",
    "OnBrokenImage",
    "TrainBatch",
    "class_counts",
    "class_labels",
    "evaluation_batches",
    "evaluation_processor",
    "evaluation_transform",
    "find_entry",
    "leave_out_broken",
    "load_long_tailed",
    "read_image",
    "recognise",
    "train_transform",
    "training_batches",
    "undecoded",
]
