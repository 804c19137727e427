# SPDX-License-Identifier: Apache-2.0
"""Group lasso against magnitude pruning at equal accuracy, with measured time (Wen et al., arXiv 1608.03665).

From one dense network per seed, every method gets as many further steps. Magnitude pruning removes first and fine-tunes
with all of them; group lasso spends the first part on proximal steps, then removes what has become zero (filters) or
masks it (columns, blocks), and fine-tunes with the rest. Smaller dense networks run in the fastest dense way, masked
ones packed; all take turns with the dense network in every way it can be run.

The paper trains on all of MNIST: ``slimtorch experiment group-lasso --data mnist``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from slimtorch import prune
from slimtorch.data import Digits, load
from slimtorch.experiments import machine
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.compare import _build_stamp, _check_same, _pack
from slimtorch.experiments.loop import evaluate, fit
from slimtorch.experiments.rivals import TORCH, dense_rivals, frozen
from slimtorch.experiments.store import Record, Store
from slimtorch.experiments.summary import mean_and_deviation, over_seeds, percent
from slimtorch.experiments.training import NETWORKS, TITLES, block_config
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.measure import count_parameters, interleave, threads_of_torch
from slimtorch.packing import _judge
from slimtorch.report import Table, format_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1  # raise it when trials train differently: stored ones are then not used
BATCHES = (1, 64)
SAMPLE_SECONDS = 5e-4  # short: another process then spoils few of them
EQUAL = 0.01  # "as accurate as dense": mean validation accuracy at most this far below
LASSO = {"lasso filters": "filters", "lasso columns": "shapes", "lasso blocks": "blocks"}
METHODS = ("weights", "blocks", "filters", *LASSO)
NARROW = ("filters", "lasso filters")  # smaller dense networks; the others are packed


@dataclass(frozen=True)
class NetworkPlan:
    """One network: steps of the dense training, of all that follows, and the levels of each method.

    Attributes:
        levels: sparsity of "weights" and "blocks" (share of all weights removed), ratio of "filters" (of the neurons
            of each hidden layer), strength of the lasso methods.
        lasso_share: of the further steps, with proximal steps.
        easier: layer → factor on the strengths.
    """

    batch_size: int
    dense_steps: int
    steps: int
    levels: Mapping[str, tuple[float, ...]]
    lasso_share: float = 0.6
    easier: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """All numbers of a run; steps are those for the 3,500 embedded digits.

    Attributes:
        rate, tune_rate: Adam's, with a cosine to 0: dense, and after removal.
        lasso_rate: of the proximal steps: SGD with momentum 0.9, for which they are exact up to the momentum.
        samples: rounds of timing.
        pack_seconds: that pack_ may take for each network and batch size.
    """

    networks: Mapping[str, NetworkPlan]
    seeds: int = 5
    rate: float = 2e-3
    tune_rate: float = 2e-3
    lasso_rate: float = 0.05
    samples: int = 31
    pack_seconds: float = 0.4


# Chosen on validation images of seed 0.
FULL = Plan(
    {
        "lenet300": NetworkPlan(
            60,
            350,
            400,
            {
                "weights": (0.8, 0.9, 0.95, 0.98),
                "blocks": (0.6, 0.8, 0.9),
                "filters": (0.5, 0.7, 0.8, 0.85, 0.9),
                "lasso filters": (0.004, 0.006, 0.008, 0.01, 0.015),
                "lasso columns": (0.003, 0.006, 0.01, 0.02),
                "lasso blocks": (0.006, 0.01, 0.015, 0.02),
            },
        ),
        "lenet5": NetworkPlan(
            32,
            330,
            140,
            {
                "weights": (0.95, 0.98),
                "blocks": (0.8, 0.9),
                "filters": (0.5, 0.6, 0.7),
                "lasso filters": (0.015, 0.02, 0.03),
                "lasso columns": (0.015, 0.03),
                "lasso blocks": (0.015, 0.03),
            },
            lasso_share=0.4,
            easier={"conv1": 0.3},
        ),
    }
)
QUICK = Plan(
    {
        "lenet300": NetworkPlan(
            50,
            120,
            160,
            {
                "weights": (0.9,),
                "blocks": (0.8,),
                "filters": (0.5,),
                "lasso filters": (0.01,),
                "lasso columns": (0.01,),
                "lasso blocks": (0.01,),
            },
        )
    },
    seeds=2,
    samples=5,
    pack_seconds=0.1,
)


def plan(settings: Settings) -> Plan:
    """What a run does."""
    chosen = QUICK if settings.quick else FULL
    return chosen if settings.seeds is None else Plan(**{**_fields(chosen), "seeds": settings.seeds})


def _fields(chosen: Plan) -> dict[str, Any]:
    return {name: getattr(chosen, name) for name in chosen.__dataclass_fields__}


def config(settings: Settings) -> dict[str, Any]:
    """The plan, JSON-ready."""
    return asdict(plan(settings))


# --- training ---------------------------------------------------------------------------------------------------------


def trials(chosen: Plan, scale: float) -> dict[tuple[str, str, float, int], Trial]:
    """(network, method, level, seed) → trial; the dense networks have level 0 and come first."""
    made: dict[tuple[str, str, float, int], Trial] = {}
    for network, own in chosen.networks.items():
        for seed in range(chosen.seeds):
            base = {"version": VERSION, "network": network, "seed": seed, "batch_size": own.batch_size}
            dense = {**base, "method": "dense", "steps": round(own.dense_steps * scale), "rate": chosen.rate}
            made[network, "dense", 0.0, seed] = Trial(f"{network}-dense-seed{seed}", train_dense, dense)
        for method, levels in own.levels.items():
            for level in levels:
                for seed in range(chosen.seeds):
                    base = {"version": VERSION, "network": network, "seed": seed, "batch_size": own.batch_size}
                    extra: dict[str, Any] = {"method": method, "level": level, "steps": round(own.steps * scale)}
                    extra["rate"] = chosen.tune_rate
                    if method in LASSO:
                        extra |= {"share": own.lasso_share, "lasso_rate": chosen.lasso_rate}
                        extra["easier"] = dict(own.easier)
                    name = f"{network}-{method.replace(' ', '-')}-{level:g}-seed{seed}"
                    needs = (made[network, "dense", 0.0, seed],)
                    made[network, method, level, seed] = Trial(name, train_pruned, {**base, **extra}, needs)
    return made


def train_dense(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """The network that the others start from."""
    torch.manual_seed(3000 + config["seed"])
    network = NETWORKS[config["network"]]
    model = network.build(network.hidden)
    _adam(model, data, config, 0, config["steps"])
    return _record(model, config, data, keep=True)


def train_pruned(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """A dense network made smaller in one way, with as many steps as every other way takes.

    A group lasso so strong that a layer loses everything gives a record with ``collapsed``: it has no network.
    """
    torch.manual_seed(4000 + config["seed"])
    model, x = restore(config["network"], needed[0]), data.train.images[:1]
    method, steps = config["method"], config["steps"]
    if method not in LASSO:
        if method == "filters":
            prune.prune_(model, prune.Neurons(config["level"], "l2"), example_inputs=x)
        elif method == "weights":
            prune.prune_(model, prune.Magnitude(config["level"], scope="global"))
        else:
            prune.prune_(model, block_config(config["network"], model, config["level"]))
        _adam(model, data, config, 0, steps)
        return _record(model, config, data)
    penalty = lasso(model, config)
    first = round(config["share"] * steps)
    _proximal(model, data, config, penalty, first)
    report = penalty.report()
    groups = {layer.name: [layer.zero, layer.count] for layer in report.layers}
    if any(zero == count for zero, count in groups.values()):
        return Record({"collapsed": True, "groups": groups, "validation": 0.1, "test": 0.1, "nonzero": 0})
    if method == "lasso filters":
        penalty.remove_(x)
    else:
        penalty.mask_()
    _adam(model, data, config, first, steps)
    record = _record(model, config, data)
    record.result["groups"] = groups
    return record


def lasso(model: nn.Module, config: Mapping[str, Any]) -> prune.GroupLasso:
    """The penalty of a trial: on all layers but the last, whose rows are the classes."""
    network = NETWORKS[config["network"]]
    strengths = {name: config["level"] * config["easier"].get(name, 1.0) for name in network.layers}
    kind = LASSO[config["method"]]
    if kind == "blocks":
        blocks: dict[str, Any] = {name: network.blocks.get(name, (16, 16)) for name in network.layers}
        return prune.GroupLasso(model, strengths, blocks)
    return prune.GroupLasso(model, strengths, kind)  # type: ignore[arg-type]


def _proximal(
    model: nn.Module, data: Digits, config: Mapping[str, Any], penalty: prune.GroupLasso, steps: int
) -> None:
    rate = config["lasso_rate"]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    _fit(model, data, config, optimizer, steps=steps, after_step=lambda: penalty.proximal_(rate))


def _adam(model: nn.Module, data: Digits, config: Mapping[str, Any], start: int, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=config["rate"], fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - start))
    _fit(model, data, config, optimizer, steps=steps, start=start, schedule=schedule)


def _fit(model: nn.Module, data: Digits, config: Mapping[str, Any], optimizer: Any, **options: Any) -> None:
    # every method of a seed sees the same batches; channels last trains convolutions a third faster on CPUs
    seed = config["seed"] if config["method"] == "dense" else 100 + config["seed"]
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fit(model, data, optimizer, batch_size=config["batch_size"], seed=seed, **options)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _record(model: nn.Module, config: Mapping[str, Any], data: Digits, keep: bool = False) -> Record:
    prune.bake_(model)
    network = NETWORKS[config["network"]]
    result = {
        "collapsed": False,
        "validation": evaluate(model, data.validation)[1],
        "test": evaluate(model, data.test)[1],
        "widths": list(network.widths(model)),
        "nonzero": count_parameters(model)[1],
    }
    if config["network"] == "lenet300" and config["method"] == "lasso columns":
        result["pixels"] = (cast(Tensor, model.get_submodule("fc1").weight) != 0).any(0).int().tolist()
    arrays = {}
    if keep or config["seed"] == 0:  # those that others start from, and those that are timed
        arrays = {key: value.contiguous().numpy() for key, value in model.state_dict().items()}
    return Record(result, arrays)


def restore(network: str, record: Record) -> nn.Module:
    """The network of a record with weights."""
    model = NETWORKS[network].build(record.result.get("widths", NETWORKS[network].hidden))
    model.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in record.arrays.items()})
    return model


# --- timing -----------------------------------------------------------------------------------------------------------


def _times(
    network: str, records: Mapping[tuple[str, float], Record], chosen: Plan, data: Digits, progress: Progress
) -> dict[str, dict[str, dict[str, Any]]]:
    """Batch size → "method level" → seconds of the fastest way, and of torch for dense networks; seed 0's networks."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    with torch.inference_mode():
        for number, batch in enumerate(BATCHES):
            progress(f"time {TITLES[network]}", number, len(BATCHES))
            x = data.test.images[:batch]
            calls: dict[str, Callable[[], object]] = {}
            formats: dict[str, dict[str, str]] = {}
            for (method, level), record in records.items():
                key, model = _key(method, level), restore(network, record).eval()
                if method in ("dense", *NARROW):
                    calls |= {f"{key}/{name}": call for name, call in dense_rivals(model, x).items()}
                    continue
                packed, formats[key] = _pack(network, model, x, chosen.pack_seconds)
                _check_same(model, packed, data.test.images[:64])
                calls[f"{key}/packed"] = functools.partial(packed, x)
                scripted = frozen(packed, x)
                if scripted is not None:
                    calls[f"{key}/packed frozen"] = functools.partial(scripted, x)
            latencies = interleave(calls, samples=chosen.samples, min_sample_seconds=SAMPLE_SECONDS)
            by, values = _judge(list(latencies.values()))
            seconds = dict(zip(latencies, values, strict=True))
            found[str(batch)] = {}
            for method, level in records:
                key = _key(method, level)
                own = {n.split("/")[1]: value for n, value in seconds.items() if n.split("/")[0] == key}
                name = min(own, key=own.__getitem__)
                whole = latencies[f"{key}/{name}"]
                entry: dict[str, Any] = {"seconds": own[name], "by": name, "statistic": by}
                entry |= {"p10": whole.p10, "median": whole.median, "p90": whole.p90}
                if TORCH in own:
                    entry["torch"] = own[TORCH]
                if key in formats:
                    entry["formats"] = formats[key]
                found[str(batch)][key] = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in entry.items()}
    progress(f"time {TITLES[network]}", len(BATCHES), len(BATCHES))
    return found


