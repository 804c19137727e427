# SPDX-License-Identifier: Apache-2.0
"""Training of the comparison: one network, pruned in one way at one sparsity from one seed, is one :class:`Unit`.

Every unit is stored when it is done. Fine-tuned units start from the stored dense network of their seed, the control
("scratch") takes its widths from the stored neuron-pruned network and starts from a new random initialisation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import islice
from typing import Any

import torch
from torch import nn

from slimtorch.data import Digits, Split
from slimtorch.experiments.loop import draw, evaluate, order_of, train_step
from slimtorch.experiments.store import Record
from slimtorch.experiments.trials import Trial
from slimtorch.measure import count_parameters
from slimtorch.models import LeNet5, LeNet300

RECIPE = 1  # raise it when the code below trains differently: stored units of the old recipe are then not used


class Method(str, Enum):
    """How a network became small. The value is what tables, files and JSON call it."""

    DENSE = "dense"
    ONE_SHOT = "weights one-shot"
    ITERATIVE = "weights iterative"
    BLOCKS = "blocks"
    NEURONS = "neurons"
    SCRATCH = "scratch"

    @property
    def short(self) -> str:
        """For narrow tables."""
        return self.value.removeprefix("weights ")

    @property
    def structured(self) -> bool:
        """Regular, smaller dense networks: no kernel of this library is needed to run them fast."""
        return self in (Method.NEURONS, Method.SCRATCH)


PRUNED = (Method.ONE_SHOT, Method.ITERATIVE, Method.BLOCKS, Method.NEURONS, Method.SCRATCH)


@dataclass(frozen=True)
class Network:
    """One of the networks compared.

    ``output`` names the layer that blocks and neurons leave alone: its rows are the classes. ``blocks`` gives layers
    that no 16x16 block fits the block size that does. The convolutional network takes smaller batches and fewer epochs:
    as many steps in less time.
    """

    build: Callable[[Sequence[int]], nn.Module]
    hidden: tuple[int, ...]
    layers: tuple[str, ...]
    output: str
    blocks: dict[str, tuple[int, int]]
    batch_size: int
    dense_epochs: float
    tune_epochs: float

    def widths(self, model: nn.Module) -> tuple[int, ...]:
        return tuple(model.get_submodule(name).weight.shape[0] for name in self.layers)  # type: ignore[misc,index]


# Learning rate, epochs and block sizes were chosen on the validation part. As matrices, conv1 of LeNet-5 is [20, 25]
# and conv2 [50, 500]: (4, 5) is four filters by one row of the 5x5 kernel, (10, 25) ten filters by one whole kernel.
NETWORKS = {
    "lenet300": Network(LeNet300, (300, 100), ("fc1", "fc2"), "fc3", {}, batch_size=32, dense_epochs=6, tune_epochs=2),
    "lenet5": Network(
        LeNet5,
        (20, 50, 500),
        ("conv1", "conv2", "fc1"),
        "fc2",
        {"conv1": (4, 5), "conv2": (10, 25)},
        batch_size=24,
        dense_epochs=4,
        tune_epochs=1,
    ),
}
TITLES = {"lenet300": "LeNet-300-100", "lenet5": "LeNet-5"}


@dataclass(frozen=True)
class Recipe:
    """What all units of a run share.

    ``epochs`` scales each network's own numbers of epochs. Adam with a cosine schedule from ``learning_rate`` (dense
    and scratch) or ``tune_rate`` (fine-tuning) to 0. All pruned networks get the same number of fine-tuning steps:
    iterative pruning spends the first half of them on ``rounds`` rounds that each remove the same share of the rest.
    """

    train: int = 3500
    validation: int = 500
    test: int = 1000
    epochs: float = 1.0
    learning_rate: float = 2e-3
    tune_rate: float = 2e-3
    rounds: int = 4


@dataclass(frozen=True)
class Unit:
    """One network to train: which, how pruned, at which share of weights removed, from which seed."""

    network: str
    method: Method
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        method = self.method.value.replace(" ", "-")
        sparsity = "" if self.method is Method.DENSE else f"-{self.sparsity:.3f}"
        return f"{self.network}-{method}{sparsity}-seed{self.seed}"

    def config(self, recipe: Recipe) -> dict[str, Any]:
        """All that the result depends on, JSON-ready."""
        network = NETWORKS[self.network]
        loop = {name: getattr(network, name) for name in ("batch_size", "dense_epochs", "tune_epochs")}
        own = {"network": self.network, "method": self.method.value, "sparsity": self.sparsity, "seed": self.seed}
        blocks = {name: list(size) for name, size in network.blocks.items()}
        return {"recipe": RECIPE, **own, **asdict(recipe), **loop, "hidden": list(network.hidden), "blocks": blocks}

    @property
    def needs(self) -> Unit | None:
        """The unit that must be stored before this one can start."""
        if self.method is Method.DENSE:
            return None
        if self.method is Method.SCRATCH:
            return Unit(self.network, Method.NEURONS, self.sparsity, self.seed)
        return Unit(self.network, Method.DENSE, 0.0, self.seed)


def units(networks: Sequence[str], sparsities: Sequence[float], seeds: int) -> list[Unit]:
    """All units of a comparison, each after what it needs; the dense ones first, they hold up the others."""
    every: list[Unit] = []
    pairs = [(network, seed) for seed in range(seeds) for network in sorted(networks, key="lenet300".__eq__)]
    every += [Unit(network, Method.DENSE, 0.0, seed) for network, seed in pairs]
    for method in (Method.NEURONS, Method.ONE_SHOT, Method.ITERATIVE, Method.BLOCKS, Method.SCRATCH):
        every += [Unit(network, method, sparsity, seed) for network, seed in pairs for sparsity in sparsities]
    return every


def train_unit(unit: Unit, recipe: Recipe, data: Digits, needed: Sequence[Record]) -> Record:
    """Train ``unit``; ``needed`` holds the record of what it needs."""
    start = time.perf_counter()
    torch.manual_seed(1000 + unit.seed)
    network = NETWORKS[unit.network]
    batches = Batches(data.train, network.batch_size, unit.seed)
    if unit.method is Method.DENSE:
        model = network.build(network.hidden)
        train(model, batches, network.dense_epochs * recipe.epochs, recipe.learning_rate)
    elif unit.method is Method.SCRATCH:
        model = network.build(needed[0].result["hidden"])
        epochs = (network.dense_epochs + network.tune_epochs) * recipe.epochs
        train(model, batches, epochs, recipe.learning_rate)
    else:
        model = restore(unit.network, needed[0])
        _prune_and_tune(model, unit, recipe, data, batches)
    stored, nonzero = count_parameters(model)
    result = {
        "test": accuracy(model, data.test),
        "validation": accuracy(model, data.validation),
        "hidden": list(network.widths(model)),
        "stored": stored,
        "nonzero": nonzero,
        "seconds": time.perf_counter() - start,
    }
    # Only the networks that others start from, and those of seed 0, which are timed, are kept with their weights.
    arrays = {}
    if unit.seed == 0 or unit.method is Method.DENSE:
        arrays = {key: value.contiguous().numpy() for key, value in model.state_dict().items()}
    return Record(result, arrays)


@dataclass(frozen=True)
class _TrainUnit:
    """A unit as a trial."""

    unit: Unit
    recipe: Recipe

    def __call__(self, config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
        return train_unit(self.unit, self.recipe, data, needed)


def trial_of(unit: Unit, recipe: Recipe) -> Trial:
    """The unit, and what it needs, as a trial."""
    needs = () if unit.needs is None else (trial_of(unit.needs, recipe),)
    return Trial(unit.name, _TrainUnit(unit, recipe), unit.config(recipe), needs)


def restore(network: str, record: Record) -> nn.Module:
    """The network of a record that was stored with its weights."""
    model = NETWORKS[network].build(record.result["hidden"])
    model.load_state_dict({key: torch.from_numpy(value) for key, value in record.arrays.items()})
    return model


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of ``split`` that ``model`` classifies right, in [0, 1]."""
    return evaluate(model, split)[1]


