# SPDX-License-Identifier: Apache-2.0
"""The operators as the tests see them: how to pack for one, how to call it, and how far off its result may be.

Tolerance. A sum of n products in a format of unit roundoff u, in any order, fused or not, errs by at most

    gamma_n * A,   gamma_n = n u / (1 - n u),   A = |x| @ |W|.T + |b|

(Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1). For long sums this is never met;
with rounding errors that are independent, sqrt(n) takes the place of n: at most 4 sqrt(n) u A but for odds of 1e-3 for
a sum at that very limit (Higham & Mary, "A new approach to probabilistic rounding error analysis", 2019, theorem 2.4),
and results are far from the limit because A does not cancel. The smaller of the two is used: 15 terms and fewer get
the proven bound. n counts stored weights, so a kernel that lost or added one product shows.

Kernels keep sums in float32, or float64 for float64, and round once: bfloat16 adds half a unit in its last place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import slimtorch as slim
from slimtorch.formats import BlockSparse, Sparse
from tests.problems import LinearProblem, Problem

Weight = Sparse | BlockSparse
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

# ---- what is packed --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """Sparse, or BlockSparse with a block size."""

    block_size: tuple[int, int] | None = None

    def pack(self, dense: Tensor) -> Weight:
        return Sparse.pack(dense) if self.block_size is None else BlockSparse.pack(dense, self.block_size)

    def of(self, problem: Any) -> Any:
        """The problem, masked in this format's blocks."""
        return replace(problem, block_size=self.block_size or (1, 1))

    def __str__(self) -> str:
        return "sparse" if self.block_size is None else "x".join(map(str, self.block_size))


SPARSE = Format()
BLOCK_SIZES = (
    (1, 1), (1, 4), (1, 16), (4, 1), (3, 5), (4, 4), (4, 16), (8, 8), (16, 4), (7, 13), (16, 16), (2, 70), (32, 32),
    (64, 1), (48, 24), (64, 64),
)  # fmt: skip
BLOCKS = tuple(Format(size) for size in BLOCK_SIZES)
FORMATS = (SPARSE, *BLOCKS)
FEW_FORMATS = (SPARSE, Format((1, 4)), Format((8, 8)), Format((16, 16)), Format((3, 5)))


def with_values(weight: Weight, values: Tensor) -> Weight:
    """The same positions with other values, sharing plans."""
    return replace(weight, values=values)


def pattern(weight: Weight) -> Tensor:
    """1 where ``weight`` stores an entry (zeros inside blocks too), 0 elsewhere; float64, of the dense shape."""
    return with_values(weight, torch.ones_like(weight.values, dtype=torch.float64)).to_dense()


# ---- how it is called ------------------------------------------------------------------------------------------------


def geometry(problem: Problem) -> dict[str, Any]:
    """Keyword arguments of a convolution; none for a linear layer."""
    if isinstance(problem, LinearProblem):
        return {}
    return {
        "stride": problem.stride, "padding": problem.padding, "dilation": problem.dilation, "groups": problem.groups,
    }  # fmt: skip


def operator(weight: Weight) -> Callable[..., Tensor]:
    """The function of ``slim.ops`` for a weight of this format and layer."""
    return getattr(slim.ops, f"{family(weight)}_{'linear' if len(weight.shape) == 2 else 'conv2d'}")


def apply(x: Tensor, weight: Weight, bias: Tensor | None = None, *, relu: bool = False, **options: Any) -> Tensor:
    """Run the operator that ``weight`` belongs to."""
    return operator(weight)(x, weight, bias, activation="relu" if relu else None, **options)


