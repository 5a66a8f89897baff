"""Places-LT."""

from dataclasses import replace

from ride_bf.recipes.imagenet_lt import IMAGENET_LT_RESNET50

PLACES_LT_RESNET152 = replace(
    IMAGENET_LT_RESNET50,
    name="places_lt_resnet152",
    description="""Places-LT, three experts on a ResNet-152 that was trained on ImageNet, as methods on Places-LT start.
The experts share the first three stages, and each has its own copy of the last one. The stages have the full width of
the public weights, not RIDE's narrower one. The recipe is ours: neither paper's code has one for Places-LT. It is the
recipe of ImageNet-LT with a tenth of the learning rate.
Published: nothing with BatchFormer. Cost: 13.1 G multiply-adds an image, 90.3 M parameters and 25.2 M in the
BatchFormer.""",
    dataset="places_lt",
    backbone="microsoft/resnet-152",
    network={"num_experts": 3, "num_expert_layers": 1, "classifier": "cosine", "batchformer": "insert"},
    image_size=None,
    epochs=30,
    batch_size=128,
    learning_rate=0.01,
    lr_steps=(18, 24),
    reweight_epoch=24,
    batchformer_window=128,
)

RECIPES = (PLACES_LT_RESNET152,)
