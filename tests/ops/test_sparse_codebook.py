# SPDX-License-Identifier: Apache-2.0
"""Sparse codebook linear and conv2d against the dense reference in float64; tolerances as in tests/ops/operators.py."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slimtorch as slim
from slimtorch import _C
from slimtorch.formats import SparseCodebook
from slimtorch.formats.codebook import GroupSize, group_code, table_count
from tests.ops.operators import assert_close, geometry, product, random, raw
from tests.problems import EDGE_CONV, EDGE_LINEAR, ConvProblem, LinearProblem, Problem, masked_matrix

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
GROUP_SIZES: tuple[GroupSize, ...] = (None, "row", 1, 7, 64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_bits = pytest.mark.parametrize("bits", range(1, 9))


def make(
    pattern: Tensor, bits: int = 4, group_size: GroupSize = None, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> SparseCodebook:
    """Random tables and indices where ``pattern`` is not zero."""
    draw = torch.Generator().manual_seed(seed)
    shape = tuple(pattern.shape)
    codebook = torch.randn(table_count(shape, group_size), 1 << bits, generator=draw).to(dtype)
    rows, columns = pattern.reshape(shape[0], math.prod(shape[1:])).nonzero().unbind(1)
    indices = torch.randint(0, 1 << bits, rows.shape, dtype=torch.uint8, generator=draw)
    return SparseCodebook.from_positions(codebook, indices, rows, columns, shape, group_size)


def apply(
    x: Tensor, weight: SparseCodebook, bias: Tensor | None = None, *, relu: bool = False, **options: Any
) -> Tensor:
    op = slim.ops.sparse_codebook_linear if len(weight.shape) == 2 else slim.ops.sparse_codebook_conv2d
    return op(x, weight, bias, activation="relu" if relu else None, **options)


def longest_row(weight: SparseCodebook) -> int:
    return int((weight.row_offsets[1:] - weight.row_offsets[:-1]).max()) + 1 if weight.shape[0] else 1


def check_forward(x: Tensor, weight: SparseCodebook, bias: Tensor | None = None, **options: Any) -> Tensor:
    y = apply(x, weight, bias, **options)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    dense, wide, wide_bias = weight.to_dense().detach().double(), x.double(), None if bias is None else bias.double()
    exact = product(wide, dense, wide_bias, **options)
    magnitude = product(wide.abs(), dense.abs(), None if wide_bias is None else wide_bias.abs(), **options)
    assert_close(y, exact, magnitude, longest_row(weight))
    return y


def check_problem(problem: Problem, bits: int, group_size: GroupSize, dtype: torch.dtype) -> None:
    options = geometry(problem)
    weight = make(problem.weight(), bits, group_size, dtype=dtype, seed=problem.seed)
    x, bias = problem.input().to(dtype), problem.bias().to(dtype)
    plain = check_forward(x, weight, bias, **options)
    # ReLU is applied to the very sums that come out without it.
    assert torch.equal(apply(x, weight, bias, relu=True, **options), plain.relu())
    check_forward(x, weight, None, **options)


# ---- forward ---------------------------------------------------------------------------------------------------------


def variants(width: int, seed: int) -> list[tuple[int, GroupSize]]:
    """Bits and group sizes that take turns over the problems."""
    fitting = [g for g in GROUP_SIZES if not isinstance(g, int) or g <= width]
    return [(seed % 8 + 1, fitting[seed % len(fitting)]), (4, fitting[-1 - seed % 2])]


@each_dtype
@pytest.mark.parametrize("problem", EDGE_LINEAR + EDGE_CONV, ids=str)
def test_edges(problem: Problem, dtype: torch.dtype) -> None:
    width = problem.k if isinstance(problem, LinearProblem) else problem.columns
    for bits, group_size in variants(width, problem.seed):
        check_problem(problem, bits, group_size, dtype)


@each_bits
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("m", [1, 5, 20, 70])
def test_every_width_of_codes(m: int, group_size: GroupSize, bits: int) -> None:
    for density in (0.0, 0.1, 0.5, 1.0):
        check_problem(LinearProblem("", m, 37, 331, density, seed=bits), bits, group_size, torch.float32)


# Own kernels for one row of x and for up to two vectors of them; panels of 32 and 64 columns.
@each_dtype
@pytest.mark.parametrize("m", [0, 1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 130])
def test_every_batch_size(m: int, dtype: torch.dtype) -> None:
    for bits, group_size in ((4, None), (5, "row"), (3, 7)):
        check_problem(LinearProblem("", m, 70, 200, 0.3, seed=m), bits, group_size, dtype)


# Gaps above 255 and above 510 are stored as skips: before the first weight of a row, between two, several in a row, in
# and out of a group of eight entries.
@each_dtype
@pytest.mark.parametrize("m", [1, 3, 16, 40, 100])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_skips(group_size: GroupSize, m: int, dtype: torch.dtype) -> None:
    pattern = masked_matrix(40, 3000, 0.004, 1)
    pattern[0] = 0
    pattern[1] = 0
    for row, columns in enumerate(([2999], [0, 2999], [254, 255, 510, 511], [255], [256, 512, 513], [510, 1021, 1022])):
        pattern[row + 2] = 0
        pattern[row + 2, columns] = 1
    pattern[9, 1000:1300] = 1
    pattern[10] = 1
    weight = make(pattern, 4, group_size, dtype=dtype)
    assert int((weight.gaps == 255).sum()) > 40
    check_forward(random(m, 3000, dtype=dtype), weight, random(40, dtype=dtype))


def test_more_skips_than_a_turn_of_the_plan_holds() -> None:
    pattern = torch.zeros(3, 70000)
    pattern[0, 69999] = 1
    pattern[1, ::2] = 1
    pattern[2, [0, 69000, 69001]] = 1
    for group_size in (None, 70000, 5):
        weight = make(pattern, 4, group_size)
        for m in (1, 3, 40):
            check_forward(random(m, 70000), weight, random(3))


def test_more_taps_than_a_turn_of_the_plan_holds() -> None:
    # 289 taps a channel: a k block is no shorter, so that rows have more than 255 entries in it.
    for groups in (1, 2):
        for density in (0.01, 0.9, 1.0):
            problem = ConvProblem("", 2, 4, 6, 20, 19, (17, 17), groups=groups, density=density, seed=1)
            check_problem(problem, 4, None, torch.float32)
            check_problem(problem, 5, 300, torch.float32)


def test_many_rows_and_k_blocks() -> None:
    for m in (1, 16, 33, 70):
        check_problem(LinearProblem("", m, 2100, 700, 0.05, seed=1), 4, None, torch.float32)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("group_size", [None, "row"])
def test_no_weights(shape: tuple[int, int], group_size: GroupSize) -> None:
    for m in (0, 1, 7, 70):
        weight, bias = make(torch.ones(shape), group_size=group_size), random(shape[0])
        assert torch.equal(apply(random(m, shape[1]), weight, bias), bias.expand(m, -1))


def test_leading_dimensions_and_strides() -> None:
    weight, bias = make(masked_matrix(37, 66, 0.3, 0)), random(37)
    flat = check_forward(random(6, 66), weight, bias)
    assert torch.equal(apply(random(6, 66).view(2, 3, 66), weight, bias), flat.view(2, 3, 37))
    assert torch.equal(apply(random(6, 66)[0], weight, bias), apply(random(6, 66)[:1], weight, bias)[0])
    assert torch.equal(apply(random(66, 6).t(), weight, bias), apply(random(66, 6).t().contiguous(), weight, bias))
    conv = make(masked_matrix(8, 27, 0.5, 0).view(8, 3, 3, 3))
    image = random(2, 9, 11, 3).permute(0, 3, 1, 2)
    assert torch.equal(apply(image, conv), apply(image.contiguous(), conv))
    assert torch.equal(apply(image[0], conv), apply(image[:1], conv)[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("m", [1, 4, 21])
def test_only_stored_weights_meet_what_is_not_finite(m: int, value: float) -> None:
    # Neither skips nor entries decoded beyond the end of a row may touch an activation.
    pattern = masked_matrix(30, 700, 0.01, 2)
    weight = make(pattern)
    for column in (0, 254, 255, 509, 699):
        x = random(m, 700)
        x[m // 2, column] = value
        y = apply(x, weight)
        expected = torch.zeros(m, 30, dtype=torch.bool)
        expected[m // 2] = pattern[:, column] != 0
        assert torch.equal(~y.isfinite(), expected)
        assert torch.equal(apply(x, weight, relu=True).isnan(), y.isnan())


def test_threads_do_not_change_bits(two_threads: None) -> None:
    cases: list[tuple[SparseCodebook, Tensor, dict[str, Any]]] = [
        (make(masked_matrix(1030, 515, 0.2, 0)), random(m, 515), {}) for m in (1, 4, 40, 200)
    ]
    conv = make(masked_matrix(64, 288, 0.2, 0).view(64, 32, 3, 3), 3)
    cases.append((conv, random(2, 64, 17, 17), {"padding": 1, "groups": 2}))
    for weight, x, options in cases:
        results = []
        for threads in (2, 1):
            torch.set_num_threads(threads)
            tables = weight.codebook.clone().requires_grad_()
            y = apply(x.requires_grad_(), replace(weight, codebook=tables), **options)
            results.append((y, *torch.autograd.grad(y, [x, tables], torch.ones_like(y))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- instruction sets ------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
ISAS = [name for name, missing in _C.isas().items() if not missing]
ISA_PROBLEMS: tuple[Problem, ...] = (
    *(LinearProblem(f"m{m}", m, 300, 331, 0.2, seed=m) for m in (1, 2, 7, 16, 20, 64, 131)),
    LinearProblem("skips", 20, 30, 3000, 0.002, seed=1),
    LinearProblem("skips_m1", 1, 30, 3000, 0.002, seed=1),
    LinearProblem("full", 33, 20, 400, 1.0, seed=1),
    ConvProblem("conv3x3", 2, 9, 20, 13, 11, padding=(1, 1), density=0.3, seed=1),
    ConvProblem("conv_all", 3, 6, 10, 15, 12, (3, 2), (2, 3), (2, 1), (2, 1), 2, 0.5, seed=1),
    ConvProblem("pointwise", 2, 20, 17, 12, 13, (1, 1), density=0.3, seed=1),
)


def run_all() -> int:
    """Every kernel of the instruction set in use; returns the number of cases."""
    cases = 0
    for problem in ISA_PROBLEMS:
        for dtype in DTYPES:
            for bits, group_size in ((4, None), (3, "row"), (2, None), (8, None), (4, 7), (5, "row")):
                check_problem(problem, bits, group_size, dtype)
                cases += 1
    return cases


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    environment = {**os.environ, "SLIMTORCH_CPU": isa, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    code = "from slimtorch import _C; from tests.ops.test_sparse_codebook import run_all; print(_C.isa(), run_all())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [isa, str(len(ISA_PROBLEMS) * len(DTYPES) * 6)]


# ---- plans and positions ---------------------------------------------------------------------------------------------


def test_memory_of_format_and_plan() -> None:
    # 4 bits, 90 %: half a byte and a byte for each entry, and the plan a byte for each row and k block.
    pattern = masked_matrix(512, 4096, 0.1, 0)
    weight = make(pattern)
    plan = weight.plan()
    assert plan is not None
    assert (weight.nbytes + plan.numel()) / weight.nnz <= 1.6


def test_a_plan_is_derived_when_none_is_given() -> None:
    weight = make(masked_matrix(70, 900, 0.01, 0))
    call = {"codebook": weight.codebook, "codes": weight.codes, "gaps": weight.gaps, "row_offsets": weight.row_offsets,
            "bits": 4, "group_size": 0, "relu": False}  # fmt: skip
    for m in (1, 20):
        x = random(m, 900)
        assert torch.equal(raw("sparse_codebook_linear", x=x, **call), apply(x, weight))


def test_positions_decode_and_sum_members() -> None:
    for density in (0.0, 0.003, 0.2, 1.0):
        for group_size in GROUP_SIZES:
            weight = make(masked_matrix(30, 1100, density, 1), 5, group_size)
            csr = weight.csr()
            assert csr is not None
            rows, columns = weight.positions()
            assert torch.equal(csr.columns.long(), columns)
            assert torch.equal(csr.row_indices(), rows)
            stored = {"codebook": weight.codebook, "codes": weight.codes, "gaps": weight.gaps,
                      "row_offsets": weight.row_offsets, "width": 1100, "bits": 5,
                      "group_size": group_code(group_size)}  # fmt: skip
            values = raw("sparse_codebook_decode", columns=csr.columns, **stored)
            assert torch.equal(values, weight.to_dense()[rows, columns])
            grad = random(30, 1100)
            sums = raw("sparse_codebook_sum_members", values=grad[rows, columns], **stored)
            tables = weight.codebook.double().requires_grad_()
            dense = replace(weight, codebook=tables).to_dense()
            (exact,) = torch.autograd.grad(dense, tables, grad.double())
            assert_close(sums, exact, torch.autograd.grad(replace(weight, codebook=tables).to_dense(), tables,
                                                          grad.double().abs())[0], 1)  # fmt: skip


def test_streams_that_lead_astray_are_refused() -> None:
    weight = make(masked_matrix(6, 40, 0.5, 0))
    good: dict[str, Any] = {"x": random(2, 40), "codebook": weight.codebook, "codes": weight.codes,
                            "gaps": weight.gaps, "row_offsets": weight.row_offsets, "bits": 4, "group_size": 0,
                            "relu": False}  # fmt: skip
    assert raw("sparse_codebook_linear", **good).shape == (2, 6)
    far, skip, falling, beyond = (t.clone() for t in (weight.gaps, weight.gaps, *[weight.row_offsets] * 2))
    far[3] = 200
    skip[-1] = 255
    falling[2] = falling[3] + 1
    beyond[3] = 10**6
    wrong: list[dict[str, Any]] = [
        {"gaps": far}, {"gaps": skip}, {"gaps": weight.gaps[:-1]}, {"gaps": weight.gaps.int()},
        {"row_offsets": falling}, {"row_offsets": beyond}, {"row_offsets": weight.row_offsets.long()},
        {"row_offsets": weight.row_offsets[:0]}, {"codes": weight.codes[:-1]}, {"bits": 0}, {"bits": 9}, {"bits": 3},
        {"codebook": weight.codebook[:, :8]}, {"codebook": weight.codebook[0]}, {"codebook": weight.codebook.double()},
        {"group_size": -2}, {"group_size": 5}, {"group_size": -1}, {"x": random(2, 7)}, {"bias": random(5)},
        {"plan": torch.zeros(1000, dtype=torch.uint8)},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises(RuntimeError, match=r"expected|must|may|plan"):
            raw("sparse_codebook_linear", **{**good, **change})
    with pytest.raises(ValueError, match="gaps"):
        replace(weight, gaps=far, _plans={}).plan()


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(x: Tensor, weight: SparseCodebook, bias: Tensor, grad: Tensor, **options: Any) -> list[Tensor]:
    """Of input, tables and bias through the dense reference, float64; ``grad`` is that of the output."""
    x, bias = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    weight = replace(weight, codebook=weight.codebook.detach().double().requires_grad_())
    y = product(x, weight.to_dense(), bias, **options)
    return list(torch.autograd.grad(y, [x, weight.codebook, bias], grad.double()))


@each_dtype
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("problem", [p for p in EDGE_LINEAR if p.k <= 1000][::5] + list(EDGE_CONV)[::4], ids=str)
def test_gradients(problem: Problem, relu: bool, dtype: torch.dtype) -> None:
    options = geometry(problem)
    width = problem.k if isinstance(problem, LinearProblem) else problem.columns
    for bits, group_size in variants(width, problem.seed):
        weight = make(problem.weight(), bits, group_size, dtype=dtype)
        tables = weight.codebook.requires_grad_()
        x, bias = problem.input().to(dtype).requires_grad_(), problem.bias().to(dtype).requires_grad_()
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


@pytest.mark.parametrize("group_size", [None, "row", 3])
def test_gradcheck(group_size: GroupSize) -> None:
    for shape, x, options in (
        ((5, 7), random(4, 7, dtype=torch.float64), {}),
        ((5, 7), random(7, dtype=torch.float64), {}),
        ((4, 2, 3, 2), random(2, 4, 6, 5, dtype=torch.float64), {"stride": (2, 1), "padding": 1, "groups": 2}),
    ):
        pattern = masked_matrix(shape[0], math.prod(shape[1:]), 0.5, 1).view(shape)
        weight = make(pattern, 2, group_size, dtype=torch.float64)

        def call(x: Tensor, tables: Tensor, bias: Tensor, w: SparseCodebook = weight, o: Any = options) -> Tensor:
            return apply(x, replace(w, codebook=tables), bias, **o)

        bias = random(shape[0], dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(call, (x.requires_grad_(), weight.codebook.requires_grad_(), bias))


def test_only_what_is_asked_for() -> None:
    weight, x, bias = make(masked_matrix(9, 40, 0.3, 0)), random(3, 40), random(9)
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
        weight = make(masked_matrix(12, 36, 0.3, 0), bits, group_size)
        tables, bias, code = weight.codebook.requires_grad_(), random(12).requires_grad_(), group_code(group_size)
        stored = (weight.codes, weight.gaps, weight.row_offsets)
        csr = weight.csr()
        assert csr is not None
        plans = (csr.columns, csr.row_offsets, csr.plan(), csr.plan(transposed=True))
        x = random(5, 36).requires_grad_()
        for given in ((weight.plan(), *plans), (None,) * 5):
            torch.library.opcheck(
                ops.sparse_codebook_linear.default, (x, tables, *stored, *given, bits, code, bias, True)
            )
        torch.library.opcheck(
            ops.sparse_codebook_linear_inference.default,
            (x.detach(), tables.detach(), *stored, weight.plan(), *(None,) * 4, bits, code, None, False),
        )
        conv = make(masked_matrix(12, 36, 0.3, 0).view(12, 4, 3, 3), bits, group_size)
        image, shape = random(2, 4, 8, 7).requires_grad_(), ((3, 3), (1, 2), (1, 0), (1, 1), 1)
        torch.library.opcheck(
            ops.sparse_codebook_conv2d.default,
            (image, tables, conv.codes, conv.gaps, conv.row_offsets, conv.plan(), *(None,) * 4, bits, code, bias,
             *shape, True),
        )  # fmt: skip
        where = (weight.gaps, weight.row_offsets, 36)
        torch.library.opcheck(ops.sparse_codebook_plan.default, (*where, 1, 1))
        torch.library.opcheck(ops.sparse_codebook_positions.default, where)
        tables = tables.detach()
        torch.library.opcheck(ops.sparse_codebook_decode.default, (tables, *stored, csr.columns, 36, bits, code))
        torch.library.opcheck(
            ops.sparse_codebook_sum_members.default, (random(weight.nnz), tables, *stored, 36, bits, code)
        )


def test_bad_input() -> None:
    weight, bias = make(masked_matrix(6, 10, 0.5, 0)), random(6)
    with pytest.raises(ValueError, match=r"x: expected shape \[\.\.\., 10\], got \[2, 11\]"):
        apply(random(2, 11), weight)
    with pytest.raises(TypeError, match=r"x: expected torch\.float32"):
        apply(random(2, 10, dtype=torch.float64), weight)
    with pytest.raises(ValueError, match=r"bias: expected shape \[6\], got \[5\]"):
        apply(random(2, 10), weight, random(5))
    with pytest.raises(ValueError, match="activation"):
        slim.ops.sparse_codebook_linear(random(2, 10), weight, bias, activation="gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight: expected the format of a conv2d layer"):
        slim.ops.sparse_codebook_conv2d(random(1, 10, 4, 4), weight)
    with pytest.raises(ValueError, match="groups"):
        apply(random(1, 4, 5, 5), make(torch.ones(6, 2, 3, 3)), groups=4)


def test_compiles_without_breaks() -> None:
    weight, bias = make(masked_matrix(12, 36, 0.3, 0)), random(12)
    for plan in (True, False):
        weight._plans.clear()
        if plan:
            weight.plan()
        compiled = torch.compile(lambda x: apply(x, weight, bias, relu=True) * 2, fullgraph=True, backend="aot_eager")
        for m in (1, 3, 9):
            x = random(m, 36)
            assert torch.equal(compiled(x), apply(x, weight, bias, relu=True) * 2)
        torch.compiler.reset()


def test_autocast() -> None:
    weight, x = make(masked_matrix(12, 64, 0.3, 0)), random(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = apply(x, weight)
    assert y.dtype == torch.bfloat16
    narrow = replace(weight, codebook=weight.codebook.bfloat16())
    assert torch.equal(y, apply(x.bfloat16(), narrow))
