# SPDX-License-Identifier: Apache-2.0
"""docs/experiments.md: what `slimtorch experiment NAME` found, its tables and plots made from the committed JSON.

The page holds `<!-- bench:NAME -->` ... `<!-- /bench -->` for experiments whose module has `tables(found)` and
`figures(found)`; `found` is bench/results/experiments/NAME.json. A plot carries the digest of what it was drawn from.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtorch.experiments import plots
from slimtorch.experiments.catalogue import EXPERIMENTS
from slimtorch.experiments.machine import headline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKER = re.compile(r"<!-- bench:([a-z0-9-]+) -->")


def sections(page: str) -> list[str]:
    """Names of the experiments that a page shows; ValueError for a name that no experiment has."""
    names = _MARKER.findall(page)
    for name in names:
        if name not in EXPERIMENTS:
            raise ValueError(f"<!-- bench:{name} -->: expected an experiment, one of {', '.join(EXPERIMENTS)}")
    return names


def found(name: str, folder: Path) -> dict[str, Any] | None:
    """What the experiment found, as committed."""
    path = folder / "experiments" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def section(name: str, results: dict[str, Any], images: str) -> str:
    """Tables with their notes, then plots; `images` is the folder of the plots, seen from the page."""
    module = _module(name)
    parts = [f"On {results['data']}. {headline(results['machine'])}."]
    for table in module.tables(results):
        parts += [f"**{table.title}**", table.to_markdown()]
    parts += [f"![{caption}]({images}/{file}.png)\n\n*{caption}*" for file, caption, _ in module.figures(results)]
    return "\n\n".join(parts)


def stale_plots(name: str, results: dict[str, Any], folder: Path) -> list[tuple[Path, Figure]]:
    """Plots of an experiment that are not there, or were drawn from other results."""
    from PIL import Image

    digest = _digest(results)
    stale = []
    for file, _, figure in _module(name).figures(results):
        path = folder / f"{file}.png"
        if path.exists():
            with Image.open(path) as image:
                if image.info.get("Source") == digest:
                    continue
        stale.append((path, figure))
    return stale


def draw(results: dict[str, Any], path: Path, figure: Figure) -> None:
    """Writes a plot with the digest of what it shows."""
    plots.save_png(figure, path, {"Source": _digest(results)})


def _module(name: str) -> Any:
    return importlib.import_module(f"slimtorch.experiments.{EXPERIMENTS[name][0]}")


def _digest(results: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()
