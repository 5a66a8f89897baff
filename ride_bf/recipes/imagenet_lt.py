"""ImageNet-LT."""

from dataclasses import replace

from ride_bf.recipes.networks import RESNET10, RESNET50, RESNEXT50
from ride_bf.recipes.recipe import TrainingRecipe
from ride_bf.recipes.variants import distilled, one_expert, ride_alone, router

IMAGENET_LT_RESNET10 = TrainingRecipe(
    name="imagenet_lt_resnet10",
    description="""ImageNet-LT, ResNet-10, three experts.
Published: 45.7 (many 56.3, medium 42.1, few 28.3); RIDE alone 44.7 (57.0, 40.3, 25.5). BatchFormer's README.
Cost: 1.17 G multiply-adds an image, 9.4 M parameters and 0.9 M in the BatchFormer.""",
    dataset="imagenet_lt",
    network={**RESNET10, "batchformer": "insert"},
    epochs=120,
    batch_size=512,
    lr_steps=(60, 80),
    reweight_factor=0.02,
    reweight_epoch=80,
    batchformer_window=128,
)


IMAGENET_LT_RESNET50 = replace(
    IMAGENET_LT_RESNET10,
    name="imagenet_lt_resnet50",
    description="""ImageNet-LT, ResNet-50, three experts. The authors trained on 4 GPUs, each with a
window of 100 images.
Published: 54.1 (many 64.3, medium 51.4, few 35.1); RIDE alone 53.6 (64.9, 50.4, 33.2). BatchFormer's README.
Cost: 5.77 G multiply-adds an image, 43.7 M parameters and 14.2 M in the BatchFormer.""",
    network={**RESNET50, "batchformer": "insert"},
    epochs=100,
    batch_size=400,
    batchformer_window=100,
)


IMAGENET_LT_RESNEXT50 = replace(
    IMAGENET_LT_RESNET50,
    name="imagenet_lt_resnext50",
    description="""ImageNet-LT, ResNeXt-50 32x4d, three experts, one stage.
Published: 56.5 (many 66.6, medium 54.2, few 36.0); RIDE alone 55.9 (67.3, 52.8, 34.6). BatchFormer's README.
Cost: 6.05 G multiply-adds an image, 42.9 M parameters and 14.2 M in the BatchFormer.""",
    network={**RESNEXT50, "batchformer": "insert"},
    batch_size=256,
    batchformer_window=32,
)

RECIPES = (
    IMAGENET_LT_RESNET10,
    IMAGENET_LT_RESNET50,
    IMAGENET_LT_RESNEXT50,
    ride_alone(IMAGENET_LT_RESNET10, batch_size=256, epochs=100),
    one_expert(IMAGENET_LT_RESNET10, "cross_entropy"),
    distilled(IMAGENET_LT_RESNET10, batch_size=256, epochs=100, batchformer_window=64),
    router(IMAGENET_LT_RESNET10, top_k=30),
    ride_alone(IMAGENET_LT_RESNET50),
    one_expert(IMAGENET_LT_RESNET50, "cross_entropy"),
    distilled(IMAGENET_LT_RESNET50, batch_size=256, batchformer_window=64),
    router(IMAGENET_LT_RESNET50, top_k=50),
    ride_alone(IMAGENET_LT_RESNEXT50),
    one_expert(IMAGENET_LT_RESNEXT50, "cross_entropy"),
    distilled(IMAGENET_LT_RESNEXT50),
    router(IMAGENET_LT_RESNEXT50, top_k=50),
)
