# SPDX-License-Identifier: Apache-2.0
"""Lottery tickets: iterative magnitude pruning with rewinding (Frankle & Carbin, 1803.03635; late rewinding: Frankle et
al., "Stabilizing the Lottery Ticket Hypothesis", 1903.01611).

    dense, θ0 ──train──▶ θT ──smallest weights──▶ mask ──rewind to θ0 or θk──▶ ticket ──train──▶ …  once per round

    for ticket in slim.prune.lottery.search(model, train, rounds=5, rates=0.2, folder=Path("tickets")):
        print(ticket.remaining, ticket.result)

A ticket is a mask and the weights to start from. Its controls are tickets too: `with_start` (other weights under the
same mask, for example newly drawn ones) and `shuffled` (the same weights under a random mask of equal density). `train`
is anyone's loop:

    def train(model, start, after_step):  # start: steps that the weights have behind them, 0 without late rewinding
        optimizer = torch.optim.Adam(model.parameters(), lr=1.2e-3)
        for images, labels in itertools.islice(loader, start, None):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            after_step()
        return {"loss": loss.item()}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from slimtorch import _select
from slimtorch._files import write_atomically
from slimtorch.prune import criteria
from slimtorch.prune.magnitude import CHUNK, check_count, check_fraction, check_weight, largest
from slimtorch.prune.mask import MASKABLE, install, mask_of, masks

Train = Callable[[nn.Module, int, Callable[[], None]], Any]
"""`train(model, start, after_step) -> result`: trains in place from step `start` on, calls `after_step()` after each
optimizer step, and returns anything JSON-ready. Where it stops early, by its own choice, it calls it less often."""

_WEIGHT = ".parametrizations.weight.original"


@dataclass(frozen=True)
class Ticket:
    """A sparse network before training.

    Attributes:
        round: prunings that led here; 0 is the dense network.
        step: the step of training that `start` comes from; 0: before the first.
        masks: layer name → bool tensor, True where a weight is kept.
        start: state of the model without masks, as its class has it: weights to train from.
        final: the same after training under the masks; empty where it was not trained.
        result: what `train` returned.
        config: what the search was asked for.
    """

    round: int
    step: int
    masks: dict[str, Tensor]
    start: dict[str, Tensor]
    final: dict[str, Tensor] = field(default_factory=dict)
    result: Any = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def remaining(self) -> float:
        """The share of the weights under masks that is kept, in [0, 1]."""
        total = sum(mask.numel() for mask in self.masks.values())
        return sum(int(mask.sum()) for mask in self.masks.values()) / total if total else 1.0

    def apply_(self, model: nn.Module) -> None:
        """Puts the masks on a model of the class that was searched, and the starting weights into it.

        Raises:
            ValueError: layers or shapes do not fit, or a mask keeps no weight of its layer. The model stays as it was.
        """
        _check_fits(model, self.masks, self.start)
        layers = dict(model.named_modules())
        install([(layers[n], m.to(cast(Tensor, layers[n].weight).device, copy=True)) for n, m in self.masks.items()])
        _load(model, self.start)

    def with_start(self, state: Mapping[str, Tensor] | nn.Module) -> Ticket:
        """The same mask over other weights: the state of a model without masks, or such a model.

        Newly drawn ones are the control "randomly reinitialised" of 1803.03635, section 2.

        Raises:
            ValueError: other names or shapes than the ticket's.
        """
        given = _state(state) if isinstance(state, nn.Module) else {k: v.detach().clone() for k, v in state.items()}
        if {k: v.shape for k, v in given.items()} != {k: v.shape for k, v in self.start.items()}:
            raise ValueError("state: expected the names and shapes of the ticket's own start, got others")
        return replace(self, start=given, final={}, result=None)

    def shuffled(self, seed: int) -> Ticket:
        """The same weights under masks with as many, but random, positions in each layer."""
        generator = torch.Generator().manual_seed(seed)
        moved = {}
        for name, mask in self.masks.items():
            order = torch.randperm(mask.numel(), generator=generator)
            moved[name] = mask.flatten()[order.to(mask.device)].view(mask.shape)
        return replace(self, masks=moved, final={}, result=None)

    def pruned(
        self, rates: float | Mapping[str, float], criterion: str | criteria.Criterion = "large_final", seed: int = 0
    ) -> Ticket:
        """The ticket of the next round, not trained: less of each layer, the same start.

        Of each layer the weights of least magnitude after training go, so that 1 - (1 - rate)^(round + 1) of all its
        weights are gone then; what is masked stays masked. `search` prunes so between its rounds.

        Args:
            rates: share of what remains that goes, in [0, 1): one number, or by the exact name of each masked layer.
            criterion: another than magnitude, see `search`.
            seed: of the order in which another criterion breaks ties; each round has one of its own.

        Raises:
            ValueError: the ticket was not trained, a layer has no rate or would lose all its weights, its trained
                weights hold NaN, or no criterion has that name.
        """
        if not self.final:
            raise ValueError("pruned: expected a ticket that was trained, got one without final weights")
        by_name = dict(rates) if isinstance(rates, Mapping) else dict.fromkeys(self.masks, rates)
        if by_name.keys() != self.masks.keys():
            raise ValueError(f"rates: expected one for each of {sorted(self.masks)}, got {sorted(by_name)}")
        for name, rate in by_name.items():
            check_fraction(f"rates[{name!r}]", rate)
        if criteria.get(criterion) is not criteria.large_final:
            keys = {name: f"{name}.weight" if name else "weight" for name in self.masks}
            smaller = criteria.choose(
                criterion,
                {name: self.start[key] for name, key in keys.items()},
                {name: self.final[key] for name, key in keys.items()},
                {name: (1.0 - rate) ** (self.round + 1) for name, rate in by_name.items()},
                within=self.masks,
                seed=seed + self.round + 1,
            )
            return replace(self, round=self.round + 1, masks=smaller, final={}, result=None)
        smaller = {}
        for name, mask in self.masks.items():
            weight = self.final[f"{name}.weight" if name else "weight"].flatten()
            if bool(weight.isnan().any()):
                raise ValueError(f"pruned: the trained weight of layer {name!r} holds NaN")
            kept = mask.flatten()
            chunks = [partial(_magnitude, weight[at : at + CHUNK], kept[at : at + CHUNK])
                      for at in range(0, len(weight), CHUNK)]  # fmt: skip
            keep = torch.cat(largest(chunks, 1.0 - (1.0 - by_name[name]) ** (self.round + 1)) or [kept])
            if len(keep) and not bool(keep.any()):
                raise ValueError(
                    f"rates: round {self.round + 1} would leave layer {name!r} without weights; "
                    "take fewer rounds, or a lower rate for that layer"
                )
            smaller[name] = keep.view(mask.shape)
        return replace(self, round=self.round + 1, masks=smaller, final={}, result=None)

    def save(self, path: Path) -> None:
        """Writes one safetensors file; a crash leaves the old file or the new one, never half of it."""
        parts = {"mask": self.masks, "start": self.start, "final": self.final}
        tensors = {f"{part}:{n}": t.contiguous() for part, held in parts.items() for n, t in held.items()}
        about = {"round": self.round, "step": self.step, "result": self.result, "config": self.config}
        data = safetensors.torch.save(tensors, {"ticket": json.dumps(about)})
        write_atomically(path, lambda temporary: temporary.write_bytes(data))

    @classmethod
    def load(cls, path: Path) -> Ticket:
        """Reads what `save` wrote; ValueError for a file that is damaged or no ticket."""
        parts: dict[str, dict[str, Tensor]] = {"mask": {}, "start": {}, "final": {}}
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["ticket"])
                for key in file.keys():  # noqa: SIM118  it is no mapping
                    part, _, name = key.partition(":")
                    parts[part][name] = file.get_tensor(key)
            return cls(
                about["round"],
                about["step"],
                parts["mask"],
                parts["start"],
                parts["final"],
                about["result"],
                about["config"],
            )
        except (safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"path: {str(path)!r} is damaged or holds no ticket ({error})") from error


def rates_of(model: nn.Module, *, conv: float = 0.2, linear: float = 0.2, output: float = 0.1) -> dict[str, float]:
    """The share that each round removes, by layer, as 1803.03635, Figure 2, has it: the last Linear layer loses less.

    Conv-2 and Conv-4: `conv=0.1`; Conv-6: `conv=0.15`. ValueError where the model has nothing to prune.
    """
    for label, value in (("conv", conv), ("linear", linear), ("output", output)):
        check_fraction(label, value)
    layers = _select.candidates(model, MASKABLE)
    if not layers:
        raise ValueError("model: expected a Linear or Conv2d layer, got none")
    rates = {_select.literal(name): linear if isinstance(layer, nn.Linear) else conv for name, layer in layers}
    last = [name for name, layer in layers if isinstance(layer, nn.Linear)]
    if last:
        rates[_select.literal(last[-1])] = output
    return rates


def early_stop(steps: list[int], losses: list[float]) -> int:
    """The step of least validation loss, the first of them: when early stopping would have stopped (section 1.1).

    ValueError without losses, with as many steps as losses not given, or where a loss is not finite.
    """
    if not losses or len(steps) != len(losses):
        raise ValueError(f"losses: expected one for each of {len(steps)} steps, at least one, got {len(losses)}")
    values = torch.tensor(losses, dtype=torch.float64)
    if not bool(values.isfinite().all()):
        raise ValueError("losses: expected finite numbers")
    return steps[losses.index(min(losses))]


def search(
    model: nn.Module,
    train: Train,
    *,
    rounds: int,
    rates: float | Mapping[str, float] = 0.2,
    rewind: int = 0,
    folder: Path | None = None,
    config: Mapping[str, Any] | None = None,
    criterion: str | criteria.Criterion = "large_final",
    seed: int = 0,
) -> Iterator[Ticket]:
    """Trains, prunes the smallest weights of each layer, rewinds, and so on; yields each ticket once it is trained.

    The first is the dense network (round 0), then `rounds` tickets, each with less. The model is what they are trained
    in; it keeps the masks and weights of the last.

    Args:
        model: at its initialisation, without masks.
        train: `train(model, start, after_step) -> result`. It begins at step `start`, which is 0 for the dense network
            and `rewind` for tickets, and calls `after_step()` after each optimizer step. Everything random in it is its
            own business; the same order of data each time isolates the effect of the mask.
        rounds: prunings, >= 0.
        rates: share of what remains that a round removes, in [0, 1): one number, or by glob of layer names (layers that
            no glob matches are never pruned). `rates_of` gives the paper's.
        rewind: steps of the dense training after which the weights are taken that tickets start from; 0: none.
        folder: tickets are saved there, one file each, and read again by the same search: an interrupted one goes on
            after the last that is complete.
        config: anything JSON-ready that `train` depends on; with another one the folder is refused.
        criterion: what stays: a name of `slimtorch.prune.deconstruct.CRITERIA`, or a function (initial, final) ->
            scores of what is left of a layer, `initial` being the weights that tickets start from. "large_final":
            magnitude.
        seed: of the order in which other criteria break ties (and "random" chooses).

    Raises:
        ValueError: masks on the model already, no such layer, `train` ended before step `rewind`, took no step in a
            later round (an iterator at its end) or left NaN, a layer would lose all its weights, or the folder holds
            tickets of another search. Tickets yielded (and saved) before are complete.
    """
    check_count("rounds", rounds, 0)
    check_count("rewind", rewind, 0)
    check_count("seed", seed, 0)
    named = criteria.name_of(criterion)
    if not callable(train):
        raise TypeError(f"train: expected a callable, got {type(train).__name__}")
    by_glob: dict[str, float | None] = dict(rates) if isinstance(rates, Mapping) else {"*": rates}
    for glob, value in by_glob.items():
        check_fraction(f"rates[{glob!r}]", value)
    chosen: list[tuple[str, nn.Module, float]] = _select.resolve(model, by_glob, types=MASKABLE)
    if not chosen:
        raise ValueError("rates: expected a Linear or Conv2d layer to prune, got none")
    if masks(model):
        raise ValueError("model: expected no masks at the start of a search; call slimtorch.prune.bake_(model) first")
    for name, layer, _ in chosen:
        check_weight(name, layer)
    start = _state(model)
    asked = {
        "rates": {name: float(rate) for name, _, rate in chosen},
        "rewind": rewind,
        "start": _digest(start),
        "train": json.loads(json.dumps(dict(config or {}))),
    }
    if named != "large_final":
        asked |= {"criterion": named, "seed": seed}
    return _search(model, train, rounds, rewind, folder, asked, start, criteria.get(criterion))


def _search(
    model: nn.Module,
    train: Train,
    rounds: int,
    rewind: int,
    folder: Path | None,
    asked: dict[str, Any],
    start: dict[str, Tensor],
    criterion: criteria.Criterion,
) -> Iterator[Ticket]:
    modules = dict(model.named_modules())
    whole = {n: torch.ones_like(cast(Tensor, modules[n].weight), dtype=torch.bool) for n in asked["rates"]}
    ticket = Ticket(0, rewind, whole, start, config=asked)
    dense = 0  # steps of the dense training
    for index in range(rounds + 1):
        if index:
            ticket = ticket.pruned(asked["rates"], criterion, asked.get("seed", 0))
        path = None if folder is None else folder / f"round-{index:02d}.safetensors"
        if path is not None and path.exists():
            ticket = _stored(path, asked, index)
            ticket.apply_(model)
            _load(model, ticket.final)  # as if it had been trained just now
        else:
            ticket.apply_(model)
            ticket, steps = _train(model, train, ticket)
            if index == 0:
                dense = steps
            elif dense > rewind and steps == 0:
                raise ValueError(
                    f"train: round {index} called after_step() not once, round 0 {dense} times; "
                    "does it read an iterator that has come to its end?"
                )
            if path is not None:
                ticket.save(path)
        yield ticket


def _train(model: nn.Module, train: Train, ticket: Ticket) -> tuple[Ticket, int]:
    """The ticket after training, and the number of steps; of the dense one, `start` is what later ones start from."""
    steps = 0
    taken = ticket.start

    def after_step() -> None:
        nonlocal steps, taken
        steps += 1
        if ticket.round == 0 and steps == ticket.step:
            taken = _state(model)

    result = train(model, ticket.step if ticket.round else 0, after_step)
    if ticket.round == 0 and steps < ticket.step:
        raise ValueError(f"train: expected at least rewind={ticket.step} calls of after_step(), got {steps}")
    for name in ticket.masks:
        check_weight(name, model.get_submodule(name))
    final = _state(model)
    for name, value in final.items():
        if bool(value.isnan().any()):
            raise ValueError(f"train: round {ticket.round} left NaN in {name!r}")
    result = json.loads(json.dumps(result))  # TypeError here, not when it is to be saved
    return replace(ticket, start=taken, final=final, result=result), steps


def _magnitude(weight: Tensor, kept: Tensor) -> Tensor:
    """Scores for `largest`; -1 for what is masked already."""
    score = weight.abs()
    return torch.where(kept, score if score.dtype == torch.float64 else score.float(), -1)


def _stored(path: Path, asked: dict[str, Any], index: int) -> Ticket:
    ticket = Ticket.load(path)
    if ticket.config != asked:
        others = sorted(k for k in asked.keys() | ticket.config.keys() if ticket.config.get(k) != asked.get(k))
        raise ValueError(
            f"folder: {str(path)!r} is of another search (different: {', '.join(others)}); take another folder"
        )
    if ticket.round != index or not ticket.final:
        raise ValueError(f"folder: {str(path)!r} should hold the trained ticket of round {index}")
    return ticket


def _plain(key: str) -> str | None:
    """The key that a masked model's entry has without masks; None for a mask."""
    if key.startswith(_WEIGHT[1:]):
        return "weight"
    if key.endswith(_WEIGHT):
        return key[: -len(_WEIGHT)] + ".weight"
    return None if ".parametrizations.weight." in f".{key}" else key


