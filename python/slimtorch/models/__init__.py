# SPDX-License-Identifier: Apache-2.0
"""The networks of the experiments and of the pruning literature, and the layer shapes of three well-known ones.

The networks are plain ``torch.nn``: whatever this library does to them, it does to anyone's model. Classes are the ones
for digits; functions build the others, with the published sizes unless told otherwise. A pruned shape (``vgg16_a``,
``resnet56_a`` …) is the same network with fewer channels, to be trained from scratch or filled with what is left.
"""

from slimtorch.models.convnet import conv2, conv4, conv6, glorot_
from slimtorch.models.lenet import LeNet5, LeNet300
from slimtorch.models.mobilenet import mobilenet, mobilenet_v1, mobilenet_v2
from slimtorch.models.msdnet import msdnet
from slimtorch.models.resnet import (
    resnet18,
    resnet20,
    resnet34,
    resnet34_a,
    resnet34_b,
    resnet50,
    resnet56,
    resnet56_a,
    resnet56_b,
    resnet110,
    resnet110_a,
    resnet110_b,
)
from slimtorch.models.shapes import ALEXNET, RESNET50, VGG16, LayerShape
from slimtorch.models.vgg import VGG16_A_WIDTHS, VGG16_WIDTHS, vgg16, vgg16_a

__all__ = [
    "ALEXNET",
    "RESNET50",
    "VGG16",
    "VGG16_A_WIDTHS",
    "VGG16_WIDTHS",
    "LayerShape",
    "LeNet5",
    "LeNet300",
    "conv2",
    "conv4",
    "conv6",
    "glorot_",
    "mobilenet",
    "mobilenet_v1",
    "mobilenet_v2",
    "msdnet",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet34_a",
    "resnet34_b",
    "resnet50",
    "resnet56",
    "resnet56_a",
    "resnet56_b",
    "resnet110",
    "resnet110_a",
    "resnet110_b",
    "vgg16",
    "vgg16_a",
]
