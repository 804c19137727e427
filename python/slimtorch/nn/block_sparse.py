# SPDX-License-Identifier: Apache-2.0
"""Linear and conv2d layers with a block-sparse weight."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from slimtorch import ops
from slimtorch.formats import BlockSparse, Format
from slimtorch.nn._packed import (
    PackedConv2d,
    PackedLinear,
    PlannedLayer,
    Plans,
    check_conv2d,
    check_linear,
    check_padding_mode,
)
from slimtorch.ops._common import Activation, Pair


class _BlockSparseLayer(PlannedLayer):
    POSITIONS = ("block_columns", "block_row_offsets")

    block_columns: Tensor
    block_row_offsets: Tensor
    block_size: Pair

    def _adopt(self, twin: nn.Linear | nn.Conv2d, weight: Format, activation: Activation) -> None:
        assert isinstance(weight, BlockSparse)
        self.block_size = weight.block_size
        super()._adopt(twin, weight, activation)

    def _as_format(self, values: Tensor, positions: tuple[Tensor, ...], plans: Plans) -> BlockSparse:
        columns, row_offsets = positions
        return BlockSparse(values, columns, row_offsets, self._shape, self.block_size, plans)

    @property
    def format(self) -> BlockSparse:
        """The weight as a :class:`slimtorch.formats.BlockSparse` of this layer's own tensors and plans."""
        return cast(BlockSparse, self._held_format())

    def _options(self) -> str:
        return f", block_size={self.block_size}"


class BlockSparseLinear(_BlockSparseLayer, PackedLinear):
    """``nn.Linear`` with a block-sparse weight.

    A layer built anew has the twin's initialisation (the same one for the same seed) and stores every block; one from
    :meth:`from_dense` stores the blocks that are not all zero. Positions are fixed, values and bias are trained.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        block_size: (rows, columns) of a block of the weight seen as ``[out, prod(rest)]``; need not divide it.
        activation: None, or ``"relu"`` to fuse a ReLU into the kernel.

    Shapes: input ``[..., in_features]``, output ``[..., out_features]``; float32, bfloat16, float64 native on CPU.
    State: ``values [nblocks, r, c]``, ``block_columns [nblocks]`` int32, ``block_row_offsets`` int32, one more than
    block rows, ``weight_shape [2]`` int64 and ``bias``; a state with another number of blocks of this size loads too.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        block_size: Pair = (16, 16),
        activation: Activation = None,
    ) -> None:
        super().__init__()
        twin = nn.Linear(in_features, out_features, bias, device, dtype)
        self._adopt(twin, BlockSparse.full(twin.weight, block_size), activation)

    @classmethod
    def from_dense(
        cls, module: nn.Linear, *, block_size: Pair = (16, 16), activation: Activation = None
    ) -> BlockSparseLinear:
        """A layer that computes what ``module`` does, from copies of its nonzero blocks and its bias.

        Raises:
            TypeError: ``module`` is no ``nn.Linear``, or one with a forward of its own.
            ValueError: the weight holds NaN or is on the meta device; bad block extents; an unknown activation.
        """
        twin = check_linear(module)
        return cls.from_format(twin, BlockSparse.pack(twin.weight, block_size), activation=activation)

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., in_features]`` to ``[..., out_features]``."""
        return ops.block_sparse_linear(input, self.format, self.bias, activation=self.activation)


class BlockSparseConv2d(_BlockSparseLayer, PackedConv2d):
    """``nn.Conv2d`` with a block-sparse weight.

    A layer built anew has the twin's initialisation (the same one for the same seed) and stores every block; one from
    :meth:`from_dense` stores the blocks that are not all zero. Positions are fixed, values and bias are trained.

    Args:
        in_channels … dtype: as in ``nn.Conv2d``; ``padding`` takes numbers, ``"same"`` or ``"valid"``, and
            ``padding_mode`` only ``"zeros"``.
        block_size: (rows, columns) of a block of the weight seen as ``[out, prod(rest)]``; need not divide it.
        activation: None, or ``"relu"`` to fuse a ReLU into the kernel.

    Shapes: as ``nn.Conv2d``, ``[N, C, H, W]`` or ``[C, H, W]``; float32, bfloat16, float64 native on CPU.
    State: ``values [nblocks, r, c]``, ``block_columns [nblocks]`` int32 (blocks of ``in_channels / groups * kh * kw``),
    ``block_row_offsets`` int32, one more than block rows, ``weight_shape [4]`` int64 and ``bias``; a state with another
    number of blocks of this size loads too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: str | int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        block_size: Pair = (16, 16),
        activation: Activation = None,
    ) -> None:
        check_padding_mode("padding_mode", padding_mode)
        super().__init__()
        twin = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self._adopt(twin, BlockSparse.full(twin.weight, block_size), activation)

    @classmethod
    def from_dense(
        cls, module: nn.Conv2d, *, block_size: Pair = (16, 16), activation: Activation = None
    ) -> BlockSparseConv2d:
        """A layer that computes what ``module`` does, from copies of its nonzero blocks and its bias.

        Raises:
            TypeError: ``module`` is no ``nn.Conv2d``, or one with a forward of its own.
            ValueError: padding other than zeros; the weight holds NaN or is on the meta device; bad block extents; an
                unknown activation.
        """
        twin = check_conv2d(module)
        return cls.from_format(twin, BlockSparse.pack(twin.weight, block_size), activation=activation)

    def forward(self, input: Tensor) -> Tensor:
        """``input [N, C, H, W]`` or ``[C, H, W]`` to the output of ``nn.Conv2d``."""
        return ops.block_sparse_conv2d(
            self._padded(input), self.format, self.bias, self.stride, self._sides, self.dilation, self.groups,
            activation=self.activation,
        )  # fmt: skip
