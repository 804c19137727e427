# SPDX-License-Identifier: Apache-2.0
"""Pruning: masks for weights, blocks, rows and columns; removal of neurons and channels; schedules."""

from slimtorch.prune import deconstruct, lottery, scratch, supermask
from slimtorch.prune._verb import prune_
from slimtorch.prune.importance import (
    L1,
    L2,
    APoZ,
    BatchNorm,
    Evidence,
    Fisher,
    Group,
    Importance,
    LifeLong,
    Movement,
    PathIntegral,
    Random,
    SecondOrder,
    Slots,
    Snip,
    Taylor,
    WeightImportance,
)
from slimtorch.prune.magnitude import Magnitude
from slimtorch.prune.mask import Mask, bake_, mask_like_, masks, sparsity
from slimtorch.prune.neurons import Neurons
from slimtorch.prune.report import PrunedLayer, PruneReport
from slimtorch.prune.schedule import Cubic, Iterative, OneShot, Pruner, Schedule

__all__ = [
    "L1",
    "L2",
    "APoZ",
    "BatchNorm",
    "Cubic",
    "Evidence",
    "Fisher",
    "Group",
    "Importance",
    "Iterative",
    "LifeLong",
    "Magnitude",
    "Mask",
    "Movement",
    "Neurons",
    "OneShot",
    "PathIntegral",
    "PruneReport",
    "PrunedLayer",
    "Pruner",
    "Random",
    "Schedule",
    "SecondOrder",
    "Slots",
    "Snip",
    "Taylor",
    "WeightImportance",
    "bake_",
    "deconstruct",
    "lottery",
    "mask_like_",
    "masks",
    "prune_",
    "scratch",
    "sparsity",
    "supermask",
]
