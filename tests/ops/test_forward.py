# SPDX-License-Identifier: Apache-2.0
"""Forward of the four operators against the dense reference in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slimtorch as slim
from slimtorch import reference
from slimtorch.formats import BlockSparse, Sparse
from tests.ops.operators import (
    BLOCKS,
    DTYPES,
    FEW_FORMATS,
    FORMATS,
    SPARSE,
    Format,
    Weight,
    apply,
    check_forward,
    geometry,
    pattern,
    product,
    random,
    tensors,
)
from tests.problems import EDGE_CONV, EDGE_LINEAR, ConvProblem, LinearProblem, Problem, masked_matrix

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_few = pytest.mark.parametrize("form", FEW_FORMATS, ids=str)
each_format = pytest.mark.parametrize("form", FORMATS, ids=str)


def check_problem(problem: Problem, form: Format, dtype: torch.dtype) -> None:
    x, weight, bias = tensors(problem, form, dtype)
    options = geometry(problem)
    plain = check_forward(x, weight, bias, **options)
    # ReLU is applied to the very sums that come out without it.
    assert torch.equal(apply(x, weight, bias, relu=True, **options), plain.relu())
    check_forward(x, weight, None, **options)


# ---- the shared edge cases -------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("problem", EDGE_LINEAR + EDGE_CONV, ids=str)
def test_sparse(problem: Problem, dtype: torch.dtype) -> None:
    check_problem(problem, SPARSE, dtype)


@each_dtype
@pytest.mark.parametrize("problem", EDGE_LINEAR + EDGE_CONV, ids=str)
def test_block_sparse(problem: Problem, dtype: torch.dtype) -> None:
    # Two block sizes a problem, so that all sizes meet all kinds of problem.
    for step in (0, 7):
        check_problem(problem, BLOCKS[(problem.seed + step) % len(BLOCKS)], dtype)


# ---- beyond them: what these kernels' own tiles ask for --------------------------------------------------------------

# Panels of 32 and 64 columns, vectors of 2 to 16, own kernels for 1, 1-4 and up to two vectors of rows of x.
BATCHES = (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)


@each_dtype
@each_format
def test_every_batch_size(form: Format, dtype: torch.dtype) -> None:
    for m in BATCHES:
        check_problem(LinearProblem("", m, 70, 139, 0.25, seed=m), form, dtype)


# k blocks have 112 to 320 columns by density; row blocks 128 rows; block-sparse steps end at about 1024 rows.
@pytest.mark.parametrize("form", [SPARSE, Format((1, 4)), Format((16, 16)), Format((64, 64))], ids=str)
@pytest.mark.parametrize("n", [127, 128, 129, 255, 257, 1023, 1025, 2500])
def test_rows_around_row_blocks(n: int, form: Format) -> None:
    for m in (1, 3, 40, 70):
        check_problem(LinearProblem("", m, n, 60, 0.2, seed=n + m), form, torch.float32)


@pytest.mark.parametrize("form", [SPARSE, Format((1, 4)), Format((8, 8)), Format((32, 32))], ids=str)
@pytest.mark.parametrize("k", [111, 113, 191, 193, 287, 289, 319, 321, 511, 513, 1030])
def test_columns_around_k_blocks(k: int, form: Format) -> None:
    for density in (0.03, 0.1, 0.4):
        for m in (1, 6, 70):
            check_problem(LinearProblem("", m, 40, k, density, seed=k + m), form, torch.float32)


# Sparse plans change to 32-bit columns above 65536; blocks are a cheaper way to as many.
@pytest.mark.parametrize("form", [SPARSE, Format((16, 70))], ids=str)
@pytest.mark.parametrize("k", [65535, 65536, 65537])
def test_more_than_65536_columns(k: int, form: Format) -> None:
    for m in (1, 3, 70):
        check_problem(LinearProblem("", m, 9, k, 0.002, seed=k), form, torch.float32)


@each_dtype
def test_rows_longer_than_65535(dtype: torch.dtype) -> None:
    for m in (1, 3, 34):  # a segment of a sparse plan counts to 65535
        check_problem(LinearProblem("", m, 2, 66000, 0.998, seed=m), SPARSE, dtype)


@each_few
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("m", [0, 1, 5, 70])
def test_empty_dimensions(m: int, shape: tuple[int, int], form: Format) -> None:
    weight = form.pack(torch.ones(shape))
    check_forward(random(m, shape[1]), weight, random(shape[0]))
    check_forward(random(m, shape[1]), weight)


@each_few
def test_no_stored_weight_leaves_the_bias(form: Format) -> None:
    bias = random(30)
    for m in (1, 2, 9, 70):
        y = apply(random(m, 50), form.pack(torch.zeros(30, 50)), bias)
        assert torch.equal(y, bias.expand(m, 30))
    y = apply(random(2, 5, 9, 9), form.pack(torch.zeros(30, 5, 3, 3)), bias, padding=1)
    assert torch.equal(y, bias[:, None, None].expand(2, 30, 9, 9))


@each_few
def test_stored_zeros_and_full_patterns(form: Format) -> None:
    dense = masked_matrix(40, 70, 0.3, 0)
    full = Sparse.full(dense) if form.block_size is None else BlockSparse.full(dense, form.block_size)
    for m in (1, 4, 70):
        check_forward(random(m, 70), full, random(40))


@each_dtype
@each_format
def test_leading_dimensions(form: Format, dtype: torch.dtype) -> None:
    weight = form.pack(masked_matrix(20, 33, 0.4, 0).to(dtype))
    bias = random(20, dtype=dtype)
    x = random(2, 3, 5, 33, dtype=dtype)
    y = check_forward(x, weight, bias)
    assert y.shape == (2, 3, 5, 20)
    assert check_forward(x[0, 0, 0], weight, bias).shape == (20,)
    assert check_forward(x[:, :0], weight, bias).shape == (2, 0, 5, 20)


def test_a_convolution_takes_an_image_without_batch() -> None:
    for form in FEW_FORMATS:
        weight, x = form.pack(masked_matrix(9, 45, 0.4, 0).view(9, 5, 3, 3)), random(5, 8, 8)
        y = check_forward(x, weight, random(9), padding=(1, 1))
        assert y.shape == (9, 8, 8)


# ---- memory layouts --------------------------------------------------------------------------------------------------


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers in other arrangements."""
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)  # not on a vector's boundary
    gaps = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x)
    turned = x.transpose(0, -1).contiguous().transpose(0, -1)
    return {"shifted": shifted, "gaps": gaps, "transposed": turned}


