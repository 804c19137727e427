# SPDX-License-Identifier: Apache-2.0
"""The main loops of csrc/cuda/common by themselves, over a plain dense weight (tests/cuda_host/dense_launch.cu)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cuda.conftest import DTYPES, Device
from tests.ops.operators import assert_close, sum_bound
from tests.problems import ConvProblem, LinearProblem, Problem

# (rows, columns, depth) of a block, as dense_launch.cu numbers them
TILES = ((128, 128, 32), (64, 64, 32), (64, 16, 64), (64, 8, 64), (16, 32, 16))
EXPAND, SLABS = 1, 2


@pytest.fixture(autouse=True)
def _emulated(device: Device) -> None:
    if not device.emulated:
        pytest.skip("this operator is built for the emulator alone")


def padded(weight: Tensor) -> Tensor:
    """[n, k rounded up to 16]"""
    weight = weight.flatten(1)
    return F.pad(weight, (0, -weight.shape[1] % 16)).contiguous()


def run(
    device: Device, problem: Problem, *, tile: int, kind: int = 0, splits: int = 1, relu: bool = False,
    bias: bool = True, x: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Run and compare with float64."""
    x = problem.input() if x is None else x
    weight, b = problem.weight(), problem.bias() if bias else None
    wide = (x.double(), weight.double(), None if b is None else b.double())
    size = (tile, kind, splits)
    if isinstance(problem, LinearProblem):
        y = device.ops.dense_linear(device.move(x), padded(weight), b, relu, *size)
        exact, magnitude = F.linear(*wide), F.linear(*(t if t is None else t.abs() for t in wide))
    else:
        geometry: dict[str, Any] = {
            "stride": problem.stride, "padding": problem.padding, "dilation": problem.dilation,
            "groups": problem.groups,
        }  # fmt: skip
        y = device.ops.dense_conv2d(
            device.move(x), padded(weight), b, problem.kernel, problem.stride, problem.padding, problem.dilation,
            problem.groups, relu, *size,
        )  # fmt: skip
        exact = F.conv2d(*wide, **geometry)
        magnitude = F.conv2d(*(t if t is None else t.abs() for t in wide), **geometry)
    assert y.dtype == x.dtype
    terms = weight.shape[1:].numel() + 1
    if x.dtype == torch.float32:
        # Three products of tf32: each factor is off by 2 units, and lo * lo is left out, 4 units more.
        unit = 2.0**-24
        magnitude = magnitude * (1 + 8 * unit / sum_bound(terms, x.dtype))
    assert_close(y, exact.relu() if relu else exact, magnitude, terms)
    return y


def linear(m: int, n: int, k: int, dtype: torch.dtype) -> LinearProblem:
    return LinearProblem("", m, n, k, 1.0, dtype=dtype, seed=m + n + k)


def conv(dtype: torch.dtype, **changes: Any) -> ConvProblem:
    problem = ConvProblem("", 2, 5, 9, 7, 6, padding=(1, 1), density=1.0, dtype=dtype, seed=7)
    return replace(problem, **changes)


