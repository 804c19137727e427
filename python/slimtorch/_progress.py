# SPDX-License-Identifier: Apache-2.0
"""A bar on standard error for work that takes a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def shown(items: Iterable[Item], text: str, total: int | None = None) -> Iterator[Item]:
    """The same items, counted by a bar with `text` before it if standard error is a terminal.

    Args:
        total: how many there will be; None where nobody knows.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(text, total=total)
        for item in items:
            yield item
            bar.advance(task)
