# SPDX-License-Identifier: Apache-2.0
"""Layers and units that need fewer multiplications, and verbs that put them into a given model.


Layers: `DepthwiseSeparableConv2d`, `ShuffledGroupConv2d`, `GhostConv2d`; units: `Fire`, `InvertedResidual`,
`ShuffleUnit`. What each costs, in closed form: :mod:`slimtorch.design.costs`.
"""

from slimtorch.design import costs
from slimtorch.design.blocks import Fire, InvertedResidual, ShuffleUnit, channel_shuffle
from slimtorch.design.convolutions import DepthwiseSeparableConv2d, GhostConv2d, ShuffledGroupConv2d

__all__ = [
    "DepthwiseSeparableConv2d",
    "Fire",
    "GhostConv2d",
    "InvertedResidual",
    "ShuffleUnit",
    "ShuffledGroupConv2d",
    "channel_shuffle",
    "costs",
]
