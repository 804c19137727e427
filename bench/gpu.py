# SPDX-License-Identifier: Apache-2.0
"""Every family on a GPU, against what torch has there: `python -m bench.gpu --help`; `make gpu` runs it among others.

Rivals: cuBLAS and cuDNN (`F.linear`, `F.conv2d` in the same dtype), torch's BSR kernel (`bsr_dense_addmm`), its 2:4
kernels, its int4 kernel (`_weight_int4pack_mm`). Every result is compared with float64 before it is timed. Contenders
take turns, and each is timed in three ways, all with CUDA events:

  cold    one call after the second-level cache was filled with something else: weights come from memory, as they do in
          a network larger than the cache. The GPU is kept busy while the call is enqueued, so launches cost nothing.
  graph   many calls in one CUDA graph, caches warm: what small kernels take without Python and launches.
  eager   many calls in a loop: what a user without graphs gets.

Beside the ratios stands the share of the ideal: dense time times density for blocks; for the rest the larger of bytes
over the bandwidth and operations over the peak, both measured in the same run where torch can reach them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import slimtorch as slim
from bench import machine, sources
from bench.networks import TransformerBlock, perceptron
from bench.run import guarded
from bench.timing import Reference, WrongResultError, percentile
from slimtorch import _C, reference
from slimtorch import nn as slim_nn
from slimtorch.formats import Codebook, SparseCodebook
from slimtorch.report import Table, format_seconds
from tests.problems import BENCH_CONV, ConvProblem

Mode = Literal["cold", "graph", "eager"]
MODES: tuple[Mode, ...] = ("cold", "graph", "eager")
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
INT4_GROUP, INT4_SCALE = 128, 1 / 64
# Operations of one-bit mma.sync in a clock of a multiprocessor, A100's data sheet: 4992 TOPS / 108 / 1.41 GHz. torch
# has nothing to measure it with.
BIT_OPERATIONS = 32768


@dataclass(frozen=True)
class Case:
    """A layer on one input: what it is, and what is wanted of it.

    Attributes:
        layer: "linear" (m rows of x, n outputs, k inputs) or "conv2d" (`conv`, at its batch).
        bits: of codebook families.
        wanted: how many times faster than cuBLAS or cuDNN, cold; None where nothing was promised.
    """

    family: str
    m: int
    n: int
    k: int
    dtype: torch.dtype
    density: float = 1.0
    block_size: tuple[int, int] | None = None
    bits: int = 0
    binarize_input: bool = False
    packed_input: bool = False
    conv: ConvProblem | None = None
    wanted: float | None = None

    @property
    def name(self) -> str:
        parts = [f"{self.n}x{self.k} m{self.m}" if self.conv is None else f"{self.conv.name} b{self.conv.batch}"]
        if self.density < 1:
            parts.append(f"{100 * (1 - self.density):g}%")
        if self.block_size:
            parts.append("b{}x{}".format(*self.block_size))
        if self.bits:
            parts.append(f"{self.bits} bit")
        if self.family == "binary":
            parts.append("bits" if self.packed_input else "signs" if self.binarize_input else "real x")
        return " ".join([*parts, NAMES[self.dtype]])

    @property
    def operations(self) -> int:
        """Of the dense product, a multiply and an add counting two."""
        return 2 * self.m * self.n * self.k if self.conv is None else self.conv.dense_flops

    def describe(self) -> dict[str, Any]:
        """In JSON's types."""
        content = {k: v for k, v in asdict(self).items() if k != "conv"}
        conv = None if self.conv is None else asdict(self.conv) | {"dtype": NAMES[self.dtype]}
        return {**content, "name": self.name, "dtype": NAMES[self.dtype], "conv": conv, "operations": self.operations}


def _linear(family: str, sizes: Sequence[tuple[int, int]], rows: Sequence[int], **options: Any) -> Iterator[Case]:
    for (n, k), m in itertools.product(sizes, rows):
        yield Case(family, m, n, k, **options)


