"""iNaturalist 2018. Van Horn et al.: The iNaturalist Species Classification and Detection Dataset, 2018."""

from data.sets._benchmark import Benchmark

DATA_SETS = (
    Benchmark(
        name="inaturalist18",
        title="iNaturalist 2018",
        description="Photographs of living things, taken by the users of iNaturalist.",
        num_classes=8142,
        usual_place="data/iNaturalist18",
        lists={"train": "iNaturalist18_train.txt", "test": "iNaturalist18_val.txt"},
        images={"train": 437_513, "test": 24_426},
        most=1000,
        least=2,
        other_lists="The iNaturalist data sets of other years, such as 2021, have other lists.",
    ),
)
