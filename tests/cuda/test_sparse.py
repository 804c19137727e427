# SPDX-License-Identifier: Apache-2.0
"""Unstructured weights on CUDA: every kernel over shapes that straddle its tiles, against dense torch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimtorch.formats import Sparse
from tests.cuda.conftest import DTYPES, Device
from tests.ops import operators
from tests.problems import EDGE_CONV, ConvProblem, LinearProblem, Problem

HALVES = (torch.float16, torch.bfloat16)
IDS: dict[str, Any] = {"ids": str}

# Tiles: 64 rows x 8 columns, 64 x 32, 128 x 64; cells of 16 x 64. Rows: columns by 1, 2, 4; panels of 128 x 64.
LINEAR = (
    LinearProblem("one", 1, 1, 1, 1.0),
    LinearProblem("empty", 5, 33, 70, 0.0, seed=1),
    LinearProblem("full", 3, 18, 65, 1.0, seed=2),
    LinearProblem("no_columns", 0, 20, 30, 0.5, seed=3),
    LinearProblem("m1", 1, 65, 129, 0.3, seed=4),
    LinearProblem("m2", 2, 17, 64, 0.3, seed=5),
    LinearProblem("m8", 8, 64, 63, 0.4, seed=6),
    LinearProblem("m9", 9, 63, 128, 0.2, seed=7),
    LinearProblem("m32", 32, 15, 127, 0.5, seed=8),
    LinearProblem("m33", 33, 129, 65, 0.2, seed=9),
    LinearProblem("m65", 65, 128, 100, 0.2, seed=10),
    LinearProblem("empty_rows", 33, 31, 64, 0.4, seed=11, empty_rows=11),
    LinearProblem("deep", 3, 20, 1300, 0.2, seed=12),  # split
    LinearProblem("deep_wide", 40, 20, 700, 0.4, seed=13),
)
CONV_NAMES = (
    "map1", "map7", "pointwise_map8", "pointwise_map7", "c_out17", "batch0", "batch3", "stride2_padded",
    "pointwise_stride2", "pointwise_padded", "dilation3x1", "kernel7x1", "groups2", "depthwise", "pointwise_groups3",
    "all", "density0", "pointwise_density100", "empty_rows",
)  # fmt: skip
CONV = tuple(p for p in EDGE_CONV if p.name in CONV_NAMES)


def tensors(problem: Problem, dtype: torch.dtype, device: Device) -> tuple[Tensor, Sparse, Tensor]:
    problem = replace(problem, dtype=dtype)
    weight = Sparse.pack(device.move(problem.weight()))
    return device.move(problem.input()), weight, device.move(problem.bias())


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("problem", LINEAR, **IDS)
def test_linear(problem: LinearProblem, dtype: torch.dtype, device: Device, wrappers: Callable[[str], Any]) -> None:
    wrappers("sparse")
    x, weight, bias = tensors(problem, dtype, device)
    operators.check_forward(x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("problem", CONV, **IDS)
def test_conv2d(problem: ConvProblem, dtype: torch.dtype, device: Device, wrappers: Callable[[str], Any]) -> None:
    wrappers("sparse")
    x, weight, bias = tensors(problem, dtype, device)
    operators.check_forward(x, weight, bias, **operators.geometry(problem))


# Each forward kernel by itself, whatever the heuristics would choose: values packed beforehand, packed in the call
# (many columns), by rows, and by rows without any plan.
@pytest.mark.parametrize("given", ["packed", "plan", "nothing"])
@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 31, 33, 70])
def test_linear_kernels(m: int, dtype: torch.dtype, given: str, device: Device) -> None:
    if given == "packed" and dtype == torch.float32:
        pytest.skip("float32 runs by rows")
    problem = LinearProblem("", m, 67, 131, 0.3, seed=m)
    x, weight, bias = tensors(problem, dtype, device)
    plan = None if given == "nothing" else plan_of(weight, device)
    packed = device.ops.sparse_pack_values(weight.values, plan) if given == "packed" else None
    y = device.ops.sparse_linear_inference(
        x, weight.values, weight.columns, weight.row_offsets, plan, None, packed, bias, True
    )
    check(y, x, weight, bias)


@pytest.mark.parametrize("given", ["packed", "plan", "nothing"])
@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("size", [3, 5, 9])
def test_conv2d_kernels(size: int, dtype: torch.dtype, given: str, device: Device) -> None:
    if given == "packed" and dtype == torch.float32:
        pytest.skip("float32 runs by rows")
    problem = ConvProblem("", 2, 10, 34, size, size, padding=(1, 1), groups=2, density=0.3, seed=size)
    x, weight, bias = tensors(problem, dtype, device)
    plan = None if given == "nothing" else plan_of(weight, device, 2)
    packed = device.ops.sparse_pack_values(weight.values, plan) if given == "packed" else None
    y = device.ops.sparse_conv2d_inference(
        x, weight.values, weight.columns, weight.row_offsets, plan, None, packed, bias,
        [3, 3], [1, 1], [1, 1], [1, 1], 2, True,
    )  # fmt: skip
    check(y, x, weight, bias, **operators.geometry(problem))


def plan_of(weight: Sparse, device: Device, groups: int = 1, *, transposed: bool = False) -> Tensor:
    width = math.prod(weight.shape[1:])
    plan = device.ops.sparse_cuda_plan(weight.columns.cpu(), weight.row_offsets.cpu(), width, groups, transposed)
    return device.move(plan)


def check(y: Tensor, x: Tensor, weight: Sparse, bias: Tensor, **options: Any) -> None:
    """With a ReLU."""
    dense = weight.to_dense().double()
    exact = operators.product(x.double(), dense, bias.double(), **options).relu()
    magnitude = operators.product(x.double().abs(), dense.abs(), bias.double().abs(), **options)
    operators.assert_close(y, exact, magnitude, operators.stored_terms(weight))


def test_few_rows_of_a_deep_weight(device: Device) -> None:
    """x of this depth does not fit the shared memory of the kernels for few columns: they take fewer, or none."""
    for m, k in ((4, 6200), (2, 12400), (3, 25000)):
        x, weight, bias = tensors(LinearProblem("", m, 9, k, 0.02, seed=k), torch.float32, device)
        y = device.ops.sparse_linear(x, weight.values, weight.columns, weight.row_offsets, None, None, None, bias, True)
        check(y, x, weight, bias)


def test_rows_that_fill_a_device(device: Device) -> None:
    """Enough tiles for six rows a warp, and more than 32 weights of a row in one panel."""
    n = 64 * 67
    x, weight, bias = tensors(LinearProblem("", 65, n, 70, 0.6, seed=3), torch.float32, device)
    stored = (weight.values, weight.columns, weight.row_offsets)
    check(device.ops.sparse_linear(x, *stored, None, None, None, bias, True), x, weight, bias)
    problem = ConvProblem("", 1, 2, n, 9, 8, padding=(1, 1), density=0.5, seed=4)
    x, weight, bias = tensors(problem, torch.float32, device)
    stored = (weight.values, weight.columns, weight.row_offsets)
    y = device.ops.sparse_conv2d(
        x, *stored, None, None, None, bias, [3, 3], [1, 1], [1, 1], [1, 1], 1, True
    )  # fmt: skip
    check(y, x, weight, bias, **operators.geometry(problem))


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("problem", [p for p in LINEAR if p.name in ("m1", "m9", "m33", "empty", "no_columns")], **IDS)
def test_linear_gradients(
    problem: LinearProblem, dtype: torch.dtype, device: Device, wrappers: Callable[[str], Any]
) -> None:
    wrappers("sparse")
    x, weight, bias = tensors(problem, dtype, device)
    operators.check_gradients(x, weight, bias, relu=True)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize(
    "problem", [p for p in CONV if p.name in ("map7", "pointwise_map7", "groups2", "all", "batch0")], **IDS
)
def test_conv2d_gradients(
    problem: ConvProblem, dtype: torch.dtype, device: Device, wrappers: Callable[[str], Any]
) -> None:
    wrappers("sparse")
    x, weight, bias = tensors(problem, dtype, device)
    operators.check_gradients(x, weight, bias, **operators.geometry(problem))


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_gradient_of_the_input_without_a_plan(dtype: torch.dtype, device: Device) -> None:
    problem = LinearProblem("", 3, 40, 2100, 0.1, seed=1)
    _, weight, _ = tensors(problem, dtype, device)
    grad = device.move(operators.random(3, 40, dtype=dtype))
    given = [plan_of(weight, device, transposed=True), None]
    dense = weight.to_dense().double()
    for plan in given:
        actual = device.ops.sparse_linear_grad_input(
            grad, weight.values, weight.columns, weight.row_offsets, plan, weight.shape[1]
        )
        operators.assert_close(actual, grad.double() @ dense, grad.double().abs() @ dense.abs(), 40)
    images = device.move(operators.random(2, 40, 3, 2, dtype=dtype, seed=1))
    by_pixel = images.double().permute(0, 2, 3, 1)
    for plan in given:
        actual = device.ops.sparse_conv2d_grad_columns(
            images, weight.values, weight.columns, weight.row_offsets, plan, weight.shape[1], 1
        )
        exact, magnitude = by_pixel @ dense, by_pixel.abs() @ dense.abs()
        operators.assert_close(actual.permute(0, 2, 3, 1), exact, magnitude, 40)


# ---- NaN and Inf -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("m", [1, 8, 20, 40])
@pytest.mark.parametrize("k", [70, 1300])  # one split, and more
def test_not_finite_where_a_weight_meets_it(k: int, m: int, dtype: torch.dtype, plan: bool, device: Device) -> None:
    """Tensor cores multiply zeros too: 0 * Inf must not show in rows that store no weight there."""
    x, weight, bias = tensors(LinearProblem("", m, 80, k, 0.1, seed=k), dtype, device)
    x[m // 2, k // 2], x[m - 1, k - 1], x[0, 3], x[0, 5] = math.nan, math.inf, -math.inf, math.inf
    made = plan_of(weight, device) if plan else None
    packed = device.ops.sparse_pack_values(weight.values, made) if made is not None else None
    y = device.ops.sparse_linear(x, weight.values, weight.columns, weight.row_offsets, made, None, packed, bias, False)
    check_not_finite(y, *not_finite(x, weight, bias), weight)
    assert 0 < int(y.isfinite().sum()) < y.numel()


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("size", [5, 9])
def test_not_finite_pixels(size: int, dtype: torch.dtype, device: Device, wrappers: Callable[[str], Any]) -> None:
    module = wrappers("sparse")
    problem = ConvProblem("", 2, 12, 20, size, size, padding=(1, 1), stride=(2, 1), groups=2, density=0.2, seed=1)
    x, weight, bias = tensors(problem, dtype, device)
    x[0, 0, 0, 0], x[1, 7, 2, 3], x[1, 8, 4, 4] = math.nan, math.inf, -math.inf
    y = module.sparse_conv2d(x, weight, bias, **operators.geometry(problem))
    # As a linear layer over the taps, so that a zero in the dense weight does not spread NaN.
    columns = torch.nn.functional.unfold(x.float(), (3, 3), padding=1, stride=(2, 1)).to(dtype).transpose(1, 2)
    for group in range(2):
        rows, depth = slice(10 * group, 10 * group + 10), slice(54 * group, 54 * group + 54)
        part = Sparse.pack(weight.to_dense()[rows].flatten(1))
        exact, magnitude = not_finite(columns[..., depth].flatten(0, 1), part, bias[rows])
        check_not_finite(y[:, rows].flatten(2).transpose(1, 2).flatten(0, 1), exact, magnitude, part)


def not_finite(x: Tensor, weight: Sparse, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The product over stored weights alone, and that of the magnitudes."""
    rows, columns, values = weight.row_indices(), weight.columns.long(), weight.values.double()
    terms = x.double()[:, columns] * values
    shape = (x.shape[0], weight.shape[0])
    exact = torch.zeros(shape, dtype=torch.float64, device=x.device).index_add(1, rows, terms) + bias.double()
    magnitude = torch.zeros_like(exact).index_add(1, rows, terms.abs()) + bias.double().abs()
    return exact, magnitude


