# SPDX-License-Identifier: Apache-2.0
"""Batch norm and sign between two binary layers become one comparison of whole numbers, and the layers pass bits.

    before   BinaryLinear ── float ──► BatchNorm1d ── float ──► Hardtanh ── float ──► BinaryLinear
    after    FusedBinary  ── bits ───► Identity   ── bits ───► Identity ── bits ───► FusedBinary

Courbariaux et al. 2016 (arXiv 1602.02830, section 2.2 on binarised activations at run time); Umuroglu et al. 2017
("FINN", arXiv 1612.07119, section 4.2.2: batch norm as threshold).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from slimtorch.nn.binary import BinaryConv2d, BinaryLinear
from slimtorch.ops.binary import (
    binary_conv2d_from_bits,
    binary_conv2d_to_bits,
    binary_linear_from_bits,
    binary_linear_to_bits,
    binary_thresholds,
)
from slimtorch.report import Table

BinaryLayer = BinaryLinear | BinaryConv2d

# What may stand between two binary layers: monotone in each channel (Dropout does nothing in eval()).
_BETWEEN = (nn.Hardtanh, nn.ReLU, nn.ReLU6, nn.Tanh, nn.Identity, nn.Dropout, nn.Dropout2d)


class FusedBinary(nn.Module):
    """A binary layer that takes packed bits, emits them, or both; made by :func:`fuse_binary_`, for inference.

    Args:
        layer: the layer that does the work.
        takes_bits: the input is packed, as the layer before emits it.
        thresholds, rising: ``[out]`` int32 and bool, see :func:`slimtorch.ops.binary.binary_thresholds`; None for a
            layer that ends a chain and gives floats.

    Shapes: floats as in the layer; bits ``[..., bytes]`` uint8 or, of a convolution, ``[N, H, W, bytes]``, where bit
    ``b & 7`` of byte ``b >> 3`` belongs to feature or channel ``b``, 1 for +1, in whole 64-bit words.
    """

    thresholds: Tensor | None
    rising: Tensor | None

    def __init__(
        self, layer: BinaryLayer, takes_bits: bool, thresholds: Tensor | None = None, rising: Tensor | None = None
    ) -> None:
        super().__init__()
        self.layer, self.takes_bits = layer, takes_bits
        self.register_buffer("thresholds", thresholds)
        self.register_buffer("rising", rising)
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        """Floats or bits to bits or floats, as the layer stands in its chain."""
        layer, weight = self.layer, self.layer.format
        if isinstance(layer, BinaryConv2d):
            shape = (layer.stride, layer._sides, layer.dilation, layer.groups)
            if self.thresholds is not None and self.rising is not None:
                return binary_conv2d_to_bits(input, weight, self.thresholds, self.rising, *shape)
            return binary_conv2d_from_bits(input, weight, layer.bias, *shape, activation=layer.activation)
        if self.thresholds is not None and self.rising is not None:
            return binary_linear_to_bits(input, weight, self.thresholds, self.rising)
        return binary_linear_from_bits(input, weight, layer.bias, activation=layer.activation)

    def extra_repr(self) -> str:
        """What goes in and out."""
        return f"takes_bits={self.takes_bits}, emits_bits={self.thresholds is not None}"


@dataclass
class FuseReport:
    """The answer of :func:`fuse_binary_`; prints as a table.

    Attributes:
        links: name of a layer, what was between, name of the next layer, for each pair that passes bits now.
    """

    links: list[tuple[str, str, str]]

    def __str__(self) -> str:
        rows: list[list[object]] = [list(link) for link in self.links]
        return str(Table("Fused binary layers", ["layer", "folded into thresholds", "next layer"], rows))


def fuse_binary_(model: nn.Module) -> FuseReport:
    """Let binary layers that follow each other in an ``nn.Sequential`` pass packed bits; for inference.

    Found are ``BinaryLinear`` or ``BinaryConv2d``, then any of batch norm, Hardtanh, ReLU, Tanh, Identity and Dropout,
    then a layer of the same kind, both with ``binarize_input=True``. What stands between becomes a threshold on the dot
    product of each output, computed so that predictions stay the same to the bit, and ``nn.Identity`` takes its place.
    Batch norm must not be trained afterwards.

    Args:
        model: changed in place; nested ``nn.Sequential`` are searched too.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` is in training mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("model: expected a model in eval() mode, got one in training: batch norm would still change")
    links: list[tuple[str, str, str]] = []
    for prefix, module in list(model.named_modules()):
        if isinstance(module, nn.Sequential):
            _fuse_sequential(module, f"{prefix}." if prefix else "", links)
    return FuseReport(links)


def _fuse_sequential(sequence: nn.Sequential, prefix: str, links: list[tuple[str, str, str]]) -> None:
    names = list(sequence._modules)
    modules = list(sequence)
    takes_bits = False  # whether the layer at hand got bits from the one before
    for i, layer in enumerate(modules):
        if not _can_fuse(layer):
            continue
        assert isinstance(layer, (BinaryLinear, BinaryConv2d))
        j = i + 1
        while j < len(modules) and _may_stand_between(modules[j], layer):
            j += 1
        follower = modules[j] if j < len(modules) else None
        emits = type(follower) is type(layer) and _can_fuse(follower)
        if emits:
            between = nn.Sequential(*modules[i + 1 : j]).eval()
            thresholds, rising = binary_thresholds(layer.format, layer.bias, between, activation=layer.activation)
            setattr(sequence, names[i], FusedBinary(layer, takes_bits, thresholds, rising))
            for name in names[i + 1 : j]:
                setattr(sequence, name, nn.Identity().eval())
            what = ", ".join(type(m).__name__ for m in modules[i + 1 : j]) or "sign"
            links.append((prefix + names[i], what, prefix + names[j]))
        elif takes_bits:
            setattr(sequence, names[i], FusedBinary(layer, True))
        takes_bits = emits


def _can_fuse(layer: nn.Module | None) -> bool:
    if not isinstance(layer, (BinaryLinear, BinaryConv2d)) or not layer.binarize_input or hooked(layer):
        return False
    return not isinstance(layer, BinaryConv2d) or layer._extra is None


def _may_stand_between(module: nn.Module, layer: BinaryLayer) -> bool:
    norm = nn.BatchNorm1d if isinstance(layer, BinaryLinear) else nn.BatchNorm2d
    if hooked(module):
        return False
    if type(module) is norm:
        return module.running_mean is not None and not module.training
    return type(module) in _BETWEEN


def hooked(module: nn.Module) -> bool:
    """Whether someone listens to the module: it must go on seeing what it sees."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
