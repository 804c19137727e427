# SPDX-License-Identifier: Apache-2.0
"""Dynamic computation: networks that spend on each sample, or on each device, only what it needs.

Exits: in `EarlyExit` a sample that is sure leaves at a named point, and the batch shrinks.

Skipping: `DynamicDepth` computes a residual block only for the samples that its gate sends there; `StochasticDepth`
trains a network from which `drop_layers_` then leaves blocks out.
"""

from slimtorch.dynamic._calibrate import Calibration, Option
from slimtorch.dynamic._statistics import renew_statistics_
from slimtorch.dynamic.criteria import Criterion, Entropy, Learned, MaxProbability, Patience
from slimtorch.dynamic.depth import DepthReport, DepthRun, DynamicDepth, PooledGate
from slimtorch.dynamic.drop import DropReport, StochasticDepth, drop_layers_
from slimtorch.dynamic.early_exit import EarlyExit, Run, Segment, exit_loss

__all__ = [
    "Calibration",
    "Criterion",
    "DepthReport",
    "DepthRun",
    "DropReport",
    "DynamicDepth",
    "EarlyExit",
    "Entropy",
    "Learned",
    "MaxProbability",
    "Option",
    "Patience",
    "PooledGate",
    "Run",
    "Segment",
    "StochasticDepth",
    "drop_layers_",
    "exit_loss",
    "renew_statistics_",
]