def _cases() -> Iterator[Case]:
    """The lines of the targets first, what else is of interest after them."""
    large = [(4096, 4096)]
    for dtype in (BF16, HALF):
        yield from _linear(
            "block_sparse", large, (1024, 4096), dtype=dtype, density=0.1, block_size=(64, 64), wanted=7.0
        )
    for size, density in itertools.product((16, 32), (0.3, 0.2, 0.1)):
        options: dict[str, Any] = {"density": density, "block_size": (size, size), "wanted": 1.0}
        yield from _linear("block_sparse", large, (1024,), dtype=BF16, **options)
    for density, wanted in ((0.5, 1.66), (0.2, 2.5), (0.1, 4.0)):
        yield from _linear("sparse", large, (1, 8, 16, 32), dtype=HALF, density=density, wanted=wanted)
    yield from _linear("sparse", [(8192, 8192)], (1, 16), dtype=BF16, density=0.1, wanted=4.0)
    for density, wanted in ((0.1, 3.4), (0.05, 5.4)):
        yield from _linear("sparse", large, (128, 1024), dtype=FLOAT, density=density, wanted=wanted)
    yield from _linear("binary", [(8192, 8192)], (8192,), dtype=BF16, binarize_input=True, wanted=6.0)
    yield from _linear("binary", [(8192, 8192)], (8192,), dtype=BF16, binarize_input=True, packed_input=True)
    yield from _linear("binary", large, (16, 1024), dtype=BF16, binarize_input=True)
    yield from _linear("binary", large, (1, 16, 256), dtype=HALF)
    yield from _linear("codebook", [*large, (8192, 8192)], (1, 4, 16), dtype=HALF, bits=4, wanted=3.5)
    yield from _linear("codebook", large, (256, 1024), dtype=HALF, bits=4, wanted=1.0)
    yield from _linear("codebook", large, (16,), dtype=BF16, bits=4, wanted=3.5)
    for bits in (2, 3, 8):
        yield from _linear("codebook", large, (1, 16), dtype=HALF, bits=bits)
    yield from _linear("sparse_codebook", large, (1, 16, 256), dtype=HALF, density=0.1, bits=4)
    for problem in BENCH_CONV:
        many = ConvProblem(
            problem.name, 32, problem.c_in, problem.c_out, problem.h, problem.w, problem.kernel, padding=problem.padding
        )
        for family, more in (
            ("block_sparse", {"density": 0.1, "block_size": (32, 32)}), ("sparse", {"density": 0.1}),
            ("codebook", {"bits": 4}), ("binary", {"binarize_input": True}),
        ):  # fmt: skip
            columns = many.batch * math.prod(many.output_size)
            yield Case(family, columns, many.c_out, many.columns, HALF, conv=many, **more)
    yield from _linear("block_sparse", large, (1, 16, 64), dtype=BF16, density=0.1, block_size=(16, 16))
    yield from _linear("block_sparse", large, (1024,), dtype=FLOAT, density=0.1, block_size=(32, 32))


CASES: tuple[Case, ...] = tuple(_cases())


# ---- who computes a case ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """Something that computes a case. `exact`: compared with the bound of a float32 sum, not with a forgiving one."""

    name: str
    role: Literal["ours", "dense", "peer"]
    what: str
    call: Callable[[], Tensor]
    expected: Reference


@dataclass
class Work:
    """A case in tensors on the GPU."""

    case: Case
    x: Tensor
    dense: Tensor  # what the packed weight stands for, in the dtype of x
    ours: Callable[[], Tensor]
    weight_bytes: float  # that any kernel for this format must read

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        conv = self.case.conv
        if conv is None:
            return F.linear(x, weight)
        return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)

    def reference(self, weight: Tensor, *, forgiving: bool = False) -> Reference:
        """In float64; a bound of n u |x||w| for a float32 sum in any order, and the rounding of what is stored."""
        x = self.x
        if self.case.binarize_input:
            x = torch.where(x >= 0, 1.0, -1.0)
        wide, size = x.double(), weight.double()
        value, scale = self.product(wide, size), self.product(wide.abs(), size.abs())
        unit = torch.finfo(self.case.dtype).eps / 2
        bound = 2.0**-6 * scale if forgiving else self.case.k * 2.0**-24 * scale + 2 * unit * value.abs()
        return Reference(value, bound + 1e-30)


def _kept(shape: tuple[int, ...], density: float, draw: torch.Generator, device: torch.device) -> Tensor:
    """A mask that keeps exactly `round(density * count)` entries."""
    count = math.prod(shape)
    mask = torch.zeros(count, dtype=torch.bool, device=device)
    mask[torch.randperm(count, generator=draw, device=device)[: round(density * count)]] = True
    return mask.view(shape)


