"""What papers report for the network and the data of a model, if it was trained by an unchanged recipe."""

import json
import re

from data.sets import SPLIT_OPTIONS, data_options
from ride_bf.hub.dataset_names import told_options
from ride_bf.hub.run_files import SavedRun
from ride_bf.recipes import RECIPES


def published_for(saved: SavedRun) -> str | None:
    """The results of the papers for the recipe of a run; None if there are none, or if the run changed something.

    A run changes its recipe by an option of the recipe, by a teacher, and by an option of the data set.
    """
    recipe = RECIPES.get(saved.recipe.get("name"))
    if recipe is None or saved.settings.get("teacher") or recipe.differences(json.dumps(saved.recipe)):
        return None
    if saved.dataset != recipe.dataset or _given_data_options(saved):
        return None
    return published_results(recipe.description)


def _given_data_options(saved: SavedRun) -> set[str]:
    """Options that chose other images than those of the data set itself."""
    if saved.data is not None:
        return set(told_options(saved.data.options))
    names = {option.name for option in (*SPLIT_OPTIONS, *data_options().values())}  # an earlier version's checkpoint
    return {name for name in names if saved.settings.get(name)}


def published_results(description: str) -> str | None:
    """The results of the papers in a recipe's description, if it has any."""
    found = re.search(r"Published: ((?:RIDE|\d).*?)\s*(?:Cost:|$)", description, re.DOTALL)
    return " ".join(found.group(1).split()) if found else None
