# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of codebook, each configuration of them, in the emulator and on a GPU if there is one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import slimtorch as slim
from slimtorch.formats import Codebook
from slimtorch.formats._common import matrix_shape
from slimtorch.formats.codebook import GroupSize, group_code
from tests.cuda.conftest import DTYPES, Device
from tests.ops.operators import assert_close, geometry, product, random, sum_bound
from tests.ops.test_codebook import gradients, make
from tests.problems import EDGE_CONV, EDGE_LINEAR, ConvProblem, LinearProblem, Problem

BITS = range(1, 9)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_bits = pytest.mark.parametrize("bits", BITS)


def plan_of(weight: Codebook, groups: int = 1) -> Tensor:
    rows, width = matrix_shape(weight.shape)
    return torch.ops.slimtorch.codebook_cuda_plan(weight.codes, rows, width, weight.bits, groups)


def forward(
    device: Device,
    x: Tensor,
    weight: Codebook,
    bias: Tensor | None = None,
    *,
    plan: bool = True,
    relu: bool = False,
    **options: Any,
) -> Tensor:
    """The raw operator, on the device; the result on the CPU."""
    groups = options.get("groups", 1)
    tensors = [x, weight.codebook, weight.codes, plan_of(weight, groups) if plan else None]
    moved = [None if t is None else device.move(t) for t in tensors]
    bias = None if bias is None else device.move(bias)
    format = (weight.shape[0], weight.bits, group_code(weight.group_size), weight.zero, bias)
    if len(weight.shape) == 2:
        return device.ops.codebook_linear(*moved, *format, relu).cpu()
    shape = [weight.shape[2:], *(options.get(k, d) for k, d in (("stride", (1, 1)), ("padding", (0, 0)),
                                                                ("dilation", (1, 1))))]  # fmt: skip
    return device.ops.codebook_conv2d(*moved, *format, *shape, groups, relu).cpu()


def check(device: Device, x: Tensor, weight: Codebook, bias: Tensor | None = None, **options: Any) -> Tensor:
    y = forward(device, x, weight, bias, **options)
    assert y.dtype == x.dtype
    shape = {k: v for k, v in options.items() if k != "plan"}
    dense, wide, wide_bias = weight.to_dense().double(), x.cpu().double(), None if bias is None else bias.double()
    exact = product(wide, dense, wide_bias, **shape)
    magnitude = product(wide.abs(), dense.abs(), None if wide_bias is None else wide_bias.abs(), **shape)
    terms = math.prod(weight.shape[1:]) + 1
    if x.dtype == torch.float32:
        # Three products of tf32: each factor is off by 2 units, and lo * lo is left out, 4 units more.
        magnitude = magnitude * (1 + 8 * 2.0**-24 / sum_bound(terms, x.dtype))
    assert_close(y, exact, magnitude, terms)
    return y


# ---- every configuration ---------------------------------------------------------------------------------------------

# Tiles of 8, 16, 64 and 128 columns, 64 and 128 rows; steps of 64 and 128 columns of the weight, slabs of 64.
LINEAR = (
    (1, 5, 1),
    (8, 129, 130),
    (9, 128, 64),
    (17, 65, 129),
    (64, 16, 63),
    (65, 17, 193),
    (129, 3, 80),
    (2, 300, 65),
)


@each_dtype
@each_bits
@pytest.mark.parametrize("group_size", [None, "row", 16, 48, 5], ids=str)
def test_linear(device: Device, group_size: GroupSize, bits: int, dtype: torch.dtype) -> None:
    for i, (m, n, k) in enumerate(LINEAR):
        # All sizes where a table is shared; in turn where it is not: the tiles are the same.
        if (group_size is not None and i % 4 != bits % 4) or (isinstance(group_size, int) and group_size > k):
            continue
        weight = make((n, k), bits, group_size, dtype=dtype, zero=i % 3 == 0, seed=bits + i)
        x, bias = random(m, k, dtype=dtype, seed=i), random(n, dtype=dtype) if i % 2 else None
        plain = check(device, x, weight, bias)
        if i in (1, 4):
            assert torch.equal(forward(device, x, weight, bias, plan=False), plain)
            assert torch.equal(forward(device, x, weight, bias, relu=True), plain.relu())