def _weight(case: Case, draw: torch.Generator, device: torch.device) -> Tensor:
    """[n, k] in the dtype of the case, zeros included."""
    size = case.block_size or (1, 1)
    grid = (math.ceil(case.n / size[0]), math.ceil(case.k / size[1]))
    mask = _kept(grid, case.density, draw, device).repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
    mask = mask[: case.n, : case.k]
    if case.family == "binary":
        return torch.where(torch.rand(case.n, case.k, generator=draw, device=device) < 0.5, -1.0, 1.0).to(case.dtype)
    if case.bits:  # equidistant values, so that kernels for uniform quantization compute the same product
        levels = torch.randint(0, 1 << case.bits, (case.n, case.k), generator=draw, device=device)
        values = (levels - (1 << (case.bits - 1))) * INT4_SCALE
        if case.family == "sparse_codebook":
            values = torch.where(values == 0, INT4_SCALE, values)
        return (values * mask).to(case.dtype)
    values = torch.randn(case.n, case.k, generator=draw, device=device) / math.sqrt(case.density * case.k)
    return (torch.where(values == 0, 1.0, values) * mask).to(case.dtype)


def _twin(case: Case, weight: Tensor) -> nn.Linear | nn.Conv2d:
    layer: nn.Linear | nn.Conv2d
    if case.conv is None:
        layer = nn.utils.skip_init(nn.Linear, case.k, case.n, bias=False, dtype=case.dtype)
    else:
        p = case.conv
        layer = nn.utils.skip_init(
            nn.Conv2d, p.c_in, p.c_out, p.kernel, p.stride, p.padding, p.dilation, p.groups, False, dtype=case.dtype
        )
    layer.weight = nn.Parameter(weight.reshape(layer.weight.shape), requires_grad=False)
    return layer.eval()


def _packed(case: Case, weight: Tensor) -> Any:
    """Our layer over a weight, both on the CPU: packing is not timed, and moving a packed layer must work."""
    twin, conv = _twin(case, weight), case.conv is not None
    if case.family == "sparse":
        return (slim_nn.SparseConv2d if conv else slim_nn.SparseLinear).from_dense(twin)
    if case.family == "block_sparse":
        kind: Any = slim_nn.BlockSparseConv2d if conv else slim_nn.BlockSparseLinear
        return kind.from_dense(twin, block_size=case.block_size)
    if case.family == "binary":
        kind = slim_nn.BinaryConv2d if conv else slim_nn.BinaryLinear
        return kind.from_dense(twin, binarize_input=case.binarize_input)
    levels = ((torch.arange(1 << case.bits) - (1 << (case.bits - 1))) * INT4_SCALE).to(case.dtype)[None]
    shape = tuple(twin.weight.shape)
    indices = (weight.float() / INT4_SCALE + (1 << (case.bits - 1))).to(torch.uint8)
    if case.family == "codebook":
        kind = slim_nn.CodebookConv2d if conv else slim_nn.CodebookLinear
        return kind.from_format(twin, Codebook.from_indices(levels, indices.view(shape), shape))
    rows, columns = weight.nonzero().unbind(1)
    kind = slim_nn.SparseCodebookConv2d if conv else slim_nn.SparseCodebookLinear
    return kind.from_format(twin, SparseCodebook.from_positions(levels, indices[rows, columns], rows, columns, shape))


def _weight_bytes(case: Case) -> float:
    """Bytes of the weight that information theory and the format leave no way around, about."""
    entries, kept = case.n * case.k, case.density * case.n * case.k
    if case.family == "binary":
        return entries / 8
    if case.family == "codebook":
        return entries * case.bits / 8
    value = case.bits / 8 if case.bits else case.dtype.itemsize
    if case.block_size:
        return kept * value
    return kept * value + min(entries / 8, kept * 2)  # a bit for every place, or 16 bits for every value


@torch.inference_mode(False)  # values made inside it have no version counter, and formats keep no packed copy of such
@torch.no_grad()
def prepare(case: Case, device: torch.device) -> Work:
    draw = torch.Generator(device=device).manual_seed(case.n + case.m)
    weight = _weight(case, draw, device)
    layer = _packed(case, weight.cpu()).to(device)
    shape = (case.m, case.k) if case.conv is None else (case.conv.batch, case.conv.c_in, case.conv.h, case.conv.w)
    x = torch.randn(shape, generator=draw, device=device).to(case.dtype)
    dense = weight.reshape(_twin(case, weight).weight.shape)
    ours: Callable[[], Tensor] = lambda: layer(x)  # noqa: E731
    if case.packed_input:
        from slimtorch.ops.binary import binary_linear_from_bits

        bits = reference.pack_signs(x)
        ours = lambda: binary_linear_from_bits(bits, layer.format)  # noqa: E731
    return Work(case, x, dense, ours, _weight_bytes(case))


