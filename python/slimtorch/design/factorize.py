# SPDX-License-Identifier: Apache-2.0
"""`factorize_`: linear layers and convolutions get a low rank, started from their weights.

    weight (and what the layer gets on data) ──▶ rank: by energy, size, or a budget of parameters, MACs or measured time
                                                   └──▶ factors ──▶ proposal ──▶ kept where it is faster or smaller

Under a budget ranks are shared out over layers so that the product of what they keep of the sums of squares is largest
(Zhang et al., 1505.06798, section 3.3): no layer may starve, as it could where errors are added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtorch import _select
from slimtorch._budget import least_loss
from slimtorch._progress import shown
from slimtorch.design._checks import pair, positive
from slimtorch.design._decompose import Kind, Rank, check_kind, composed, factors, full_rank, spectrum
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
from slimtorch.design.low_rank import LowRankConv2d, LowRankLinear
from slimtorch.measure import count_macs, device_of, eval_mode, interleave, split_inputs
from slimtorch.packing import _capture, _judge, _plain_twin

_RIDGE = 1e-6  # on the diagonal of the second moment, in units of its mean: inputs that never occur keep their weights
_OPTIONS = 16  # ranks that a budget chooses from in each layer
_SAMPLES, _SAMPLE_SECONDS = 5, 1e-3  # of timing a rank

Dense = nn.Linear | nn.Conv2d
_Inputs = Sequence[tuple[Tensor, int]]


@dataclass(frozen=True)
class LowRank:
    """How layers are factorized. Exactly one of the first six says with which rank.

    Attributes:
        energy: the smallest rank that keeps this share, in (0, 1], of the sum of squares: of the outputs on data for
            linear layers and "channel", of the weight otherwise.
        rank: this one, or the full one where that is smaller; two numbers for "tucker".
        ratio: the largest rank with at most this share, in (0, 1), of each layer's weights.
        parameters: a budget for all layers that the configuration is for: a share in (0, 1) of their weights, or a
            whole number of them.
        macs: the same of multiply-accumulates on the example inputs.
        latency: a share in (0, 1) of the layers' time on the example inputs, measured for each rank that is tried.
        kind: of convolutions, "channel", "spatial", "tucker" or "cp": see :mod:`slimtorch.design.low_rank`.
    """

    energy: float | None = None
    rank: int | tuple[int, int] | None = None
    ratio: float | None = None
    parameters: float | int | None = None
    macs: float | int | None = None
    latency: float | None = None
    kind: Kind = "channel"

    def __post_init__(self) -> None:
        names = ("energy", "rank", "ratio", "parameters", "macs", "latency")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"LowRank: expected exactly one of {', '.join(names)}, got {', '.join(given) or 'none'}")
        check_kind(self.kind)
        value = getattr(self, given[0])
        if given[0] == "rank":
            if isinstance(value, int):
                positive(value, "rank")
            else:
                pair(value, "rank")
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{given[0]}: expected a number, got {value!r}")
        if given[0] in ("parameters", "macs") and isinstance(value, int):
            positive(value, given[0])
        elif not (0 < value < 1 or (given[0] == "energy" and value == 1)):
            bounds = "(0, 1]" if given[0] == "energy" else "(0, 1)"
            raise ValueError(f"{given[0]}: expected a share in {bounds}, got {value!r}")

    @property
    def budget(self) -> str | None:
        """Which of the three budgets it sets, if any."""
        return next((name for name in ("parameters", "macs", "latency") if getattr(self, name) is not None), None)


@dataclass
class _Subject:
    """A layer that may be factorized, what is known of it, and the rank it gets (None: it stays dense)."""

    name: str
    module: Dense
    config: LowRank
    moments: Moments | None
    rank: Rank | None = None

    @property
    def kind(self) -> str:
        return self.config.kind if isinstance(self.module, nn.Conv2d) else "channel"

    @property
    def weight(self) -> Tensor:
        return self.module.weight.detach().double()

    @property
    def metric(self) -> Tensor | None:
        """What the squared error of the outputs is measured by: without a bias their mean has to be met too."""
        if self.moments is None:
            return None
        own = self.moments.second if self.module.bias is None else self.moments.covariance
        scale = float(own.diagonal().mean())
        if scale <= 0 or not math.isfinite(scale):  # nothing but a constant came: the weight alone decides
            return None
        return own + _RIDGE * scale * torch.eye(len(own), dtype=own.dtype, device=own.device)

    @property
    def most(self) -> Rank:
        return full_rank(self.module.weight.shape, self.kind)

    def at(self, share: float) -> Rank:
        """The rank that is a share of the full one, at least 1."""
        most = self.most
        if isinstance(most, tuple):
            return max(1, round(share * most[0])), max(1, round(share * most[1]))
        return max(1, round(share * most))


def factorize_(
    model: nn.Module,
    config: LowRank | Mapping[str, LowRank | None],
    example_inputs: Any = None,
    data: Iterable[Any] | None = None,
    *,
    objective: Objective = "size",
    min_gain: float = 0.05,
    filter_fn: _select.FilterFn | None = None,
) -> ReplaceReport:
    """Puts `slim.design.LowRankLinear` and `LowRankConv2d` in place of dense layers, where it gains.

    The module objects stay and become layers of the other class, started from their weights; optimizers must be given
    the new parameters. What comes out is made of plain linear layers and convolutions: it trains, is pruned, packed,
    saved and exported like any other model.

    Args:
        model: any module, or a single layer (whose name is then "").
        config: one `LowRank` for all linear layers and convolutions, or a mapping from glob of names to one: the first
            glob that matches wins, None leaves a layer alone. A budget is for all layers of one configuration together.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments that the model takes: a
            typical batch. Needed for `macs`, `latency` and objective "latency".
        data: batches `inputs` or `(inputs, *targets)`: the outputs on them are then kept as far as possible, in least
            squares, in place of the weights; what is lost on average goes into the bias.
        objective: "latency": a layer is replaced where that measured faster by `min_gain`, and the whole model is not
            slower; "size": where it has fewer parameters; None: always.
        min_gain: share of the time.
        filter_fn: `filter_fn(module, name) -> bool`; layers for which it is false are left alone.

    Returns:
        What was proposed and what was kept, per layer; prints as a table.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a budget that cannot be met (the message has the least that can), inputs or data that do not fit,
            weights or activations that are not finite, an unknown objective, "latency" without inputs, a glob that
            matches nothing. On any error the model is left as it was.
    """
    values = list(config.values()) if isinstance(config, Mapping) else [config]
    if isinstance(config, Mapping) and not config:
        raise ValueError("config: expected at least one glob, got an empty mapping")
    for value in values:
        if value is not None and not isinstance(value, LowRank):
            raise TypeError(f"config: expected LowRank or a mapping of globs to them, got {value!r}")
        budget = None if value is None else value.budget
        if budget in ("macs", "latency") and example_inputs is None:
            raise ValueError(f"example_inputs: a budget of {budget} needs inputs to measure with, got None")
    check_objective(objective, example_inputs)
    check_gain(min_gain)
    chosen = _select.resolve(model, config, filter_fn, types=(nn.Linear, nn.Conv2d))
    inside = inside_replacements(model)
    chosen = [entry for entry in chosen if id(entry[1]) not in inside]
    reasons = obstacles(model, [(name, module) for name, module, _ in chosen])
    for name, module, own in chosen:
        if name not in reasons and isinstance(module, nn.Conv2d) and module.groups != 1:
            reasons[name] = "it has groups"
        two = own.kind == "tucker" and isinstance(module, nn.Conv2d)
        if own.rank is not None and isinstance(own.rank, tuple) != two:
            raise ValueError(f"rank: expected {'two numbers' if two else 'one'} for layer {name!r}, got {own.rank!r}")
    open_ = [(name, cast(Dense, module), own) for name, module, own in chosen if name not in reasons]
    moments = moments_of(model, [(name, module) for name, module, _ in open_], data) if data is not None else {}
    subjects = [_Subject(name, module, own, moments.get(name)) for name, module, own in open_]
    inputs: dict[int, Any] = {}
    device = torch.device("cpu")
    if example_inputs is not None:
        args, kwargs = split_inputs(example_inputs)
        device = device_of(model, args, kwargs)
        with eval_mode(model), torch.no_grad():
            inputs = _capture(model, [subject.module for subject in subjects], args, kwargs)
    for own in {id(subject.config): subject.config for subject in subjects}.values():
        mine = [subject for subject in subjects if subject.config is own]
        if own.budget is None:
            for subject in mine:
                subject.rank = _alone(subject)
        else:
            _share_out(mine, own, inputs, device)
    notes = [] if data is None else [f"fitted to the inputs of {len(moments)} layers on the data"]
    for subject in subjects:
        if subject.rank is None:
            reasons[subject.name] = "the budget has room for it as it is"
    proposals = [_propose(subject) for subject in shown(subjects, "factors") if subject.rank is not None]
    skipped = {name: (module, reasons[name]) for name, module, _ in chosen if name in reasons}
    return replace_(
        model, proposals, objective=objective, example_inputs=example_inputs, min_gain=min_gain,
        title="Factorized", skipped=skipped, notes=notes,
    )  # fmt: skip


def _propose(subject: _Subject) -> Proposal:
    module, rank = subject.module, cast(Rank, subject.rank)
    weight, metric, kind = subject.weight, subject.metric, subject.kind
    parts = factors(weight, rank, kind, metric)
    made = parts[1] @ parts[0] if weight.dim() == 2 else composed(parts, kind)
    change = (weight - made).flatten(1)
    bias, error = None, _relative(change, weight.flatten(1), None)
    if subject.moments is not None and metric is not None:
        error = _relative(change, weight.flatten(1), metric)
        if module.bias is not None:
            bias = module.bias.detach().double() + change @ subject.moments.mean
    replacement: nn.Module
    if isinstance(module, nn.Linear):
        replacement = LowRankLinear.of_factors(module, parts, bias)
    else:
        replacement = LowRankConv2d.of_factors(module, parts, kind, bias)
    own = cast(Any, replacement).rank  # of "tucker" what adds nothing is left out
    words = f"{'SVD' if isinstance(module, nn.Linear) else kind}, rank {_words(own)}"
    return Proposal(subject.name, module, replacement, words, error)


def _words(rank: Rank) -> str:
    return f"{rank[0]} and {rank[1]}" if isinstance(rank, tuple) else str(rank)


def _relative(change: Tensor, weight: Tensor, metric: Tensor | None) -> float:
    """Squared error of outputs, or of weights, over what there was."""
    def squares(rows: Tensor) -> float:
        return float(rows.square().sum() if metric is None else ((rows @ metric) * rows).sum())

    return max(0.0, squares(change)) / max(squares(weight), 1e-300)


# --- the rank of a layer by itself ------------------------------------------------------------------------------------


def _alone(subject: _Subject) -> Rank:
    """By energy, as given, or by the share of weights."""
    config, most = subject.config, subject.most
    if config.rank is not None:
        if isinstance(most, tuple):
            given = cast("tuple[int, int]", config.rank)
            return min(given[0], most[0]), min(given[1], most[1])
        return min(cast(int, config.rank), most)
    if config.ratio is not None:
        return _largest(subject, config.ratio * subject.module.weight.numel())
    energy = cast(float, config.energy)
    if subject.kind == "cp":
        most = _largest(subject, subject.module.weight.numel() - 1)  # more would be no gain, and takes long to find
        return _least(cast(int, most), lambda rank: 1 - _error(subject, rank) >= energy - 1e-9)
    found = [_enough(shares, energy) for shares in spectrum(subject.weight, subject.kind, subject.metric)]
    return (found[0], found[1]) if len(found) == 2 else found[0]


def _enough(shares: Tensor, energy: float) -> int:
    kept = shares.cumsum(0)
    return min(int((kept < energy - 1e-12).sum()) + 1, len(shares))


def _least(most: int, good: Callable[[int], bool]) -> int:
    """The smallest rank in 1 … most that is good, if more never is worse; `most` where none is."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle + 1, high)
    return low


