# SPDX-License-Identifier: Apache-2.0
"""Bad input: a TypeError or ValueError that says what is wrong from slim.ops, a RuntimeError from the raw operators.

Raw operators check positions before they touch memory, so that no offsets and no columns, however wrong, can crash.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slimtorch as slim
from slimtorch.formats import BlockSparse, Sparse
from tests.ops.operators import (
    FEW_FORMATS,
    SPARSE,
    Format,
    Weight,
    apply,
    geometry,
    positions,
    random,
    raw,
    raw_calls,
    tensors,
)
from tests.problems import ConvProblem, LinearProblem, Problem, masked_matrix

LINEAR = LinearProblem("linear", 9, 20, 40, 0.4, seed=1)
CONV = ConvProblem("conv2d", 2, 4, 20, 8, 7, (3, 2), groups=2, density=0.4, seed=1)
each_family = pytest.mark.parametrize("form", [SPARSE, Format((4, 8))], ids=["sparse", "block_sparse"])
each_layer = pytest.mark.parametrize("problem", [LINEAR, CONV], ids=str)


def linear(form: Format) -> tuple[Tensor, Weight, Tensor]:
    return tensors(LINEAR, form, torch.float32)


def conv2d(form: Format) -> tuple[Tensor, Weight, Tensor]:
    return tensors(CONV, form, torch.float32)


# ---- slim.ops --------------------------------------------------------------------------------------------------------


@each_family
@each_layer
def test_wrong_dtypes(problem: Problem, form: Format) -> None:
    x, weight, bias = tensors(problem, form, torch.float32)
    options = geometry(problem)
    with pytest.raises(TypeError, match=r"x: expected torch.float32 .* got torch.float64"):
        apply(x.double(), weight, bias, **options)
    with pytest.raises(TypeError, match=r"torch.bfloat16"):
        apply(x, weight, bias.bfloat16(), **options)
    with pytest.raises(TypeError, match=r"x: expected torch.float32"):
        apply(x.to(torch.int64), weight, bias, **options)
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor, got list"):
        apply(x.tolist(), weight, bias, **options)


@each_family
@each_layer
def test_wrong_devices(problem: Problem, form: Format) -> None:
    x, weight, bias = tensors(problem, form, torch.float32)
    options = geometry(problem)
    with pytest.raises(ValueError, match=r"weight: expected device meta"):
        apply(x.to("meta"), weight, bias, **options)
    with pytest.raises(ValueError, match=r"bias: expected device cpu .* got meta"):
        apply(x, weight, bias.to("meta"), **options)


@each_family
def test_wrong_shapes_of_a_linear_layer(form: Format) -> None:
    x, weight, bias = linear(form)
    for bad in (random(9, 41), random(40, 9), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"x: expected shape \[\.\.\., 40\], got"):
            apply(bad, weight, bias)
    for bad in (random(19), random(20, 1), random(1)):
        with pytest.raises(ValueError, match=r"bias: expected shape \[20\], got"):
            apply(x, weight, bad)
    op = slim.ops.sparse_linear if form is SPARSE else slim.ops.block_sparse_linear
    with pytest.raises(ValueError, match="weight: expected the format of a linear layer"):
        op(x, conv2d(form)[1])
    with pytest.raises(ValueError, match="activation: expected None or 'relu', got 'gelu'"):
        op(x, weight, bias, activation="gelu")


@each_family
def test_wrong_shapes_of_a_convolution(form: Format) -> None:
    x, weight, bias = conv2d(form)
    op = slim.ops.sparse_conv2d if form is SPARSE else slim.ops.block_sparse_conv2d
    with pytest.raises(ValueError, match="weight: expected the format of a conv2d layer"):
        op(x, linear(form)[1])
    with pytest.raises(ValueError, match=r"x: expected shape \[N, 4, H, W\] or without N, got"):
        op(random(2, 5, 8, 7), weight, bias, groups=2)
    for bad in (random(8, 7), random(1, 2, 4, 8, 7)):
        with pytest.raises(ValueError, match="x: expected shape"):
            op(bad, weight, bias, groups=2)
    with pytest.raises(ValueError, match="x: expected a padded H of at least 3, got 2"):
        op(random(2, 4, 2, 7), weight, bias, groups=2)
    with pytest.raises(ValueError, match="x: expected a padded W of at least 6, got 5"):
        op(random(2, 4, 8, 5), weight, bias, groups=2, dilation=(1, 5))
    for groups in (0, -1, 3, 1.0):
        with pytest.raises(ValueError, match="groups: expected a positive divisor"):
            op(x, weight, bias, groups=groups)
    for name, bad, error in (
        ("stride", 0, ValueError), ("stride", (1, -1), ValueError), ("padding", -1, ValueError),
        ("dilation", 0, ValueError), ("stride", (1, 2, 3), TypeError), ("padding", (1.5, 1), TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match=f"{name}: expected"):
            op(x, weight, bias, groups=2, **{name: bad})


# ---- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FEW_FORMATS, ids=str)
def test_what_cannot_be_packed(form: Format) -> None:
    dense = masked_matrix(6, 8, 0.5, 0)
    with pytest.raises(ValueError, match="NaN"):
        form.pack(dense.index_fill(0, torch.tensor([2]), math.nan))
    with pytest.raises(TypeError, match="floating-point"):
        form.pack(dense.int())
    with pytest.raises(TypeError, match=r"torch\.Tensor, got list"):
        form.pack(dense.tolist())
    for bad in (dense[0], dense.view(2, 3, 8)):
        with pytest.raises(ValueError, match="expected a weight of shape"):
            form.pack(bad)


@pytest.mark.parametrize(
    ("block_size", "error"),
    [
        ((0, 4), ValueError), ((4, 0), ValueError), ((-1, 4), ValueError), ((4, -16), ValueError),
        ((2000, 4), ValueError), ((4,), TypeError), (16, TypeError), ((4, 4, 4), TypeError), ((4.0, 4), TypeError),
        ("44", TypeError), ((True, 4), TypeError), (None, TypeError),
    ],
)  # fmt: skip
def test_wrong_block_sizes(block_size: Any, error: type[Exception]) -> None:
    for make in (BlockSparse.pack, BlockSparse.full):
        with pytest.raises(error, match="block_size: expected"):
            make(torch.ones(8, 8), block_size)


# ---- corrupt formats -------------------------------------------------------------------------------------------------


def damaged(weight: Weight) -> dict[str, Weight]:
    """Formats that break an invariant each, by what is broken."""
    blocks = isinstance(weight, BlockSparse)
    columns_name, offsets_name = ("block_columns", "block_row_offsets") if blocks else ("columns", "row_offsets")
    columns, offsets = getattr(weight, columns_name), getattr(weight, offsets_name)

    def other(**fields: Tensor) -> Weight:
        return replace(weight, _plans={}, **fields)

    def changed(tensor: Tensor, index: int, value: int) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    first = int((offsets[1:] - offsets[:-1] > 1).nonzero()[0])  # a row of two entries or more
    at = int(offsets[first])
    swapped = columns.clone()
    swapped[at], swapped[at + 1] = columns[at + 1], columns[at]
    return {
        "offsets fall": other(**{offsets_name: changed(offsets, 2, int(offsets[3]) + 1)}),
        "offsets go beyond the entries": other(**{offsets_name: changed(offsets, 2, 10**6)}),
        "first offset is not 0": other(**{offsets_name: changed(offsets, 0, 1)}),
        "an offset is negative": other(**{offsets_name: changed(offsets, 1, -5)}),
        "last offset is too small": other(**{offsets_name: changed(offsets, -1, int(offsets[-1]) - 1)}),
        "an offset is missing": other(**{offsets_name: offsets[:-1]}),
        "no offsets": other(**{offsets_name: offsets[:0]}),
        "a column is negative": other(**{columns_name: changed(columns, at, -1)}),
        "a column is too large": other(**{columns_name: changed(columns, -1, 10**6)}),
        "a column is the first beyond": other(**{columns_name: changed(columns, -1, 40)}),
        "columns descend": other(**{columns_name: swapped}),
        "a column twice": other(**{columns_name: changed(columns, at + 1, int(columns[at]))}),
        "a column is missing": other(**{columns_name: columns[:-1]}),
        "64-bit columns": other(**{columns_name: columns.long()}),
        "64-bit offsets": other(**{offsets_name: offsets.long()}),
        "a value is missing": other(values=weight.values[:-1]),
        "values are flat": other(values=weight.values.flatten()[None]),
    }


@each_family
def test_damaged_formats(form: Format) -> None:
    x, weight, bias = linear(form)
    for what, bad in damaged(weight).items():
        for m in (1, 9):
            with pytest.raises((ValueError, TypeError), match="expected"):
                apply(x[:m], bad, bias), what


@each_family
def test_damaged_positions_in_raw_operators(form: Format) -> None:
    x, weight, bias = linear(form)
    good = raw_calls(x, weight, bias, plans=False)
    for what, bad in damaged(weight).items():
        fields = {"values": bad.values, **positions(bad)}
        for name, arguments in good.items():
            replaced = {key: fields.get(key, value) for key, value in arguments.items()}
            if "values" in what and "values" not in arguments:
                continue  # grad_values and plan take no values
            if all(replaced[key] is value for key, value in arguments.items()):
                continue
            with pytest.raises(RuntimeError):
                raw(name, **replaced), what


# ---- raw operators ---------------------------------------------------------------------------------------------------


def wrong_arguments(name: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of a call with one of them wrong, in many ways."""
    wrong: list[dict[str, Any]] = []
    for key, value in arguments.items():
        replacements: list[Any] = []
        if isinstance(value, Tensor) and "plan" in key:
            other = torch.zeros_like(value)
            shuffled = value.clone()
            shuffled[:64] = value[:64].flip(0)
            replacements = [other, shuffled, value[:-1], value[:7], value[:0], value.float(), value.repeat(2)]
            replacements.append(torch.randint(0, 256, value.shape, dtype=torch.uint8))
        elif isinstance(value, Tensor):
            replacements = [value.half() if value.is_floating_point() else value.float(), value.to(torch.int64)]
            if value.dim() > 1 or key in ("bias", "columns"):
                replacements.append(value[..., :-1].contiguous())
            if key in ("values", "columns"):
                replacements.append(value[:-1])
            replacements.append(torch.zeros((), dtype=value.dtype))
        elif key in ("width", "rows"):
            replacements = [-1, value + 100, 2**31, 2**62, -(2**62)]
        elif key == "groups":
            replacements = [0, -1, 7, 2**31, 2**62]
        elif key == "taps":
            replacements = [0, -1]
        elif key in ("kernel", "stride", "dilation", "block_size"):
            replacements = [(0, 0), (-1, -1), (1,), (1, 1, 1), ()]
            if key == "kernel":
                replacements += [(100, 100), (2**32, 2**32), (2**62, 2)]
            if key == "block_size":
                replacements += [(2**20, 2**20), (2**62, 1)]
        elif key == "padding":
            replacements = [(-1, 0), (1,), ()]
        wrong += [{**arguments, key: replacement} for replacement in replacements]
    return wrong