def _bsr(work: Work) -> Callable[[], Tensor]:
    from torch.sparse._triton_ops import bsr_dense_addmm

    case = work.case
    if case.block_size is None or case.conv is not None:
        raise NotImplementedError("blocks and linear layers only")
    matrix = work.dense.to_sparse_bsr(case.block_size)
    # Its tuned parameters are for products with many columns; it wants them divisible by 16.
    columns = work.x.t().contiguous()
    start = torch.zeros(case.n, case.m, dtype=case.dtype, device=work.x.device)
    return lambda: bsr_dense_addmm(start, matrix, columns, beta=0, alpha=1).t()


def _two_of_four(dense: Tensor) -> Tensor:
    """The two larger of four weights in a row: another network, at 50 %."""
    fours = dense.view(-1, 4)
    mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.abs().topk(2, dim=1).indices, True)
    return (fours * mask).view_as(dense)


def _int4(work: Work) -> Callable[[], Tensor]:
    case = work.case
    if case.family != "codebook" or case.bits != 4 or case.conv is not None:
        raise NotImplementedError("4 bits and linear layers only")
    x = work.x.to(BF16)
    index = (work.dense.float() / INT4_SCALE + 8).to(torch.int32)
    bytes_ = (index[:, ::2] << 4 | index[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(bytes_, 8)
    groups = torch.tensor([INT4_SCALE, 0.0], dtype=BF16, device=x.device)
    groups = groups.expand(case.k // INT4_GROUP, case.n, 2).contiguous()
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, INT4_GROUP, groups)


def contenders(work: Work) -> tuple[list[Contender], dict[str, str]]:
    """Everybody whose result is right, and why others cannot take part. WrongResultError where ours is wrong."""
    case, x, dense = work.case, work.x, work.dense
    exact, forgiving = work.reference(dense), work.reference(dense, forgiving=True)
    signs = torch.where(x >= 0, 1.0, -1.0).to(x.dtype) if case.binarize_input else x

    def pruned() -> Contender:
        if case.dtype == FLOAT or case.conv is not None or case.family not in ("sparse", "block_sparse"):
            raise NotImplementedError("sparse linear layers in 16 bits only")
        other = _two_of_four(dense)
        weight = torch.sparse.to_sparse_semi_structured(other)
        expected = work.reference(other, forgiving=True)
        return Contender("2:4", "peer", "to_sparse_semi_structured", lambda: F.linear(x, weight), expected)

    name = "cublas" if case.conv is None else "cudnn"
    builders: list[tuple[str, Callable[[], Contender]]] = [
        ("slimtorch", lambda: Contender("slimtorch", "ours", case.family, work.ours, exact)),
        (name, lambda: Contender(name, "dense", "torch", lambda: work.product(signs, dense), forgiving)),
        ("torch-bsr", lambda: Contender("torch-bsr", "peer", "bsr_dense_addmm", _bsr(work), forgiving)),
        ("2:4", pruned),
        ("torch-int4", lambda: Contender("torch-int4", "peer", "_weight_int4pack_mm", _int4(work), forgiving)),
    ]
    ready: list[Contender] = []
    unavailable: dict[str, str] = {}
    for who, build in builders:
        try:
            contender = build()
            contender.expected.verify(who, contender.call())
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # compilers of kernels have exceptions of their own
            if who == "slimtorch":
                raise
            unavailable[who] = " ".join(str(failure).split())[:200]
        else:
            ready.append(contender)
    return ready, unavailable


# ---- timing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contender in one mode: median and spread over `samples` samples of `calls` calls."""

    contender: str
    role: str
    what: str
    mode: Mode
    median: float
    p10: float
    p90: float
    samples: int
    calls: int
    error: float


@dataclass
class Clock:
    """Samples on the current device, in seconds per call."""

    device: torch.device
    flush: Tensor = field(init=False)
    graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.flush = torch.empty(max(2 * cache, 64 << 20), dtype=torch.uint8, device=self.device)

    def _elapsed(self, body: Callable[[], object], before: Callable[[], object] | None = None) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if before is not None:
            before()
        begin.record()
        body()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def _busy(self) -> None:
        self.flush.zero_()
        torch.cuda._sleep(400_000)  # a fifth of a millisecond: longer than Python takes to enqueue a call

    def cold(self, call: Callable[[], object]) -> float:
        return self._elapsed(call, self._busy)

    def eager(self, call: Callable[[], object], calls: int) -> float:
        torch.cuda.synchronize(self.device)
        return self._elapsed(lambda: [call() for _ in range(calls)]) / calls

    def capture(self, name: str, call: Callable[[], object], calls: int) -> None:
        """Make the graph that :meth:`graph` replays."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        self.graphs[name, calls] = graph
        graph.replay()

    def graph(self, name: str, calls: int) -> float:
        return self._elapsed(self.graphs[name, calls].replay, lambda: torch.cuda._sleep(20_000)) / calls


def time_all(clock: Clock, ready: Sequence[Contender], rounds: int) -> tuple[list[Timing], dict[str, str]]:
    """Everybody by turns in every mode."""
    calls: dict[str, int] = {}
    unavailable: dict[str, str] = {}
    for contender in ready:
        contender.call()
        once = max(1e-6, min(clock.cold(contender.call) for _ in range(3)))
        calls[contender.name] = max(1, min(50, math.ceil(1e-3 / once)))
        try:
            clock.capture(contender.name, contender.call, calls[contender.name])
        except RuntimeError as failure:
            if contender.role == "ours":
                raise
            unavailable[f"{contender.name} in a graph"] = " ".join(str(failure).split())[:200]
    taken: dict[tuple[str, Mode], list[float]] = {}
    for turn in range(rounds):
        for place in range(len(ready)):
            contender = ready[(turn + place) % len(ready)]
            name, count = contender.name, calls[contender.name]
            taken.setdefault((name, "cold"), []).append(clock.cold(contender.call))
            taken.setdefault((name, "eager"), []).append(clock.eager(contender.call, count))
            if (name, count) in clock.graphs:
                taken.setdefault((name, "graph"), []).append(clock.graph(name, count))
    clock.graphs.clear()
    timings = []
    for contender, mode in itertools.product(ready, MODES):
        values = taken.get((contender.name, mode))
        if values is None:
            continue
        error = contender.expected.verify(contender.name, contender.call())  # still right after all that
        timings.append(
            Timing(
                contender.name, contender.role, contender.what, mode, statistics.median(values),
                percentile(values, 0.1), percentile(values, 0.9), len(values),
                1 if mode == "cold" else calls[contender.name], error,
            )
        )  # fmt: skip
    return timings, unavailable


def kernels_of(call: Callable[[], object]) -> list[str]:
    """The kernels that a call launches, by their demangled names; empty where the profiler cannot run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                call()
                torch.cuda.synchronize()
        return sorted({event.name for event in profiler.events() if "slim::cuda" in event.name})
    except RuntimeError:  # CUPTI is not there, or somebody else uses it
        return []


# ---- what a GPU could do ---------------------------------------------------------------------------------------------


def roofs(clock: Clock) -> dict[str, float]:
    """Bytes and operations a second: of a copy, of cuBLAS in each dtype, and on paper of one-bit products."""
    device = clock.device
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ = functools.partial(target.copy_, source)
    found = {"bytes": 2 * source.numel() / min(clock.cold(copy_) for _ in range(5))}
    del source, target, copy_
    for dtype, size in ((HALF, 8192), (BF16, 8192), (FLOAT, 4096)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = min(clock.cold(functools.partial(F.linear, a, b)) for _ in range(5))
        found[NAMES[dtype]] = 2 * size**3 / seconds
    properties = torch.cuda.get_device_properties(device)
    kilohertz = getattr(properties, "clock_rate", 0)
    if kilohertz:
        found["bit"] = BIT_OPERATIONS * properties.multi_processor_count * kilohertz * 1e3
    return found


def ideal(work: Work, found: dict[str, float], dense_seconds: float) -> tuple[str, float]:
    """What bounds a case, and the seconds that it could take at best."""
    case = work.case
    if case.family == "block_sparse" and case.m >= 256:
        return "dense x density", dense_seconds * case.density
    x_bytes = work.x.numel() / 8 if case.packed_input else work.x.numel() * work.x.element_size()
    outputs = case.m * case.n * case.dtype.itemsize
    by_bytes = (work.weight_bytes + x_bytes + outputs) / found["bytes"]
    peak = "bit" if case.binarize_input else NAMES[case.dtype]
    # Unstructured weights run on tensor cores as dense ones do; on CUDA cores only what is stored is multiplied.
    share = case.density if case.dtype == FLOAT else 1.0
    by_work = case.operations * share / found[peak] if peak in found else 0.0
    return ("bytes", by_bytes) if by_bytes >= by_work else ("peak", by_work)


# ---- networks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A dense network, what makes it smaller, the format of its layers, its input."""

    name: str
    build: Callable[[], nn.Module]
    compress: Callable[[nn.Module], object]
    shape: tuple[int, ...]


NETWORKS = (
    Network(
        "mlp, 90 % zero blocks of 32", perceptron,
        lambda model: slim.prune_(model, slim.prune.Magnitude(sparsity=0.9, granularity=(32, 32))), (1024, 1024),
    ),
    Network(
        "mlp, 80 % zero", perceptron, lambda model: slim.prune_(model, slim.prune.Magnitude(sparsity=0.8)), (16, 1024)
    ),
    Network(
        "transformer block, 4 bits", lambda: TransformerBlock(2048, 16, 8192),
        lambda model: slim.cluster_(model, slim.quantize.KMeans(bits=4)), (1, 1, 2048),
    ),
)  # fmt: skip


def measure_network(network: Network, device: torch.device) -> dict[str, Any]:
    """A network in float16: dense, and as `pack_` leaves it."""
    torch.manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():  # as in prepare()
        model = network.build().eval()
        network.compress(model)
        model = model.to(device, HALF)
    draw = torch.Generator(device=device).manual_seed(0)  # torch's own may be left unusable by a capture that failed
    x = torch.randn(network.shape, generator=draw, device=device).to(HALF)
    expected = model(x)
    packed = copy.deepcopy(model)
    report = slim.pack_(packed, x, time_budget=10)
    error = float((packed(x) - expected).abs().max() / expected.abs().max())
    return {"name": network.name, "input": list(network.shape), "error": error, "pack": report.to_dict()}


# ---- the run ---------------------------------------------------------------------------------------------------------


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the GPU is, and the driver and libraries that it ran with."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "architectures": _C.cuda_archs(),
    }


def driver() -> str | None:
    """The driver's version, from the kernel module."""
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text(encoding="utf-8").split() if path.exists() else []
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), None)


