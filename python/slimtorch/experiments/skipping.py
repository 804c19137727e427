# SPDX-License-Identifier: Apache-2.0
"""Skipping residual blocks, by gates for each sample or for good after stochastic depth, against measured time.

After Wang et al., "SkipNet" (arXiv 1711.09485), Veit & Belongie (arXiv 1711.11503), Huang et al., "Deep Networks with
Stochastic Depth" (arXiv 1603.09382) and Fan et al., "LayerDrop" (arXiv 1909.11556). The rivals: the whole network, and
shorter ones trained as such. All are trained for as many steps: those with gates begin as the whole network, get their
gates after the first part of the steps (SkipNet, section 3.4) and have the rest with them.

The networks are ResNets for CIFAR with narrow layers, on digits of half the size: minutes on one core.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtorch.data import Digits, Split, load
from slimtorch.dynamic import DynamicDepth, StochasticDepth, drop_layers_, renew_statistics_
from slimtorch.experiments import machine
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.compare import _build_stamp, _check_same
from slimtorch.experiments.loop import evaluate, fit
from slimtorch.experiments.pruned import check_digits, steps_of
from slimtorch.experiments.rivals import dense_rivals
from slimtorch.experiments.skipping_report import figures, tables
from slimtorch.experiments.store import Record, Store
from slimtorch.experiments.summary import over_seeds
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.measure import count_macs, interleave, threads_of_torch
from slimtorch.models import resnet20
from slimtorch.packing import _judge

VERSION = 1  # raise it when the code below trains differently
BLOCKS = 9  # of ResNet-20
BATCHES = (1, 256)
SAMPLE_SECONDS = 0.025  # all samples are long, as those of gates are: what disturbs one disturbs the others alike
ONE_BY_ONE = 16  # images that a sample of the time at batch 1 goes through, as each takes its own path


@dataclass(frozen=True)
class Plan:
    """All numbers of the experiment.

    Attributes:
        seeds: of initialisation, order of batches, draws.
        epochs: of training of every network.
        first: of them, those before there are gates.
        rate: of Adam, with a cosine to 0.
        tune_rate: of Adam with gates, again with a cosine to 0.
        gate_rate: for the gates' own parameters.
        batch_size: images in a step.
        width: channels of the first stage.
        short: blocks of the networks that are trained shorter.
        gates: (per block?, target) of the penalties.
        penalty: its weight.
        survival: probability that the last block of stochastic depth is there, falling linearly to it.
        kept: blocks that are kept when layers are dropped.
        statistics: training images whose statistics batch norms get while a search looks at a network.
        samples: rounds of timing.
    """

    seeds: int = 5
    epochs: float = 9
    first: float = 4
    rate: float = 3e-3
    tune_rate: float = 2e-3
    gate_rate: float = 3e-3
    batch_size: int = 60
    width: int = 8
    short: tuple[int, ...] = (6, 3)
    gates: tuple[tuple[bool, float], ...] = ((False, 0.5), (False, 0.25), (True, 0.5))
    penalty: float = 4.0
    survival: float = 0.5
    kept: tuple[int, ...] = (7, 6, 5, 3)
    statistics: int = 240
    samples: int = 7


def plan(settings: Settings) -> Plan:
    """The numbers of a quick or a full run."""
    if settings.quick:
        small = Plan(seeds=2, epochs=8, first=4, short=(3,), gates=((False, 0.3),), kept=(8,), samples=3)
        return replace(small, seeds=settings.seeds or small.seeds)
    return replace(Plan(), seeds=settings.seeds or Plan.seeds)


# --- training ---------------------------------------------------------------------------------------------------------


def network(width: int, blocks: int = BLOCKS) -> nn.Sequential:
    """ResNet-20 behind a pooling to 14 x 14, or what `drop_layers_` makes of it before it is trained."""
    body = resnet20(10, 1, width=width)
    drop_layers_(body, blocks)
    return nn.Sequential(nn.AvgPool2d(2), body)


def train(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """One network: "plain" with so many blocks, "stochastic", or "gates" from a trained whole network."""
    torch.manual_seed(5000 + config["seed"])
    model: nn.Module = network(config["width"], config["blocks"])
    if needed:
        model.load_state_dict(_state(needed[0]))
    if config["kind"] == "stochastic":
        model = StochasticDepth(network_of(model), config["survival"])
    elif config["kind"] == "gates":
        model = gated(network_of(model), data, config)
    rest = [value for name, value in model.named_parameters() if not name.startswith("gates.")]
    groups: list[dict[str, Any]] = [{"params": rest}]
    penalty = None
    if isinstance(model, DynamicDepth):
        groups.append({"params": model.gates.parameters(), "lr": config["gate_rate"]})
        penalty = model.penalty
    torch.manual_seed(6000 + config["seed"])  # draws of the training
    optimizer = torch.optim.Adam(groups, lr=config["rate"])
    steps = steps_of(config["epochs"], data, config["batch_size"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seed = config["seed"] + (100 if needed else 0)
    fit(model, data, optimizer, steps=steps, batch_size=config["batch_size"], seed=seed, schedule=schedule,
        penalty=penalty)  # fmt: skip
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.eval()
    result: dict[str, Any] = {
        "validation": evaluate(model, data.validation)[1],
        "test": evaluate(model, data.test)[1],
        "macs": count_macs(model, (data.test.images[:1],))[1],
    }
    if isinstance(model, DynamicDepth):
        result |= _gates(model, data)
    return Record(result, {key: value.contiguous().numpy() for key, value in model.state_dict().items()})


def gated(model: nn.Sequential, data: Digits, config: Mapping[str, Any]) -> DynamicDepth:
    """The network with gates whose first scores already differ between images."""
    made = DynamicDepth(
        model, data.train.images[:1], target=config["target"], penalty_weight=config["penalty"],
        per_block=config["per_block"],
    )  # fmt: skip
    for gate in made.gates:
        nn.init.normal_(gate.score.weight)  # type: ignore[union-attr,arg-type]
    return made


def _gates(model: DynamicDepth, data: Digits) -> dict[str, Any]:
    """What the gates do with the test images."""
    found = model.report(_chunks(data.test))
    share = [round(value, 4) for value in found.share]
    return {"macs": found.macs, "share": share, "depths": list(found.depths), "paths": found.paths}


def drop(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """Fewer blocks of a trained network, spread evenly or searched on validation images; statistics taken anew."""
    whole = network(config["width"])
    whole.load_state_dict({key.removeprefix("model."): value for key, value in _state(needed[0]).items()})
    steps = config["statistics"] // config["batch_size"]
    levels = []
    for how in config["how"]:
        model = copy.deepcopy(whole)
        for count in sorted(config["kept"], reverse=True):
            if how == "spread":
                model = copy.deepcopy(whole)
                drop_layers_(network_of(model[1]), count)
            else:  # what is gone stays gone: the search goes on from there

                def loss(_: nn.Module, model: nn.Sequential = model) -> float:
                    return evaluate(recalibrated(model, data.train, config["batch_size"], steps), data.validation)[0]

                drop_layers_(network_of(model[1]), count, measure=loss)
            renewed = recalibrated(model, data.train, config["batch_size"])
            levels.append({
                "how": how, "blocks": count,
                "kept": [name for name, module in network_of(model[1]).named_children() if hasattr(module, "branch")],
                "raw": evaluate(model, data.test)[1],
                "validation": evaluate(renewed, data.validation)[1],
                "test": evaluate(renewed, data.test)[1],
                "macs": count_macs(renewed, (data.test.images[:1],))[1],
            })  # fmt: skip
    return Record({"levels": levels})


def recalibrated(model: nn.Sequential, split: Split, batch_size: int, steps: int = 20) -> nn.Sequential:
    """A copy whose batch norms have the mean statistics of so many batches of training images."""
    model = copy.deepcopy(model).eval()
    renew_statistics_(model, split.images[: steps * batch_size].split(batch_size))
    return model


def network_of(model: nn.Module) -> nn.Sequential:
    assert isinstance(model, nn.Sequential)
    return model


def _state(record: Record) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value.copy()) for key, value in record.arrays.items()}


def _chunks(split: Split, size: int = 250) -> list[tuple[Tensor, Tensor]]:
    return list(zip(split.images.split(size), split.labels.split(size), strict=True))


def _gate_name(per_block: bool, target: float) -> str:
    return f"gates-{'each' if per_block else 'all'}-{target:g}"


def trials(chosen: Plan) -> dict[tuple[str, int], Trial]:
    """(name, seed) → trial."""
    made: dict[tuple[str, int], Trial] = {}
    for seed in range(chosen.seeds):
        base = {
            "version": VERSION, "seed": seed, "width": chosen.width, "blocks": BLOCKS, "epochs": chosen.epochs,
            "batch_size": chosen.batch_size, "rate": chosen.rate,
        }  # fmt: skip

        def add(name: str, run: Any, config: Mapping[str, Any], *needs: Trial, seed: int = seed) -> None:
            made[name, seed] = Trial(f"{name}-seed{seed}", run, dict(config), needs)

        add("whole", train, {**base, "kind": "plain"})
        for count in chosen.short:
            add(f"short{count}", train, {**base, "kind": "plain", "blocks": count})
        add("stochastic", train, {**base, "kind": "stochastic", "survival": chosen.survival})
        add("first", train, {**base, "kind": "plain", "epochs": chosen.first})
        rest = {**base, "kind": "gates", "epochs": chosen.epochs - chosen.first, "rate": chosen.tune_rate}
        rest |= {"gate_rate": chosen.gate_rate, "penalty": chosen.penalty}
        for per_block, target in chosen.gates:
            own = {**rest, "per_block": per_block, "target": target}
            add(_gate_name(per_block, target), train, own, made["first", seed])
        cut: dict[str, Any] = {name: base[name] for name in ("version", "seed", "width", "batch_size")}
        cut |= {"kept": list(chosen.kept), "statistics": chosen.statistics}
        add("drop-stochastic", drop, {**cut, "how": ["spread", "searched"]}, made["stochastic", seed])
        add("drop-whole", drop, {**cut, "how": ["spread"]}, made["whole", seed])
    return made


# --- timing -----------------------------------------------------------------------------------------------------------


def _times(
    chosen: Plan, made: Mapping[tuple[str, int], Trial], records: Mapping[str, Record], data: Digits, progress: Progress
) -> dict[str, dict[str, dict[str, Any]]]:
    """Batch size → name → seconds per image in the fastest way: shorter networks of seed 0, gates of every seed."""
    dense: dict[str, nn.Module] = {}
    for name in ("whole", *(f"short{count}" for count in chosen.short)):
        dense[name] = network(chosen.width, BLOCKS if name == "whole" else int(name.removeprefix("short")))
        dense[name].load_state_dict(_state(records[made[name, 0].name]))
    state = _state(records[made["stochastic", 0].name])
    for level in records[made["drop-stochastic", 0].name].result["levels"]:
        shorter = dense[f"{level['how']} {level['blocks']}"] = network(chosen.width)
        shorter.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
        drop_layers_(network_of(shorter[1]), level["kept"])
    gates: dict[str, dict[str, Any]] = {}
    for (name, seed), trial in made.items():
        if name.startswith("gates"):
            model = gated(network(chosen.width), data, trial.config).eval()
            model.load_state_dict(_state(records[trial.name]))
            with torch.inference_mode():
                gates[f"{name} {seed}"] = {"torch": model, "frozen": model.prepare(_frozen, data.test.images[:2])}
                _check_same(model, gates[f"{name} {seed}"]["frozen"], data.test.images[:64])

    found: dict[str, dict[str, dict[str, Any]]] = {}
    with torch.inference_mode():
        for number, batch in enumerate(BATCHES):
            progress("time", number, len(BATCHES))
            x = data.test.images[:batch]
            single = data.test.images[:ONE_BY_ONE].split(1)
            calls: dict[str, Callable[[], object]] = {}
            images: dict[str, int] = {}
            for name, module in dense.items():
                for way, call in dense_rivals(module.eval(), x).items():
                    calls[f"{name}/{way}"], images[f"{name}/{way}"] = call, batch
            for name, ways in gates.items():
                for way, run in ways.items():
                    key = f"{name}/{way}"
                    calls[key] = functools.partial(_each, run, single) if batch == 1 else functools.partial(run, x)
                    images[key] = len(single) if batch == 1 else batch
            latencies = interleave(calls, samples=chosen.samples, min_sample_seconds=SAMPLE_SECONDS)
            by, values = _judge(list(latencies.values()))
            seconds = {key: value / images[key] for key, value in zip(latencies, values, strict=True)}
            found[str(batch)] = {}
            for name in (*dense, *gates):
                own = {key.split("/")[1]: value for key, value in seconds.items() if key.split("/")[0] == name}
                best = min(own, key=own.__getitem__)
                entry = {"seconds": float(f"{own[best]:.4g}"), "by": best, "statistic": by}
                found[str(batch)][name] = {**entry, "torch": float(f"{own['torch']:.4g}")}
    progress("time", len(BATCHES), len(BATCHES))
    return found


def _each(run: Callable[[Tensor], Tensor], images: Sequence[Tensor]) -> None:
    for image in images:
        run(image)


def _frozen(segment: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """As the dense rival "frozen": what runs between decisions, without Python."""
    return torch.jit.optimize_for_inference(torch.jit.trace(segment.eval(), x))


# --- the run ----------------------------------------------------------------------------------------------------------


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train what is not stored in `out`, time it, and put it together."""
    chosen = plan(settings)
    data, what = load(settings.data, settings.quick)
    check_digits(data)
    made = trials(chosen)
    records = run_all(list(made.values()), data, out, settings, progress)
    with threads_of_torch(settings.threads):
        described = machine.describe(settings.threads)
        stamp = {
            "version": VERSION, "machine": described, "build": _build_stamp(), "samples": chosen.samples,
            "trials": [dict(trial.config) for trial in made.values()],
        }  # fmt: skip
        store = Store(out / "times")  # without it, times are taken again and nothing is trained
        times = store.once("skipping", stamp, functools.partial(_times, chosen, made, records, data, progress))
    seeds = range(chosen.seeds)

    def of(name: str) -> list[dict[str, Any]]:
        return [records[made[name, seed].name].result for seed in seeds]

    def row(name: str, results: Sequence[Mapping[str, Any]], keys: Sequence[str], **more: Any) -> dict[str, Any]:
        """`keys`: whose times these are, one or one per seed."""
        return {
            "name": name,
            **{key: [round(r[key], 4) for r in results] for key in ("validation", "test")},
            "macs": [round(r["macs"]) for r in results],
            "time": {batch: [own[key]["seconds"] for key in keys] for batch, own in times.items() if keys},
            **more,
        }

    rows = [row("whole", of("whole"), ["whole"])]
    rows += [row(f"short{count}", of(f"short{count}"), [f"short{count}"]) for count in chosen.short]
    for per_block, target in chosen.gates:
        name = _gate_name(per_block, target)
        more = {key: [result[key] for result in of(name)] for key in ("share", "depths", "paths")}
        rows.append(row(name, of(name), [f"{name} {seed}" for seed in seeds], **more))
    rows.append(row("stochastic", of("stochastic"), ["whole"]))
    for source in ("stochastic", "whole"):
        for index, level in enumerate(of(f"drop-{source}")[0]["levels"]):
            levels = [result["levels"][index] for result in of(f"drop-{source}")]
            more = {"kept": [own["kept"] for own in levels], "raw": [round(own["raw"], 4) for own in levels]}
            key = f"{level['how']} {level['blocks']}"
            more |= {"how": level["how"], "blocks": level["blocks"]}
            rows.append(row(f"{source} {key}", levels, [key] if source == "stochastic" else [], **more))
    found: dict[str, Any] = {
        "experiment": "skipping", "data": what, "plan": asdict(chosen), "machine": described, "rows": rows,
        "times": times, "steps": steps_of(chosen.epochs, data, chosen.batch_size),
    }  # fmt: skip
    lead = (
        f"Residual blocks that are skipped, on {what}: a narrow ResNet-20 on images of half the size, at small scale; "
        f"{over_seeds(chosen.seeds)}, mean ± standard deviation. Times are measured, all networks by turns, each in "
        "the fastest of the ways that torch has to run it."
    )
    return Result("Skipping blocks", lead, tables(found), figures(found), found)


EXPERIMENT = Experiment(
    name="skipping",
    about="skipped residual blocks: gates per image, layers dropped after stochastic depth, measured",
    paper="arXiv 1711.09485, 1603.09382, 1909.11556",
    config=lambda settings: asdict(plan(settings)),
    run=run,
)
