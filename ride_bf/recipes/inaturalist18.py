"""iNaturalist 2018."""

from dataclasses import replace

from ride_bf.recipes.imagenet_lt import IMAGENET_LT_RESNET50
from ride_bf.recipes.variants import distilled, one_expert, ride_alone, router

INATURALIST18_RESNET50 = replace(
    IMAGENET_LT_RESNET50,
    name="inaturalist18_resnet50",
    description="""iNaturalist 2018, ResNet-50, three experts.
Published: 74.1 (many 65.5, medium 74.5, few 75.8); RIDE alone 72.5 (68.1, 72.7, 73.2). BatchFormer's README. The
authors chose their best epoch on the test images; here nothing is chosen on them.
Cost: 5.77 G multiply-adds an image, 76.6 M parameters and 14.2 M in the BatchFormer.""",
    dataset="inaturalist18",
    augmentation="inaturalist",
    image_mean=(0.466, 0.471, 0.380),
    image_std=(0.195, 0.194, 0.192),
    batch_size=128,
    learning_rate=0.2,
    reweight_factor=0.015,
    batchformer_window=16,
)

RECIPES = (
    INATURALIST18_RESNET50,
    ride_alone(INATURALIST18_RESNET50),
    one_expert(INATURALIST18_RESNET50, "cross_entropy"),
    distilled(INATURALIST18_RESNET50, batch_size=512, batchformer_window=64),
    router(INATURALIST18_RESNET50, top_k=50),
)