# --- pruning ------------------------------------------------------------------------------------------------------


def _prune_and_tune(model: nn.Module, unit: Unit, recipe: Recipe, data: Digits, batches: Batches) -> None:
    from slimtorch import prune

    epochs = NETWORKS[unit.network].tune_epochs * recipe.epochs
    target = unit.sparsity
    if unit.method is Method.NEURONS:
        neurons = prune.Neurons(ratio=neuron_ratio(unit.network, target), importance="l1")
        prune.prune_(model, neurons, example_inputs=data.train.images[:1])
        train(model, batches, epochs, recipe.tune_rate)
        return
    if unit.method is Method.ITERATIVE:
        steps = batches.steps(epochs)
        at = sorted({index * steps // (2 * recipe.rounds) for index in range(recipe.rounds)})
        pruner = prune.Pruner(model, prune.Magnitude(sparsity=target, scope="global"), prune.Iterative(tuple(at)))
        train(model, batches, epochs, recipe.tune_rate, pruner.step)
    else:
        config: Any = prune.Magnitude(sparsity=target, scope="global")
        if unit.method is Method.BLOCKS:
            config = block_config(unit.network, model, target)
        prune.prune_(model, config)
        train(model, batches, epochs, recipe.tune_rate)
    prune.bake_(model)


def block_config(network: str, model: nn.Module, sparsity: float) -> dict[str, Any]:
    """16x16 blocks, or the layer's fitting ones, ranked within each layer; the output layer stays dense.

    The sparsity of the pruned layers is raised so that all layers together keep as many weights as unstructured
    pruning keeps at ``sparsity``. The first convolution has few weights and feeds all others: at most half of them go.
    Ranking over all layers would empty a convolution whose weights happen to be small.
    """
    from slimtorch import prune

    spec = NETWORKS[network]
    weights = {name: model.get_submodule(name).weight.numel() for name in (*spec.layers, spec.output)}  # type: ignore[operator]
    shares = dict.fromkeys(spec.layers, 0.0)
    if "conv1" in shares:
        shares["conv1"] = min(sparsity, 0.5)
    kept = (1 - sparsity) * sum(weights.values()) - weights[spec.output]
    kept -= sum((1 - share) * weights[name] for name, share in shares.items() if share)
    total = sum(weights[name] for name, share in shares.items() if not share)
    rest = min(max(1 - kept / total, 0.0), 0.999)
    return {
        name: prune.Magnitude(sparsity=share or rest, granularity=spec.blocks.get(name, (16, 16)))
        for name, share in shares.items()
    }


def neuron_ratio(network: str, sparsity: float) -> float:
    """The share of each hidden layer's neurons or channels to remove so that ``1 - sparsity`` of all parameters stay.

    Parameters fall with the square of the width inside a network: removing half of the neurons removes about 75 %.
    """
    spec = NETWORKS[network]

    def parameters(ratio: float) -> int:
        widths = [max(1, count - round(ratio * count)) for count in spec.hidden]
        return sum(parameter.numel() for parameter in spec.build(widths).parameters())

    goal = (1 - sparsity) * parameters(0.0)
    low, high = 0.0, 0.999
    for _ in range(12):  # to 1/4096 of a layer's width: finer than one neuron of any of these networks
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(middle) > goal else (low, middle)
    return high


# --- the loop -----------------------------------------------------------------------------------------------------


class Batches:
    """Batches of one run of training after another; each begins an epoch, in an order of its own."""

    def __init__(self, split: Split, batch_size: int, seed: int) -> None:
        # Channels last trains the convolution a third faster on CPUs; it changes strides only, no value.
        self._split = Split(split.images.contiguous(memory_format=torch.channels_last), split.labels)
        self._batch_size = min(batch_size, len(split))
        self._generator = order_of(seed)

    def steps(self, epochs: float) -> int:
        """So many epochs, in steps; at least one."""
        return max(1, round(epochs * (len(self._split) // self._batch_size)))

    def take(self, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The next ones."""
        return islice(draw(self._split, self._batch_size, self._generator), steps)


def train(
    model: nn.Module,
    batches: Batches,
    epochs: float,
    learning_rate: float,
    after_step: Callable[[], object] | None = None,
) -> None:
    """Adam with a cosine to 0; Diverged where a loss is not finite."""
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = batches.steps(epochs)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, (images, labels) in enumerate(batches.take(steps)):
        train_step(model, optimizer, images, labels, step)
        schedule.step()
        if after_step is not None:
            after_step()
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
