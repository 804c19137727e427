# SPDX-License-Identifier: Apache-2.0
"""Deconstructed tickets: which weights each criterion keeps, where kept and masked weights start, what stays frozen."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.prune import deconstruct
from slimtorch.prune.criteria import CRITERIA, choose
from slimtorch.prune.lottery import Ticket, search

SCORES: dict[str, Callable[[float, float], float]] = {
    "large_final": lambda i, f: abs(f),
    "small_final": lambda i, f: -abs(f),
    "large_init": lambda i, f: abs(i),
    "small_init": lambda i, f: -abs(i),
    "magnitude_increase": lambda i, f: abs(f) - abs(i),
    "movement": lambda i, f: abs(f - i),
    "large_final_same_sign": lambda i, f: max(0.0, i * f / abs(i)),
    "large_final_other_sign": lambda i, f: max(0.0, -i * f / abs(i)),
}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))


def train(model: nn.Module, start: int, after_step: Callable[[], None]) -> int:
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(32, 6, generator=g), torch.randint(0, 3, (32,), generator=g)
    for _ in range(start, 8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after_step()
    return 8


def dense(seed: int = 0) -> Ticket:
    return next(search(net(seed), train, rounds=0))


def pruned(share: float = 0.5) -> Ticket:
    return deconstruct.choose_masks(dense(), "large_final", share)


def pairs(count: int = 40) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, generator=g), torch.randn(count, generator=g)


@pytest.mark.parametrize("name", SCORES)
def test_criteria_keep_the_largest_scores(name: str) -> None:
    initial, final = pairs()
    scores = [SCORES[name](i, f) for i, f in zip(initial.tolist(), final.tolist(), strict=True)]
    kept = choose(name, {"a": initial}, {"a": final}, 0.3)["a"]
    assert int(kept.sum()) == 12
    best = sorted(range(40), key=lambda i: scores[i], reverse=True)[:12]
    assert set(kept.nonzero().flatten().tolist()) == set(best)


def test_both_large_cuts_the_same_share_of_both() -> None:
    initial, final = pairs(1000)
    for name, sign in (("large_init_large_final", 1), ("small_init_small_final", -1)):
        kept = choose(name, {"a": initial}, {"a": final * 7}, 0.2)["a"]  # whatever the scale of the final weights
        assert int(kept.sum()) == 200
        # kept is what lies beyond the same percentile in both, found here by trying all of them
        first = (sign * initial.abs()).argsort().argsort()
        last = (sign * final.abs()).argsort().argsort()
        beyond = [(first >= r) & (last >= r) for r in range(1000)]
        narrow = next(inside for inside in beyond if int(inside.sum()) <= 200)
        wide = next(inside for inside in reversed(beyond) if int(inside.sum()) >= 200)
        assert not bool((narrow & ~kept).any())
        assert not bool((kept & ~wide).any())
        assert int((wide & ~narrow).sum()) <= 2  # two weights may lie on the same threshold, one in each direction


def test_ties_are_broken_by_the_seed() -> None:
    zeros = {"a": torch.zeros(1000)}
    first = choose("random", zeros, zeros, 0.25, seed=1)["a"]
    assert int(first.sum()) == 250
    assert torch.equal(first, choose("random", zeros, zeros, 0.25, seed=1)["a"])
    second = choose("random", zeros, zeros, 0.25, seed=2)["a"]
    assert 30 < int((first & second).sum()) < 100  # 62.5 are expected to be in both
    assert 90 < int(first[:500].sum()) < 160


def test_what_is_masked_stays_masked() -> None:
    initial, final = pairs()
    before = torch.arange(40) % 2 == 0
    kept = choose("small_final", {"a": initial}, {"a": final}, 0.25, within={"a": before})["a"]
    inside = before.nonzero().flatten()
    expected = inside[final.abs()[inside].argsort()[:10]]
    assert set(kept.nonzero().flatten().tolist()) == set(expected.tolist())


def test_search_by_another_criterion(tmp_path: Path) -> None:
    model, start = net(), net().state_dict()
    tickets = list(search(model, train, rounds=2, rates=0.3, criterion="movement", seed=3, folder=tmp_path))
    for before, after in itertools.pairwise(tickets):
        for name in ("0", "2"):
            was, now = before.masks[name], after.masks[name]
            moved = (before.final[f"{name}.weight"] - start[f"{name}.weight"]).abs()
            assert not bool((now & ~was).any())
            assert moved[now].min() >= moved[was & ~now].max()
            assert int(now.sum()) == now.numel() - round((1 - 0.7**after.round) * now.numel())
    again = list(search(net(), train, rounds=2, rates=0.3, criterion="movement", seed=3, folder=tmp_path))
    assert all(torch.equal(a.masks["0"], b.masks["0"]) for a, b in zip(tickets, again, strict=True))
    with pytest.raises(ValueError, match="criterion"):
        next(search(net(), train, rounds=2, rates=0.3, folder=tmp_path))
    with pytest.raises(ValueError, match=r"expected one of large_final, .*got 'largest'"):
        search(net(), train, rounds=1, criterion="largest")


def test_search_by_magnitude_is_the_criterion_large_final() -> None:
    for plain, ours in zip(
        search(net(), train, rounds=2),
        search(net(), train, rounds=2, criterion=lambda initial, final: final.abs()),
        strict=True,
    ):
        assert all(torch.equal(plain.masks[n], ours.masks[n]) for n in plain.masks)


def test_constant_with_the_sign_kept_and_lost() -> None:
    ticket = pruned()
    for keep_sign in (True, False):
        changed = deconstruct.mask_1(ticket, "constant", keep_sign=keep_sign, seed=4)
        agree = []
        for name, kept in ticket.masks.items():
            old, new = ticket.start[f"{name}.weight"], changed.start[f"{name}.weight"]
            torch.testing.assert_close(new[kept].abs(), torch.full_like(new[kept], float(old.std())))
            assert torch.equal(new[~kept], old[~kept])
            agree += (new.sign() == old.sign())[kept].tolist()
        assert all(agree) if keep_sign else 0.2 < sum(agree) / len(agree) < 0.8
        assert torch.equal(changed.start["0.bias"], ticket.start["0.bias"])


def test_reshuffle_stays_within_what_is_kept() -> None:
    ticket = pruned()
    lost = deconstruct.mask_1(ticket, "reshuffle", keep_sign=False, seed=1)
    signed = deconstruct.mask_1(ticket, "reshuffle", keep_sign=True, seed=1)
    for name, kept in ticket.masks.items():
        old = ticket.start[f"{name}.weight"][kept]
        new, same = lost.start[f"{name}.weight"][kept], signed.start[f"{name}.weight"][kept]
        assert torch.equal(old.sort().values, new.sort().values)
        assert torch.equal(old.abs().sort().values, same.abs().sort().values)
        assert not torch.equal(old, new)
        assert not torch.equal(old, same)
        assert torch.equal(old.sign(), same.sign())
    again = deconstruct.mask_1(ticket, "reshuffle", keep_sign=False, seed=1)
    assert all(torch.equal(again.start[k], v) for k, v in lost.start.items())


def test_reinit_and_rewind() -> None:
    ticket, fresh = pruned(), net(9)
    for keep_sign in (True, False):
        changed = deconstruct.mask_1(ticket, "reinit", keep_sign=keep_sign, fresh=fresh)
        for name, kept in ticket.masks.items():
            old, drawn = ticket.start[f"{name}.weight"][kept], fresh.state_dict()[f"{name}.weight"][kept]
            new = changed.start[f"{name}.weight"][kept]
            assert torch.equal(new, torch.copysign(drawn, old) if keep_sign else drawn)
    same = deconstruct.mask_1(ticket, "rewind", keep_sign=True)
    assert all(torch.equal(same.start[k], v) for k, v in ticket.start.items())


def test_frozen_weights_stay_where_they_are() -> None:
    ticket = pruned()
    model = net(7)
    deconstruct.mask_0(ticket, "initial").apply_(model)
    x = torch.randn(5, 6)
    torch.testing.assert_close(model(x), plain(ticket.start)(x))  # all weights as they began, none at zero
    twin = copy.deepcopy(model)
    train(model, 0, lambda: None)
    for index in (0, 2):
        kept, layer = ticket.masks[str(index)], model[index]
        began = ticket.start[f"{index}.weight"]
        assert torch.equal(layer.weight[~kept], began[~kept])
        assert not torch.equal(layer.weight[kept], began[kept])
        assert torch.equal(twin[index].weight, began)
    loaded = net(8)
    deconstruct.mask_0(ticket, "zero").apply_(loaded)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(x), model(x))
    expected, parameter = model(x), model[0].parametrizations.weight.original
    assert deconstruct.bake_(model) == ["0", "2"]
    assert torch.equal(model(x), expected)
    assert model[0].weight is parameter
    assert model.state_dict().keys() == net().state_dict().keys()
    assert slim.prune.masks(model) == {}
    assert torch.equal(loaded(x), expected)  # a copy of a baked layer's class is not touched


def test_zero_if_shrunk() -> None:
    tickets = list(search(net(), train, rounds=2, rates=0.4))
    trained = deconstruct.last_trained(tickets[:-1])
    kept_first = tickets[1].masks["0"]
    assert torch.equal(trained["0.weight"][~kept_first], tickets[0].final["0.weight"][~kept_first])
    assert torch.equal(trained["0.weight"][kept_first], tickets[1].final["0.weight"][kept_first])
    last = tickets[2]
    frozen = deconstruct.mask_0(last, "zero_if_shrunk", trained=trained)
    values = set()
    for name, kept in last.masks.items():
        for began, ended, held, keep in zip(
            last.start[f"{name}.weight"].flatten().tolist(),
            trained[f"{name}.weight"].flatten().tolist(),
            frozen.held[name].flatten().tolist(),
            kept.flatten().tolist(),
            strict=True,
        ):
            if not keep:
                assert held == (0 if abs(ended) < abs(began) else began)
                values.add(held == 0)
    assert values == {True, False}


def test_zero_is_the_ordinary_ticket() -> None:
    ticket, first, second = pruned(), net(1), net(2)
    deconstruct.mask_0(ticket, "zero").apply_(first)
    ticket.apply_(second)
    train(first, 0, lambda: None)
    train(second, 0, lambda: None)
    assert torch.equal(first[0].weight, second[0].weight)


def test_bad_input() -> None:
    ticket = pruned()
    weights = {"a": torch.ones(10)}
    with pytest.raises(ValueError, match="would leave layer 'a' without weights"):
        choose("movement", weights, weights, 0.01)
    with pytest.raises(ValueError, match="would leave layer '2' without weights"):
        deconstruct.choose_masks(dense(), "random", {"2": 0.01})
    with pytest.raises(ValueError, match="NaN"):
        choose("large_final", weights, {"a": torch.full((10,), torch.nan)}, 0.5)
    with pytest.raises(ValueError, match="expected 10 scores"):
        choose(lambda initial, final: final[:3], weights, weights, 0.5)
    with pytest.raises(ValueError, match=f"one of {', '.join(CRITERIA)} or"):
        choose("biggest", weights, weights, 0.5)
    with pytest.raises(ValueError, match=r"kept: expected a number in \(0, 1\]"):
        choose("random", weights, weights, 0.0)
    with pytest.raises(ValueError, match="trained one"):
        deconstruct.choose_masks(ticket, "random", 0.5)
    with pytest.raises(ValueError, match="layers of the ticket"):
        deconstruct.choose_masks(dense(), "random", {"7": 0.5})
    with pytest.raises(ValueError, match="rewind, reshuffle, reinit, constant, got 'keep'"):
        deconstruct.mask_1(ticket, "keep", keep_sign=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fresh"):
        deconstruct.mask_1(ticket, "reinit", keep_sign=True)
    with pytest.raises(ValueError, match="keep_sign"):
        deconstruct.mask_1(ticket, "rewind", keep_sign=False)
    with pytest.raises(ValueError, match="zero, initial, zero_if_shrunk, got 'one'"):
        deconstruct.mask_0(ticket, "one")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trained"):
        deconstruct.mask_0(ticket, "zero_if_shrunk")
    with pytest.raises(ValueError, match="trained"):
        deconstruct.last_trained([replace(ticket, final={})])
    model = net()
    ticket.apply_(model)
    with pytest.raises(ValueError, match="bake it first"):
        deconstruct.mask_0(ticket, "initial").apply_(model)


def plain(state: dict[str, Tensor]) -> nn.Module:
    model = net(3)
    model.load_state_dict(state)
    return model