@pytest.mark.parametrize("tile", range(len(TILES)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_around_the_edges_of_a_tile(device: Device, dtype: torch.dtype, tile: int) -> None:
    rows, columns, depth = TILES[tile]
    run(device, linear(columns, rows, depth, dtype), tile=tile)
    run(device, linear(columns + 1, rows - 1, depth - 1, dtype), tile=tile, relu=True)
    run(device, linear(columns - 1, rows + 1, 5 * depth + 1, dtype), tile=tile, bias=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 7, 8, 36, 100, 130])
def test_linear_depths(device: Device, dtype: torch.dtype, k: int) -> None:
    """Strides of 2, 4, 8 and 16 bytes: each has its own way of loading."""
    run(device, linear(5, 20, k, dtype), tile=3)
    run(device, linear(33, 8, k, dtype), tile=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_misaligned_input(device: Device, dtype: torch.dtype, offset: int) -> None:
    problem = linear(9, 17, 64, dtype)
    memory = torch.empty(9 * 64 + offset, dtype=dtype)
    x = memory[offset:].view(9, 64).copy_(problem.input())
    run(device, problem, tile=2, x=x)
    image = conv(dtype, kernel=(1, 1), padding=(0, 0), c_in=20, h=4, w=8)
    memory = torch.empty(2 * 20 * 32 + offset, dtype=dtype)
    run(device, image, tile=2, x=memory[offset:].view(2, 20, 4, 8).copy_(image.input()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [EXPAND, SLABS])
@pytest.mark.parametrize("splits", [1, 3])
def test_what_a_policy_may_ask_for(device: Device, dtype: torch.dtype, kind: int, splits: int) -> None:
    """expand() and steps put together of slabs."""
    run(device, linear(17, 70, 328, dtype), tile=2, kind=kind, splits=splits)
    run(device, linear(3, 7, 31, dtype), tile=2, kind=kind, splits=splits)
    run(device, conv(dtype, c_in=21), tile=2, kind=kind, splits=splits)
    run(device, conv(dtype, c_in=50, h=4, w=4, kernel=(1, 1), padding=(0, 0)), tile=2, kind=kind, splits=splits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [2, 5])
def test_split_sums(device: Device, dtype: torch.dtype, splits: int) -> None:
    problem = linear(10, 65, 200, dtype)
    first = run(device, problem, tile=3, splits=splits, relu=True)
    assert torch.equal(first, run(device, problem, tile=3, splits=splits, relu=True))
    run(device, linear(2, 3, 20, dtype), tile=3, splits=splits)  # more splits than steps
    run(device, conv(dtype, c_in=12, groups=3), tile=4, splits=splits)


CONVOLUTIONS = {
    "pointwise_16": {"kernel": (1, 1), "padding": (0, 0), "h": 4, "w": 8, "c_in": 18},
    "pointwise_8": {"kernel": (1, 1), "padding": (0, 0), "h": 2, "w": 6, "c_in": 18},
    "pointwise_4": {"kernel": (1, 1), "padding": (0, 0), "h": 2, "w": 7, "c_in": 18},
    "pointwise_odd": {"kernel": (1, 1), "padding": (0, 0), "h": 3, "w": 5, "c_in": 18},
    "pointwise_stride2": {"kernel": (1, 1), "padding": (0, 0), "stride": (2, 2)},
    "pointwise_padded": {"kernel": (1, 1), "padding": (1, 2)},
    "3x3": {},
    "3x3_even": {"h": 8, "w": 8, "batch": 3},
    "stride2": {"stride": (2, 2)},
    "stride3x1": {"stride": (3, 1), "padding": (2, 0)},
    "padding_wide": {"padding": (4, 3)},
    "dilation2": {"dilation": (2, 2), "padding": (2, 2)},
    "kernel5": {"kernel": (5, 5), "padding": (2, 2)},
    "kernel1x7": {"kernel": (1, 7), "padding": (0, 3)},
    "groups3": {"c_in": 9, "c_out": 12, "groups": 3},
    "depthwise": {"c_in": 9, "c_out": 18, "groups": 9},
    "all": {"batch": 3, "c_in": 6, "c_out": 8, "h": 15, "w": 12, "kernel": (3, 2), "stride": (2, 3), "padding": (2, 1),
            "dilation": (2, 1), "groups": 2},
    "batch0": {"batch": 0},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(device: Device, dtype: torch.dtype, name: str) -> None:
    run(device, conv(dtype, **CONVOLUTIONS[name]), tile=4, relu=name == "3x3")


@pytest.mark.parametrize("tile", range(len(TILES)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_convolutions_around_the_edges_of_a_tile(device: Device, dtype: torch.dtype, tile: int) -> None:
    run(device, conv(dtype, c_in=15, c_out=TILES[tile][0] + 1, h=9), tile=tile)
    run(device, conv(dtype, c_in=35, c_out=20, h=8, w=9, kernel=(1, 1), padding=(0, 0)), tile=tile)


# (rows, k) of a block of gradients, as dense_outer_launch.cu numbers them
OUTER_TILES = ((128, 128), (64, 64), (16, 128))
OUTER_SLABS = 1


def run_outer(
    device: Device, problem: Problem, *, tile: int, kind: int = 0, splits: int = 1, offset: int = 0
) -> Tensor:
    """Run and compare with autograd in float64. offset: entries by which input and gradient are misaligned."""

    def moved(tensor: Tensor) -> Tensor:
        memory = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
        return device.move(memory[offset:].view(tensor.shape).copy_(tensor))

    x, weight = problem.input(), problem.weight()
    wide = weight.double().requires_grad_()
    generator = torch.Generator().manual_seed(problem.seed)

    def gradient(x: Tensor, grad: Tensor) -> Tensor:
        return torch.autograd.grad(forward(x, wide), wide, grad)[0].flatten(1)

    if isinstance(problem, LinearProblem):
        forward, name, geometry = F.linear, "dense_linear_grad", ()
    else:
        p = problem
        geometry = (p.kernel, p.stride, p.padding, p.dilation, p.groups)
        name = "dense_conv2d_grad"

        def forward(x: Tensor, w: Tensor) -> Tensor:
            return F.conv2d(x, w, None, p.stride, p.padding, p.dilation, p.groups)

    grad = torch.randn(forward(x.double(), wide).shape, generator=generator).to(x.dtype)
    actual = getattr(device.ops, name)(moved(grad), moved(x), *geometry, tile, kind, splits)
    exact, magnitude = gradient(x.double(), grad.double()), gradient(x.double().abs(), grad.double().abs())
    terms = grad.numel() // max(1, problem.weight().shape[0])
    if x.dtype == torch.float32:
        magnitude = magnitude * (1 + 8 * 2.0**-24 / sum_bound(max(1, terms), x.dtype))
    assert_close(actual, exact, magnitude, terms)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", range(len(OUTER_TILES)))
def test_gradients_of_linear_weights(device: Device, dtype: torch.dtype, tile: int) -> None:
    rows, depth = OUTER_TILES[tile]
    run_outer(device, linear(32, rows, depth, dtype), tile=tile)
    run_outer(device, linear(33, rows + 1, depth - 1, dtype), tile=tile)
    run_outer(device, linear(200, rows - 2, depth + 4, dtype), tile=tile)
    run_outer(device, linear(0, rows, depth, dtype), tile=tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", range(len(OUTER_TILES)))
def test_gradients_of_convolutions(device: Device, dtype: torch.dtype, tile: int) -> None:
    run_outer(device, conv(dtype, c_in=15, c_out=OUTER_TILES[tile][0] + 1), tile=tile)
    run_outer(device, conv(dtype, c_in=130, h=4, w=9, kernel=(1, 1), padding=(0, 0)), tile=tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_of_all_geometries(device: Device, dtype: torch.dtype, name: str) -> None:
    run_outer(device, conv(dtype, **CONVOLUTIONS[name]), tile=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [0, OUTER_SLABS])
@pytest.mark.parametrize("splits", [1, 3])
def test_gradients_in_slabs_and_shares(device: Device, dtype: torch.dtype, kind: int, splits: int) -> None:
    problem = linear(150, 18, 328, dtype)
    first = run_outer(device, problem, tile=2, kind=kind, splits=splits)
    assert torch.equal(first, run_outer(device, problem, tile=2, kind=kind, splits=splits))
    run_outer(device, linear(40, 7, 31, dtype), tile=2, kind=kind, splits=splits)  # more splits than steps
    run_outer(device, conv(dtype, c_in=18, c_out=20, groups=2), tile=2, kind=kind, splits=splits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_gradients_of_misaligned_input(device: Device, dtype: torch.dtype, offset: int) -> None:
    run_outer(device, linear(35, 24, 64, dtype), tile=1, offset=offset)
    run_outer(device, conv(dtype, kernel=(1, 1), padding=(0, 0), c_in=20, h=4, w=8), tile=1, offset=offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_do(device: Device, dtype: torch.dtype) -> None:
    assert run(device, linear(0, 20, 16, dtype), tile=3).shape == (0, 20)
    assert run(device, linear(3, 0, 16, dtype), tile=3).shape == (3, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 2])
def test_values_that_are_no_numbers_stay_in_their_row(device: Device, dtype: torch.dtype, splits: int) -> None:
    """Also next to the edges, where tiles are filled up with zeros."""
    weight, x = torch.ones(3, 37, dtype=dtype), torch.ones(9, 37, dtype=dtype)
    weight[2], weight[1, 20] = 0.5, float("inf")
    x[1, 36], x[4, 0], x[8, 20] = float("nan"), float("inf"), -float("inf")
    y = device.ops.dense_linear(x, padded(weight), None, False, 3, 0, splits)
    torch.testing.assert_close(y, F.linear(x.double(), weight.double()).to(dtype), equal_nan=True)
    assert torch.isnan(device.ops.dense_linear(x, padded(weight), None, True, 3, 0, splits)[1]).all()


def test_the_largest_float32_is_no_infinity(device: Device) -> None:
    """It rounds to infinity in tf32."""
    weight, x = torch.zeros(2, 16), torch.zeros(1, 16)
    x[0, 3], weight[0, 3], weight[1, 3] = -torch.finfo(torch.float32).max, 0.5, 2**-60
    y = device.ops.dense_linear(x, weight, None, False, 3, 0, 1)
    torch.testing.assert_close(y, F.linear(x, weight), rtol=1e-6, atol=0)
