# SPDX-License-Identifier: Apache-2.0
"""Linear layers and convolutions of low rank: several thin layers in a row in place of one.

    linear     in ─▶ rank ─▶ out                        SVD
    channel    k×k to rank ─▶ 1×1                       SVD of [out, in · k · k]: Zhang et al., 1505.06798, section 3.1
    spatial    k×1 to rank ─▶ 1×k                       SVD of [in · k, out · k]: Jaderberg et al., 1405.3866, scheme 2
    tucker     1×1 to r₁ ─▶ k×k to r₂ ─▶ 1×1            Tucker-2, by higher-order orthogonal iteration: Kim et al., 1511.06530
    cp         1×1 to rank ─▶ k×1, 1×k, one per channel ─▶ 1×1     CP, by alternating least squares: Lebedev et al., 1412.6553

Only the last layer has a bias, so that zero padding in between pads what the dense layer would have padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from slimtorch.design._checks import pair, positive

Kind = Literal["channel", "spatial", "tucker", "cp"]
KINDS: tuple[str, ...] = get_args(Kind)
Rank = int | tuple[int, int]
Layer = TypeVar("Layer", bound=nn.Sequential)
Twin = TypeVar("Twin", nn.Linear, nn.Conv2d)

_AROUND = {"channel": (0, 0), "spatial": (0, 1), "tucker": (1, 1), "cp": (1, 2)}  # parts with the kernel's height, width


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
        """The best approximation of a layer's weight; `rank` is at most the smaller of its sizes."""
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
        return cast(Tensor, self[1].weight @ self[0].weight)

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
                edges if isinstance(edges, str) else cast(Any, tuple(edge)), cast(Any, tuple(gap)), **{**around, **more},
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
        """The approximation of a layer's weight, which has no groups; ranks are at most `full_rank`."""
        return cls.of_factors(module, factors(module.weight.detach().double(), rank, kind), kind)

    @classmethod
    def of_factors(
        cls, module: nn.Conv2d, parts: Sequence[Tensor], kind: str, bias: Tensor | None = None
    ) -> LowRankConv2d:
        """In place of `module`, with the weights that `factors` gives, and its bias or another."""
        if module.groups != 1:
            raise ValueError(f"module: expected a convolution without groups, got {module.groups}")
        rank: Any = (len(parts[0]), len(parts[1])) if kind == "tucker" else len(parts[0])
        layer = cls(
            module.in_channels, module.out_channels, module.kernel_size, rank, kind=kind, stride=module.stride,
            padding=cast(Any, module.padding), dilation=module.dilation, bias=module.bias is not None,
            padding_mode=module.padding_mode, device="meta", dtype=module.weight.dtype,
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
            bias=self.bias is not None, padding_mode=self.padding_mode, device="meta",
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


def check_kind(kind: object) -> str:
    """`kind`; ValueError where it is none of the four."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    return kind


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
        value = weight.to(own.device, own.dtype, copy=True).reshape(place.weight.shape).contiguous()
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


# --- decompositions ---------------------------------------------------------------------------------------------------


def full_rank(shape: Sequence[int], kind: str = "channel") -> Rank:
    """The rank from which on a weight of this shape, [out, in] or [out, in, height, width], is met exactly."""
    out, c_in = shape[0], shape[1]
    if len(shape) == 2:
        return min(out, c_in)
    height, width = shape[2], shape[3]
    taps = height * width
    if kind == "channel":
        return min(out, c_in * taps)
    if kind == "spatial":
        return min(c_in * height, out * width)
    if kind == "tucker":
        return min(c_in, out * taps), min(out, c_in * taps)
    return out * c_in * taps // max(out, c_in, height, width)


def factors(
    weight: Tensor, rank: int | Sequence[int], kind: str = "channel", metric: Tensor | None = None
) -> list[Tensor]:
    """Weights of the thin layers, in order.

    Args:
        weight: [out, in] or [out, in, height, width], float64.
        rank: at most `full_rank`.
        kind: of a convolution.
        metric: second moment (or covariance) of the rows or patches that the layer gets, [in, in] or
            [in · height · width, …]: the mean squared error of the outputs is then least (exactly for linear layers and
            "channel": the outputs' principal components; for the others in the last layer, the rest coming from the
            weight). None: that of the weight.

    Raises:
        ValueError: a rank out of range.
    """
    most = full_rank(weight.shape, kind)
    given = pair(cast(Any, rank), "rank") if isinstance(most, tuple) else positive(rank, "rank")
    over = any(a > b for a, b in zip(given, most, strict=True)) if isinstance(most, tuple) else cast(Any, given) > most
    if over:
        raise ValueError(f"rank: expected at most {most} for a weight of {tuple(weight.shape)}, got {given}")
    if weight.dim() == 2 or kind == "channel":
        return _channel(weight, cast(int, given), metric)
    if kind == "spatial":
        parts = _spatial(weight, cast(int, given))
    elif kind == "tucker":
        parts = _tucker(weight, *cast("tuple[int, int]", given))
    else:
        parts = _cp(weight, cast(int, given))
    return parts if metric is None else _refit(weight, parts, kind, metric)


def spectrum(weight: Tensor, kind: str = "channel", metric: Tensor | None = None) -> list[Tensor]:
    """What each further rank adds to the sum of squares, descending, as shares; of "tucker" one for each of its two."""
    if weight.dim() == 2 or kind == "channel":
        rows = weight.flatten(1)
        if metric is None:
            squares = torch.linalg.svdvals(rows).square()
        else:
            squares = torch.linalg.eigvalsh(rows @ metric @ rows.T).flip(0).clamp_min(0)
        return [_shares(squares[: cast(int, full_rank(weight.shape, kind))])]
    if kind == "spatial":
        return [_shares(torch.linalg.svdvals(weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)).square())]
    if kind != "tucker":
        raise ValueError(f"kind: {kind!r} has no spectrum")
    sides = (weight.transpose(0, 1).flatten(1), weight.flatten(1))
    return [_shares(torch.linalg.svdvals(side).square()) for side in sides]


def _shares(squares: Tensor) -> Tensor:
    return squares / squares.sum().clamp_min(1e-300)


def composed(parts: Sequence[Tensor], kind: str) -> Tensor:
    """[out, in, height, width]: the weight that the parts make together."""
    if kind == "channel":
        return torch.einsum("or,rihw->oihw", parts[1].flatten(1), parts[0])
    if kind == "spatial":
        return torch.einsum("orw,rih->oihw", parts[1].flatten(2), parts[0].flatten(2))
    if kind == "tucker":
        return torch.einsum("os,srhw,ri->oihw", parts[2].flatten(1), parts[1], parts[0].flatten(1))
    first, down, across, last = (part.flatten(1) for part in parts)
    inner = (first[:, :, None, None] * down[:, None, :, None] * across[:, None, None]).flatten(1)  # [r, i h w]
    return (last @ inner).reshape(len(last), first.shape[1], down.shape[1], across.shape[1])


def _channel(weight: Tensor, rank: int, metric: Tensor | None) -> list[Tensor]:
    rows = weight.flatten(1)
    if metric is None:
        left, values, right = torch.linalg.svd(rows, full_matrices=False)
        root = values[:rank].sqrt()
        first, last = root[:, None] * right[:rank], left[:, :rank] * root
    else:
        last = torch.linalg.eigh(rows @ metric @ rows.T)[1].flip(1)[:, :rank]
        first, last = _balanced(last.T @ rows, last)
    if weight.dim() == 2:
        return [first, last]
    return [first.reshape(rank, *weight.shape[1:]), last[:, :, None, None]]


def _balanced(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `first` and columns of `last` of equal norms, so that neither is trained much faster."""
    a, b = first.norm(dim=1), last.norm(dim=0)
    scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-300)).sqrt(), torch.ones_like(a))
    return first * scale[:, None], last / scale


