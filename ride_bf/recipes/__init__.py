"""Training recipes by name, with a file for each data set.

`RECIPES` maps names to `TrainingRecipe`s. Derive a new recipe with `dataclasses.replace`, in the file of its data set.
The settings follow the configurations released with RIDE and BatchFormer, unless a description says otherwise. In
those runs the BatchFormer's window is one GPU's share of the batch, with 4 GPUs, 8 for ResNeXt-50 and iNaturalist, and
1 for CIFAR. Here the window holds the same number of images on any number of GPUs.
"""

from ride_bf.recipes import cifar_lt, digits_lt, imagenet_lt, inaturalist18, places_lt, pretrained
from ride_bf.recipes.recipe import TrainingRecipe

RECIPES: dict[str, TrainingRecipe] = {
    recipe.name: recipe
    for file in (digits_lt, cifar_lt, imagenet_lt, inaturalist18, places_lt, pretrained)
    for recipe in file.RECIPES
}
DEFAULT_RECIPE = digits_lt.DIGITS_LT_RESNET32.name
OWN_IMAGES_RECIPE = pretrained.PROBE.name

__all__ = ["DEFAULT_RECIPE", "OWN_IMAGES_RECIPE", "RECIPES", "TrainingRecipe"]
