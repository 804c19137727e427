# SPDX-License-Identifier: Apache-2.0
"""Dynamic computation: networks that spend on each sample, or on each device, only what it needs.

Exits: in `EarlyExit` a sample that is sure leaves at a named point, and the batch shrinks.

Skipping: `DynamicDepth` computes a residual block only for the samples that its gate sends there; `StochasticDepth`
trains a network from which `drop_layers_` then leaves blocks out.

Widths: `Slimmable` (`slimmable_`) runs at several widths with one set of weights, and `export` takes one of them out.
"""

from slimtorch.dynamic._calibrate import Calibration, Option
from slimtorch.dynamic._statistics import renew_statistics_
from slimtorch.dynamic.criteria import Criterion, Entropy, Learned, MaxProbability, Patience
from slimtorch.dynamic.depth import DepthReport, DepthRun, DynamicDepth, PooledGate
from slimtorch.dynamic.drop import DropReport, StochasticDepth, drop_layers_
from slimtorch.dynamic.early_exit import EarlyExit, Run, Segment, exit_loss
from slimtorch.dynamic.slimmable import (
    Slimmable,
    SlimmableReport,
    WidthCost,
    at_width,
    export,
    recalibrate_,
    set_width,
    slimmable_,
    width_of,
    widths_of,
)
from slimtorch.dynamic.slimmable_layers import (
    Channels,
    SlimmableBatchNorm1d,
    SlimmableBatchNorm2d,
    SlimmableConv1d,
    SlimmableConv2d,
    SlimmableLinear,
)
from slimtorch.dynamic.slimmable_loss import sandwich_step, sandwich_widths, slimmable_loss

__all__ = [
    "Calibration",
    "Channels",
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
    "Slimmable",
    "SlimmableBatchNorm1d",
    "SlimmableBatchNorm2d",
    "SlimmableConv1d",
    "SlimmableConv2d",
    "SlimmableLinear",
    "SlimmableReport",
    "StochasticDepth",
    "WidthCost",
    "at_width",
    "drop_layers_",
    "exit_loss",
    "export",
    "recalibrate_",
    "renew_statistics_",
    "sandwich_step",
    "sandwich_widths",
    "set_width",
    "slimmable_",
    "slimmable_loss",
    "width_of",
    "widths_of",
]
