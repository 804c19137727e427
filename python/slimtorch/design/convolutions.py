# SPDX-License-Identifier: Apache-2.0
"""Convolutions that need fewer multiplications than a dense one of the same shape and take its place.

    depthwise separable   each input channel alone, then 1x1 over channels
    shuffled groups       channels in groups, then the groups mixed
    Ghost                 a dense one for some of the outputs, the rest made of those, each alone

All take the arguments of `torch.nn.Conv2d` (Ghost without `padding_mode`, and `groups` only where channels are
shuffled). What each costs says :mod:`slimtorch.design.costs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from slimtorch.design._checks import divides, ghost_channels, pair, positive
from slimtorch.design.blocks import channel_shuffle

Size = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class DepthwiseSeparableConv2d(nn.Module):
    """A convolution per input channel, then a 1x1 convolution over all channels; no activation between.

    Howard et al., "MobileNets" (1704.04861), section 3.1. With `multiplier` m each input channel gets m kernels, and
    m = kernel height · width gives every dense convolution exactly (Guo et al., "Network Decoupling", 1808.05517).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as for
            `torch.nn.Conv2d`; `bias` is that of the 1x1 convolution.
        multiplier: kernels per input channel. Channel `m · in_channels + i` between the two is kernel m of input i.
        norm: batch norm and ReLU between the two, as MobileNet has them; the result is then no longer linear.

    Input [N, in_channels, H, W] or [in_channels, H, W] (without `norm`), output as of `torch.nn.Conv2d`.
    """

    replaces: ClassVar[type[nn.Module]] = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        multiplier: int = 1,
        norm: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        positive(in_channels, "in_channels")
        positive(out_channels, "out_channels")
        positive(multiplier, "multiplier")
        hidden = in_channels * multiplier
        self.multiplier = multiplier
        self.depthwise = nn.Conv2d(
            hidden, hidden, pair(kernel_size, "kernel_size"), pair(stride, "stride"), _padding(padding),
            pair(dilation, "dilation"), hidden, False, padding_mode, device, dtype,
        )  # fmt: skip
        self.between = nn.Sequential(nn.BatchNorm2d(hidden, device=device, dtype=dtype), nn.ReLU()) if norm else None
        self.pointwise = nn.Conv2d(hidden, out_channels, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(_copies(x, self.multiplier))
        if self.between is not None:
            x = self.between(x)
        return self.pointwise(x)

    @classmethod
    def from_dense(cls, module: nn.Conv2d, multiplier: int = 1) -> DepthwiseSeparableConv2d:
        """The nearest one to the weight of a dense convolution, in the sum of squares.

        For each input channel, the best matrix of rank `multiplier` for [out_channels, kernel height · width]: its
        singular value decomposition. `slimtorch.separate_` starts here and goes on with activations.

        Raises:
            TypeError: no `torch.nn.Conv2d`.
            ValueError: it has groups, NaN or infinite weights; `multiplier` above height · width of the kernel.
        """
        if not isinstance(module, nn.Conv2d):
            raise TypeError(f"module: expected a torch.nn.Conv2d, got {type(module).__name__}")
        if module.groups != 1:
            raise ValueError(f"module: expected a convolution without groups, got groups={module.groups}")
        positive(multiplier, "multiplier")
        weight = module.weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("module: its weight holds NaN or infinity")
        taps = weight.shape[2] * weight.shape[3]
        if multiplier > taps:
            raise ValueError(f"multiplier: expected at most {taps}, kernel height · width, got {multiplier}")
        return cls.of_factors(module, *separated(weight.double(), multiplier))

    @classmethod
    def of_factors(
        cls, module: nn.Conv2d, kernels: Tensor, mix: Tensor, bias: Tensor | None = None
    ) -> DepthwiseSeparableConv2d:
        """One with the geometry of `module` and these weights.

        Args:
            module: dense; its bias is taken unless another is given.
            kernels: [in_channels, multiplier, kernel height · width].
            mix: [out_channels, in_channels, multiplier].
            bias: [out_channels].
        """
        c_in, multiplier, _ = kernels.shape
        padding = module.padding if isinstance(module.padding, str) else pair(module.padding, "padding", 0)
        found = cls(
            c_in, mix.shape[0], pair(module.kernel_size, "kernel_size"), pair(module.stride, "stride"), padding,
            pair(module.dilation, "dilation"), module.bias is not None, module.padding_mode, multiplier=multiplier,
            device=module.weight.device, dtype=module.weight.dtype,
        )  # fmt: skip
        bias = module.bias if bias is None else bias
        with torch.no_grad():
            found.depthwise.weight.copy_(kernels.transpose(0, 1).reshape(found.depthwise.weight.shape))
            found.pointwise.weight.copy_(mix.transpose(1, 2).reshape(found.pointwise.weight.shape))
            if bias is not None:
                cast(Tensor, found.pointwise.bias).copy_(bias)
        for own in (found.depthwise.weight, found.pointwise.weight):
            own.requires_grad_(module.weight.requires_grad)
        if module.bias is not None:
            cast(Tensor, found.pointwise.bias).requires_grad_(module.bias.requires_grad)
        return found.train(module.training)

    def to_dense(self) -> nn.Conv2d:
        """The dense convolution that computes the same; ValueError where there is none (`norm`)."""
        if self.between is not None:
            raise ValueError("to_dense: with batch norm and ReLU between, no single convolution computes the same")
        pointwise = self.pointwise
        dense = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            bias=pointwise.bias is not None, padding_mode=self.padding_mode,
            device=pointwise.weight.device, dtype=pointwise.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if pointwise.bias is not None:
                cast(Tensor, dense.bias).copy_(pointwise.bias)
        return dense.train(self.training)

    def geometry(self) -> dict[str, Any]:
        """What `from_geometry` takes, JSON-ready."""
        padding = self.padding
        return {
            "in_channels": self.in_channels, "out_channels": self.out_channels, "kernel_size": list(self.kernel_size),
            "stride": list(self.stride), "padding": padding if isinstance(padding, str) else list(padding),
            "dilation": list(self.dilation), "bias": self.pointwise.bias is not None,
            "padding_mode": self.padding_mode, "multiplier": self.multiplier, "norm": self.between is not None,
        }  # fmt: skip

    @classmethod
    def from_geometry(
        cls, geometry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> DepthwiseSeparableConv2d:
        """A layer of this geometry, with values of no meaning; ValueError or TypeError where there is none."""
        names = {
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "bias", "padding_mode",
            "multiplier", "norm",
        }  # fmt: skip
        if set(geometry) != names:
            raise ValueError(f"geometry: expected {', '.join(sorted(names))}, got {', '.join(sorted(geometry))}")
        sizes: dict[str, Any] = {name: geometry[name] for name in ("in_channels", "out_channels", "multiplier")}
        for name in ("bias", "norm"):
            if not isinstance(geometry[name], bool):
                raise TypeError(f"{name}: expected true or false, got {geometry[name]!r}")
            sizes[name] = geometry[name]
        for name in ("kernel_size", "stride", "dilation"):
            sizes[name] = pair(geometry[name], name)
        return cls(
            **sizes, padding=geometry["padding"], padding_mode=geometry["padding_mode"], device=device, dtype=dtype
        )

    @property
    def in_channels(self) -> int:
        return self.depthwise.groups // self.multiplier

    @property
    def out_channels(self) -> int:
        return self.pointwise.out_channels

    @property
    def kernel_size(self) -> tuple[int, int]:
        return pair(self.depthwise.kernel_size, "kernel_size")

    @property
    def stride(self) -> tuple[int, int]:
        return pair(self.depthwise.stride, "stride")

    @property
    def padding(self) -> tuple[int, int] | str:
        padding = self.depthwise.padding
        return padding if isinstance(padding, str) else pair(padding, "padding", 0)

    @property
    def dilation(self) -> tuple[int, int]:
        return pair(self.depthwise.dilation, "dilation")

    @property
    def padding_mode(self) -> PaddingMode:
        return self.depthwise.padding_mode

    @property
    def groups(self) -> int:
        """Of the dense convolution that it stands for."""
        return 1

    @property
    def weight(self) -> Tensor:
        """The dense weight that both make, [out_channels, in_channels, kernel height, kernel width]; AttributeError
        where there is none (`norm`)."""
        if self.between is not None:
            raise AttributeError("weight: with batch norm and ReLU between, no single convolution computes the same")
        kernels = self.depthwise.weight.flatten(1).unflatten(0, (self.multiplier, self.in_channels))
        mix = self.pointwise.weight.flatten(1).unflatten(1, (self.multiplier, self.in_channels))
        return torch.einsum("omi,mik->oik", mix, kernels).unflatten(2, self.kernel_size)

    @property
    def bias(self) -> Tensor | None:
        return self.pointwise.bias


def separated(weight: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The nearest depthwise separable weight.

    Args:
        weight: [out_channels, in_channels, kernel height, kernel width].
        multiplier: kernels per input channel, at most height · width.

    Returns:
        Kernels [in_channels, multiplier, height · width] and mix [out_channels, in_channels, multiplier], whose product
        over `multiplier` is it. Each pair has equal norms, so that neither is trained much faster than the other.
    """
    u, s, v = torch.linalg.svd(weight.flatten(2).transpose(0, 1), full_matrices=False)  # [in, out, taps]
    rank = min(multiplier, s.shape[1])
    root = s[:, :rank].sqrt()
    kernels = weight.new_zeros(weight.shape[1], multiplier, weight.shape[2] * weight.shape[3])
    mix = weight.new_zeros(weight.shape[0], weight.shape[1], multiplier)
    kernels[:, :rank] = root[:, :, None] * v[:, :rank]
    mix[:, :, :rank] = (u[:, :, :rank] * root[:, None]).transpose(0, 1)
    return kernels, mix


