# SPDX-License-Identifier: Apache-2.0
"""Layers that run at several widths with one set of weights: the first channels of each are the narrow layer.

Yu et al., "Slimmable Neural Networks" (arXiv 1812.08928), section 3. At width w a group of n neurons keeps the first
max(1, ⌊w n + ½⌋); a layer multiplies with that corner of its weight:

                in_features
           ┌───────┬──────────┐         y[:, :out(w)] = x[:, :in(w)] · weight[:out(w), :in(w)]ᵀ
    out(w) │ used  │          │
           ├───────┘          │         Batch norms cannot share statistics between widths: each width has its own.
           └──────────────────┘

What a channel belongs to is said by `Channels`, because not every layer's channels are one group from the first to the
last: after a flattening each neuron covers several columns, after a concatenation several groups lie side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (0.25, 0.5, 0.75, 1.0)


def kept(neurons: int, width: float) -> int:
    """How many of so many neurons are there at a width in (0, 1]; never none."""
    return max(1, math.floor(neurons * width + 0.5))


def _key(width: float) -> int:
    return round(width * 2**53)


@dataclass(frozen=True)
class Channels:
    """The channels along one side of a layer, in order, as runs `(neurons, each, slim)`.

    Each run holds `neurons` neurons with `each` consecutive channels; where `slim` is false all stay at every width.
    """

    runs: tuple[tuple[int, int, bool], ...]

    @staticmethod
    def plain(channels: int, slim: bool = True) -> Channels:
        """One group, a channel per neuron."""
        return Channels(((channels, 1, slim),))

    @property
    def total(self) -> int:
        return sum(neurons * each for neurons, each, _ in self.runs)

    @property
    def slim(self) -> bool:
        """Whether any channel goes at smaller widths."""
        return any(slim for _, _, slim in self.runs)

    def count(self, width: float) -> int:
        """Channels at a width."""
        return sum(stop - start for start, stop in self.spans(width))

    def spans(self, width: float) -> list[tuple[int, int]]:
        """[start, stop) of the channels that are there at a width; neighbours are joined."""
        spans: list[tuple[int, int]] = []
        offset = 0
        for neurons, each, slim in self.runs:
            stop = offset + each * (kept(neurons, width) if slim else neurons)
            if spans and spans[-1][1] == offset:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((offset, stop))
            offset += neurons * each
        return spans

    def take(self, tensor: Tensor, dim: int, width: float) -> Tensor:
        """The channels of a width along `dim`: a view where they are neighbours."""
        spans = self.spans(width)
        if spans == [(0, tensor.shape[dim])]:
            return tensor
        parts = [tensor.narrow(dim, start, stop - start) for start, stop in spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def check_widths(widths: Sequence[float]) -> tuple[float, ...]:
    """The widths, ascending; ValueError or TypeError unless they are different numbers in (0, 1] with 1 among them."""
    if isinstance(widths, (str, bytes)) or not isinstance(widths, Sequence):
        raise TypeError(f"widths: expected a sequence of numbers in (0, 1], got {widths!r}")
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, (int, float)):
            raise TypeError(f"widths: expected numbers in (0, 1], got {width!r}")
        if not 0 < width <= 1:
            raise ValueError(f"widths: expected numbers in (0, 1], got {width!r}")
    found = tuple(sorted(float(width) for width in widths))
    if len(set(found)) < len(found):
        raise ValueError(f"widths: expected each one once, got {tuple(widths)}")
    if not found or found[-1] != 1.0:
        raise ValueError(f"widths: expected 1.0, the whole network, among them, got {tuple(widths)}")
    return found


class SlimmableLayer(nn.Module):
    """What all of them have: the widths they know, and the one they run at.

    Attributes:
        widths: ascending, the last is 1.
        universal: whether any width from the smallest to 1 may be set.
        width: now; not part of the ``state_dict``.
        inputs, outputs: the channels on the two sides.
    """

    def __init__(self, inputs: Channels, outputs: Channels, widths: Sequence[float], universal: bool) -> None:
        super().__init__()
        self.widths = check_widths(widths)
        if not isinstance(universal, bool):
            raise TypeError(f"universal: expected True or False, got {universal!r}")
        self.universal = universal
        self.width = 1.0
        self.inputs = inputs
        self.outputs = outputs

    def set_width(self, width: float) -> None:
        """Run at this width from now on; ValueError, TypeError where it is not among those that it can run at."""
        self.width = self.check_width(width)

    def check_width(self, width: float) -> float:
        """`width`, if this layer can run at it; else ValueError or TypeError."""
        if isinstance(width, bool) or not isinstance(width, (int, float)):
            raise TypeError(f"width: expected a number, got {width!r}")
        if self.universal:
            if not self.widths[0] <= width <= 1:
                raise ValueError(f"width: expected a number from {self.widths[0]:g} to 1, got {width!r}")
        elif width not in self.widths:
            raise ValueError(f"width: expected one of {', '.join(f'{w:g}' for w in self.widths)}, got {width!r}")
        return float(width)

    def export(self) -> nn.Module:
        """The plain layer of the present width, with copies of its values."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        now = f"width={self.width:g} of {', '.join(f'{w:g}' for w in self.widths)}"
        return now + (", universal" if self.universal else "")

    def _finish(self, twin: nn.Module) -> nn.Module:
        """The values of the present width, its training flag and `requires_grad`, in a plain layer."""
        state = {name: value.detach() for name, value in self._values().items()}
        twin.to(next(iter(state.values()), torch.empty(0)))  # device and dtype
        twin.load_state_dict(state)
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(cast(Tensor, getattr(self, name)).requires_grad)
        return twin.train(self.training)

    def _values(self) -> dict[str, Tensor]:
        """The tensors of the present width under the plain layer's names."""
        raise NotImplementedError