def _state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state of a model, as it would be without masks."""
    pairs = ((_plain(key), value) for key, value in model.state_dict().items())
    return {key: value.detach().clone() for key, value in pairs if key is not None}


@torch.no_grad()
def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies a state without masks into a model that may have some."""
    for key, value in model.state_dict().items():
        plain = _plain(key)
        if plain is not None:
            value.copy_(state[plain])


def _check_fits(model: nn.Module, kept: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
    own = {k: tuple(v.shape) for k, v in _state(model).items()}
    given = {k: tuple(v.shape) for k, v in start.items()}
    if own != given:
        key = sorted({*own.items()} ^ {*given.items()})[0][0]
        raise ValueError(f"model: the ticket has {key!r} with shape {given.get(key)}, the model with {own.get(key)}")
    modules = dict(model.named_modules())
    for name, mask in kept.items():
        layer = modules.get(name)
        if layer is None or not isinstance(layer, MASKABLE):
            raise ValueError(f"model: the ticket masks layer {name!r}, which is no Linear or Conv2d layer of the model")
        if tuple(mask.shape) != tuple(cast(Tensor, layer.weight).shape):
            raise ValueError(f"model: the ticket's mask for {name!r} has shape {tuple(mask.shape)}, not the weight's")
        if mask.numel() and not bool(mask.any()):
            raise ValueError(f"model: the ticket's mask keeps no weight of layer {name!r}; nothing would pass it")
    stray = [n for n, m in modules.items() if mask_of(m) is not None and n not in kept]
    if stray:
        raise ValueError(f"model: expected masks on no other layers than the ticket's, got {stray}")


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, value in state.items():
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