def _key(method: str, level: float) -> str:
    return method if method == "dense" else f"{method} {level:g}"


# --- the run ----------------------------------------------------------------------------------------------------------


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train what is not stored in ``out``, time it, and put it together."""
    data, words = load(settings.data, settings.quick)
    if data.train.images.shape[1:] != (1, 28, 28):
        raise ValueError(f"data: group-lasso is for images of 1×28×28, got {tuple(data.train.images.shape[1:])}")
    chosen = plan(settings)
    scale = (len(data.train) / 3500) ** 0.5 if len(data.train) > 3500 else 1.0  # more steps, fewer passes
    made = trials(chosen, scale)
    records = run_all(list(made.values()), data, out, settings, progress)
    store = Store(out / "times")
    found: dict[str, Any] = {
        "experiment": "group-lasso",
        "data": words,
        "plan": asdict(chosen),
        "networks": {},
    }
    with threads_of_torch(settings.threads):
        found["machine"] = machine.describe(settings.threads)
        for network in chosen.networks:
            first = {
                (method, level): records[trial.name]
                for (name, method, level, seed), trial in made.items()
                if name == network and seed == 0 and not records[trial.name].result["collapsed"]
            }
            stamp = {
                "version": VERSION,
                "machine": found["machine"],
                "build": _build_stamp(),
                "trials": [dict(t.config) for (name, *_), t in made.items() if name == network],
                "samples": chosen.samples,
                "pack_seconds": chosen.pack_seconds,
            }
            times = store.once(network, stamp, functools.partial(_times, network, first, chosen, data, progress))
            found["networks"][network] = _gathered(network, made, records, times, chosen)
    seeds = chosen.seeds
    lead = (
        f"Group lasso against magnitude pruning at small scale: {', '.join(TITLES[n] for n in chosen.networks)} on "
        f"{words}; {over_seeds(seeds)}, mean ± standard deviation; times are measured, of seed 0's networks, in turns "
        "with the dense network. After arXiv 1608.03665 (structured sparsity learning)."
    )
    return Result("Group lasso against magnitude pruning", lead, tables(found), figures(found), found)


def _gathered(
    network: str,
    made: Mapping[tuple[str, str, float, int], Trial],
    records: Mapping[str, Record],
    times: Mapping[str, Any],
    chosen: Plan,
) -> dict[str, Any]:
    rows = []
    for method, level in [("dense", 0.0), *((m, v) for m, own in chosen.networks[network].levels.items() for v in own)]:
        results = [records[made[network, method, level, seed].name].result for seed in range(chosen.seeds)]
        row: dict[str, Any] = {"method": method, "level": level}
        row |= {name: [round(r[name], 4) for r in results] for name in ("validation", "test")}
        row["nonzero"] = [r["nonzero"] for r in results]
        row["collapsed"] = sum(r["collapsed"] for r in results)
        row["widths"] = [r.get("widths") for r in results] if method in NARROW else None
        row["groups"] = results[0].get("groups")
        row["time"] = {batch: own.get(_key(method, level)) for batch, own in times.items()}
        maps = [r["pixels"] for r in results if "pixels" in r]
        if maps:
            row["pixels"] = [sum(column) for column in zip(*maps, strict=True)]
        rows.append(row)
    return {"title": TITLES[network], "rows": rows}


# --- report -----------------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float]) -> float:
    return float(mean_and_deviation(values)["mean"])


def _fitting(rows: Sequence[Mapping[str, Any]], method: str) -> Mapping[str, Any] | None:
    """Of a method's networks within a point of dense on validation, the one with the fewest parameters."""
    least = _mean(rows[0]["validation"]) - EQUAL
    own = [r for r in rows if r["method"] == method and not r["collapsed"] and _mean(r["validation"]) >= least]
    return min(own, key=lambda r: _mean(r["nonzero"]), default=None)


