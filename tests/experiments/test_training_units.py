# SPDX-License-Identifier: Apache-2.0
"""Units of training: order, fairness, pruning to the share asked for, storing."""

from dataclasses import replace

import pytest
import torch

from slimtorch.data import Digits, digits
from slimtorch.experiments.store import Record
from slimtorch.experiments.training import (
    NETWORKS,
    PRUNED,
    Method,
    Recipe,
    Unit,
    block_config,
    neuron_ratio,
    restore,
    train_unit,
    units,
)
from slimtorch.measure import count_parameters, threads_of_torch

RECIPE = Recipe(train=100, validation=50, test=100, epochs=0.25)


@pytest.fixture(scope="module")
def data():
    return digits(RECIPE.train, RECIPE.validation, RECIPE.test)


def train(unit: Unit, data: Digits) -> Record:
    """The record of a unit, after those it needs."""
    needed = [] if unit.needs is None else [train(unit.needs, data)]
    return train_unit(unit, RECIPE, data, needed)


def test_units_come_after_what_they_need():
    every = units(["lenet300", "lenet5"], [0.5, 0.9], 2)
    assert len(every) == len(set(every)) == 2 * 2 * (1 + len(PRUNED) * 2)
    for index, unit in enumerate(every):
        assert unit.needs is None or unit.needs in every[:index]
    assert len({unit.name for unit in every}) == len(every)


def test_any_part_of_the_configuration_changes_the_key():
    unit = Unit("lenet300", Method.BLOCKS, 0.9, 0)
    others = [
        replace(unit, seed=1).config(RECIPE),
        replace(unit, sparsity=0.8).config(RECIPE),
        unit.config(replace(RECIPE, tune_rate=0.5)),
        unit.config(replace(RECIPE, epochs=1)),
    ]
    assert unit.config(RECIPE) not in others


@pytest.mark.parametrize("method", [Method.ONE_SHOT, Method.ITERATIVE, Method.BLOCKS, Method.NEURONS])
@pytest.mark.parametrize("network", ["lenet300", "lenet5"])
def test_each_method_keeps_the_share_asked_for(network, method, data):
    record = train(Unit(network, method, 0.9, 0), data)
    total = count_parameters(NETWORKS[network].build(NETWORKS[network].hidden))[0]
    assert record.result["nonzero"] / total == pytest.approx(0.1, abs=0.015)
    model = restore(network, record)
    assert count_parameters(model)[1] == record.result["nonzero"]
    assert not any("parametrizations" in key for key in model.state_dict())
    smaller = NETWORKS[network].widths(model) != NETWORKS[network].hidden
    assert smaller == (method is Method.NEURONS)


def test_blocks_are_whole_blocks(data):
    model = restore("lenet5", train(Unit("lenet5", Method.BLOCKS, 0.8, 0), data))
    for name, (rows, columns) in (("conv1", (4, 5)), ("conv2", (10, 25)), ("fc1", (16, 16))):
        matrix = model.get_submodule(name).weight.flatten(1)
        padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))
        blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2)
        occupied = (blocks != 0).any(3).any(2)
        assert 0 < int(occupied.sum()) < occupied.numel()
        # Inside the matrix, a block that is there is there whole.
        whole = (blocks != 0).sum((2, 3))[: matrix.shape[0] // rows, : matrix.shape[1] // columns]
        assert set(whole.unique().tolist()) <= {0, rows * columns}
    assert bool((model.fc2.weight != 0).all())


def test_block_shares_add_up_to_those_of_single_weights():
    for network, spec in NETWORKS.items():
        model = spec.build(spec.hidden)
        for sparsity in (0.5, 0.8, 0.9, 0.95, 0.98):
            config = block_config(network, model, sparsity)
            sizes = {name: model.get_submodule(name).weight.numel() for name in (*config, spec.output)}
            kept = sizes[spec.output] + sum((1 - config[name].sparsity) * sizes[name] for name in config)
            assert kept == pytest.approx((1 - sparsity) * sum(sizes.values()), rel=0.01)


def test_neuron_ratio():
    for network, spec in NETWORKS.items():
        total = count_parameters(spec.build(spec.hidden))[0]
        for sparsity in (0.5, 0.9, 0.95):
            ratio = neuron_ratio(network, sparsity)
            widths = [max(1, width - round(ratio * width)) for width in spec.hidden]
            assert count_parameters(spec.build(widths))[0] / total == pytest.approx(1 - sparsity, rel=0.15)


def test_the_control_has_the_widths_of_the_pruned_network_and_other_weights(data):
    records = [train(Unit("lenet300", method, 0.9, 0), data) for method in (Method.SCRATCH, Method.NEURONS)]
    assert records[0].result["hidden"] == records[1].result["hidden"]
    assert not (records[0].arrays["fc1.weight"] == records[1].arrays["fc1.weight"]).any()


def test_the_same_unit_gives_the_same_network(data):
    records = []
    with threads_of_torch(1):
        for number in range(2):
            torch.manual_seed(number)
            records.append(train(Unit("lenet300", Method.DENSE, 0.0, 3), data))
    first, second = records
    assert all((first.arrays[key] == second.arrays[key]).all() for key in first.arrays)


def test_only_what_is_needed_again_is_kept_with_weights(data):
    for unit in (Unit("lenet300", Method.DENSE, 0.0, 1), Unit("lenet300", Method.ONE_SHOT, 0.5, 1)):
        assert bool(train(unit, data).arrays) == (unit.method is Method.DENSE)