def measure(case: Case, clock: Clock, found: dict[str, float], rounds: int) -> dict[str, Any]:
    """One case in JSON's types: verified, timed, held against the ideal. Errors of ours are told, not raised."""
    content = case.describe()
    try:
        work = prepare(case, clock.device)
        ready, unavailable = contenders(work)
        timings, more = time_all(clock, ready, rounds)
    except (WrongResultError, RuntimeError, ValueError, TypeError) as failure:
        return {**content, "failed": f"{type(failure).__name__}: {' '.join(str(failure).split())[:400]}"}
    cold = {t.contender: t.median for t in timings if t.mode == "cold"}
    dense = next(t.median for t in timings if t.role == "dense" and t.mode == "cold")
    kind, seconds = ideal(work, found, dense)
    return {
        **content,
        "kernels": kernels_of(work.ours),
        "ideal": {"kind": kind, "seconds": seconds, "reached": seconds / cold["slimtorch"]},
        "timings": [asdict(t) for t in timings],
        "unavailable": {**unavailable, **more},
    }


def seconds_of(case: dict[str, Any], contender: str, mode: Mode = "cold") -> float | None:
    """The median of one contender in a case of the JSON."""
    for timing in case.get("timings", ()):
        if timing["contender"] == contender and timing["mode"] == mode:
            return float(timing["median"])
    return None


