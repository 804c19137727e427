# SPDX-License-Identifier: Apache-2.0
"""The benchmark on a GPU and what is told of it, as far as that shows without a GPU."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_collect, gpu_status, sources
from bench.gpu import CASES, Case, Contender, contenders, ideal, prepare
from bench.timing import Reference
from tests.problems import ConvProblem

CPU = torch.device("cpu")
FAMILIES = sources.kernel_families()
ROOFS = {"bytes": 3e12, "float16": 7e14, "bfloat16": 7e14, "float32": 5e13, "bit": 8e15}

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def small(case: Case) -> Case:
    """A case of the same kind that a CPU computes in no time."""
    if case.conv is None:
        return replace(case, m=min(case.m, 16), n=128, k=256)
    conv = ConvProblem("small", 1, 32, 64, 8, 8, case.conv.kernel, padding=case.conv.padding)
    return replace(case, m=64, n=64, k=conv.columns, conv=conv)


def kinds() -> list[Case]:
    seen: dict[object, Case] = {}
    for case in CASES:
        key = (case.family, case.dtype, case.conv is None, case.binarize_input, case.packed_input, case.bits)
        seen.setdefault(key, small(case))
    return list(seen.values())


# ---- the benchmark ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:slimtorch.*has no kernel for torch.float16 on cpu")
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize("case", kinds(), ids=lambda case: f"{case.family} {case.name}")
def test_every_kind_of_case_is_packed_and_verified(case: Case) -> None:
    with torch.inference_mode():
        work = prepare(case, CPU)
        ready, unavailable = contenders(work)
    assert [c.role for c in ready][:2] == ["ours", "dense"]
    assert {c.name for c in ready} | set(unavailable) >= {"slimtorch", "torch-bsr", "2:4", "torch-int4"}
    if case.density < 1:  # one of eight blocks at the least
        assert float((work.dense != 0).double().mean()) == pytest.approx(case.density, abs=0.03)
    kind, seconds = ideal(work, ROOFS, 1.0)
    assert kind in ("dense x density", "bytes", "peak")
    assert seconds > 0
    json.dumps(case.describe())


def test_a_wrong_result_of_ours_is_no_time() -> None:
    case = small(next(c for c in CASES if c.family == "sparse" and c.dtype == torch.float32))
    with torch.inference_mode():
        work = prepare(case, CPU)
        work.ours = lambda: torch.zeros(case.m, case.n)
        with pytest.raises(gpu.WrongResultError, match="slimtorch"):
            contenders(work)


def test_names_are_different_and_targets_are_those_of_the_list() -> None:
    names = [f"{case.family} {case.name}" for case in CASES]
    assert len(set(names)) == len(names)
    wanted = {(case.family, case.wanted) for case in CASES if case.wanted}
    assert wanted >= {
        ("block_sparse", 7.0), ("sparse", 1.66), ("sparse", 2.5), ("sparse", 4.0), ("sparse", 3.4), ("sparse", 5.4),
        ("binary", 6.0), ("codebook", 3.5), ("codebook", 1.0),
    }  # fmt: skip


class FakeClock:
    """Our call takes 1 ms, anything else 3; warm ones half of that."""

    def __init__(self) -> None:
        self.graphs: dict[tuple[str, int], Any] = {}

    def _seconds(self, call: Any) -> float:
        return 1e-3 if call() is OURS else 3e-3

    def cold(self, call: Any) -> float:
        return self._seconds(call)

    def eager(self, call: Any, calls: int) -> float:
        return self._seconds(call)

    def capture(self, name: str, call: Any, calls: int) -> None:
        if name == "peer":
            raise RuntimeError("cannot be captured")
        self.graphs[name, calls] = call

    def graph(self, name: str, calls: int) -> float:
        return self._seconds(self.graphs[name, calls]) / 2


OURS, THEIRS = torch.ones(2), torch.ones(2)


def test_everybody_is_timed_in_every_way() -> None:
    expected = Reference(torch.ones(2).double(), torch.zeros(2))
    ready = [
        Contender("slimtorch", "ours", "", lambda: OURS, expected),
        Contender("cublas", "dense", "", lambda: THEIRS, expected),
        Contender("peer", "peer", "", lambda: THEIRS, expected),
    ]
    timings, unavailable = gpu.time_all(FakeClock(), ready, 5)  # type: ignore[arg-type]
    medians = {(t.contender, t.mode): t.median for t in timings}
    assert medians["slimtorch", "cold"] == medians["slimtorch", "eager"] == 1e-3
    assert medians["slimtorch", "graph"] == 5e-4
    assert medians["cublas", "cold"] == 3e-3
    assert ("peer", "graph") not in medians
    assert "cannot be captured" in unavailable["peer in a graph"]
    assert all(t.samples == 5 for t in timings)


# ---- what is made of it ----------------------------------------------------------------------------------------------


def case_of(family: str, ours: float, dense: float, wanted: float | None = None) -> dict[str, Any]:
    def timing(name: str, role: str, mode: str, seconds: float) -> dict[str, Any]:
        return {"contender": name, "role": role, "mode": mode, "median": seconds}

    timings = [
        timing(name, role, mode, seconds)
        for name, role, seconds in (("slimtorch", "ours", ours), ("cublas", "dense", dense), ("2:4", "peer", 2 * ours))
        for mode in ("cold", "graph", "eager")
    ]
    reached = {"kind": "bytes", "seconds": ours / 2, "reached": 0.5}
    return {"family": family, "name": "case", "wanted": wanted, "kernels": [f"{family}::k"], "ideal": reached,
            "timings": timings}  # fmt: skip


def results(date: str, digests: dict[str, str], **more: Any) -> dict[str, Any]:
    base = {"benchmark": "gpu", "date": date, "device": {"name": "GPU"}, "kernels": digests, "cases": [], "tests": {}}
    return {**base, **more}


def present() -> dict[str, str]:
    return {family: sources.kernel_digest(family) for family in FAMILIES}


def test_nothing_was_ever_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_status.main(["--folder", str(tmp_path / "missing")]) == 0
    said = capsys.readouterr().out
    assert said.count("never") == len(FAMILIES)
    assert gpu_status.main(["--folder", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["family"] for s in found] == FAMILIES
    assert {s["ran"] for s in found} == {"never"}


def test_the_present_source_counts_and_an_earlier_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [case_of("block_sparse", 1e-3, 2e-3, 1.5), case_of("block_sparse", 1e-3, 9e-3, 10.0)]
    tests = {"block_sparse": {"passed": 5, "failed": 1}}
    old = {**present(), "common": "0" * 64}
    (tmp_path / "a.json").write_text(json.dumps(results("2030-01-01T00:00", present(), cases=cases, tests=tests)))
    later = results("2031-01-01T00:00", old, tests={"common": {"passed": 3, "failed": 0}})
    (tmp_path / "b.json").write_text(json.dumps(later))
    found = {s.family: s for s in (gpu_status.status(f, gpu_status.load(tmp_path)) for f in FAMILIES)}
    ours = found["block_sparse"]
    assert (ours.ran, ours.date, ours.device) == ("yes", "2030-01-01T00:00", "GPU")
    assert (ours.passed, ours.failed, ours.wanted, ours.met) == (5, 1, 2, 1)
    assert (ours.slowest, ours.fastest) == (2.0, 9.0)
    assert ours.kernels == ("block_sparse::k",)
    assert found["common"].ran == "an earlier source"
    assert gpu_status.main(["--folder", str(tmp_path), "--kernels"]) == 0
    assert "2.0 - 9.0" in capsys.readouterr().out


def test_a_file_that_is_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert gpu_status.main(["--folder", str(tmp_path)]) == 2
    assert "expected results of `make gpu`" in capsys.readouterr().err


def test_a_digest_follows_the_sources_of_its_family_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("csrc/cuda/common/a.cuh", "csrc/cuda/sparse/b.cu", "csrc/cuda/binary/c.cu"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    families = sources.kernel_families()
    assert families == ["binary", "common", "sparse"]

    def changed(name: str) -> set[str]:
        before = {family: sources.kernel_digest(family) for family in families}
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("changed")
        return {family for family in families if sources.kernel_digest(family) != before[family]}

    assert changed("csrc/cuda/sparse/b.cu") == {"sparse"}
    assert changed("csrc/bindings/cuda_binary.cpp") == {"binary"}
    assert changed("csrc/bindings/cuda_common.h") == {"binary", "sparse"}
    assert changed("csrc/cuda/common/a.cuh") == {"binary", "common", "sparse"}
    assert changed("csrc/cpu/sparse/x.h") == set()


def test_parts_and_tests_are_collected_whatever_is_missing(tmp_path: Path) -> None:
    target = tmp_path / "out" / "gpu.json"
    assert gpu_collect.main([str(tmp_path), str(target)]) == 0
    assert json.loads(target.read_text())["parts"] == []
    lines = ("build\t0\t80\t240", "tests\t1\t9\t160", "memcheck\t124\t60\t60", "racecheck\t77\t0\t60")
    (tmp_path / "parts.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "tests.log").write_text("one\ntwo\n")
    (tmp_path / "tests-all.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.cuda.test_block_sparse" name="test_a[cuda]"/>'
        '<testcase classname="tests.ops.test_cuda" name="test_b[block_sparse_conv2d-float16]">'
        '<failure message="off by one"/></testcase>'
        '<testcase classname="tests.cuda.test_intrinsics" name="test_c[cuda]"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    (tmp_path / "tests-half.xml").write_text("<testsuites><tests")
    assert gpu_collect.main([str(tmp_path), str(target)]) == 0
    content = json.loads(target.read_text())
    assert [p["result"] for p in content["parts"]] == ["passed", "failed", "timed out", "skipped"]
    assert content["parts"][1]["log"] == ["one", "two"]
    counts = content["tests"]["block_sparse"]
    assert (counts["passed"], counts["failed"]) == (1, 1)
    assert counts["failures"][0]["message"] == "off by one"
    assert content["tests"]["common"]["skipped"] == 1
    (tmp_path / "bench.json").write_text(json.dumps(results("2030-01-01", {}, cases=[case_of("sparse", 1.0, 2.0)])))
    assert gpu_collect.main([str(tmp_path), str(target)]) == 0
    content = json.loads(target.read_text())
    assert content["cases"]
    assert content["kernels"] == present()
    assert gpu_status.load(target.parent) == [content]


def test_the_table_of_the_benchmark() -> None:
    failed = {"family": "sparse", "name": "other", "failed": "WrongResultError: off"}
    roofs = dict.fromkeys(("bytes", "float16", "bfloat16", "float32"), 1e12)
    networks = [{"name": "net", "input": [1, 2], "pack": {"speedup": 1.5}}, {"name": "bad", "failed": "no"}]
    told = str(gpu.table({
        "roofs": roofs, "device": {"name": "GPU"}, "cases": [case_of("sparse", 1e-3, 4e-3, 2.5), failed],
        "networks": networks, "left_out": ["x"],
    }))  # fmt: skip
    for part in ("4.000", "2.500", "50%", "WrongResultError", "1.50x as fast after pack_", "bad: no", "1 cases"):
        assert part in told


# ---- without a GPU ---------------------------------------------------------------------------------------------------


@needs_no_gpu
def test_the_benchmark_says_in_one_line_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "error: no CUDA device: nothing was measured\n"


def _run(tools: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(sources.ROOT / "scripts/gpu.sh"), str(tools / "out.json")], capture_output=True, text=True,
        env={**os.environ, "PATH": path, **environment},
    )  # fmt: skip


def _tool(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@needs_no_gpu
def test_make_gpu_says_in_one_line_that_there_is_no_gpu(tmp_path: Path) -> None:
    _tool(tmp_path, "nvidia-smi", "exit 9")
    done = _run(tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("gpu: no CUDA device on this machine: nothing was run")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


@needs_no_gpu
def test_make_gpu_refuses_a_torch_without_cuda(tmp_path: Path) -> None:
    _tool(tmp_path, "nvidia-smi", "echo 'GPU 0: some'")
    python = _tool(tmp_path, "python", "echo 'gpu: the torch of here sees no CUDA device' >&2; exit 1")
    done = _run(tmp_path, PYTHON=str(python))
    assert done.returncode == 1
    assert done.stderr == "gpu: the torch of here sees no CUDA device\n"