@each_family
@each_layer
def test_wrong_arguments_of_raw_operators(problem: Problem, form: Format) -> None:
    x, weight, bias = tensors(problem, form, torch.float32)
    count = 0
    for name, arguments in raw_calls(x, weight, bias, **geometry(problem)).items():
        for wrong in wrong_arguments(name, arguments):
            # Most are errors; some are another sound call. None may crash.
            try:
                raw(name, **wrong)
            except (RuntimeError, NotImplementedError):
                count += 1
    assert count > 60


@each_family
def test_a_plan_of_another_matrix(form: Format) -> None:
    x, weight, bias = linear(form)
    call = raw_calls(x, weight, bias)
    others = [
        form.pack(masked_matrix(rows, columns, density, 3, block_size=form.block_size or (1, 1)))
        for rows, columns, density in ((20, 40, 0.2), (21, 40, 0.4), (20, 56, 0.4), (40, 20, 0.4), (0, 0, 0))
    ]
    for name, arguments in call.items():
        for key in ("plan", "backward_plan"):
            if key not in arguments or (key == "backward_plan" and "plan" in arguments):
                continue  # the forward takes the backward's plan along without reading it
            for other in others:
                for transposed in (False, True):
                    with pytest.raises(RuntimeError, match="plan: made for a matrix of other sizes"):
                        raw(name, **{**arguments, key: other.plan(transposed=transposed)})
            swapped = weight.plan(transposed=key == "plan")
            with pytest.raises(RuntimeError, match="plan: made for a matrix of other sizes"):
                raw(name, **{**arguments, key: swapped})


