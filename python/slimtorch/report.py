# SPDX-License-Identifier: Apache-2.0
"""Tables: what every verb, measurement and experiment reports with.

A :class:`Table` is data (title, columns, rows, notes); how it looks is decided here and nowhere else.
"""

from __future__ import annotations

import io
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group

MAX_WIDTH = 100  # columns of a terminal; tables never need more


def format_number(value: float) -> str:
    """Up to four significant digits, thousands apart, no exponent between 1e-4 and 1e9."""
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude >= 1e9 or magnitude < 1e-4:
        return f"{value:.3g}"
    if magnitude >= 1000:
        return f"{value:,.0f}"
    digits = 3 - math.floor(math.log10(magnitude))
    return f"{value:.{min(digits, 6)}f}" if magnitude >= 1 else f"{value:.{max(digits - 1, 3)}f}"


def format_cell(value: object) -> str:
    """Text of one cell: numbers through :func:`format_number`, None as a dash, tuples as ``16x16``."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Real):
        return format_number(value)  # type: ignore[arg-type]
    if isinstance(value, (tuple, list)) and all(isinstance(item, int) for item in value):
        return "x".join(str(item) for item in value)
    return str(value)


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def format_bytes(count: float) -> str:
    """``1234567`` -> ``1.18 MiB``; powers of 1024."""
    size = float(count)
    if abs(size) < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if abs(size) < 1024 or unit == "GiB":
            break
    return f"{_three_digits(size)} {unit}"


def format_seconds(seconds: float) -> str:
    """``0.000123`` -> ``123 us``; the unit that leaves one to three digits before the point."""
    if math.isnan(seconds):
        return "nan"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds * 1e9)} ns"


@dataclass
class Table:
    """A titled table that prints itself in at most 100 columns.

    ``rows`` hold plain Python values, one per column; a row of another length raises ``ValueError``.
    ``str(table)`` is plain text without colour codes; ``rich.print(table)`` colours it on a terminal.
    """

    title: str
    columns: list[str]
    rows: list[list[object]]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"rows[{index}]: expected {len(self.columns)} cells, got {len(row)}")

    def _numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(isinstance(cell, numbers.Real) and not isinstance(cell, bool) for cell in cells)

    def _right_aligned(self, column: int) -> bool:
        """Numbers, also where they come as text with a unit sign or a dash between them."""
        texts = [format_cell(row[column]) for row in self.rows]
        return any(text[:1].isdigit() for text in texts) and all(
            text in ("", "-", "none", "nowhere") or text[:1].isdigit() or (text[:1] == "-" and text[1:2].isdigit())
            for text in texts
        )

    def __rich__(self) -> Group:
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        grid = RichTable(
            box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, show_header=any(self.columns)
        )
        for index, name in enumerate(self.columns):
            right = self._right_aligned(index)
            if right and len(name) > max(len(format_cell(row[index])) for row in self.rows):
                name = name.replace(" ", "\n")
            # Only words wrap: a number that is broken in two is a wrong number.
            grid.add_column(Text(name), justify="right" if right else "left", overflow="fold", no_wrap=right)
        for row in self.rows:
            grid.add_row(*(Text(format_cell(cell)) for cell in row))
        return Group(Text(self.title, style="bold"), grid, *(Text(note, style="dim") for note in self.notes))

    def __str__(self) -> str:
        from rich.console import Console

        buffer = io.StringIO()
        Console(file=buffer, width=MAX_WIDTH, color_system=None, force_terminal=False).print(self)
        return "\n".join(line.rstrip() for line in buffer.getvalue().strip("\n").splitlines())

    def to_dict(self) -> dict[str, object]:
        """``{"title", "columns", "rows", "notes"}``, ready for ``json.dumps``."""
        return {
            "title": self.title,
            "columns": list(self.columns),
            "rows": [[_jsonable(cell) for cell in row] for row in self.rows],
            "notes": list(self.notes),
        }

    def to_markdown(self) -> str:
        """The table in GitHub's Markdown, notes below it as one line each."""
        lines = ["| " + " | ".join(self.columns) + " |"]
        lines.append("|" + "|".join("---:" if self._numeric(i) else "---" for i in range(len(self.columns))) + "|")
        lines += ["| " + " | ".join(format_cell(cell) for cell in row) + " |" for row in self.rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])


def _jsonable(value: object) -> object:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else None  # JSON has neither NaN nor infinity
    if isinstance(value, Sequence):
        return [_jsonable(item) for item in value]
    return str(value)