def _largest(subject: _Subject, weights: float) -> Rank:
    """The largest rank with at most so many weights, at least 1; the two of "tucker" are equal shares of the full."""
    most = subject.most
    steps = max(most) if isinstance(most, tuple) else most
    return subject.at((_least(steps + 1, lambda n: _weights(subject, subject.at(n / steps)) > weights) - 1) / steps)


def _weights(subject: _Subject, rank: Rank) -> int:
    return sum(part.weight.numel() for part in _empty(subject, rank, "meta"))


def _empty(subject: _Subject, rank: Rank, device: Any) -> Any:
    """A layer of this rank with values of no meaning."""
    module = subject.module
    own: dict[str, Any] = {"bias": module.bias is not None, "device": device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        return LowRankLinear(module.in_features, module.out_features, cast(int, rank), **own)
    return LowRankConv2d(
        module.in_channels, module.out_channels, module.kernel_size, rank, kind=subject.kind, stride=module.stride,
        padding=cast(Any, module.padding), dilation=module.dilation, padding_mode=module.padding_mode, **own,
    )  # fmt: skip


def _error(subject: _Subject, rank: Rank) -> float:
    weight = subject.weight
    return _relative((weight - composed(factors(weight, rank, subject.kind), subject.kind)).flatten(1),
                     weight.flatten(1), None)  # fmt: skip


# --- a budget for several ---------------------------------------------------------------------------------------------


def _share_out(subjects: Sequence[_Subject], config: LowRank, inputs: Mapping[int, Any], device: torch.device) -> None:
    """Sets the ranks so that the layers together keep as much as the budget allows."""
    budget = cast(str, config.budget)
    names, costs, losses, ranks = [], [], [], []
    for subject in shown(subjects, f"ranks by {budget}"):
        given = inputs.get(id(subject.module), [])
        if budget != "parameters" and not given:
            continue  # the inputs never reach it: it costs nothing there
        options = _options(subject)
        cost = _costs(subject, options, budget, given, device)
        names.append(subject)
        ranks.append([None, *options])
        costs.append(cost)
        losses.append([0.0, *_losses(subject, options)])
    if not names:
        return
    value = getattr(config, budget)
    dense = sum(cost[0] for cost in costs)
    allowed = float(value) if isinstance(value, int) else value * dense
    least = sum(min(cost) for cost in costs)
    if least > allowed * (1 + 1e-12):
        unit = {"parameters": "weights", "macs": "MACs", "latency": "seconds"}[budget]
        raise ValueError(
            f"{budget}: expected at least {least / dense:.3g} of the {dense:.4g} {unit} of these layers, the least "
            f"that can be reached, got {allowed / dense:.3g}"
        )
    for subject, choice, own in zip(names, least_loss(costs, losses, allowed), ranks, strict=True):
        subject.rank = own[choice]


def _options(subject: _Subject) -> list[Rank]:
    """Ranks to choose from, fewer than the full one by equal factors: those that save weights at all."""
    count = _OPTIONS // 2 if subject.kind == "cp" else _OPTIONS
    dense = subject.module.weight.numel()
    most = subject.most
    top = _largest(subject, dense - 1)
    largest = max(top) / max(most) if isinstance(top, tuple) and isinstance(most, tuple) else top / most  # type: ignore[operator]
    smallest = 1 / (max(most) if isinstance(most, tuple) else most)
    shares = [largest * (smallest / largest) ** (i / (count - 1)) for i in range(count)]
    return list(dict.fromkeys(subject.at(share) for share in shares))


def _costs(
    subject: _Subject, options: Sequence[Rank], budget: str, inputs: _Inputs, device: torch.device
) -> list[float]:
    """Of the dense layer, then of each rank."""
    twin = _plain_twin(subject.module)
    if budget == "parameters":
        return [float(twin.weight.numel()), *(float(_weights(subject, rank)) for rank in options)]
    layers: list[nn.Module] = [twin, *(_empty(subject, rank, device).eval() for rank in options)]
    if budget == "macs":
        return [float(sum(calls * count_macs(layer, x)[1] for x, calls in inputs)) for layer in layers]

    def runner(layer: nn.Module) -> Callable[[], None]:
        def run() -> None:
            for x, calls in inputs:
                for _ in range(calls):
                    layer(x)

        return run

    with torch.no_grad():
        times = interleave(
            {str(index): runner(layer) for index, layer in enumerate(layers)},
            samples=_SAMPLES, min_sample_seconds=_SAMPLE_SECONDS, device=device,
        )  # fmt: skip
    return _judge(list(times.values()))[1]


def _losses(subject: _Subject, options: Sequence[Rank]) -> list[float]:
    """Minus the logarithm of what each rank keeps of the sum of squares: their product over layers is to be largest."""
    if subject.kind == "cp":
        return [-math.log(max(1e-12, 1 - _error(subject, rank))) for rank in options]
    kept = [shares.cumsum(0) for shares in spectrum(subject.weight, subject.kind, subject.metric)]

    def loss(rank: Rank) -> float:  # of "tucker" the product of both
        each = rank if isinstance(rank, tuple) else (rank,)
        return -sum(math.log(max(1e-12, float(own[r - 1]))) for own, r in zip(kept, each, strict=True))

    return [loss(rank) for rank in options]