def test_a_plan_of_another_family() -> None:
    x, sparse, _ = linear(SPARSE)
    _, blocks, _ = linear(Format((4, 8)))
    for weight, other in ((sparse, blocks), (blocks, sparse)):
        name, arguments = next((n, a) for n, a in raw_calls(x, weight).items() if n.endswith("_linear"))
        with pytest.raises(RuntimeError, match="plan"):
            raw(name, **{**arguments, "plan": other.plan()})


@each_family
@pytest.mark.parametrize(
    "wrong",
    [
        {"kernel": (2**32, 2**32), "padding": (2**31, 2**31)},  # taps overflow to 0
        {"kernel": (2**20, 2**20), "padding": (2**19, 2**19)},
        {"kernel": (3, 3), "padding": (10**6, 1), "dilation": (10**6, 1)},  # a tile of gigabytes
        {"padding": (2**40, 2**40)},
        {"stride": (2**62, 1)},
        {"dilation": (2**62, 2**62), "kernel": (1, 1)},
    ],
    ids=str,
)
def test_sizes_beyond_any_layer(wrong: dict[str, Any], form: Format) -> None:
    channels, (kh, kw) = 40, wrong.get("kernel", (1, 1))
    taps = kh * kw if kh * kw < 10 else 1
    x, weight = random(1, channels, 4, 40), form.pack(masked_matrix(8, channels * taps, 1.0, 0))
    name = "sparse" if form is SPARSE else "block_sparse"
    size = {} if form is SPARSE else {"rows": 8}
    options = {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, **wrong}
    with pytest.raises(RuntimeError, match=r"expected|2 GiB"):
        raw(f"{name}_conv2d", x=x, values=weight.values, **positions(weight), **size, **options, relu=False)


