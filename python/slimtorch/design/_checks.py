# SPDX-License-Identifier: Apache-2.0
"""Sizes that users give."""

from __future__ import annotations

from collections.abc import Sequence


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
