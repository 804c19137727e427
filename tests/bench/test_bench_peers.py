# SPDX-License-Identifier: Apache-2.0
"""The other side of the pipe may be missing, wrong, slow or dead: the benchmark goes on without it and says why."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest
import torch

from bench import contenders
from bench.peers import PeerError, Peers, Worker
from bench.timing import Settings
from tests.problems import ConvProblem, LinearProblem

PROBLEM = LinearProblem("small", 3, 8, 10, 0.5)
SETTINGS = Settings(rounds=2, sample_seconds=1e-5)

# Speaks the worker's protocol with numpy as its engine; misbehaves where its mode says so.
FAKE = """
import json, os, sys
import numpy
engine = sys.argv[2]
mode = {mode!r} if engine == "deepsparse" else ""
for line in sys.stdin:
    request = json.loads(line)
    answer = {{}}
    if request["do"] == "hello":
        answer = {{"versions": {{engine: "1.0"}}, "about": "fake"}}
    elif request["do"] == "load":
        problem = numpy.load(request["problem"])
        y = problem["x"] @ problem["weight"].T + problem["bias"]
    elif request["do"] == "run":
        numpy.save(request["to"], y + (mode == "wrong"))
    elif request["do"] == "sample":
        if mode == "dies":
            os._exit(3)
        if mode == "hangs":
            sys.stdin.readline()
        answer = {{"seconds": 1e-6 * request["calls"]}}
    print(json.dumps(answer), flush=True)
"""


def fake_python(folder: Path, mode: str = "") -> Path:
    """An executable that stands for the environment's Python."""
    worker = folder / "worker.py"
    worker.write_text(FAKE.format(mode=mode), encoding="utf-8")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" "{worker}" "$@"\n', encoding="utf-8")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


def time_with(peers: Peers, problem: LinearProblem = PROBLEM) -> tuple[dict[str, float], dict[str, str]]:
    timings, unavailable = contenders.time_problem(problem, SETTINGS, blocks=False, threads=1, peers=peers, ours=False)
    return {t.contender: t.median for t in timings}, unavailable


def test_without_an_environment(tmp_path: Path) -> None:
    with Peers(tmp_path / "nowhere" / "python") as peers:
        assert set(peers.missing) == {"deepsparse", "onnxruntime"}
        times, unavailable = time_with(peers)
    assert "torch" in times
    assert "make peers" in unavailable["deepsparse"]


def test_an_environment_without_the_engines(tmp_path: Path) -> None:
    # -S: no site-packages, so neither numpy nor an engine, whatever is installed here.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    with Peers(python) as peers:
        assert "ModuleNotFoundError" in peers.missing["onnxruntime"]
        assert not peers.versions


def test_peers_are_timed(tmp_path: Path) -> None:
    with Peers(fake_python(tmp_path)) as peers:
        assert peers.versions == {"deepsparse": "1.0", "onnxruntime": "1.0"}
        times, unavailable = time_with(peers)
        assert times["deepsparse"] == pytest.approx(1e-6)
        half, reasons = time_with(peers, LinearProblem("half", 3, 8, 10, 0.5, torch.bfloat16))
    assert not {"deepsparse", "onnxruntime"} & set(unavailable)
    assert "float32 only" in reasons["deepsparse"]
    assert "deepsparse" not in half


@pytest.mark.parametrize(("mode", "reason"), [("wrong", "rounding"), ("dies", "code 3")])
def test_one_peer_fails_the_rest_goes_on(tmp_path: Path, mode: str, reason: str) -> None:
    with Peers(fake_python(tmp_path, mode)) as peers:
        for _ in range(2):  # the second problem meets a new process
            times, unavailable = time_with(peers)
            assert reason in unavailable["deepsparse"]
            assert {"torch", "onnxruntime"} <= set(times)
            assert "deepsparse" not in times


def test_a_peer_that_does_not_answer(tmp_path: Path) -> None:
    worker = Worker("deepsparse", fake_python(tmp_path, "hangs"), threads=1, timeout=0.5)
    try:
        with pytest.raises(PeerError, match="no answer within"):
            worker.ask(do="sample", calls=1)
        with pytest.raises(PeerError):  # it was ended
            worker.ask(do="hello")
    finally:
        worker.close()


def test_threads_are_those_the_workers_have(tmp_path: Path) -> None:
    with Peers(fake_python(tmp_path), threads=1) as peers, pytest.raises(ValueError, match="threads"):
        contenders.time_problem(PROBLEM, SETTINGS, blocks=False, threads=2, peers=peers, ours=False)


def test_convolutions_are_described_to_the_worker(tmp_path: Path) -> None:
    import numpy as np

    problem = ConvProblem("small", 1, 2, 3, 5, 6, stride=(2, 1), padding=(1, 0))
    with Peers(fake_python(tmp_path)) as peers, np.load(peers._write(problem)) as file:
        content = {name: file[name] for name in file.files}
    assert str(content["kind"]) == "conv"
    assert content["stride"].tolist() == [2, 1]
    assert content["output_size"].tolist() == list(problem.output_size)
    assert np.array_equal(content["weight"], problem.weight().numpy())
