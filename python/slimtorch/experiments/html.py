# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML file: tables, figures and notes, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import numbers
from collections.abc import Sequence
from html import escape
from pathlib import Path

from slimtorch._files import write_atomically
from slimtorch.report import Table, format_cell

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem }
th { text-align: left; border-bottom: 2px solid #222; vertical-align: bottom } td, th { padding: .15rem .6rem .15rem 0 }
td { border-bottom: 1px solid #e4e4e4 } .number { text-align: right }
.scroll { overflow-x: auto } figure { margin: 1.5rem 0 } img { max-width: 100% }
figcaption, .note { color: #555; font-size: .85rem }
"""


def page(
    title: str,
    lead: str,
    tables: Sequence[Table],
    figures: Sequence[tuple[str, str]],
    lists: Sequence[tuple[str, Sequence[str]]],
) -> str:
    """The report as text.

    Args:
        title, lead: heading and first paragraph.
        tables: in order.
        figures: (caption, SVG text), in order, before the tables.
        lists: (heading, lines), after the tables; empty ones are left out.
    """
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>',
        f"<h1>{escape(title)}</h1><p>{escape(lead)}</p>",
    ]
    for caption, drawing in figures:
        data = base64.b64encode(drawing.encode()).decode()
        image = f'<img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
    parts += [_table(table) for table in tables]
    for heading, lines in lists:
        if lines:
            items = "".join(f"<li>{escape(line)}</li>" for line in lines)
            parts.append(f"<h2>{escape(heading)}</h2><ul>{items}</ul>")
    return "\n".join([*parts, "</body></html>\n"])


def _table(table: Table) -> str:
    def cell(value: object) -> str:
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        text = format_cell(value)
        number = number or text.replace(",", "").replace(".", "").replace("%", "").isdigit() or text == "-"
        return f"<td{' class=number' if number else ''}>{escape(text)}</td>"

    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in table.rows)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    heading = f"<h2>{escape(table.title)}</h2>"
    return (
        f'{heading}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}'
    )


def save(text: str, path: Path) -> None:
    """Write the report, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