def check_not_finite(y: Tensor, exact: Tensor, magnitude: Tensor, weight: Sparse) -> None:
    finite = exact.isfinite()
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.double()[~finite].nan_to_num(nan=0), exact[~finite].nan_to_num(nan=0))
    operators.assert_close(y[finite], exact[finite], magnitude[finite], operators.stored_terms(weight))


# ---- what lies oddly -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("m", [1, 4, 40])
def test_misaligned(m: int, dtype: torch.dtype, device: Device, wrappers: Callable[[str], Any]) -> None:
    wrappers("sparse")
    x, weight, bias = tensors(LinearProblem("", m, 30, 64, 0.3, seed=m), dtype, device)
    for odd in (1, 2, 3):
        moved = [
            torch.empty(t.numel() + odd, dtype=dtype, device=t.device)[odd:].view(t.shape).copy_(t) for t in (x, bias)
        ]
        values = torch.empty(weight.values.numel() + odd, dtype=dtype, device=x.device)[odd:].copy_(weight.values)
        operators.check_forward(moved[0], operators.with_values(weight, values), moved[1], relu=True)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    operators.check_forward(strided, weight, bias)


def test_changed_values_are_packed_anew(device: Device, wrappers: Callable[[str], Any]) -> None:
    wrappers("sparse")
    x, weight, bias = tensors(LinearProblem("", 5, 30, 64, 0.3), torch.float16, device)
    operators.check_forward(x, weight, bias)
    weight.values.mul_(2)
    operators.check_forward(x, weight, bias)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_plan_holds_every_position_once(groups: int, transposed: bool, device: Device) -> None:
    weight = Sparse.pack(LinearProblem("", 1, 51, 130, 0.3, seed=2).weight())
    plan = plan_of(weight, device, groups, transposed=transposed).cpu()
    order = plan[: 4 * weight.values.numel()].view(torch.int32)
    assert torch.equal(order.sort().values, torch.arange(weight.values.numel(), dtype=torch.int32))


def test_bad_plans_and_positions(device: Device) -> None:
    x, weight, _ = tensors(LinearProblem("", 2, 20, 30, 0.3), torch.float16, device)
    plan = plan_of(weight, device)
    with pytest.raises(RuntimeError, match="plan: made for a matrix of other sizes"):
        device.ops.sparse_linear(
            x, weight.values, weight.columns, weight.row_offsets, plan[:-16], None, None, None, False
        )
    with pytest.raises(RuntimeError, match="values: expected the dtype of x"):
        device.ops.sparse_linear(
            x.float(), weight.values, weight.columns, weight.row_offsets, plan, None, None, None, False
        )
    falling = weight.columns.cpu().flip(0)
    with pytest.raises(RuntimeError, match="columns: expected ascending"):
        device.ops.sparse_cuda_plan(falling, weight.row_offsets.cpu(), 30, 1, False)
