# SPDX-License-Identifier: Apache-2.0
"""Drop-in layers: each holds one format and calls one operator."""

from slimtorch.nn._packed import PackedLayer
from slimtorch.nn.binary import BinaryConv2d, BinaryLinear
from slimtorch.nn.block_sparse import BlockSparseConv2d, BlockSparseLinear
from slimtorch.nn.codebook import CodebookConv2d, CodebookLinear
from slimtorch.nn.fuse_binary import FusedBinary, FuseReport, fuse_binary_
from slimtorch.nn.sparse import SparseConv2d, SparseLinear
from slimtorch.nn.sparse_codebook import SparseCodebookConv2d, SparseCodebookLinear

__all__ = [
    "BinaryConv2d",
    "BinaryLinear",
    "BlockSparseConv2d",
    "BlockSparseLinear",
    "CodebookConv2d",
    "CodebookLinear",
    "FuseReport",
    "FusedBinary",
    "PackedLayer",
    "SparseCodebookConv2d",
    "SparseCodebookLinear",
    "SparseConv2d",
    "SparseLinear",
    "fuse_binary_",
]