# Kernels for few rows of a group, and tiles of 64 rows and 64 pixels.
CONV = (
    ConvProblem("3x3", 2, 10, 20, 7, 9, padding=(1, 1), seed=1),
    ConvProblem("1x1", 1, 66, 65, 9, 8, kernel=(1, 1), seed=2),
    ConvProblem("1x1 odd", 2, 7, 9, 5, 5, kernel=(1, 1), seed=3),
    ConvProblem("groups", 2, 8, 34, 6, 7, padding=(1, 1), groups=2, seed=4),
    ConvProblem("all", 3, 6, 18, 15, 12, (3, 2), (2, 3), (2, 1), (2, 1), 2, seed=5),
    ConvProblem("depthwise", 2, 9, 9, 10, 10, groups=9, padding=(1, 1), seed=6),
    ConvProblem("depthwise times 2", 1, 5, 10, 20, 18, groups=5, padding=(1, 1), stride=(2, 1), seed=7),
    ConvProblem("few rows, many taps", 1, 70, 4, 4, 4, groups=2, seed=8),
)


@each_dtype
@each_bits
@pytest.mark.parametrize("problem", CONV, ids=str)
def test_conv2d(device: Device, problem: ConvProblem, bits: int, dtype: torch.dtype) -> None:
    sizes: list[GroupSize] = [None, "row", 8, 16, 3]
    group_size = sizes[(bits + problem.seed) % 5]
    if isinstance(group_size, int) and group_size > problem.columns:
        group_size = None
    problem, options = replace(problem, dtype=dtype), geometry(problem)
    weight = make(tuple(problem.weight().shape), bits, group_size, dtype=dtype, seed=bits)
    plain = check(device, problem.input(), weight, problem.bias(), **options)
    if bits % 3 == 0:
        y = forward(device, problem.input(), weight, problem.bias(), plan=False, relu=True, **options)
        assert torch.equal(y, plain.relu())


@pytest.mark.parametrize("problem", EDGE_LINEAR[::3] + EDGE_CONV[::3], ids=str)
def test_edges(device: Device, problem: Problem) -> None:
    dtype = DTYPES[problem.seed % 3]
    problem, options = replace(problem, dtype=dtype), geometry(problem)
    shape = tuple(problem.weight().shape)
    sizes: list[GroupSize] = [None, "row", 32, 1]
    group_size = sizes[problem.seed % 4]
    if isinstance(group_size, int) and group_size > math.prod(shape[1:]):
        group_size = None
    weight = make(shape, problem.seed % 8 + 1, group_size, dtype=dtype, seed=problem.seed)
    check(device, problem.input(), weight, problem.bias(), **options)


