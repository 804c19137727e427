# SPDX-License-Identifier: Apache-2.0
"""Binary weights: a sign per weight and a scale per output row (Rastegari et al. 2016, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimtorch import _C
from slimtorch.formats._bits import check_stream, pack_bits, stream_bytes, unpack_bits
from slimtorch.formats._common import INDEX_LIMIT, WithPlans, check_dense, matrix_shape, on_gpu

_ops = torch.ops.slimtorch


@dataclass(eq=False)
class Binary(WithPlans):
    """A linear or conv2d weight as signs and a scale per row, seen as a matrix ``[out, prod(rest)]``.

    Args:
        signs: ``[ceil(out * prod(rest) / 8)]`` uint8, a bit stream (lowest bit first), row after row; 1 is +1, 0 is -1.
        scale: ``[out]``, floating point.
        shape: shape of the dense weight, ``(out, in)`` or ``(out, in / groups, kh, kw)``.
    """

    signs: Tensor
    scale: Tensor
    shape: tuple[int, ...]
    # Execution plans derived from the signs alone, so that no change of the scale can make one stale. By groups, and
    # whether activations are binarised too.
    _plans: dict[tuple[int, bool], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def pack(cls, dense: Tensor, scale: bool = True) -> Binary:
        """The signs of ``dense`` (``[out, in]`` or ``[out, in / groups, kh, kw]``); 0 counts as +1.

        Args:
            scale: scale each row by the mean of its magnitudes, which is nearest to ``dense`` in the least-squares
                sense; exact where all magnitudes of a row are equal. Otherwise the scale is 1.

        Raises:
            TypeError: ``dense`` is no floating-point tensor.
            ValueError: wrong number of dimensions, NaN.
        """
        check_dense(dense)
        rows, width = matrix_shape(dense.shape)
        shape = tuple(dense.shape)
        if dense.is_meta:
            return cls(dense.new_empty(stream_bytes(rows * width, 1), dtype=torch.uint8), dense.new_empty(rows), shape)
        matrix = dense.detach().reshape(rows, width)
        factor = torch.ones(rows, dtype=dense.dtype, device=dense.device)
        if scale and width:
            magnitude = matrix.abs()
            low, high = magnitude.aminmax(dim=1)
            wide = torch.float64 if dense.dtype == torch.float64 else torch.float32
            factor = torch.where(low == high, low, magnitude.mean(dim=1, dtype=wide).to(dense.dtype))
        return cls(pack_bits((matrix.reshape(-1) >= 0).to(torch.uint8), 1), factor, shape)

    def validate(self) -> Binary:
        """Check the invariants that the kernels rely on; raises TypeError or ValueError naming the field."""
        rows, width = matrix_shape(self.shape)
        if rows * width > INDEX_LIMIT:
            raise ValueError(f"shape: expected fewer than 2**31 weights, got {rows * width}")
        if not self.scale.is_floating_point():
            raise TypeError(f"scale: expected a floating-point tensor, got {self.scale.dtype}")
        if self.scale.shape != (rows,):
            raise ValueError(f"scale: expected shape [{rows}], got {list(self.scale.shape)}")
        check_stream("signs", self.signs, rows * width, 1)
        return self

    def bits(self) -> Tensor:
        """1 for +1 and 0 for -1, uint8 ``[out, prod(rest)]``."""
        rows, width = matrix_shape(self.shape)
        return unpack_bits(self.signs, 1, rows * width).reshape(rows, width)

    def to_dense(self) -> Tensor:
        """The dense weight, of ``self.shape``; differentiable with respect to ``scale``."""
        signs = self.bits().to(self.scale.dtype) * 2 - 1
        return (self.scale[:, None] * signs).reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical tensors."""
        return self.signs.numel() + self.scale.numel() * self.scale.element_size()

    @property
    def density(self) -> float:
        """Stored entries over entries of the dense weight: 1."""
        return 1.0

    def _has_plans(self) -> bool:
        return self.signs.is_cpu or (on_gpu(self.signs) and bool(_C.cuda_archs()))

    def plan(self, groups: int = 1, *, binarize_input: bool = True) -> Tensor | None:
        """The signs in the order of the device's kernels (opaque bytes): derived there once, cached, never saved.

        With ``binarize_input=False`` the plan serves float32 and bfloat16 activations, on CUDA float16 too; float64 has
        a kernel on the CPU to check gradients with, which orders the signs at every call.

        None while a graph is being traced and nothing is cached (the kernel then derives it at every call), and on
        devices other than the CPU and CUDA.

        Raises:
            TypeError, ValueError: the format breaks an invariant (see ``validate``); checked before the first plan.
        """
        key = (groups, binarize_input)
        if key not in self._plans:
            if torch.compiler.is_compiling() or not self._has_plans():
                return None
            if not self._plans:
                self.validate()  # kernels trust sizes from here on
            kernel = self.shape[2:] or (1, 1)
            with torch.inference_mode(False):  # else backward could not save a plan derived inside inference_mode
                self._plans[key] = _ops.binary_plan(
                    self.signs, self.shape[0], self.shape[1], kernel, groups, 0 if binarize_input else 1
                )
        return self._plans[key]
