# SPDX-License-Identifier: Apache-2.0
"""Linear layers with shared weights against dense and quantized ones: `python -m bench.codebook --help`.

The table holds equidistant values, so that engines for uniform quantization compute the same product; ours takes any
table. Contenders take turns, and their outputs are compared with float64 before they are timed. ONNX Runtime runs its
MatMulNBits in its own process (`make peers`), with float32 activations and with activations rounded to 8 bits.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.utils import mkldnn as torch_mkldnn

from bench import machine
from bench.peers import DEFAULT_PYTHON, PeerError, Worker
from bench.run import DTYPES, guarded, positive
from bench.timing import Contender, Reference, Settings, Timing, WrongResultError, interleave, local
from slimtorch import nn as slim_nn
from slimtorch.formats import Codebook
from slimtorch.formats.codebook import GroupSize, table_count
from slimtorch.report import Table, format_seconds

SIZES, ROWS, BITS = (1024, 4096), (1, 4, 16, 64, 256), (2, 3, 4, 5, 8)
INT4_GROUP = 128  # of torch's int4 kernel, which rounds its scales to the activations' dtype
ORT_BLOCK = 32
SCALE = 1 / 64


@dataclass(frozen=True)
class Case:
    """`y [m, n] = x [m, n] @ weight [n, n].T` with a table of 2**bits values."""

    m: int
    n: int
    bits: int
    dtype: str
    group_size: GroupSize = None

    def weight(self) -> Codebook:
        """Entry i of every table is (i - 2**(bits - 1)) / 64: exact in bfloat16."""
        tables = table_count((self.n, self.n), self.group_size)
        levels = (torch.arange(1 << self.bits) - (1 << (self.bits - 1))) * SCALE
        draw = torch.Generator().manual_seed(self.bits)
        indices = torch.randint(0, 1 << self.bits, (self.n, self.n), dtype=torch.uint8, generator=draw)
        codebook = levels.to(DTYPES[self.dtype]).expand(tables, -1).contiguous()
        return Codebook.from_indices(codebook, indices, (self.n, self.n), self.group_size)

    def input(self) -> Tensor:
        return torch.randn(self.m, self.n, generator=torch.Generator().manual_seed(1)).to(DTYPES[self.dtype])


def ours(x: Tensor, weight: Codebook) -> Callable[[], Tensor]:
    twin = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer = slim_nn.CodebookLinear.from_format(twin, weight).eval()
    return lambda: layer(x)


def onednn(x: Tensor, dense: Tensor) -> Callable[[], Tensor]:
    if x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise NotImplementedError("oneDNN has no fast bfloat16 on this processor")
    layer = torch.nn.utils.skip_init(torch.nn.Linear, dense.shape[1], dense.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(dense.float(), requires_grad=False)
    packed = torch_mkldnn.to_mkldnn(layer, x.dtype)
    return lambda: packed(x.to_mkldnn()).to_dense(x.dtype)


def mkl(x: Tensor, dense: Tensor) -> Callable[[], Tensor]:
    if x.dtype != torch.float32:
        raise NotImplementedError("float32 only")
    packed, rows = torch.ops.mkl._mkl_reorder_linear_weight(dense, len(x)), len(x)
    return lambda: torch.ops.mkl._mkl_linear(x, packed, dense, None, rows)


def torch_int4(x: Tensor, weight: Codebook) -> Callable[[], Tensor]:
    if weight.bits != 4:
        raise NotImplementedError("4 bits only")
    if x.dtype == torch.float32 and len(x) > 4:
        raise NotImplementedError("its float32 path takes seconds a call")
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.indices().int(), 1)
    # Values are (index - 8) * scale + zero.
    groups = torch.tensor([SCALE, 0.0], dtype=x.dtype).expand(weight.shape[1] // INT4_GROUP, weight.shape[0], 2)
    groups = groups.contiguous()
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, INT4_GROUP, groups)


def torch_int8(x: Tensor, weight: Codebook) -> Callable[[], Tensor]:
    values = (weight.indices().int() - (1 << (weight.bits - 1))).to(torch.int8)
    scales = torch.full((weight.shape[0],), SCALE, dtype=x.dtype)
    return lambda: torch.ops.aten._weight_int8pack_mm(x, values, scales)


def onnxruntime(worker: Worker | None, x: Tensor, weight: Codebook, level: int, folder: Path) -> Contender:
    """Level 1 computes in float32, 4 rounds activations to 8 bits."""
    name = f"onnxruntime-{'fp32' if level == 1 else 'int8'}"
    if worker is None:
        raise NotImplementedError("no environment for it: run `make peers`")
    if x.dtype != torch.float32 or weight.bits not in (4, 8):
        raise NotImplementedError("float32 activations, 4 and 8 bits only")
    per_byte = 8 // weight.bits
    blocks = weight.codes.view(weight.shape[0], weight.shape[1] // ORT_BLOCK, ORT_BLOCK // per_byte)
    np.savez(
        folder / "problem.npz",
        kind="matmul_nbits",
        x=x.numpy(),
        weight=blocks.numpy(),
        scales=np.full(weight.shape[0] * weight.shape[1] // ORT_BLOCK, SCALE, np.float32),
        bits=weight.bits,
        level=level,
    )
    output = folder / "output.npy"

    def load() -> None:
        worker.ask(do="load", problem=str(folder / "problem.npz"), threads=1)

    def result() -> Tensor:
        load()
        worker.ask(do="run", to=str(output))
        return torch.from_numpy(np.load(output, allow_pickle=False))

    def sample(calls: int) -> float:
        return float(worker.ask(do="sample", calls=calls)["seconds"])  # type: ignore[arg-type]

    return Contender(name, "peer", f"MatMulNBits, accuracy_level {level}", result, sample)


def contenders(case: Case, workers: dict[int, Worker], folders: dict[int, Path]) -> list[tuple[str, Any]]:
    """Name and builder of every contender; builders raise where there is nothing to compare with."""
    x, weight = case.input(), case.weight()
    dense = weight.to_dense()
    builders: list[tuple[str, Any]] = [
        ("slimtorch", lambda: local("slimtorch", "ours", "CodebookLinear", ours(x, weight))),
        ("torch", lambda: local("torch", "dense", "F.linear", lambda: F.linear(x, dense))),
        ("onednn", lambda: local("onednn", "dense", "torch.utils.mkldnn", onednn(x, dense))),
        ("mkl", lambda: local("mkl", "dense", "MKL, prepacked", mkl(x, dense))),
        ("torch-int4", lambda: local("torch-int4", "peer", "_weight_int4pack_mm_for_cpu", torch_int4(x, weight))),
        ("torch-int8", lambda: local("torch-int8", "peer", "_weight_int8pack_mm", torch_int8(x, weight))),
    ]
    if case.dtype != "float32":
        wide, wide_dense = x.float(), dense.float()
        call = local("torch-fp32", "dense-fp32", "F.linear in float32", lambda: F.linear(wide, wide_dense))
        builders.insert(2, ("torch-fp32", lambda: call))
    for level in (1, 4):
        builders.append(
            (
                f"onnxruntime-{'fp32' if level == 1 else 'int8'}",
                lambda at=level: onnxruntime(workers.get(at), x, weight, at, folders[at]),
            )
        )
    return builders


def measure(
    case: Case, settings: Settings, workers: dict[int, Worker], folders: dict[int, Path]
) -> tuple[list[Timing], dict[str, str]]:
    """Verify, then time everybody; the reason for each who cannot take part."""
    x, dense = case.input().double(), case.weight().to_dense().double()
    value = F.linear(x, dense)
    unit = 2.0**-24 if case.dtype == "float32" else 2.0**-8
    exact = case.n * 2.0**-24 * F.linear(x.abs(), dense.abs()) + 2 * unit * value.abs()
    rounded = 2.0**-6 * F.linear(x.abs(), dense.abs())  # some rivals round activations or scales
    ready, errors, unavailable = [], [], {}
    for name, build in contenders(case, workers, folders):
        try:
            contender = build()
            bound = rounded if contender.role == "peer" else exact
            error = Reference(value, bound).verify(name, contender.result())
        except (NotImplementedError, RuntimeError, PeerError, WrongResultError) as failure:
            if name == "slimtorch":
                raise
            unavailable[name] = " ".join(str(failure).split())[:160]
        else:
            ready.append(contender)
            errors.append(error)
    return interleave(ready, settings, errors), unavailable


def row(case: Case, timings: Sequence[Timing]) -> list[object]:
    """Times of everybody and our ratios."""
    by_name = {timing.contender: timing.median for timing in timings}
    mine = by_name["slimtorch"]
    same = [t.median for t in timings if t.role == "dense"]
    best = min(t.median for t in timings if t.role in ("dense", "dense-fp32"))
    names = ("slimtorch", "torch", "torch-int4", "torch-int8", "onnxruntime-fp32", "onnxruntime-int8")
    times = [by_name.get(name) for name in names]
    times.insert(2, best)
    ratios = [by_name["torch"], min(same), best, by_name.get("torch-int4"), by_name.get("onnxruntime-int8")]
    group = "" if case.group_size is None else f" g{case.group_size}"
    return [
        f"{case.n}x{case.n} m{case.m} {case.bits} bit{group}{' bf16' if case.dtype == 'bfloat16' else ''}",
        *(None if t is None else format_seconds(t) for t in times),
        *(None if t is None else t / mine for t in ratios),
    ]


COLUMNS = [
    "problem", "ours", "torch", "dense", "int4", "int8", "ORT fp32", "ORT int8", "/torch", "/dense same dtype",
    "/dense", "/int4", "/ORT int8",
]  # fmt: skip


def group(text: str) -> GroupSize:
    """An option's value: "none", "row" or an int."""
    return None if text == "none" else "row" if text == "row" else positive(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.codebook", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1024 only, short samples")
    parser.add_argument("--size", type=positive, nargs="+", help=f"inputs and outputs (default {SIZES})")
    parser.add_argument("--m", type=positive, nargs="+", default=list(ROWS), help="rows of x")
    parser.add_argument("--bits", type=int, choices=range(1, 9), nargs="+", default=list(BITS))
    parser.add_argument("--group-size", type=group, nargs="+", default=[None], help="none, row or an int")
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--rounds", type=positive, help="samples of each contender (default 15, quick 5)")
    parser.add_argument("--no-peers", action="store_true", help="leave ONNX Runtime out")
    parser.add_argument("--peers-python", type=Path, default=DEFAULT_PYTHON)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    return guarded(lambda: run(parser.parse_args()))


