# SPDX-License-Identifier: Apache-2.0
"""Quantization: shared weights, binary weights."""

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

__all__ = [
    "BinarizeReport",
    "BinarizedLayer",
    "BinaryConnect",
    "BinaryNet",
    "BinaryWeight",
    "LatentBinary",
    "LatentBinaryConv2d",
    "LatentBinaryLinear",
    "XnorNet",
    "binarize_",
    "squared_hinge_loss",
    "xnor_block",
]
