# SPDX-License-Identifier: Apache-2.0
"""Operators over format objects. Under each lies ``torch.ops.slimtorch.*`` over plain tensors."""

from slimtorch.ops.block_sparse import block_sparse_conv2d, block_sparse_linear
from slimtorch.ops.coding import (
    assign_1d,
    huffman_decode,
    huffman_encode,
    huffman_lengths,
    huffman_size,
    initial_centroids,
    kmeans_1d,
)
from slimtorch.ops.sparse import sparse_conv2d, sparse_linear

__all__ = [
    "assign_1d",
    "block_sparse_conv2d",
    "block_sparse_linear",
    "huffman_decode",
    "huffman_encode",
    "huffman_lengths",
    "huffman_size",
    "initial_centroids",
    "kmeans_1d",
    "sparse_conv2d",
    "sparse_linear",
]