def run(options: argparse.Namespace) -> int:
    sizes = options.size or (SIZES[:1] if options.quick else SIZES)
    cases = [
        Case(m, n, bits, dtype, group_size)
        for dtype in options.dtype
        for n in sizes
        for m in options.m
        for bits in options.bits
        for group_size in options.group_size
    ]
    settings = Settings(options.rounds or (5 if options.quick else 15), 2e-3 if options.quick else 5e-3)
    rows, content = [], []
    workers: dict[int, Worker] = {}
    with contextlib.ExitStack() as stack, torch.inference_mode():
        stack.enter_context(machine.restricted(machine.cores(), 1))
        folders = {level: Path(stack.enter_context(tempfile.TemporaryDirectory())) for level in (1, 4)}
        if not options.no_peers and options.peers_python.exists():
            for level in folders:
                workers[level] = Worker("onnxruntime", options.peers_python, 1)
                stack.callback(workers[level].close)
        for case in cases:
            timings, unavailable = measure(case, settings, workers, folders)
            rows.append(row(case, timings))
            print(*rows[-1][:4], flush=True) if options.json else None
            content.append({**asdict(case), "timings": [asdict(t) for t in timings], "unavailable": unavailable})
            if options.json:
                machine.save(options.json, "codebook", content, settings=asdict(settings))
    note = "median times of a call; the last five: how many times faster we are"
    title = f"codebook on {machine.machine()['cpu']}, our kernels: {machine.machine()['isa']}, 1 thread"
    Console().print(Table(title, COLUMNS, rows, [note]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
