"""Places-LT."""

from dataclasses import replace

from ride_bf.recipes.imagenet_lt import IMAGENET_LT_RESNET50
from ride_bf.recipes.networks import RESNET152

PLACES_LT_RESNET152 = replace(
    IMAGENET_LT_RESNET50,
    name="places_lt_resnet152",
    description="""Places-LT, ResNet-152, three experts. The recipe is ours: neither paper's code has one for
Places-LT. It is the recipe of ImageNet-LT with a tenth of the learning rate.
Start it with --init_from from the same network trained
on ImageNet; classifiers of other classes are left out. Weights of other libraries cannot be used yet.
Published: nothing with BatchFormer. Cost: 98.5 M parameters and 14.2 M in the BatchFormer.""",
    dataset="places_lt",
    network={**RESNET152, "batchformer": "insert"},
    epochs=30,
    batch_size=128,
    learning_rate=0.01,
    lr_steps=(18, 24),
    reweight_epoch=24,
    batchformer_window=128,
)

RECIPES = (PLACES_LT_RESNET152,)
