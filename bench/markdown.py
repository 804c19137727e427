# SPDX-License-Identifier: Apache-2.0
"""How figures and tables are written in README and bench/results/tables.md."""

from __future__ import annotations

from collections.abc import Sequence


def ratio(value: float | None) -> str:
    """`0.53`, `4.7`, `12`, or a dash."""
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 0.995 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
