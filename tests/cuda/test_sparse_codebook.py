# SPDX-License-Identifier: Apache-2.0
"""Sparse shared weights on CUDA: every kernel, every width of codes, with a plan and without, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimtorch.formats import SparseCodebook
from slimtorch.formats.codebook import GroupSize, group_code
from tests.cuda.conftest import DTYPES, Device
from tests.ops.operators import assert_close, geometry, product, random
from tests.ops.test_sparse_codebook import gradients, longest_row, make
from tests.problems import EDGE_CONV, EDGE_LINEAR, ConvProblem, LinearProblem, Problem, masked_matrix

GROUP_SIZES: tuple[GroupSize, ...] = (None, "row", 1, 7, 64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def stored(device: Device, weight: SparseCodebook) -> tuple[Tensor, ...]:
    tensors = (weight.codebook, weight.codes, weight.gaps, weight.row_offsets)
    return tuple(device.move(t.detach()) for t in tensors)


def plan_of(device: Device, weight: SparseCodebook, groups: int = 1) -> Tensor:
    made = torch.ops.slimtorch.sparse_codebook_cuda_plan(
        weight.codes, weight.gaps, weight.row_offsets, math.prod(weight.shape[1:]), groups, weight.bits
    )
    return device.move(made)


def forward(
    device: Device, x: Tensor, weight: SparseCodebook, bias: Tensor | None = None, *, plan: bool = True,
    relu: bool = False, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """The operator itself, with a plan or without, on tensors of ``device``; the result is the CPU's."""
    given = plan_of(device, weight, groups) if plan else None
    bias = None if bias is None else device.move(bias)
    arguments = (device.move(x), *stored(device, weight), given, *[None] * 4, weight.bits,
                 group_code(weight.group_size), bias)  # fmt: skip
    if len(weight.shape) == 2:
        y = device.ops.sparse_codebook_linear(*arguments, relu)
    else:
        shape = (weight.shape[2:], pair(stride), pair(padding), pair(dilation), groups)
        y = device.ops.sparse_codebook_conv2d(*arguments, *shape, relu)
    return y.cpu()


def check(device: Device, x: Tensor, weight: SparseCodebook, bias: Tensor, *, plan: bool, **options: Any) -> None:
    y = forward(device, x, weight, bias, plan=plan, **options)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    dense, wide, wide_bias = weight.to_dense().double(), x.double(), bias.double()
    exact = product(wide, dense, wide_bias, **options)
    assert_close(y, exact, product(wide.abs(), dense.abs(), wide_bias.abs(), **options), longest_row(weight))
    # The very sums that come out without it.
    assert torch.equal(forward(device, x, weight, bias, plan=plan, relu=True, **options), y.relu())


def check_problem(device: Device, problem: Problem, bits: int, group_size: GroupSize, dtype: torch.dtype) -> None:
    weight = make(problem.weight(), bits, group_size, dtype=dtype, seed=problem.seed)
    x, bias = problem.input().to(dtype), problem.bias().to(dtype)
    for plan in (False, True) if dtype != torch.float32 else (False,):
        check(device, x, weight, bias, plan=plan, **geometry(problem))


def variant(width: int, turn: int) -> tuple[int, GroupSize]:
    fitting = [g for g in GROUP_SIZES if not isinstance(g, int) or g <= width]
    return turn % 8 + 1, fitting[turn % len(fitting)]


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("turn", "problem"), enumerate(EDGE_LINEAR[::3] + EDGE_CONV[::3]), ids=str)
def test_edges(device: Device, turn: int, problem: Problem) -> None:
    width = problem.k if isinstance(problem, LinearProblem) else problem.columns
    for dtype in (torch.float32, DTYPES[1 + turn % 2]):
        check_problem(device, problem, *variant(width, turn + DTYPES.index(dtype)), dtype)


# Kernels for one column, for up to 8, and for tiles of 8, 32 and 64; 128 on CUDA cores.
@each_dtype
@pytest.mark.parametrize(("m", "density"), [(1, 0.1), (2, 0.1), (8, 0.4), (9, 0.1), (32, 0.3), (33, 0.1), (70, 0.1)])
def test_every_kernel(device: Device, m: int, density: float, dtype: torch.dtype) -> None:
    for bits, group_size in ((4, None), (8, "row"), (3, 64)):
        check_problem(device, LinearProblem("", m, 141, 330, density, seed=m), bits, group_size, dtype)