def _cells(row: Mapping[str, Any], dense: Mapping[str, Any]) -> list[object]:
    level = "-" if row["method"] == "dense" else format_number(row["level"])
    left = _mean(row["nonzero"])
    cells: list[object] = [row["method"], level, percent(row["test"]), f"{100 * left / _mean(dense['nonzero']):.1f}%"]
    for batch in dense["time"]:
        time, reference = row["time"][batch], dense["time"][batch]
        if time is None:
            cells += ["-", "-"]
        else:
            cells += [f"{time['seconds'] * 1e6:.1f}", f"{reference['seconds'] / time['seconds']:.2f}x"]
    return cells


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Per network: what is as accurate as dense, and everything."""
    batches = list(next(iter(found["networks"].values()))["rows"][0]["time"])
    columns = ["method", "level", "test %", "left"]
    for batch in batches:
        columns += [f"us, b{batch}", f"gain, b{batch}"]
    note = (
        "level: share removed (weights, blocks: of all weights; filters: of each hidden layer's neurons), strength of "
        "the lasso. left: parameters that are not zero. us: microseconds per call in the fastest way that was found to "
        "run it, b: batch size; gain: over the dense network in its fastest way. filters: smaller and dense; the "
        "others: packed."
    )
    headline = machine.headline(found["machine"])
    chosen, everything = [], []
    for network in found["networks"].values():
        rows = network["rows"]
        dense = rows[0]
        noisy = [f"b{batch}" for batch in batches if dense["time"][batch]["statistic"] == "p10"]
        disturbed = f"{' and '.join(noisy)}: other processes at work, 10th percentiles instead of medians."
        cells = [_cells(dense, dense)]
        for method in METHODS:
            best = _fitting(rows, method)
            empty: list[object] = [method, "none", *["-"] * (2 + 2 * len(batches))]
            cells.append(empty if best is None else _cells(best, dense))
        title = f"{network['title']}: the smallest network of each method within a point of dense (validation)"
        chosen.append(Table(title, columns, cells, [note, *([disturbed] if noisy else []), headline]))
        gone = sum(row["collapsed"] for row in rows)
        lost = [f"{gone} networks in which the lasso emptied a layer count as 10 %, without time."] if gone else []
        everything.append(Table(f"{network['title']}: all levels", columns, [_cells(r, dense) for r in rows], lost))
    return [*chosen, *everything]


_STYLE: dict[str, dict[str, Any]] = {
    "weights": {"color": "#0072B2", "marker": "o"},
    "blocks": {"color": "#E69F00", "marker": "s"},
    "filters": {"color": "#009E73", "marker": "^"},
    "lasso filters": {"color": "#D55E00", "marker": "^", "linestyle": "--"},
    "lasso columns": {"color": "#CC79A7", "marker": "D", "linestyle": "--"},
    "lasso blocks": {"color": "#999999", "marker": "s", "linestyle": "--"},
}


def figures(found: Mapping[str, Any]) -> list[tuple[str, str, Figure]]:
    """Accuracy against measured time per network; the pixels that the lasso on columns leaves."""
    drawn = []
    for name, network in found["networks"].items():
        caption = (
            f"{network['title']}: test accuracy against measured time; up and to the left is better. Solid: magnitude, "
            "dashed: group lasso. Bars: standard deviation. Dotted: a point below dense."
        )
        drawn.append((f"group-lasso-{name}", caption, _accuracy_latency(network)))
    maps = [row for row in found["networks"].get("lenet300", {"rows": []})["rows"] if "pixels" in row]
    if maps:
        caption = (
            "Pixels that the first layer of LeNet-300-100 still reads after group lasso on columns; black: "
            "in all seeds."
        )
        drawn.append(("group-lasso-pixels", caption, _pixels(maps)))
    return drawn


def _accuracy_latency(network: Mapping[str, Any]) -> Figure:
    from slimtorch.experiments import plots

    rows = network["rows"]
    dense = rows[0]
    figure, axes = plots.new_figure(len(dense["time"]))
    height = 100 * _mean(dense["test"])
    for axis, batch in zip(axes, dense["time"], strict=True):
        lowest = height
        for method in METHODS:
            own = [r for r in rows if r["method"] == method and r["time"][batch] is not None and not r["collapsed"]]
            if not own:
                continue
            x = [r["time"][batch]["seconds"] * 1e6 for r in own]
            summary = [mean_and_deviation([100 * value for value in r["test"]]) for r in own]
            y, bars = [s["mean"] for s in summary], [s["std"] or 0.0 for s in summary]
            lowest = min(lowest, *y)
            axis.errorbar(x, y, bars, label=method, capsize=2, linewidth=1.4, markersize=5, **_STYLE[method])
        time = dense["time"][batch]
        axis.plot(time["torch"] * 1e6, height, "k*", markersize=11, linestyle="none", label="dense, torch")
        axis.plot(time["seconds"] * 1e6, height, "kP", markersize=8, linestyle="none", label="dense, best")
        axis.axhline(height - 100 * EQUAL, color="black", linewidth=0.8, linestyle=":")
        axis.set_ylim(max(lowest - 1, height - 15), min(100.0, height + 3))
        axis.set_xscale("log")
        plots.plain_ticks(axis.xaxis)
        axis.set_xlabel(f"microseconds per call, batch {batch}")
        axis.set_ylabel("test accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=8, frameon=False)
    figure.suptitle(f"{network['title']}: group lasso and magnitude, accuracy against measured time")
    return figure


def _pixels(maps: Sequence[Mapping[str, Any]]) -> Figure:
    from slimtorch.experiments import plots

    figure, axes = plots.new_figure(len(maps), height=2.9, width=2.4)
    for axis, row in zip(axes, maps, strict=True):
        seeds = len(row["test"])
        image = [row["pixels"][28 * i : 28 * i + 28] for i in range(28)]
        axis.imshow(image, cmap="gray_r", vmin=0, vmax=seeds)
        axis.grid(False)
        axis.set_xticks([])
        axis.set_yticks([])
        kept = sum(row["pixels"]) / seeds
        axis.set_title(f"strength {row['level']:g}\n{kept:.0f} of 784, {100 * _mean(row['test']):.1f} %", fontsize=9)
    return figure


EXPERIMENT = Experiment(
    name="group-lasso",
    about="group lasso against magnitude pruning at equal accuracy, with measured time",
    paper="arXiv 1608.03665",
    config=config,
    run=run,
)
