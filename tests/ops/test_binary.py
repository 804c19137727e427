# SPDX-License-Identifier: Apache-2.0
"""Binary linear and conv2d: sign x sign exactly, signs x float within rounding, gradients, every instruction set."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slimtorch as slim
from slimtorch import _C, reference
from slimtorch.formats import Binary
from tests.ops.operators import DTYPES, assert_close, geometry, product, random, raw
from tests.problems import EDGE_CONV, EDGE_LINEAR, ConvProblem, LinearProblem, Problem

ROOT = Path(__file__).resolve().parents[2]
ISAS = [name for name, missing in _C.isas().items() if not missing]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_input = pytest.mark.parametrize("binarize", [True, False], ids=("signs", "float"))


def tensors(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Binary, Tensor]:
    """Input, packed weight (no scale: every result is a whole number) and bias."""
    problem = replace(problem, dtype=dtype, density=1.0)
    return problem.input(), Binary.pack(problem.weight(), scale=False), problem.bias()


def wide(weight: Binary) -> Binary:
    return Binary(weight.signs, weight.scale.double(), weight.shape)


def scaled(weight: Binary) -> Binary:
    """The same signs with another scale in each row, some of them negative; plans are shared."""
    return replace(weight, scale=random(weight.shape[0], dtype=weight.scale.dtype, seed=7))


def apply(x: Tensor, weight: Binary, bias: Tensor | None = None, **options: Any) -> Tensor:
    relu = options.pop("relu", False)
    op = slim.ops.binary_linear if len(weight.shape) == 2 else slim.ops.binary_conv2d
    return op(x, weight, bias, activation="relu" if relu else None, **options)


def exact(x: Tensor, weight: Binary, bias: Tensor | None = None, *, binarize_input: bool, **options: Any) -> Tensor:
    x = reference.binarize(x.double()) if binarize_input else x.double()
    return product(x, wide(weight).to_dense(), None if bias is None else bias.double(), **options)


def check(problem: Problem, dtype: torch.dtype, binarize: bool) -> Tensor:
    x, weight, bias = tensors(problem, dtype)
    options = {**geometry(problem), "binarize_input": binarize}
    if binarize:
        # Whole numbers below 2**24: one rounding to bfloat16, none elsewhere.
        y = apply(x, weight, **options)
        assert torch.equal(y, exact(x, weight, **options).to(dtype))
    weight = scaled(weight)
    y = apply(x, weight, bias, **options)
    assert y.dtype == dtype
    assert y.is_contiguous()
    magnitudes = replace(weight, scale=weight.scale.abs(), signs=torch.full_like(weight.signs, 255), _plans={})
    ones = torch.ones_like(x) if binarize else x.abs()
    bound = product(ones.double(), wide(magnitudes).to_dense().abs(), bias.double().abs(), **geometry(problem))
    # Sign x sign sums nothing but a product and a bias, however long the row.
    terms = 2 if binarize else math.prod(weight.shape[1:]) + 2
    assert_close(y, exact(x, weight, bias, **options), bound, terms)
    assert torch.equal(apply(x, weight, bias, relu=True, **options), y.relu())
    return y


# ---- values ----------------------------------------------------------------------------------------------------------

K = (1, 7, 8, 31, 63, 64, 65, 127, 128, 129, 247, 248, 249, 500, 1027)


@each_dtype
@each_input
@pytest.mark.parametrize("problem", [p for p in EDGE_LINEAR + EDGE_CONV if "density" not in p.name], ids=str)
def test_edges(problem: Problem, binarize: bool, dtype: torch.dtype) -> None:
    check(problem, dtype, binarize)


@each_dtype
@each_input
@pytest.mark.parametrize("k", K)
def test_every_length(k: int, binarize: bool, dtype: torch.dtype) -> None:
    # Rows straddle panels of 8 and 32 and units of 64; columns tiles of 2, 3, 4 and 6.
    for m, n in itertools.chain(((m, 37) for m in range(1, 9)), ((5, n) for n in (1, 8, 31, 32, 33, 63, 64, 65, 129))):
        check(LinearProblem("", m, n, k, seed=m * n), dtype, binarize)


def channels() -> Iterator[ConvProblem]:
    for c in (1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 130):
        yield ConvProblem(f"channels{c}", 2, c, 9, 6, 5, padding=(1, 1), seed=c)
    yield ConvProblem("groups_of_12", 2, 36, 15, 7, 6, padding=(1, 1), groups=3, seed=1)
    yield ConvProblem("many_pixels", 1, 16, 70, 20, 19, padding=(1, 1), seed=2)
    yield ConvProblem("taps_all_outside", 1, 4, 5, 3, 3, (2, 2), padding=(6, 6), seed=3)
    yield ConvProblem("border_of_dilation", 1, 5, 6, 7, 8, (3, 3), (2, 1), (3, 4), (3, 2), seed=4)


@each_dtype
@each_input
@pytest.mark.parametrize("problem", list(channels()), ids=str)
def test_channels(problem: ConvProblem, binarize: bool, dtype: torch.dtype) -> None:
    check(problem, dtype, binarize)


def test_counts_beyond_16_bits() -> None:
    """Rows so long that sums of 16 bits would overflow, all alike and all different."""
    x = torch.ones(3, 70001)
    weight = Binary.pack(torch.ones(33, 70001), scale=False)
    weight.signs[: 70001 // 8] = 0
    y = slim.ops.binary_linear(x, weight)
    assert torch.equal(y[:, 1:], torch.full((3, 32), 70001.0))
    assert torch.equal(y[:, 0], torch.full((3,), -69999.0))
    assert torch.equal(slim.ops.binary_linear(-x, weight), -y)


@each_dtype
def test_what_counts_as_plus_one(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, -0.0, 1e-30, -1e-30, inf, -inf, nan, -nan]], dtype=dtype)
    eye = Binary.pack(torch.eye(8, dtype=dtype) * 2 - 1, scale=False)
    expected = reference.binarize(x)
    assert expected.tolist() == [[1, 1, 1, -1, 1, -1, -1, -1]]
    assert torch.equal(slim.ops.binary_linear(x, eye), expected @ eye.to_dense().T)
    image, kernel = x.reshape(1, 8, 1, 1).expand(1, 8, 3, 11), Binary(eye.signs, eye.scale, (8, 8, 1, 1))
    y = slim.ops.binary_conv2d(image, kernel)
    assert torch.equal(y, (expected @ eye.to_dense().T).reshape(1, 8, 1, 1).expand_as(y))


@each_dtype
def test_nan_and_inf_propagate_through_float_activations(dtype: torch.dtype) -> None:
    x, weight, _ = tensors(LinearProblem("", 6, 40, 70), dtype)
    x[1, 3], x[2, 5], x[3, 69], x[4, 0], x[4, 1] = torch.nan, torch.inf, -torch.inf, torch.inf, -torch.inf
    y, expected = slim.ops.binary_linear(x, weight, binarize_input=False), x.double() @ wide(weight).to_dense().T
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y[y.isinf()].double(), expected[expected.isinf()])


@each_input
@pytest.mark.parametrize(
    "problem",
    [LinearProblem("linear", 33, 40, 129), ConvProblem("conv", 3, 12, 20, 9, 9, padding=(1, 1), groups=2)],
    ids=str,
)
def test_layouts_and_threads(problem: Problem, binarize: bool) -> None:
    x, weight, bias = tensors(problem, torch.float32)
    options = {**geometry(problem), "binarize_input": binarize}
    y = apply(x, weight, bias, **options)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(apply(strided, weight, bias, **options), y)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    assert torch.equal(apply(shifted, weight, bias, **options), y)
    assert torch.equal(apply(x, replace(weight, _plans={}), bias, **options), y)
    before = torch.get_num_threads()
    big = x.repeat(8, *[1] * (x.dim() - 1))
    torch.set_num_threads(1)
    one = apply(big, weight, bias, **options)
    torch.set_num_threads(2)
    two = apply(big, weight, bias, **options)
    torch.set_num_threads(before)
    assert torch.equal(one, two)
    assert torch.equal(one[: len(y)], y)


def test_threads_share_wide_layers() -> None:
    """Enough work to be split: by rows for one column, by columns else."""
    weight = Binary.pack(random(4096, 2048, seed=3))
    for m in (1, 200):
        x = random(m, 2048, seed=m)
        for binarize in (True, False):
            results = []
            before = torch.get_num_threads()
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(slim.ops.binary_linear(x, weight, binarize_input=binarize))
            torch.set_num_threads(before)
            assert torch.equal(*results)


def test_unbatched_and_leading_dimensions() -> None:
    x, weight, bias = tensors(ConvProblem("", 1, 5, 7, 8, 6, padding=(1, 1)), torch.float32)
    assert torch.equal(apply(x[0], weight, bias, padding=1), apply(x, weight, bias, padding=1)[0])
    x, weight, bias = tensors(LinearProblem("", 24, 9, 17), torch.float32)
    assert torch.equal(apply(x.reshape(2, 3, 4, 17), weight, bias).reshape(24, 9), apply(x, weight, bias))
    assert torch.equal(apply(x[0], weight, bias), apply(x, weight, bias)[0])


# ---- gradients -------------------------------------------------------------------------------------------------------

GRADIENT_PROBLEMS = (
    LinearProblem("linear", 5, 6, 11),
    ConvProblem("conv", 2, 3, 4, 5, 6, padding=(1, 1)),
    ConvProblem("conv_all", 2, 4, 6, 7, 6, (3, 2), (2, 1), (2, 1), (1, 2), 2),
)
each_problem = pytest.mark.parametrize("problem", GRADIENT_PROBLEMS, ids=str)


@each_problem
def test_gradcheck_of_float_activations(problem: Problem) -> None:
    x, weight, bias = tensors(problem, torch.float64)
    weight = scaled(weight)
    options = {**geometry(problem), "binarize_input": False}

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return apply(x, replace(weight, scale=scale), bias, **options)

    leaves = [t.detach().requires_grad_() for t in (x, weight.scale, bias)]
    assert torch.autograd.gradcheck(run, leaves)


@each_problem
@each_input
@each_dtype
@pytest.mark.parametrize("relu", [False, True], ids=("plain", "relu"))
def test_gradients(problem: Problem, relu: bool, dtype: torch.dtype, binarize: bool) -> None:
    x, weight, bias = tensors(problem, dtype)
    x = torch.cat([x.flatten()[:-4], torch.tensor([1, -1, 1.5, torch.nan], dtype=dtype)]).view_as(x) if binarize else x
    weight = scaled(weight)
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight.scale, bias)]
    y = apply(leaves[0], replace(weight, scale=leaves[1]), leaves[2], relu=relu, binarize_input=binarize,
              **geometry(problem))  # fmt: skip
    grad = random(*y.shape, dtype=dtype, seed=5)
    actual = torch.autograd.grad(y, leaves, grad)

    through = torch.where(y > 0, grad, 0).double() if relu else grad.double()

    def dense(signs: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return product(signs, Binary(weight.signs, scale, weight.shape).to_dense(), bias, **geometry(problem))

    def gradients(scale: Tensor, through: Tensor) -> list[Tensor]:
        # The straight-through estimator: gradient of the signs, where |x| <= 1.
        signs = (reference.binarize(x.double()) if binarize else x.double()).requires_grad_()
        wide = [signs, scale.double().requires_grad_(), bias.double().requires_grad_()]
        found = list(torch.autograd.grad(dense(*wide), wide, through))
        if binarize:
            found[0] = torch.where(x.double().abs() <= 1, found[0], 0)
        return found

    expected = gradients(weight.scale, through)
    for tensor, reference_gradient, name in zip(actual, expected, ("x", "scale", "bias"), strict=True):
        assert tensor.dtype == dtype
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(
            tensor.double(), reference_gradient, rtol=tolerance, atol=tolerance * 10, msg=lambda m, n=name: f"{n}: {m}"
        )
    if binarize:
        blocked = ~(x.double().abs() <= 1)
        assert bool(blocked.any())
        assert not bool(actual[0][blocked].any())


@each_problem
@each_input
def test_opcheck(problem: Problem, binarize: bool) -> None:
    x, weight, bias = tensors(problem, torch.float32)
    plan = weight.plan(getattr(problem, "groups", 1), binarize_input=binarize)
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight.scale, bias)]
    layer, shape = "linear", []
    if isinstance(problem, ConvProblem):
        shape = [list(problem.kernel), list(problem.stride), list(problem.padding), list(problem.dilation)]
        layer, shape = "conv2d", [*shape, problem.groups]
    for each in (plan, None):
        arguments = (leaves[0], weight.signs, leaves[1], each, leaves[2], *shape, binarize, True)
        torch.library.opcheck(getattr(torch.ops.slimtorch, f"binary_{layer}").default, arguments)
    taps = list(problem.kernel) if isinstance(problem, ConvProblem) else [1, 1]
    for kind in (0, 1):
        where = (weight.signs, weight.shape[0], weight.shape[1], taps, getattr(problem, "groups", 1), kind)
        torch.library.opcheck(torch.ops.slimtorch.binary_plan.default, where)
    detached = (x, weight.signs, weight.scale, plan, bias, *shape, binarize, False)
    torch.library.opcheck(getattr(torch.ops.slimtorch, f"binary_{layer}_inference").default, detached)


# ---- bad input -------------------------------------------------------------------------------------------------------


def raises(match: str) -> Any:
    return pytest.raises(RuntimeError, match=match)


def test_raw_operators_refuse_what_does_not_fit() -> None:
    weight = Binary.pack(random(10, 70))
    plan = weight.plan()
    good: dict[str, Any] = {
        "x": random(3, 70), "signs": weight.signs, "scale": weight.scale, "plan": plan, "bias": None,
        "binarize_input": True, "relu": False,
    }  # fmt: skip
    assert raw("binary_linear", **good).shape == (3, 10)
    with raises("signs"):
        raw("binary_linear", **{**good, "signs": weight.signs[:-1]})
    with raises("signs"):
        raw("binary_linear", **{**good, "signs": weight.signs.int()})
    with raises("signs"):
        raw("binary_linear", **{**good, "x": random(3, 71), "plan": None})
    with raises("plan"):
        raw("binary_linear", **{**good, "binarize_input": False})
    with raises("plan"):
        raw("binary_linear", **{**good, "plan": plan[:-1]})
    with raises("plan"):
        raw("binary_linear", **{**good, "plan": plan[:8]})
    damaged = plan.clone()
    damaged[:8] = 0
    with raises("plan"):
        raw("binary_linear", **{**good, "plan": damaged})
    with raises("scale"):
        raw("binary_linear", **{**good, "scale": weight.scale.double()})
    with raises("bias"):
        raw("binary_linear", **{**good, "bias": random(9)})
    conv = Binary.pack(random(6, 3, 3, 3))
    shape = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    good = {"x": random(2, 3, 5, 5), "signs": conv.signs, "scale": conv.scale, "plan": conv.plan(), "bias": None,
            **shape, "binarize_input": True, "relu": False}  # fmt: skip
    assert raw("binary_conv2d", **good).shape == (2, 6, 5, 5)
    for change in ({"kernel": (3, 2)}, {"groups": 2}, {"groups": 0}, {"kernel": (7, 7)}, {"x": random(2, 4, 5, 5)},
                   {"stride": (0, 1)}, {"x": random(3, 5, 5)}, {"padding": (-1, 0)}):  # fmt: skip
        with pytest.raises(RuntimeError):
            raw("binary_conv2d", **{**good, **change})
    with raises("plan"):
        raw("binary_conv2d", **{**good, "plan": plan})


def test_wrapper_names_the_argument() -> None:
    weight = Binary.pack(random(10, 70))
    with pytest.raises(ValueError, match="x: expected shape"):
        slim.ops.binary_linear(random(3, 71), weight)
    with pytest.raises(TypeError, match="x: expected"):
        slim.ops.binary_linear(random(3, 70).double(), weight)
    with pytest.raises(ValueError, match="bias: expected shape"):
        slim.ops.binary_linear(random(3, 70), weight, random(9))
    with pytest.raises(ValueError, match="activation"):
        slim.ops.binary_linear(random(3, 70), weight, activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="signs"):
        slim.ops.binary_linear(random(3, 70), replace(weight, signs=weight.signs[:-1], _plans={}))


# ---- every instruction set -------------------------------------------------------------------------------------------

PROBLEMS: tuple[Problem, ...] = (
    *(LinearProblem(f"linear_m{m}", m, 75, 331, seed=m) for m in (1, 2, 3, 4, 5, 6, 7, 20, 65, 131)),
    LinearProblem("linear_tall", 40, 1100, 50, seed=1),
    LinearProblem("linear_long", 3, 4, 70001, seed=1),
    ConvProblem("conv3x3", 2, 65, 70, 13, 11, padding=(1, 1), seed=1),
    ConvProblem("conv_all", 3, 6, 10, 15, 12, (3, 2), (2, 3), (2, 1), (2, 1), 2, seed=1),
    ConvProblem("depthwise", 2, 9, 9, 10, 10, groups=9, padding=(1, 1), seed=1),
    ConvProblem("conv_tiny_maps", 40, 5, 9, 3, 3, padding=(1, 1), seed=1),
    ConvProblem("conv_wide", 1, 2, 5, 3, 1100, padding=(1, 1), seed=1),
    ConvProblem("pointwise", 2, 20, 300, 12, 13, (1, 1), seed=1),
)

_CHILD = """
import torch
from slimtorch import _C
from tests.ops.test_binary import DTYPES, PROBLEMS, check
from tests.ops.test_binary_bits import check_bits
for problem in PROBLEMS:
    for dtype in DTYPES:
        for binarize in (True, False):
            check(problem, dtype, binarize)
    check_bits(problem)
print(_C.isa())
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    environment = {**os.environ, "SLIMTORCH_CPU": isa, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == isa
