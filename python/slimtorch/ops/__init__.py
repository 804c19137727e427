# SPDX-License-Identifier: Apache-2.0
"""Operators over format objects. Under each lies ``torch.ops.slimtorch.*`` over plain tensors."""

from slimtorch.ops import binary, block_sparse, codebook, sparse, sparse_codebook
from slimtorch.ops._common import says_out_of_memory
from slimtorch.ops.coding import (
    assign_1d,
    huffman_decode,
    huffman_encode,
    huffman_lengths,
    huffman_size,
    initial_centroids,
    kmeans_1d,
)

binary_conv2d = says_out_of_memory(binary.binary_conv2d)
binary_linear = says_out_of_memory(binary.binary_linear)
block_sparse_conv2d = says_out_of_memory(block_sparse.block_sparse_conv2d)
block_sparse_linear = says_out_of_memory(block_sparse.block_sparse_linear)
codebook_conv2d = says_out_of_memory(codebook.codebook_conv2d)
codebook_linear = says_out_of_memory(codebook.codebook_linear)
sparse_conv2d = says_out_of_memory(sparse.sparse_conv2d)
sparse_linear = says_out_of_memory(sparse.sparse_linear)
sparse_codebook_conv2d = says_out_of_memory(sparse_codebook.sparse_codebook_conv2d)
sparse_codebook_linear = says_out_of_memory(sparse_codebook.sparse_codebook_linear)

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