@each_dtype
@each_few
def test_layouts_of_the_input(form: Format, dtype: torch.dtype) -> None:
    for m in (1, 4, 9, 70):
        weight, bias = form.pack(masked_matrix(21, 37, 0.4, 0).to(dtype)), random(21, dtype=dtype)
        x = random(m, 37, dtype=dtype)
        expected = check_forward(x, weight, bias)
        for name, other in layouts(x).items():
            assert torch.equal(apply(other, weight, bias), expected), name
        one = x[:1].expand(m, 37)
        assert torch.equal(apply(one, weight, bias), apply(one.contiguous(), weight, bias))


@each_dtype
@each_few
@pytest.mark.parametrize("kernel", [1, 3])
def test_layouts_of_an_image(kernel: int, form: Format, dtype: torch.dtype) -> None:
    dense = masked_matrix(12, 8 * kernel * kernel, 0.4, 0).view(12, 8, kernel, kernel).to(dtype)
    weight, bias, x = form.pack(dense), random(12, dtype=dtype), random(2, 8, 11, 13, dtype=dtype)
    expected = check_forward(x, weight, bias)
    others = {**layouts(x), "channels_last": x.contiguous(memory_format=torch.channels_last)}
    for name, other in others.items():
        y = apply(other, weight, bias)
        assert torch.equal(y, expected), name


@each_few
def test_layouts_of_values_and_bias(form: Format) -> None:
    weight, bias, x = form.pack(masked_matrix(21, 37, 0.4, 0)), random(21), random(9, 37)
    expected = apply(x, weight, bias)
    gaps = torch.empty(*weight.values.shape[:-1], 2 * weight.values.shape[-1])[..., ::2].copy_(weight.values)
    assert torch.equal(apply(x, replace(weight, values=gaps), bias), expected)
    assert torch.equal(apply(x, weight, torch.stack([bias, bias], 1)[:, 0]), expected)
    assert torch.equal(apply(x, weight, torch.cat([bias[:1], bias])[1:]), expected)


