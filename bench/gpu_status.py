# SPDX-License-Identifier: Apache-2.0
"""Which CUDA kernels have run on a GPU as they are now, when, on what and how fast: `python -m bench.gpu_status`.

Read from the results of `make gpu` in bench/results/gpu, each of which names digests of the sources that it ran. A
kernel whose source has changed since has not run. Needs no GPU, and works where nothing was ever measured.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import sources
from bench.run import guarded
from slimtorch.report import Table

Json = dict[str, Any]

FOLDER = sources.ROOT / "bench/results/gpu"


@dataclass(frozen=True)
class Status:
    """What is known of one family's kernels.

    Attributes:
        digest: of the present source.
        ran: "yes", "an earlier source" or "never".
        date: of that run, and `device` it was on.
        passed, failed: tests of that run.
        slowest, fastest: times faster than cuBLAS or cuDNN, cold, in the worst and in the best case of that run.
        wanted, met: cases with a target, and how many reached it.
        kernels: those that were seen running in its benchmark.
    """

    family: str
    digest: str
    ran: str = "never"
    date: str | None = None
    device: str | None = None
    passed: int = 0
    failed: int = 0
    slowest: float | None = None
    fastest: float | None = None
    wanted: int = 0
    met: int = 0
    kernels: tuple[str, ...] = ()


def load(folder: Path) -> list[Json]:
    """Every file of results, the newest first. ValueError for one that is something else."""
    found = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("benchmark") != "gpu":
            raise ValueError(f"{path}: expected results of `make gpu`")
        found.append(content)
    return sorted(found, key=lambda content: str(content["date"]), reverse=True)


def _median(case: Json, roles: str) -> float | None:
    cold = [t["median"] for t in case.get("timings", ()) if t["role"] == roles and t["mode"] == "cold"]
    return float(cold[0]) if cold else None


def _ran(content: Json, family: str) -> bool:
    """Whether anything of a family was run in there: tests that passed or failed, or cases."""
    counts = content.get("tests", {}).get(family, {})
    return bool(counts.get("passed") or counts.get("failed")) or any(
        case["family"] == family for case in content["cases"]
    )


def status(family: str, results: Sequence[Json]) -> Status:
    """What the newest run of the present source says; without one, the newest of an earlier source."""
    digest = sources.kernel_digest(family)
    ran = [content for content in results if _ran(content, family)]
    same = [content for content in ran if content["kernels"].get(family) == digest]
    chosen = (same or ran or [None])[0]
    if chosen is None:
        return Status(family, digest)
    ratios: list[float] = []
    wanted = met = 0
    kernels: set[str] = set()
    for case in (case for case in chosen["cases"] if case["family"] == family):
        kernels.update(case.get("kernels", ()))
        ours, dense = _median(case, "ours"), _median(case, "dense")
        ratio = dense / ours if ours and dense else None
        if ratio is not None:
            ratios.append(ratio)
        if case.get("wanted"):
            wanted += 1
            met += ratio is not None and ratio >= case["wanted"]
    counts = chosen.get("tests", {}).get(family, {})
    return Status(
        family, digest, "yes" if same else "an earlier source", chosen["date"], chosen.get("device", {}).get("name"),
        counts.get("passed", 0), counts.get("failed", 0), min(ratios, default=None), max(ratios, default=None),
        wanted, met, tuple(sorted(kernels)),
    )  # fmt: skip


def table(found: Sequence[Status]) -> Table:
    rows: list[list[object]] = []
    for s in found:
        speed = None
        if s.slowest is not None and s.fastest is not None:
            speed = f"{_ratio(s.slowest)} - {_ratio(s.fastest)}"
        rows.append([
            s.family, s.digest[:12], s.ran, s.date and s.date[:10], s.device,
            f"{s.passed} of {s.passed + s.failed}" if s.passed + s.failed else None,
            speed, f"{s.met} of {s.wanted}" if s.wanted else None,
        ])  # fmt: skip
    columns = ["kernels", "source", "ran on a GPU", "when", "on", "tests passed", "x dense, cold", "targets met"]
    never = sum(s.ran != "yes" for s in found)
    notes = ["x dense: times faster than cuBLAS or cuDNN in the same dtype, in the worst and in the best case"]
    if never:
        notes.append(f"{never} of {len(found)} have not run on a GPU as they are now: `make gpu` on a machine with one")
    return Table("CUDA kernels on real GPUs", columns, rows, notes)


def _ratio(value: float) -> str:
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_status", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of results (default: bench/results/gpu)")
    parser.add_argument("--kernels", action="store_true", help="name the kernels that were seen running")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    found = [status(family, results) for results in [load(options.folder)] for family in sources.kernel_families()]
    if options.json:
        print(json.dumps([asdict(s) for s in found], indent=1))
        return 0
    print(table(found))
    for s in found if options.kernels else ():
        print(f"\n{s.family}: " + ("\n  ".join(["", *s.kernels]) if s.kernels else "none seen"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
