# SPDX-License-Identifier: Apache-2.0
"""Pruning: masks for weights, blocks, rows and columns; removal of neurons and channels; schedules."""

from slimtorch.prune import lottery, scratch
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
from slimtorch.prune.sensitivity import (
    Allocation,
    LatencyTable,
    ScanStopped,
    Sensitivity,
    allocate,
    sensitivity,
    time_layers,
)

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
    "Slots",
    "Snip",
    "Taylor",
    "WeightImportance",
    "allocate",
    "bake_",
    "lottery",
    "mask_like_",
    "masks",
    "prune_",
    "scratch",
    "sensitivity",
    "sparsity",
    "time_layers",
]
