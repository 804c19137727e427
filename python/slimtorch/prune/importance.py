# SPDX-License-Identifier: Apache-2.0
"""How much a weight or a neuron matters.

There are two kinds, and both answer `neurons(model, groups, evidence)`:

- A `WeightImportance` scores each single weight. Its scores *add up*: a block, a row or a neuron is worth the sum of
  its weights, so one `weights(...)` method serves every granularity.
- The others score neurons only (how often they fire, the scale of their batch-norm): any object with a `neurons`
  method is one.

Scores are >= 0, finite, and the smallest are removed first. A further importance is one class here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

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
    """

    data: Iterable[Any] | None = None
    loss_fn: LossFn | None = None
    seed: int = 0

    def batches(self, who: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        """Pairs (inputs, targets), checked: ValueError where there is no data at all."""
        if self.data is None:
            raise ValueError(f"data: importance {who!r} needs an iterable of inputs or (inputs, targets), got None")
        count = 0
        for batch in self.data:
            count += 1
            if isinstance(batch, (tuple, list)):
                if not batch:
                    raise ValueError(f"data: batch {count - 1} is empty; expected inputs or (inputs, targets)")
                yield usable(batch[0]), tuple(usable(target) for target in batch[1:])
            else:
                yield usable(batch), ()
        if count == 0:
            raise ValueError(f"data: importance {who!r} needs at least one batch, got none")


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
        """For each layer a tensor [out, in/groups * kernel], float, >= 0."""

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
        return {n: matrix(m, _real(cast(Tensor, m.weight).detach()).abs()) for n, m in layers.items()}


class L2(WeightImportance):
    """Sum of squared weights: the order of the L2 norm (its square adds up, the norm does not)."""

    def weights(self, model: nn.Module, layers: Mapping[str, nn.Module], evidence: Evidence) -> dict[str, Tensor]:
        """w²."""
        return {n: matrix(m, _real(cast(Tensor, m.weight).detach()).square()) for n, m in layers.items()}


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
        loss_fn = self.loss_fn or evidence.loss_fn
        if loss_fn is None:
            raise ValueError(
                "loss_fn: importance 'taylor' needs one, loss_fn(output, *targets) -> scalar tensor; "
                "give Neurons(loss_fn=...) or importance=Taylor(loss_fn)"
            )
        parameters = [cast(nn.Parameter, m.weight) for m in layers.values()]
        totals = [torch.zeros_like(_real(p.detach())) for p in parameters]
        count = 0
        with torch.enable_grad():
            for inputs, targets in evidence.batches("taylor"):
                output = _run(model, inputs)
                try:
                    loss = loss_fn(output, *targets)
                except Exception as error:
                    raise ValueError(f"loss_fn: failed on a batch with {len(targets)} targets: {error}") from error
                if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.grad_fn is None:
                    raise ValueError("loss_fn: expected a scalar tensor that depends on the model's output")
                gradients = torch.autograd.grad(loss.reshape(()), parameters, allow_unused=True)
                for total, parameter, gradient in zip(totals, parameters, gradients, strict=True):
                    if gradient is not None:
                        total += _real(parameter.detach() * gradient).square()
                count += 1
        return {n: matrix(m, t / count) for (n, m), t in zip(layers.items(), totals, strict=True)}


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
    "l1": L1,
    "l2": L2,
    "apoz": APoZ,
    "taylor": Taylor,
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
