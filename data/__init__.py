"""Long-tailed image data through the `datasets` library, and its augmentation.

This folder is also where users put the benchmarks: `data/ImageNet_LT/`, `data/iNaturalist18/`, `data/Places_LT/`,
`data/cifar-100-python/`. The import is lazy: a module is imported when one of its names is first used.
"""

import importlib

_MODULES = {
    "augmentations": ("AUGMENTATIONS", "AUTO_AUGMENT"),
    "batches": ("EvaluationBatch", "FinishedBatches", "TrainBatch"),
    "columns": ("undecoded",),
    "folders": ("load_unlabelled",),
    "formats": ("MAX_IMAGE_PIXELS", "image_suffixes"),
    "loaders": ("evaluation_batches", "training_batches"),
    "reading": ("BrokenImageError", "read_image"),
    "sets": ("CUSTOM", "DATA_SETS", "DataSet"),
    "splits": ("class_counts", "class_labels", "find_entry", "list_facts", "load_long_tailed", "recognise"),
    "streams": ("ImageStream",),
    "transforms": (
        *("BROKEN", "OnBrokenImage", "evaluation_processor", "evaluation_transform", "leave_out_broken"),
        *("prepared_size", "train_transform"),
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["DATASETS", "NUM_CLASSES", *_MODULE_OF]


def __getattr__(name: str) -> object:
    if name == "DATASETS":
        return tuple(__getattr__("DATA_SETS"))
    if name == "NUM_CLASSES":  # only data sets whose number of classes is known in advance
        data_sets = __getattr__("DATA_SETS").items()
        return {key: data_set.num_classes for key, data_set in data_sets if data_set.num_classes is not None}
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
