# SPDX-License-Identifier: Apache-2.0
"""Many small networks at once.

`Networks` runs a population over shared weights and samples without a loop over any of them. Connections are padded to
[population, nodes, nodes]; of these, nodes at the same depth are found in all networks together:

    rows of `values` [rows, shared weights x samples]
      inputs, bias │ level 1: linear… step… sin… │ level 2: linear… step… sin… │ … │ outputs
    one level =  gather and sum the rows that feed it  ·  shared weight of the column  ·  one call per activation

The nodes of a level lie sorted by activation, so that each function runs once, on neighbouring rows. What bounds it is
the sines and exponentials for many columns, the number of calls for few.

`Network` is one of them as a module with a trainable weight for each connection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch.prune.weight_agnostic.genome import ACTIVATIONS, Genome

Weights = Sequence[np.ndarray] | None
"""For each network one weight per connection, float [size], in the order of `Genome.edges`; None: all 1."""

_IN_PLACE: dict[str, Callable[[Tensor], object]] = {
    "step": lambda x: x.gt_(0),
    "sin": lambda x: x.mul_(math.pi).sin_(),
    "gaussian": lambda x: x.square_().mul_(-0.5).exp_(),
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
    "inverse": lambda x: x.neg_(),
    "abs": lambda x: x.abs_(),
    "relu": torch.relu_,
    "cos": lambda x: x.mul_(math.pi).cos_(),
}  # linear: nothing to do


def activate(name: str, x: Tensor) -> Tensor:
    """The activation `name` of `ACTIVATIONS`, out of place, with gradients (that of a step is zero)."""
    match name:
        case "linear":
            return x
        case "step":
            return (x > 0).to(x.dtype)
        case "sin":
            return torch.sin(math.pi * x)
        case "gaussian":
            return torch.exp(-0.5 * x * x)
        case "tanh":
            return torch.tanh(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "inverse":
            return -x
        case "abs":
            return x.abs()
        case "relu":
            return torch.relu(x)
        case "cos":
            return torch.cos(math.pi * x)
        case _:
            raise ValueError(f"name: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")


class _Level(NamedTuple):
    """Rows [begin, end) of the values: the rows that they sum, and runs of rows with the same activation."""

    begin: int
    end: int
    sources: Tensor  # int64 [connections], by destination
    offsets: Tensor  # int64 [end - begin], where each row's sources begin
    weights: Tensor | None  # [connections]
    runs: list[tuple[str, int, int]]


class Pass:
    """Buffers of one shape: write `inputs`, call `run()`, read `outputs`.

    Attributes:
        inputs: [inputs, 1 or population, columns]: a view; the 1 where inputs are common to the population.
        outputs: [outputs, population, columns]: a view, overwritten by the next run.
    """

    def __init__(self, networks: Networks, columns: Tensor) -> None:
        self._values = columns.new_zeros(networks.rows, len(columns))
        self._columns = columns
        self._levels = networks.levels
        copies = 1 if networks.common else networks.population
        self.inputs = self._values[: networks.inputs * copies].view(networks.inputs, copies, -1)
        self._values[networks.inputs * copies] = 1  # the bias
        self.outputs = self._values[networks.rows - networks.outputs * networks.population :].view(
            networks.outputs, networks.population, -1
        )
        self._blocks = [
            (
                level,
                self._values[level.begin : level.end],
                [(_IN_PLACE[name], self._values[a:b]) for name, a, b in level.runs if name in _IN_PLACE],
            )
            for level in self._levels
        ]

    @torch.no_grad()
    def run(self) -> Tensor:
        """`outputs`, of what `inputs` hold now."""
        for level, block, runs in self._blocks:
            if len(level.sources):
                total = F.embedding_bag(
                    level.sources, self._values, level.offsets, mode="sum", per_sample_weights=level.weights
                )
                torch.mul(total, self._columns, out=block)
            else:
                block.zero_()
            for function, rows in runs:
                function(rows)
        return self.outputs


class Networks:
    """A population of topologies, ready to run.

    Args:
        genomes: with the same numbers of inputs and outputs.
        weights: for each genome one weight per connection, float [size], in the order of `Genome.edges`; the shared
            weight multiplies them. None: all 1, the weight-agnostic case.
        common: the population sees the same inputs.
        dtype: that it computes in.

    Raises:
        ValueError: no genome, other numbers of inputs or outputs, or weights that do not fit.
    """

    def __init__(
        self,
        genomes: Sequence[Genome],
        weights: Weights = None,
        *,
        common: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not genomes:
            raise ValueError("genomes: expected at least one, got none")
        first = genomes[0]
        if any((g.inputs, g.outputs) != (first.inputs, first.outputs) for g in genomes):
            raise ValueError("genomes: expected the same numbers of inputs and outputs")
        if weights is not None:
            sizes = [tuple(np.shape(w)) for w in weights]
            if sizes != [(g.size,) for g in genomes]:
                raise ValueError(f"weights: expected one for each connection of each genome, got shapes {sizes[:3]} …")
        self.inputs, self.outputs, self.population = first.inputs, first.outputs, len(genomes)
        self.common = common
        self.dtype = dtype
        population, hidden = len(genomes), max(g.hidden for g in genomes)
        before, nodes = first.inputs + 1, first.inputs + 1 + hidden + first.outputs

        # Padded: inputs, bias, hidden nodes in topological order, padding, outputs.
        kinds = torch.full((population, hidden), -1)
        connected = torch.zeros(population, nodes, nodes, dtype=torch.bool)
        for index, genome in enumerate(genomes):
            inner, own = before + genome.hidden, torch.from_numpy(genome.connections)
            kinds[index, : genome.hidden] = torch.from_numpy(genome.activations)
            connected[index, :inner, :inner] = own[:inner, :inner]
            connected[index, :inner, before + hidden :] = own[:inner, inner:]

        level = torch.where(kinds < 0, 0, 1)  # the longest path to each hidden node, found depth by depth
        inside = connected[:, before : before + hidden, before : before + hidden]
        for _ in range(hidden):
            deeper = torch.maximum(level, ((level[:, :, None] + 1) * inside).amax(1))
            if torch.equal(deeper, level):
                break
            level = deeper

        # Rows: inputs (one for each network, or one for all), bias, hidden by (level, activation), outputs.
        copies = 1 if common else population
        table = torch.empty(population, nodes, dtype=torch.int64)
        table[:, : first.inputs] = torch.arange(first.inputs)[None] * copies
        if not common:
            table[:, : first.inputs] += torch.arange(population)[:, None]
        table[:, first.inputs] = first.inputs * copies
        begin = first.inputs * copies + 1
        real = kinds >= 0
        keys = (level * len(ACTIVATIONS) + kinds)[real]
        ordered = torch.sort(keys, stable=True)
        rows = torch.empty_like(keys)
        rows[ordered.indices] = torch.arange(begin, begin + len(keys))
        table[:, before : before + hidden][real] = rows
        end = begin + len(keys)
        table[:, before + hidden :] = end + torch.arange(first.outputs)[None] * population
        table[:, before + hidden :] += torch.arange(population)[:, None]
        self.rows = end + first.outputs * population

        who, source, destination = connected.nonzero(as_tuple=True)
        into, order = torch.sort(table[who, destination], stable=True)
        sources = table[who, source][order]
        # nonzero() goes by network, source, destination: the order of Genome.edges, network after network
        values = None if weights is None else torch.from_numpy(np.concatenate(weights)).to(dtype)[order]
        offsets = torch.searchsorted(into, torch.arange(self.rows + 1))

        self.levels: list[_Level] = []
        levels = ordered.values // len(ACTIVATIONS)
        for depth in range(1, int(levels[-1]) + 1 if len(levels) else 1):
            a, b = (int(torch.searchsorted(levels, d)) for d in (depth, depth + 1))
            kind = ordered.values[a:b] % len(ACTIVATIONS)
            ends = torch.searchsorted(kind, torch.arange(len(ACTIVATIONS) + 1)) + begin + a
            runs = [(n, int(x), int(y)) for n, x, y in zip(ACTIVATIONS, ends, ends[1:], strict=False) if y > x]
            self.levels.append(_level(begin + a, begin + b, sources, offsets, values, runs))
        self.levels.append(_level(end, self.rows, sources, offsets, values, []))

    def prepare(self, shared: Tensor, samples: int) -> Pass:
        """Buffers for `samples` columns under each weight of `shared` [W]: columns are weight by weight."""
        return Pass(self, shared.to(self.dtype).repeat_interleave(samples))

    def __call__(self, x: Tensor, shared: Tensor | Sequence[float]) -> Tensor:
        """Outputs [population, W, samples, outputs] of `x` [samples, inputs] under each shared weight [W].

        Raises:
            ValueError: `x` has another shape, or the networks were built with `common=False`.
        """
        if not self.common or x.ndim != 2 or x.shape[1] != self.inputs:
            raise ValueError(f"x: expected [samples, {self.inputs}], common to all, got {list(x.shape)}")
        shared = torch.as_tensor(shared, dtype=self.dtype)
        ready = self.prepare(shared, len(x))
        ready.inputs[:, 0] = x.t().to(self.dtype).repeat(1, len(shared))
        return ready.run().view(self.outputs, self.population, len(shared), len(x)).permute(1, 2, 3, 0)


def _level(
    begin: int, end: int, sources: Tensor, offsets: Tensor, weights: Tensor | None, runs: list[tuple[str, int, int]]
) -> _Level:
    a, b = int(offsets[begin]), int(offsets[end])
    held = None if weights is None else weights[a:b]
    return _Level(begin, end, sources[a:b], offsets[begin:end] - a, held, runs)


class Network(nn.Module):
    """One topology with a trainable weight for each connection.

    Attributes:
        weight: float32 [size], in the order of `genome.edges()`.

    Args:
        genome: the topology.
        weight: one number shared by all connections, or one for each.

    Raises:
        ValueError: neither one number nor one for each connection.
    """

    def __init__(self, genome: Genome, weight: float | np.ndarray | Tensor = 1.0) -> None:
        super().__init__()
        given = torch.as_tensor(weight, dtype=torch.float32)
        if given.ndim and given.shape != (genome.size,):
            raise ValueError(f"weight: expected a number or {genome.size} of them, got {list(given.shape)}")
        self.genome = genome
        self.weight = nn.Parameter(given.expand(genome.size).clone())
        kinds = np.full(genome.nodes, -1)
        kinds[genome.inputs + 1 : genome.nodes - genome.outputs] = genome.activations
        level = genome.levels()
        order = np.lexsort((kinds, level))  # stable: inputs and outputs stay in their order
        at = np.argsort(order)
        source, destination = genome.edges()
        self._levels: list[tuple[Tensor, Tensor, Tensor, int, int, list[tuple[str, int]]]] = []
        for depth in range(1, int(level.max()) + 1):
            here = order[level[order] == depth]
            first = int(at[here[0]])
            edges = np.flatnonzero(level[destination] == depth)
            runs: list[tuple[str, int]] = []
            for kind in sorted({int(k) for k in kinds[here]}):
                name = "linear" if kind < 0 else ACTIVATIONS[kind]
                runs.append((name, int((kinds[here] == kind).sum())))
            rows, columns = torch.from_numpy(at[source[edges]]), torch.from_numpy(at[destination[edges]] - first)
            self._levels.append((torch.from_numpy(edges), rows, columns, first, len(here), runs))

    def forward(self, x: Tensor) -> Tensor:
        """[…, inputs] → […, outputs]."""
        values = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)
        for edges, rows, columns, before, width, runs in self._levels:
            matrix = self.weight.new_zeros(before, width).index_put((rows, columns), self.weight[edges])
            parts = (values @ matrix).split([count for _, count in runs], -1)
            values = torch.cat([values, *(activate(n, p) for (n, _), p in zip(runs, parts, strict=True))], -1)
        return values[..., -self.genome.outputs :]


def to_module(genome: Genome, weight: float | np.ndarray | Tensor = 1.0) -> Network:
    """`genome` as a module: one weight shared by all connections, or one for each, in the order of its edges."""
    return Network(genome, weight)