# More than 128 columns: a block for each multiprocessor (132 emulated), so a lane of the kernels on CUDA cores takes
# four columns.
@each_dtype
@pytest.mark.parametrize("kernel", [None, 1, 2])
def test_many_columns(device: Device, kernel: int | None, dtype: torch.dtype) -> None:
    rows = 1057
    x = random(130, 9) if kernel is None else random(3, 2, 9, 5 if kernel == 1 else 7)
    shape = (rows, 9) if kernel is None else (rows, 2, kernel, kernel)
    weight = make(masked_matrix(rows, math.prod(shape[1:]), 0.4, 1).view(shape), dtype=dtype)
    y = forward(device, x.to(dtype), weight, plan=False)
    wide, dense = x.to(dtype).double(), weight.to_dense().double()
    assert_close(y, product(wide, dense), product(wide.abs(), dense.abs()), longest_row(weight))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_width_of_codes(device: Device, group_size: GroupSize, bits: int) -> None:
    for m, density in ((1, 0.5), (5, 0.1), (12, 0.05), (12, 1.0)):
        dtype = DTYPES[(bits + m) % 3]
        check_problem(device, LinearProblem("", m, 37, 331, density, seed=bits), bits, group_size, dtype)


# Sums over k that blocks share: of 1100 there are 18 cells of 64.
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["float16", "bfloat16"])
def test_split_sums(device: Device, dtype: torch.dtype) -> None:
    for m in (5, 20, 40):
        check_problem(device, LinearProblem("", m, 70, 1100, 0.3, seed=m), 4, None, dtype)
    check_problem(device, ConvProblem("", 1, 70, 20, 5, 5, padding=(1, 1), density=0.3, seed=1), 4, 8, dtype)


# Gaps above 255 and above 510, which are stored as skips, in and out of a lane's four entries.
@each_dtype
@pytest.mark.parametrize("m", [1, 3, 16, 40])
def test_skips(device: Device, m: int, dtype: torch.dtype) -> None:
    pattern = masked_matrix(40, 3000, 0.004, 1)
    pattern[0] = 0
    for row, columns in enumerate(([2999], [0, 2999], [254, 255, 510, 511], [255], [256, 512, 513], [510, 1021, 1022])):
        pattern[row + 1] = 0
        pattern[row + 1, columns] = 1
    pattern[9, 1000:1300] = 1
    pattern[10] = 1
    for group_size in (None, "row", 64):
        weight = make(pattern, 4, group_size, dtype=dtype)
        assert int((weight.gaps == 255).sum()) > 40
        check(device, random(m, 3000).to(dtype), weight, random(40).to(dtype), plan=m > 1)


def test_wide_rows(device: Device) -> None:
    # Wider than what is copied to shared memory, and than a running sum of 16 bits.
    pattern = torch.zeros(3, 70000)
    pattern[0, 69999] = 1
    pattern[1, ::128] = 1
    pattern[2, [0, 69000, 69001]] = 1
    for group_size in (None, 70000, 5):
        check(device, random(1, 70000), make(pattern, 4, group_size), random(3), plan=False)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_no_weights(device: Device, shape: tuple[int, int]) -> None:
    for group_size in (None, "row"):
        for m in (0, 1, 7, 20):
            for dtype in (torch.float32, torch.bfloat16):
                weight = make(torch.ones(shape), group_size=group_size, dtype=dtype)
                bias = random(shape[0]).to(dtype)
                y = forward(device, random(m, shape[1]).to(dtype), weight, bias)
                assert torch.equal(y, bias.expand(m, -1))


@each_dtype
def test_views(device: Device, dtype: torch.dtype) -> None:
    # Neither activations nor weights need lie at whole vectors; rows need not be contiguous.
    weight = make(masked_matrix(37, 67, 0.3, 0), dtype=dtype)
    for m in (1, 6, 20):
        x = random(m * 67 + 1).to(dtype)
        expected = forward(device, x[1:].clone().view(m, 67), weight)
        assert torch.equal(forward(device, x[1:].view(m, 67), weight), expected)
        wide = torch.cat([expected.new_zeros(m, 3), x[1:].view(m, 67)], 1)
        assert torch.equal(forward(device, wide[:, 3:], weight), expected)
        moved = replace(
            weight,
            gaps=torch.cat([weight.gaps[:1], weight.gaps])[1:],
            codes=torch.cat([weight.codes[:3], weight.codes])[3:],
            codebook=torch.cat([weight.codebook[:, :1], weight.codebook], 1).flatten()[1:].view(1, 16),
        )
        assert torch.equal(forward(device, x[1:].view(m, 67), moved), expected)
    image = random(2, 9, 11, 3).to(dtype).permute(0, 3, 1, 2)
    conv = make(masked_matrix(16, 27, 0.5, 0).view(16, 3, 3, 3), dtype=dtype)
    assert torch.equal(forward(device, image, conv), forward(device, image.contiguous(), conv))