class _Matrix(SlimmableLayer):
    """A weight ``[out, in, ...]`` and a bias ``[out]`` of which the first corner is used."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    @property
    def used_shape(self) -> tuple[int, ...]:
        """Of the part of the weight that runs at the present width."""
        return tuple(self._corner()[0].shape)

    def _corner(self) -> tuple[Tensor, Tensor | None]:
        weight = self.outputs.take(self.weight, 0, self.width)
        if weight.shape[1] == self.inputs.total:  # a depthwise convolution has one column
            weight = self.inputs.take(weight, 1, self.width)
        return weight, None if self.bias is None else self.outputs.take(self.bias, 0, self.width)

    def _values(self) -> dict[str, Tensor]:
        weight, bias = self._corner()
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    def _adopt(self, twin: nn.Linear | nn.Conv1d | nn.Conv2d) -> None:
        """The very parameters of a plain layer: an optimizer that knows them goes on."""
        self.register_parameter("weight", twin._parameters["weight"])
        self.register_parameter("bias", twin._parameters["bias"])
        self.train(twin.training)


def _side(channels: Channels | bool, total: int, name: str) -> Channels:
    if isinstance(channels, bool):
        return Channels.plain(total, channels)
    if not isinstance(channels, Channels):
        raise TypeError(f"{name}: expected True, False or Channels, got {channels!r}")
    if channels.total != total:
        raise ValueError(f"{name}: expected {total} channels, got {channels.total}")
    return channels


class SlimmableLinear(_Matrix):
    """``nn.Linear`` at several widths.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``, of the whole layer.
        widths: in (0, 1], with 1 among them.
        universal: any width from the smallest to 1 may be set.
        slim_in, slim_out: False where all inputs (of the network) or outputs (its classes) stay; `Channels` where they
            are not simply one neuron each.

    Input ``[..., inputs.count(width)]``, output ``[..., outputs.count(width)]``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        widths: Sequence[float] = WIDTHS,
        universal: bool = False,
        slim_in: Channels | bool = True,
        slim_out: Channels | bool = True,
    ) -> None:
        inputs, outputs = _side(slim_in, in_features, "slim_in"), _side(slim_out, out_features, "slim_out")
        super().__init__(inputs, outputs, widths, universal)
        self.in_features, self.out_features = in_features, out_features
        self._adopt(nn.Linear(in_features, out_features, bias, device, dtype))

    @classmethod
    def from_dense(cls, module: nn.Linear, **options: Any) -> SlimmableLinear:
        """The same layer with the same parameters; options as in the constructor."""
        made = cls(module.in_features, module.out_features, module.bias is not None, "meta", **options)
        made._adopt(module)
        return made

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self._corner())

    def export(self) -> nn.Linear:
        """The plain layer of the present width, with copies of its values."""
        sizes = self.inputs.count(self.width), self.outputs.count(self.width)
        return cast(nn.Linear, self._finish(nn.Linear(*sizes, self.bias is not None)))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {super().extra_repr()}"


