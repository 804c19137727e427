# SPDX-License-Identifier: Apache-2.0
"""Weight-agnostic networks: topologies that work with any weight, shared by all connections (1906.04358)."""

from slimtorch.prune.weight_agnostic.cartpole import SwingUp
from slimtorch.prune.weight_agnostic.digits import Classification
from slimtorch.prune.weight_agnostic.drawing import draw
from slimtorch.prune.weight_agnostic.genome import (
    ACTIVATIONS,
    Genome,
    add_connection,
    add_node,
    change_activation,
    grown,
    start,
)
from slimtorch.prune.weight_agnostic.network import Network, Networks, to_module
from slimtorch.prune.weight_agnostic.search import Config, Found, Task, breed, mutate, rank, search
from slimtorch.prune.weight_agnostic.tune import random_weights, tune_by_gradient, tune_by_population

__all__ = [
    "ACTIVATIONS",
    "Classification",
    "Config",
    "Found",
    "Genome",
    "Network",
    "Networks",
    "SwingUp",
    "Task",
    "add_connection",
    "add_node",
    "breed",
    "change_activation",
    "draw",
    "grown",
    "mutate",
    "random_weights",
    "rank",
    "search",
    "start",
    "to_module",
    "tune_by_gradient",
    "tune_by_population",
]
