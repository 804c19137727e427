# SPDX-License-Identifier: Apache-2.0
"""Lottery tickets: which weights stay, where they start, controls, files, going on after an interruption."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from slimtorch import models, prune
from slimtorch.prune.lottery import Ticket, early_stop, rates_of, search

from .networks import CASES, Mlp

STEPS = 6


def data() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(16, 20, generator=g), torch.randint(0, 4, (16,), generator=g)) for _ in range(STEPS)]


class Trainer:
    """Adam over the same batches each time; remembers with what it was called."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[int] = []
        self.seen: list[dict[str, Tensor]] = []
        self.fail_at = fail_at

    def __call__(self, model: nn.Module, start: int, after_step: Callable[[], None]) -> Any:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(start)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for x, y in data()[start:]:
            self.seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            after_step()
            losses.append(loss.item())
        return {"losses": losses}


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Mlp()


def plain(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_iterative_magnitude_pruning_by_hand() -> None:
    model, train = mlp(), Trainer()
    first = plain(model)
    rates = {"fc*": 0.2, "out": 0.1}
    tickets = list(search(model, train, rounds=3, rates=rates))
    assert [t.round for t in tickets] == [0, 1, 2, 3]
    assert tickets[0].remaining == 1
    assert train.calls == [0, 0, 0, 0]
    sizes = {"fc1": 640, "fc2": 512, "out": 64}
    for index, ticket in enumerate(tickets):
        for name, size in sizes.items():
            rate = 0.1 if name == "out" else 0.2
            assert int(ticket.masks[name].sum()) == size - round((1 - (1 - rate) ** index) * size)
        assert all(torch.equal(ticket.start[k], v) for k, v in first.items())
        assert ticket.start.keys() == ticket.final.keys() == first.keys()
    for before, after in itertools.pairwise(tickets):
        for name in sizes:  # of what was left, the smallest after training go
            kept, trained = before.masks[name], before.final[f"{name}.weight"].abs()
            assert not bool((after.masks[name] & ~kept).any())
            gone = kept & ~after.masks[name]
            assert trained[gone].max() <= trained[after.masks[name]].min()
    for index in range(4):  # training starts from the first weights, zeros where masked
        seen = train.seen[index * STEPS]
        assert torch.equal(seen["fc1.parametrizations.weight.original"], first["fc1.weight"])
        assert torch.equal(seen["fc1.bias"], first["fc1.bias"])


def test_tickets_train_as_the_search_trained_them() -> None:
    tickets = list(search(mlp(), Trainer(), rounds=2))
    for ticket in tickets:
        model = mlp(seed=9)
        ticket.apply_(model)
        assert prune.sparsity(model) == pytest.approx(1 - ticket.remaining)
        assert Trainer()(model, 0, lambda: None) == ticket.result
        assert not bool(model.fc1.weight[~ticket.masks["fc1"]].any())


def test_late_rewinding_starts_from_step_k() -> None:
    train = Trainer()
    tickets = list(search(mlp(), train, rounds=2, rewind=2))
    assert train.calls == [0, 2, 2]
    # the weights after two steps of dense training are those before the third
    third = train.seen[2]
    for ticket in tickets[1:]:
        assert ticket.step == 2
        assert torch.equal(ticket.start["fc1.weight"], third["fc1.parametrizations.weight.original"])
        assert torch.equal(ticket.start["out.bias"], third["out.bias"])
    assert not torch.equal(tickets[1].start["fc1.weight"], mlp().fc1.weight)
    with pytest.raises(ValueError, match=r"train: expected at least rewind=7 calls of after_step.*got 6"):
        list(search(mlp(), Trainer(), rounds=1, rewind=7))


def test_buffers_are_rewound() -> None:
    model = CASES["conv"].model()
    x = CASES["conv"].inputs()

    def train(network: nn.Module, start: int, after_step: Callable[[], None]) -> None:
        network.train()
        network(x + 1).square().mean().backward()
        after_step()

    mean = model.bn1.running_mean.clone()
    tickets = list(search(model, train, rounds=1))
    assert torch.equal(tickets[1].start["bn1.running_mean"], mean)
    assert not torch.equal(tickets[1].final["bn1.running_mean"], mean)


def test_controls() -> None:
    ticket = list(search(mlp(), Trainer(), rounds=4))[-1]
    other = ticket.with_start(mlp(seed=5))
    assert torch.equal(other.start["fc1.weight"], mlp(seed=5).fc1.weight)
    assert all(torch.equal(other.masks[n], m) for n, m in ticket.masks.items())
    random = ticket.shuffled(seed=1)
    assert all(int(random.masks[n].sum()) == int(m.sum()) for n, m in ticket.masks.items())
    assert not torch.equal(random.masks["fc1"], ticket.masks["fc1"])
    assert torch.equal(random.masks["fc1"], ticket.shuffled(seed=1).masks["fc1"])
    assert all(torch.equal(random.start[k], v) for k, v in ticket.start.items())
    assert (random.final, random.result, other.final) == ({}, None, {})
    with pytest.raises(ValueError, match="state: expected the names and shapes"):
        ticket.with_start(nn.Linear(2, 2))


def test_saved_and_loaded(tmp_path: Path) -> None:
    ticket = list(search(mlp(), Trainer(), rounds=1))[-1]
    ticket.save(tmp_path / "deep" / "t.safetensors")
    again = Ticket.load(tmp_path / "deep" / "t.safetensors")
    assert (again.round, again.step, again.result, again.config) == (1, 0, ticket.result, ticket.config)
    for part in ("masks", "start", "final"):
        one, other = getattr(ticket, part), getattr(again, part)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["t.safetensors"]
    raw = (tmp_path / "deep" / "t.safetensors").read_bytes()
    for damaged in (raw[:100], b"", b"x" * 50, raw[:-10]):
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged or holds no ticket"):
            Ticket.load(tmp_path / "bad")


def same(one: Ticket, other: Ticket) -> bool:
    pairs = [(getattr(one, p), getattr(other, p)) for p in ("masks", "start", "final")]
    equal = (a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)
    return one.result == other.result and all(equal)


def collect(tickets: Iterable[Ticket], into: list[Ticket]) -> None:
    for ticket in tickets:
        into.append(ticket)  # one by one: what came before an error is kept


@pytest.mark.parametrize("rewind", [0, 2])
@pytest.mark.parametrize("done", [1, 2, 3])
def test_goes_on_after_an_interruption(tmp_path: Path, done: int, rewind: int) -> None:
    straight = list(search(mlp(), Trainer(), rounds=3, rewind=rewind))
    got: list[Ticket] = []
    with pytest.raises(KeyboardInterrupt):
        collect(search(mlp(), Trainer(fail_at=done), rounds=3, rewind=rewind, folder=tmp_path), got)
    assert len(got) == done
    train = Trainer()
    resumed = list(search(mlp(), train, rounds=3, rewind=rewind, folder=tmp_path))
    assert len(train.calls) == 4 - done
    assert all(same(a, b) for a, b in zip(straight, resumed, strict=True))
    more = list(search(mlp(), Trainer(), rounds=4, rewind=rewind, folder=tmp_path))  # a longer search goes on as well
    assert same(more[3], straight[3])


@pytest.mark.parametrize(
    ("options", "seed", "what"),
    [
        ({"rates": 0.3}, 0, "rates"),
        ({"rewind": 1}, 0, "rewind"),
        ({"config": {"lr": 1}}, 0, "train"),
        ({}, 4, "start"),
    ],
)
def test_another_search_in_the_same_folder_is_refused(
    tmp_path: Path, options: dict[str, Any], seed: int, what: str
) -> None:
    list(search(mlp(), Trainer(), rounds=1, folder=tmp_path))
    with pytest.raises(ValueError, match=rf"is of another search \(different: {what}\)"):
        list(search(mlp(seed), Trainer(), rounds=1, folder=tmp_path, **options))


def test_stops_with_what_was_done() -> None:
    def diverges(model: nn.Module, start: int, after_step: Callable[[], None]) -> None:
        if prune.sparsity(model) > 0.3:
            model.fc2.parametrizations.weight.original.data.fill_(float("nan"))

    got: list[Ticket] = []
    with pytest.raises(ValueError, match="the weight of layer 'fc2' holds NaN"):
        collect(search(mlp(), diverges, rounds=5), got)
    assert [t.round for t in got] == [0, 1]
    got.clear()
    with pytest.raises(ValueError, match=r"would leave layer 'out' without weights"):
        collect(search(mlp(), lambda *_: None, rounds=9, rates={"out": 0.8}), got)
    assert got[-1].masks["out"].any()


def test_the_next_round_by_hand() -> None:
    tickets = list(search(mlp(), Trainer(), rounds=2, rates=0.3))
    ticket = tickets[1].pruned(0.3)
    assert (ticket.round, ticket.final, ticket.result) == (2, {}, None)
    assert all(torch.equal(ticket.masks[n], m) for n, m in tickets[2].masks.items())
    assert ticket.start is tickets[1].start
    for dtype in (torch.bfloat16, torch.float64):  # ranked in the weights' own precision, equal ones by position
        final = {k: v.to(dtype) for k, v in tickets[1].final.items()}
        kept = Ticket(1, 0, tickets[1].masks, {}, final).pruned(0.3).masks["fc1"]
        weight = torch.where(tickets[1].masks["fc1"], final["fc1.weight"].abs().double(), -1.0).flatten()
        order = weight.argsort(stable=True)
        assert set(torch.nonzero(~kept.flatten()).flatten().tolist()) == set(order[: int((~kept).sum())].tolist())
    with pytest.raises(ValueError, match="expected a ticket that was trained"):
        ticket.pruned(0.3)
    with pytest.raises(ValueError, match=r"rates: expected one for each of \['fc1', 'fc2', 'out'\], got \['fc1'\]"):
        tickets[1].pruned({"fc1": 0.2})
    with pytest.raises(ValueError, match=r"rates\['fc1'\]: expected a number in \[0, 1\)"):
        tickets[1].pruned(1.0)
    with pytest.raises(ValueError, match="trained weight of layer 'fc1' holds NaN"):
        Ticket(0, 0, tickets[0].masks, {}, {k: v * float("nan") for k, v in tickets[0].final.items()}).pruned(0.1)


def test_a_loader_that_ends_early_stops_the_search() -> None:
    batches = iter(data() + data()[:3])  # one round and a half: the third finds nothing

    def train(model: nn.Module, start: int, after_step: Callable[[], None]) -> int:
        return sum(1 for _ in itertools.islice(batches, STEPS) if after_step() is None)

    got: list[Ticket] = []
    with pytest.raises(ValueError, match=r"round 2 called after_step\(\) not once, round 0 6 times.*iterator"):
        collect(search(mlp(), train, rounds=3), got)
    assert [t.result for t in got] == [6, 3]


def test_nan_outside_the_pruned_weights_is_told() -> None:
    def train(model: nn.Module, start: int, after_step: Callable[[], None]) -> None:
        model.out.bias.data[0] = float("nan")

    with pytest.raises(ValueError, match=r"train: round 0 left NaN in 'out.bias'"):
        list(search(mlp(), train, rounds=1))


def test_a_mask_that_cuts_the_network_is_refused() -> None:
    ticket = list(search(mlp(), lambda *_: None, rounds=1))[-1]
    cut = Ticket(1, 0, {**ticket.masks, "fc2": torch.zeros_like(ticket.masks["fc2"])}, ticket.start)
    model = mlp(seed=3)
    with pytest.raises(ValueError, match="keeps no weight of layer 'fc2'"):
        cut.apply_(model)
    assert not prune.masks(model)


def test_the_loop_of_the_documentation_with_batch_norm_in_bfloat16(tmp_path: Path) -> None:
    """The docstring's own `train`, over a DataLoader, on a bfloat16 network with batch-norm, and under autocast."""
    text = (prune.lottery.__doc__ or "").split("    def train(")[1].split("\n\n")[0].rsplit('"""')[0]
    x, y = torch.randn(48, 20), torch.randint(0, 4, (48,))
    for dtype in (torch.bfloat16, torch.float32):
        loader = DataLoader(TensorDataset(x.to(dtype), y), batch_size=16)
        names: dict[str, Any] = {"torch": torch, "itertools": itertools, "F": F, "loader": loader}
        exec(textwrap.dedent("    def train(" + text), names)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
        folder = tmp_path / str(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            tickets = list(search(model, names["train"], rounds=2, rewind=1, folder=folder))
        assert [t.remaining for t in tickets] == pytest.approx([1, 0.8, 0.64], abs=0.01)
        assert all(0 < t.result["loss"] < 5 for t in tickets)
        assert all(v.dtype == dtype for k, v in tickets[-1].final.items() if not k.endswith("batches_tracked"))
        assert [int(t.start["1.num_batches_tracked"]) for t in tickets] == [1, 1, 1]  # buffers are rewound, to step 1
        assert [int(t.final["1.num_batches_tracked"]) for t in tickets] == [3, 3, 3]
        assert same(Ticket.load(folder / "round-02.safetensors"), tickets[2])


def test_rates_of_the_paper() -> None:
    assert rates_of(models.LeNet300()) == {"fc1": 0.2, "fc2": 0.2, "fc3": 0.1}
    rates = rates_of(models.conv6(), conv=0.15)
    assert list(rates.values()) == [0.15] * 6 + [0.2, 0.2, 0.1]
    # 1803.03635, Figure 3: 21.1 % of LeNet-300-100 remain after seven rounds of 20 % (the output layer 10 %)
    model = models.LeNet300()
    ticket = list(search(model, lambda *_: None, rounds=7, rates=rates_of(model)))[-1]
    assert ticket.remaining == pytest.approx(0.211, abs=0.0005)


def test_early_stop_is_the_first_minimum() -> None:
    assert early_stop([100, 200, 300, 400], [0.5, 0.2, 0.3, 0.2]) == 200
    for steps, losses in (([], []), ([1], [1.0, 2.0]), ([1], [float("nan")])):
        with pytest.raises(ValueError, match="losses"):
            early_stop(steps, losses)


def test_apply_refuses_another_network_and_leaves_it() -> None:
    ticket = list(search(mlp(), lambda *_: None, rounds=1))[-1]
    other = nn.Linear(3, 3)
    weight = other.weight.detach().clone()
    with pytest.raises(ValueError, match="model: the ticket has"):
        ticket.apply_(other)
    assert torch.equal(other.weight, weight)
    assert not prune.masks(other)


def test_bad_arguments_come_at_once() -> None:
    with pytest.raises(ValueError, match="rounds: expected at least 0"):
        search(mlp(), Trainer(), rounds=-1)
    with pytest.raises(ValueError, match=r"rates\['\*'\]: expected a number in"):
        search(mlp(), Trainer(), rounds=1, rates=1.0)
    with pytest.raises(ValueError, match="matches no"):
        search(mlp(), Trainer(), rounds=1, rates={"conv*": 0.1})
    with pytest.raises(TypeError, match=r"train: expected a callable"):
        search(mlp(), None, rounds=1)  # type: ignore[arg-type]
    model = mlp()
    prune.prune_(model, prune.Magnitude(0.5))
    with pytest.raises(ValueError, match="model: expected no masks"):
        search(model, Trainer(), rounds=1)
    with pytest.raises(TypeError, match="JSON"):
        list(search(mlp(), lambda *_: {1, 2}, rounds=0))


def test_a_single_layer() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(10, 5)
    ticket = list(search(layer, lambda *_: None, rounds=1))[-1]
    assert ticket.start.keys() == {"weight", "bias"}
    fresh = nn.Linear(10, 5)
    ticket.apply_(fresh)
    assert torch.equal(fresh.weight, layer.weight)
    assert int((fresh.weight == 0).sum()) == 10
