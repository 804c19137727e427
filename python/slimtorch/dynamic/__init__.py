# SPDX-License-Identifier: Apache-2.0
"""Dynamic computation: networks that spend on each sample, or on each device, only what it needs.

Skipping: `DynamicDepth` computes a residual block only for the samples that its gate sends there; `StochasticDepth`
trains a network from which `drop_layers_` then leaves blocks out.
"""

from slimtorch.dynamic._statistics import renew_statistics_
from slimtorch.dynamic.depth import DepthReport, DepthRun, DynamicDepth, PooledGate
from slimtorch.dynamic.drop import DropReport, StochasticDepth, drop_layers_

__all__ = [
    "DepthReport",
    "DepthRun",
    "DropReport",
    "DynamicDepth",
    "PooledGate",
    "StochasticDepth",
    "drop_layers_",
    "renew_statistics_",
]
