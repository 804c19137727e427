# SPDX-License-Identifier: Apache-2.0
"""Deconstructing lottery tickets: which weights to keep, what to set them to, what to do with the others (Zhou et al.,
arXiv 1905.01067, figures 3 to 5).

The paper's: all of MNIST, `--data mnist` (Conv-2 on `--data cifar10`), 55 epochs; its 24 rounds remove 20 % each, here
a few large ones span the same range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from slimtorch import models, prune
from slimtorch.data import Digits, load
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.loop import evaluate, fit
from slimtorch.experiments.machine import describe
from slimtorch.experiments.store import Record
from slimtorch.experiments.summary import over_seeds, percent
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.prune import deconstruct
from slimtorch.prune.lottery import Ticket, rates_of, search
from slimtorch.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1

# name -> (how it is called, colour, line)
CRITERIA = {
    "large_final": ("large final (the ticket)", "#0072B2", "-"),
    "magnitude_increase": ("magnitude increase", "#D55E00", "-"),
    "movement": ("movement", "#009E73", "-"),
    "large_init_large_final": ("large init, large final", "#56B4E9", "-"),
    "large_init": ("large init", "#E69F00", "-"),
    "random": ("random", "#999999", "-"),
    "small_init": ("small init", "#E69F00", ":"),
    "small_init_small_final": ("small init, small final", "#56B4E9", ":"),
    "small_final": ("small final", "#0072B2", ":"),
}
ACTIONS = {
    "rewind": ("rewound (the ticket)", "#0072B2", "-"),
    "constant+": ("constant ±α, sign kept", "#D55E00", "-"),
    "reshuffle+": ("reshuffled, sign kept", "#009E73", "-"),
    "reinit+": ("drawn anew, sign kept", "#E69F00", "-"),
    "constant-": ("constant ±α, sign lost", "#D55E00", ":"),
    "reshuffle-": ("reshuffled, sign lost", "#009E73", ":"),
    "reinit-": ("drawn anew, sign lost", "#E69F00", ":"),
}
FREEZING = {
    "zero": ("at zero (the ticket)", "#0072B2", "-"),
    "zero_if_shrunk": ("at zero if it shrank, else initial", "#D55E00", "-"),
    "initial": ("at the initial value", "#009E73", "-"),
}


@dataclass(frozen=True)
class Plan:
    """All numbers of the experiment.

    Attributes:
        seeds: networks, each with its own initialisation and order of batches.
        epochs: of each training.
        batch_size: images in a step.
        rate: of Adam.
        rounds: prunings.
        linear, conv, output: shares of what is left that a round removes: of linear, convolution and the last layers.
    """

    seeds: int = 5
    epochs: int = 6
    batch_size: int = 60
    rate: float = 1.2e-3
    rounds: int = 5
    linear: float = 0.6
    conv: float = 0.4
    output: float = 0.35


def plan(settings: Settings) -> Plan:
    """Quick or full; on full data sets with the paper's epochs."""
    chosen = Plan()
    if settings.data is not None:
        chosen = replace(chosen, epochs=55)
    if settings.quick:
        chosen = replace(chosen, seeds=1, rounds=3, linear=0.75, conv=0.55, output=0.5)
        chosen = replace(chosen, epochs=8 if settings.data is None else 1)
    return chosen if settings.seeds is None else replace(chosen, seeds=settings.seeds)


def network(data: Digits, seed: int) -> nn.Module:
    """LeNet-300-100 for digits, Conv-2 for images in colour; Glorot normal."""
    torch.manual_seed(seed)
    channels, size = data.train.images.shape[1:3]
    model = models.LeNet300() if channels == 1 else models.conv2(channels=channels, size=size)
    models.glorot_(model)
    return model


