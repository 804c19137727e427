# SPDX-License-Identifier: Apache-2.0
"""Pruning: masks for weights, blocks, rows and columns; removal of neurons and channels; schedules."""

from slimtorch.prune import lottery, scratch, weight_agnostic
from slimtorch.prune._verb import prune_
from slimtorch.prune.group_lasso import GroupLasso, GroupReport
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
from slimtorch.prune.slimming import SlimmingPenalty, SlimmingReport

__all__ = [
    "L1",
    "L2",
    "APoZ",
    "BatchNorm",
    "Cubic",
    "Evidence",
    "Fisher",
    "Group",
    "GroupLasso",
    "GroupReport",
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
    "SlimmingPenalty",
    "SlimmingReport",
    "Slots",
    "Snip",
    "Taylor",
    "WeightImportance",
    "bake_",
    "lottery",
    "mask_like_",
    "masks",
    "prune_",
    "scratch",
    "sparsity",
    "weight_agnostic",
]
