# SPDX-License-Identifier: Apache-2.0
"""Named problems: one list of shapes, densities and seeds that tests and benchmarks share.

A problem builds its tensors on demand and deterministically: the same problem gives the same weight, input and bias
in every process. The number of kept weights (or blocks) is exact, `round(density * count)`, so a benchmark's "90 %"
is 90 %.

`EDGE_LINEAR` and `EDGE_CONV` straddle the kernels' tile edges; `BENCH_*` are the shapes that targets are set on.
Problems are plain frozen dataclasses: `dataclasses.replace(problem, dtype=torch.bfloat16)` gives a sibling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

_WEIGHT, _INPUT, _BIAS, _MASK, _ROWS = range(5)  # independent random streams of one seed


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 8 + stream)


def masked_matrix(
    rows: int, columns: int, density: float, seed: int, *, block_size: tuple[int, int] = (1, 1), empty_rows: int = 0
) -> torch.Tensor:
    """A float32 matrix [rows, columns] that keeps exactly `round(density * blocks)` blocks of `block_size`.

    Blocks at the lower and right edge may be cut off by the matrix. Kept values are normal, never zero, scaled by
    1/sqrt(kept values per row) so that a product with normal activations is of order one. `empty_rows` rows, chosen at
    random, are then set to zero (and the density falls accordingly).
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density: expected a value in [0, 1], got {density}")
    block_rows, block_columns = block_size
    grid = (math.ceil(rows / block_rows), math.ceil(columns / block_columns))
    count = grid[0] * grid[1]
    kept = torch.randperm(count, generator=_generator(seed, _MASK))[: round(density * count)]
    mask = torch.zeros(count, dtype=torch.bool)
    mask[kept] = True
    mask = mask.view(grid)
    if block_size != (1, 1):
        mask = mask.repeat_interleave(block_rows, 0).repeat_interleave(block_columns, 1)[:rows, :columns]
    values = torch.randn(rows, columns, generator=_generator(seed, _WEIGHT))
    values[values == 0] = 1.0
    values = torch.where(mask, values / math.sqrt(max(1.0, density * columns)), torch.zeros(()))
    if empty_rows:
        values[torch.randperm(rows, generator=_generator(seed, _ROWS))[:empty_rows]] = 0
    return values


