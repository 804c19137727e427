# SPDX-License-Identifier: Apache-2.0
"""``slimtorch compare``: small networks pruned in each way, and what each way gives in accuracy and in measured time.

train and fine-tune (all cores, one unit per process)  ──▶  store  ──▶  pack and time (alone, by turns)  ──▶  report
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtorch.data import Digits, digits
from slimtorch.experiments import catalogue, machine
from slimtorch.experiments.rivals import FROZEN, ONEDNN, TORCH, best_dense, dense_rivals, frozen
from slimtorch.experiments.store import Record, Store, digest
from slimtorch.experiments.training import NETWORKS, PRUNED, TITLES, Method, Recipe, Unit, restore, trial_of, units
from slimtorch.experiments.trials import run_all
from slimtorch.measure import Latency, count_macs, disk_bytes, interleave, memory_bytes, threads_of_torch
from slimtorch.report import Table

SCHEMA = "slimtorch.compare/1"
PACKED, PACKED_FROZEN = "packed", "packed frozen"
EQUAL_ACCURACY = 0.01  # "as accurate as dense": validation accuracy at most this far below


@dataclass(frozen=True)
class Settings:
    """What to compare. ``sparsities`` are shares of weights removed, in (0, 1); ``samples`` rounds of timing.

    ``pack_seconds`` is the time that ``pack_`` may take for each network and batch size.
    """

    networks: tuple[str, ...] = ("lenet300", "lenet5")
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98)
    seeds: int = 3
    batches: tuple[int, ...] = (1, 64)
    samples: int = 11
    threads: int = 1
    pack_seconds: float = 0.4
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        for name in self.networks:
            if name not in NETWORKS:
                raise ValueError(f"networks: expected some of {', '.join(NETWORKS)}, got {name!r}")
        for sparsity in self.sparsities:
            if not 0 < sparsity < 1:
                raise ValueError(f"sparsities: expected shares between 0 and 1, got {sparsity}")
        for name in ("seeds", "samples", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def quick() -> Settings:
    """The shape of the result in well under a minute: one seed, two sparsities, fewer epochs."""
    return Settings(sparsities=(0.9,), seeds=1, samples=5, pack_seconds=0.1, recipe=Recipe(epochs=0.4))


@dataclass(frozen=True)
class Variant:
    """One network pruned in one way to one sparsity; accuracies over seeds, the rest of seed 0's network.

    ``latency``: batch size -> name of the runner ("torch", "oneDNN", "frozen", "packed", "packed frozen") -> seconds.
    A network that keeps its dense shape takes its dense time from the unpruned network: zeros do not change it.
    ``formats``: batch size -> layer -> what ``pack_`` chose. Bytes and MACs are those of the packed network for the
    first batch size.
    """

    method: Method
    sparsity: float
    test: list[float]
    validation: list[float]
    parameters: int
    bytes_memory: int
    bytes_disk: int
    macs: int
    latency: dict[int, dict[str, Latency]]
    formats: dict[int, dict[str, str]]

    def seconds(self, batch: int) -> float:
        """What it really takes: packed, where the dense code would multiply zeros; else the fastest way to run it."""
        packed = self.packed_seconds(batch)
        if packed is not None and not self.method.structured:
            return packed
        return min(latency.median for latency in self.latency[batch].values())

    def packed_seconds(self, batch: int) -> float | None:
        """Of the packed network, as it is or frozen: what dense networks are granted too. None for the dense one."""
        runners = self.latency[batch]
        return min((runners[name].median for name in (PACKED, PACKED_FROZEN) if name in runners), default=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method.value,
            "sparsity": self.sparsity,
            "test_accuracy": _spread(self.test),
            "validation_accuracy": _spread(self.validation),
            "parameters": self.parameters,
            "bytes_memory": self.bytes_memory,
            "bytes_disk": self.bytes_disk,
            "macs": self.macs,
            "latency_seconds": {
                str(batch): {name: asdict(latency) for name, latency in runners.items()}
                for batch, runners in self.latency.items()
            },
            "formats": {str(batch): chosen for batch, chosen in self.formats.items()},
        }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


@dataclass(frozen=True)
class Comparison:
    """All of a run: ``networks`` maps each network's name to its variants, the dense one first."""

    settings: Settings
    machine: dict[str, object]
    networks: dict[str, list[Variant]]

    def dense(self, network: str) -> Variant:
        return self.networks[network][0]

    def of(self, network: str, method: Method) -> list[Variant]:
        """The variants of one method, by rising sparsity."""
        return [variant for variant in self.networks[network] if variant.method is method]

    def speedup(self, network: str, variant: Variant, batch: int, over: str) -> float:
        """The unpruned network's time (``over``: "torch" or the "best" dense code) over this variant's."""
        latency = self.dense(network).latency[batch]
        reference = latency[TORCH].median if over == TORCH else best_dense(latency)
        return reference / variant.seconds(batch)

    def as_accurate(self, network: str, method: Method) -> Variant | None:
        """The sparsest variant whose validation accuracy is within a point of dense: chosen without the test part."""
        least = statistics.fmean(self.dense(network).validation) - EQUAL_ACCURACY
        fitting = [variant for variant in self.of(network, method) if statistics.fmean(variant.validation) >= least]
        return fitting[-1] if fitting else None

    # --- what it says -------------------------------------------------------------------------------------------------

    def tables(self) -> list[Table]:
        """One table per network, then one of the sparsest networks that are as accurate as dense."""
        return [*(self._network_table(network) for network in self.networks), self._accuracy_table()]

    def _network_table(self, network: str) -> Table:
        columns = ["method", "zeros", "test %", "params", "KiB", "kMAC"]
        for batch in self.settings.batches:
            columns += [f"b{batch} torch", "best", "packed"]
        rows: list[list[object]] = []
        for variant in self.networks[network]:
            sparsity = "-" if variant.method is Method.DENSE else f"{variant.sparsity:.0%}"
            row: list[object] = [variant.method.short, sparsity, _percent(variant.test), variant.parameters]
            row += [round(variant.bytes_disk / 1024), round(variant.macs / 1000)]
            for batch in self.settings.batches:
                latency = variant.latency[batch]
                times = (latency[TORCH].median, best_dense(latency), variant.packed_seconds(batch))
                row += [_short(seconds) for seconds in times]
            rows.append(row)
        seeds = self.settings.seeds
        notes = [
            "Times: microseconds per call, median; b: batch size. best: the fastest of torch, oneDNN and frozen "
            "TorchScript (networks pruned to zeros take the dense time of the unpruned one). packed: slim.pack_, as it "
            "is or frozen likewise.",
            f"Test accuracy: {self.settings.recipe.test} images, mean{' ± deviation' if seeds > 1 else ''} over "
            f"{seeds} seed{'s' if seeds > 1 else ''}; the rest is seed 0's network. zeros: share of weights removed. "
            "KiB, kMAC: on disk and executed for one image, packed. one-shot, iterative: single weights. scratch: the "
            "shape of 'neurons', newly initialised, trained for as many epochs.",
            machine.headline(self.machine),
        ]
        return Table(f"{TITLES[network]}, digits at small scale", columns, rows, notes)

    def _accuracy_table(self) -> Table:
        batches = self.settings.batches
        columns = ["network", "method", "zeros", "test %"]
        for batch in batches:
            columns += [f"b{batch} x torch", "x best", "wins from"]
        rows: list[list[object]] = []
        for network in self.networks:
            for method in PRUNED:
                chosen = self.as_accurate(network, method)
                row: list[object] = [network, method.short]
                row += ["none", "-"] if chosen is None else [f"{chosen.sparsity:.0%}", _percent(chosen.test)]
                for batch in batches:
                    for over in (TORCH, "best"):
                        row.append("-" if chosen is None else f"{self.speedup(network, chosen, batch, over):.2f}")
                    first = self.wins_from(network, method, batch)
                    row.append("nowhere" if first is None else f"{first:.0%}")
                rows.append(row)
        note = (
            "The sparsest network within one point of the dense one on validation images; accuracy on test images. "
            "x torch, x best: speed-up over the unpruned network, run by torch and by the best dense code; pruned "
            "weights and blocks run packed, smaller dense networks in the fastest way. wins from: the sparsity from "
            "which on it is faster than the best dense code, at whatever accuracy."
        )
        return Table("As accurate as dense: how sparse, and how much faster", columns, rows, [note])

    def wins_from(self, network: str, method: Method, batch: int) -> float | None:
        """The sparsity from which on a method is always faster than the best dense network; None if nowhere."""
        first = None
        for variant in reversed(self.of(network, method)):
            if self.speedup(network, variant, batch, "best") <= 1:
                break
            first = variant.sparsity
        return first

    def losses(self) -> list[str]:
        """Where it does not win, one line for each network, method and batch size."""
        lines = []
        for network in self.networks:
            for batch in self.settings.batches:
                for method in PRUNED:
                    slower = [
                        f"{variant.sparsity:.0%} ({self.speedup(network, variant, batch, 'best'):.2f}x)"
                        for variant in self.of(network, method)
                        if self.speedup(network, variant, batch, "best") < 1
                    ]
                    if slower:
                        where = f"{TITLES[network]}, batch {batch}, {method.value}"
                        lines.append(f"{where}: slower than the best dense code at {', '.join(slower)}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``schema`` names this layout."""
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "settings": asdict(self.settings),
            "networks": {
                network: {"title": TITLES[network], "variants": [variant.to_dict() for variant in variants]}
                for network, variants in self.networks.items()
            },
            "tables": [table.to_dict() for table in self.tables()],
            "losses": self.losses(),
        }