@each_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_only_stored_weights_meet_what_is_not_finite(device: Device, value: float, dtype: torch.dtype) -> None:
    for m, density in ((1, 0.01), (4, 0.01), (4, 0.3), (21, 0.01), (40, 0.01)):
        pattern = masked_matrix(70, 600, density, 2)
        weight = make(pattern, dtype=dtype)
        for column in (0, 599):
            x = random(m, 600).to(dtype)
            x[m // 2, column] = value
            expected = torch.zeros(m, 70, dtype=torch.bool)
            expected[m // 2] = pattern[:, column] != 0
            for plan in (False, True):
                y = forward(device, x, weight, plan=plan)
                assert torch.equal(~y.isfinite(), expected)
        assert torch.equal(forward(device, x, weight, relu=True).isnan(), y.isnan())


@each_dtype
def test_only_stored_taps_meet_what_is_not_finite(device: Device, dtype: torch.dtype) -> None:
    pattern = masked_matrix(32, 36, 0.2, 3).view(32, 4, 3, 3)
    weight, x = make(pattern, dtype=dtype), random(2, 8, 6, 7).to(dtype)
    x[1, 5, 2, 3] = math.nan
    reached = product(x.isnan().double(), (pattern != 0).double(), None, padding=1, groups=2) != 0
    for plan in (False, True):
        y = forward(device, x, weight, plan=plan, padding=1, groups=2)
        assert torch.equal(y.isnan(), reached)


# ---- plans and streams -----------------------------------------------------------------------------------------------


def test_memory_of_plan() -> None:
    # 4 bits, 90 %: 144 bytes for 1024 entries of the dense weight, and half a byte for each that is stored.
    weight = make(masked_matrix(512, 4096, 0.1, 0))
    plan = torch.ops.slimtorch.sparse_codebook_cuda_plan(weight.codes, weight.gaps, weight.row_offsets, 4096, 1, 4)
    assert plan.numel() / weight.nnz < 1.96
    assert (plan.numel() + weight.nbytes) / weight.nnz < 3.5


def test_streams_that_lead_astray(device: Device) -> None:
    weight = make(masked_matrix(6, 40, 0.5, 0))
    far, skip, falling, beyond = (t.clone() for t in (weight.gaps, weight.gaps, *[weight.row_offsets] * 2))
    far[3] = 200
    skip[-1] = 255
    falling[2] = falling[3] + 1
    beyond[3] = 10**6
    beyond[4] = -1
    for change in ({"gaps": far}, {"gaps": skip}, {"row_offsets": falling}, {"row_offsets": beyond}):
        wrong = replace(weight, **change)
        with pytest.raises(RuntimeError, match=r"gaps|row_offsets"):
            plan_of(device, wrong)
        # Without a plan nobody has looked at the stream: results are wrong, but no address is.
        for m in (1, 3, 20):
            assert forward(device, random(m, 40), wrong, plan=False).shape == (m, 6)
        device.ops.sparse_codebook_sum_members(
            device.move(random(weight.nnz)), *stored(device, wrong), 40, 4, group_code(None)
        )


def test_bad_input(device: Device) -> None:
    weight = make(masked_matrix(6, 40, 0.5, 0))
    good = {"x": random(2, 40), "codebook": weight.codebook, "codes": weight.codes, "gaps": weight.gaps,
            "row_offsets": weight.row_offsets, "plan": None, "columns": None, "offsets": None, "forward_plan": None,
            "backward_plan": None, "bits": 4, "group_size": 0, "bias": None, "relu": False}  # fmt: skip
    wrong: list[dict[str, Any]] = [
        {"gaps": weight.gaps[:-2]}, {"gaps": weight.gaps.int()}, {"row_offsets": weight.row_offsets.long()},
        {"row_offsets": weight.row_offsets[:0]}, {"codes": weight.codes[:-1]}, {"bits": 0}, {"bits": 9}, {"bits": 3},
        {"codebook": weight.codebook[:, :8]}, {"codebook": weight.codebook[0]}, {"codebook": weight.codebook.double()},
        {"group_size": -2}, {"group_size": 5}, {"group_size": -1}, {"x": random(2, 0)}, {"bias": random(5)},
        {"plan": torch.zeros(10000, dtype=torch.uint8)}, {"x": random(2, 40).double()},
        {"plan": torch.zeros(16, dtype=torch.uint8)}, {"plan": torch.zeros(208)},
    ]  # fmt: skip
    for change in wrong:
        given = {k: device.move(v) if isinstance(v, Tensor) else v for k, v in {**good, **change}.items()}
        with pytest.raises(RuntimeError, match=r"expected|dtype"):
            device.ops.sparse_codebook_linear(*given.values())


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, 0.003, 0.2, 1.0])
@pytest.mark.parametrize("group_size", [*GROUP_SIZES, 3])
def test_positions_decode_and_sum_members(device: Device, group_size: GroupSize, density: float) -> None:
    # Many small tables are summed in several turns, each over the whole stream.
    n, k = (6, 70) if isinstance(group_size, int) and group_size < 64 else (30, 600)
    for bits, dtype in ((5, torch.float32), (8, torch.float16), (1, torch.bfloat16)):
        weight = make(masked_matrix(n, k, density, 1), bits, group_size, dtype=dtype)
        tensors, code = stored(device, weight), group_code(group_size)
        rows, where = weight.positions()
        columns, offsets = device.ops.sparse_codebook_positions(*tensors[2:], k)
        assert torch.equal(columns.cpu().long(), where)
        assert torch.equal(offsets.cpu().long().diff(), torch.bincount(rows, minlength=n))
        values = device.ops.sparse_codebook_decode(*tensors, columns, k, bits, code)
        assert torch.equal(values.cpu(), weight.to_dense()[rows, where])
        grad = random(n, k)
        given = device.move(grad[rows, where])
        sums = device.ops.sparse_codebook_sum_members(given, *tensors, k, bits, code)
        assert torch.equal(sums, device.ops.sparse_codebook_sum_members(given, *tensors, k, bits, code))
        tables = weight.codebook.double().requires_grad_()
        results = [
            torch.autograd.grad(replace(weight, codebook=tables).to_dense(), tables, g)[0]
            for g in (grad.double(), grad.double().abs(), torch.ones(n, k, dtype=torch.float64))
        ]
        assert_close(sums.cpu(), results[0], results[1], int(results[2].max()))