@dataclass(frozen=True)
class LinearProblem:
    """`y [m, n] = x [m, k] @ weight [n, k].T + bias [n]`."""

    name: str
    m: int
    n: int
    k: int
    density: float = 0.1
    dtype: torch.dtype = torch.float32
    seed: int = 0
    block_size: tuple[int, int] = (1, 1)
    empty_rows: int = 0

    def weight(self) -> torch.Tensor:
        """[n, k] in `dtype`, masked."""
        dense = masked_matrix(
            self.n, self.k, self.density, self.seed, block_size=self.block_size, empty_rows=self.empty_rows
        )
        return dense.to(self.dtype)

    def input(self) -> torch.Tensor:
        """[m, k] in `dtype`."""
        return torch.randn(self.m, self.k, generator=_generator(self.seed, _INPUT)).to(self.dtype)

    def bias(self) -> torch.Tensor:
        """[n] in `dtype`."""
        return torch.randn(self.n, generator=_generator(self.seed, _BIAS)).to(self.dtype)

    @property
    def dense_flops(self) -> int:
        """Floating point operations of the dense product (a multiply and an add count two)."""
        return 2 * self.m * self.n * self.k

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ConvProblem:
    """`F.conv2d` of x [batch, c_in, h, w] with weight [c_out, c_in / groups, *kernel]; pairs are (height, width)."""

    name: str
    batch: int
    c_in: int
    c_out: int
    h: int
    w: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    density: float = 0.1
    dtype: torch.dtype = torch.float32
    seed: int = 0
    block_size: tuple[int, int] = (1, 1)
    empty_rows: int = 0

    def __post_init__(self) -> None:
        if self.c_in % self.groups or self.c_out % self.groups:
            raise ValueError(
                f"groups: expected a divisor of c_in {self.c_in} and c_out {self.c_out}, got {self.groups}"
            )

    @property
    def columns(self) -> int:
        """Width of the weight's two-dimensional view [c_out, c_in / groups * kh * kw]."""
        return self.c_in // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = (
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, pad, dilation in zip(
                (self.h, self.w), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return height, width

    def weight(self) -> torch.Tensor:
        """[c_out, c_in / groups, kh, kw] in `dtype`, masked in its two-dimensional view."""
        dense = masked_matrix(
            self.c_out, self.columns, self.density, self.seed, block_size=self.block_size, empty_rows=self.empty_rows
        )
        return dense.view(self.c_out, self.c_in // self.groups, *self.kernel).to(self.dtype)

    def input(self) -> torch.Tensor:
        """[batch, c_in, h, w] in `dtype`."""
        shape = (self.batch, self.c_in, self.h, self.w)
        return torch.randn(shape, generator=_generator(self.seed, _INPUT)).to(self.dtype)

    def bias(self) -> torch.Tensor:
        """[c_out] in `dtype`."""
        return torch.randn(self.c_out, generator=_generator(self.seed, _BIAS)).to(self.dtype)

    @property
    def dense_flops(self) -> int:
        """Floating point operations of the dense convolution (a multiply and an add count two)."""
        height, width = self.output_size
        return 2 * self.batch * height * width * self.c_out * self.columns

    def __str__(self) -> str:
        return self.name


Problem = LinearProblem | ConvProblem

# --- edges: what kernels get wrong ------------------------------------------------------------------------------------

_TILES = (4, 8, 16, 32, 64)  # rows or columns that some kernel handles at once
_AROUND_TILES = tuple(sorted({tile + step for tile in _TILES for step in (-1, 0, 1)}))


def _edge_linear() -> Iterator[LinearProblem]:
    # Each dimension straddles every tile while the other two stay odd and ordinary.
    for m in (0, 1, 2, *_AROUND_TILES, 129):
        yield LinearProblem(f"m{m}", m, 37, 53, 0.3, seed=m)
    for n in (1, 2, *_AROUND_TILES):
        yield LinearProblem(f"n{n}", 17, n, 53, 0.3, seed=100 + n)
    for k in (1, 2, 3, 15, 16, 17, 127, 128, 129, 255, 256, 257, 1000):
        yield LinearProblem(f"k{k}", 19, 33, k, 0.2, seed=200 + k)
    for k in (1, 127, 128, 129, 257, 1000):  # the kernels for few rows of x are others
        yield LinearProblem(f"m1_k{k}", 1, 65, k, 0.2, seed=300 + k)
        yield LinearProblem(f"m5_k{k}", 5, 65, k, 0.2, seed=400 + k)
    for density in (0.0, 0.001, 0.5, 0.9, 1.0):
        percent = f"{100 * density:g}".replace(".", "_")
        yield LinearProblem(f"density{percent}", 33, 40, 129, density, seed=500)
        yield LinearProblem(f"m1_density{percent}", 1, 40, 129, density, seed=501)
    yield LinearProblem("empty_rows", 33, 31, 64, 0.4, seed=510, empty_rows=11)
    yield LinearProblem("empty_rows_m1", 1, 31, 64, 0.4, seed=511, empty_rows=11)
    yield LinearProblem("all_but_one_row_empty", 20, 16, 48, 0.5, seed=512, empty_rows=15)
    yield LinearProblem("long_rows", 24, 3, 5000, 0.5, seed=520)
    yield LinearProblem("tall", 24, 3000, 5, 0.4, seed=521)
    yield LinearProblem("one_by_one", 1, 1, 1, 1.0, seed=522)


def _edge_conv() -> Iterator[ConvProblem]:
    for size in (1, 2, 7, 8, 13, 14, 15, 16, 17, 31, 33):
        yield ConvProblem(f"map{size}", 1, 5, 7, size, size, padding=(1, 1), density=0.4, seed=size)
        yield ConvProblem(f"pointwise_map{size}", 1, 19, 9, size, size, kernel=(1, 1), density=0.4, seed=40 + size)
    for channels in (1, 3, 4, 5, 8, 9, 15, 16, 17, 33):
        yield ConvProblem(f"c_out{channels}", 1, 6, channels, 9, 9, padding=(1, 1), density=0.4, seed=80 + channels)
        yield ConvProblem(f"c_in{channels}", 1, channels, 6, 9, 9, padding=(1, 1), density=0.4, seed=120 + channels)
    for batch in (0, 2, 3, 5):
        yield ConvProblem(f"batch{batch}", batch, 6, 10, 7, 7, padding=(1, 1), density=0.4, seed=160 + batch)
        yield ConvProblem(f"pointwise_batch{batch}", batch, 6, 10, 7, 7, kernel=(1, 1), density=0.5, seed=170 + batch)
    base = ConvProblem("", 2, 8, 12, 13, 11, density=0.4)
    yield replace(base, name="stride2", stride=(2, 2), seed=180)
    yield replace(base, name="stride2_padded", stride=(2, 2), padding=(1, 1), seed=181)
    yield replace(base, name="stride3x1", stride=(3, 1), padding=(2, 0), seed=182)
    yield ConvProblem("stride4", 1, 3, 10, 35, 35, kernel=(11, 11), stride=(4, 4), density=0.3, seed=183)
    yield replace(base, name="pointwise_stride2", kernel=(1, 1), stride=(2, 2), seed=184)
    yield replace(base, name="pointwise_padded", kernel=(1, 1), padding=(1, 2), seed=185)
    yield replace(base, name="padding_wide", kernel=(3, 3), padding=(4, 3), seed=186)
    yield replace(base, name="dilation2", dilation=(2, 2), padding=(2, 2), seed=187)
    yield replace(base, name="dilation3x1", dilation=(3, 1), stride=(1, 2), seed=188)
    yield replace(base, name="kernel5", kernel=(5, 5), padding=(2, 2), seed=189)
    yield replace(base, name="kernel1x7", kernel=(1, 7), padding=(0, 3), seed=190)
    yield replace(base, name="kernel7x1", kernel=(7, 1), padding=(3, 0), seed=191)
    yield replace(base, name="kernel2", kernel=(2, 2), stride=(2, 2), seed=192)
    yield ConvProblem("kernel_covers_map", 2, 4, 6, 5, 5, kernel=(5, 5), density=0.5, seed=193)
    yield replace(base, name="groups2", groups=2, padding=(1, 1), seed=194)
    yield replace(base, name="groups4_stride2", groups=4, stride=(2, 2), padding=(1, 1), seed=195)
    yield ConvProblem("depthwise", 2, 9, 9, 10, 10, groups=9, padding=(1, 1), density=0.6, seed=196)
    yield ConvProblem("depthwise_times2", 1, 5, 10, 8, 8, groups=5, padding=(1, 1), density=0.6, seed=197)
    yield ConvProblem("pointwise_groups3", 2, 9, 12, 8, 8, kernel=(1, 1), groups=3, density=0.6, seed=198)
    yield ConvProblem("all", 3, 6, 8, 15, 12, (3, 2), (2, 3), (2, 1), (2, 1), 2, 0.5, seed=199)
    for density in (0.0, 0.01, 1.0):
        percent = f"{100 * density:g}"
        yield ConvProblem(f"density{percent}", 2, 8, 16, 14, 14, padding=(1, 1), density=density, seed=210)
        yield ConvProblem(f"pointwise_density{percent}", 1, 20, 16, 14, 14, (1, 1), density=density, seed=211)
    yield ConvProblem("empty_rows", 2, 8, 16, 14, 14, padding=(1, 1), density=0.5, seed=220, empty_rows=6)
    yield ConvProblem("wide_map", 1, 3, 5, 3, 130, padding=(1, 1), density=0.5, seed=221)
    yield ConvProblem("tall_map", 1, 3, 5, 130, 3, padding=(1, 1), density=0.5, seed=222)


EDGE_LINEAR: tuple[LinearProblem, ...] = tuple(_edge_linear())
EDGE_CONV: tuple[ConvProblem, ...] = tuple(_edge_conv())

# --- benchmarks: what targets are set on ------------------------------------------------------------------------------

SPARSITIES = (0.6, 0.8, 0.9, 0.95)
BLOCK_SIZES = ((8, 8), (16, 16), (32, 32), (64, 64), (1, 16), (4, 16))

BENCH_LINEAR: tuple[LinearProblem, ...] = (
    LinearProblem("1024x1024_m1", 1, 1024, 1024),
    LinearProblem("1024x1024_m16", 16, 1024, 1024),
    LinearProblem("1024x1024_m64", 64, 1024, 1024),
    LinearProblem("1024x1024_m256", 256, 1024, 1024),
    LinearProblem("4096x4096_m1", 1, 4096, 4096),
    LinearProblem("4096x4096_m16", 16, 4096, 4096),
    LinearProblem("4096x4096_m128", 128, 4096, 4096),
)
BENCH_CONV: tuple[ConvProblem, ...] = (
    ConvProblem("conv3x3_128_128_28", 1, 128, 128, 28, 28, padding=(1, 1)),
    ConvProblem("conv3x3_256_256_14", 1, 256, 256, 14, 14, padding=(1, 1)),
    ConvProblem("conv1x1_256_1024_14", 1, 256, 1024, 14, 14, kernel=(1, 1)),
)
BENCH_BLOCK_LINEAR: tuple[LinearProblem, ...] = (
    LinearProblem("1024x1024_m1", 1, 1024, 1024),
    LinearProblem("1024x1024_m64", 64, 1024, 1024),
    LinearProblem("1024x1024_m256", 256, 1024, 1024),
    LinearProblem("4096x4096_m128", 128, 4096, 4096),
)
BENCH_BLOCK_CONV: tuple[ConvProblem, ...] = (BENCH_CONV[1], BENCH_CONV[2])


def at_densities(problems: Sequence[Problem], densities: Sequence[float]) -> list[Problem]:
    """Every problem at every density; names stay (density is a field of its own)."""
    return [replace(problem, density=density) for problem in problems for density in densities]


def with_block_sizes(problems: Sequence[Problem], block_sizes: Sequence[tuple[int, int]]) -> list[Problem]:
    """Every problem with masks of every block size."""
    return [replace(problem, block_size=size) for problem in problems for size in block_sizes]
