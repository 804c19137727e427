# SPDX-License-Identifier: Apache-2.0
"""Weight-agnostic networks against plain computations: node by node, step by step, individual by individual."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slimtorch.data import MEAN, STD, digits
from slimtorch.prune import weight_agnostic as wa
from slimtorch.prune.weight_agnostic import cartpole
from slimtorch.prune.weight_agnostic.genome import legal
from slimtorch.prune.weight_agnostic.search import _FILE

PLAIN = {
    "linear": lambda x: x,
    "step": lambda x: float(x > 0),
    "sin": lambda x: math.sin(math.pi * x),
    "gaussian": lambda x: math.exp(-x * x / 2),
    "tanh": math.tanh,
    "sigmoid": lambda x: (math.tanh(x / 2) + 1) / 2,
    "inverse": lambda x: -x,
    "abs": abs,
    "relu": lambda x: max(x, 0.0),
    "cos": lambda x: math.cos(math.pi * x),
}


def plain(genome, x, weights):
    """Outputs for one sample, from the list of connections; `weights` in the order of the edges."""
    incoming: dict[int, list[tuple[int, float]]] = {}
    for (i, j), weight in zip(genome.to_dict()["connections"], weights, strict=True):
        incoming.setdefault(j, []).append((i, weight))
    names = [None] * (genome.inputs + 1) + genome.to_dict()["activations"] + ["linear"] * genome.outputs

    def value(node):
        if node <= genome.inputs:
            return 1.0 if node == genome.inputs else float(x[node])
        return PLAIN[names[node]](sum(value(i) * weight for i, weight in incoming.get(node, [])))

    return [value(node) for node in range(genome.nodes - genome.outputs, genome.nodes)]


def some(count, inputs=3, outputs=2, steps=12, seed=0):
    """Genomes of different sizes; the first has no hidden node."""
    rng = np.random.default_rng(seed)
    config = wa.Config(add_node=0.5, change_activation=0.2)
    found = []
    for index in range(count):
        genome = wa.start(inputs, outputs, 0.5, rng)
        for _ in range(index * steps // max(1, count - 1)):
            genome = wa.mutate(genome, config, rng)
        found.append(genome)
    return found


def cyclic(genome):
    edges = set(map(tuple, genome.to_dict()["connections"]))
    nodes = set(range(genome.nodes))
    while nodes:
        free = {n for n in nodes if not any(j == n and i in nodes for i, j in edges)}
        if not free:
            return True
        nodes -= free
    return False


# --- genomes ----------------------------------------------------------------------------------------------------------


def test_a_start_has_its_share_of_direct_connections_and_at_least_one():
    rng = np.random.default_rng(0)
    sizes = [wa.start(9, 10, 0.3, rng).size for _ in range(200)]
    assert 27 < np.mean(sizes) < 33
    assert len(set(sizes)) > 5
    assert wa.start(4, 2, 0.0, rng).size == 1
    assert wa.start(4, 2, 1.0, rng).size == 10


def test_a_new_node_splits_a_connection():
    rng = np.random.default_rng(1)
    for genome in some(12):
        child = wa.add_node(genome, rng)
        assert (child.hidden, child.size) == (genome.hidden + 1, genome.size + 1)
        assert not cyclic(child)
        # Making the new node transparent gives the parent back: it has one source and one destination.
        new = [n for n in range(child.inputs + 1, child.nodes - child.outputs)
               if child.connections[:, n].sum() == 1 and child.connections[n].sum() == 1]  # fmt: skip
        undone = []
        for node in new:
            less = child.connections.copy()
            less[np.flatnonzero(less[:, node])[0], np.flatnonzero(less[node])[0]] = True
            undone.append(np.delete(np.delete(less, node, 0), node, 1))
        assert any(np.array_equal(connections, genome.connections) for connections in undone)


def test_legal_connections_are_those_that_close_no_cycle():
    for genome in some(8, seed=3):
        allowed = legal(genome)
        first, last = genome.inputs + 1, genome.nodes - genome.outputs
        edges = set(map(tuple, genome.to_dict()["connections"]))
        reach = {(i, j) for i, j in edges}
        while True:
            longer = {(a, d) for a, b in reach for c, d in edges if b == c} - reach
            if not longer:
                break
            reach |= longer
        for i, j in itertools.product(range(genome.nodes), repeat=2):
            expected = i < last and j >= first and i != j and (i, j) not in edges and (j, i) not in reach
            assert allowed[i, j] == expected


def test_a_connection_is_added_wherever_it_may_and_the_rest_stays():
    rng = np.random.default_rng(2)
    x = [0.3, -0.8, 0.5]
    moved = 0
    for genome in some(30, steps=24, seed=5):
        child = wa.add_connection(genome, rng)
        assert child.size == genome.size + 1
        assert not cyclic(child)
        assert sorted(child.activations) == sorted(genome.activations)
        moved += not np.array_equal(child.activations, genome.activations)
        # The same function when the new connection has weight 0: find it by trying each.
        before = plain(genome, x, np.ones(genome.size))
        after = []
        for silent in range(child.size):
            weights = np.ones(child.size)
            weights[silent] = 0
            after.append(np.allclose(plain(child, x, weights), before, atol=1e-9))
        assert any(after)
    assert moved  # a connection against the order has been drawn: nodes were put in another order
    full = wa.start(2, 2, 1.0, rng)
    assert wa.add_connection(full, rng) is None


def test_a_changed_activation_is_another_one():
    rng = np.random.default_rng(0)
    assert wa.change_activation(wa.start(2, 1, 1.0, rng), rng) is None
    for genome in some(6, seed=7)[2:]:
        child = wa.change_activation(genome, rng)
        assert (child.activations != genome.activations).sum() == 1
        assert np.array_equal(child.connections, genome.connections)


def test_mutation_draws_operators_by_their_parts_and_falls_back():
    rng = np.random.default_rng(0)
    only = wa.Config(add_node=0.0, add_connection=0.0, change_activation=1.0)
    bare = wa.start(3, 1, 1.0, rng)
    assert wa.mutate(bare, only, rng) is bare  # nothing that could change
    either = wa.Config(add_node=0.0, add_connection=0.5, change_activation=0.5)
    assert wa.mutate(wa.start(3, 1, 0.0, rng), either, rng).size == 2
    several = wa.Config(add_node=1.0, add_connection=0.0, change_activation=0.0, operators=3)
    grown = [wa.mutate(bare, several, rng).hidden for _ in range(60)]
    assert set(grown) == {1, 2, 3}


def test_grown_topologies_have_the_size_asked_for():
    rng = np.random.default_rng(0)
    for hidden, size in ((0, 3), (1, 2), (4, 12), (10, 20)):
        genomes = [wa.grown(4, 2, hidden, size, 0.5, rng) for _ in range(5)]
        assert all((g.hidden, g.size) == (hidden, size) for g in genomes)
        assert not any(cyclic(g) for g in genomes)
    assert any(a.to_dict() != b.to_dict() for a, b in itertools.pairwise(genomes))
    with pytest.raises(ValueError, match=r"size: 30 connections do not fit 1 hidden"):
        wa.grown(2, 1, 1, 30, 0.5, rng)
    with pytest.raises(ValueError, match=r"size: expected at least 5, got 4"):
        wa.grown(2, 1, 4, 4, 0.5, rng)


def test_genomes_become_json_and_back():
    for genome in some(5):
        data = json.loads(json.dumps(genome.to_dict()))
        again = wa.Genome.from_dict(data)
        assert np.array_equal(again.connections, genome.connections)
        assert np.array_equal(again.activations, genome.activations)
    data["connections"].append([genome.nodes - 1, 0])
    with pytest.raises(ValueError, match=r"Genome\.to_dict"):
        wa.Genome.from_dict(data)
    with pytest.raises(ValueError, match=r"connections: expected i < j"):
        wa.Genome(1, 1, np.zeros(0, np.int64), np.eye(3, dtype=bool))


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", range(len(wa.ACTIVATIONS)))
def test_activations_are_the_authors(kind):
    connections = np.zeros((4, 4), bool)
    connections[0, 2] = connections[2, 3] = True
    genome = wa.Genome(1, 1, np.array([kind]), connections)
    x = torch.tensor([[-1.7], [-0.4], [0.0], [0.6], [2.3]], dtype=torch.float64)
    got = wa.Networks([genome], dtype=torch.float64)(x, [1.0])[0, 0, :, 0]
    expected = [PLAIN[wa.ACTIVATIONS[kind]](float(value)) for value in x[:, 0]]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(wa.to_module(genome)(x.float())[:, 0].double(), got, atol=1e-6, rtol=1e-5)


def test_a_population_gives_what_each_gives_alone_node_by_node():
    genomes = some(9)
    shared = [-1.5, 0.7, 2.0]
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = wa.Networks(genomes, dtype=torch.float64)(x, shared)
    assert got.shape == (9, 3, 4, 2)
    for (p, genome), (w, weight), (s, sample) in itertools.product(enumerate(genomes), enumerate(shared), enumerate(x)):
        expected = plain(genome, sample, np.full(genome.size, weight))
        torch.testing.assert_close(got[p, w, s], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-9)


def test_individual_weights_are_multiplied_by_the_shared_one():
    genomes = some(6, seed=4)
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(g.size) for g in genomes]
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = wa.Networks(genomes, weights, dtype=torch.float64)(x, [1.0, -0.5])
    for p, genome in enumerate(genomes):
        for w, factor in enumerate((1.0, -0.5)):
            expected = [plain(genome, sample, factor * weights[p]) for sample in x]
            torch.testing.assert_close(got[p, w], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-9)


def test_networks_with_inputs_of_their_own():
    genomes = some(4, seed=8)
    networks = wa.Networks(genomes, common=False, dtype=torch.float64)
    ready = networks.prepare(torch.tensor([0.5, 2.0]), 3)
    x = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for _ in range(2):  # the buffers are used again
        ready.inputs.copy_(x)
        got = ready.run()
        for p, column in itertools.product(range(4), range(6)):
            weight = 0.5 if column < 3 else 2.0
            expected = plain(genomes[p], x[:, p, column], np.full(genomes[p].size, weight))
            torch.testing.assert_close(got[:, p, column], torch.tensor(expected, dtype=torch.float64))
        x = -x


def test_networks_refuse_what_does_not_fit():
    genomes = some(3)
    with pytest.raises(ValueError, match=r"genomes: expected at least one"):
        wa.Networks([])
    with pytest.raises(ValueError, match=r"genomes: expected the same numbers"):
        wa.Networks([*genomes, *some(1, inputs=4)])
    with pytest.raises(ValueError, match=r"weights: expected one for each connection"):
        wa.Networks(genomes, [np.ones(1)] * 3)
    with pytest.raises(ValueError, match=r"x: expected \[samples, 3\]"):
        wa.Networks(genomes)(torch.zeros(2, 4), [1.0])


def test_a_module_is_the_same_network_and_trains():
    genome = some(8, seed=11)[-1]
    weights = np.random.default_rng(0).standard_normal(genome.size).astype(np.float32)
    module = wa.to_module(genome, weights)
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    got = module(x)
    assert got.shape == (2, 5, 2)
    expected = [plain(genome, sample, weights) for sample in x.flatten(0, 1)]
    torch.testing.assert_close(got.flatten(0, 1), torch.tensor(expected), atol=1e-5, rtol=1e-4)
    # the gradient of a weight against a difference quotient of the plain computation
    got.sum().backward()
    for index in range(genome.size):
        step = np.zeros(genome.size)
        step[index] = 1e-5
        up, down = (np.sum([plain(genome, s.double(), weights + d) for s in x.flatten(0, 1)]) for d in (step, -step))
        assert float(module.weight.grad[index]) == pytest.approx((up - down) / 2e-5, abs=2e-3, rel=2e-3)
    again = wa.to_module(genome)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), module(x))
    assert bool((wa.to_module(genome, 0.5).weight == 0.5).all())
    with pytest.raises(ValueError, match=r"weight: expected a number or"):
        wa.to_module(genome, np.ones(genome.size + 1))


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_swing_up_is_the_plain_simulation():
    task = wa.SwingUp(episodes=2, steps=60)
    genomes = some(3, inputs=5, outputs=1, seed=6)
    shared = torch.tensor([-1.0, 2.0])
    got = task.rewards(genomes, shared, 5)
    starts = task.starts(5, 2)
    for (p, genome), (w, weight) in itertools.product(enumerate(genomes), enumerate(shared)):
        total = 0.0
        for x, v, a, o in starts.t().tolist():
            for _ in range(60):
                seen = [x, v, math.cos(a), math.sin(a), o]
                push = 10 * max(-1.0, min(1.0, plain(genome, seen, np.full(genome.size, float(weight)))[0]))
                s, c = math.sin(a), math.cos(a)
                vd = (-2 * 0.3 * o * o * s + 3 * 0.5 * 9.82 * s * c + 4 * push - 4 * 0.1 * v) / (4 - 1.5 * c * c)
                od = (-3 * 0.3 * o * o * s * c + 6 * 9.82 * s + 6 * (push - 0.1 * v) * c) / (4 * 0.6 - 3 * 0.3 * c * c)
                v, o = v + 0.02 * vd, o + 0.02 * od
                x, a = x + 0.02 * v, a + 0.02 * o
                if abs(x) > 2.4:
                    break
                total += (1 + math.cos(a)) / 2 * math.cos(x / 2.4 * math.pi / 2)
        assert float(got[p, w]) == pytest.approx(total / 120, abs=2e-3)


def test_without_force_the_pole_swings_at_its_frequency_and_loses_nothing_but_friction():
    """Near the bottom θ̈ = -(6 (M + m) g) / (4 L (M + m) - 3 m L) φ with the cart at rest after it: small swings."""
    zero = torch.zeros((), dtype=torch.float64)
    x, v, theta, omega = zero, zero, zero + math.pi - 0.01, zero
    frequency = math.sqrt(6 * 9.82 / (4 * 0.6 - 3 * 0.3))
    dt, times = 1e-3, []
    for step in range(2000):
        before = theta - math.pi
        x, v, theta, omega = cartpole.advance(x, v, theta, omega, zero, dt)
        if before < 0 <= theta - math.pi or before > 0 >= theta - math.pi:
            times.append(step * dt)
    assert np.diff(times).mean() == pytest.approx(math.pi / frequency, rel=0.02)


def test_an_episode_ends_where_the_track_ends_or_the_force_is_no_number():
    connections = np.zeros((7, 7), bool)
    connections[5, 6] = True  # bias to output: full force
    genome = wa.Genome(5, 1, np.zeros(0, np.int64), connections)
    task = wa.SwingUp(steps=400)
    short = wa.SwingUp(steps=60)
    starts = torch.tensor([[0.0], [0.0], [math.pi], [0.0]])
    long, brief = (float(t.play([genome], torch.ones(1), starts)) for t in (task, short))
    assert brief > 0
    assert long * 400 == pytest.approx(brief * 60, rel=1e-4)  # nothing is earned after the end of the track
    broken = task.play([genome], torch.ones(1), starts, [np.array([np.nan], np.float32)])
    assert float(broken) == 0


def test_balance_is_the_time_upright_at_the_end():
    silent = wa.Genome(5, 1, np.zeros(0, np.int64), np.zeros((7, 7), bool))  # no connection: no force
    task = wa.SwingUp(steps=10)
    for angle, expected in ((0.0, 1.0), (0.2, 1.0), (0.6, 0.0), (math.pi, 0.0)):
        starts = torch.tensor([[0.0], [0.0], [angle], [0.0]])
        assert float(task._simulate([silent], torch.ones(1), starts, None)[1]) == expected
    starts = torch.tensor([[2.3, 0.0], [8.0, 0.0], [0.0, 0.0], [0.0, 0.0]])  # one leaves the track at once
    assert float(task._simulate([silent], torch.ones(1), starts, None)[1]) == 0.5


def test_starts_differ_by_seed_and_the_held_out_ones_stay():
    task = wa.SwingUp(episodes=3)
    assert not torch.equal(task.starts(1, 3), task.starts(2, 3))
    drawn = task.starts(0, 4000)
    torch.testing.assert_close(drawn.mean(1), torch.tensor([0, 0, math.pi, 0]), atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.std(1), torch.full((4,), 0.2), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match=r"episodes: expected at least 1"):
        wa.SwingUp(episodes=0)


@pytest.fixture(scope="module")
def small():
    return digits(100, 50, 50)


def test_classification_is_cross_entropy_of_small_images(small):
    task = wa.Classification(small, size=4, batch=20)
    assert (task.inputs, task.outputs) == (16, 10)
    pixels = small.test.images * STD + MEAN
    blocks = pixels.view(50, 4, 7, 4, 7).mean((2, 4)).flatten(1)
    torch.testing.assert_close(task.part("test").images, blocks, atol=1e-5, rtol=1e-5)
    genomes = some(3, inputs=16, outputs=10)
    shared = torch.tensor([0.5, -1.0])
    outputs = wa.Networks(genomes)(task.part("validation").images, shared)
    reward, right = task.validate(genomes, shared), task.accuracy(genomes, shared, "validation")
    for p, w in itertools.product(range(3), range(2)):
        loss = F.cross_entropy(outputs[p, w], small.validation.labels)
        assert float(reward[p, w]) == pytest.approx(-float(loss), rel=1e-4)
        share = float((outputs[p, w].argmax(1) == small.validation.labels).float().mean())
        assert float(right[p, w]) == pytest.approx(share)
    a, b, c = (task.rewards(genomes, shared, seed) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    with pytest.raises(ValueError, match=r"batch: expected at most 100"):
        wa.Classification(small, batch=101)
    with pytest.raises(ValueError, match=r"size: expected at most 28"):
        wa.Classification(small, size=29)
    with pytest.raises(ValueError, match=r"name: expected one of train"):
        task.part("text")


# --- search -----------------------------------------------------------------------------------------------------------


def test_ranks_go_front_after_front():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (2, 40)).astype(float)
    places = wa.rank(a, b)
    assert sorted(places) == list(range(40))

    def depth(i):
        above = [j for j in range(40) if a[j] >= a[i] and b[j] >= b[i] and (a[j] > a[i] or b[j] > b[i])]
        return 1 + max(map(depth, above)) if above else 0

    fronts = [depth(i) for i in np.argsort(places)]
    assert fronts == sorted(fronts)
    # within a front: the ends first, then the loneliest
    x = np.array([0.0, 1.0, 1.2, 3.0, 10.0])
    assert list(np.argsort(wa.rank(x, -x)))[:3] == [0, 4, 3]


class Parity:
    """Reward: how near the output for (1, 1) comes to 0.5, whatever the weight."""

    inputs, outputs = 2, 1

    def __init__(self, spoil=None, shape=None):
        self.spoil, self.shape, self.seeds = spoil, shape, []

    def describe(self):
        return {"task": "half"}

    def rewards(self, genomes, shared, seed):
        self.seeds.append(seed)
        value = -(wa.Networks(genomes)(torch.ones(1, 2), shared)[:, :, 0, 0] - 0.5).abs()
        if self.spoil is not None and len(self.seeds) == self.spoil:
            value[3, 1] = math.nan
        return value if self.shape is None else value[:, :1]

    def validate(self, genomes, shared):
        return -(wa.Networks(genomes)(torch.ones(1, 2), shared)[:, :, 0, 0] - 0.5).abs()


CONFIG = wa.Config(population=24, generations=12, every=4, operators=2)


def told(found):
    return (found.best.to_dict(), found.validation, found.history, [g.to_dict() for g in found.population])


def test_a_search_improves_and_depends_on_its_seed_only():
    found = wa.search(Parity(), CONFIG, seed=1)
    assert told(wa.search(Parity(), CONFIG, seed=1)) == told(found)
    assert told(wa.search(Parity(), CONFIG, seed=2)) != told(found)
    first = wa.search(Parity(), wa.Config(population=24, generations=1), seed=1)
    assert found.validation > first.validation + 0.1
    assert [len(found.history[name]) for name in ("best_mean", "median_mean", "best_max", "size")] == [12] * 4
    assert found.history["validated"] == [3, 7, 11]
    again = Parity().validate([found.best], torch.tensor(CONFIG.shared)).mean()
    assert float(again) == pytest.approx(found.validation, abs=1e-6)


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path):
    whole = wa.search(Parity(), CONFIG, seed=3)

    def interrupt(done, total):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wa.search(Parity(), CONFIG, interrupt, folder=tmp_path, seed=3)
    task, steps = Parity(), []
    found = wa.search(task, CONFIG, lambda done, total: steps.append((done, total)), folder=tmp_path, seed=3)
    assert told(found) == told(whole)
    assert steps == [(9, 12), (10, 12), (11, 12), (12, 12)]  # after the checkpoint of generation 8
    assert told(wa.search(Parity(spoil=1), CONFIG, folder=tmp_path, seed=3)) == told(whole)  # nothing is run again
    longer = wa.Config(**{**CONFIG.__dict__, "generations": 16})
    assert told(wa.search(Parity(), longer, folder=tmp_path, seed=3)) == told(wa.search(Parity(), longer, seed=3))
    with pytest.raises(ValueError, match=r"at generation 16 already, beyond 12"):
        wa.search(Parity(), CONFIG, folder=tmp_path, seed=3)


def test_a_folder_of_another_search_is_refused(tmp_path):
    wa.search(Parity(), CONFIG, folder=tmp_path, seed=0)
    with pytest.raises(ValueError, match=r"another search \(different: seed\)"):
        wa.search(Parity(), CONFIG, folder=tmp_path, seed=1)
    other = wa.Config(**{**CONFIG.__dict__, "shared": (1.0, 2.0), "elite": 0.3})
    with pytest.raises(ValueError, match=r"different: elite, shared"):
        wa.search(Parity(), other, folder=tmp_path, seed=0)
    path = tmp_path / _FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"is damaged or no checkpoint"):
        wa.search(Parity(), CONFIG, folder=tmp_path, seed=0)


def test_rewards_that_are_no_numbers_stop_it_and_keep_what_was_done(tmp_path):
    text = r"expected finite rewards, got nan in generation 5 for individual 3 \(\d+ connections\) under .* weight -1"
    with pytest.raises(ValueError, match=text):
        wa.search(Parity(spoil=6), CONFIG, folder=tmp_path, seed=0)
    assert told(wa.search(Parity(), CONFIG, folder=tmp_path, seed=0)) == told(wa.search(Parity(), CONFIG, seed=0))
    with pytest.raises(ValueError, match=r"expected rewards of shape \[24, 6\] in generation 0, got \[24, 1\]"):
        wa.search(Parity(shape=1), CONFIG)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"population": 1}, "population: expected at least 2"),
        ({"shared": ()}, "shared: expected finite weights"),
        ({"shared": (math.nan,)}, "shared: expected finite weights"),
        ({"elite": 1.5}, "elite: expected a number from 0 to 1"),
        ({"cull": 1.0}, "cull: expected less than 1"),
        ({"add_node": 0.0, "add_connection": 0.0, "change_activation": 0.0}, "expected one above 0"),
    ],
)
def test_configurations_that_make_no_sense(wrong, text):
    with pytest.raises(ValueError, match=text):
        wa.Config(**wrong)


def test_breeding_keeps_elites_and_culls():
    rng = np.random.default_rng(0)
    population = [wa.start(4, 2, 0.5, rng) for _ in range(20)]
    rewards = np.stack([np.arange(20.0)] * 2, 1)
    config = wa.Config(population=20, elite=0.25, cull=0.5, complexity=0.0, add_node=1.0, add_connection=0.0,
                       change_activation=0.0, tournament=2)  # fmt: skip
    following = wa.breed(population, rewards, config, rng)
    assert len(following) == 20
    assert [following[i] is population[19 - i] for i in range(5)] == [True] * 5

    def parents(child):  # a split keeps all other connections of its parent
        flat = {tuple(edge) for edge in child.to_dict()["connections"]}
        direct = {(i, j - 1) for i, j in flat if i <= 4 and j > 5}
        edges = [{tuple(e) for e in p.to_dict()["connections"]} for p in population]
        return {i for i, e in enumerate(edges) if direct <= e and len(e) == len(direct) + 1}

    assert all(max(parents(child)) >= 10 for child in following[5:])


# --- weights ----------------------------------------------------------------------------------------------------------


def test_random_weights_are_uniform_and_repeat():
    genome = some(3)[-1]
    drawn = np.stack(wa.random_weights(genome, 500, 0))
    assert drawn.shape == (500, genome.size)
    assert -2 <= drawn.min() < -1.9 < 1.9 < drawn.max() <= 2
    assert np.array_equal(drawn, np.stack(wa.random_weights(genome, 500, 0)))
    assert not np.array_equal(drawn, np.stack(wa.random_weights(genome, 500, 1)))


def test_weights_trained_by_gradient_classify_better(small):
    task = wa.Classification(small, size=4)
    genome = wa.grown(16, 10, 5, 90, 0.5, np.random.default_rng(0))
    train = task.part("train")

    def tuned():
        return wa.tune_by_gradient(genome, train.images, train.labels, start=0.5, steps=60, rate=0.05)

    weights = tuned()
    one = torch.ones(1)
    before = float(task.accuracy([genome], torch.tensor([0.5]), "train"))
    after = float(task.accuracy([genome], one, "train", [weights]))
    assert after > before + 0.2
    assert np.array_equal(weights, tuned())
    with pytest.raises(ValueError, match=r"rate: the loss is (nan|inf)"):
        wa.tune_by_gradient(genome, train.images, train.labels, start=math.inf, steps=2)


def test_weights_searched_for_come_near_the_best():
    genomes = [g for g in some(4, seed=9) if g.size > 3][:2]
    goals = [np.linspace(-1, 1, g.size) for g in genomes]

    def rewards(every, shared, seed, weights):
        by_size = {g.size: goal for g, goal in zip(genomes, goals, strict=True)}
        missed = (w - by_size[g.size] for g, w in zip(every, weights, strict=True))
        return torch.tensor([[-float(np.square(m).sum())] for m in missed])

    assert genomes[0].size != genomes[1].size
    found = wa.tune_by_population(genomes, rewards, start=[0.0, 0.5], rounds=40, population=40, seed=0)
    assert all(np.abs(weights - goal).max() < 0.1 for weights, goal in zip(found, goals, strict=True))
    with pytest.raises(ValueError, match=r"start: expected 2 weights"):
        wa.tune_by_population(genomes, rewards, start=[0.0])


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_a_drawing_has_every_node_and_connection():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    genome = some(6, seed=2)[-1]
    axis = figure.add_subplot()
    wa.draw(axis, genome, inputs=["a", "b", "c"], outputs=["left", "right"])
    texts = [text.get_text() for text in axis.texts]
    assert {"a", "b", "c", "bias", "left", "right"} <= set(texts)
    assert len(texts) == 6 + genome.hidden
    assert len(axis.lines) == genome.size + genome.nodes
    with pytest.raises(ValueError, match=r"inputs: expected 3 names"):
        wa.draw(axis, genome, inputs=["a"])
    with pytest.raises(ValueError, match=r"outputs: expected 2 names"):
        wa.draw(axis, genome, outputs=["a"])
    with pytest.raises(ValueError, match=r"grid: expected as many pixels as the 3 inputs"):
        wa.draw(axis, genome, grid=(2, 2))
    pixels = some(3, inputs=9, seed=2)[-1]
    wa.draw(figure.add_subplot(), pixels, grid=(3, 3))
