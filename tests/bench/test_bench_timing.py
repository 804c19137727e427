# SPDX-License-Identifier: Apache-2.0
"""Samples interleave, statistics are right, and no wrong result is ever timed."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import pytest
import torch

from bench import contenders, timing
from bench.timing import Contender, Reference, Settings, WrongResultError, interleave, local, percentile
from tests.problems import ConvProblem, LinearProblem, Problem

LINEAR = LinearProblem("small", 5, 12, 20, 0.4)
CONV = ConvProblem("small", 2, 4, 6, 9, 8, stride=(2, 1), padding=(1, 1), density=0.4)


def clock(name: str, seconds_per_call: float, log: list[str]) -> Contender:
    """A contender whose samples take as long as they say, without waiting."""

    def sample(calls: int) -> float:
        log.append(name)
        return calls * seconds_per_call

    return Contender(name, "dense", name, lambda: torch.zeros(1), sample)


def test_percentile() -> None:
    values = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert [percentile(values, f) for f in (0.0, 0.25, 0.5, 0.9, 1.0)] == pytest.approx([1, 2, 3, 4.6, 5])
    assert percentile([7.0], 0.9) == 7.0


def test_interleave_takes_turns_and_fills_samples() -> None:
    log: list[str] = []
    fast, slow = clock("fast", 2**-20, log), clock("slow", 2**-10, log)
    timings = interleave([fast, slow], Settings(rounds=4, sample_seconds=2**-9), [0.0, 0.5])
    assert [t.median for t in timings] == [2**-20, 2**-10]
    assert [t.calls for t in timings] == [2048, 2]
    assert [t.samples for t in timings] == [4, 4]
    assert [t.error for t in timings] == [0.0, 0.5]
    rounds = log[-16:]  # one untimed call and one sample each, and the first place changes hands every round
    assert rounds == ["fast"] * 2 + ["slow"] * 4 + ["fast"] * 4 + ["slow"] * 4 + ["fast"] * 2


def test_interleave_restores_garbage_collection() -> None:
    def broken(calls: int) -> float:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        interleave([Contender("broken", "dense", "", lambda: torch.zeros(1), broken)], Settings(rounds=1), [0.0])
    assert gc.isenabled()


def test_local_counts_calls() -> None:
    calls = []
    contender = local("counted", "dense", "", lambda: calls.append(1) or torch.zeros(1))  # type: ignore[func-returns-value]
    assert contender.sample(7) > 0
    assert len(calls) == 7


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"sample_seconds": 0.0}, {"sample_seconds": math.nan}])
def test_bad_settings(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Settings(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("problem", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_reference_accepts_torch_and_nothing_worse(problem: Problem, dtype: torch.dtype) -> None:
    problem = replace(problem, dtype=dtype)
    reference = contenders.reference(problem)
    with torch.inference_mode():
        output = contenders.layer(problem)(problem.input())
    assert reference.verify("torch", output) < (1e-5 if dtype == torch.float32 else 1e-2)
    wrong = output.clone()
    wrong.view(-1)[3] += 0.05
    with pytest.raises(WrongResultError, match="wrong: error is"):
        reference.verify("wrong", wrong)
    wrong.view(-1)[3] = math.nan
    with pytest.raises(WrongResultError):
        reference.verify("nan", wrong)
    with pytest.raises(WrongResultError, match="shape"):
        reference.verify("flat", output.flatten())


def test_reference_of_nothing() -> None:
    empty = torch.zeros(0, 4, dtype=torch.float64)
    assert Reference(empty, empty).verify("empty", torch.zeros(0, 4)) == 0.0


@pytest.mark.parametrize("problem", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("blocks", [False, True])
def test_every_contender_of_this_process(problem: Problem, blocks: bool) -> None:
    timings, unavailable = contenders.time_problem(
        problem, Settings(rounds=2, sample_seconds=1e-5), blocks=blocks, threads=1, peers=None
    )
    names = [t.contender for t in timings]
    assert names[0] == ("slimtorch-block-sparse" if blocks else "slimtorch-sparse")
    assert {"slimtorch-sparse", "torch", "onednn"} <= set(names)
    assert {"mkl-csr", "torch-bsr"} >= set(unavailable) - {"mkl-prepacked", "onednn-prepacked"}
    assert all(0 < t.minimum <= t.p10 <= t.median <= t.p90 for t in timings)


def test_our_wrong_result_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        contenders,
        "_ours_sparse",
        lambda problem: local("slimtorch-sparse", "ours", "", lambda: torch.zeros(problem.m, problem.n)),
    )
    with pytest.raises(WrongResultError, match="slimtorch-sparse"):
        contenders.time_problem(LINEAR, Settings(rounds=1), blocks=False, threads=1, peers=None)


def test_a_rivals_wrong_result_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        contenders,
        "_mkl_csr",
        lambda problem: local("mkl-csr", "sparse", "", lambda: torch.zeros(problem.m, problem.n)),
    )
    timings, unavailable = contenders.time_problem(
        LINEAR, Settings(rounds=1, sample_seconds=1e-5), blocks=False, threads=1, peers=None, ours=False
    )
    assert "times what rounding explains" in unavailable["mkl-csr"]
    assert "mkl-csr" not in [t.contender for t in timings]
    assert timing.Timing is type(timings[0])
