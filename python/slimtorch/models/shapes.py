# SPDX-License-Identifier: Apache-2.0
"""The layer shapes of three well-known networks, for timing layers without building the networks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class LayerShape:
    """One convolution or linear layer of a network, by its numbers.

    ``height`` is the height and width of the input; ``count`` how often the network has this very layer. A linear
    layer has ``kernel`` 0 and ``height`` 1.
    """

    name: str
    c_out: int
    c_in: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    height: int = 1
    count: int = 1

    @property
    def is_linear(self) -> bool:
        return self.kernel == 0

    @property
    def out_height(self) -> int:
        return 1 if self.is_linear else (self.height + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self.is_linear:
            return (self.c_out, self.c_in)
        return (self.c_out, self.c_in // self.groups, self.kernel, self.kernel)

    @property
    def weights(self) -> int:
        return self.c_out * self.c_in // self.groups * max(1, self.kernel) ** 2

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return self.weights * self.out_height**2

    def input_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.c_in) if self.is_linear else (batch, self.c_in, self.height, self.height)

    def build(self) -> nn.Linear | nn.Conv2d:
        """A torch layer of this shape, initialised as torch does."""
        if self.is_linear:
            return nn.Linear(self.c_in, self.c_out)
        return nn.Conv2d(self.c_in, self.c_out, self.kernel, self.stride, self.padding, groups=self.groups)


# Krizhevsky et al. 2012 as in Caffe's bvlc_reference: conv2, conv4 and conv5 in two groups.
ALEXNET = (
    LayerShape("conv1", 96, 3, 11, stride=4, height=227),
    LayerShape("conv2", 256, 96, 5, padding=2, groups=2, height=27),
    LayerShape("conv3", 384, 256, 3, padding=1, height=13),
    LayerShape("conv4", 384, 384, 3, padding=1, groups=2, height=13),
    LayerShape("conv5", 256, 384, 3, padding=1, groups=2, height=13),
    LayerShape("fc6", 4096, 9216, 0),
    LayerShape("fc7", 4096, 4096, 0),
    LayerShape("fc8", 1000, 4096, 0),
)

# Simonyan & Zisserman 2014 (1409.1556), configuration D.
VGG16 = (
    LayerShape("conv1_1", 64, 3, 3, padding=1, height=224),
    LayerShape("conv1_2", 64, 64, 3, padding=1, height=224),
    LayerShape("conv2_1", 128, 64, 3, padding=1, height=112),
    LayerShape("conv2_2", 128, 128, 3, padding=1, height=112),
    LayerShape("conv3_1", 256, 128, 3, padding=1, height=56),
    LayerShape("conv3_2", 256, 256, 3, padding=1, height=56, count=2),
    LayerShape("conv4_1", 512, 256, 3, padding=1, height=28),
    LayerShape("conv4_2", 512, 512, 3, padding=1, height=28, count=2),
    LayerShape("conv5", 512, 512, 3, padding=1, height=14, count=3),
    LayerShape("fc6", 4096, 25088, 0),
    LayerShape("fc7", 4096, 4096, 0),
    LayerShape("fc8", 1000, 4096, 0),
)


def _resnet50() -> tuple[LayerShape, ...]:
    """He et al. 2016, Table 1, with the stride of a stage in its first 3x3 (as torchvision has it)."""
    shapes = [LayerShape("conv1", 64, 3, 7, stride=2, padding=3, height=224)]
    c_in, height = 64, 56
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=2):
        c_out, stride = 4 * width, 1 if stage == 2 else 2
        small = height // stride
        shapes += [
            LayerShape(f"conv{stage}_1.a", width, c_in, 1, height=height),
            LayerShape(f"conv{stage}_1.b", width, width, 3, stride=stride, padding=1, height=height),
            LayerShape(f"conv{stage}_1.skip", c_out, c_in, 1, stride=stride, height=height),
            LayerShape(f"conv{stage}_x.a", width, c_out, 1, height=small, count=blocks - 1),
            LayerShape(f"conv{stage}_x.b", width, width, 3, padding=1, height=small, count=blocks - 1),
            LayerShape(f"conv{stage}.c", c_out, width, 1, height=small, count=blocks),
        ]
        c_in, height = c_out, small
    return (*shapes, LayerShape("fc", 1000, 2048, 0))


RESNET50 = _resnet50()
