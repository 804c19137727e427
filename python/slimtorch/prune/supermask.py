# SPDX-License-Identifier: Apache-2.0
"""Supermasks: masks that make an untrained network work (Zhou et al., "Deconstructing Lottery Tickets", 1905.01067,
section 5; by scores: Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", 1911.13299).

    slim.prune.supermask.supermask_(model, Bernoulli(rescale=True))  weights are frozen, scores m are what is trained
    …any training loop over the parameters that require gradients…
    supermask.sampled(model, accuracy, samples=10, seed=0)   as the paper evaluates
    supermask.bake_(model)                                   an ordinary pruned model; slim.pack_ runs it

    layer.weight ──▶ original · mask · scale                 mask ~ Bernoulli(sigmoid(m)) in training, p >= 1/2 in eval
                                                             scale = weights / ones, with rescale=True

Supermasks that need no training of their own, drawn by a criterion, are tickets: `by_criterion`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimtorch import _select
from slimtorch.measure import eval_mode
from slimtorch.prune.criteria import Criterion, check_share
from slimtorch.prune.deconstruct import choose_masks, mask_1
from slimtorch.prune.lottery import Ticket
from slimtorch.prune.magnitude import check_count, check_weight, keep_largest
from slimtorch.prune.mask import MASKABLE, attach, detach, install
from slimtorch.report import Table

Found = TypeVar("Found")
Weights = Literal["initial", "signed_constant"]


def by_criterion(
    ticket: Ticket,
    criterion: str | Criterion,
    kept: float | Mapping[str, float],
    *,
    weights: Weights = "initial",
    seed: int = 0,
) -> Ticket:
    """A supermask from a trained network over the weights that it started from, with no training of its own.

    Apply it and evaluate: "large_final_same_sign" is what the paper finds best (86 % on MNIST).

    Args:
        ticket: trained; usually the dense network, round 0 of a search.
        criterion: a name of `slimtorch.prune.deconstruct.CRITERIA` or a function (initial, final) -> scores.
        kept: share of each layer's weights, in (0, 1]: one number, or by layer name.
        weights: "initial", or "signed_constant": ±α with their signs, α the standard deviation of the layer's.
        seed: of the order in which ties are broken.

    Raises:
        ValueError: see `slimtorch.prune.deconstruct.choose_masks`.
    """
    _check_weights(weights)
    chosen = choose_masks(ticket, criterion, kept, seed=seed)
    return chosen if weights == "initial" else mask_1(chosen, "constant", keep_sign=True)


@dataclass(frozen=True)
class Bernoulli:
    """Learn the probability with which each weight is kept: mask ~ Bernoulli(sigmoid(m)), drawn at each forward pass
    in train mode from torch's generator, as dropout draws. Gradients pass through the draw to the probability.

    In eval mode a weight is kept where its probability is at least one half. See `sampled` and `expected` for others.

    Args:
        start: m of every weight at first; 0: kept with probability one half.
        rescale: multiply the weights of a layer by (their number / number of ones in the mask) at each draw, "dynamic
            weight rescaling".
        weights: "initial" leaves them; "signed_constant" sets them to ±α with their signs, α the standard deviation of
            the layer's.
    """

    start: float = 0.0
    rescale: bool = False
    weights: Weights = "initial"

    def __post_init__(self) -> None:
        if isinstance(self.start, bool) or not isinstance(self.start, (int, float)) or not math.isfinite(self.start):
            raise ValueError(f"start: expected a finite number, got {self.start!r}")
        _check_weights(self.weights)


@dataclass(frozen=True)
class TopK:
    """Learn a score for each weight and keep those of the largest |score| of each layer: edge-popup (1911.13299,
    section 3). Gradients pass through the choice to |score|. No chance is involved; eval and train mode are alike.

    Args:
        kept: share of each layer's weights, in (0, 1].
        rescale: multiply the weights by (their number / number of ones).
        weights: as for `Bernoulli`; the paper's best is "signed_constant".
        seed: of the first scores, uniform in ±1/√(inputs of the layer).
    """

    kept: float = 0.5
    rescale: bool = False
    weights: Weights = "initial"
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("kept", self.kept)
        _check_weights(self.weights)
        check_count("seed", self.seed, 0)


Config = Bernoulli | TopK


class Scores(nn.Module, ABC):
    """The parametrization of a supermask: frozen weights under a mask that scores decide.

    Args:
        scores: floating, the weight's shape; becomes the parameter `scores`.
        rescale: see `Bernoulli`.
    """

    def __init__(self, scores: Tensor, rescale: bool) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.rescale = rescale
        self._held: Tensor | None = None  # set by `_holding` only; bool, or a share for each weight

    @abstractmethod
    def likely(self) -> Tensor:
        """The mask of eval mode: bool, the weight's shape."""

    @abstractmethod
    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """A mask of train mode: bool, the weight's shape."""

    @abstractmethod
    def shares(self) -> Tensor:
        """How often each weight is kept in train mode, in [0, 1]."""

    @abstractmethod
    def _slope(self) -> Tensor:
        """What the straight-through estimator takes for the derivative of the mask by the score."""

    def scale(self, mask: Tensor) -> Tensor:
        """The factor of the weights under a mask, bool or shares: a scalar tensor."""
        if not self.rescale:
            return torch.ones((), dtype=self.scores.dtype, device=self.scores.device)
        ones = mask.sum(dtype=torch.float32).clamp(min=1)  # an empty draw gives zeros, not infinities
        return (mask.numel() / ones).to(self.scores.dtype)

    def forward(self, original: Tensor) -> Tensor:
        """`original` under the mask of this moment, times its scale; same shape and dtype."""
        if self._held is not None:
            mask = self._held
        else:
            mask = self.draw() if self.training else self.likely()
        ones = mask.to(original.dtype) * self.scale(mask)  # a product of numbers: `where` is slower on CPUs
        if mask.dtype != torch.bool or not (torch.is_grad_enabled() and self.scores.requires_grad):
            return original * ones
        return cast(Tensor, _StraightThrough.apply(original, self.scores, ones, self._slope() * self.scale(mask)))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Lets `layer.weight = tensor` work: the mask applies to the new weight. ValueError on another shape."""
        if weight.shape != self.scores.shape:
            raise ValueError(f"weight: expected shape {tuple(self.scores.shape)}, got {tuple(weight.shape)}")
        return weight


class BernoulliScores(Scores):
    """`Bernoulli` of one layer."""

    def likely(self) -> Tensor:
        return self.scores.detach() >= 0

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        probability = self.shares()
        if generator is None:
            return torch.rand_like(probability) < probability
        chance = torch.rand(probability.shape, generator=generator, dtype=torch.float32)
        return chance.to(probability) < probability

    def shares(self) -> Tensor:
        return self.scores.detach().float().sigmoid()

    def _slope(self) -> Tensor:
        p = self.scores.detach().sigmoid()
        return p * (1 - p)


class TopKScores(Scores):
    """`TopK` of one layer.

    Args:
        kept: share of the weights.
    """

    def __init__(self, scores: Tensor, rescale: bool, kept: float) -> None:
        super().__init__(scores, rescale)
        self.kept = kept

    def likely(self) -> Tensor:
        size = self.scores.numel()
        flat = self.scores.detach().abs().flatten().float()
        return keep_largest(flat, round((1 - self.kept) * size)).view(self.scores.shape)

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        return self.likely()

    def shares(self) -> Tensor:
        return self.likely().float()

    def _slope(self) -> Tensor:
        return self.scores.detach().sign()


class _StraightThrough(torch.autograd.Function):
    """weight · mask, with the gradient that it has where d mask / d scores = slope."""

    @staticmethod
    def forward(weight: Tensor, scores: Tensor, mask: Tensor, slope: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
        weight, _, mask, slope = inputs
        ctx.save_for_backward(weight, mask, slope)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, mask, slope = ctx.saved_tensors
        of_weight = gradient * mask if ctx.needs_input_grad[0] else None
        of_scores = gradient * (weight * slope) if ctx.needs_input_grad[1] else None
        return of_weight, of_scores, None, None


@dataclass(frozen=True)
class SupermaskLayer:
    """One layer under a supermask.

    Attributes:
        name: the layer's name in the model, "" for a bare layer.
        shape: of the weight.
        kept: share of the weights that a mask of train mode keeps, expected, in [0, 1].
        likely: the same for the mask of eval mode.
        scale: what the weights are multiplied by in eval mode.
    """

    name: str
    shape: tuple[int, ...]
    kept: float
    likely: float
    scale: float


@dataclass(frozen=True)
class SupermaskReport:
    """What `supermask_` and `report` answer; prints as a table.

    Attributes:
        layers: with a supermask, in the model's order.
        notes: what the table cannot say, one sentence each.
    """

    layers: list[SupermaskLayer]
    notes: list[str]

    @property
    def kept(self) -> float:
        """The expected share kept, over all weights under supermasks; 1 where there are none."""
        sizes = [math.prod(layer.shape) for layer in self.layers]
        kept = sum(layer.kept * size for layer, size in zip(self.layers, sizes, strict=True))
        return kept / sum(sizes) if sum(sizes) else 1.0

    def table(self) -> Table:
        """One row per layer."""
        rows: list[list[object]] = [
            [x.name or "(model)", x.shape, f"{x.kept:.2%}", f"{x.likely:.2%}", f"{x.scale:.3f}"] for x in self.layers
        ]
        columns = ["layer", "shape", "kept, expected", "kept, eval", "scale"]
        return Table("Supermask", columns, rows, list(self.notes))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        layers = [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers]
        return {"layers": layers, "kept": self.kept, "notes": list(self.notes)}

    def __str__(self) -> str:
        return str(self.table())


@torch.inference_mode(False)
def supermask_(
    model: nn.Module,
    config: Config | Mapping[str, Config | None],
    *,
    filter_fn: _select.FilterFn | None = None,
) -> SupermaskReport:
    """Puts trainable masks on the Linear and Conv2d layers of a model and freezes everything else, in place.

    No other parameter requires a gradient afterwards: train those of `model.parameters()` that do. `state_dict` holds
    scores and weights; to load one, call this on a fresh model first. A supermask is only as good as the weights below
    it: the paper's are Glorot normal, with biases at zero (`slimtorch.models.glorot_`).

    Args:
        model: any module, or a single layer (whose name is then "").
        config: one configuration, or a mapping from glob of layer names to configuration; None leaves a layer alone.
        filter_fn: `filter_fn(module, name) -> bool`; layers for which it is false are left alone.

    Raises:
        TypeError: `config` is of another kind.
        ValueError: a weight holds NaN, is masked or parametrized already or shared by two layers, a glob matches
            nothing, or a share that is kept would leave a layer empty. The model is left as it was.
    """
    values = [v for v in config.values() if v is not None] if isinstance(config, Mapping) else [config]
    for value in values:
        if not isinstance(value, (Bernoulli, TopK)):
            raise TypeError(f"config: expected Bernoulli, TopK or a mapping of globs to them, got {value!r}")
    chosen: list[tuple[str, nn.Module, Config]] = _select.resolve(model, config, filter_fn, types=MASKABLE)
    owners: dict[int, str] = {}
    parts: list[Scores] = []
    for name, layer, choice in chosen:
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"model: the weight of layer {name!r} is masked or parametrized already; bake it first")
        check_weight(name, layer)
        weight = cast(nn.Parameter, layer.weight)
        if id(weight) in owners:
            raise ValueError(f"model: layers {owners[id(weight)]!r} and {name!r} share a weight; leave one out")
        owners[id(weight)] = name
        parts.append(_part(name, weight, choice, len(parts)))
    model.requires_grad_(False)
    for (_, layer, choice), part in zip(chosen, parts, strict=True):
        if choice.weights == "signed_constant":
            weight = cast(nn.Parameter, layer.weight)
            with torch.no_grad():
                alpha = weight.float().std().to(weight.dtype)
                weight.copy_(torch.where(weight < 0, -alpha, alpha))
        part.train(layer.training)
        attach(layer, part)
    return report(model)


def report(model: nn.Module) -> SupermaskReport:
    """How many weights the supermasks of a model keep now."""
    layers = []
    for name, part in _found(model):
        likely = part.likely()
        layers.append(
            SupermaskLayer(
                name,
                tuple(part.scores.shape),
                float(part.shares().mean()),
                float(likely.float().mean()),
                float(part.scale(likely)),
            )
        )
    notes = [] if layers else ["No Linear or Conv2d layer has a supermask."]
    return SupermaskReport(layers, notes)


@contextmanager
def drawn(model: nn.Module, seed: int) -> Iterator[None]:
    """Within it the model computes with one mask per layer as train mode draws it, in both modes.

    Args:
        model: with supermasks.
        seed: the same draw for the same seed, on every device.
    """
    check_count("seed", seed, 0)
    generator = torch.Generator().manual_seed(seed)
    with _holding(model, lambda part: part.draw(generator)):
        yield


@contextmanager
def expected(model: nn.Module) -> Iterator[None]:
    """Within it each weight is multiplied by the probability with which it is kept, in both modes."""
    with _holding(model, lambda part: part.shares().to(part.scores)):
        yield


def sampled(model: nn.Module, function: Callable[[nn.Module], Found], *, samples: int, seed: int) -> list[Found]:
    """`function(model)` in eval mode under independent draws of the masks; the paper reports means over such.

    Args:
        model: with supermasks; afterwards as it was.
        function: for example accuracy on held-out data.
        samples: how many draws, >= 1.
        seed: of the first; the others follow.
    """
    check_count("samples", samples, 1)
    check_count("seed", seed, 0)
    found = []
    with eval_mode(model):
        for index in range(samples):
            with drawn(model, seed + index):
                found.append(function(model))
    return found


@torch.inference_mode(False)
def bake_(model: nn.Module, seed: int | None = None) -> list[str]:
    """Turns supermasks into ordinary masks, in place: what `slimtorch.prune_` leaves, for `pack_`, or to train further.

    The model computes what it did in eval mode (or under `drawn(model, seed)`); the factor of rescaling is multiplied
    into the weights. Nothing requires a gradient until `model.requires_grad_(True)`.

    Args:
        model: with supermasks.
        seed: take a draw instead of the masks of eval mode.

    Returns:
        The names of the layers that had a supermask.

    Raises:
        ValueError: there are none, or a mask would leave a layer without weights. The model is left as it was.
    """
    parts = _parts(model)
    if seed is not None:
        check_count("seed", seed, 0)
        generator = torch.Generator().manual_seed(seed)
    masks = [part.likely() if seed is None else part.draw(generator) for _, part in parts]
    for (name, _), keep in zip(parts, masks, strict=True):
        if keep.numel() and not bool(keep.any()):
            raise ValueError(f"model: the supermask of layer {name!r} keeps no weight; train it on, or start over")
    layers = [model.get_submodule(name) for name, _ in parts]
    with torch.no_grad():
        for layer, (_, part), keep in zip(layers, parts, masks, strict=True):
            detach(layer, keep=False)
            cast(Tensor, layer.weight).mul_(part.scale(keep))
    install(list(zip(layers, masks, strict=True)))
    return [name for name, _ in parts]


def _found(model: nn.Module) -> list[tuple[str, Scores]]:
    found = []
    for name, module in model.named_modules():
        if isinstance(module, MASKABLE) and parametrize.is_parametrized(module, "weight"):
            part = cast(Any, module).parametrizations.weight[0]
            if isinstance(part, Scores):
                found.append((name, part))
    return found


def _parts(model: nn.Module) -> list[tuple[str, Scores]]:
    found = _found(model)
    if not found:
        raise ValueError("model: expected supermasks, got none; call slimtorch.prune.supermask.supermask_ first")
    return found


@contextmanager
def _holding(model: nn.Module, choose: Callable[[Scores], Tensor]) -> Iterator[None]:
    parts = [part for _, part in _parts(model)]
    before = [part._held for part in parts]
    held = [choose(part) for part in parts]
    try:
        for part, mask in zip(parts, held, strict=True):
            part._held = mask
        yield
    finally:
        for part, previous in zip(parts, before, strict=True):
            part._held = previous


def _part(name: str, weight: Tensor, config: Config, index: int) -> Scores:
    plain = weight.detach()
    if isinstance(config, Bernoulli):
        return BernoulliScores(torch.full_like(plain, config.start), config.rescale)
    size = plain.numel()
    if size and round((1 - config.kept) * size) >= size:
        raise ValueError(f"kept: {config.kept:.4g} would leave layer {name!r} without weights; keep more of it")
    bound = 1 / math.sqrt(max(1, math.prod(plain.shape[1:])))
    generator = torch.Generator().manual_seed(config.seed * 1000 + index)
    scores = (torch.rand(plain.shape, generator=generator) * 2 - 1) * bound
    return TopKScores(scores.to(plain), config.rescale, config.kept)


def _check_weights(weights: str) -> None:
    if weights not in get_args(Weights):
        raise ValueError(f"weights: expected one of {', '.join(get_args(Weights))}, got {weights!r}")
