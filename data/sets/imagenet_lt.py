"""ImageNet-LT. Liu et al.: Large-Scale Long-Tailed Recognition in an Open World, 2019."""

from collections.abc import Sequence

from data.sets._benchmark import Benchmark


def _names(synsets: Sequence[str]) -> list[str]:
    from data.annotation_lists import imagenet_names

    return imagenet_names(synsets)


DATA_SETS = (
    Benchmark(
        name="imagenet_lt",
        title="ImageNet-LT",
        description="Photographs from the web, each of a class of ImageNet: animals, plants, objects and scenes.",
        num_classes=1000,
        usual_place="data/ImageNet_LT",
        lists={"train": "ImageNet_LT_train.txt", "validation": "ImageNet_LT_val.txt", "test": "ImageNet_LT_test.txt"},
        images={"train": 115_846, "validation": 20_000, "test": 50_000},
        most=1280,
        least=5,
        class_names=_names,
        known_lists={"validation": "d5e93687a7752da6e8472ddad60d3133"},
        hub_ending=r"_n\d{8}",  # ILSVRC/imagenet-1k names n01440764_762.JPEG n01440764_762_n01440764.JPEG
    ),
)
