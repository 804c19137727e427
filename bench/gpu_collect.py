# SPDX-License-Identifier: Apache-2.0
"""One file out of what the parts of `make gpu` left behind, after each of them: an interrupted run is a shorter one.

    python -m bench.gpu_collect FOLDER FILE

FOLDER holds `parts.tsv` (name, exit status, seconds, limit), pytest's `tests-*.xml`, `bench.json` of `bench.gpu` and
the logs. Needs nothing but Python, so that it can tell of a build that failed.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import sources

Json = dict[str, Any]

_MOST_FAILURES = 60
_LAST_LINES = 25


def parts(folder: Path) -> list[Json]:
    """What ran, how it ended, how long it took; the end of its log where it failed."""
    found = []
    file = folder / "parts.tsv"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        name, status, seconds, limit = line.split("\t")
        part: Json = {"name": name, "status": int(status), "seconds": float(seconds), "limit": float(limit)}
        part["result"] = {0: "passed", 124: "timed out", 137: "timed out"}.get(part["status"], "failed")
        if part["status"] == 77:
            part["result"] = "skipped"
        log = folder / f"{name}.log"
        if part["status"] and log.exists():
            part["log"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
        found.append(part)
    return found


def family_of(classname: str, name: str) -> str:
    """The family that a test is about: by its file, or by what it was called with."""
    module = re.search(r"test_(\w+)", classname)
    known = sorted(sources.kernel_families(), key=len, reverse=True)  # one name is part of another
    if module and module[1] in known:
        return module[1]
    if module and module[1] in ("intrinsics", "resources"):
        return "common"
    return next((family for family in known if family in name), "common")


def tests(folder: Path) -> dict[str, Json]:
    """Counts by family of the tests that ran on the GPU, and which failed."""
    found: dict[str, Json] = {}
    for path in sorted(folder.glob("tests-*.xml")):
        try:
            cases = list(ElementTree.parse(path).getroot().iter("testcase"))
        except ElementTree.ParseError:  # stopped while it was written
            continue
        for case in cases:
            classname, name = case.get("classname", ""), case.get("name", "")
            kinds = {child.tag for child in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            empty: Json = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
            counts = found.setdefault(family_of(classname, name), empty)
            counts[outcome] += 1
            if outcome == "failed" and len(counts["failures"]) < _MOST_FAILURES:
                message = next((child.get("message", "") for child in case if child.tag in ("failure", "error")), "")
                counts["failures"].append({"test": f"{classname}::{name}", "message": message[:300]})
    return found


def collect(folder: Path) -> Json:
    """Everything in one object."""
    benchmark = folder / "bench.json"
    content: Json = json.loads(benchmark.read_text(encoding="utf-8")) if benchmark.exists() else {"cases": []}
    device = folder / "device.json"
    if "device" not in content and device.exists():
        content["device"] = json.loads(device.read_text(encoding="utf-8"))
    content["benchmark"] = "gpu"
    content.setdefault("date", datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))
    content["kernels"] = {family: sources.kernel_digest(family) for family in sources.kernel_families()}
    content["parts"], content["tests"] = parts(folder), tests(folder)
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    folder, target = map(Path, sys.argv[1:] if arguments is None else arguments)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(".tmp")
    beside.write_text(json.dumps(collect(folder), indent=1) + "\n", encoding="utf-8")
    os.replace(beside, target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
