# SPDX-License-Identifier: Apache-2.0
"""Checks and small helpers that every format needs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

INDEX_LIMIT = 2**31 - 1

# Where tensors are the CUDA kernels' (tests add the CPU, when those run in the emulator).
GPU_DEVICE_TYPES = frozenset({"cuda"})


def on_gpu(tensor: Tensor) -> bool:
    """Whether the kernels for ``tensor`` are those of csrc/cuda: their plans differ from the CPU's."""
    return tensor.device.type in GPU_DEVICE_TYPES


class WithPlans:
    """A format that keeps execution plans beside its tensors, in ``_plans``: they are never copied or saved."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_plans": {}}


def check_dense(dense: Tensor) -> None:
    """Refuse anything that is not a finite-or-infinite float weight of a linear (2-D) or conv2d (4-D) layer."""
    if not isinstance(dense, Tensor):
        raise TypeError(f"dense: expected a torch.Tensor, got {type(dense).__name__}")
    if not dense.is_floating_point():
        raise TypeError(f"dense: expected a floating-point tensor, got {dense.dtype}")
    if dense.dim() not in (2, 4):
        raise ValueError(
            "dense: expected a weight of shape [out, in] or [out, in / groups, kh, kw], "
            f"got {dense.dim()} dimensions {tuple(dense.shape)}"
        )
    if not dense.is_meta and bool(torch.isnan(dense).any()):
        raise ValueError("dense: expected numbers, got NaN; repair the weight before packing it")


def matrix_shape(shape: Iterable[int]) -> tuple[int, int]:
    """The 2-D view [rows, columns] of a linear or conv2d weight's shape."""
    rows, *rest = shape
    return rows, math.prod(rest)


def check_offsets(name: str, offsets: Tensor, rows: int, entries: int) -> None:
    """Row offsets must start at 0, never fall and end at the number of entries: kernels trust them without a look."""
    if offsets.dtype != torch.int32:
        raise TypeError(f"{name}: expected torch.int32, got {offsets.dtype}")
    if offsets.shape != (rows + 1,):
        raise ValueError(f"{name}: expected shape [{rows + 1}], got {list(offsets.shape)}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != entries or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"{name}: expected non-decreasing offsets from 0 to {entries}")


def check_columns(name: str, columns: Tensor, offsets: Tensor, limit: int) -> None:
    """Columns must lie in [0, limit) and ascend strictly within each row."""
    if columns.dtype != torch.int32:
        raise TypeError(f"{name}: expected torch.int32, got {columns.dtype}")
    if columns.numel() == 0:
        return
    low, high = columns.aminmax()
    if int(low) < 0 or int(high) >= limit:
        raise ValueError(f"{name}: expected indices in [0, {limit}), got {int(low)} … {int(high)}")
    ascending = columns[1:] > columns[:-1]
    starts = offsets[1:-1].long()  # a fall is allowed exactly where a new row begins
    starts = starts[(starts > 0) & (starts < columns.numel())] - 1
    ascending[starts] = True
    if not bool(ascending.all()):
        raise ValueError(f"{name}: expected indices that ascend strictly within each row")
