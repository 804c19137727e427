# SPDX-License-Identifier: Apache-2.0
"""The packed layers as named cases, and the tolerance they are judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.formats import Binary, Codebook
from slimtorch.nn import PackedLayer
from tests.problems import masked_matrix


@dataclass(frozen=True)
class Case:
    """A dense layer, pruned, and the packed class that stands in for it."""

    name: str
    packed_class: type[Any]
    dense: Callable[..., nn.Linear | nn.Conv2d]
    sample: tuple[int, ...]  # shape of an input without its batch
    block_size: tuple[int, int] = (1, 1)
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    density: float = 0.3
    levels: int = 0  # distinct values of the weight that the format can hold without loss, zero included; 0: any
    binary: bool = False  # the format holds one magnitude per row, and no zeros

    def twin(self) -> nn.Linear | nn.Conv2d:
        """The dense layer with its weight pruned to `density`."""
        torch.manual_seed(0)
        layer = self.dense()
        shape = layer.weight.shape
        weight = masked_matrix(shape[0], shape[1:].numel(), self.density, 1, block_size=self.block_size, empty_rows=2)
        with torch.no_grad():
            layer.weight.copy_(self.representable(weight).reshape(shape))
        return layer.to(self.dtype)

    def representable(self, weight: Tensor) -> Tensor:
        """`weight` moved to values that the format holds without loss (and bfloat16 too)."""
        if self.binary:
            rows = weight.flatten(1)
            scale = (1 + torch.arange(len(rows)) % 4) / 8
            return (torch.where(rows < 0, -1.0, 1.0) * scale[:, None]).reshape(weight.shape)
        if self.levels:
            half = (self.levels - 1) // 2
            steps = (weight * 4).round()
            steps = torch.where(steps == 0, weight.sign(), steps).clamp(-half, half)
            return steps / 8
        return weight

    def packed(self) -> PackedLayer:
        """The packed layer that computes the same."""
        return self.packed_class.from_dense(self.twin(), **self.options)

    def fresh(self) -> PackedLayer:
        """A packed layer of the same geometry, built by its constructor: every entry stored."""
        twin = self.dense()
        if isinstance(twin, nn.Linear):
            layer = self.packed_class(twin.in_features, twin.out_features, twin.bias is not None, **self.options)
        else:
            layer = self.packed_class(
                twin.in_channels, twin.out_channels, twin.kernel_size, twin.stride, twin.padding, twin.dilation,
                twin.groups, twin.bias is not None, **self.options,
            )  # fmt: skip
        return layer.to(self.dtype)

    def input(self, *batch: int, seed: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*batch, *self.sample, generator=generator).to(self.dtype)


def _linear() -> nn.Linear:
    return nn.Linear(37, 53)


def _conv() -> nn.Conv2d:
    return nn.Conv2d(6, 10, 3, stride=2, padding=1, groups=2)


CASES = (
    Case("sparse_linear", slim.nn.SparseLinear, _linear, (37,)),
    Case("block_sparse_linear", slim.nn.BlockSparseLinear, _linear, (37,), (8, 8), {"block_size": (8, 8)}),
    Case("sparse_conv2d", slim.nn.SparseConv2d, _conv, (6, 9, 11)),
    Case("block_sparse_conv2d", slim.nn.BlockSparseConv2d, _conv, (6, 9, 11), (4, 16), {"block_size": (4, 16)}),
    Case("codebook_linear", slim.nn.CodebookLinear, _linear, (37,), options={"bits": 3, "zero": False}, levels=7),
    Case(
        "codebook_conv2d", slim.nn.CodebookConv2d, _conv, (6, 9, 11),
        options={"bits": 4, "group_size": 5, "zero": False}, levels=7,
    ),
    Case("sparse_codebook_linear", slim.nn.SparseCodebookLinear, _linear, (37,), options={"bits": 3}, levels=7),
    Case(
        "sparse_codebook_conv2d", slim.nn.SparseCodebookConv2d, _conv, (6, 9, 11),
        options={"bits": 5, "group_size": "row"}, levels=7,
    ),
    Case("binary_linear", slim.nn.BinaryLinear, _linear, (37,), options={"binarize_input": False}, binary=True),
    Case("binary_conv2d", slim.nn.BinaryConv2d, _conv, (6, 9, 11), options={"binarize_input": False}, binary=True),
)  # fmt: skip
SPARSE_CASES = CASES[:4]
CONVS = tuple(case for case in CASES if "conv2d" in case.name)

CODEBOOKS = CASES[4:6]

each_sparse = pytest.mark.parametrize("case", SPARSE_CASES, ids=lambda case: case.name)
each_quantized = pytest.mark.parametrize("case", CASES[4:], ids=lambda case: case.name)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_conv = pytest.mark.parametrize("case", CONVS, ids=lambda case: case.name)


def with_dtype(case: Case, dtype: torch.dtype) -> Case:
    return replace(case, dtype=dtype)


def stored(packed: PackedLayer) -> Tensor:
    """1 where the layer stores an entry of the dense weight (zeros inside a stored block too), else 0."""
    if isinstance(packed.format, (Binary, Codebook)):
        return torch.ones_like(packed.weight)
    ones = torch.ones_like(packed._values())
    return packed._as_format(ones, packed._positions(), {}).to_dense().detach()


def assert_as_good(actual: Tensor, dense: Tensor, exact: Tensor) -> None:
    """`actual` is as near to the float64 result as torch's own in that dtype: at most 4 times its error, or 4 ulp.

    Both are judged by their largest error, relative to the largest value.
    """
    assert actual.shape == dense.shape == exact.shape
    assert actual.dtype == dense.dtype
    if not actual.numel():
        return
    actual, dense, exact = actual.detach(), dense.detach(), exact.detach()
    ulp = torch.finfo(actual.dtype).eps * float(exact.abs().max())
    ours, theirs = float((actual.double() - exact).abs().max()), float((dense.double() - exact).abs().max())
    assert ours <= 4 * max(theirs, ulp)  # false for NaN too


def double(module: nn.Module, twin_of: Case) -> nn.Module:
    """A float64 copy of a dense layer."""
    copy = twin_of.dense().double()
    copy.load_state_dict({name: tensor.double() for name, tensor in module.state_dict().items()})
    return copy


def compare(case: Case, packed: nn.Module, twin: nn.Module, x: Tensor) -> Tensor:
    """Run both and judge the packed output; returns it."""
    actual = packed(x)
    assert_as_good(actual, twin(x), double(twin, case)(x.double()))
    return actual