@each_dtype
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_split_sums(device: Device, bits: int, dtype: torch.dtype) -> None:
    # Few rows of many columns are cut into shares of at least four steps.
    for (m, n, k), group_size in itertools.product(((1, 40, 2100), (7, 17, 1050), (12, 40, 1536), (20, 33, 1100)),
                                                   (None, "row", 64)):  # fmt: skip
        weight = make((n, k), bits, group_size, dtype=dtype, seed=m)
        x, bias = random(m, k, dtype=dtype), random(n, dtype=dtype)
        plain = check(device, x, weight, bias)
        assert torch.equal(forward(device, x, weight, bias, relu=True), plain.relu())
    weight = make((20, 64, 3, 3), bits, dtype=dtype)
    check(device, random(1, 64, 4, 4, dtype=dtype), weight, random(20, dtype=dtype), padding=(1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_rows_of_x(device: Device, bits: int, dtype: torch.dtype) -> None:
    # A kernel of its own: 32 rows a block, 16 warps with rings of 4 slabs of 64 columns.
    for i, (m, n, k) in enumerate(((1, 1, 8), (8, 16, 64), (3, 17, 72), (9, 32, 1032), (16, 33, 136), (2, 65, 4232),
                                   (16, 20, 8264), (7, 48, 4096))):  # fmt: skip
        weight = make((n, k), bits, dtype=dtype, zero=i % 2 == 0, seed=i)
        x, bias = random(m, k, dtype=dtype, seed=i), random(n, dtype=dtype) if i % 3 else None
        plain = check(device, x, weight, bias)
        assert torch.equal(forward(device, x, weight, bias, relu=True), plain.relu())
        if k < 1000:  # without a plan, or not aligned, another kernel
            check(device, x, weight, bias, plan=False)
            moved = device.move(random(m * k + 1, dtype=dtype, seed=i))[1:].view(m, k)
            check(device, moved, weight, bias)
    assert forward(device, random(0, 64, dtype=dtype), make((9, 64), bits, dtype=dtype)).shape == (0, 9)


@each_dtype
def test_tables_larger_than_shared_memory(device: Device, dtype: torch.dtype) -> None:
    check(device, random(5, 1100, dtype=dtype), make((9, 1100), 8, 16, dtype=dtype))
    check(device, random(5, 130, dtype=dtype), make((200, 130), 8, "row", dtype=dtype))


# ---- what a layer may meet -------------------------------------------------------------------------------------------


@each_dtype
def test_strided_and_misaligned_inputs(device: Device, dtype: torch.dtype) -> None:
    weight = make((37, 66), dtype=dtype)
    for m, offset in itertools.product((1, 12, 40), (1, 2, 4)):
        x = device.move(random(m * 66 + offset, dtype=dtype))[offset:].view(m, 66)
        assert torch.equal(forward(device, x, weight), forward(device, x.clone(), weight))
    flat = random(6, 66, dtype=dtype)
    assert torch.equal(forward(device, flat.view(2, 3, 66), weight), forward(device, flat, weight).view(2, 3, 37))
    assert torch.equal(forward(device, flat[0], weight), forward(device, flat[:1], weight)[0])
    assert torch.equal(forward(device, flat.t().contiguous().t(), weight), forward(device, flat, weight))
    conv, image = make((8, 3, 3, 3), dtype=dtype), random(2, 9, 11, 3, dtype=dtype).permute(0, 3, 1, 2)
    assert torch.equal(forward(device, image, conv), forward(device, image.contiguous(), conv))
    tables = replace(weight, codebook=weight.codebook.t().contiguous().t())
    assert torch.equal(forward(device, flat, tables), forward(device, flat, weight))


@each_dtype
@pytest.mark.parametrize("group_size", [None, "row"], ids=str)
def test_nothing(device: Device, group_size: GroupSize, dtype: torch.dtype) -> None:
    for shape, m in itertools.product(((0, 5), (5, 0), (0, 0)), (0, 1, 20)):
        bias = random(shape[0], dtype=dtype)
        y = forward(device, random(m, shape[1], dtype=dtype), make(shape, group_size=group_size, dtype=dtype), bias)
        assert torch.equal(y, bias.expand(m, -1))
    assert forward(device, random(0, 70, dtype=dtype), make((9, 70), dtype=dtype)).shape == (0, 9)
    conv = make((6, 4, 3, 3), group_size=group_size, dtype=dtype)
    assert forward(device, random(0, 4, 8, 8, dtype=dtype), conv).shape == (0, 6, 6, 6)


@each_dtype
@each_bits
@pytest.mark.parametrize("m", [1, 16, 70])
def test_not_finite(device: Device, m: int, bits: int, dtype: torch.dtype) -> None:
    for width, column, value in ((70, 0, math.nan), (72, 31, math.inf), (72, 69, -math.inf), (70, 69, math.nan)):
        weight = make((19, width), bits, dtype=dtype)
        x = random(m, width, dtype=dtype)
        x[m // 2, column] = value
        y, expected = forward(device, x, weight), product(x.double(), weight.to_dense().double())
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())
        assert torch.equal(y[y.isinf()].double(), expected[y.isinf()])
        assert torch.equal(forward(device, x, weight, relu=True).isnan(), expected.isnan())


@each_dtype
@pytest.mark.parametrize("group_size", [None, "row", 16, 5], ids=str)
def test_tables_that_are_not_finite(device: Device, group_size: GroupSize, dtype: torch.dtype) -> None:
    # Entry 0 is what padding would look up: only weights that have it may meet it.
    for bits, (m, width) in itertools.product((2, 4, 6), ((3, 71), (3, 72), (70, 71))):
        weight = make((21, width), bits, group_size, dtype=dtype)
        weight = Codebook.from_indices(weight.codebook, weight.indices().clamp(min=1), (21, width), group_size)
        weight.codebook[:, 0] = math.nan
        x = random(m, width, dtype=dtype)
        assert not forward(device, x, weight).isnan().any()
        met = weight.indices()
        met[5, 70] = 0
        weight = Codebook.from_indices(weight.codebook, met, (21, width), group_size)
        expected = torch.zeros(m, 21, dtype=torch.bool)
        expected[:, 5] = True
        assert torch.equal(forward(device, x, weight).isnan(), expected)


def test_same_bits_twice(device: Device) -> None:
    for width in (2100, 2104):
        weight, x = make((40, width), dtype=torch.float16), random(7, width, dtype=torch.float16)
        assert torch.equal(forward(device, x, weight), forward(device, x, weight))
    grad = device.move(random(300, 400))
    codes = device.move(make((300, 400), 4).codes)
    sums = [device.ops.codebook_sum_members(grad, codes, 4, 0, False).cpu() for _ in range(2)]
    assert torch.equal(*sums)


# ---- decoding and sums of members ------------------------------------------------------------------------------------


@each_dtype
@each_bits
def test_decode_and_sum_members(device: Device, bits: int, dtype: torch.dtype) -> None:
    for width, group_size, zero in itertools.product((1, 30, 131, 700), (None, "row", 1, 64), (False, True)):
        if (isinstance(group_size, int) and group_size > width) or zero != (width == 30):
            continue
        rows = 30 if width == 700 else 7
        weight = make((rows, width), bits, group_size, dtype=dtype, zero=zero, seed=width)
        codes, group = device.move(weight.codes), group_code(group_size)
        dense = device.ops.codebook_decode(device.move(weight.codebook), codes, rows, width, bits, group)
        assert torch.equal(dense.cpu(), weight.to_dense())
        grad = random(rows, width, dtype=dtype)
        sums = device.ops.codebook_sum_members(device.move(grad), codes, bits, group, zero).cpu()
        assert sums.dtype == dtype
        wide = replace(weight, codebook=weight.codebook.double().requires_grad_())
        (exact,) = torch.autograd.grad(wide.to_dense(), wide.codebook, grad.double())
        (magnitude,) = torch.autograd.grad(wide.to_dense(), wide.codebook, grad.double().abs())
        assert_close(sums, exact, magnitude, rows * width)


def test_decode_and_sum_of_nothing(device: Device) -> None:
    for shape, group_size in itertools.product(((0, 5), (5, 0), (0, 0)), (None, "row")):
        weight = make(shape, 4, group_size)
        codes, group = device.move(weight.codes), group_code(group_size)
        tables = device.move(weight.codebook)
        assert device.ops.codebook_decode(tables, codes, *shape, 4, group).shape == shape
        sums = device.ops.codebook_sum_members(device.move(random(*shape)), codes, 4, group, False).cpu()
        assert torch.equal(sums, torch.zeros_like(weight.codebook))


def test_a_not_a_number_reaches_the_sum_of_its_entry_alone(device: Device) -> None:
    weight, grad = make((50, 30), 4), random(50, 30)
    grad[20, 10] = math.nan
    codes = device.move(weight.codes)
    sums = device.ops.codebook_sum_members(device.move(grad), codes, 4, 0, False).cpu()
    entry = int(weight.indices()[20, 10])
    assert sums.isnan().nonzero().tolist() == [[0, entry]]
    # The constant entry has no gradient, whatever its members'.
    weight = Codebook.from_indices(weight.codebook, torch.zeros(50, 30, dtype=torch.uint8), (50, 30), zero=True)
    sums = device.ops.codebook_sum_members(device.move(grad), device.move(weight.codes), 4, 0, True).cpu()
    assert torch.equal(sums, torch.zeros(1, 16))


# ---- the plan --------------------------------------------------------------------------------------------------------


@each_bits
def test_plan_holds_every_code_where_a_lane_looks_for_it(bits: int) -> None:
    for (rows, width), groups in itertools.product(((2, 3), (34, 130), (48, 64)), (1, 2)):
        weight = make((rows, width), bits)
        tiles, slabs = -(-rows // groups // 16), -(-width // 64)
        plan = plan_of(weight, groups)
        words = plan.view(torch.int32).reshape(groups, tiles, slabs, bits, 32).long() & 0xFFFFFFFF
        taken = torch.zeros(groups, tiles * 16, slabs * 64, dtype=torch.long)
        for code, lane in itertools.product(range(32), range(32)):
            word, shift = divmod(code * bits, 32)
            value = words[..., word, lane] >> shift
            if shift + bits > 32:
                value |= words[..., word + 1, lane] << (32 - shift)
            row = lane // 4 + 8 * (code // 2 % 2)
            column = 16 * (code // 8) + 8 * (code // 4 % 2) + lane % 4 * 2 + code % 2
            taken[:, row::16, column::64] = value & ((1 << bits) - 1)
        expected = torch.zeros_like(taken)
        expected[:, : rows // groups, :width] = weight.indices().view(groups, rows // groups, width)
        assert torch.equal(taken, expected)


def test_plans_and_tables_of_other_sizes_are_refused(device: Device) -> None:
    weight = make((6, 10), 4)
    x, tables, codes, plan = (device.move(t) for t in (random(2, 10), weight.codebook, weight.codes, plan_of(weight)))
    call = device.ops.codebook_linear

    def run(x: Tensor = x, tables: Tensor = tables, codes: Tensor = codes, plan: Tensor = plan, rows: int = 6,
            bits: int = 4, group_size: int = 0, bias: Tensor | None = None) -> Tensor:  # fmt: skip
        return call(x, tables, codes, plan, rows, bits, group_size, False, bias, False)

    assert run().shape == (2, 6)
    for wrong in (
        {"plan": plan[:-16]}, {"plan": plan.int()}, {"plan": torch.cat([plan, plan])}, {"codes": codes[:-1]},
        {"codes": codes.int()}, {"tables": tables[:, :8]}, {"tables": tables.half()}, {"x": x.half()},
        {"x": x[:, :9]}, {"rows": 5}, {"rows": -1}, {"rows": 2**40}, {"bits": 0}, {"bits": 9}, {"bits": 3},
        {"group_size": -2}, {"group_size": 5}, {"group_size": -1}, {"bias": x[0]}, {"x": x.double()},
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="expected"):
            run(**wrong)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.slimtorch.codebook_cuda_plan(weight.codes, 6, 11, 4, 1)
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.slimtorch.codebook_cuda_plan(weight.codes, 6, 10, 4, 4)


# ---- through the wrappers --------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(
    "problem", [LinearProblem("", 9, 20, 40, seed=1), CONV[3], CONV[5]], ids=["linear", "groups", "depthwise"]
)
def test_gradients(device: Device, wrappers: Callable[[str], Any], problem: Problem, dtype: torch.dtype) -> None:
    ops, options = wrappers("codebook"), geometry(problem)
    problem = replace(problem, dtype=dtype)
    shape = tuple(problem.weight().shape)
    for bits, group_size, zero, relu in ((4, None, True, False), (3, "row", False, True), (5, 4, True, True)):
        weight = make(shape, bits, group_size, dtype=dtype, zero=zero)
        moved = replace(weight, codebook=device.move(weight.codebook).requires_grad_(), codes=device.move(weight.codes))
        x, bias = (device.move(t).requires_grad_() for t in (problem.input(), problem.bias()))
        op = ops.codebook_linear if len(shape) == 2 else ops.codebook_conv2d
        y = op(x, moved, bias, activation="relu" if relu else None, **options)
        grad = random(*y.shape, dtype=dtype)
        actual = torch.autograd.grad(y, [x, moved.codebook, bias], device.move(grad))
        assert set(moved._plans) == {(options.get("groups", 1), False)}
        through = torch.where(y.cpu() > 0, grad, 0) if relu else grad
        x, bias = problem.input(), problem.bias()
        exact = gradients(x, weight, bias, through, **options)
        magnitude = gradients(x.abs(), replace(weight, codebook=weight.codebook.abs()), bias, through.abs(), **options)
        ones = torch.ones_like
        counts = gradients(ones(x), replace(weight, codebook=ones(weight.codebook)), bias, ones(through), **options)
        for tensor, reference, bound, count in zip(actual, exact, magnitude, counts, strict=True):
            assert tensor.dtype == dtype
            assert_close(tensor.cpu(), reference, bound, int(count.max()))
        if zero:
            assert not actual[1][:, 0].any()


def test_inference_through_the_wrappers_keeps_a_plan(device: Device, wrappers: Callable[[str], Any]) -> None:
    ops, weight, x = wrappers("codebook"), make((20, 70), 3), random(5, 70)
    moved = replace(weight, codebook=device.move(weight.codebook), codes=device.move(weight.codes), _plans={})
    with torch.inference_mode():
        first = ops.codebook_linear(device.move(x), moved)
    plan = moved.plan()
    assert plan is not None
    assert torch.equal(plan.cpu(), plan_of(weight))
    assert torch.equal(ops.codebook_linear(device.move(x), moved), first)
    assert moved.plan() is plan
    assert torch.equal(first.cpu(), forward(device, x, weight))


@each_dtype
def test_layers_keep_plans(device: Device, wrappers: Callable[[str], Any], dtype: torch.dtype) -> None:
    wrappers("codebook")
    for weight, x, options in (
        (make((20, 70), 3, dtype=dtype), random(5, 70, dtype=dtype), {}),
        (make((34, 4, 3, 3), 4, dtype=dtype), random(2, 8, 6, 7, dtype=dtype), {"padding": (1, 1), "groups": 2}),
    ):
        moved = replace(weight, codebook=device.move(weight.codebook), codes=device.move(weight.codes), _plans={})
        groups = options.get("groups", 1)
        if options:
            twin: Any = torch.nn.Conv2d(8, 34, 3, **options, bias=False)
            layer: Any = slim.nn.CodebookConv2d.from_format(twin, moved)
        else:
            layer = slim.nn.CodebookLinear.from_format(torch.nn.Linear(70, 20, bias=False), moved)
        layer = layer.to(torch.float32).to(dtype)  # no codes move: what was planned stays
        y = layer(device.move(x)).detach()
        assert torch.equal(y.cpu(), forward(device, x, weight, **options))
        assert torch.equal(layer._plans[groups, False].cpu(), plan_of(weight, groups))
        fresh = type(layer)(*((8, 34, 3) if options else (70, 20)), **options, bias=False, bits=weight.bits,
                            dtype=dtype, device=y.device)  # fmt: skip
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh(device.move(x)).detach(), y)
        fresh.codes.zero_()
        fresh.load_state_dict(fresh.state_dict())  # other codes: another plan
        assert not fresh._plans[groups, False].any()
