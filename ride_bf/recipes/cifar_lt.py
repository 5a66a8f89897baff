"""CIFAR-100-LT and CIFAR-10-LT."""

from dataclasses import replace

from ride_bf.recipes.networks import RESNET32
from ride_bf.recipes.recipe import TrainingRecipe
from ride_bf.recipes.variants import distilled, one_expert, ride_alone, router

CIFAR100_LT_RESNET32 = TrainingRecipe(
    name="cifar100_lt_resnet32",
    description="""CIFAR-100-LT, imbalance factor 100. Others: --imbalance_factor 10, 50 or 200, --imbalance_type step.
The schedule and losses are RIDE's. The BatchFormer shares the classifier; the authors report that it collapses here
otherwise.
Published: RIDE with expert assignment 48.6 (many 67.0, medium 49.9, few 25.7), from RIDE's model zoo; nothing is
published for RIDE with BatchFormer. The authors report the epoch that was best on the test images.
Cost: 0.100 G multiply-adds an image, 0.8 M parameters and 0.01 M in the BatchFormer.""",
    dataset="cifar100_lt",
    network={**RESNET32, "batchformer": "shared_classifier"},
    image_size=32,
    resize_size=32,
    augmentation="cifar",
    image_mean=(0.4914, 0.4822, 0.4465),
    image_std=(0.2023, 0.1994, 0.2010),
    epochs=200,
    batch_size=128,
    weight_decay=5e-4,
    lr_steps=(160, 180),
    lr_gamma=0.01,
    diversity_factor=-0.45,
    reweight_epoch=160,
    batchformer_window=128,
)


CIFAR10_LT_RESNET32 = replace(
    CIFAR100_LT_RESNET32,
    name="cifar10_lt_resnet32",
    description="""CIFAR-10-LT, imbalance factor 100, with the settings of CIFAR-100-LT.
Published: nothing for RIDE with BatchFormer. Cost: as CIFAR-100-LT.""",
    dataset="cifar10_lt",
)

_CIFAR_LDAM = {"weight_decay": 2e-4, "nesterov": False}  # the settings of LDAM's authors

RECIPES = (
    CIFAR100_LT_RESNET32,
    CIFAR10_LT_RESNET32,
    ride_alone(CIFAR100_LT_RESNET32),
    one_expert(CIFAR100_LT_RESNET32, "cross_entropy", **_CIFAR_LDAM),
    one_expert(CIFAR100_LT_RESNET32, "ldam", **_CIFAR_LDAM),
    distilled(CIFAR100_LT_RESNET32, warmup_epochs=20),
    router(CIFAR100_LT_RESNET32, top_k=30),
)
