# SPDX-License-Identifier: Apache-2.0
"""Linear and conv2d layers with an unstructured sparse weight."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from slimtorch import ops
from slimtorch.formats import Sparse
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


class _SparseLayer(PlannedLayer):
    POSITIONS = ("columns", "row_offsets")

    columns: Tensor
    row_offsets: Tensor

    def _as_format(self, values: Tensor, positions: tuple[Tensor, ...], plans: Plans) -> Sparse:
        columns, row_offsets = positions
        return Sparse(values, columns, row_offsets, self._shape, plans)

    @property
    def format(self) -> Sparse:
        """The weight as a :class:`slimtorch.formats.Sparse` of this layer's own tensors and plans."""
        return cast(Sparse, self._held_format())


class SparseLinear(_SparseLayer, PackedLinear):
    """``nn.Linear`` with an unstructured sparse weight.

    A layer built anew has the twin's initialisation (the same one for the same seed) and stores every entry; one from
    :meth:`from_dense` stores the nonzero ones. Positions are fixed, values and bias are trained.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        activation: None, or ``"relu"`` to fuse a ReLU into the kernel.

    Shapes: input ``[..., in_features]``, output ``[..., out_features]``; float32, bfloat16, float64 native on CPU.
    State: ``values [nnz]``, ``columns [nnz]`` int32, ``row_offsets [out_features + 1]`` int32, ``weight_shape [2]``
    int64 and ``bias``; a state with another number of values loads too.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = None,
    ) -> None:
        super().__init__()
        twin = nn.Linear(in_features, out_features, bias, device, dtype)
        self._adopt(twin, Sparse.full(twin.weight), activation)

    @classmethod
    def from_dense(cls, module: nn.Linear, *, activation: Activation = None) -> SparseLinear:
        """A layer that computes what ``module`` does, from copies of its nonzero weights and its bias.

        Raises:
            TypeError: ``module`` is no ``nn.Linear``, or one with a forward of its own.
            ValueError: the weight holds NaN or is on the meta device; an unknown activation.
        """
        twin = check_linear(module)
        return cls.from_format(twin, Sparse.pack(twin.weight), activation=activation)

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., in_features]`` to ``[..., out_features]``."""
        return ops.sparse_linear(input, self.format, self.bias, activation=self.activation)


class SparseConv2d(_SparseLayer, PackedConv2d):
    """``nn.Conv2d`` with an unstructured sparse weight.

    A layer built anew has the twin's initialisation (the same one for the same seed) and stores every entry; one from
    :meth:`from_dense` stores the nonzero ones. Positions are fixed, values and bias are trained.

    Args:
        in_channels … dtype: as in ``nn.Conv2d``; ``padding`` takes numbers, ``"same"`` or ``"valid"``, and
            ``padding_mode`` only ``"zeros"``.
        activation: None, or ``"relu"`` to fuse a ReLU into the kernel.

    Shapes: as ``nn.Conv2d``, ``[N, C, H, W]`` or ``[C, H, W]``; float32, bfloat16, float64 native on CPU.
    State: ``values [nnz]``, ``columns [nnz]`` int32 (into ``in_channels / groups * kh * kw``), ``row_offsets
    [out_channels + 1]`` int32, ``weight_shape [4]`` int64 and ``bias``; one with another number of values loads too.
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
        activation: Activation = None,
    ) -> None:
        check_padding_mode("padding_mode", padding_mode)
        super().__init__()
        twin = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self._adopt(twin, Sparse.full(twin.weight), activation)

    @classmethod
    def from_dense(cls, module: nn.Conv2d, *, activation: Activation = None) -> SparseConv2d:
        """A layer that computes what ``module`` does, from copies of its nonzero weights and its bias.

        Raises:
            TypeError: ``module`` is no ``nn.Conv2d``, or one with a forward of its own.
            ValueError: padding other than zeros; the weight holds NaN or is on the meta device; an unknown activation.
        """
        twin = check_conv2d(module)
        return cls.from_format(twin, Sparse.pack(twin.weight), activation=activation)

    def forward(self, input: Tensor) -> Tensor:
        """``input [N, C, H, W]`` or ``[C, H, W]`` to the output of ``nn.Conv2d``."""
        return ops.sparse_conv2d(
            self._padded(input), self.format, self.bias, self.stride, self._sides, self.dilation, self.groups,
            activation=self.activation,
        )  # fmt: skip
