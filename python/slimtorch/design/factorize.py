# SPDX-License-Identifier: Apache-2.0
"""`factorize_`: linear layers and convolutions get a low rank, started from their weights.

    weight (and what the layer gets on data) ──▶ rank: by energy, size, or a budget of parameters, MACs or measured time
                                                   └──▶ factors ──▶ proposal ──▶ kept where it is faster or smaller

Under a budget ranks are shared out over layers so that the product of what they keep of the sums of squares is largest
(Zhang et al., 1505.06798, rank selection for the whole model): no layer may starve, as it could where errors are added
up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtorch import _select
from slimtorch._budget import least_loss
from slimtorch._progress import shown
from slimtorch.design._checks import pair, positive
from slimtorch.design._decompose import (
    Kind,
    Rank,
    check_kind,
    composed,
    enough,
    factors,
    full_rank,
    spectrum,
    tucker_kept,
)
from slimtorch.design._moments import Moments, moments_of, passes
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
        energy: the smallest rank ("tucker": the two that have the fewest weights) that keeps this share, in (0, 1], of
            the sum of squares: of the outputs on data for linear layers and "channel", of the weight otherwise. A layer
            of "cp" stays dense where no rank that saves weights keeps it.
        rank: this one, or the full one where that is smaller; two numbers for "tucker".
        ratio: the largest rank with at most this share, in (0, 1), of each layer's weights; a layer stays dense where
            even rank 1 has more.
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
                object.__setattr__(self, "rank", pair(cast(Any, value), "rank"))  # of a list, as JSON has it
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
    """A layer that may be factorized, what is known of it, and the rank it gets (None: it stays dense, and why).

    `spectra` are kept while the moments that they are made of come and go.
    """

    name: str
    module: Dense
    config: LowRank
    moments: Moments | None = None
    rank: Rank | None = None
    reason: str = ""
    spectra: list[Tensor] | None = None

    @property
    def kind(self) -> str:
        return self.config.kind if isinstance(self.module, nn.Conv2d) else "channel"

    @property
    def weight(self) -> Tensor:
        return self.module.weight.detach().double()

    @property
    def of_outputs(self) -> bool:
        """Whether its moments are those of its outputs: all that principal components need, and often far fewer."""
        shape = self.module.weight.shape
        return self.kind == "channel" and shape[0] <= math.prod(shape[1:])

    @property
    def metric(self) -> dict[str, Tensor]:
        """What the squared error of the outputs is measured by, as `factors` and `spectrum` take it.

        Without a bias the mean of the outputs has to be met too. Nothing where nothing but a constant came: the weight
        alone decides then.
        """
        if self.moments is None:
            return {}
        own = self.moments.second if self.module.bias is None else self.moments.covariance.clone()
        total = float(own.diagonal().sum())
        if total <= 0:
            return {}
        if not self.of_outputs:
            own.diagonal().add_(_RIDGE * total / len(own))
            return {"metric": own}
        rows = self.weight.flatten(1)
        squares = float(rows.square().sum())
        return {"outputs": own.addmm_(rows, rows.T, alpha=_RIDGE * total / squares)}

    @property
    def ranked_on_data(self) -> bool:
        """Whether its rank depends on what its outputs are."""
        return self.kind == "channel" and (self.config.energy is not None or self.config.budget is not None)

    def spectrum(self) -> list[Tensor]:
        """What each further rank keeps; see `spectrum`."""
        if self.spectra is None:
            self.spectra = spectrum(self.weight, self.kind, **self.metric)
        return self.spectra

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
            squares, in place of the weights; what is lost on average goes into the bias. Gone through again, and kept
            if it is an iterator, where the moments of all layers would take more than half a gigabyte.
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
    subjects = [_Subject(name, module, own) for name, module, own in open_]
    inputs: dict[int, Any] = {}
    device = torch.device("cpu")
    if example_inputs is not None:
        args, kwargs = split_inputs(example_inputs)
        device = device_of(model, args, kwargs)
        with eval_mode(model), torch.no_grad():
            inputs = _capture(model, [subject.module for subject in subjects], args, kwargs)
    # Where the moments of all layers fit into memory, one pass has them; else ranks are found first.
    together = data is not None and passes(_layers(subjects), _of_outputs(subjects)) <= 1
    ranked = [subject for subject in subjects if subject.ranked_on_data]
    if isinstance(data, Iterator) and ranked and not together:
        data = list(data)
    for group in _gathered(model, subjects if together else ranked, data, keep=together):
        for subject in group:
            if subject.ranked_on_data:
                subject.spectrum()
    for own in {id(subject.config): subject.config for subject in subjects}.values():
        mine = [subject for subject in subjects if subject.config is own]
        if own.budget is None:
            for subject in mine:
                subject.rank = _alone(subject)
        else:
            _share_out(mine, own, inputs, device)
    reasons |= {subject.name: subject.reason for subject in subjects if subject.rank is None}
    left = [subject for subject in subjects if subject.rank is not None]
    proposals, fitted = [], 0
    for group in _gathered(model, left, None if together else data):
        fitted += sum(subject.moments is not None for subject in group)
        proposals += [_propose(subject) for subject in shown(group, "factors", len(group))]
    notes = [] if data is None else [f"fitted to the inputs of {fitted} layers on the data"]
    skipped = {name: (module, reasons[name]) for name, module, _ in chosen if name in reasons}
    report = replace_(
        model, proposals, objective=objective, example_inputs=example_inputs, min_gain=min_gain,
        title="Factorized", skipped=skipped, notes=notes,
    )  # fmt: skip
    dense = {layer.name for layer in report.layers if not layer.replaced}
    for subject in left:
        if subject.config.budget is not None and subject.name in dense:
            report.notes.append(f"the budget of {subject.config.budget} counted on {subject.name!r}, which stays dense")
    return report


def _layers(subjects: Sequence[_Subject]) -> list[tuple[str, Dense]]:
    return [(subject.name, subject.module) for subject in subjects]


def _of_outputs(subjects: Sequence[_Subject]) -> set[str]:
    return {subject.name for subject in subjects if subject.of_outputs}


def _gathered(
    model: nn.Module, subjects: Sequence[_Subject], data: Iterable[Any] | None, keep: bool = False
) -> Iterator[Sequence[_Subject]]:
    """All of the subjects, in groups, each with its moments on the data while it is looked at, or from then on."""
    if data is None or not subjects:
        yield subjects
        return
    waiting = {subject.name: subject for subject in subjects}
    for found in moments_of(model, _layers(subjects), data, _of_outputs(subjects)):
        group = [waiting.pop(name) for name in found]
        for subject in group:
            subject.moments = found[subject.name]
        found.clear()
        yield group
        for subject in group:
            subject.moments = subject.moments if keep else None
    yield list(waiting.values())  # those that the data never reach


def _propose(subject: _Subject) -> Proposal:
    module, rank = subject.module, cast(Rank, subject.rank)
    weight, metric, kind = subject.weight, subject.metric, subject.kind
    rows = weight.flatten(1)
    parts = factors(weight, rank, kind, **metric)
    made = parts[1] @ parts[0] if weight.dim() == 2 else composed(parts, kind)
    change = (weight - made).flatten(1)
    bias, error = None, _relative(change, rows, None)
    if subject.moments is not None:
        mean = subject.moments.mean
        if subject.of_outputs:  # the change of an output is what lies outside of the directions that were kept
            kept = parts[1].flatten(1)
            kept = kept / kept.norm(dim=0).clamp_min(1e-200)
            lost = mean - kept @ (kept.T @ mean)
            if metric:
                outputs = metric["outputs"]
                error = _share(float(outputs.trace() - ((outputs @ kept) * kept).sum()), float(outputs.trace()))
        else:
            lost = change @ mean
            if metric:
                error = _relative(change, rows, metric["metric"])
        if module.bias is not None:
            bias = module.bias.detach().double() + lost
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

    return _share(squares(change), squares(weight))


def _share(part: float, whole: float) -> float:
    return max(0.0, part) / whole if whole > 0 else 0.0


# --- the rank of a layer by itself ------------------------------------------------------------------------------------


def _alone(subject: _Subject) -> Rank | None:
    """By energy, as given, or by the share of weights; None, and the reason, where there is none."""
    config, most = subject.config, subject.most
    if config.rank is not None:
        if isinstance(most, tuple):
            given = cast("tuple[int, int]", config.rank)
            return min(given[0], most[0]), min(given[1], most[1])
        return min(cast(int, config.rank), most)
    dense = subject.module.weight.numel()
    if config.ratio is not None:
        found = _largest(subject, config.ratio * dense)
        if _weights(subject, found) <= config.ratio * dense:
            return found
        subject.reason = f"even rank 1 has more than {config.ratio:g} of its weights"
        return None
    energy = cast(float, config.energy)
    if subject.kind == "cp":
        limit = cast(int, _largest(subject, dense - 1))  # more would be no gain, and takes long to find
        least = _least(limit, lambda rank: 1 - _error(subject, rank) >= energy - 1e-9)
        if least < limit or 1 - _error(subject, least) >= energy - 1e-9:
            return least
        subject.reason = f"no rank that saves weights keeps {energy:g} of the sum of squares"
        return None
    if isinstance(most, tuple):
        return _cheapest(subject.weight, energy)
    return enough(subject.spectrum()[0], energy)


def _cheapest(weight: Tensor, energy: float) -> tuple[int, int]:
    """Of the two ranks of "tucker" that keep so much, those with the fewest weights."""
    out, c_in, height, width = weight.shape
    kept = tucker_kept(weight)
    first, last = (torch.arange(1, n + 1, device=weight.device) for n in kept.shape)
    weights = c_in * first[:, None] + height * width * first[:, None] * last + out * last
    least = int(torch.where(kept >= energy - 1e-12, weights, weights.max() + 1).argmin())
    return least // len(last) + 1, least % len(last) + 1


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
        given = [(x, calls) for x, calls in inputs.get(id(subject.module), []) if x.numel()]
        subject.reason = "the budget has room for it as it is"
        if budget != "parameters" and not given:
            subject.reason = "the example inputs never reach it"  # it costs nothing there
            continue
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
    kept = [shares.cumsum(0) for shares in subject.spectrum()]

    def loss(rank: Rank) -> float:  # of "tucker" the product of both
        each = rank if isinstance(rank, tuple) else (rank,)
        return -sum(math.log(max(1e-12, float(own[r - 1]))) for own, r in zip(kept, each, strict=True))

    return [loss(rank) for rank in options]
