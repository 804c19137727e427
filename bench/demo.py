# SPDX-License-Identifier: Apache-2.0
"""Put a finished `slimtorch compare` into README.md: `python -m bench.demo FOLDER`.

Takes the folder that `make demo` wrote, keeps results.json under bench/results/compare and plots under docs/img,
and writes the summary table and the plots between README's demo markers.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from bench.results import RESULTS_DIR

ROOT = RESULTS_DIR.parent.parent
PLOTS = {
    "lenet300-speedup-sparsity.png": "LeNet-300-100: speed-up over the best dense code against sparsity",
    "lenet5-accuracy-latency.png": "LeNet-5: test accuracy against latency",
}
_SECTION = re.compile(r"<!-- demo:plot -->.*?<!-- /demo -->", re.DOTALL)


def section(results: dict[str, Any]) -> str:
    """The README's part: machine, summary table, notes and plots."""
    machine, table = results["machine"], results["tables"][-1]
    lines = [
        f"{machine['cpu']}, {machine['threads']} thread, {machine['dtype']}, kernels: {machine['isa']}, torch "
        f"{machine['torch']}; {results['settings']['seeds']} seeds. {table['title']}:",
        "",
        "| " + " | ".join(table["columns"]) + " |",
        "|" + "---|" * 2 + "---:|" * (len(table["columns"]) - 2),
        *("| " + " | ".join(map(str, row)) + " |" for row in table["rows"]),
        "",
        *table["notes"],
    ]
    for name, caption in PLOTS.items():
        lines += ["", f"![{caption}](docs/img/{name})"]
    return "\n".join(["<!-- demo:plot -->", "", *lines, "", "<!-- /demo -->"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("folder", type=Path, help="what `make demo` wrote")
    folder = parser.parse_args().folder
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    kept, images = RESULTS_DIR / "compare", ROOT / "docs" / "img"
    for target in (kept, images):
        target.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "results.json", kept / "results.json")
    for name in PLOTS:
        shutil.copy(folder / name, images / name)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if len(_SECTION.findall(text)) != 1:
        raise SystemExit(f"{readme}: expected <!-- demo:plot --> once, with <!-- /demo --> after it")
    readme.write_text(_SECTION.sub(lambda _: section(results), text), encoding="utf-8")
    print(f"wrote {readme}, {kept}, {images}")


if __name__ == "__main__":
    main()
