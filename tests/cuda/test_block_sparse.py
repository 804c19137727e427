# SPDX-License-Identifier: Apache-2.0
"""The block-sparse operators on CUDA, or in the emulator: tiles, types and kernels against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimtorch.formats import BlockSparse
from tests.cuda.conftest import DTYPES, Device
from tests.ops.operators import assert_close, geometry, pattern, product, random, stored_terms, sum_bound
from tests.problems import EDGE_CONV, EDGE_LINEAR, ConvProblem, LinearProblem, Problem

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
FORWARD = ("m0", "m1", "m8", "m17", "n1", "n17", "n65", "k17", "k129", "m5_k257", "density0", "density100")
CONV = ("map7", "pointwise_map8", "batch0", "stride2_padded", "kernel1x7", "pointwise_stride2", "groups2", "density0")


def tensors(problem: Problem, block_size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, BlockSparse, Tensor]:
    problem = replace(problem, block_size=block_size, dtype=dtype)
    return problem.input(), BlockSparse.pack(problem.weight(), block_size), problem.bias()


def moved(device: Device, weight: BlockSparse) -> BlockSparse:
    values, columns, offsets = (device.move(t) for t in (weight.values, weight.block_columns, weight.block_row_offsets))
    return BlockSparse(values, columns, offsets, weight.shape, weight.block_size)


def plan(device: Device, weight: BlockSparse, groups: int, *, transposed: bool = False) -> Tensor:
    made = torch.ops.slimtorch.block_sparse_cuda_plan(
        weight.block_columns, weight.block_row_offsets, weight.block_size, weight.shape[0],
        math.prod(weight.shape[1:]), groups, transposed,
    )  # fmt: skip
    return device.move(made)


def forward(
    device: Device, x: Tensor, weight: BlockSparse, bias: Tensor | None, *, relu: bool = False, plans: bool = True,
    **options: Any,
) -> Tensor:  # fmt: skip
    on = moved(device, weight)
    made = plan(device, weight, options.get("groups", 1)) if plans else None
    bias = None if bias is None else device.move(bias)
    args = (device.move(x), on.values, on.block_columns, on.block_row_offsets, made, None, bias, weight.shape[0])
    if len(weight.shape) == 2:
        return device.ops.block_sparse_linear(*args, relu).cpu()
    return device.ops.block_sparse_conv2d(
        *args, weight.shape[2:], options["stride"], options["padding"], options["dilation"], options["groups"], relu
    ).cpu()


def close(actual: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    terms = max(1, terms)
    if actual.dtype == torch.float32:
        # Three products of tf32: each factor is off by 2 units, and lo * lo is left out, 4 units more.
        magnitude = magnitude * (1 + 8 * 2.0**-24 / sum_bound(terms, actual.dtype))
    assert_close(actual, exact, magnitude, terms)


def check_forward(
    device: Device, x: Tensor, weight: BlockSparse, bias: Tensor | None, *, relu: bool = False, plans: bool = True,
    **options: Any,
) -> Tensor:  # fmt: skip
    y = forward(device, x, weight, bias, relu=relu, plans=plans, **options)
    dense, wide, wide_bias = weight.to_dense().double(), x.double(), None if bias is None else bias.double()
    exact = product(wide, dense, wide_bias, **options)
    magnitude = product(wide.abs(), dense.abs(), None if wide_bias is None else wide_bias.abs(), **options)
    assert y.dtype == x.dtype
    close(y, exact.relu() if relu else exact, magnitude, stored_terms(weight))
    return y


def check_gradients(device: Device, x: Tensor, weight: BlockSparse, *, plans: bool = True, **options: Any) -> None:
    """The gradient operators of a layer; the input's before the taps of a convolution are summed up."""
    on, groups, width = moved(device, weight), options.get("groups", 1), math.prod(weight.shape[1:])
    dense, x64 = weight.to_dense().double().requires_grad_(), x.double().requires_grad_()
    y = product(x64, dense, **options)
    grad = random(*y.shape, dtype=x.dtype, seed=7)
    where = (on.block_columns, on.block_row_offsets)
    backward_plan = plan(device, weight, groups, transposed=True) if plans else None
    args = (device.move(grad), on.values, *where, backward_plan, width)
    if len(weight.shape) == 2:
        actual = device.ops.block_sparse_linear_grad_input(*args)
        exact, bound = grad.double() @ dense.detach(), grad.double().abs() @ dense.detach().abs()
        terms = pattern(weight).sum(0).max()
    else:
        actual = device.ops.block_sparse_conv2d_grad_columns(*args, groups)

        def transposed(g: Tensor, w: Tensor) -> Tensor:
            parts = zip(g.flatten(2).chunk(groups, 1), w.flatten(1).chunk(groups, 0), strict=True)
            return torch.cat([b.T @ a for a, b in parts], 1).unflatten(2, g.shape[2:])

        exact, bound = transposed(grad.double(), dense.detach()), transposed(grad.double().abs(), dense.detach().abs())
        terms = pattern(weight).flatten(1).sum(0).max()
    close(actual.cpu(), exact, bound, int(terms))

    conv = () if len(weight.shape) == 2 else (weight.shape[2:], *options.values())
    kind = "conv2d" if conv else "linear"
    of_values = getattr(device.ops, f"block_sparse_{kind}_grad_values")
    actual = of_values(device.move(grad), device.move(x), *where, None, weight.block_size, *conv).cpu()

    def through(x: Tensor, grad: Tensor) -> Tensor:
        values = weight.values.double().requires_grad_()
        stored = BlockSparse(values, weight.block_columns, weight.block_row_offsets, weight.shape, weight.block_size)
        return torch.autograd.grad(product(x, stored.to_dense(), **options), values, grad)[0]

    columns = grad.numel() // max(1, weight.shape[0])
    close(actual, through(x.double(), grad.double()), through(x.double().abs(), grad.double().abs()), columns)


