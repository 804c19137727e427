# SPDX-License-Identifier: Apache-2.0
"""Linear and conv2d layers with binary weights."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from slimtorch import ops
from slimtorch.formats import Binary, Format
from slimtorch.nn._packed import (
    Layer,
    PackedConv2d,
    PackedLayer,
    PackedLinear,
    Plans,
    check_conv2d,
    check_linear,
    check_padding_mode,
)
from slimtorch.ops._common import Activation, Pair


class _BinaryLayer(PackedLayer):
    VALUES = "scale"
    POSITIONS = ("signs",)

    scale: nn.Parameter
    signs: Tensor
    binarize_input: bool
    scaled: bool

    @classmethod
    def from_format(
        cls: type[Layer],
        module: nn.Linear | nn.Conv2d,
        weight: Format,
        *,
        activation: Activation = None,
        binarize_input: bool = True,
        scale: bool = True,
    ) -> Layer:
        """As ``from_dense``, with the weight already packed; the layer shares the format's tensors."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        cast(_BinaryLayer, layer)._become(module, weight, activation, binarize_input, scale)
        return layer

    def _become(
        self, twin: nn.Linear | nn.Conv2d, weight: Format, activation: Activation, binarize_input: bool, scaled: bool
    ) -> None:
        """As ``_adopt``. A layer without a scale of its own keeps ones, and does not train them."""
        self.binarize_input, self.scaled = binarize_input, scaled
        self._adopt(twin, weight, activation)
        if not scaled:
            self.scale.requires_grad_(False)

    def _as_format(self, values: Tensor, positions: tuple[Tensor, ...], plans: Plans) -> Binary:
        return Binary(positions[0], values, self._shape, plans)

    def _reset(self, dense: Tensor) -> None:
        fresh = Binary.pack(dense, self.scaled)
        self.scale.copy_(fresh.scale)
        self.signs.copy_(fresh.signs)
        self._prepare()

    def _derive_plans(self) -> None:
        self.format.plan(self.groups, binarize_input=self.binarize_input)

    @property
    def format(self) -> Binary:
        """The weight as a :class:`slimtorch.formats.Binary` of this layer's own tensors and plans."""
        return cast(Binary, self._held_format())

    def _options(self) -> str:
        return f", binarize_input={self.binarize_input}, scale={self.scaled}"


class BinaryLinear(_BinaryLayer, PackedLinear):
    """``nn.Linear`` with a sign for each weight and a scale for each output.

    A layer built anew has the signs of the twin's initialisation. Signs are fixed; scale and bias are trained. To train
    signs, use ``slimtorch.binarize_``. Rastegari et al. 2016 (arXiv 1603.05279), sections 3.1 and 3.2.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        binarize_input: take the signs of the input (0 counts as +1), or the input itself.
        scale: a scale per output, the mean magnitude of its weights; otherwise the scale is 1 and stays so.
        activation: None, or ``"relu"`` to fuse a ReLU.

    Shapes: input ``[..., in_features]``, output ``[..., out_features]``.
    State: ``scale [out_features]``, ``signs [ceil(out * in / 8)]`` uint8, ``weight_shape [2]`` int64 and ``bias``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        binarize_input: bool = True,
        scale: bool = True,
        activation: Activation = None,
    ) -> None:
        super().__init__()
        twin = nn.Linear(in_features, out_features, bias, device, dtype)
        self._become(twin, Binary.pack(twin.weight, scale), activation, binarize_input, scale)

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        *,
        binarize_input: bool = True,
        scale: bool = True,
        activation: Activation = None,
    ) -> BinaryLinear:
        """A layer with the signs of ``module``'s weights, as :meth:`slimtorch.formats.Binary.pack` takes them.

        Raises:
            TypeError: ``module`` is no ``nn.Linear``, or one with a forward of its own; an option of the wrong type.
            ValueError: the weight holds NaN or is on the meta device; an unknown activation.
        """
        twin = check_linear(module)
        return cls.from_format(
            twin, Binary.pack(twin.weight, scale), binarize_input=binarize_input, scale=scale, activation=activation
        )

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., in_features]`` to ``[..., out_features]``."""
        return ops.binary_linear(
            input, self.format, self.bias, binarize_input=self.binarize_input, activation=self.activation
        )


class BinaryConv2d(_BinaryLayer, PackedConv2d):
    """``nn.Conv2d`` with a sign for each weight and a scale for each output.

    A layer built anew has the signs of the twin's initialisation. Signs are fixed; scale and bias are trained. To train
    signs, use ``slimtorch.binarize_``. Rastegari et al. 2016 (arXiv 1603.05279), sections 3.1 and 3.2.

    Args:
        in_channels … dtype: as in ``nn.Conv2d``; ``padding`` takes numbers, ``"same"`` or ``"valid"``, and
            ``padding_mode`` only ``"zeros"``.
        binarize_input, scale, activation: as in :class:`BinaryLinear`; padding adds zeros, not signs.

    Shapes: as ``nn.Conv2d``, ``[N, C, H, W]`` or ``[C, H, W]``.
    State: ``scale [out_channels]``, ``signs`` uint8, ``weight_shape [4]`` int64 and ``bias``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: str | int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        binarize_input: bool = True,
        scale: bool = True,
        activation: Activation = None,
    ) -> None:
        check_padding_mode("padding_mode", padding_mode)
        super().__init__()
        twin = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self._become(twin, Binary.pack(twin.weight, scale), activation, binarize_input, scale)

    @classmethod
    def from_dense(
        cls,
        module: nn.Conv2d,
        *,
        binarize_input: bool = True,
        scale: bool = True,
        activation: Activation = None,
    ) -> BinaryConv2d:
        """A layer with the signs of ``module``'s weights, as :meth:`slimtorch.formats.Binary.pack` takes them.

        Raises:
            TypeError: ``module`` is no ``nn.Conv2d``, or one with a forward of its own; an option of the wrong type.
            ValueError: padding other than zeros; the weight holds NaN or is on the meta device; an unknown
                activation.
        """
        twin = check_conv2d(module)
        return cls.from_format(
            twin, Binary.pack(twin.weight, scale), binarize_input=binarize_input, scale=scale, activation=activation
        )

    def forward(self, input: Tensor) -> Tensor:
        """``input [N, C, H, W]`` or ``[C, H, W]`` to the output of ``nn.Conv2d``."""
        x, sides, cut = input, self._sides, (0, 0)
        if self._extra is not None and self.binarize_input:
            # Zeros that are there before the signs are taken would count as +1: the operator pads both sides alike.
            left, right, top, bottom = self._extra
            sides, cut = (bottom, right), (bottom - top, right - left)
        else:
            x = self._padded(input)
        y = ops.binary_conv2d(
            x, self.format, self.bias, self.stride, sides, self.dilation, self.groups,
            binarize_input=self.binarize_input, activation=self.activation,
        )  # fmt: skip
        return y if cut == (0, 0) else y[..., cut[0] :, cut[1] :]