def product(x: Tensor, dense: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """The dense reference: F.linear or F.conv2d."""
    return F.linear(x, dense, bias) if dense.dim() == 2 else F.conv2d(x, dense, bias, **options)


def family(weight: Weight) -> str:
    return "sparse" if isinstance(weight, Sparse) else "block_sparse"


def raw(name: str, **arguments: Any) -> Tensor:
    """``torch.ops.slimtorch.<name>``; optional tensors that are not given are None."""
    op = getattr(torch.ops.slimtorch, name).default
    schema = op._schema.arguments
    assert set(arguments) <= {a.name for a in schema}
    return op(*(arguments.get(a.name) for a in schema))


def positions(weight: Weight) -> dict[str, Tensor]:
    """Columns and row offsets under the raw operators' names for them."""
    if isinstance(weight, Sparse):
        return {"columns": weight.columns, "row_offsets": weight.row_offsets}
    return {"columns": weight.block_columns, "row_offsets": weight.block_row_offsets}


def raw_calls(
    x: Tensor, weight: Weight, bias: Tensor | None = None, *, relu: bool = False, plans: bool = True, **options: Any
) -> dict[str, dict[str, Any]]:
    """Arguments of every raw operator of a family and layer, by the operator's name, for one weight and input."""
    name, groups = family(weight), options.get("groups", 1)
    blocks = isinstance(weight, BlockSparse)
    where, linear = positions(weight), len(weight.shape) == 2
    rows, width = weight.shape[0], math.prod(weight.shape[1:])
    plan = weight.plan(groups) if plans else None
    backward_plan = weight.plan(groups, transposed=True) if plans else None
    size = {"rows": rows} if blocks else {}
    block_size = {"block_size": weight.block_size} if blocks else {}
    taps = 1 if linear else weight.shape[2] * weight.shape[3]
    shape = {"kernel": weight.shape[2:], **{k: options.get(k, default) for k, default in _GEOMETRY.items()}}
    layer, shape = ("linear", {}) if linear else ("conv2d", shape)
    grad = torch.ones_like(apply(x, weight, **options)).detach()
    calls: dict[str, dict[str, Any]] = {
        f"{name}_plan": {**where, **block_size, **size, "width": width, "groups": groups, "taps": taps,
                         "transposed": False},
        f"{name}_{layer}": {"x": x, "values": weight.values, **where, "plan": plan, "backward_plan": backward_plan,
                            "bias": bias, **size, **shape, "relu": relu},
        f"{name}_{layer}_grad_values": {"grad": grad, "x": x.detach(), **where, "plan": plan, **block_size, **shape},
    }  # fmt: skip
    backward = {"grad": grad, "values": weight.values.detach(), **where, "backward_plan": backward_plan, "width": width}
    calls[f"{name}_{layer}_inference"] = calls[f"{name}_{layer}"]
    if linear:
        calls[f"{name}_linear_grad_input"] = backward
    else:
        calls[f"{name}_conv2d_grad_columns"] = {**backward, "groups": groups}
    return calls


_GEOMETRY = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}

# ---- how far off it may be -------------------------------------------------------------------------------------------


def sum_bound(terms: int, dtype: torch.dtype) -> float:
    """Error of a sum of ``terms`` products kept in the type that ``dtype`` is summed in, over the sum of magnitudes."""
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    proven = terms * unit / (1 - terms * unit)
    # The reference is float64 itself, so a float64 result and its reference each err by the bound.
    return min(proven, 4 * math.sqrt(terms) * unit) * (2 if dtype == torch.float64 else 1)


def assert_close(actual: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """``actual`` differs from ``exact`` (float64) by no more than a sum of ``terms`` products of that magnitude may."""
    assert actual.shape == exact.shape
    if not actual.numel():
        return
    tolerance = sum_bound(max(1, terms), actual.dtype) * magnitude.detach()
    exact = exact.detach()
    if actual.dtype in (torch.bfloat16, torch.float16):  # one rounding at the end
        tolerance = tolerance + torch.finfo(actual.dtype).eps / 2 * (exact.abs() + tolerance)
    tolerance = tolerance + torch.finfo(actual.dtype).tiny
    error = (actual.detach().double() - exact).abs()
    wrong = ~(error <= tolerance)  # true for NaN
    if bool(wrong.any()):
        worst = int((error / tolerance).nan_to_num(nan=math.inf).argmax())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} values are off; worst at {worst}: got {actual.flatten()[worst]}, "
            f"expected {exact.flatten()[worst]} ± {float(tolerance.flatten()[worst]):.3g}"
        )


