# SPDX-License-Identifier: Apache-2.0
"""Linear layers and convolutions of low rank: several thin layers in a row in place of one.

    linear     in ─▶ rank ─▶ out                        SVD
    channel    k×k to rank ─▶ 1×1                       SVD of [out, in · k · k]: Zhang et al., 1505.06798, section 3.1
    spatial    k×1 to rank ─▶ 1×k                       SVD of [in · k, out · k]: Jaderberg et al., 1405.3866, scheme 2
    tucker     1×1 to r₁ ─▶ k×k to r₂ ─▶ 1×1            Tucker-2, by orthogonal iteration: Kim et al., 1511.06530
    cp         1×1 to rank ─▶ k×1, 1×k depthwise ─▶ 1×1 CP, by alternating least squares: Lebedev et al., 1412.6553

Only the last layer has a bias, so that zero padding in between pads what the dense layer would have padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from slimtorch.design._checks import pair, positive
from slimtorch.design._decompose import Rank, check_kind, composed, factors

Layer = TypeVar("Layer", bound=nn.Sequential)
Twin = TypeVar("Twin", nn.Linear, nn.Conv2d)

_AROUND = {"channel": (0, 0), "spatial": (0, 1), "tucker": (1, 1), "cp": (1, 2)}  # parts of height and width


class LowRankLinear(nn.Sequential):
    """A linear layer whose weight has a low rank: `x ─▶ rank ─▶ out`, the bias in the second.

    Args:
        in_features, out_features: of the whole.
        rank: features between.
        bias: whether the second layer has one.

    Input [..., in_features], output [..., out_features].
    """

    replaces: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        for name, value in (("in_features", in_features), ("out_features", out_features), ("rank", rank)):
            positive(value, name)
        super().__init__(
            nn.Linear(in_features, rank, False, device, dtype), nn.Linear(rank, out_features, bias, device, dtype)
        )

    @classmethod
    def from_dense(cls, module: nn.Linear, rank: int) -> LowRankLinear:
        """The best approximation of a layer's weight; `rank` is at most the smaller of its sizes.

        Raises:
            TypeError: no `torch.nn.Linear`, or a rank that is no int.
            ValueError: NaN or infinite weights, a rank out of range.
        """
        _check_dense(module, nn.Linear)
        return cls.of_factors(module, factors(module.weight.detach().double(), rank))

    @classmethod
    def of_factors(cls, module: nn.Linear, parts: Sequence[Tensor], bias: Tensor | None = None) -> LowRankLinear:
        """In place of `module`, with these weights, [rank, in] and [out, rank], and its bias or another."""
        own = module.weight
        layer = cls(module.in_features, module.out_features, len(parts[0]), module.bias is not None, "meta", own.dtype)
        return _filled(layer, module, parts, bias)

    @property
    def in_features(self) -> int:
        return cast(int, self[0].in_features)

    @property
    def out_features(self) -> int:
        return cast(int, self[1].out_features)

    @property
    def rank(self) -> int:
        """Features between."""
        return cast(int, self[0].out_features)

    @property
    def bias(self) -> nn.Parameter | None:
        return cast("nn.Parameter | None", self[1].bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight that both make, [out_features, in_features]."""
        return cast(Tensor, self[1].weight) @ cast(Tensor, self[0].weight)

    def to_dense(self) -> nn.Linear:
        """One layer that computes the same."""
        twin = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        return _dense(self, twin)

    def geometry(self) -> dict[str, Any]:
        """What `from_geometry` takes, JSON-ready."""
        return {
            "in_features": self.in_features, "out_features": self.out_features, "rank": self.rank,
            "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_geometry(cls, geometry: Mapping[str, Any], *, device: Any = None, dtype: Any = None) -> LowRankLinear:
        """A layer of this geometry, with values of no meaning; ValueError or TypeError where there is none."""
        _fields(geometry, ("in_features", "out_features", "rank", "bias"))
        return cls(**geometry, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


class LowRankConv2d(nn.Sequential):
    """A convolution as two, three or four thin ones in a row; see the module for the kinds.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode: of the whole, as in
            `torch.nn.Conv2d`; without groups.
        rank: channels between; of "tucker" two numbers, before and after its k×k convolution.
        kind: "channel", "spatial", "tucker" or "cp".
        bias: whether the last layer has one.

    Input [N, in_channels, H, W] or without N, output as the dense layer's.
    """

    replaces: ClassVar[type[nn.Module]] = nn.Conv2d
    kind: str

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        rank: int | Sequence[int],
        *,
        kind: str = "channel",
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_kind(kind)
        positive(in_channels, "in_channels")
        positive(out_channels, "out_channels")
        if kind == "tucker":
            first, last = pair(cast(Any, rank), "rank")
        else:
            first = last = positive(rank, "rank")
        kernel, steps, gaps = pair(kernel_size, "kernel_size"), pair(stride, "stride"), pair(dilation, "dilation")
        edges: Any = padding if isinstance(padding, str) else pair(padding, "padding", 0)
        if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
            raise ValueError(f"padding_mode: expected zeros, reflect, replicate or circular, got {padding_mode!r}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        around: dict[str, Any] = {"bias": False, "padding_mode": padding_mode, **made}

        def part(c_in: int, c_out: int, axis: int | None, **more: Any) -> nn.Conv2d:
            """The part with the whole kernel (axis None), or with its height (0) or width (1) alone."""
            if axis is None:
                return nn.Conv2d(c_in, c_out, kernel, steps, edges, gaps, **{**around, **more})
            size, step, gap, edge = [1, 1], [1, 1], [1, 1], [0, 0]
            size[axis], step[axis], gap[axis] = kernel[axis], steps[axis], gaps[axis]
            if not isinstance(edges, str):
                edge[axis] = edges[axis]
            return nn.Conv2d(
                c_in, c_out, cast(Any, tuple(size)), cast(Any, tuple(step)),
                edges if isinstance(edges, str) else cast(Any, tuple(edge)), cast(Any, tuple(gap)),
                **{**around, **more},
            )  # fmt: skip

        end = nn.Conv2d(last, out_channels, 1, bias=bias, **made) if kind != "spatial" else None
        parts: list[nn.Conv2d | None]
        if kind == "channel":
            parts = [part(in_channels, last, None), end]
        elif kind == "spatial":
            parts = [part(in_channels, last, 0), part(last, out_channels, 1, bias=bias)]
        elif kind == "tucker":
            parts = [nn.Conv2d(in_channels, first, 1, bias=False, **made), part(first, last, None), end]
        else:
            start = nn.Conv2d(in_channels, first, 1, bias=False, **made)
            parts = [start, part(last, last, 0, groups=last), part(last, last, 1, groups=last), end]
        super().__init__(*cast("list[nn.Module]", parts))
        self.kind = kind

    @classmethod
    def from_dense(cls, module: nn.Conv2d, rank: int | Sequence[int], kind: str = "channel") -> LowRankConv2d:
        """The approximation of a layer's weight, which has no groups; ranks are at most those that lose nothing.

        Raises:
            TypeError: no `torch.nn.Conv2d`, or a rank that is no int ("tucker": two).
            ValueError: groups, NaN or infinite weights, an unknown kind, a rank out of range.
        """
        check_kind(kind)
        _check_dense(module, nn.Conv2d)
        return cls.of_factors(module, factors(module.weight.detach().double(), rank, kind), kind)

    @classmethod
    def of_factors(
        cls, module: nn.Conv2d, parts: Sequence[Tensor], kind: str, bias: Tensor | None = None
    ) -> LowRankConv2d:
        """In place of `module`, with the weights that `factors` gives, and its bias or another."""
        rank: Any = (len(parts[0]), len(parts[1])) if kind == "tucker" else len(parts[0])
        layer = cls(
            module.in_channels, module.out_channels, module.kernel_size, rank, kind=kind, stride=module.stride,
            padding=cast(Any, module.padding), dilation=module.dilation, bias=module.bias is not None,
            padding_mode=str(module.padding_mode), device="meta", dtype=module.weight.dtype,
        )  # fmt: skip
        return _filled(layer, module, parts, bias)

    @property
    def in_channels(self) -> int:
        return cast(int, self[0].in_channels)

    @property
    def out_channels(self) -> int:
        return cast(int, self[-1].out_channels)

    @property
    def rank(self) -> Rank:
        """Channels between; of "tucker" two numbers."""
        if self.kind == "tucker":
            return cast(int, self[0].out_channels), cast(int, self[1].out_channels)
        return cast(int, self[0].out_channels)

    def _around(self, name: str) -> tuple[int, int]:
        down, across = _AROUND[self.kind]
        return int(getattr(self[down], name)[0]), int(getattr(self[across], name)[1])

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self._around("kernel_size")

    @property
    def stride(self) -> tuple[int, int]:
        return self._around("stride")

    @property
    def dilation(self) -> tuple[int, int]:
        return self._around("dilation")

    @property
    def padding(self) -> str | tuple[int, int]:
        first = self[_AROUND[self.kind][0]].padding
        return first if isinstance(first, str) else self._around("padding")

    @property
    def padding_mode(self) -> str:
        return cast(str, self[_AROUND[self.kind][0]].padding_mode)

    @property
    def bias(self) -> nn.Parameter | None:
        return cast("nn.Parameter | None", self[-1].bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight that all make, [out_channels, in_channels, kernel height, kernel width]."""
        return composed([cast(Tensor, part.weight) for part in self], self.kind)

    def to_dense(self) -> nn.Conv2d:
        """One layer that computes the same."""
        twin = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            bias=self.bias is not None, padding_mode=cast(Any, self.padding_mode), device="meta",
        )  # fmt: skip
        return _dense(self, twin)

    def geometry(self) -> dict[str, Any]:
        """What `from_geometry` takes, JSON-ready."""
        rank, padding = self.rank, self.padding
        return {
            "in_channels": self.in_channels, "out_channels": self.out_channels, "kernel_size": list(self.kernel_size),
            "stride": list(self.stride), "padding": padding if isinstance(padding, str) else list(padding),
            "dilation": list(self.dilation), "padding_mode": self.padding_mode, "kind": self.kind,
            "rank": list(rank) if isinstance(rank, tuple) else rank, "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_geometry(cls, geometry: Mapping[str, Any], *, device: Any = None, dtype: Any = None) -> LowRankConv2d:
        """A layer of this geometry, with values of no meaning; ValueError or TypeError where there is none."""
        names = (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode", "kind",
            "rank", "bias",
        )  # fmt: skip
        _fields(geometry, names)
        return cls(**geometry, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {self.kind}, rank={self.rank}"


def _check_dense(module: nn.Module, kind: type[nn.Module]) -> None:
    if not isinstance(module, kind):
        raise TypeError(f"module: expected a torch.nn.{kind.__name__}, got {type(module).__name__}")
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise ValueError(f"module: expected a convolution without groups, got groups={module.groups}")
    if not bool(torch.isfinite(cast(Tensor, module.weight)).all()):
        raise ValueError("module: its weight holds NaN or infinity")


def _fields(geometry: Mapping[str, Any], names: Sequence[str]) -> None:
    if set(geometry) != set(names):
        raise ValueError(f"geometry: expected {', '.join(sorted(names))}, got {', '.join(sorted(geometry))}")
    if not isinstance(geometry["bias"], bool):
        raise TypeError(f"bias: expected true or false, got {geometry['bias']!r}")


@torch.no_grad()
def _filled(layer: Layer, module: Any, parts: Sequence[Tensor], bias: Tensor | None) -> Layer:
    """`layer`, made without memory, with these weights; device, dtype and flags of `module`."""
    own = cast(nn.Parameter, module.weight)
    for index, (place, weight) in enumerate(zip(layer, parts, strict=True)):
        shape = cast(Tensor, place.weight).shape
        value = weight.to(own.device, own.dtype, copy=True).reshape(shape).contiguous()
        place.weight = nn.Parameter(value, requires_grad=own.requires_grad)
        if module.bias is not None and index == len(parts) - 1:
            kept = module.bias if bias is None else bias
            value = kept.detach().to(own.device, own.dtype, copy=True)
            place.bias = nn.Parameter(value, requires_grad=module.bias.requires_grad)
    return layer.train(module.training)


@torch.no_grad()
def _dense(layer: Any, twin: Twin) -> Twin:
    flag = next(layer.parameters()).requires_grad
    twin.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=flag)
    if layer.bias is not None:
        twin.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    return twin.train(layer.training)
