# SPDX-License-Identifier: Apache-2.0
"""Operators over format objects. Under each lies ``torch.ops.slimtorch.*`` over plain tensors."""

from slimtorch.ops.binary import binary_conv2d, binary_linear
from slimtorch.ops.block_sparse import block_sparse_conv2d, block_sparse_linear
from slimtorch.ops.codebook import codebook_conv2d, codebook_linear
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
from slimtorch.ops.sparse_codebook import sparse_codebook_conv2d, sparse_codebook_linear

__all__ = [
    "assign_1d",
    "binary_conv2d",
    "binary_linear",
    "block_sparse_conv2d",
    "block_sparse_linear",
    "codebook_conv2d",
    "codebook_linear",
    "huffman_decode",
    "huffman_encode",
    "huffman_lengths",
    "huffman_size",
    "initial_centroids",
    "kmeans_1d",
    "sparse_codebook_conv2d",
    "sparse_codebook_linear",
    "sparse_conv2d",
    "sparse_linear",
]
