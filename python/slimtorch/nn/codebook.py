# SPDX-License-Identifier: Apache-2.0
"""Linear and conv2d layers with shared weights."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from slimtorch import ops
from slimtorch.formats import Codebook, Format
from slimtorch.formats.codebook import GroupSize
from slimtorch.nn._packed import (
    PackedConv2d,
    PackedLayer,
    PackedLinear,
    Plans,
    check_conv2d,
    check_linear,
    check_padding_mode,
)
from slimtorch.ops._common import Activation, Pair


class _CodebookLayer(PackedLayer):
    VALUES = "codebook"
    POSITIONS = ("codes",)

    codebook: nn.Parameter
    codes: Tensor
    bits: int
    group_size: GroupSize
    zero: bool

    def _adopt(self, twin: nn.Linear | nn.Conv2d, weight: Format, activation: Activation) -> None:
        assert isinstance(weight, Codebook)
        self.bits, self.group_size, self.zero = weight.bits, weight.group_size, weight.zero
        super()._adopt(twin, weight, activation)

    def _as_format(self, values: Tensor, positions: tuple[Tensor, ...], plans: Plans) -> Codebook:
        return Codebook(values, positions[0], self._shape, self.bits, self.group_size, self.zero, plans)

    def _reset(self, dense: Tensor) -> None:
        fresh = Codebook.pack(dense, self.bits, self.group_size, zero=self.zero)
        self.codebook.copy_(fresh.codebook)
        self.codes.copy_(fresh.codes)
        self._prepare()

    def _derive_plans(self) -> None:
        self.format.plan(self.groups)

    @property
    def format(self) -> Codebook:
        """The weight as a :class:`slimtorch.formats.Codebook` of this layer's own tensors."""
        return cast(Codebook, self._held_format())

    def _options(self) -> str:
        return f", bits={self.bits}, group_size={self.group_size!r}" + (", zero=True" if self.zero else "")


class CodebookLinear(_CodebookLayer, PackedLinear):
    """``nn.Linear`` whose weights share the values of tables (weight clustering).

    A layer built anew has the twin's initialisation, clustered. Indices are fixed; tables and bias are trained: the
    gradient of an entry is the sum over the weights that share it (Han et al. 2016, arXiv 1510.00149, section 3.3).

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        bits: of an index, 1 … 8; a table has ``2**bits`` entries.
        group_size: None for one table, an int for a table per so many consecutive inputs, "row" for one per output.
        zero: entry 0 of every table is the constant 0, not trained.
        activation: None, or ``"relu"`` to fuse a ReLU.

    Shapes: input ``[..., in_features]``, output ``[..., out_features]``.
    State: ``codebook [tables, 2**bits]``, ``codes [ceil(out * in * bits / 8)]`` uint8, ``weight_shape [2]`` int64 and
    ``bias``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bits: int = 4,
        group_size: GroupSize = None,
        zero: bool = False,
        activation: Activation = None,
    ) -> None:
        super().__init__()
        twin = nn.Linear(in_features, out_features, bias, device, dtype)
        self._adopt(twin, Codebook.pack(twin.weight, bits, group_size, zero=zero), activation)

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        *,
        bits: int = 4,
        group_size: GroupSize = None,
        zero: bool | None = None,
        activation: Activation = None,
    ) -> CodebookLinear:
        """A layer with ``module``'s weights clustered, as :meth:`slimtorch.formats.Codebook.pack` does it.

        Raises:
            TypeError: ``module`` is no ``nn.Linear``, or one with a forward of its own; an option of the wrong type.
            ValueError: the weight is not finite or on the meta device; bits or group size out of range; an unknown
                activation.
        """
        twin = check_linear(module)
        return cls.from_format(twin, Codebook.pack(twin.weight, bits, group_size, zero=zero), activation=activation)

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., in_features]`` to ``[..., out_features]``."""
        return ops.codebook_linear(input, self.format, self.bias, activation=self.activation)


class CodebookConv2d(_CodebookLayer, PackedConv2d):
    """``nn.Conv2d`` whose weights share the values of tables (weight clustering).

    A layer built anew has the twin's initialisation, clustered. Indices are fixed; tables and bias are trained: the
    gradient of an entry is the sum over the weights that share it (Han et al. 2016, arXiv 1510.00149, section 3.3).

    Args:
        in_channels … dtype: as in ``nn.Conv2d``; ``padding`` takes numbers, ``"same"`` or ``"valid"``, and
            ``padding_mode`` only ``"zeros"``.
        bits, group_size, zero, activation: as in :class:`CodebookLinear`; an input is an entry of the flattened
            ``[in_channels / groups, kh, kw]``.

    Shapes: as ``nn.Conv2d``, ``[N, C, H, W]`` or ``[C, H, W]``.
    State: ``codebook [tables, 2**bits]``, ``codes`` uint8, ``weight_shape [4]`` int64 and ``bias``.
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
        bits: int = 4,
        group_size: GroupSize = None,
        zero: bool = False,
        activation: Activation = None,
    ) -> None:
        check_padding_mode("padding_mode", padding_mode)
        super().__init__()
        twin = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self._adopt(twin, Codebook.pack(twin.weight, bits, group_size, zero=zero), activation)

    @classmethod
    def from_dense(
        cls,
        module: nn.Conv2d,
        *,
        bits: int = 4,
        group_size: GroupSize = None,
        zero: bool | None = None,
        activation: Activation = None,
    ) -> CodebookConv2d:
        """A layer with ``module``'s weights clustered, as :meth:`slimtorch.formats.Codebook.pack` does it.

        Raises:
            TypeError: ``module`` is no ``nn.Conv2d``, or one with a forward of its own; an option of the wrong type.
            ValueError: padding other than zeros; the weight is not finite or on the meta device; bits or group size out
                of range; an unknown activation.
        """
        twin = check_conv2d(module)
        return cls.from_format(twin, Codebook.pack(twin.weight, bits, group_size, zero=zero), activation=activation)

    def forward(self, input: Tensor) -> Tensor:
        """``input [N, C, H, W]`` or ``[C, H, W]`` to the output of ``nn.Conv2d``."""
        return ops.codebook_conv2d(
            self._padded(input), self.format, self.bias, self.stride, self._sides, self.dilation, self.groups,
            activation=self.activation,
        )  # fmt: skip
