# SPDX-License-Identifier: Apache-2.0
"""How much a weight or a neuron matters.

There are two kinds, and both answer `neurons(model, groups, evidence)`:

- A `WeightImportance` scores each single weight. Its scores *add up*: a block, a row or a neuron is worth the sum of
  its weights, so one `weights(...)` method serves every granularity. `L1`, `L2` and `Random` look at no data; `Taylor`,
  `SecondOrder` and `Snip` stream over a loader; `Movement`, `PathIntegral` and `Fisher` watch a whole training run.
- The others score neurons only (how often they fire, the scale of their batch-norm): any object with a `neurons`
  method is one.

Scores are >= 0, finite, and the smallest are removed first. A further importance is one class here.

    removal of w changes the loss by   -g·w + w²·h/2 + …      g gradient, h diagonal of the Hessian
    Snip |mean(g)·w|   Taylor mean((g·w)²)   SecondOrder |-mean(g)·w + w²·h/2|   Fisher w²·mean(g²)/2, along the way
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from slimtorch._progress import shown
from slimtorch.prune.mask import MASKABLE, mask_of, unmasked_weight

LossFn = Callable[..., Tensor]
"""`loss_fn(output, *targets) -> scalar tensor`."""


@dataclass(frozen=True)
class Slots:
    """Where the neurons of a group sit in one layer: slot `index[i]` of the layer belongs to neuron `neuron[i]`."""

    layer: str
    index: Tensor  # [s] int64, channels of the layer
    neuron: Tensor  # [s] int64, in [0, size of the group)


@dataclass
class Group:
    """Neurons that must be removed together: one row of each layer that makes them, one column of each that reads them.

    Attributes:
        name: the layer that names the group.
        size: number of neurons.
        makers: outputs of Linear and convolution layers (several where a residual connection adds them).
        readers: inputs of Linear and convolution layers.
        norms: batch-norm layers in between.
    """

    name: str
    size: int
    makers: list[Slots] = field(default_factory=list)
    readers: list[Slots] = field(default_factory=list)
    norms: list[Slots] = field(default_factory=list)


@dataclass(frozen=True)
class Evidence:
    """What an importance may look at beside the weights.

    Attributes:
        data: batches, each `inputs` or `(inputs, *targets)`; `inputs` is a tensor, a tuple of positional arguments or
            a dict of keyword arguments. None where the caller gave none.
        loss_fn: `loss_fn(output, *targets) -> scalar`, or None.
        seed: of everything random.
        limit: batches to read; None reads all there are.
    """

    data: Iterable[Any] | None = None
    loss_fn: LossFn | None = None
    seed: int = 0
    limit: int | None = None

    def batches(self, who: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        """Pairs (inputs, targets), checked, with a progress bar on a terminal.

        Raises:
            ValueError: no data, an empty batch, or fewer batches than `limit`.
        """
        if self.data is None:
            raise ValueError(f"data: importance {who!r} needs an iterable of inputs or (inputs, targets), got None")
        count = 0
        for batch in shown(_first(self.data, self.limit), f"importance: {who}", self._total()):
            count += 1
            if isinstance(batch, (tuple, list)):
                if not batch:
                    raise ValueError(f"data: batch {count - 1} is empty; expected inputs or (inputs, targets)")
                yield usable(batch[0]), tuple(usable(target) for target in batch[1:])
            else:
                yield usable(batch), ()
        if count == 0:
            raise ValueError(f"data: importance {who!r} needs at least one batch, got none")
        if self.limit is not None and count < self.limit:
            raise ValueError(f"data: importance {who!r} needs {self.limit} batches, the data ended after {count}")

    def _total(self) -> int | None:
        if self.limit is not None:
            return self.limit
        try:
            return len(cast(Any, self.data))
        except TypeError:  # an iterator, or a loader over a stream
            return None


def _first(data: Iterable[Any], limit: int | None) -> Iterator[Any]:
    """The first `limit` batches; none is drawn that is not used."""
    if limit is None:
        yield from data
        return
    batches = iter(data)
    for _ in range(limit):
        try:
            yield next(batches)
        except StopIteration:
            return


@runtime_checkable
class Importance(Protocol):
    """Anything that scores neurons."""

    def neurons(self, model: nn.Module, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        """One tensor [group.size] per group, >= 0 and finite. The model is a copy in eval mode and may be run."""
        ...


class WeightImportance(ABC):
    """Scores each weight; neurons, rows and blocks follow by adding up."""

    @abstractmethod
    def weights(self, model: nn.Module, layers: Mapping[str, nn.Module], evidence: Evidence) -> dict[str, Tensor]:
        """For each layer a tensor [out, in/groups * kernel], float, >= 0. The model is a copy in eval mode."""

    def neurons(self, model: nn.Module, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        """The sum over all weights that make a neuron, over all layers that make it; one tensor [size] per group."""
        modules = dict(model.named_modules())
        names = {slots.layer for group in groups for slots in group.makers}
        scores = self.weights(model, {name: m for name, m in modules.items() if name in names}, evidence)
        results = []
        for group in groups:
            total = torch.zeros(group.size, dtype=torch.float64)
            for slots in group.makers:
                rows = scores[slots.layer].double().sum(1).cpu()
                total.index_add_(0, slots.neuron, rows[slots.index])
            results.append(total)
        return results


def matrix(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A weight-shaped tensor as [out, everything else]; transposed convolutions store [in, out/groups, ...]."""
    if getattr(layer, "transposed", False):
        tensor = tensor.transpose(0, 1)
    return tensor.reshape(tensor.shape[0], -1)