# ---- NaN, Inf, -0 ----------------------------------------------------------------------------------------------------


def meets(special: Tensor, weight: Weight) -> Tensor:
    """Where a linear layer's output has a stored weight that meets a marked activation, ``[m, n]``."""
    return special.double() @ pattern(weight).T > 0


@each_dtype
@each_format
@pytest.mark.parametrize("m", [1, 3, 5, 20, 70])
def test_nan_reaches_exactly_what_it_meets(m: int, form: Format, dtype: torch.dtype) -> None:
    x, weight, bias = tensors(LinearProblem("", m, 45, 150, 0.15, seed=m), form, dtype)
    for row in range(0, m, 4):
        x[row, (7 * row + 5) % 150] = math.nan
    x[m - 1, 149] = math.nan
    hit = meets(x.isnan(), weight)
    clean = apply(x.nan_to_num(0), weight, bias)
    for relu in (False, True):
        y = apply(x, weight, bias, relu=relu)
        assert torch.equal(y.isnan(), hit)
        assert torch.equal(y[~hit], (clean.relu() if relu else clean)[~hit])


@each_dtype
@each_format
def test_inf_has_the_sign_of_its_weight(form: Format, dtype: torch.dtype) -> None:
    for m in (1, 3, 5, 20, 70):
        x, weight, bias = tensors(LinearProblem("", m, 45, 150, 0.15, seed=m), form, dtype)
        x[m // 2, 77] = math.inf
        x[0, 3] = -math.inf
        # Stored entries decide: inf times a stored zero is NaN, inf that meets no stored entry is not seen.
        expected = apply(torch.where(x.isinf(), 0, x), weight, bias).double()
        for row, column in ((m // 2, 77), (0, 3)):
            stored = pattern(weight)[:, column] > 0
            expected[row, stored] += x[row, column].double() * weight.to_dense()[stored, column].double()
        y = apply(x, weight, bias).double()
        assert torch.equal(y.isnan(), expected.isnan())
        infinite = expected.isinf()
        assert torch.equal(y.isinf(), infinite)
        assert torch.equal(y[infinite], expected[infinite])
        positive = apply(x, weight, bias, relu=True)
        assert torch.equal(positive.isnan(), y.isnan())
        assert bool((positive[~y.isnan()] >= 0).all())


@each_dtype
@each_few
@pytest.mark.parametrize("kernel", [1, 3])
def test_nan_in_an_image(kernel: int, form: Format, dtype: torch.dtype) -> None:
    options = {"padding": (kernel // 2, kernel // 2), "groups": 2}
    problem = ConvProblem("", 2, 8, 12, 12, 11, (kernel, kernel), density=0.2, seed=3, **options)
    x, weight, bias = tensors(problem, form, dtype)
    x[0, 1, 4, 4], x[1, 7, 0, 10] = math.nan, math.inf
    special = ~x.isfinite()
    reached = product(special.double(), pattern(weight), **options) > 0
    assert not bool(reached.all())
    y = apply(x, weight, bias, **options)
    assert torch.equal(~y.isfinite(), reached)
    clean = apply(torch.where(special, 0, x), weight, bias, **options)
    assert torch.equal(y[~reached], clean[~reached])


@each_few
def test_infinite_weights(form: Format) -> None:
    dense = masked_matrix(20, 40, 0.3, 0)
    dense[3, 4], dense[11, 30] = math.inf, -math.inf
    weight = form.pack(dense)
    for m in (1, 5, 70):
        y = apply(random(m, 40).abs() + 1, weight)
        assert bool((y[:, 3] == math.inf).all())
        assert bool((y[:, 11] == -math.inf).all())
        assert bool(y[:, [i for i in range(20) if i not in (3, 11)]].isfinite().all())


@each_few
def test_negative_zero(form: Format) -> None:
    weight = form.pack(masked_matrix(20, 40, 0.3, 0))
    for m in (1, 5, 70):
        y = apply(torch.full((m, 40), -0.0), weight, torch.full((20,), -0.0), relu=True)
        assert bool((y == 0).all())


def test_large_and_small_magnitudes() -> None:
    dense = masked_matrix(20, 40, 0.3, 0)
    for form in FEW_FORMATS:
        for scale in (1e-30, 1e30):
            check_forward(random(9, 40) * scale, form.pack(dense), random(20) * scale)


# ---- convolution geometry --------------------------------------------------------------------------------------------


@each_few
@pytest.mark.parametrize(
    "problem",
    [
        # Blocks that straddle groups, in rows and (through the flattened weight) in columns.
        ConvProblem("groups3_odd_rows", 2, 9, 15, 9, 9, groups=3, padding=(1, 1), density=0.5, seed=1),
        ConvProblem("groups5_rows_of_3", 1, 10, 15, 6, 7, groups=5, density=0.6, seed=2),
        ConvProblem("groups7_one_row", 2, 7, 7, 10, 10, groups=7, padding=(1, 1), density=0.9, seed=3),
        ConvProblem("groups2_pointwise", 3, 20, 34, 9, 9, (1, 1), groups=2, density=0.4, seed=4),
        ConvProblem("groups4_strided", 2, 24, 20, 9, 9, (3, 3), (2, 2), (1, 1), groups=4, density=0.4, seed=5),
        # Several images share a tile.
        ConvProblem("tiny_map_big_batch", 67, 6, 9, 2, 2, (2, 2), padding=(1, 1), density=0.5, seed=6),
        ConvProblem("one_pixel_big_batch", 130, 6, 9, 1, 1, (1, 1), density=0.5, seed=7),
        ConvProblem("3x3_to_one_pixel", 70, 6, 9, 3, 3, density=0.5, seed=8),
        ConvProblem("4x4_big_batch", 33, 5, 6, 4, 4, padding=(1, 1), density=0.5, seed=9),
        ConvProblem("7x7_batch", 19, 5, 6, 7, 7, (3, 3), (2, 2), (1, 1), density=0.5, seed=10),
        # Rows wider than a strip, and around it.
        ConvProblem("very_wide", 1, 2, 3, 4, 1500, padding=(1, 1), density=0.6, seed=11),
        ConvProblem("very_wide_strided", 2, 2, 3, 3, 2100, (3, 5), (1, 2), (1, 2), density=0.6, seed=12),
        ConvProblem("strip_edge", 1, 2, 3, 3, 513, (1, 3), padding=(0, 1), density=0.7, seed=13),
        ConvProblem("one_row", 3, 4, 5, 1, 300, (1, 3), density=0.6, seed=14),
        ConvProblem("one_column", 3, 4, 5, 300, 1, (3, 1), density=0.6, seed=15),
        ConvProblem("pointwise_panels", 2, 5, 6, 33, 31, (1, 1), density=0.6, seed=16),
        ConvProblem("pointwise_one_over", 1, 5, 6, 5, 13, (1, 1), density=0.6, seed=17),
        # Kernels larger than their stride and the other way round.
        ConvProblem("stride_beyond_kernel", 2, 3, 5, 20, 21, (2, 3), (5, 4), density=0.6, seed=18),
        ConvProblem("dilated_strided", 2, 3, 5, 25, 23, (3, 3), (3, 2), (2, 3), (2, 4), density=0.6, seed=19),
        ConvProblem("padding_beyond_map", 1, 3, 5, 2, 2, (3, 3), padding=(7, 9), density=0.6, seed=20),
        ConvProblem("kernel_of_padding", 1, 2, 3, 1, 1, (4, 4), padding=(2, 2), density=0.8, seed=21),
        ConvProblem("many_taps", 1, 3, 4, 23, 22, (19, 18), padding=(2, 0), density=0.3, seed=22),
        ConvProblem("many_channels", 1, 150, 20, 5, 6, padding=(1, 1), density=0.1, seed=23),
        ConvProblem("many_outputs", 1, 4, 1100, 4, 4, padding=(1, 1), density=0.2, seed=24),
        ConvProblem("k_above_65536", 1, 7300, 3, 3, 3, density=0.01, seed=25),
    ],
    ids=str,
)
def test_convolution_geometry(problem: ConvProblem, form: Format) -> None:
    for dtype in DTYPES:
        check_problem(problem, form, dtype)


def test_pairs_and_ints_mean_the_same() -> None:
    for form in (SPARSE, Format((4, 4))):
        weight, x = form.pack(masked_matrix(8, 36, 0.5, 0).view(8, 4, 3, 3)), random(2, 4, 9, 9)
        pairs = apply(x, weight, stride=(2, 2), padding=(1, 1), dilation=(2, 2))
        assert torch.equal(apply(x, weight, stride=2, padding=1, dilation=2), pairs)


# ---- hypothesis ------------------------------------------------------------------------------------------------------

formats = st.sampled_from(FORMATS) | st.builds(Format, st.tuples(st.integers(1, 70), st.integers(1, 70)))
densities = st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.6, 1.0])


@settings(max_examples=120)
@given(
    m=st.integers(0, 140), n=st.integers(0, 150), k=st.integers(0, 400), density=densities, form=formats,
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), relu=st.booleans(), with_bias=st.booleans(),
)  # fmt: skip
def test_any_linear(
    m: int, n: int, k: int, density: float, form: Format, dtype: torch.dtype, seed: int, relu: bool, with_bias: bool
) -> None:
    x, weight, bias = tensors(LinearProblem("", m, n, k, density, seed=seed), form, dtype)
    check_forward(x, weight, bias if with_bias else None, relu=relu)


@st.composite
def convolutions(draw: st.DrawFn) -> ConvProblem:
    groups = draw(st.integers(1, 4))
    kernel, stride, dilation = ((draw(st.integers(1, top)), draw(st.integers(1, top))) for top in (4, 3, 3))
    padding = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    spans = [dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i] for i in range(2)]
    h, w = (max(1, span) + draw(st.integers(0, 24)) for span in spans)
    return ConvProblem(
        "", draw(st.integers(0, 6)), groups * draw(st.integers(1, 9)), groups * draw(st.integers(1, 12)), h, w,
        kernel, stride, padding, dilation, groups, draw(densities), seed=draw(st.integers(0, 99)),
    )  # fmt: skip


@settings(max_examples=120)
@given(problem=convolutions(), form=formats, dtype=st.sampled_from(DTYPES), relu=st.booleans())
def test_any_convolution(problem: ConvProblem, form: Format, dtype: torch.dtype, relu: bool) -> None:
    x, weight, bias = tensors(problem, form, dtype)
    check_forward(x, weight, bias, relu=relu, **geometry(problem))


# ---- fallback --------------------------------------------------------------------------------------------------------


@each_few
def test_a_dtype_without_kernel_runs_the_reference_and_says_so_once(
    form: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimtorch.ops._common._warned", set())
    weight, x = form.pack(masked_matrix(8, 16, 0.5, 0).half()), random(3, 16).half()
    with pytest.warns(UserWarning, match="no kernel for torch.float16") as caught:
        outputs = [apply(x, weight) for _ in range(2)]
    assert len(caught) == 1
    assert torch.equal(outputs[1], reference.linear(x, weight))


def test_autocast_matches_the_dense_layer() -> None:
    for form in FEW_FORMATS:
        weight, x, bias = form.pack(masked_matrix(20, 40, 0.5, 0)), random(9, 40), random(20)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = apply(x, weight, bias)
        assert y.dtype == torch.bfloat16
        low = replace(weight, values=weight.values.bfloat16())
        assert torch.equal(y, apply(x.bfloat16(), low, bias.bfloat16()))


def test_the_reference_is_the_dense_product() -> None:
    dense, x, bias = masked_matrix(8, 18, 0.5, 0), random(3, 18), random(8)
    assert torch.equal(reference.linear(x, Sparse.pack(dense), bias), torch.nn.functional.linear(x, dense, bias))
    image, kernel = random(1, 2, 5, 5), dense.view(8, 2, 3, 3)
    expected = torch.nn.functional.conv2d(image, kernel, bias, 2, 1).relu()
    packed = slim.formats.BlockSparse.pack(kernel, (4, 4))
    assert torch.equal(reference.conv2d(image, packed, bias, (2, 2), (1, 1), relu=True), expected)
