# SPDX-License-Identifier: Apache-2.0
"""Quantization: weights that share few values, trained and stored so."""

from slimtorch.quantize.aware import ClusterAware
from slimtorch.quantize.cluster import ClusteredLayer, ClusterReport, cluster_
from slimtorch.quantize.deep_compression import CompressionReport, DeepCompression, Stage
from slimtorch.quantize.kmeans import KMeans, Uniform
from slimtorch.quantize.sensitivity import BitChoice, choose_bits, fisher

__all__ = [
    "BitChoice",
    "ClusterAware",
    "ClusterReport",
    "ClusteredLayer",
    "CompressionReport",
    "DeepCompression",
    "KMeans",
    "Stage",
    "Uniform",
    "choose_bits",
    "cluster_",
    "fisher",
]