def stored_terms(weight: Weight) -> int:
    """Products in the longest sum of a forward pass, the bias included."""
    counts = pattern(weight).flatten(1).sum(1) if weight.values.numel() else torch.zeros(1)
    return int(counts.max()) + 1


def check_forward(
    x: Tensor, weight: Weight, bias: Tensor | None = None, *, relu: bool = False, **options: Any
) -> Tensor:
    """Run the operator, compare with the dense reference in float64; returns the output."""
    y = apply(x, weight, bias, relu=relu, **options)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    dense, wide, wide_bias = weight.to_dense().double(), x.double(), None if bias is None else bias.double()
    exact = product(wide, dense, wide_bias, **options)
    magnitude = product(wide.abs(), dense.abs(), None if wide_bias is None else wide_bias.abs(), **options)
    assert_close(y, exact.relu() if relu else exact, magnitude, stored_terms(weight))
    return y


def check_gradients(
    x: Tensor, weight: Weight, bias: Tensor | None, grad: Tensor | None = None, *, relu: bool = False, **options: Any
) -> None:
    """Gradients of input, values and bias against autograd through the dense reference in float64.

    ``grad`` is the gradient of the output; None stands for that of ``y.sum()``, which comes expanded from one number.
    """
    x = x.detach().requires_grad_()
    values = weight.values.detach().clone().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    leaves = [x, values] if bias is None else [x, values, bias]
    y = apply(x, with_values(weight, values), bias, relu=relu, **options)
    actual = torch.autograd.grad(y, leaves, grad) if grad is not None else torch.autograd.grad(y.sum(), leaves)

    through = torch.ones_like(y) if grad is None else grad
    # Where the output says that the ReLU is open: an output so near to zero that its sign is rounding would differ.
    through = torch.where(y > 0, through, 0) if relu else through
    exact = _reference_gradients(x.double(), weight, values.double(), through.double(), bias is not None, options)
    bounds = _reference_gradients(
        x.double().abs(), weight, values.double().abs(), through.double().abs(), bias is not None, options
    )
    # Products in a sum: what a one in every place of the other two operands adds up to.
    ones = [torch.ones_like(t, dtype=torch.float64) for t in (x, values, through)]
    counts = _reference_gradients(ones[0], weight, ones[1], ones[2], bias is not None, options)
    for tensor, reference, bound, count in zip(actual, exact, bounds, counts, strict=True):
        assert tensor.dtype == x.dtype
        assert_close(tensor, reference, bound, int(count.max()) if count.numel() else 0)


def _reference_gradients(
    x: Tensor, weight: Weight, values: Tensor, grad: Tensor, with_bias: bool, options: dict[str, Any]
) -> list[Tensor]:
    x, values = x.detach().requires_grad_(), values.detach().requires_grad_()
    bias = torch.zeros(weight.shape[0], dtype=torch.float64, requires_grad=True) if with_bias else None
    y = product(x, with_values(weight, values).to_dense(), bias, **options)
    return list(torch.autograd.grad(y, [x, values] if bias is None else [x, values, bias], grad))


# ---- problems as tensors ---------------------------------------------------------------------------------------------


def tensors(problem: Problem, form: Format, dtype: torch.dtype) -> tuple[Tensor, Weight, Tensor]:
    """Input, packed weight and bias of a problem, masked in the format's blocks."""
    problem = replace(form.of(problem), dtype=dtype)
    return problem.input(), form.pack(problem.weight()), problem.bias()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
