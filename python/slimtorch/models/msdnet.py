# SPDX-License-Identifier: Apache-2.0
"""MSDNet: features at several scales side by side, densely connected, with an exit after each block.

Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification" (1703.09844), section 4 and
appendix A. Coarse features, which a classifier needs, are there from the first layer on; a layer adds to each scale
what it makes of that scale and of the next finer one.

    scale 1  28x28   ● ──▶ ● ──▶ ●                   the finest scale is given up after each third of the layers
                      ╲     ╲     ╲                  (for three scales), and the channels are halved there
    scale 2  14x14    ● ──▶ ● ──▶ ● ──▶ ● ──▶ ●
                      ╲     ╲     ╲     ╲     ╲
    scale 3   7x7     ● ──▶ ● ──▶ ● ──▶ ● ──▶ ●      exits are at the coarsest scale
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimtorch.dynamic import Criterion, EarlyExit, MaxProbability


def _conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(c_out), nn.ReLU()]


def _new(c_in: int, c_out: int, stride: int, bottleneck: int | None) -> nn.Sequential:
    """3x3 with a 1x1 before it that leaves at most `bottleneck` times the outputs."""
    if bottleneck is None:
        return nn.Sequential(*_conv(c_in, c_out, 3, stride))
    inner = min(c_in, bottleneck * c_out)
    return nn.Sequential(*_conv(c_in, inner, 1), *_conv(inner, c_out, 3, stride))


class _First(nn.Module):
    """The image at every scale: each from the finer one by a convolution of stride 2."""

    def __init__(self, channels: int, widths: Sequence[int], stride: int) -> None:
        super().__init__()
        inputs = [channels, *widths[:-1]]
        self.scales = nn.ModuleList(
            nn.Sequential(*_conv(c_in, c_out, 3, 2 if index else stride))
            for index, (c_in, c_out) in enumerate(zip(inputs, widths, strict=True))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = []
        for scale in self.scales:
            x = scale(x)
            found.append(x)
        return tuple(found)


class _Layer(nn.Module):
    """Adds `growth` channels to each scale; `drop`: the finest scale ends here."""

    def __init__(
        self, widths: Sequence[int], growths: Sequence[int], bottlenecks: Sequence[int | None], drop: bool
    ) -> None:
        super().__init__()
        first = 1 if drop else 0
        self.first = first
        same, finer = [], []
        for scale in range(first, len(widths)):
            down = growths[scale] // 2 if scale else 0
            same.append(_new(widths[scale], growths[scale] - down, 1, bottlenecks[scale]))
            if scale:
                finer.append(_new(widths[scale - 1], down, 2, bottlenecks[scale - 1]))
        self.same = nn.ModuleList(same)
        self.finer = nn.ModuleList(finer)

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found = []
        for index, same in enumerate(self.same):
            scale = index + self.first
            parts = [x[scale], same(x[scale])]
            if scale:
                parts.insert(1, self.finer[scale - 1](x[scale - 1]))
            found.append(torch.cat(parts, 1))
        return tuple(found)


class _Transition(nn.Module):
    """1x1 convolutions that reduce the channels of each scale."""

    def __init__(self, widths: Sequence[int], reduced: Sequence[int]) -> None:
        super().__init__()
        pairs = zip(widths, reduced, strict=True)
        self.scales = nn.ModuleList(nn.Sequential(*_conv(c_in, c_out, 1)) for c_in, c_out in pairs)

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(scale(part) for scale, part in zip(self.scales, x, strict=True))


class _Classifier(nn.Module):
    """Of the coarsest scale: two convolutions of stride 2, an average, a linear layer."""

    def __init__(self, width: int, inner: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*_conv(width, inner, 3, 2), *_conv(inner, inner, 3, 2))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(inner, classes)

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        logits = self.linear(self.pool(self.features(x[-1])))
        assert isinstance(logits, Tensor)
        return logits


def msdnet(
    classes: int = 10,
    channels: int = 3,
    *,
    exits: int = 7,
    base: int = 4,
    step: int = 2,
    width: int = 16,
    growth: int = 6,
    factors: Sequence[int] = (1, 2, 4),
    bottleneck: Sequence[int | None] = (1, 2, 4),
    reduction: float = 0.5,
    head: int = 128,
    stride: int = 1,
    criterion: Criterion | None = None,
) -> EarlyExit:
    """An MSDNet for small images as an `EarlyExit`: input [N, channels, H, W], output [N, classes].

    Args:
        classes, channels: of the data.
        exits: blocks, each with an exit at its end.
        base, step: layers in the first block and in each further one (the paper's spans "even").
        width: channels of the finest scale at the start.
        growth: channels that a layer adds to the finest scale.
        factors: of width and growth, one per scale, finest first; their number is that of the scales.
        bottleneck: per scale, channels between 1x1 and 3x3 in multiples of what the 3x3 makes; None: no 1x1.
        reduction: of the channels where a scale is given up; 1: none.
        head: channels of the classifiers' convolutions.
        stride: of the first convolution; 2 halves all scales.
        criterion: None: `MaxProbability(0.9)`, as in the paper's budgeted batches.

    The defaults are a network for CIFAR. Exits are at "block0" …; the last one is the end of the network.

    Raises:
        TypeError: a size that is no int.
        ValueError: a size that is too small, or not one bottleneck for each scale.
    """
    sizes = {"exits": exits, "base": base, "step": step, "width": width, "growth": growth, "head": head}
    for name, size in {"classes": classes, "channels": channels, **sizes, "stride": stride}.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name}: expected an int, got {size!r}")
    if min(width, head, stride) < 1:
        raise ValueError(f"width, head, stride: expected at least 1, got {width}, {head} and {stride}")
    if exits < 2 or base < 1 or step < 1:
        raise ValueError(f"exits, base, step: expected at least 2, 1 and 1, got {exits}, {base} and {step}")
    if not factors or len(bottleneck) != len(factors):
        raise ValueError(f"bottleneck: expected one for each of {len(factors)} scales (1 up), got {len(bottleneck)}")
    if not 0 < reduction <= 1:
        raise ValueError(f"reduction: expected a number in (0, 1], got {reduction!r}")
    if growth * min(factors) < 2:
        raise ValueError(f"growth: expected 2 or more channels in a layer, got {growth * min(factors)}")
    layers = base + step * (exits - 1)
    interval = math.ceil(layers / len(factors))
    widths = [width * factor for factor in factors]
    growths = [growth * factor for factor in factors]
    inner = list(bottleneck)
    blocks: list[tuple[str, nn.Module]] = []
    heads: dict[str, nn.Module] = {}
    done = 0
    for block in range(exits):
        parts: list[nn.Module] = [_First(channels, widths, stride)] if not block else []
        for _ in range(step if block else base):
            drop = done > 0 and done % interval == 0
            parts.append(_Layer(widths, growths, inner, drop))
            widths = [w + g for w, g in zip(widths, growths, strict=True)]
            if drop:
                widths, growths, inner = widths[1:], growths[1:], inner[1:]
                if reduction < 1:
                    reduced = [max(1, int(w * reduction)) for w in widths]
                    parts.append(_Transition(widths, reduced))
                    widths = reduced
            done += 1
        classifier = _Classifier(widths[-1], head, classes)
        if block == exits - 1:
            parts.append(classifier)
        else:
            heads[f"block{block}"] = classifier
        blocks.append((f"block{block}", nn.Sequential(*parts)))
    network = EarlyExit(blocks, heads, MaxProbability(0.9) if criterion is None else criterion)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # He's, as the authors' code has it
            nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))
    return network