def dense_seconds_of(case: dict[str, Any], mode: Mode = "cold") -> float | None:
    """The median of cuBLAS or cuDNN."""
    return seconds_of(case, "cublas", mode) or seconds_of(case, "cudnn", mode)


COLUMNS = ["case", "ours", "dense", "x cold", "x graph", "x eager", "wanted", "ideal", "of ideal", "x best peer"]


def row(case: dict[str, Any]) -> list[object]:
    """Of a case of the JSON."""
    name = f"{case['family']} {case['name']}"
    if "failed" in case:
        return [name, case["failed"], *[None] * 8]
    ours, dense = seconds_of(case, "slimtorch"), dense_seconds_of(case)
    assert ours is not None
    assert dense is not None
    ratios: list[object] = []
    for mode in MODES:
        mine, theirs = seconds_of(case, "slimtorch", mode), dense_seconds_of(case, mode)
        ratios.append(None if mine is None or theirs is None else theirs / mine)
    peers = [t["median"] for t in case["timings"] if t["role"] == "peer" and t["mode"] == "cold"]
    return [
        name, format_seconds(ours), format_seconds(dense), *ratios, case["wanted"], case["ideal"]["kind"],
        f"{case['ideal']['reached']:.0%}", min(peers) / ours if peers else None,
    ]  # fmt: skip


