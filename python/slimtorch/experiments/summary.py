# SPDX-License-Identifier: Apache-2.0
"""Values over seeds, in a few words."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def percent(values: Sequence[float]) -> str:
    """``5.12 ± 0.31`` in percent: mean and standard deviation over seeds (one seed: no deviation)."""
    return spread([100 * value for value in values], digits=2)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """``0.512 ± 0.031``: mean and standard deviation with so many digits after the point."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def mean_and_deviation(values: Sequence[float]) -> dict[str, Any]:
    """The same for JSON, with the values; one value has the deviation None."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


def over_seeds(count: int) -> str:
    """``5 seeds``, ``1 seed``."""
    return f"{count} seed{'' if count == 1 else 's'}"