def test_positions_of_many_rows(device: Device) -> None:
    weight = make(masked_matrix(2100, 7, 0.3, 1))
    columns, offsets = device.ops.sparse_codebook_positions(*stored(device, weight)[2:], 7)
    rows, where = weight.positions()
    assert torch.equal(columns.cpu().long(), where)
    assert torch.equal(offsets.cpu().long().diff(), torch.bincount(rows, minlength=2100))


@each_dtype
@pytest.mark.parametrize("relu", [False, True])
def test_gradients(device: Device, wrappers: Callable[[str], Any], relu: bool, dtype: torch.dtype) -> None:
    wrappers("sparse")
    ops = wrappers("sparse_codebook")
    problems: tuple[Problem, ...] = (
        LinearProblem("", 1, 20, 70, 0.3, seed=1),
        LinearProblem("", 19, 33, 129, 0.2, seed=2),
        ConvProblem("", 2, 8, 32, 7, 6, (3, 2), (2, 1), (1, 0), groups=2, density=0.4, seed=3),
        ConvProblem("", 2, 8, 17, 5, 5, (1, 1), density=0.4, seed=4),
    )
    for turn, problem in enumerate(problems):
        options, group_size = geometry(problem), (None, "row", 4, None)[turn]
        weight = make(problem.weight(), 4, group_size, dtype=dtype)
        tables = weight.codebook.requires_grad_()
        x, bias = problem.input().to(dtype).requires_grad_(), problem.bias().to(dtype).requires_grad_()
        on = replace(
            weight,
            codebook=device.move(tables),
            codes=device.move(weight.codes),
            gaps=device.move(weight.gaps),
            row_offsets=device.move(weight.row_offsets),
            _plans={},
        )
        apply = ops.sparse_codebook_linear if len(weight.shape) == 2 else ops.sparse_codebook_conv2d
        y = apply(device.move(x), on, device.move(bias), activation="relu" if relu else None, **options)
        grad = random(*y.shape).to(dtype)
        actual = torch.autograd.grad(y, [x, tables, bias], device.move(grad))
        through = torch.where(y.cpu() > 0, grad, 0) if relu else grad
        exact = gradients(x, weight, bias, through, **options)
        magnitude = gradients(x.abs(), replace(weight, codebook=tables.abs()), bias.abs(), through.abs(), **options)
        ones = torch.ones_like
        counts = gradients(ones(x), replace(weight, codebook=ones(tables)), bias, ones(through), **options)
        for tensor, reference, bound, count in zip(actual, exact, magnitude, counts, strict=True):
            assert tensor.dtype == dtype
            assert_close(tensor, reference, bound, int(count.max()) if count.numel() else 0)


def test_formats_make_the_plan(device: Device, wrappers: Callable[[str], Any]) -> None:
    ops = wrappers("sparse_codebook")
    weight = make(masked_matrix(70, 200, 0.2, 0), dtype=torch.float16)
    on = SparseCodebook(*stored(device, weight), weight.shape, weight.bits, weight.group_size)
    x = random(20, 200).half()
    y = ops.sparse_codebook_linear(device.move(x), on)
    assert torch.equal(on.plan().cpu(), plan_of(device, weight).cpu())
    assert torch.equal(y.cpu(), forward(device, x, weight))