# ---- hypothesis: any positions at all --------------------------------------------------------------------------------

indices = st.lists(st.integers(-3, 12) | st.sampled_from([2**31 - 1, -(2**31), 65535, 1000]), max_size=14)
sorted_offsets = st.lists(st.integers(0, 10), max_size=8).map(lambda steps: [0, *sorted(steps)])


def _run_or_refuse(name: str, **arguments: Any) -> None:
    try:
        y = raw(name, **arguments)
    except RuntimeError:
        return
    assert isinstance(y, Tensor)


@settings(max_examples=300)
@given(columns=indices, offsets=indices | sorted_offsets, m=st.sampled_from([0, 1, 2, 5, 70]), k=st.integers(0, 12))
def test_any_positions_of_a_sparse_linear(columns: list[int], offsets: list[int], m: int, k: int) -> None:
    where = {"columns": _int32(columns), "row_offsets": _int32(offsets)}
    n = max(0, len(offsets) - 1)
    values, x, grad = random(len(columns)), random(m, k), random(m, n)
    _run_or_refuse("sparse_plan", **where, width=k, groups=1, taps=1, transposed=False)
    _run_or_refuse("sparse_plan", **where, width=k, groups=1, taps=1, transposed=True)
    _run_or_refuse("sparse_linear", x=x, values=values, **where, relu=False)
    _run_or_refuse("sparse_linear_grad_input", grad=grad, values=values, **where, width=k)
    _run_or_refuse("sparse_linear_grad_values", grad=grad, x=x, **where)


@settings(max_examples=300)
@given(
    columns=indices, offsets=indices | sorted_offsets, m=st.sampled_from([0, 1, 2, 5, 70]), k=st.integers(0, 40),
    rows=st.integers(-1, 20), block=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)  # fmt: skip
def test_any_positions_of_a_block_sparse_linear(
    columns: list[int], offsets: list[int], m: int, k: int, rows: int, block: tuple[int, int]
) -> None:
    where = {"columns": _int32(columns), "row_offsets": _int32(offsets)}
    values, x, grad = random(len(columns), *block), random(m, k), random(m, max(0, rows))
    for transposed in (False, True):
        _run_or_refuse(
            "block_sparse_plan", **where, block_size=block, rows=rows, width=k, groups=1, taps=1, transposed=transposed
        )
    _run_or_refuse("block_sparse_linear", x=x, values=values, **where, rows=rows, relu=False)
    _run_or_refuse("block_sparse_linear_grad_input", grad=grad, values=values, **where, width=k)
    _run_or_refuse("block_sparse_linear_grad_values", grad=grad, x=x, **where, block_size=block)


@settings(max_examples=200)
@given(
    columns=st.lists(st.integers(0, 40), max_size=8), offsets=sorted_offsets, channels=st.integers(0, 6),
    groups=st.integers(-1, 4), size=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    kernel=st.tuples(st.integers(-1, 4), st.integers(0, 4)), stride=st.tuples(st.integers(0, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(-1, 3), st.integers(0, 3)), dilation=st.tuples(st.integers(0, 3), st.integers(1, 3)),
)  # fmt: skip
def test_any_convolution_of_raw_operators(
    columns: list[int], offsets: list[int], channels: int, groups: int, size: tuple[int, int],
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
) -> None:  # fmt: skip
    shape = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    where = {"columns": _int32(columns), "row_offsets": _int32(offsets)}
    x, rows = random(2, channels, *size), len(offsets) - 1
    grad = random(2, rows, *size)
    _run_or_refuse("sparse_conv2d", x=x, values=random(len(columns)), **where, **shape, relu=False)
    _run_or_refuse("sparse_conv2d_grad_values", grad=grad, x=x, **where, **shape)
    _run_or_refuse(
        "sparse_conv2d_grad_columns", grad=grad, values=random(len(columns)), **where, width=9, groups=groups
    )
    values = random(len(columns), 2, 3)
    _run_or_refuse("block_sparse_conv2d", x=x, values=values, **where, rows=2 * rows, **shape, relu=False)
    _run_or_refuse("block_sparse_conv2d_grad_values", grad=grad, x=x, **where, block_size=(2, 3), **shape)
    _run_or_refuse("block_sparse_conv2d_grad_columns", grad=grad, values=values, **where, width=9, groups=groups)


def _int32(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_formats_are_what_they_say() -> None:
    assert isinstance(linear(SPARSE)[1], Sparse)
    assert isinstance(conv2d(Format((4, 8)))[1], BlockSparse)
