"""Long-tailed image data through the `datasets` library, and its augmentation.

This folder is also where users put the benchmarks: `data/ImageNet_LT/`, `data/iNaturalist18/`, `data/Places_LT/`,
`data/cifar-100-python/`.
"""

from data.splits import DATASETS, NUM_CLASSES, class_counts, class_labels, load_long_tailed
from data.transforms import AUGMENTATIONS, evaluation_processor, evaluation_transform, train_transform

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "NUM_CLASSES",
    "class_counts",
    "class_labels",
    "evaluation_processor",
    "evaluation_transform",
    "load_long_tailed",
    "train_transform",
]