def _percent(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values) * 100:.1f}"
    return f"{mean}±{statistics.stdev(values) * 100:.1f}" if len(values) > 1 else mean


def _short(seconds: float | None) -> str:
    """Microseconds."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:,.0f}" if seconds >= 1e-4 else f"{seconds * 1e6:.1f}"


# --- the job ------------------------------------------------------------------------------------------------------

Progress = Callable[[str, int, int], None]


def _silent(stage: str, done: int, total: int) -> None:
    """No progress shown."""


def run(settings: Settings, out: Path, *, jobs: int | None = None, progress: Progress = _silent) -> Comparison:
    """Train what is not stored in ``out``, time it, and return the comparison.

    Args:
        settings: what to compare.
        out: folder of the stored units; one that was interrupted goes on where it stopped.
        jobs: training processes; None takes one per available core.
        progress: told (stage, pieces done, pieces in all).

    Raises:
        ImportError: mlxtend is missing.
        KeyboardInterrupt: passed on after the units under way were stored.
    """
    recipe = settings.recipe
    todo = units(settings.networks, settings.sparsities, settings.seeds)
    data = digits(recipe.train, recipe.validation, recipe.test)
    trials = [trial_of(unit, recipe) for unit in todo]
    records = run_all(trials, data, out, catalogue.Settings(jobs=jobs), progress, "training")
    store = Store(out / "times")
    with threads_of_torch(settings.threads):
        facts = machine.describe(settings.threads)
        networks = {}
        for network in settings.networks:
            networks[network] = _variants(network, settings, records, store, facts, data, progress)
    return Comparison(settings, facts, networks)


# --- timing -------------------------------------------------------------------------------------------------------


def _variants(
    network: str,
    settings: Settings,
    trained: Mapping[str, Record],
    store: Store,
    facts: dict[str, object],
    data: Digits,
    progress: Progress,
) -> list[Variant]:
    """Variants of one network, from its units and from times that are stored too."""
    recipe = settings.recipe
    pairs = [
        (Method.DENSE, 0.0),
        *((method, sparsity) for method in PRUNED for sparsity in sorted(settings.sparsities)),
    ]
    records = {
        (method, sparsity, seed): trained[Unit(network, method, sparsity, seed).name]
        for method, sparsity in pairs
        for seed in range(settings.seeds)
    }
    timing = {
        "facts": facts,
        "build": _build_stamp(),
        "units": [digest(Unit(network, method, sparsity, 0).config(recipe)) for method, sparsity in pairs],
        "batches": list(settings.batches),
        "samples": settings.samples,
        "pack_seconds": settings.pack_seconds,
    }
    stored = store.load(f"{network}-times", timing)
    if stored is None:
        models = {pair: restore(network, records[pair[0], pair[1], 0]) for pair in pairs}
        stored = Record({"variants": _time(network, models, settings, data, progress)})
        store.save(f"{network}-times", timing, stored)
    steps = len(settings.batches) * 2
    progress(f"timing {TITLES[network]}", steps, steps)

    variants = []
    for (method, sparsity), times in zip(pairs, stored.result["variants"], strict=True):
        results = [records[(method, sparsity, seed)].result for seed in range(settings.seeds)]
        variants.append(
            Variant(
                method,
                sparsity,
                [result["test"] for result in results],
                [result["validation"] for result in results],
                results[0]["nonzero"],
                times["bytes_memory"],
                times["bytes_disk"],
                times["macs"],
                {
                    int(b): {name: Latency(**entry) for name, entry in runs.items()}
                    for b, runs in times["latency"].items()
                },
                {int(b): chosen for b, chosen in times["formats"].items()},
            )
        )
    return variants


def _build_stamp() -> list[object]:
    """Changes with every build of the kernels, so that times of an older build are not shown as this one's."""
    from slimtorch import _C

    path = Path(str(_C.__file__))
    library = sorted(path.parent.glob("*.so"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in library]


def _time(
    network: str, models: dict[tuple[Method, float], nn.Module], settings: Settings, data: Digits, progress: Progress
) -> list[dict[str, Any]]:
    """Pack every model for every batch size, check it, and time all of them by turns."""
    stage, steps = f"timing {TITLES[network]}", len(settings.batches) * 2
    found: list[dict[str, Any]] = [{"latency": {}, "formats": {}} for _ in models]
    with torch.inference_mode():
        for number, batch in enumerate(settings.batches):
            progress(stage, 2 * number, steps)
            x = data.test.images[:batch]
            calls: dict[str, Callable[[], object]] = {}
            for index, ((method, _), model) in enumerate(models.items()):
                chosen: dict[str, str] = {}
                if method is Method.DENSE or method is Method.NEURONS:
                    calls.update({f"{index}/{name}": call for name, call in dense_rivals(model, x).items()})
                if method is Method.DENSE or method is Method.SCRATCH:
                    packed = model
                else:
                    packed, chosen = _pack(network, model, x, settings.pack_seconds)
                    _check_same(model, packed, data.test.images[:64])
                    calls[f"{index}/{PACKED}"] = functools.partial(packed, x)
                    scripted = frozen(packed, x)
                    if scripted is not None:
                        calls[f"{index}/{PACKED_FROZEN}"] = functools.partial(scripted, x)
                found[index]["formats"][str(batch)] = chosen
                if number == 0:
                    found[index]["bytes_memory"] = memory_bytes(packed)
                    found[index]["bytes_disk"] = disk_bytes(packed.state_dict())
                    found[index]["macs"] = count_macs(packed, x)[1] // batch
            progress(stage, 2 * number + 1, steps)
            times = interleave(calls, samples=settings.samples)
            _distribute(times, list(models), found, str(batch))
    return found


def _distribute(
    times: dict[str, Latency], pairs: list[tuple[Method, float]], found: list[dict[str, Any]], batch: str
) -> None:
    """Give each variant its own times, and those of the network with the same dense shape where it has none."""

    def taken(index: int) -> dict[str, Any]:
        prefix = f"{index}/"
        return {key.removeprefix(prefix): asdict(value) for key, value in times.items() if key.startswith(prefix)}

    dense = {key: value for key, value in taken(0).items() if key in (TORCH, ONEDNN, FROZEN)}
    for index, (method, sparsity) in enumerate(pairs):
        if method is Method.SCRATCH:
            own = taken(pairs.index((Method.NEURONS, sparsity)))
        elif method is Method.NEURONS:
            own = taken(index)
        else:
            own = {**dense, **taken(index)}
        found[index]["latency"][batch] = own


def _pack(network: str, model: nn.Module, x: torch.Tensor, seconds: float) -> tuple[nn.Module, dict[str, str]]:
    """A packed copy of ``model`` and the format of each of its layers."""
    from slimtorch.packing import BLOCK_SIZES, pack_

    sizes = list(dict.fromkeys([*BLOCK_SIZES, *NETWORKS[network].blocks.values()]))
    with torch.inference_mode(False):  # the layers are to be ordinary ones, not made of inference tensors
        packed = copy.deepcopy(model).eval()
        report = pack_(packed, x.clone(), block_sizes=sizes, time_budget=seconds)
    return packed, {layer.name: layer.chosen for layer in report.layers}


def _check_same(model: nn.Module, packed: nn.Module, x: torch.Tensor) -> None:
    """A fast wrong answer is no result: stops the run."""
    expected, got = model.eval()(x), packed(x)
    worst, scale = float((expected - got).abs().max()), float(expected.abs().max())
    if not worst <= 1e-3 * scale:
        raise RuntimeError(f"the packed network differs from the dense one by {worst:.3g} (outputs up to {scale:.3g})")