def train(model: nn.Module, data: Digits, config: Mapping[str, Any]) -> float:
    """Trains in place; the share of test images right at its end."""
    optimizer = torch.optim.Adam(model.parameters(), config["rate"], fused=True)
    batch_size = min(config["batch_size"], len(data.train))
    steps = config["epochs"] * (len(data.train) // batch_size)
    fit(model, data, optimizer, steps=steps, batch_size=batch_size, seed=config["seed"])
    return evaluate(model, data.test)[1]


def run_ticket(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """The dense network and the tickets of magnitude pruning: accuracies, masks, and weights before and after."""
    model = network(data, config["seed"])
    rates = rates_of(model, conv=config["conv"], linear=config["linear"], output=config["output"])
    found = list(search(model, lambda m, *_: train(m, data, config), rounds=config["rounds"], rates=rates))
    trained = deconstruct.last_trained(found)
    arrays = {f"start:{key}": value.numpy() for key, value in found[0].start.items()}
    arrays |= {f"final:{key}": value.numpy() for key, value in found[0].final.items()}
    for name in found[0].masks:
        arrays[f"trained:{name}.weight"] = trained[f"{name}.weight"].numpy()
        for ticket in found[1:]:
            arrays[f"mask{ticket.round}:{name}"] = ticket.masks[name].numpy()
    result = {"remaining": [t.remaining for t in found], "accuracy": [t.result for t in found]}
    return Record(result, arrays)


def tickets(record: Record) -> list[Ticket]:
    """What `run_ticket` found, untrained except for the first, which is the dense network."""

    def part(label: str) -> dict[str, Tensor]:
        found = {k.removeprefix(f"{label}:"): v for k, v in record.arrays.items() if k.startswith(f"{label}:")}
        return {key: torch.from_numpy(np.array(value)) for key, value in found.items()}

    rounds = len(record.result["remaining"])
    start, masks = part("start"), [part(f"mask{index}") for index in range(1, rounds)]
    full = {name: torch.ones_like(mask) for name, mask in masks[0].items()}
    dense = Ticket(0, 0, full, start, part("final"))
    return [dense, *(Ticket(index, 0, mask, start) for index, mask in enumerate(masks, 1))]


def run_criterion(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """Tickets by another criterion, each from the training of the one before."""
    model = network(data, config["seed"])
    rates = rates_of(model, conv=config["conv"], linear=config["linear"], output=config["output"])
    ticket, accuracy = tickets(needed[0])[0], []
    for index in range(1, config["rounds"] + 1):
        kept = {name: (1 - rates[name]) ** index for name in ticket.masks}
        ticket = deconstruct.choose_masks(ticket, config["criterion"], kept, seed=1000 * config["seed"] + index)
        ticket.apply_(model)
        accuracy.append(train(model, data, config))
        prune.bake_(model)
        ticket = replace(ticket, final={key: value.clone() for key, value in model.state_dict().items()})
    return Record({"accuracy": accuracy})


def run_action(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """The masks of the tickets with another mask-1 action."""
    model, accuracy = network(data, config["seed"]), []
    fresh = network(data, 500 + config["seed"]) if config["action"] == "reinit" else None
    for ticket in tickets(needed[0])[1:]:
        seed = 1000 * config["seed"] + ticket.round
        changed = deconstruct.mask_1(ticket, config["action"], keep_sign=config["keep_sign"], seed=seed, fresh=fresh)
        changed.apply_(model)
        accuracy.append(train(model, data, config))
    return Record({"accuracy": accuracy})


def run_frozen(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """The masks of the tickets with another mask-0 action."""
    model, accuracy = network(data, config["seed"]), []
    arrays = {k: v for k, v in needed[0].arrays.items() if k.startswith("trained:")}
    trained = {key.removeprefix("trained:"): torch.from_numpy(np.array(value)) for key, value in arrays.items()}
    for ticket in tickets(needed[0])[1:]:
        shrunk = trained if config["action"] == "zero_if_shrunk" else None
        deconstruct.mask_0(ticket, config["action"], trained=shrunk).apply_(model)
        accuracy.append(train(model, data, config))
        deconstruct.bake_(model)
    return Record({"accuracy": accuracy})


def trials(chosen: Plan) -> dict[str, dict[str, list[Trial]]]:
    """What there is to train: "criteria", "actions", "freezing" → name → one trial for each seed."""
    found: dict[str, dict[str, list[Trial]]] = {"criteria": {}, "actions": {}, "freezing": {}}
    for seed in range(chosen.seeds):
        basis = {key: value for key, value in asdict(chosen).items() if key != "seeds"}
        basis |= {"version": VERSION, "seed": seed}
        ticket = Trial(f"ticket-seed{seed}", run_ticket, basis)
        for group, name in (("criteria", "large_final"), ("actions", "rewind"), ("freezing", "zero")):
            found[group].setdefault(name, []).append(ticket)
        for name in CRITERIA:
            if name != "large_final":
                config = {**basis, "criterion": name}
                trial = Trial(f"criterion-{name}-seed{seed}", run_criterion, config, (ticket,))
                found["criteria"].setdefault(name, []).append(trial)
        for name in ACTIONS:
            if name != "rewind":
                config = {**basis, "action": name[:-1], "keep_sign": name.endswith("+")}
                label = f"{name[:-1]}-{'signed' if name.endswith('+') else 'unsigned'}"
                trial = Trial(f"{label}-seed{seed}", run_action, config, (ticket,))
                found["actions"].setdefault(name, []).append(trial)
        for name in FREEZING:
            if name != "zero":
                trial = Trial(f"frozen-{name}-seed{seed}", run_frozen, {**basis, "action": name}, (ticket,))
                found["freezing"].setdefault(name, []).append(trial)
    return found


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train all tickets and tell what came of them."""
    chosen = plan(settings)
    data, what = load(settings.data, settings.quick)
    wanted = trials(chosen)
    every = [trial for group in wanted.values() for row in group.values() for trial in row]
    records = run_all(every, data, out, settings, progress)
    dense = [records[trial.name] for trial in wanted["criteria"]["large_final"]]

    def accuracies(row: list[Trial]) -> list[list[float]]:
        """Per seed, one for each round; tickets have the dense network's in front."""
        return [[round(value, 5) for value in records[t.name].result["accuracy"][-chosen.rounds :]] for t in row]

    found: dict[str, Any] = {
        "experiment": "deconstructing", "data": what, "plan": asdict(chosen), "machine": describe(settings.threads),
        "network": "LeNet-300-100" if data.train.images.shape[1] == 1 else "Conv-2",
        "remaining": [round(value, 6) for value in dense[0].result["remaining"][1:]],
        "dense": [round(record.result["accuracy"][0], 5) for record in dense],
        **{group: {name: accuracies(row) for name, row in rows.items()} for group, rows in wanted.items()},
    }  # fmt: skip
    lead = (
        f"{found['network']} trained on {what}: pruned in rounds by one criterion or another, restarted from "
        "rewound, reshuffled, newly drawn or constant weights, with what is pruned held at zero or where it began. "
        "Accuracies are those of held-out images at the end of training."
    )
    return Result("Deconstructing lottery tickets", lead, tables(found), figures(found), found)


_GROUPS = {
    "criteria": ("Mask criteria: which weights stay", "criterion", CRITERIA),
    "actions": ("Mask-1 actions: what weights that stay are set to", "they start", ACTIONS),
    "freezing": ("Mask-0 actions: where pruned weights are held", "held", FREEZING),
}


def tables(found: dict[str, Any]) -> list[Table]:
    """Test accuracy by what was done and the share of weights remaining."""
    return [_table(found, group) for group in _GROUPS]


def _table(found: dict[str, Any], group: str) -> Table:
    title, column, styles = _GROUPS[group]
    chosen, remaining = found["plan"], found["remaining"]
    shown = range(len(remaining)) if len(remaining) <= 5 else range(0, len(remaining), 2)
    rows: list[list[object]] = [
        [styles[name][0], *(percent([values[index] for values in seeds]) for index in shown)]
        for name, seeds in found[group].items()
    ]
    columns = [column, *(f"{100 * remaining[index]:.3g} % left" for index in shown)]
    notes = [
        f"test accuracy, %, of {found['network']} after {chosen['epochs']} epochs, mean ± standard deviation over "
        f"{over_seeds(chosen['seeds'])}; dense: {percent(found['dense'])}",
        f"trained on {found['data']}",
    ]
    return Table(title, columns, rows, notes)


def figures(found: dict[str, Any]) -> list[tuple[str, str, Figure]]:
    """Accuracy against weights remaining: for criteria (the paper's figure 3), mask-1 (4) and mask-0 actions (5)."""
    captions = {
        "criteria": "Test accuracy against weights remaining, by mask criterion. Bands: one standard deviation.",
        "actions": "The ticket's masks over other starting weights: dotted where the sign is lost.",
        "freezing": "The ticket's masks, with what is pruned held at zero or where it began.",
    }
    return [(f"deconstructing-{group}", captions[group], _figure(found, group)) for group in _GROUPS]


def _figure(found: dict[str, Any], group: str) -> Figure:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from slimtorch.experiments.plots import band, new_figure

    title, _, styles = _GROUPS[group]
    figure, (axis,) = new_figure(1, height=4.6, width=7.6)
    dense, x = [100 * value for value in found["dense"]], [100 * value for value in found["remaining"]]
    axis.axhline(sum(dense) / len(dense), color="black", linewidth=1, label="dense")
    for name, seeds in found[group].items():
        label, color, line = styles[name]
        rows = [[100 * value for value in values] for values in seeds]
        band(axis, x, rows, label, color, linestyle=line, marker="o", markersize=3.5)
    axis.set_xscale("log")
    axis.invert_xaxis()
    axis.xaxis.set_major_locator(FixedLocator(x))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("weights remaining, %")
    axis.set_ylabel("test accuracy, %")
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8, frameon=False, loc="lower left")
    return figure


EXPERIMENT = Experiment(
    name="deconstructing",
    about="what makes a lottery ticket: criteria, starting values, signs, zeros",
    paper="arXiv 1905.01067",
    config=lambda settings: asdict(plan(settings)),
    run=run,
)