def chosen(problems: tuple[Any, ...], names: tuple[str, ...]) -> list[Any]:
    found = {p.name: p for p in problems}
    return [found[name] for name in names]


# ---- linear ----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("size", [(16, 16), (8, 8), (64, 64), (3, 5), (48, 32)], ids=str)
def test_linear_edges(device: Device, size: tuple[int, int], dtype: torch.dtype) -> None:
    for problem in chosen(EDGE_LINEAR, FORWARD):
        x, weight, bias = tensors(problem, size, dtype)
        check_forward(device, x, weight, bias)


@each_dtype
@pytest.mark.parametrize(
    ("m", "n", "k", "size"),
    [
        (130, 300, 200, (16, 16)),  # rows and columns beyond a tile
        (40, 520, 144, (32, 32)),
        (129, 130, 200, (64, 64)),
        (33, 520, 96, (8, 8)),
        (20, 520, 96, (8, 8)),
        (40, 200, 128, (4, 16)),
        (9, 70, 128, (1, 16)),
        (40, 140, 90, (24, 24)),
        (3, 140, 700, (16, 16)),  # a split sum
        (40, 60, 1100, (64, 64)),
        (40, 520, 600, (16, 32)),
    ],
    ids=str,
)
def test_linear_tiles(device: Device, m: int, n: int, k: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, bias = tensors(LinearProblem("", m, n, k, 0.3, seed=m + n + k), size, dtype)
    check_forward(device, x, weight, bias, relu=True)


@each_dtype
@pytest.mark.parametrize("size", [(16, 16), (32, 64), (64, 64), (8, 8), (16, 8), (3, 5), (4, 16)], ids=str)
def test_linear_gradients(device: Device, size: tuple[int, int], dtype: torch.dtype) -> None:
    for shape in ((19, 70, 45), (37, 40, 300)):
        x, weight, _ = tensors(LinearProblem("", *shape, 0.3, seed=3), size, dtype)
        check_gradients(device, x, weight)
    check_gradients(device, x[:3], weight, plans=False)
    if size in ((16, 16), (64, 64)):  # columns enough for a split sum
        x, weight, _ = tensors(LinearProblem("", 1100, size[0], 20, 1.0, seed=4), size, dtype)
        check_gradients(device, x, weight)


@pytest.mark.parametrize("size", [(16, 16), (8, 8)], ids=str)
@each_dtype
def test_linear_without_a_plan(device: Device, size: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, bias = tensors(LinearProblem("", 5, 40, 70, 0.4, seed=5), size, dtype)
    check_forward(device, x, weight, bias, plans=False)
    check_forward(device, x, weight, None)


@each_dtype
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_misaligned_activations(device: Device, offset: int, dtype: torch.dtype) -> None:
    x, weight, bias = tensors(LinearProblem("", 40, 70, 96, 0.4, seed=6), (16, 16), dtype)
    shifted = torch.zeros(x.numel() + offset, dtype=dtype)[offset:].view_as(x).copy_(x)
    check_forward(device, shifted, weight, bias)
    check_forward(device, shifted[:3], weight, bias)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("size", [(16, 16), (8, 8), (4, 16), (32, 8), (3, 5), (64, 64)], ids=str)
@each_dtype
def test_nan_reaches_exactly_what_it_meets(
    device: Device, size: tuple[int, int], dtype: torch.dtype, bad: float
) -> None:
    for m in (9, 40):
        x, weight, bias = tensors(LinearProblem("", m, 90, 150, 0.15, seed=2), size, dtype)
        x[3, 17] = bad
        x[5, 149] = bad
        hit = (~x.isfinite()).double() @ pattern(weight).T > 0
        y = forward(device, x, weight, bias)
        assert torch.equal(~y.isfinite(), hit)
        assert torch.equal(y.isnan(), hit if math.isnan(bad) else torch.zeros_like(hit))


def test_float32_keeps_its_precision(device: Device) -> None:
    """One product to a sum: with plain tf32 it would be off by 2^-11."""
    weight = BlockSparse.pack(torch.eye(64), (16, 16))
    x = random(40, 64) * torch.logspace(-20, 20, 64)
    y = forward(device, x, weight, None)
    assert ((y - x).abs() <= 2.0**-21 * x.abs()).all()


def test_padding_of_values_is_not_read_as_weights(device: Device) -> None:
    x, weight, bias = tensors(LinearProblem("", 40, 70, 50, 1.0, seed=2), (16, 16), torch.float16)
    clean = forward(device, x, weight, bias)
    last = weight.block_columns == 3
    weight.values[last, :, 2:] = math.nan  # columns 50 … 63
    assert torch.equal(forward(device, x, weight, bias), clean)


@each_dtype
def test_the_same_bits_every_time(device: Device, dtype: torch.dtype) -> None:
    x, weight, bias = tensors(LinearProblem("", 5, 80, 900, 0.3, seed=8), (16, 16), dtype)
    assert torch.equal(forward(device, x, weight, bias), forward(device, x, weight, bias))


# ---- conv2d ----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("size", [(16, 16), (8, 8), (2, 3)], ids=str)
def test_conv2d_edges(device: Device, size: tuple[int, int], dtype: torch.dtype) -> None:
    for problem in chosen(EDGE_CONV, CONV):
        x, weight, bias = tensors(problem, size, dtype)
        check_forward(device, x, weight, bias, **geometry(problem))


CONVS = [
    (ConvProblem("", 1, 20, 300, 6, 6, padding=(1, 1), density=0.3, seed=1), (16, 16)),  # wide, if there is work
    (ConvProblem("", 2, 24, 70, 7, 9, padding=(1, 1), density=0.3, seed=2), (64, 64)),
    (ConvProblem("", 1, 64, 70, 12, 12, kernel=(1, 1), density=0.3, seed=3), (32, 32)),
    (ConvProblem("", 1, 32, 64, 6, 6, padding=(1, 1), groups=2, density=0.4, seed=4), (16, 16)),
    (ConvProblem("", 1, 32, 64, 6, 6, padding=(1, 1), groups=4, density=0.4, seed=5), (8, 8)),
    (ConvProblem("", 1, 12, 36, 6, 6, padding=(1, 1), groups=3, density=0.4, seed=6), (8, 4)),  # straddles groups
    (ConvProblem("", 1, 12, 24, 9, 9, stride=(2, 2), dilation=(2, 2), padding=(2, 2), density=0.4, seed=7), (8, 8)),
]


@each_dtype
@pytest.mark.parametrize(("problem", "size"), CONVS, ids=str)
def test_conv2d(device: Device, problem: ConvProblem, size: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, bias = tensors(problem, size, dtype)
    check_forward(device, x, weight, bias, relu=True, **geometry(problem))
    check_gradients(device, x, weight, **geometry(problem))


def test_conv2d_without_plans(device: Device) -> None:
    for problem, size in CONVS[3:6]:
        x, weight, bias = tensors(problem, size, torch.float32)
        check_forward(device, x, weight, bias, plans=False, **geometry(problem))
        check_gradients(device, x, weight, plans=False, **geometry(problem))


@each_dtype
def test_work_enough_for_wide_tiles(device: Device, dtype: torch.dtype) -> None:
    """66 tiles of 256 x 128 or more: half of the emulated device, from where on they are chosen."""
    for problem, size in (
        (LinearProblem("", 4200, 300, 100, 0.3, seed=1), (16, 16)),
        (ConvProblem("", 35, 8, 300, 11, 11, padding=(1, 1), density=0.3, seed=2), (32, 16)),
    ):
        x, weight, bias = tensors(problem, size, dtype)
        check_forward(device, x, weight, bias, **geometry(problem))


# ---- wrappers and wrong arguments ------------------------------------------------------------------------------------


@each_dtype
def test_autograd_through_the_wrappers(device: Device, wrappers: Callable[[str], Any], dtype: torch.dtype) -> None:
    ops = wrappers("block_sparse")
    problem = ConvProblem("", 2, 16, 32, 6, 6, padding=(1, 1), density=0.4, seed=9)
    for p, call, options in (
        (LinearProblem("", 7, 48, 64, 0.4, seed=9), ops.block_sparse_linear, {}),
        (problem, ops.block_sparse_conv2d, geometry(problem)),
    ):
        x, weight, bias = tensors(p, (16, 16), dtype)
        on = moved(device, weight)
        leaves = [device.move(t).requires_grad_() for t in (x, on.values, bias)]
        packed = BlockSparse(leaves[1], on.block_columns, on.block_row_offsets, weight.shape, weight.block_size)
        y = call(leaves[0], packed, leaves[2], activation="relu", **options)
        inference = call(device.move(x), on, device.move(bias), activation="relu", **options)
        assert torch.equal(inference, y)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))

        wide = [t.detach().cpu().double().requires_grad_() for t in leaves]
        dense = BlockSparse(
            wide[1], weight.block_columns, weight.block_row_offsets, weight.shape, weight.block_size
        ).to_dense()
        through = torch.autograd.grad(product(wide[0], dense, wide[2], **options), wide, (y > 0).cpu().double())
        unit = torch.finfo(dtype).eps
        for actual, exact in zip(grads, through, strict=True):
            assert actual.dtype == dtype
            assert (actual.cpu() - exact).abs().max() <= 2 * max(unit, 1e-5) * exact.abs().max()


def test_plans_are_checked(device: Device) -> None:
    x, weight, _ = tensors(LinearProblem("", 3, 40, 64, 0.4, seed=1), (16, 16), torch.float32)
    other = plan(device, tensors(LinearProblem("", 3, 400, 64, 0.4, seed=1), (16, 16), torch.float32)[1], 1)
    on = moved(device, weight)
    with pytest.raises(RuntimeError, match="made for a matrix of other sizes"):
        device.ops.block_sparse_linear(
            device.move(x), on.values, on.block_columns, on.block_row_offsets, other[:-3], None, None, 40, False
        )
    with pytest.raises(RuntimeError, match="values: expected"):
        device.ops.block_sparse_linear(
            device.move(x), on.values.half(), on.block_columns, on.block_row_offsets, None, None, None, 40, False
        )
    with pytest.raises(RuntimeError, match="expected ceil"):
        device.ops.block_sparse_linear(
            device.move(x), on.values, on.block_columns, on.block_row_offsets, None, None, None, 400, False
        )


def test_broken_positions_make_no_plan() -> None:
    columns = torch.tensor([0, 2, 1], dtype=torch.int32)
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    make = torch.ops.slimtorch.block_sparse_cuda_plan
    with pytest.raises(RuntimeError, match="must ascend"):
        make(columns, offsets, (16, 16), 16, 64, 1, False)
    with pytest.raises(RuntimeError, match="inside the weight"):
        make(columns.sort().values, offsets, (16, 16), 16, 32, 1, False)
    with pytest.raises(RuntimeError, match="number of blocks"):
        make(columns[:2], offsets, (16, 16), 16, 64, 1, False)