class _Conv(_Matrix):
    twin: type[nn.Conv1d] | type[nn.Conv2d]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        widths: Sequence[float] = WIDTHS,
        universal: bool = False,
        slim_in: Channels | bool = True,
        slim_out: Channels | bool = True,
    ) -> None:
        if groups != 1 and not groups == in_channels == out_channels:
            raise ValueError(f"groups: expected 1, or a depthwise convolution with {in_channels}, got {groups}")
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode: expected 'zeros', got {padding_mode!r}")
        inputs, outputs = _side(slim_in, in_channels, "slim_in"), _side(slim_out, out_channels, "slim_out")
        if groups != 1 and inputs != outputs:
            raise ValueError("slim_out: expected a depthwise convolution to keep the outputs of the inputs it keeps")
        super().__init__(inputs, outputs, widths, universal)
        made = self.twin(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = (
            made.kernel_size, made.stride, made.padding, made.dilation,
        )  # fmt: skip
        self._adopt(made)

    @classmethod
    def from_dense(cls, module: nn.Conv1d | nn.Conv2d, **options: Any) -> Any:
        """The same layer with the same parameters; options as in the constructor."""
        made = cls(
            module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
            module.dilation, module.groups, module.bias is not None, module.padding_mode, "meta", **options,
        )  # fmt: skip
        made._adopt(module)
        return made

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._corner()
        run = cast(Any, F.conv1d if self.twin is nn.Conv1d else F.conv2d)
        made: Tensor = run(x, weight, bias, self.stride, self.padding, self.dilation, self._groups())
        return made

    def _groups(self) -> int:
        return 1 if self.groups == 1 else self.inputs.count(self.width)

    def export(self) -> Any:
        """The plain layer of the present width, with copies of its values."""
        sizes = self.inputs.count(self.width), self.outputs.count(self.width)
        made = self.twin(
            *sizes, cast(Any, self.kernel_size), cast(Any, self.stride), cast(Any, self.padding),
            cast(Any, self.dilation), self._groups(), self.bias is not None,
        )  # fmt: skip
        return self._finish(made)

    def extra_repr(self) -> str:
        shape = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{shape}, groups={self.groups}, {super().extra_repr()}"


class SlimmableConv1d(_Conv):
    """``nn.Conv1d`` at several widths; as `SlimmableConv2d`."""

    twin = nn.Conv1d


class SlimmableConv2d(_Conv):
    """``nn.Conv2d`` at several widths: ``[N, inputs.count(width), H, W] → [N, outputs.count(width), H', W']``.

    Arguments are those of ``nn.Conv2d``, of the whole layer, and those of `SlimmableLinear`.

    Raises:
        ValueError: ``groups`` that are neither 1 nor all channels (depthwise), padding with anything but zeros.
    """

    twin = nn.Conv2d


class _BatchNorm(SlimmableLayer):
    """Batch norm with statistics of its own for each width.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in ``nn.BatchNorm2d``.
        widths, universal, slim: as `slim_in` of `SlimmableLinear`; scale and shift are each width's own unless
            `universal`, where all share one (Yu & Huang, arXiv 1903.05134, section 3.3), since widths have no end.

    A width that is not in `widths` normalises by its batch while it trains and updates nothing; for evaluation
    `recalibrate_` keeps the statistics of one such width at a time.

    ``weight``, ``bias``: [widths or 1, features]; ``running_mean``, ``running_var``: [widths + 1, features], the last
    row for ``other_width``: int64 [], in units of 2⁻⁵³ (no change of dtype rounds it), 0 for none.
    """

    twin: type[nn.BatchNorm1d] | type[nn.BatchNorm2d]
    dimensions: tuple[int, ...]

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    other_width: Tensor
    _other = 0  # `other_width` as it was last read

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        widths: Sequence[float] = WIDTHS,
        universal: bool = False,
        slim: Channels | bool = True,
    ) -> None:
        channels = _side(slim, num_features, "slim")
        super().__init__(channels, channels, widths, universal)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        own = (1 if universal else len(self.widths), num_features)
        for name, value in (("weight", torch.ones), ("bias", torch.zeros)):
            made = nn.Parameter(value(own, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, made)
        rows = (len(self.widths) + 1, num_features)
        kept_ = track_running_stats
        self.register_buffer("running_mean", torch.zeros(rows, device=device, dtype=dtype) if kept_ else None)
        self.register_buffer("running_var", torch.ones(rows, device=device, dtype=dtype) if kept_ else None)
        counts = torch.zeros(rows[0], dtype=torch.long, device=device) if kept_ else None
        self.register_buffer("num_batches_tracked", counts)
        self.register_buffer("other_width", torch.zeros((), dtype=torch.long, device=device))

    @classmethod
    def from_dense(cls, module: nn.BatchNorm1d | nn.BatchNorm2d, **options: Any) -> Any:
        """Every width begins with the first channels' scale, shift and statistics; options as in the constructor."""
        some = next((t for t in (module.weight, module.running_mean) if t is not None), torch.empty(0))
        made = cls(
            module.num_features, module.eps, module.momentum, module.affine, module.running_mean is not None,
            some.device, some.dtype, **options,
        )  # fmt: skip
        with torch.no_grad():
            # the number of batches too: without a momentum it says what the statistics weigh
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                own, other = getattr(made, name), getattr(module, name)
                if own is not None and other is not None:
                    own.copy_(other.expand_as(own))
                    own.requires_grad_(other.requires_grad)
        return made.train(module.training)

    @property
    def row(self) -> int:
        """Of the statistics at the present width."""
        return self.widths.index(self.width) if self.width in self.widths else len(self.widths)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in self.dimensions:
            wanted = " or ".join(f"{dimensions}D" for dimensions in self.dimensions)
            raise ValueError(f"x: expected a {wanted} tensor, got {x.dim()}D")
        weight, bias = self._affine()
        if self.running_mean is None or self.running_var is None or (self.training and not self._tracks()):
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        if not self.training:
            return F.batch_norm(x, *self._statistics(), weight, bias, False, 0.0, self.eps)
        row = self.row
        counts = cast(Tensor, self.num_batches_tracked)
        counts[row] += 1
        factor = 1.0 / float(counts[row]) if self.momentum is None else self.momentum
        # Copies: autograd keeps what batch_norm is given, and rows of one buffer count as one tensor to it, so that the
        # pass of another width before `backward` would spoil this one.
        mean = self.inputs.take(self.running_mean[row], 0, self.width).clone()
        variance = self.inputs.take(self.running_var[row], 0, self.width).clone()
        y = F.batch_norm(x, mean, variance, weight, bias, True, factor, self.eps)
        with torch.no_grad():
            offset = 0
            for start, stop in self.inputs.spans(self.width):
                self.running_mean[row, start:stop] = mean[offset : offset + stop - start]
                self.running_var[row, start:stop] = variance[offset : offset + stop - start]
                offset += stop - start
        return y

    def set_width(self, width: float) -> None:
        super().set_width(width)
        self._tracks()

    def _tracks(self) -> bool:
        """Whether the present width has a row of statistics: its own, or the one for another width."""
        if self.width in self.widths:
            return True
        if not torch.compiler.is_compiling():  # a tracer sees a tensor without a value there
            self._other = int(self.other_width)
        return self._other == _key(self.width)

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        if self.weight is None or self.bias is None:
            return None, None
        row = 0 if self.universal else self.row
        return self.inputs.take(self.weight[row], 0, self.width), self.inputs.take(self.bias[row], 0, self.width)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        if not self._tracks():
            raise ValueError(
                f"width: batch norms have no statistics for {self.width:g}; "
                "call slimtorch.dynamic.recalibrate_(model, data, [width]) after training"
            )
        row = self.row
        mean, variance = cast(Tensor, self.running_mean)[row], cast(Tensor, self.running_var)[row]
        return self.inputs.take(mean, 0, self.width), self.inputs.take(variance, 0, self.width)

    def reset(self) -> None:
        """Forget the statistics of the present width, and keep those that come under it."""
        if self.running_mean is None or self.running_var is None:
            return
        row = self.row
        if row == len(self.widths):
            self.other_width.fill_(_key(self.width))
        with torch.no_grad():
            self.running_mean[row] = 0
            self.running_var[row] = 1
            cast(Tensor, self.num_batches_tracked)[row] = 0

    def _values(self) -> dict[str, Tensor]:
        weight, bias = self._affine()
        values = {} if weight is None or bias is None else {"weight": weight, "bias": bias}
        if self.running_mean is not None:
            values["running_mean"], values["running_var"] = self._statistics()
            values["num_batches_tracked"] = cast(Tensor, self.num_batches_tracked)[self.row]
        return values

    def export(self) -> Any:
        """The plain layer of the present width, with copies of its values."""
        tracks = self.running_mean is not None
        made = self.twin(self.inputs.count(self.width), self.eps, self.momentum, self.weight is not None, tracks)
        return self._finish(made)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, {super().extra_repr()}"


class SlimmableBatchNorm1d(_BatchNorm):
    """``nn.BatchNorm1d`` at several widths: ``[N, C]`` or ``[N, C, L]``. As `SlimmableBatchNorm2d`."""

    twin = nn.BatchNorm1d
    dimensions = (2, 3)


class SlimmableBatchNorm2d(_BatchNorm):
    """``nn.BatchNorm2d`` at several widths: ``[N, C, H, W]``, each width with statistics of its own.

    Scale and shift are each width's own too, or one for all if ``universal`` (arXiv 1903.05134, section 3.3), where
    a width that is not among ``widths`` gets its statistics from `recalibrate_`.
    """

    twin = nn.BatchNorm2d
    dimensions = (4,)
