# SPDX-License-Identifier: Apache-2.0
"""Sizes that users give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast


def positive(value: object, name: str) -> int:
    """`value`; TypeError where it is no int, ValueError where it is below 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def divides(groups: int, channels: int, name: str, of: str) -> None:
    """ValueError where `groups` does not divide `channels`."""
    if channels % groups:
        raise ValueError(f"{name}: expected a divisor of {of}, {channels}, got {groups}")


def pair(value: int | Sequence[int], name: str, least: int = 1) -> tuple[int, int]:
    """Two ints, of one or two; TypeError or ValueError where they are none or below `least`."""
    both = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(both) != 2 or any(isinstance(item, bool) or not isinstance(item, int) for item in both):
        raise TypeError(f"{name}: expected an int or two, got {value!r}")
    if min(both) < least:
        raise ValueError(f"{name}: expected at least {least}, got {value!r}")
    return both[0], both[1]


def odd(value: object, name: str) -> int:
    """`value`; TypeError where it is no int, ValueError where it is even or below 1."""
    if positive(value, name) % 2 == 0:
        raise ValueError(f"{name}: expected an odd number, got {value}")
    return cast(int, value)


def ghost_channels(out_channels: int, ratio: int, cheap_kernel: int) -> tuple[int, int]:
    """Of `GhostConv2d`: channels of its dense convolution, and those that are made of them."""
    if positive(ratio, "ratio") > positive(out_channels, "out_channels"):
        raise ValueError(f"ratio: expected at most out_channels, {out_channels}, got {ratio}")
    odd(cheap_kernel, "cheap_kernel")
    own = -(-out_channels // ratio)
    return own, own * (ratio - 1)


def shuffle_channels(
    in_channels: int, out_channels: int, stride: int, groups: int, bottleneck: int | None, group_first: bool
) -> tuple[int, int]:
    """Of `ShuffleUnit`: channels between, and those that it makes anew."""
    for name, value in {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}.items():
        positive(value, name)
    if isinstance(stride, bool) or stride not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {stride!r}")
    if stride == 1 and in_channels != out_channels:
        raise ValueError(f"out_channels: expected {in_channels} as in_channels for stride 1, got {out_channels}")
    if stride == 2 and out_channels <= in_channels:
        raise ValueError(f"out_channels: expected more than the {in_channels} of the input, got {out_channels}")
    new = out_channels if stride == 1 else out_channels - in_channels
    if bottleneck is None:
        bottleneck = max(1, out_channels // 4 // groups) * groups
    divides(groups, positive(bottleneck, "bottleneck"), "groups", "bottleneck")
    divides(groups, new, "groups", "the new channels")
    if group_first:
        divides(groups, in_channels, "groups", "in_channels")
    return bottleneck, new
