# SPDX-License-Identifier: Apache-2.0
"""Linear and conv2d layers with sparse shared weights."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from slimtorch import ops
from slimtorch.formats import Format, SparseCodebook
from slimtorch.formats._common import matrix_shape
from slimtorch.formats.codebook import GroupSize, cluster, table_of
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


class _SparseCodebookLayer(PackedLayer):
    VALUES = "codebook"
    POSITIONS = ("codes", "gaps", "row_offsets")

    codebook: nn.Parameter
    codes: Tensor
    gaps: Tensor
    row_offsets: Tensor
    bits: int
    group_size: GroupSize

    def _adopt(self, twin: nn.Linear | nn.Conv2d, weight: Format, activation: Activation) -> None:
        assert isinstance(weight, SparseCodebook)
        self.bits, self.group_size = weight.bits, weight.group_size
        super()._adopt(twin, weight, activation)

    def _as_format(self, values: Tensor, positions: tuple[Tensor, ...], plans: Plans) -> SparseCodebook:
        codes, gaps, offsets = positions
        return SparseCodebook(values, codes, gaps, offsets, self._shape, self.bits, self.group_size, plans)

    def _reset(self, dense: Tensor) -> None:
        rows, columns = self.format.positions()
        stored = dense.reshape(matrix_shape(self._shape))[rows, columns]
        tables = table_of(rows, columns, self.group_size)
        codebook, indices = cluster(stored, tables, self.codebook.shape[0], self.bits, zero=False)
        fresh = SparseCodebook.from_positions(codebook, indices, rows, columns, self._shape, self.group_size)
        self.codebook.copy_(fresh.codebook)
        self.codes.copy_(fresh.codes)
        self._prepare()

    def _derive_plans(self) -> None:
        self.format.plan(self.groups)

    def _prepare_backward(self) -> None:
        if self.training and self.codebook.requires_grad and self._plans:
            csr = self.format.csr()
            if csr is not None:
                csr.plan(self.groups)
                csr.plan(self.groups, transposed=True)

    @property
    def format(self) -> SparseCodebook:
        """The weight as a :class:`slimtorch.formats.SparseCodebook` of this layer's own tensors."""
        return cast(SparseCodebook, self._held_format())

    def _options(self) -> str:
        return f", bits={self.bits}, group_size={self.group_size!r}"

    def _stored(self) -> str:
        held = self.format
        return "" if held.gaps.is_meta else f", stored={held.nnz}, density={held.density:.4g}"


class SparseCodebookLinear(_SparseCodebookLayer, PackedLinear):
    """``nn.Linear`` with a sparse weight whose nonzero entries share the values of tables.

    A layer built anew has the twin's initialisation, clustered, and stores every entry; one from :meth:`from_dense`
    stores the nonzero ones. Positions and indices are fixed; tables and bias are trained: the gradient of an entry is
    the sum over the weights that share it (Han et al. 2016, arXiv 1510.00149, section 3.3).

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        bits: of an index, 1 … 8; a table has ``2**bits`` entries.
        group_size: None for one table, an int for a table per so many consecutive inputs, "row" for one per output.
        activation: None, or ``"relu"`` to fuse a ReLU.

    Shapes: input ``[..., in_features]``, output ``[..., out_features]``.
    State: ``codebook [tables, 2**bits]``, ``codes [ceil(entries * bits / 8)]`` uint8, ``gaps [entries]`` uint8,
    ``row_offsets [out_features + 1]`` int32, ``weight_shape [2]`` int64 and ``bias``; another number of entries loads.
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
        activation: Activation = None,
    ) -> None:
        super().__init__()
        twin = nn.Linear(in_features, out_features, bias, device, dtype)
        self._adopt(twin, SparseCodebook.full(twin.weight, bits, group_size), activation)

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        *,
        bits: int = 4,
        group_size: GroupSize = None,
        activation: Activation = None,
    ) -> SparseCodebookLinear:
        """A layer with ``module``'s nonzero weights clustered (:meth:`slimtorch.formats.SparseCodebook.pack`).

        Raises:
            TypeError: ``module`` is no ``nn.Linear``, or one with a forward of its own; an option of the wrong type.
            ValueError: the weight is not finite or on the meta device; bits or group size out of range; an unknown
                activation.
        """
        twin = check_linear(module)
        return cls.from_format(twin, SparseCodebook.pack(twin.weight, bits, group_size), activation=activation)

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., in_features]`` to ``[..., out_features]``."""
        return ops.sparse_codebook_linear(input, self.format, self.bias, activation=self.activation)


class SparseCodebookConv2d(_SparseCodebookLayer, PackedConv2d):
    """``nn.Conv2d`` with a sparse weight whose nonzero entries share the values of tables.

    A layer built anew has the twin's initialisation, clustered, and stores every entry; one from :meth:`from_dense`
    stores the nonzero ones. Positions and indices are fixed; tables and bias are trained: the gradient of an entry is
    the sum over the weights that share it (Han et al. 2016, arXiv 1510.00149, section 3.3).

    Args:
        in_channels … dtype: as in ``nn.Conv2d``; ``padding`` takes numbers, ``"same"`` or ``"valid"``, and
            ``padding_mode`` only ``"zeros"``.
        bits, group_size, activation: as in :class:`SparseCodebookLinear`; an input is an entry of the flattened
            ``[in_channels / groups, kh, kw]``.

    Shapes: as ``nn.Conv2d``, ``[N, C, H, W]`` or ``[C, H, W]``.
    State: ``codebook [tables, 2**bits]``, ``codes`` and ``gaps`` uint8, ``row_offsets [out_channels + 1]`` int32,
    ``weight_shape [4]`` int64 and ``bias``; another number of entries loads.
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
        activation: Activation = None,
    ) -> None:
        check_padding_mode("padding_mode", padding_mode)
        super().__init__()
        twin = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self._adopt(twin, SparseCodebook.full(twin.weight, bits, group_size), activation)

    @classmethod
    def from_dense(
        cls,
        module: nn.Conv2d,
        *,
        bits: int = 4,
        group_size: GroupSize = None,
        activation: Activation = None,
    ) -> SparseCodebookConv2d:
        """A layer with ``module``'s nonzero weights clustered (:meth:`slimtorch.formats.SparseCodebook.pack`).

        Raises:
            TypeError: ``module`` is no ``nn.Conv2d``, or one with a forward of its own; an option of the wrong type.
            ValueError: padding other than zeros; the weight is not finite or on the meta device; bits or group size out
                of range; an unknown activation.
        """
        twin = check_conv2d(module)
        return cls.from_format(twin, SparseCodebook.pack(twin.weight, bits, group_size), activation=activation)

    def forward(self, input: Tensor) -> Tensor:
        """``input [N, C, H, W]`` or ``[C, H, W]`` to the output of ``nn.Conv2d``."""
        return ops.sparse_codebook_conv2d(
            self._padded(input), self.format, self.bias, self.stride, self._sides, self.dilation, self.groups,
            activation=self.activation,
        )  # fmt: skip
