# SPDX-License-Identifier: Apache-2.0
"""The JSON that a benchmark writes: cases with their timings, the machine, the versions, the source.

Tables, plots and target checks read nothing else. Writing is atomic and happens after every case, so an interrupted run
leaves a valid file that the next run continues.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.timing import Role, Timing
from tests.problems import LinearProblem, Problem

SCHEMA = 1
RESULTS_DIR = Path(__file__).resolve().parent / "results"

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_ROLES: tuple[Role, ...] = ("ours", "dense", "dense-fp32", "sparse", "peer")


def describe(problem: Problem) -> dict[str, object]:
    """A problem's fields in JSON's types, with "kind" and "dense_flops"."""
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(problem).items()}
    fields["dtype"] = _DTYPES[problem.dtype]
    kind = "linear" if isinstance(problem, LinearProblem) else "conv"
    return {"kind": kind, **fields, "dense_flops": problem.dense_flops}


@dataclass(frozen=True)
class Case:
    """One problem at one thread count: who took how long, and who could not take part and why."""

    problem: dict[str, Any]
    threads: int
    timings: list[Timing]
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.problem["name"])

    @property
    def kind(self) -> str:
        return str(self.problem["kind"])

    @property
    def dtype(self) -> str:
        return str(self.problem["dtype"])

    @property
    def density(self) -> float:
        return float(self.problem["density"])

    @property
    def sparsity(self) -> float:
        return round(1 - self.density, 9)

    @property
    def rows(self) -> int | None:
        """Rows of x for a linear problem, None for a convolution."""
        return int(self.problem["m"]) if self.kind == "linear" else None

    @property
    def block_size(self) -> tuple[int, int]:
        height, width = self.problem["block_size"]
        return int(height), int(width)

    @property
    def key(self) -> str:
        """Identifies the case within one benchmark."""
        return json.dumps([self.problem, self.threads], sort_keys=True)

    def timing(self, contender: str) -> Timing | None:
        return next((timing for timing in self.timings if timing.contender == contender), None)

    def ours(self) -> Timing | None:
        """Our time in the format that the benchmark is about (the first of our contenders)."""
        return next((timing for timing in self.timings if timing.role == "ours"), None)

    def best(self, roles: Sequence[Role]) -> Timing | None:
        """The fastest contender among `roles`."""
        return min((t for t in self.timings if t.role in roles), key=lambda t: t.median, default=None)

    def best_dense(self, *, same_dtype: bool = False) -> Timing | None:
        """The fastest dense contender of torch; `same_dtype` leaves float32 out where the problem is bfloat16."""
        return self.best(("dense",) if same_dtype else ("dense", "dense-fp32"))

    def speedup(self, rival: Timing | None) -> float | None:
        """How many times faster we are than `rival`, by medians; None where either was not measured."""
        ours = self.ours()
        return None if ours is None or rival is None else rival.median / ours.median


@dataclass
class Results:
    """One benchmark's file."""

    benchmark: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    source: dict[str, Any]
    settings: dict[str, Any]
    complete: bool
    cases: list[Case]
    path: Path | None = None  # where it was read from

    @property
    def stem(self) -> str:
        return self.path.stem if self.path else self.benchmark

    def same_setup(self, other: Results) -> bool:
        """Whether cases of both may stand in one file."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("benchmark", "machine", "versions", "source", "settings")
        )

    def to_dict(self) -> dict[str, object]:
        content = asdict(self)
        del content["path"]
        return {"schema": SCHEMA, **content}

    def save(self, path: Path) -> None:
        """Write `path` atomically: a crash leaves the file as it was."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1)
        # A timing fills one line: diffs of committed results stay readable.
        text = re.sub(
            r"\{\s+(\"contender\".*?)\s+\}", lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}", text, flags=re.S
        )
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that :meth:`save` wrote; ValueError naming file and field where it is anything else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"{path}: expected benchmark results of schema {SCHEMA}")
        try:
            cases = [
                Case(
                    problem=dict(case["problem"]),
                    threads=int(case["threads"]),
                    timings=[Timing(**timing) for timing in case["timings"]],
                    unavailable=dict(case["unavailable"]),
                )
                for case in content["cases"]
            ]
            results = cls(
                benchmark=content["benchmark"],
                date=content["date"],
                machine=content["machine"],
                versions=content["versions"],
                source=content["source"],
                settings=content["settings"],
                complete=content["complete"],
                cases=cases,
                path=path,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged benchmark results ({error!r})") from error
        for case in cases:
            for timing in case.timings:
                if timing.role not in _ROLES or not timing.median > 0:
                    raise ValueError(f"{path}: damaged timing of {timing.contender} in {case.name}")
        return results


def load_all(folder: Path = RESULTS_DIR) -> list[Results]:
    """Every file of results in `folder`: unstructured before blocks, then by name."""
    every = [Results.load(path) for path in sorted(folder.glob("*.json"))]
    return sorted(every, key=lambda results: results.benchmark != "sparse")