def _real(tensor: Tensor) -> Tensor:
    """Half types as float32, so that sums over long rows keep their digits."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


class L1(WeightImportance):
    """Sum of absolute weights (Li et al., "Pruning Filters for Efficient ConvNets", 2017, section 3.1)."""

    def weights(self, model: nn.Module, layers: Mapping[str, nn.Module], evidence: Evidence) -> dict[str, Tensor]:
        """|w|."""
        return {n: matrix(m, _real(_trained(m, n).detach()).abs()) for n, m in layers.items()}


class L2(WeightImportance):
    """Sum of squared weights: the order of the L2 norm (its square adds up, the norm does not)."""

    def weights(self, model: nn.Module, layers: Mapping[str, nn.Module], evidence: Evidence) -> dict[str, Tensor]:
        """w²."""
        return {n: matrix(m, _real(_trained(m, n).detach()).square()) for n, m in layers.items()}


class Random(WeightImportance):
    """Uniformly random: the control that every other importance should beat.

    Args:
        seed: None takes the seed of the evidence.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def _generator(self, evidence: Evidence) -> torch.Generator:
        return torch.Generator().manual_seed(evidence.seed if self.seed is None else self.seed)

    def weights(self, model: nn.Module, layers: Mapping[str, nn.Module], evidence: Evidence) -> dict[str, Tensor]:
        """Uniform in [0, 1), the same for the same seed and order of layers."""
        generator = self._generator(evidence)
        return {n: torch.rand(matrix(m, cast(Tensor, m.weight)).shape, generator=generator) for n, m in layers.items()}

    def neurons(self, model: nn.Module, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        """Uniform in [0, 1) per neuron: sums over many weights would favour wide layers in a global ranking."""
        generator = self._generator(evidence)
        return [torch.rand(group.size, dtype=torch.float64, generator=generator) for group in groups]


def _trained(layer: nn.Module, name: str) -> Tensor:
    """The parameter behind the weight of a layer, masked or not."""
    weight = unmasked_weight(layer)
    if parametrize.is_parametrized(layer, "weight") and weight is not getattr(
        cast(Any, layer).parametrizations.weight, "original", None
    ):
        raise ValueError(f"model: the weight of layer {name!r} has a parametrization beside its mask")
    return weight


def _losses(model: nn.Module, evidence: Evidence, who: str, own: LossFn | None) -> Iterator[Tensor]:
    """The loss of each batch, a scalar with a graph; ValueError for what is none, or not finite."""
    loss_fn = own or evidence.loss_fn
    if loss_fn is None:
        raise ValueError(
            f"loss_fn: importance {who!r} needs one, loss_fn(output, *targets) -> scalar tensor; "
            "give it to the configuration, loss_fn=..., or to the importance"
        )
    for index, (inputs, targets) in enumerate(evidence.batches(who)):
        output = _run(model, inputs)
        try:
            loss = loss_fn(output, *targets)
        except Exception as error:
            raise ValueError(f"loss_fn: failed on a batch with {len(targets)} targets: {error}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.grad_fn is None:
            raise ValueError("loss_fn: expected a scalar tensor that depends on the model's output")
        if not bool(loss.isfinite().all()):
            raise ValueError(f"loss_fn: gave {loss.item()} on batch {index}, expected a finite loss")
        yield loss.reshape(())


def _mean_over_batches(
    layers: Mapping[str, nn.Module], losses: Iterable[Tensor], term: Callable[[Tensor, Tensor], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The layers' parameters, and of each the mean of ``term(parameter, gradient)`` over the batches' losses."""
    parameters = [_trained(m, n) for n, m in layers.items()]
    totals = [torch.zeros_like(_real(p.detach())) for p in parameters]
    count = 0
    with torch.enable_grad():
        for loss in losses:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, parameter, gradient in zip(totals, parameters, gradients, strict=True):
                if gradient is not None:
                    total += term(parameter, gradient)
            count += 1
    return parameters, [total / count for total in totals]


class Taylor(WeightImportance):
    """First-order Taylor expansion of the loss: (w · ∂L/∂w)², averaged over batches and added up over a neuron's
    weights (Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, equation 8).

    Args:
        loss_fn: `loss_fn(output, *targets) -> scalar`; None takes the one of the evidence.
    """

    def __init__(self, loss_fn: LossFn | None = None) -> None:
        self.loss_fn = loss_fn

    def weights(self, model: nn.Module, layers: Mapping[str, nn.Module], evidence: Evidence) -> dict[str, Tensor]:
        """(w · g)², mean over the batches; ValueError without data or loss_fn."""
        losses = _losses(model, evidence, "taylor", self.loss_fn)
        _, means = _mean_over_batches(layers, losses, lambda w, g: _real(w.detach() * g).square())
        return {n: matrix(m, mean) for (n, m), mean in zip(layers.items(), means, strict=True)}


class Snip(WeightImportance):
    """Connection sensitivity |w · ∂L/∂w|, the gradient averaged over the batches first (Lee et al., "SNIP", 2019,
    equation 4, without its division by the sum, which changes no rank). Meant for a network before training.

    Args:
        loss_fn: `loss_fn(output, *targets) -> scalar`; None takes the one of the evidence.
    """

    def __init__(self, loss_fn: LossFn | None = None) -> None:
        self.loss_fn = loss_fn

    def weights(self, model: nn.Module, layers: Mapping[str, nn.Module], evidence: Evidence) -> dict[str, Tensor]:
        """|w · mean of g|; ValueError without data or loss_fn."""
        losses = _losses(model, evidence, "snip", self.loss_fn)
        parameters, means = _mean_over_batches(layers, losses, lambda _, g: g)
        scores = [(_real(p.detach()) * mean).abs() for p, mean in zip(parameters, means, strict=True)]
        return {n: matrix(m, score) for (n, m), score in zip(layers.items(), scores, strict=True)}


class SecondOrder(WeightImportance):
    """Second-order Taylor expansion: |-g·w + w²·h/2|, how the loss changes when the weight alone is set to zero
    (LeCun et al., "Optimal Brain Damage", 1990, equation 1, with the gradient, which is not zero before convergence).

    g and h are averaged over batches. h, the diagonal of the Hessian, is estimated from products of the Hessian with
    random signs z: the mean of z · Hz (Hutchinson; Bekas et al. 2007). It is exact where the Hessian is diagonal; each
    probe costs about two more backward passes.

    Args:
        loss_fn: `loss_fn(output, *targets) -> scalar`; None takes the one of the evidence.
        probes: random vectors per batch, >= 1.
    """

    def __init__(self, loss_fn: LossFn | None = None, probes: int = 1) -> None:
        if isinstance(probes, bool) or not isinstance(probes, int):
            raise TypeError(f"probes: expected a whole number, got {probes!r}")
        if probes < 1:
            raise ValueError(f"probes: expected at least 1, got {probes}")
        self.loss_fn = loss_fn
        self.probes = probes

    def weights(self, model: nn.Module, layers: Mapping[str, nn.Module], evidence: Evidence) -> dict[str, Tensor]:
        """|-g·w + w²·h/2|; ValueError without data or loss_fn, or where the loss cannot be differentiated twice."""
        parameters = [_trained(m, n) for n, m in layers.items()]
        slopes = [torch.zeros_like(_real(p.detach())) for p in parameters]
        curvatures = [torch.zeros_like(slope) for slope in slopes]
        generator = torch.Generator().manual_seed(evidence.seed)
        count = 0
        with torch.enable_grad():
            for loss in _losses(model, evidence, "taylor2", self.loss_fn):
                gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
                for slope, gradient in zip(slopes, gradients, strict=True):
                    if gradient is not None:
                        slope += gradient.detach()
                curved = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
                for _ in range(self.probes if curved else 0):
                    signs = [_signs(parameters[i], generator) for i in curved]
                    products = torch.autograd.grad(
                        [gradients[i] for i in curved],
                        [parameters[i] for i in curved],
                        signs,
                        retain_graph=True,
                        allow_unused=True,
                    )
                    for i, sign, product in zip(curved, signs, products, strict=True):
                        if product is not None:
                            curvatures[i] += _real(sign * product) / self.probes
                count += 1
        scores = {}
        for (n, m), p, g, h in zip(layers.items(), parameters, slopes, curvatures, strict=True):
            w = _real(p.detach())
            scores[n] = matrix(m, (-w * g / count + w.square() * h / (2 * count)).abs())
        return scores


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """+1 and -1 with equal odds; drawn on the CPU, so that every device gets the same ones."""
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)


class LifeLong(WeightImportance):
    """What a whole training run says about each weight. Let it watch before training, then prune with it:

        memory = slim.prune.importance.PathIntegral()
        memory.watch(model, optimizer)
        ...  # train as always
        slim.prune_(model, slim.prune.Magnitude(0.9, importance=memory))

    Every `optimizer.step()` is seen through the optimizer's hooks; gradients must be unscaled by then. Watched are
    the Linear and Conv2d layers that it trains.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._parameters: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Starts to count the steps of `optimizer` over the Linear and Conv2d layers of `model`.

        Raises:
            ValueError: it is watching already, or the optimizer trains none of those layers' weights.
        """
        if self._handles:
            raise ValueError("model: this importance watches one already; call stop() first or make another")
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found = {n: _trained(m, n) for n, m in model.named_modules() if isinstance(m, MASKABLE)}
        parameters = {n: p for n, p in found.items() if id(p) in trained}
        if not parameters:
            raise ValueError("optimizer: expected one that trains a Linear or Conv2d layer of the model, got none")
        self._parameters = parameters
        self.steps = 0
        self._start(parameters)
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before()),
            optimizer.register_step_post_hook(lambda *_: self._after()),
        ]

    def stop(self) -> None:
        """Looks no further; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __deepcopy__(self, memo: dict[int, Any]) -> LifeLong:
        return self  # hooks belong to one optimizer; configurations are copied freely

    def _before(self) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if parameter.grad is not None:
                    self._see(name, _real(parameter.detach()), _real(parameter.grad))

    def _after(self) -> None:
        self.steps += 1

    def weights(self, model: nn.Module, layers: Mapping[str, nn.Module], evidence: Evidence) -> dict[str, Tensor]:
        """What the steps seen add up to; ValueError where a layer was not watched, or has been cut since."""
        who = type(self).__name__
        if not self.steps:
            raise ValueError(f"importance: {who} has seen no training step; call watch(model, optimizer) first")
        scores = {}
        for name, layer in layers.items():
            weight = _real(_trained(layer, name).detach())
            if name not in self._parameters:
                raise ValueError(f"importance: {who} did not watch layer {name!r}, only {sorted(self._parameters)}")
            score = self._score(name, weight)
            if score.shape != weight.shape:
                raise ValueError(
                    f"importance: {who} watched layer {name!r} with shape {tuple(score.shape)}, "
                    f"now it has {tuple(weight.shape)}"
                )
            scores[name] = matrix(layer, score)
        return scores

    @abstractmethod
    def _start(self, parameters: Mapping[str, Tensor]) -> None: ...

    @abstractmethod
    def _see(self, name: str, weight: Tensor, gradient: Tensor) -> None: ...

    @abstractmethod
    def _score(self, name: str, weight: Tensor) -> Tensor: ...


class Movement(LifeLong):
    """Weights that training moves away from zero matter: -Σ w · ∂L/∂w over the steps (Sanh et al., "Movement Pruning",
    2020, equation 4, for weights that are trained themselves). Scores are shifted so that the least of all is 0.
    """

    def _start(self, parameters: Mapping[str, Tensor]) -> None:
        self._sums = {n: torch.zeros_like(_real(p.detach())) for n, p in parameters.items()}

    def _see(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        self._sums[name] -= weight * gradient

    def _score(self, name: str, weight: Tensor) -> Tensor:
        least = min(float(total.min()) for total in self._sums.values() if total.numel())
        return self._sums[name] - least


class PathIntegral(LifeLong):
    """How much of the fall of the loss a weight accounts for: -Σ g · Δw over the steps, divided by the square of the
    way it went, as a parabola of that depth has it (Zenke et al., "Continual Learning Through Synaptic Intelligence",
    2017, equations 3 to 5); times w², what setting it to zero would cost. Weights that raised the loss have 0.

    Args:
        damping: added to the square of the way, > 0.
    """

    def __init__(self, damping: float = 1e-3) -> None:
        super().__init__()
        if not 0 < damping < float("inf"):
            raise ValueError(f"damping: expected a positive number, got {damping!r}")
        self.damping = damping

    def _start(self, parameters: Mapping[str, Tensor]) -> None:
        self._first = {n: _real(p.detach()).clone() for n, p in parameters.items()}
        self._last = {n: first.clone() for n, first in self._first.items()}
        self._gradients: dict[str, Tensor] = {}
        self._sums = {n: torch.zeros_like(first) for n, first in self._first.items()}

    def _see(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        self._last[name].copy_(weight)
        self._gradients[name] = gradient.clone()

    def _after(self) -> None:
        super()._after()
        with torch.no_grad():
            for name, gradient in self._gradients.items():
                now = _real(self._parameters[name].detach())
                self._sums[name] -= gradient * (now - self._last[name])
        self._gradients.clear()

    def _score(self, name: str, weight: Tensor) -> Tensor:
        if weight.shape != self._first[name].shape:
            return self._first[name]  # the caller says what does not fit
        way = (weight - self._first[name].to(weight)).square() + self.damping
        return self._sums[name].to(weight).clamp(min=0) / way * weight.square()


class Fisher(LifeLong):
    """The diagonal of the empirical Fisher information, averaged over the training run: w² · mean(g²) / 2, what setting
    the weight to zero would cost near a minimum (Theis et al. 2018, equation 8; Kirkpatrick et al., "Overcoming
    catastrophic forgetting", 2017, for the information as a memory of a task).
    """

    def _start(self, parameters: Mapping[str, Tensor]) -> None:
        self._sums = {n: torch.zeros_like(_real(p.detach())) for n, p in parameters.items()}

    def _see(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        self._sums[name] += gradient.square()

    def _score(self, name: str, weight: Tensor) -> Tensor:
        total = self._sums[name]
        return total if total.shape != weight.shape else weight.square() * total.to(weight) / (2 * self.steps)


class APoZ:
    """How often a neuron is not zero: 1 - APoZ (Hu et al., "Network Trimming", 2016, section 3.1).

    Counted where the neuron is read, at the input of the next Linear or convolution layers, over all examples and
    positions of the data: after the activation, whether it is a module or a function, and after batch norm and
    pooling. Neurons of a network without activations that give zeros are all equally often non-zero.
    """

    def neurons(self, model: nn.Module, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        """The share of non-zero values per neuron, in [0, 1]; ValueError without data."""
        modules = dict(model.named_modules())
        readers = {slots.layer for group in groups for slots in group.readers}
        nonzero: dict[str, Tensor] = {}
        seen: dict[str, int] = {}

        def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            # Linear layers have their inputs in the last dimension, convolutions right before the spatial ones
            back = 1 if isinstance(modules[name], nn.Linear) else cast(Tensor, modules[name].weight).dim() - 1

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x: Tensor = args[0] if args else kwargs["input"]
                others = [d for d in range(x.dim()) if d != x.dim() - back]
                counts = (x != 0).sum(others) if others else (x != 0).long()
                nonzero[name] = nonzero[name] + counts.cpu() if name in nonzero else counts.cpu()
                seen[name] = seen.get(name, 0) + x.numel() // counts.numel()

            return hook

        with ExitStack() as stack, torch.no_grad():
            for name in sorted(readers):
                stack.enter_context(modules[name].register_forward_pre_hook(watch(name), with_kwargs=True))
            for inputs, _ in evidence.batches("apoz"):
                _run(model, inputs)
        results = []
        for group in groups:
            total = torch.zeros(group.size, dtype=torch.float64)
            parts = torch.zeros(group.size, dtype=torch.float64)
            for slots in group.readers:
                if seen.get(slots.layer):
                    share = nonzero[slots.layer].double() / seen[slots.layer]
                    total.index_add_(0, slots.neuron, share[slots.index])
                    parts.index_add_(0, slots.neuron, torch.ones(len(slots.neuron), dtype=torch.float64))
            # a neuron that nothing read was never of use to anyone
            results.append(total / parts.clamp(min=1))
        return results


class BatchNorm:
    """The absolute scale of the batch norm after a neuron (Liu et al., "Network Slimming", 2017, section 3)."""

    def neurons(self, model: nn.Module, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        """The sum of |γ| over the batch norms of a group; ValueError where a group has none with a scale."""
        modules = dict(model.named_modules())
        results = []
        for group in groups:
            total = torch.zeros(group.size, dtype=torch.float64)
            scaled = [slots for slots in group.norms if getattr(modules[slots.layer], "weight", None) is not None]
            if not scaled:
                raise ValueError(
                    f"importance: 'batchnorm' needs a batch norm with a scale after layer {group.name!r}; "
                    "leave that layer out with ignore= or choose another importance"
                )
            for slots in scaled:
                scale = cast(Tensor, modules[slots.layer].weight).detach().abs().double().cpu()
                total.index_add_(0, slots.neuron, scale[slots.index])
            results.append(total)
        return results


BY_NAME: dict[str, Callable[[], Importance]] = {
    "magnitude": L1,
    "l1": L1,
    "l2": L2,
    "apoz": APoZ,
    "taylor": Taylor,
    "taylor2": SecondOrder,
    "snip": Snip,
    "batchnorm": BatchNorm,
    "random": Random,
}


def get(importance: str | Importance) -> Importance:
    """The importance of that name, or the object itself.

    Raises:
        ValueError: no importance has that name.
        TypeError: the object has no `neurons` method.
    """
    if isinstance(importance, str):
        if importance not in BY_NAME:
            raise ValueError(f"importance: expected one of {', '.join(BY_NAME)} or an object, got {importance!r}")
        return BY_NAME[importance]()
    if isinstance(importance, type) or not isinstance(importance, Importance):
        raise TypeError(
            "importance: expected a name or an object with a method neurons(model, groups, evidence), "
            f"got {importance!r}"
        )
    return importance


def weigh(
    model: nn.Module, layers: Mapping[str, nn.Module], importance: str | Importance, evidence: Evidence
) -> dict[str, Tensor]:
    """The scores of all weights of some layers of a model, checked: name → [out, in/groups * kernel], float.

    Args:
        model: left as it is; a copy is run.
        layers: of the model, by name.
        importance: a name or a `WeightImportance`.
        evidence: data, loss and seed.

    Raises:
        TypeError: the importance scores neurons only.
        ValueError: what the importance raises, or scores that do not fit, are negative or not finite.
    """
    chosen = get(importance)
    who = importance if isinstance(importance, str) else type(importance).__name__
    if not hasattr(chosen, "weights"):
        raise TypeError(f"importance: {who!r} scores neurons, not weights; use it with Neurons")
    with torch.inference_mode(False), torch.enable_grad():
        try:
            trial = copy.deepcopy(model).eval()
        except Exception as error:
            raise ValueError(f"model: cannot be copied to score its weights: {error}") from error
        for parameter in trial.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        modules = dict(trial.named_modules())
        scores = cast(WeightImportance, chosen).weights(trial, {name: modules[name] for name in layers}, evidence)
    for name, layer in layers.items():
        weight = unmasked_weight(layer)
        shape = tuple(matrix(layer, weight).shape)
        score = scores.get(name)
        if score is None or tuple(score.shape) != shape:
            got = None if score is None else tuple(score.shape)
            raise ValueError(f"importance: {who!r} gave shape {got} for layer {name!r}, expected {shape}")
        present = mask_of(layer)
        kept = score if present is None else score[matrix(layer, present.mask)]
        if not bool(kept.isfinite().all()):
            raise ValueError(f"importance: {who!r} gave values for layer {name!r} that are not finite")
        if bool((kept < 0).any()):
            raise ValueError(f"importance: {who!r} gave negative values for layer {name!r}")
        scores[name] = _real(score.detach()).to(weight.device)
    return {name: scores[name] for name in layers}


def usable(value: Any) -> Any:
    """The same inputs, with tensors made under `torch.inference_mode` copied: autograd refuses those."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, (tuple, list)):
        members = [usable(v) for v in value]
        return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
    if isinstance(value, Mapping):
        return {k: usable(v) for k, v in value.items()}
    return value


def call(model: nn.Module, inputs: Any) -> Any:
    """Runs the model on a tensor, a tuple or list of positional arguments, or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def _run(model: nn.Module, inputs: Any) -> Any:
    try:
        return call(model, inputs)
    except Exception as error:
        raise ValueError(f"data: a batch does not fit the model: {error}") from error
