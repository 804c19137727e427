# SPDX-License-Identifier: Apache-2.0
"""Codebook linear and conv2d against the dense reference in float64; tolerances as in tests/ops/operators.py."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import slimtorch as slim
from slimtorch.formats import Codebook
from slimtorch.formats.codebook import GroupSize, group_code, table_count
from tests.ops.operators import assert_close, geometry, product, random, raw
from tests.problems import EDGE_CONV, EDGE_LINEAR, LinearProblem, Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
BITS = range(1, 9)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_bits = pytest.mark.parametrize("bits", BITS)


def make(
    shape: tuple[int, ...],
    bits: int = 4,
    group_size: GroupSize = None,
    *,
    dtype: torch.dtype = torch.float32,
    zero: bool = False,
    seed: int = 0,
) -> Codebook:
    """A weight of random entries and indices."""
    draw = torch.Generator().manual_seed(seed)
    scale = 1 / math.sqrt(max(1, math.prod(shape[1:])))
    codebook = (torch.randn(table_count(shape, group_size), 1 << bits, generator=draw) * scale).to(dtype)
    indices = torch.randint(0, 1 << bits, (math.prod(shape),), dtype=torch.uint8, generator=draw)
    return Codebook.from_indices(codebook, indices, shape, group_size, zero=zero)


def apply(x: Tensor, weight: Codebook, bias: Tensor | None = None, *, relu: bool = False, **options: Any) -> Tensor:
    op = slim.ops.codebook_linear if len(weight.shape) == 2 else slim.ops.codebook_conv2d
    return op(x, weight, bias, activation="relu" if relu else None, **options)


def check_forward(x: Tensor, weight: Codebook, bias: Tensor | None = None, **options: Any) -> Tensor:
    y = apply(x, weight, bias, **options)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    dense, wide, wide_bias = weight.to_dense().detach().double(), x.double(), None if bias is None else bias.double()
    exact = product(wide, dense, wide_bias, **options)
    magnitude = product(wide.abs(), dense.abs(), None if wide_bias is None else wide_bias.abs(), **options)
    assert_close(y, exact, magnitude, math.prod(weight.shape[1:]) + 1)
    return y


def check_problem(problem: Problem, bits: int, group_size: GroupSize, dtype: torch.dtype, zero: bool = False) -> None:
    problem = replace(problem, dtype=dtype)
    options = geometry(problem)
    weight = make(tuple(problem.weight().shape), bits, group_size, dtype=dtype, zero=zero, seed=problem.seed)
    plain = check_forward(problem.input(), weight, problem.bias(), **options)
    # ReLU is applied to the very sums that come out without it.
    assert torch.equal(apply(problem.input(), weight, problem.bias(), relu=True, **options), plain.relu())
    check_forward(problem.input(), weight, None, **options)


# ---- forward ---------------------------------------------------------------------------------------------------------


def variants(width: int, seed: int) -> list[tuple[int, GroupSize, bool]]:
    """Bits, group size and `zero` that take turns over the problems."""
    groups: list[GroupSize] = [None, "row", 1, 3, 8, 32, 40, 64]
    fitting = [g for g in groups if not isinstance(g, int) or g <= width]
    return [(seed % 8 + 1, fitting[seed % len(fitting)], seed % 3 == 0), (4, fitting[-1 - seed % 2], seed % 2 == 0)]


@each_dtype
@pytest.mark.parametrize("problem", EDGE_LINEAR + EDGE_CONV, ids=str)
def test_edges(problem: Problem, dtype: torch.dtype) -> None:
    width = problem.k if isinstance(problem, LinearProblem) else problem.columns
    for bits, group_size, zero in variants(width, problem.seed):
        check_problem(problem, bits, group_size, dtype, zero)


# Look-ups of 32, runs of a group, rows that begin within a byte.
WIDTHS = (1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300)


@each_dtype
@each_bits
@pytest.mark.parametrize("m", [1, 3, 19])
def test_every_width(m: int, bits: int, dtype: torch.dtype) -> None:
    for width, group_size in itertools.product(WIDTHS, (None, "row", 1, 5, 32, 48, 64)):
        if isinstance(group_size, int) and group_size > width:
            continue
        weight = make((13, width), bits, group_size, dtype=dtype, seed=width)
        check_forward(random(m, width, dtype=dtype, seed=width), weight, random(13, dtype=dtype))


# Kernels of their own for one to four rows of x; tiles of one to three vectors; panels of 64 columns.
@each_dtype
@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 63, 64, 65, 129, 130])
def test_every_batch_size(m: int, dtype: torch.dtype) -> None:
    for bits, rows in ((4, 29), (3, 48), (8, 25), (5, 2), (4, 97)):
        weight = make((rows, 139), bits, dtype=dtype, seed=m)
        check_forward(random(m, 139, dtype=dtype, seed=m), weight, random(rows, dtype=dtype))


@each_bits
def test_many_rows_and_k_blocks(bits: int) -> None:
    # More rows than accumulators are kept for, several blocks of k and a rest.
    check_forward(random(33, 389), make((2100, 389), bits), random(2100))


def test_leading_dimensions_and_strides() -> None:
    weight, bias = make((37, 66)), random(37)
    flat = check_forward(random(6, 66), weight, bias)
    assert torch.equal(apply(random(6, 66).view(2, 3, 66), weight, bias), flat.view(2, 3, 37))
    assert torch.equal(apply(random(6, 66)[0], weight, bias), apply(random(6, 66)[:1], weight, bias)[0])
    assert torch.equal(apply(random(66, 6).t(), weight, bias), apply(random(66, 6).t().contiguous(), weight, bias))
    for m in (1, 3, 20):  # not aligned to a vector
        x = random(m * 66 + 1)[1:].view(m, 66)
        assert torch.equal(apply(x, weight, bias), apply(x.clone(), weight, bias))
    conv = make((8, 3, 3, 3))
    image = random(2, 9, 11, 3).permute(0, 3, 1, 2)
    assert torch.equal(apply(image, conv), apply(image.contiguous(), conv))
    assert torch.equal(apply(image[0], conv), apply(image[:1], conv)[0])
    strided = replace(make((5, 64)), codebook=make((5, 64)).codebook.t().contiguous().t())
    assert torch.equal(apply(random(3, 64), strided), apply(random(3, 64), make((5, 64))))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("group_size", [None, "row"])
def test_no_weights(shape: tuple[int, int], group_size: GroupSize) -> None:
    for m in (0, 1, 7):
        weight, bias = make(shape, group_size=group_size), random(shape[0])
        assert torch.equal(apply(random(m, shape[1]), weight, bias), bias.expand(m, -1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("m", [1, 4, 21])
@each_bits
def test_not_finite(bits: int, m: int, value: float) -> None:
    weight = make((19, 70), bits)
    for column in (0, 31, 69):
        x = random(m, 70)
        x[m // 2, column] = value
        y, expected = apply(x, weight), product(x, weight.to_dense())
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())
        assert torch.equal(y[y.isinf()], expected[y.isinf()])
        assert torch.equal(apply(x, weight, relu=True).isnan(), expected.isnan())


def test_threads_do_not_change_bits(two_threads: None) -> None:
    cases: list[tuple[Codebook, Tensor, dict[str, Any]]] = [
        (make((1030, 515), 4), random(m, 515), {}) for m in (1, 4, 40, 200)
    ]
    cases.append((make((64, 32, 3, 3), 3), random(2, 64, 17, 17), {"padding": 1, "groups": 2}))
    for weight, x, options in cases:
        tables = weight.codebook.clone().requires_grad_()
        results = []
        for threads in (2, 1):
            torch.set_num_threads(threads)
            y = apply(x, replace(weight, codebook=tables), **options)
            dense = random(weight.shape[0], math.prod(weight.shape[1:]))
            sums = raw("codebook_sum_members", grad_weight=dense, codes=weight.codes, bits=weight.bits, group_size=0,
                       zero=False)  # fmt: skip
            results.append((y, sums))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


# ---- decoding and sums of members ------------------------------------------------------------------------------------


def arguments(weight: Codebook) -> dict[str, Any]:
    return {"codes": weight.codes, "bits": weight.bits, "group_size": group_code(weight.group_size)}


@each_dtype
@each_bits
def test_decode_and_sum_members(bits: int, dtype: torch.dtype) -> None:
    for width, group_size, zero in itertools.product((1, 30, 64, 131, 2000), (None, "row", 1, 7, 64), (False, True)):
        if isinstance(group_size, int) and group_size > width:
            continue
        weight = make((70, width), bits, group_size, dtype=dtype, zero=zero, seed=width)
        dense = raw("codebook_decode", codebook=weight.codebook, rows=70, width=width, **arguments(weight))
        assert torch.equal(dense, weight.to_dense())
        grad = random(70, width, dtype=dtype)
        sums = raw("codebook_sum_members", grad_weight=grad, zero=zero, **arguments(weight))
        assert sums.dtype == dtype
        wide = replace(weight, codebook=weight.codebook.double().requires_grad_())
        (exact,) = torch.autograd.grad(wide.to_dense(), wide.codebook, grad.double())
        (magnitude,) = torch.autograd.grad(wide.to_dense(), wide.codebook, grad.double().abs())
        assert_close(sums, exact, magnitude, 70 * width)


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(x: Tensor, weight: Codebook, bias: Tensor, grad: Tensor, **options: Any) -> list[Tensor]:
    """Of input, tables and bias through the dense reference, float64; ``grad`` is that of the output."""
    x, bias = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    weight = replace(weight, codebook=weight.codebook.detach().double().requires_grad_())
    y = product(x, weight.to_dense(), bias, **options)
    return list(torch.autograd.grad(y, [x, weight.codebook, bias], grad.double()))


@each_dtype
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "problem",
    [p for p in EDGE_LINEAR if p.k < 1000][::5] + list(EDGE_CONV)[::4],
    ids=str,
)
def test_gradients(problem: Problem, relu: bool, dtype: torch.dtype) -> None:
    problem = replace(problem, dtype=dtype)
    options = geometry(problem)
    shape = tuple(problem.weight().shape)
    width = math.prod(shape[1:])
    for bits, group_size, zero in variants(width, problem.seed):
        weight = make(shape, bits, group_size, dtype=dtype, zero=zero)
        tables = weight.codebook.requires_grad_()
        x, bias = problem.input().requires_grad_(), problem.bias().requires_grad_()
        y = apply(x, weight, bias, relu=relu, **options)
        grad = random(*y.shape, dtype=dtype)
        actual = torch.autograd.grad(y, [x, tables, bias], grad)
        through = torch.where(y > 0, grad, 0) if relu else grad
        exact = gradients(x, weight, bias, through, **options)
        magnitude = gradients(x.abs(), replace(weight, codebook=tables.abs()), bias.abs(), through.abs(), **options)
        ones = torch.ones_like
        counts = gradients(ones(x), replace(weight, codebook=ones(tables)), bias, ones(through), **options)
        for tensor, reference, bound, count in zip(actual, exact, magnitude, counts, strict=True):
            assert tensor.dtype == dtype
            assert_close(tensor, reference, bound, int(count.max()) if count.numel() else 0)
        if zero:
            assert not actual[1][:, 0].any()


@pytest.mark.parametrize("group_size", [None, "row", 3])
@pytest.mark.parametrize("zero", [False, True])
def test_gradcheck(group_size: GroupSize, zero: bool) -> None:
    for shape, x, options in (
        ((5, 7), random(4, 7, dtype=torch.float64), {}),
        ((5, 7), random(7, dtype=torch.float64), {}),
        ((4, 2, 3, 2), random(2, 4, 6, 5, dtype=torch.float64), {"stride": (2, 1), "padding": 1, "groups": 2}),
    ):
        weight = make(shape, 2, group_size, dtype=torch.float64)
        weight.zero = zero

        constant = weight.codebook[:, : int(zero)]

        def call(
            x: Tensor, tables: Tensor, bias: Tensor, c: Tensor = constant, w: Codebook = weight, o: Any = options
        ) -> Tensor:
            return apply(x, replace(w, codebook=torch.cat([c, tables], dim=1)), bias, **o)

        bias = random(shape[0], dtype=torch.float64).requires_grad_()
        tables = weight.codebook[:, int(zero) :].clone().requires_grad_()
        assert torch.autograd.gradcheck(call, (x.requires_grad_(), tables, bias))


def test_only_what_is_asked_for() -> None:
    weight, x, bias = make((9, 40)), random(3, 40), random(9)
    for asked in (x, weight.codebook, bias):
        asked.requires_grad_()
        (got,) = torch.autograd.grad(apply(x, weight, bias).sum(), [asked])
        assert got.shape == asked.shape
        asked.requires_grad_(False)


# ---- registration and bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_opcheck(bits: int) -> None:
    ops = torch.ops.slimtorch
    for group_size in (None, "row", 16):
        weight = make((12, 36), bits, group_size)
        tables, bias = weight.codebook.requires_grad_(), random(12).requires_grad_()
        tail = (weight.codes, None, 12, bits, group_code(group_size), False, bias, True)
        x = random(5, 36).requires_grad_()
        torch.library.opcheck(ops.codebook_linear.default, (x, tables, *tail))
        detached = (weight.codes, None, 12, bits, group_code(group_size), False, bias.detach(), True)
        torch.library.opcheck(ops.codebook_linear_inference.default, (x.detach(), tables.detach(), *detached))
        image = random(2, 4, 8, 7).requires_grad_()
        shape = ((3, 3), (1, 2), (1, 0), (1, 1), 1)
        torch.library.opcheck(ops.codebook_conv2d.default, (image, tables, *tail[:-1], *shape, False))
        torch.library.opcheck(
            ops.codebook_conv2d_inference.default, (image.detach(), tables.detach(), *detached[:-1], *shape, False)
        )
        torch.library.opcheck(
            ops.codebook_decode.default, (tables.detach(), weight.codes, 12, 36, bits, group_code(group_size))
        )
        torch.library.opcheck(ops.codebook_cuda_plan.default, (weight.codes, 12, 36, bits, 2))
        torch.library.opcheck(
            ops.codebook_sum_members.default, (random(12, 36), weight.codes, bits, group_code(group_size), False)
        )


def test_bad_input() -> None:
    weight, bias = make((6, 10)), random(6)
    with pytest.raises(ValueError, match=r"x: expected shape \[\.\.\., 10\], got \[2, 11\]"):
        apply(random(2, 11), weight)
    with pytest.raises(TypeError, match=r"x: expected torch\.float32"):
        apply(random(2, 10, dtype=torch.float64), weight)
    with pytest.raises(ValueError, match=r"bias: expected shape \[6\], got \[5\]"):
        apply(random(2, 10), weight, random(5))
    with pytest.raises(ValueError, match="activation"):
        slim.ops.codebook_linear(random(2, 10), weight, bias, activation="gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight: expected the format of a conv2d layer"):
        slim.ops.codebook_conv2d(random(1, 10, 4, 4), weight)
    with pytest.raises(ValueError, match="groups"):
        apply(random(1, 4, 5, 5), make((6, 2, 3, 3)), groups=4)


def test_streams_and_tables_of_other_sizes_are_refused() -> None:
    weight = make((6, 10), 4)
    good: dict[str, Any] = {"x": random(2, 10), "codebook": weight.codebook, "codes": weight.codes, "rows": 6,
                            "bits": 4, "group_size": 0, "zero": False, "relu": False}  # fmt: skip
    assert raw("codebook_linear", **good).shape == (2, 6)
    wrong: list[dict[str, Any]] = [
        {"codes": weight.codes[:-1]}, {"codes": torch.cat([weight.codes, weight.codes])},
        {"codes": weight.codes.int()}, {"codes": weight.codes.repeat_interleave(2)[::2]},
        {"codebook": weight.codebook[:, :8]}, {"codebook": weight.codebook[0]}, {"codebook": weight.codebook.double()},
        {"bits": 0}, {"bits": 9}, {"bits": 3}, {"rows": 5}, {"rows": -1}, {"rows": 2**40}, {"group_size": -2},
        {"group_size": 5}, {"group_size": -1}, {"x": random(2, 9)}, {"bias": random(5)},
        {"plan": raw("codebook_cuda_plan", codes=weight.codes, rows=6, width=10, bits=4, groups=1)},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises(RuntimeError, match="expected"):
            raw("codebook_linear", **{**good, **change})
    decode = {"codebook": weight.codebook, "rows": 6, "width": 10, **arguments(weight)}
    for change in ({"width": 12}, {"rows": 7}, {"codes": weight.codes[1:]}):
        with pytest.raises(RuntimeError, match="expected"):
            raw("codebook_decode", **{**decode, **change})
    with pytest.raises(RuntimeError, match="expected"):
        raw("codebook_sum_members", grad_weight=random(6, 11), zero=False, **arguments(weight))


def test_compiles_without_breaks() -> None:
    weight, bias = make((12, 36)), random(12)
    compiled = torch.compile(lambda x: apply(x, weight, bias, relu=True) * 2, fullgraph=True, backend="aot_eager")
    for m in (1, 3, 9):
        x = random(m, 36)
        assert torch.equal(compiled(x), apply(x, weight, bias, relu=True) * 2)


def test_autocast() -> None:
    weight, x = make((12, 64)), random(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = apply(x, weight)
    assert y.dtype == torch.bfloat16
    narrow = replace(weight, codebook=weight.codebook.bfloat16())
    assert torch.equal(y, apply(x.bfloat16(), narrow))
