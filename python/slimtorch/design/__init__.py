# SPDX-License-Identifier: Apache-2.0
"""Layers and units that need fewer multiplications, and verbs that put them into a given model.

    separate_   convolutions → depthwise and 1x1, started from their weights, where faster or smaller

Layers: `DepthwiseSeparableConv2d`, `ShuffledGroupConv2d`, `GhostConv2d`; units: `Fire`, `InvertedResidual`,
`ShuffleUnit`. What each costs, in closed form: :mod:`slimtorch.design.costs`.
"""

from slimtorch.design import costs
from slimtorch.design._replace import ReplacedLayer, ReplaceReport
from slimtorch.design.blocks import Fire, InvertedResidual, ShuffleUnit, channel_shuffle
from slimtorch.design.convolutions import DepthwiseSeparableConv2d, GhostConv2d, ShuffledGroupConv2d
from slimtorch.design.separate import Separable, separate_

__all__ = [
    "DepthwiseSeparableConv2d",
    "Fire",
    "GhostConv2d",
    "InvertedResidual",
    "ReplaceReport",
    "ReplacedLayer",
    "Separable",
    "ShuffleUnit",
    "ShuffledGroupConv2d",
    "channel_shuffle",
    "costs",
    "separate_",
]
