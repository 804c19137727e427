# SPDX-License-Identifier: Apache-2.0
"""Quantization: weights that share few values, and binary weights; trained, and stored so."""

from slimtorch.quantize.aware import ClusterAware
from slimtorch.quantize.binary import BinarizedLayer, BinarizeReport, binarize_, squared_hinge_loss, xnor_block
from slimtorch.quantize.binary_layers import (
    BinaryConnect,
    BinaryNet,
    BinaryWeight,
    LatentBinary,
    LatentBinaryConv2d,
    LatentBinaryLinear,
    XnorNet,
)
from slimtorch.quantize.cluster import ClusteredLayer, ClusterReport, cluster_
from slimtorch.quantize.deep_compression import CompressionReport, DeepCompression, Stage
from slimtorch.quantize.kmeans import KMeans, Uniform
from slimtorch.quantize.sensitivity import BitChoice, choose_bits, fisher

__all__ = [
    "BinarizeReport",
    "BinarizedLayer",
    "BinaryConnect",
    "BinaryNet",
    "BinaryWeight",
    "BitChoice",
    "ClusterAware",
    "ClusterReport",
    "ClusteredLayer",
    "CompressionReport",
    "DeepCompression",
    "KMeans",
    "LatentBinary",
    "LatentBinaryConv2d",
    "LatentBinaryLinear",
    "Stage",
    "Uniform",
    "XnorNet",
    "binarize_",
    "choose_bits",
    "cluster_",
    "fisher",
    "squared_hinge_loss",
    "xnor_block",
]
