# SPDX-License-Identifier: Apache-2.0
"""`separate_`: convolutions become depthwise and 1x1, started from their weights.

    weight ──SVD per input channel──▶ kernels, mix ──least squares on real patches, by turns──▶ proposal ──▶ kept where
                                                                                               it is faster or smaller

Guo et al., "Network Decoupling: From Regular to Depthwise Separable Convolutions" (1808.05517), has the first step. The
second takes the mean squared error of the outputs on data in place of that of the weights, as Zhang et al. do for
low-rank convolutions (1505.06798).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtorch import _select
from slimtorch.design._checks import positive
from slimtorch.design._decompose import enough, shares
from slimtorch.design._moments import Moments, moments_of
from slimtorch.design._replace import (
    Objective,
    Proposal,
    ReplaceReport,
    check_gain,
    check_objective,
    inside_replacements,
    obstacles,
    replace_,
)
from slimtorch.design.convolutions import DepthwiseSeparableConv2d, separated

_RIDGE = 1e-5  # on the diagonal of the second moment, in units of its mean: inputs that never occur keep their weights


@dataclass(frozen=True)
class Separable:
    """How a convolution is separated.

    Attributes:
        multiplier: kernels per input channel; more are nearer to the dense layer and cost as many times more. With as
            many as the kernel has places, or the layer outputs, nothing is lost, and no more are made. None with
            `energy` None: 1.
        energy: in place of `multiplier`: the fewest that keep this share, in (0, 1], of the weight's sum of squares.
        rounds: of least squares on the data, where there is some; 0 keeps the start from the weight alone.
    """

    multiplier: int | None = None
    energy: float | None = None
    rounds: int = 10

    def __post_init__(self) -> None:
        if self.multiplier is not None:
            positive(self.multiplier, "multiplier")
            if self.energy is not None:
                raise ValueError(f"energy: expected None where multiplier={self.multiplier} is given")
        if self.energy is not None:
            if isinstance(self.energy, bool) or not isinstance(self.energy, (int, float)):
                raise TypeError(f"energy: expected a number, got {self.energy!r}")
            if not 0 < self.energy <= 1:
                raise ValueError(f"energy: expected a share in (0, 1], got {self.energy}")
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int):
            raise TypeError(f"rounds: expected an int, got {self.rounds!r}")
        if self.rounds < 0:
            raise ValueError(f"rounds: expected at least 0, got {self.rounds}")


def separate_(
    model: nn.Module,
    config: Separable | Mapping[str, Separable | None] | None = None,
    example_inputs: Any = None,
    data: Iterable[Any] | None = None,
    *,
    objective: Objective = "latency",
    min_gain: float = 0.05,
    filter_fn: _select.FilterFn | None = None,
) -> ReplaceReport:
    """Puts `slim.design.DepthwiseSeparableConv2d` in place of convolutions, where it gains; the module objects stay.

    Convolutions with a kernel above 1x1 and without groups are considered. A first convolution, with few input
    channels, loses most: leave it out with `filter_fn` or a mapping. Optimizers must be given the new parameters.

    Args:
        model: any module, or a single layer (whose name is then "").
        config: one `Separable` for all layers, or a mapping from glob of layer names to one: the first glob that
            matches wins, None leaves a layer alone. None: `Separable()`.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments that the model takes:
            a typical batch, on which "latency" is measured.
        data: batches `inputs` or `(inputs, *targets)`: weights are then fitted to the activations of the dense model.
            Gone through again, and kept if it is an iterator, where the moments of all layers would take more than half
            a gigabyte.
        objective: "latency": a layer is replaced where that measured faster, by `min_gain`, and the whole model is not
            slower; "size": where it has fewer parameters; None: always.
        min_gain: share of the time.
        filter_fn: `filter_fn(module, name) -> bool`; layers for which it is false are left alone.

    Returns:
        What was proposed and what was kept, per layer; prints as a table.

    Raises:
        TypeError: `config`, `data` or `min_gain` is of another kind.
        ValueError: inputs or data that do not fit, weights or activations that are not finite, an unknown objective,
            "latency" without inputs, a glob that matches nothing. On any error the model is left as it was.
    """
    config = Separable() if config is None else config
    values = list(config.values()) if isinstance(config, Mapping) else [config]
    if isinstance(config, Mapping) and not config:
        raise ValueError("config: expected at least one glob, got an empty mapping")
    for value in values:
        if value is not None and not isinstance(value, Separable):
            raise TypeError(f"config: expected Separable or a mapping of globs to them, got {value!r}")
    check_objective(objective, example_inputs)
    check_gain(min_gain)
    chosen = _select.resolve(model, config, filter_fn, types=(nn.Conv2d,))
    inside = inside_replacements(model)
    chosen = [entry for entry in chosen if id(entry[1]) not in inside]
    reasons = obstacles(model, [(name, module) for name, module, _ in chosen])
    for name, module, _ in chosen:
        own = cast(nn.Conv2d, module)
        if name not in reasons and own.groups != 1:
            reasons[name] = "it has groups"
        elif name not in reasons and own.kernel_size[0] * own.kernel_size[1] == 1:
            reasons[name] = "its kernel is 1x1"
    open_ = [(name, cast(nn.Conv2d, module), c) for name, module, c in chosen if name not in reasons]
    fitted = {name: (module, own) for name, module, own in open_ if own.rounds}
    made: dict[str, Proposal] = {}
    if data is not None and fitted:
        for found in moments_of(model, [(name, module) for name, (module, _) in fitted.items()], data):
            made |= {name: _propose(name, *fitted[name], moments) for name, moments in found.items()}
    notes = [] if data is None else [f"fitted to {len(made)} layers' inputs on the data; error: of the outputs"]
    proposals = [made.get(name) or _propose(name, module, own, None) for name, module, own in open_]
    skipped = {name: (module, reasons[name]) for name, module, _ in chosen if name in reasons}
    return replace_(
        model, proposals, objective=objective, example_inputs=example_inputs, min_gain=min_gain,
        title="Separated into depthwise and 1x1", skipped=skipped, notes=notes,
    )  # fmt: skip


def _propose(name: str, module: nn.Conv2d, config: Separable, moments: Moments | None) -> Proposal:
    weight = module.weight.detach().double()
    multiplier = _multiplier(weight, config)
    error: float | None
    kernels, mix = separated(weight, multiplier)
    bias = None
    if moments is None:
        change = weight - torch.einsum("oim,imk->oik", mix, kernels).reshape(weight.shape)
        error = float(change.square().sum() / weight.square().sum().clamp_min(1e-300))
    else:
        # With a bias, what the patches are on average is its business; without one, least squares has to fit it too.
        metric = moments.second if module.bias is None else moments.covariance
        kernels, mix, change = fit(weight, kernels, mix, metric, config.rounds)
        if module.bias is not None:
            bias = module.bias.detach().double() + change @ moments.mean
        rows = weight.flatten(1)
        variance = float(((rows @ moments.covariance) * rows).sum())
        # outputs that never change have none to compare with
        error = float(((change @ metric) * change).sum()) / variance if variance > 0 else None
    replacement = DepthwiseSeparableConv2d.of_factors(module, kernels, mix, bias)
    kind = "depthwise + 1x1" if multiplier == 1 else f"{multiplier} x depthwise + 1x1"
    return Proposal(name, module, replacement, kind, error)


def _multiplier(weight: Tensor, config: Separable) -> int:
    """At most as many as [out, taps] of one input channel have a use for: more would be zero and stay so."""
    squares = torch.linalg.svdvals(weight.flatten(2).transpose(0, 1)).square().sum(0)  # over input channels
    if config.energy is None:
        return min(config.multiplier or 1, len(squares))
    return enough(shares(squares), config.energy)


def fit(weight: Tensor, kernels: Tensor, mix: Tensor, metric: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares on activations, by turns: the mix at once, then the kernels of each input channel in turn.

    Each step solves its part exactly, so the error never grows.

    Args:
        weight: [out, in, kernel height, kernel width], float64.
        kernels: [in, multiplier, taps], to start from; mix: [out, in, multiplier].
        metric: second moment or covariance of the patches, [in · taps, in · taps].
        rounds: how often.

    Returns:
        Kernels and mix of the same shapes, and what is left of the weight, [out, in · taps].
    """
    c_in, multiplier, taps = kernels.shape
    rows = weight.flatten(1)
    scale = float(metric.diagonal().mean())
    if scale <= 0:  # nothing but a constant came: the weight's own factors are as good
        metric, scale = torch.eye(len(metric), dtype=metric.dtype, device=metric.device), 1.0
    metric = metric + _RIDGE * scale * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    goal = rows @ metric  # [out, in · taps]
    kernels, mix = kernels.clone(), mix.clone()
    small = torch.eye(multiplier, dtype=weight.dtype, device=weight.device)
    tiny = 1e-200  # in place of zero: even a small share of it can still be divided by
    for _ in range(rounds):
        # Mix: rows of D are the kernels in the places of their channel; mix = W S Dᵀ (D S Dᵀ)⁻¹.
        d = weight.new_zeros(c_in, multiplier, c_in, taps)
        index = torch.arange(c_in, device=weight.device)
        d[index, :, index] = kernels
        d = d.reshape(c_in * multiplier, c_in * taps)
        ds = d @ metric
        gram = ds @ d.T
        gram.diagonal().add_(1e-10 * gram.diagonal().mean().clamp_min(tiny))  # kernels that are zero
        mix = torch.linalg.solve(gram, (goal @ d.T).T).T.reshape(mix.shape).contiguous()
        # Kernels of channel i, the others fixed: (PᵢᵀPᵢ) dᵢ Sᵢᵢ = Pᵢᵀ (W - P D without i) S
        left = rows - mix.flatten(1) @ d
        for i in range(c_in):
            here = slice(i * taps, (i + 1) * taps)
            p = mix[:, i]  # [out, multiplier]
            square = p.T @ p
            square = square + 1e-10 * square.diagonal().mean().clamp_min(tiny) * small
            pull = p.T @ left @ metric[:, here]
            step = torch.linalg.solve(metric[here, here], torch.linalg.solve(square, pull).T).T
            kernels[i] += step
            left[:, here] -= p @ step
    left = rows - torch.einsum("oim,imk->oik", mix, kernels).flatten(1)
    # Equal norms, so that neither is trained much faster than the other.
    a, b = kernels.norm(dim=2), mix.norm(dim=0)
    balance = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-300)).sqrt(), torch.ones_like(a))
    return kernels * balance[:, :, None], mix / balance, left