def _copies(x: Tensor, count: int) -> Tensor:
    """The channels of x, so many times over: several kernels per channel, as groups of several outputs, have no fast
    code in torch on a CPU (measured: six times the time of a copy and a convolution with one each)."""
    return x if count == 1 else torch.cat([x] * count, -3)


def _padding(padding: object) -> tuple[int, int] | str:
    if isinstance(padding, str):
        return padding  # torch.nn.Conv2d says which ones there are
    return pair(cast("int | Sequence[int]", padding), "padding", 0)


class ShuffledGroupConv2d(nn.Module):
    """A group convolution whose outputs are then shuffled, so that the next groups see all of these.

    Zhang et al., "ShuffleNet" (1707.01083), section 3.1.

    Args: those of `torch.nn.Conv2d`; `groups` divides both numbers of channels.

    Input [N, in_channels, H, W] or without N, output as of `torch.nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 2,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, value in {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}.items():
            positive(value, name)
        divides(groups, in_channels, "groups", "in_channels")
        divides(groups, out_channels, "groups", "out_channels")
        self.conv = nn.Conv2d(
            in_channels, out_channels, pair(kernel_size, "kernel_size"), pair(stride, "stride"), _padding(padding),
            pair(dilation, "dilation"), groups, bias, padding_mode, device, dtype,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.dim() == 3:  # without a batch
            return channel_shuffle(y.unsqueeze(0), self.conv.groups).squeeze(0)
        return channel_shuffle(y, self.conv.groups)


class GhostConv2d(nn.Module):
    """A convolution to a part of the outputs, and cheap depthwise convolutions of those for the rest.

    Han et al., "GhostNet" (1911.11907), section 3.1, equations 2 and 3: `ratio` is their s, `cheap_kernel` their d.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, device, dtype: as for
            `torch.nn.Conv2d`.
        ratio: one output channel in `ratio`, rounded up, comes from the dense convolution.
        cheap_kernel: of the depthwise convolution, odd.
        norm: batch norm and ReLU after both, as in the authors' code; both are then without bias.

    Input [N, in_channels, H, W] or without N (without `norm`), output as of `torch.nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 1,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        bias: bool = True,
        *,
        ratio: int = 2,
        cheap_kernel: int = 3,
        norm: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        positive(in_channels, "in_channels")
        own, ghosts = ghost_channels(out_channels, ratio, cheap_kernel)
        bias = bias and not norm
        self.out_channels = out_channels
        self.ratio = ratio
        self.primary = nn.Conv2d(
            in_channels, own, pair(kernel_size, "kernel_size"), pair(stride, "stride"), _padding(padding),
            pair(dilation, "dilation"), bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        self.norm1 = nn.Sequential(nn.BatchNorm2d(own, device=device, dtype=dtype), nn.ReLU()) if norm else None
        self.cheap: nn.Conv2d | None = None
        self.norm2: nn.Sequential | None = None
        if ghosts:
            self.cheap = nn.Conv2d(
                ghosts, ghosts, cheap_kernel, padding=cheap_kernel // 2, groups=ghosts, bias=bias, device=device,
                dtype=dtype,
            )  # fmt: skip
            if norm:
                self.norm2 = nn.Sequential(nn.BatchNorm2d(ghosts, device=device, dtype=dtype), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        if self.norm1 is not None:
            y = self.norm1(y)
        if self.cheap is None:
            return y
        # not `_copies`, though that is faster: a tensor beside itself, beside itself once more below, and torch-pruning
        # does not come to an end
        ghosts = self.cheap(y if self.ratio == 2 else y.tile(self.ratio - 1, 1, 1))
        if self.norm2 is not None:
            ghosts = self.norm2(ghosts)
        # own · ratio may be a few more than asked for: those are cut off, as in the authors' code
        return torch.cat([y, ghosts], -3)[..., : self.out_channels, :, :]

    def extra_repr(self) -> str:
        return f"out_channels={self.out_channels}, ratio={self.ratio}"
