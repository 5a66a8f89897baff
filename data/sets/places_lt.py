"""Places-LT. Liu et al.: Large-Scale Long-Tailed Recognition in an Open World, 2019."""

from data.sets._benchmark import Benchmark

DATA_SETS = (
    Benchmark(
        name="places_lt",
        title="Places-LT",
        description="Photographs of places and scenes, indoors and outdoors.",
        num_classes=365,
        usual_place="data/Places_LT",
        lists={"train": "Places_LT_train.txt", "validation": "Places_LT_val.txt", "test": "Places_LT_test.txt"},
        images={"train": 62_500, "validation": 7_300, "test": 36_500},
        most=4980,
        least=5,
        other_lists="There are two training lists of Places-LT; the published one has 62,500 images.",
    ),
)
