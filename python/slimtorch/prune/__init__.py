# SPDX-License-Identifier: Apache-2.0
"""Pruning: masks for weights, blocks, rows and columns; removal of neurons and channels; schedules."""

from slimtorch.prune import deconstruct, lottery, scratch, supermask, weight_agnostic
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
from slimtorch.prune.sensitivity import (
    Allocation,
    LatencyTable,
    ScanStopped,
    Sensitivity,
    allocate,
    sensitivity,
    time_layers,
)
from slimtorch.prune.slimming import SlimmingPenalty, SlimmingReport

__all__ = [
    "L1",
    "L2",
    "APoZ",
    "Allocation",
    "BatchNorm",
    "Cubic",
    "Evidence",
    "Fisher",
    "Group",
    "GroupLasso",
    "GroupReport",
    "Importance",
    "Iterative",
    "LatencyTable",
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
    "ScanStopped",
    "Schedule",
    "SecondOrder",
    "Sensitivity",
    "SlimmingPenalty",
    "SlimmingReport",
    "Slots",
    "Snip",
    "Taylor",
    "WeightImportance",
    "allocate",
    "bake_",
    "deconstruct",
    "lottery",
    "mask_like_",
    "masks",
    "prune_",
    "scratch",
    "sensitivity",
    "sparsity",
    "supermask",
    "time_layers",
    "weight_agnostic",
]