def table(content: dict[str, Any]) -> Table:
    """The cases of a file of results."""
    found = content["roofs"]
    notes = [
        "median of interleaved samples; x: how many times faster than cuBLAS or cuDNN in the same dtype, cold, in a "
        "CUDA graph and in eager mode; wanted is of cold",
        f"measured in the same run: {found['bytes'] * 1e-12:.2f} TB/s, "
        + ", ".join(f"{name} {found[name] * 1e-12:.0f} TFLOP/s" for name in NAMES.values()),
    ]
    for network in content.get("networks", ()):
        if "failed" in network:
            notes.append(f"{network['name']}: {network['failed']}")
        else:
            speedup = network["pack"]["speedup"]
            notes.append(f"{network['name']}, input {network['input']}: {speedup:.2f}x as fast after pack_")
    if content.get("left_out"):
        notes.append(f"left out for lack of time: {len(content['left_out'])} cases")
    rows = [row(case) for case in content["cases"]]
    return Table(f"CUDA kernels on {content['device']['name']}", COLUMNS, rows, notes)


def present_device() -> torch.device:
    """The GPU to measure on; ValueError where there is none that the kernels can run on."""
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device: nothing was measured")
    if not _C.cuda_archs():
        raise ValueError("slimtorch._C was built without CUDA kernels: build it where nvcc is")
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"the GPU is of compute capability {major}.{minor}; the kernels need 8.0 or later")
    return device


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--family", nargs="+", choices=sorted({case.family for case in CASES}), help="these alone")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each contender (default 15)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing after so long")
    parser.add_argument("--no-networks", action="store_true", help="layers alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, after each case")
    return guarded(lambda: run(parser.parse_args(arguments)))


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for. Exit status 1 where a result of ours was wrong."""
    device = present_device()
    deadline = time.monotonic() + options.seconds
    chosen = [c for c in CASES if not options.family or c.family in options.family]
    chosen = [c for c in chosen if not options.only or options.only in c.name]
    if not chosen:
        raise ValueError("no case is left by these options")
    left_out = [f"{case.family} {case.name}" for case in chosen]
    content: dict[str, Any] = {"cases": [], "networks": [], "left_out": left_out, "complete": False}
    facts: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "device": device_facts(device),
        "kernels": {family: sources.kernel_digest(family) for family in sources.kernel_families()},
        "settings": {"rounds": options.rounds},
    }

    def save() -> None:
        if options.json:
            more = {key: value for key, value in content.items() if key != "cases"}
            machine.save(options.json, "gpu", content["cases"], **facts, **more)

    with torch.inference_mode():
        clock = Clock(device)
        facts["roofs"] = roofs(clock)
        for case in chosen:
            if time.monotonic() > deadline:
                break
            content["cases"].append(measure(case, clock, facts["roofs"], options.rounds))
            left_out.remove(f"{case.family} {case.name}")
            torch.cuda.empty_cache()
            print(*row(content["cases"][-1])[:6], flush=True)
            save()
    for network in () if options.no_networks or options.family or options.only else NETWORKS:
        if time.monotonic() > deadline:
            break
        try:
            with torch.no_grad():
                content["networks"].append(measure_network(network, device))
        except (RuntimeError, ValueError) as failure:
            said = f"{type(failure).__name__}: {' '.join(str(failure).split())[:400]}"
            content["networks"].append({"name": network.name, "failed": said})
        save()
    content["complete"] = not left_out
    save()
    Console(width=150).print(table({**facts, **content}))
    return 1 if any("failed" in item for item in (*content["cases"], *content["networks"])) else 0


if __name__ == "__main__":
    raise SystemExit(main())
