# SPDX-License-Identifier: Apache-2.0
"""Drop-in layers: each holds one format and calls one operator."""

from slimtorch.nn._packed import PackedLayer
from slimtorch.nn.block_sparse import BlockSparseConv2d, BlockSparseLinear
from slimtorch.nn.sparse import SparseConv2d, SparseLinear

__all__ = ["BlockSparseConv2d", "BlockSparseLinear", "PackedLayer", "SparseConv2d", "SparseLinear"]