def _spatial(weight: Tensor, rank: int) -> list[Tensor]:
    out, c_in, height, width = weight.shape
    matrix = weight.permute(1, 2, 0, 3).reshape(c_in * height, out * width)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    down = (left[:, :rank] * root).T.reshape(rank, c_in, height, 1)
    across = (root[:, None] * right[:rank]).reshape(rank, out, 1, width).transpose(0, 1)
    return [down.contiguous(), across.contiguous()]


def _tucker(weight: Tensor, first: int, last: int, rounds: int = 5) -> list[Tensor]:
    def leading(matrix: Tensor, rank: int) -> Tensor:
        return torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]

    out = leading(weight.flatten(1), last)
    inner = out
    for _ in range(rounds):
        inner = leading(torch.einsum("oihw,os->ishw", weight, out).flatten(1), first)
        out = leading(torch.einsum("oihw,ir->orhw", weight, inner).flatten(1), last)
    core = torch.einsum("oihw,os,ir->srhw", weight, out, inner)
    return [inner.T[:, :, None, None], core, out[:, :, None, None]]


def _cp(weight: Tensor, rank: int, rounds: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in weight.shape]
    sides = [side.to(weight.device) for side in sides]
    for index in range(2):  # channels start from the weight's own directions, as far as there are any
        own = torch.linalg.svd(weight.movedim(index, 0).flatten(1), full_matrices=False)[0][:, :rank]
        sides[index][:, : own.shape[1]] = own
    rows = weight.flatten(1)
    left = rows  # the weight with its outputs contracted, [in, height, width, rank], once they are fitted
    for _ in range(rounds):
        for index in range(4):
            gram = torch.ones(rank, rank, dtype=weight.dtype, device=weight.device)
            for i, side in enumerate(sides):
                if i != index:
                    gram = gram * (side.T @ side)
            # A little ridge: without it components grow against one another (Lebedev et al., section 3.3).
            gram.diagonal().add_(1e-6 * gram.diagonal().mean().clamp_min(1e-300))
            _, b, c, d = sides
            if index == 0:
                pull = rows @ (b[:, None, None] * c[None, :, None] * d[None, None]).flatten(0, 2)
                sides[0] = torch.linalg.solve(gram, pull.T).T
                left = (rows.T @ sides[0]).reshape(*weight.shape[1:], rank)
                continue
            if index == 1:
                pull = (left * c[:, None] * d).sum((1, 2))
            elif index == 2:
                pull = (left * b[:, None, None] * d).sum((0, 2))
            else:
                pull = (left * b[:, None, None] * c[:, None]).sum((0, 1))
            side = torch.linalg.solve(gram, pull.T).T
            sides[index] = side if index == 3 else side / side.norm(dim=0).clamp_min(1e-300)
    norms = [side.norm(dim=0).clamp_min(1e-300) for side in sides]
    whole = (norms[0] * norms[1] * norms[2] * norms[3]).pow(0.25)  # the same norm in each, to train all alike
    out, c_in, down, across = (side * (whole / norm) for side, norm in zip(sides, norms, strict=True))
    return [c_in.T[:, :, None, None], down.T[:, None, :, None], across.T[:, None, None, :], out[:, :, None, None]]


def _refit(weight: Tensor, parts: list[Tensor], kind: str, metric: Tensor) -> list[Tensor]:
    """The last part anew, by least squares of the outputs under `metric`."""
    out, _, _, width = weight.shape
    rank = parts[-1].shape[1]
    if kind == "spatial":  # what comes out of the vertical part, seen from each place of the horizontal one
        before = torch.zeros(rank, width, *weight.shape[1:], dtype=weight.dtype, device=weight.device)
        for x in range(width):
            before[:, x, :, :, x] = parts[0][:, :, :, 0]
        before = before.flatten(2).flatten(0, 1)
    else:
        identity = torch.eye(rank, dtype=weight.dtype, device=weight.device)[:, :, None, None]
        before = composed([*parts[:-1], identity], kind).flatten(1)
    pulled = before @ metric
    gram = pulled @ before.T
    gram.diagonal().add_(1e-9 * gram.diagonal().mean().clamp_min(1e-300))
    last = torch.linalg.solve(gram, pulled @ weight.flatten(1).T).T
    return [*parts[:-1], last.reshape(parts[-1].shape)]
