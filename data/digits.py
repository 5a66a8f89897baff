"""Digits-LT: scikit-learn's handwritten digits with a long tail. Real scans that need no download."""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PilImage

TRAIN_COUNTS = tuple(round(120 * 0.02 ** (label / 9)) for label in range(10))  # 120 78 50 33 21 14 9 6 4 2
TEST_PER_CLASS = 50
# The largest class has 178 images: 120 for training and 50 for the test leave 8.
VALIDATION_PER_CLASS = 8


def load_digits_lt() -> DatasetDict:
    """Loads the fixed splits: 337 training images, 120 to 2 in a class, and 8 validation and 50 test images a class.

    The images are ordered by `numpy.random.default_rng(0).permutation`. The first 50 of each class are the test split,
    the next 8 are the validation split, and training images follow. They are 8x8 and grey. Source: the test set of
    Alpaydin and Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    picked: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for label, train_count in enumerate(TRAIN_COUNTS):
        members = order[digits.target[order] == label]
        validation_end = TEST_PER_CLASS + VALIDATION_PER_CLASS
        picked["test"] += members[:TEST_PER_CLASS].tolist()
        picked["validation"] += members[TEST_PER_CLASS:validation_end].tolist()
        picked["train"] += members[validation_end : validation_end + train_count].tolist()

    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # ink is 0 to 16 in the source
    features = Features({"image": Image(), "label": ClassLabel(names=[str(label) for label in range(10)])})
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {
                    "image": [PilImage.fromarray(pixels[index]) for index in indices],
                    "label": digits.target[indices].tolist(),
                },
                features=features,
            )
            for split, indices in picked.items()
        }
    )
