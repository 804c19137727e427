# SPDX-License-Identifier: Apache-2.0
"""Gradients of input, stored values and bias against autograd through the dense reference in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.operators import (
    BLOCKS,
    DTYPES,
    FORMATS,
    SPARSE,
    Format,
    apply,
    check_gradients,
    geometry,
    random,
    tensors,
    with_values,
)
from tests.ops.test_forward import convolutions, densities, each_dtype, each_few, formats
from tests.problems import EDGE_CONV, EDGE_LINEAR, ConvProblem, LinearProblem, Problem, masked_matrix


def output_gradient(problem: Problem, dtype: torch.dtype) -> Tensor:
    if isinstance(problem, LinearProblem):
        return random(problem.m, problem.n, dtype=dtype, seed=7)
    return random(problem.batch, problem.c_out, *problem.output_size, dtype=dtype, seed=7)


def check_problem(problem: Problem, form: Format, dtype: torch.dtype, *, relu: bool = False) -> None:
    x, weight, bias = tensors(problem, form, dtype)
    check_gradients(x, weight, bias, output_gradient(problem, dtype), relu=relu, **geometry(problem))


@pytest.mark.parametrize("problem", EDGE_LINEAR + EDGE_CONV, ids=str)
def test_sparse(problem: Problem) -> None:
    dtypes = itertools.cycle(DTYPES)
    for relu in (False, True):
        check_problem(problem, SPARSE, next(dtypes), relu=relu)
    check_problem(problem, SPARSE, torch.bfloat16)


@pytest.mark.parametrize("problem", EDGE_LINEAR + EDGE_CONV, ids=str)
def test_block_sparse(problem: Problem) -> None:
    sizes = [BLOCKS[(problem.seed + step) % len(BLOCKS)] for step in (0, 5, 11)]
    for form, dtype, relu in zip(sizes, DTYPES, (False, True, False), strict=True):
        check_problem(problem, form, dtype, relu=relu)


@each_dtype
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_every_format(form: Format, dtype: torch.dtype) -> None:
    for m in (1, 4, 33, 70):
        check_problem(LinearProblem("", m, 70, 139, 0.25, seed=m), form, dtype, relu=m == 33)
    options: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "groups": 2}
    check_problem(ConvProblem("", 2, 6, 10, 9, 8, density=0.4, seed=1, **options), form, dtype)
    check_problem(ConvProblem("", 2, 6, 10, 9, 8, (1, 1), density=0.4, seed=1), form, dtype, relu=True)


@pytest.mark.parametrize("form", [SPARSE, Format((4, 16)), Format((64, 64))], ids=str)
@pytest.mark.parametrize("shape", [(129, 257), (257, 129), (1030, 40), (40, 1030), (1300, 7)], ids=str)
def test_larger_than_one_tile(shape: tuple[int, int], form: Format) -> None:
    for m in (2, 70):
        check_problem(LinearProblem("", m, *shape, 0.2, seed=m), form, torch.float32)


def test_more_than_65536_outputs() -> None:
    # In the backward of the input rows and columns change places.
    check_problem(LinearProblem("", 3, 65540, 2, 0.02, seed=1), SPARSE, torch.float32)


@each_dtype
@each_few
def test_expanded_gradients(form: Format, dtype: torch.dtype) -> None:
    for m in (1, 3, 20, 70):
        x, weight, bias = tensors(LinearProblem("", m, 30, 50, 0.3, seed=m), form, dtype)
        check_gradients(x, weight, bias)  # of y.sum(): one number, expanded
        check_gradients(x, weight, bias, random(m, 1, dtype=dtype).expand(m, 30))
        check_gradients(x, weight, bias, random(30, m, dtype=dtype).T)
    x, weight, bias = tensors(ConvProblem("", 2, 4, 6, 7, 7, padding=(1, 1), density=0.5, seed=1), form, dtype)
    check_gradients(x, weight, bias, padding=(1, 1))
    check_gradients(x, weight, bias, random(2, 6, 1, 1, dtype=dtype).expand(2, 6, 7, 7), padding=(1, 1))


@each_few
def test_leading_dimensions_and_layouts(form: Format) -> None:
    weight, bias = form.pack(masked_matrix(20, 33, 0.4, 0)), random(20)
    x = random(2, 3, 33, 4).transpose(2, 3)
    check_gradients(x, weight, bias, random(2, 3, 4, 20))
    check_gradients(random(33), weight, bias, random(20))
    check_gradients(random(2, 0, 33), weight, bias, random(2, 0, 20))
    image = form.pack(masked_matrix(9, 45, 0.4, 0).view(9, 5, 3, 3))
    x = random(2, 5, 8, 9).contiguous(memory_format=torch.channels_last)
    grad = random(2, 9, 6, 7).contiguous(memory_format=torch.channels_last)
    check_gradients(x, image, None, grad)


@each_few
@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_each_combination_of_wanted_gradients(layer: str, form: Format) -> None:
    problem: Problem
    if layer == "linear":
        problem = LinearProblem("", 9, 20, 40, 0.4, seed=1)
    else:
        problem = ConvProblem("", 2, 4, 20, 8, 8, padding=(1, 1), density=0.4, seed=1)
    for relu in (False, True):
        x, weight, bias = tensors(problem, form, torch.float32)
        names = ("x", "values", "bias")
        everything = {"x": x, "values": weight.values, "bias": bias}
        wanted: dict[str, Tensor] = {}
        for count in (3, 2, 1, 0):
            for chosen in itertools.combinations(names, count):
                leaves = {name: t.detach().requires_grad_(name in chosen) for name, t in everything.items()}
                y = apply(
                    leaves["x"], with_values(weight, leaves["values"]), leaves["bias"], relu=relu, **geometry(problem)
                )
                assert y.requires_grad == bool(chosen)
                if not chosen:
                    continue
                y.backward(output_gradient(problem, torch.float32))
                for name in names:
                    grad = leaves[name].grad
                    if name not in chosen:
                        assert grad is None
                    else:
                        assert grad is not None
                        assert torch.equal(grad, wanted.setdefault(name, grad))


@pytest.mark.parametrize("form", [SPARSE, Format((1, 1))], ids=str)
def test_relu_passes_gradients_as_torch_does(form: Format) -> None:
    # Closed at 0 and below, open above, and open for NaN, as torch.relu is.
    x = torch.tensor([[1.0, -1.0, 0.0, -0.0, float("nan"), float("inf")]] * 9)
    for m in (1, 9):
        ours, theirs = (x[:m].clone().requires_grad_() for _ in range(2))
        apply(ours, form.pack(torch.eye(6)), relu=True).sum().backward()
        theirs.relu().sum().backward()
        assert torch.equal(ours.grad, theirs.grad)


# ---- gradcheck: float64 runs natively --------------------------------------------------------------------------------


@each_few
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("m", [1, 3, 6])
def test_gradcheck_linear(m: int, relu: bool, with_bias: bool, form: Format) -> None:
    x, weight, bias = tensors(LinearProblem("", m, 5, 7, 0.5, seed=m + 20), form, torch.float64)
    _gradcheck(x, weight, bias if with_bias else None, relu)


@each_few
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "problem",
    [
        ConvProblem("plain", 2, 2, 3, 5, 4, (3, 3), density=0.5, seed=1),
        ConvProblem("pointwise", 2, 3, 4, 3, 4, (1, 1), density=0.6, seed=2),
        ConvProblem("all", 1, 4, 6, 6, 5, (3, 2), (2, 1), (1, 2), (1, 2), 2, 0.5, seed=3),
        ConvProblem("depthwise", 1, 3, 3, 5, 5, (3, 3), padding=(1, 1), groups=3, density=0.7, seed=4),
    ],
    ids=str,
)
def test_gradcheck_conv2d(problem: ConvProblem, relu: bool, form: Format) -> None:
    x, weight, bias = tensors(problem, form, torch.float64)
    _gradcheck(x, weight, bias, relu, **geometry(problem))


def _gradcheck(x: Tensor, weight: Any, bias: Tensor | None, relu: bool, **options: Any) -> None:
    leaves = [x.requires_grad_(), weight.values.clone().requires_grad_()]
    if bias is not None:
        leaves.append(bias.requires_grad_())

    def run(x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        return apply(x, replace(weight, values=values), bias, relu=relu, **options)

    # The finite difference must not step over a ReLU's kink (an output of no weight at all stays on it).
    y = apply(x, weight, bias, **options).detach()
    assert not relu or bool(((y.abs() > 1e-5) | (y == 0)).all())
    assert torch.autograd.gradcheck(run, leaves)


@each_few
def test_a_second_derivative_is_refused_not_wrong(form: Format) -> None:
    for problem in (LinearProblem("", 3, 5, 7, 0.5, seed=1), ConvProblem("", 1, 2, 3, 5, 5, density=0.5, seed=1)):
        x, weight, _ = tensors(problem, form, torch.float64)
        x.requires_grad_()
        y = apply(x, with_values(weight, weight.values.clone().requires_grad_()))
        (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate"):
            first.sum().backward()


# ---- hypothesis ------------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    m=st.integers(0, 100), n=st.integers(1, 150), k=st.integers(1, 300), density=densities, form=formats,
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), relu=st.booleans(),
)  # fmt: skip
def test_any_linear(
    m: int, n: int, k: int, density: float, form: Format, dtype: torch.dtype, seed: int, relu: bool
) -> None:
    check_problem(LinearProblem("", m, n, k, density, seed=seed), form, dtype, relu=relu)


@settings(max_examples=80)
@given(problem=convolutions(), form=formats, dtype=st.sampled_from(DTYPES), relu=st.booleans())
def test_any_convolution(problem: ConvProblem, form: Format, dtype: torch.dtype, relu: bool) -> None:
    check_problem(problem, form, dtype, relu=relu)
