# SPDX-License-Identifier: Apache-2.0
"""Topologies without weights, and the operators that vary them (Gaier & Ha, 1906.04358, section 3 and Figure 3).

    nodes, in topological order:   inputs … | bias | hidden …, each with its activation | outputs …
    connections[i, j]:             node i feeds node j; i < j always, so the graph is acyclic

Outputs are linear: what is chosen among is the activation of hidden nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimtorch.prune.magnitude import check_count

ACTIVATIONS = ("linear", "step", "sin", "gaussian", "tanh", "sigmoid", "inverse", "abs", "relu", "cos")
"""The authors' list: step is x > 0, sin and cos are of πx, gaussian is exp(-x²/2), inverse is -x."""


@dataclass(frozen=True, eq=False)
class Genome:
    """One topology.

    Attributes:
        inputs: without the bias, which is the node after them.
        outputs: the last nodes.
        activations: int64 [hidden], index into `ACTIVATIONS`.
        connections: bool [nodes, nodes], strictly above the diagonal; nothing feeds an input or the bias, and an output
            feeds nothing.
    """

    inputs: int
    outputs: int
    activations: np.ndarray
    connections: np.ndarray

    def __post_init__(self) -> None:
        check_count("inputs", self.inputs, 1)
        check_count("outputs", self.outputs, 1)
        n, first = self.nodes, self.inputs + 1
        held = self.connections
        if held.shape != (n, n) or held.dtype != np.bool_:
            raise ValueError(f"connections: expected bool [{n}, {n}], got {held.dtype} {list(held.shape)}")
        if np.tril(held).any() or held[:, :first].any() or held[n - self.outputs :].any():
            raise ValueError("connections: expected i < j, none into an input or the bias, none out of an output")
        if self.hidden and not 0 <= int(self.activations.min()) <= int(self.activations.max()) < len(ACTIVATIONS):
            raise ValueError(f"activations: expected indices below {len(ACTIVATIONS)}, got {self.activations.tolist()}")

    @property
    def hidden(self) -> int:
        """Hidden nodes."""
        return len(self.activations)

    @property
    def nodes(self) -> int:
        """Inputs, bias, hidden nodes and outputs."""
        return self.inputs + 1 + self.hidden + self.outputs

    @property
    def size(self) -> int:
        """Connections: the complexity that the search keeps low."""
        return int(np.count_nonzero(self.connections))

    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """(source, destination) of each connection, by source, then destination: the order weights are given in."""
        source, destination = np.nonzero(self.connections)
        return source, destination

    def levels(self) -> np.ndarray:
        """int64 [nodes]: the longest path to each node; inputs and bias 0, hidden nodes 1 at least, outputs alike."""
        first, last = self.inputs + 1, self.nodes - self.outputs
        level = np.zeros(self.nodes, np.int64)
        for j in range(first, last):
            level[j] = 1 + level[:j][self.connections[:j, j]].max(initial=0)
        level[last:] = 1 + level.max()
        return level

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it."""
        source, destination = self.edges()
        return {
            "inputs": self.inputs,
            "outputs": self.outputs,
            "activations": [ACTIVATIONS[index] for index in self.activations],
            "connections": [[int(i), int(j)] for i, j in zip(source, destination, strict=True)],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Genome:
        """ValueError for what `to_dict` cannot have written."""
        try:
            activations = np.array([ACTIVATIONS.index(name) for name in data["activations"]], np.int64)
            nodes = data["inputs"] + 1 + len(activations) + data["outputs"]
            connections = np.zeros((nodes, nodes), np.bool_)
            for i, j in data["connections"]:
                if not 0 <= i < j < nodes:
                    raise ValueError(f"connection {i} -> {j} of {nodes} nodes")
                connections[i, j] = True
            return cls(data["inputs"], data["outputs"], activations, connections)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"data: expected what Genome.to_dict gives ({error})") from error


def start(inputs: int, outputs: int, share: float, rng: np.random.Generator) -> Genome:
    """No hidden node; each connection of an input or the bias with an output is there with probability `share`.

    At least one is there.
    """
    nodes = inputs + 1 + outputs
    connections = np.zeros((nodes, nodes), np.bool_)
    block = rng.random((inputs + 1, outputs)) < share
    if not block.any():
        block[rng.integers(inputs + 1), rng.integers(outputs)] = True
    connections[: inputs + 1, inputs + 1 :] = block
    return Genome(inputs, outputs, np.zeros(0, np.int64), connections)


def add_node(genome: Genome, rng: np.random.Generator) -> Genome | None:
    """A random connection is split by a new node with a random activation; None where there is no connection."""
    source, destination = genome.edges()
    if not len(source):
        return None
    chosen = int(rng.integers(len(source)))
    i, j = int(source[chosen]), int(destination[chosen])
    at = max(i, genome.inputs) + 1  # as early as the order allows: after its source, behind the bias
    connections = np.insert(np.insert(genome.connections, at, False, axis=0), at, False, axis=1)
    j += 1
    connections[i, j] = False
    connections[i, at] = connections[at, j] = True
    activation = rng.integers(len(ACTIVATIONS))
    activations = np.insert(genome.activations, at - genome.inputs - 1, activation)
    return Genome(genome.inputs, genome.outputs, activations, connections)


def legal(genome: Genome) -> np.ndarray:
    """bool [nodes, nodes]: connections that may be added: not there yet, and no cycle comes of them."""
    first, last = genome.inputs + 1, genome.nodes - genome.outputs
    reach = np.eye(genome.hidden, dtype=np.bool_)  # reach[a, b]: a path from hidden node a to b
    inner = genome.connections[first:last, first:last]
    for a in reversed(range(genome.hidden)):
        reach[a] |= reach[inner[a]].any(axis=0)
    allowed = ~genome.connections
    allowed[:, :first] = False
    allowed[last:] = False
    allowed[first:last, first:last] &= ~reach.T
    return allowed


def add_connection(genome: Genome, rng: np.random.Generator) -> Genome | None:
    """One of the legal connections, each as likely as the others; None where there is none."""
    source, destination = np.nonzero(legal(genome))
    if not len(source):
        return None
    chosen = int(rng.integers(len(source)))
    i, j = int(source[chosen]), int(destination[chosen])
    connections = genome.connections.copy()
    connections[i, j] = True
    activations = genome.activations
    if i > j:
        order = _order(connections, genome.inputs + 1, genome.nodes - genome.outputs)
        connections = connections[np.ix_(order, order)]
        activations = activations[order[genome.inputs + 1 : genome.nodes - genome.outputs] - genome.inputs - 1]
    return Genome(genome.inputs, genome.outputs, activations, connections)


def _order(connections: np.ndarray, first: int, last: int) -> np.ndarray:
    """The nodes, hidden ones in an order in which sources come before destinations."""
    inner = connections[first:last, first:last]
    left = np.ones(last - first, np.bool_)
    order: list[int] = []
    while left.any():
        ready = left & ~inner[left].any(axis=0)
        order += [first + int(a) for a in np.flatnonzero(ready)]
        left &= ~ready
    return np.array([*range(first), *order, *range(last, len(connections))], np.int64)


def change_activation(genome: Genome, rng: np.random.Generator) -> Genome | None:
    """A random hidden node gets another activation; None where there is no hidden node."""
    if not genome.hidden:
        return None
    at = int(rng.integers(genome.hidden))
    activations = genome.activations.copy()
    activations[at] = (activations[at] + rng.integers(1, len(ACTIVATIONS))) % len(ACTIVATIONS)
    return Genome(genome.inputs, genome.outputs, activations, genome.connections)


def grown(inputs: int, outputs: int, hidden: int, size: int, share: float, rng: np.random.Generator) -> Genome:
    """A random topology of a given size: what the operators of the search make where nothing is selected.

    Args:
        inputs, outputs: of the network; the bias comes on top.
        hidden, size: nodes and connections of the result; each split adds one of both, so `size > hidden` must hold.
        share: of the direct connections that it begins with (fewer where `size` allows no more).
        rng: draws it.

    Raises:
        ValueError: no such network: too few or too many connections for so many nodes.
    """
    check_count("hidden", hidden, 0)
    check_count("size", size, hidden + 1)
    connections = np.zeros((inputs + 1 + outputs,) * 2, np.bool_)
    pairs = (inputs + 1) * outputs
    begin = min(max(1, round(share * pairs)), size - hidden)
    chosen = rng.permutation(pairs)[:begin]
    connections[chosen // outputs, inputs + 1 + chosen % outputs] = True
    genome = Genome(inputs, outputs, np.zeros(0, np.int64), connections)
    splits, links = hidden, size - begin - hidden
    while splits or links:
        changed = add_connection(genome, rng) if rng.integers(splits + links) < links else None
        if changed is not None:
            links -= 1
        elif splits:  # drawn, or there is no room for a connection before there is another node
            changed = add_node(genome, rng)
            splits -= 1
        if changed is None:
            raise ValueError(f"size: {size} connections do not fit {hidden} hidden nodes of this network")
        genome = changed
    return genome
