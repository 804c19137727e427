# SPDX-License-Identifier: Apache-2.0
"""Dynamic computation: networks that spend on each sample what it needs."""

from slimtorch.dynamic._calibrate import Calibration, Option
from slimtorch.dynamic.criteria import Criterion, Entropy, Learned, MaxProbability, Patience
from slimtorch.dynamic.early_exit import EarlyExit, Run, Segment, exit_loss

__all__ = [
    "Calibration",
    "Criterion",
    "EarlyExit",
    "Entropy",
    "Learned",
    "MaxProbability",
    "Option",
    "Patience",
    "Run",
    "Segment",
    "exit_loss",
]
