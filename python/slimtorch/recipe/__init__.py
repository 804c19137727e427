# SPDX-License-Identifier: Apache-2.0
"""Recipes: training and the verbs of this library in an order, from Python or one YAML file; killed, they go on.

    training     the loop of a training phase, which goes on from any step with the same result
    phases       what a recipe is made of
    checkpoints  the folder of a run
    run          the recipe itself
    report       accuracy, size, MACs and latency after each phase
    reading      YAML files, whose mistakes are told by line and key
"""

from slimtorch.recipe.phases import (
    Apply,
    Binarize,
    Calibrate,
    Cluster,
    Distill,
    Exits,
    Pack,
    Phase,
    Prune,
    Separate,
    Train,
    Work,
)
from slimtorch.recipe.reading import RecipeError, read
from slimtorch.recipe.report import PhaseReport, RecipeReport
from slimtorch.recipe.run import PhaseError, Recipe, RecipeResult

__all__ = [
    "Apply",
    "Binarize",
    "Calibrate",
    "Cluster",
    "Distill",
    "Exits",
    "Pack",
    "Phase",
    "PhaseError",
    "PhaseReport",
    "Prune",
    "Recipe",
    "RecipeError",
    "RecipeReport",
    "RecipeResult",
    "Separate",
    "Train",
    "Work",
    "read",
]
