# SPDX-License-Identifier: Apache-2.0
"""What binary-connect, binary-net and xnor-net share: training, packing, timing."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from slimtorch.data import Digits, Split
from slimtorch.experiments.catalogue import Progress, Settings
from slimtorch.experiments.rivals import best_dense, dense_rivals
from slimtorch.experiments.store import Record
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.measure import Latency, interleave, threads_of_torch
from slimtorch.quantize import LatentBinary, binarize_, squared_hinge_loss
from slimtorch.quantize.binary_layers import Method

VERSION = 1  # raise it when the code below trains differently: stored trials of the old code are then not used


@dataclass(frozen=True)
class Variant:
    """One row of an experiment: a network, how it is binarised, and how trained.

    Attributes:
        title: of the row.
        build: makes the network, of an image's shape; plain torch layers in the order the method needs.
        method: for `binarize_`; None: the network stays real.
        rate: first learning rate of Adam; falls exponentially to a hundredth.
        uniform: start binary weights uniformly in [-1, 1], as the authors of BinaryConnect do.
        hinge: squared hinge loss, else cross-entropy.
    """

    title: str
    build: Callable[[tuple[int, ...]], nn.Module]
    method: Method | None
    rate: float = 3e-3
    uniform: bool = False
    hinge: bool = True

    def model(self, shape: tuple[int, ...], seed: int) -> tuple[nn.Module, Any]:
        """The network, not trained, and the report of `binarize_` (None where it stays real)."""
        torch.manual_seed(seed)
        model = self.build(shape)
        if self.method is None:
            return model, None
        report = binarize_(model, self.method)
        for module in model.modules():
            if self.uniform and isinstance(module, LatentBinary):
                nn.init.uniform_(module.weight, -1, 1)
        return model, report


@dataclass(frozen=True)
class Plan:
    """How much is trained: ``epochs`` over batches of ``batch_size``, from ``seeds`` seeds."""

    epochs: int
    seeds: int
    batch_size: int = 100


@dataclass(frozen=True)
class _Training:
    """One variant from one seed, as a trial."""

    variant: Variant
    plan: Plan
    seed: int
    keep_weights: bool

    def __call__(self, config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
        model, record = train(self.variant, self.plan, data, self.seed)
        if not self.keep_weights:
            return record
        return Record(record.result, {key: value.numpy() for key, value in model.state_dict().items()})


def train_all(
    experiment: str,
    variants: Mapping[str, Variant],
    plan: Plan,
    data: Digits,
    out: Path,
    settings: Settings,
    progress: Progress,
    *,
    keep_weights: bool = True,
) -> dict[str, list[Record]]:
    """Every variant from every seed; what is stored in ``out`` is not trained again."""
    shape = tuple(data.train.images.shape[1:])
    trials: dict[str, list[Trial]] = {name: [] for name in variants}
    for seed in range(plan.seeds):
        for name, variant in variants.items():
            config = {
                "version": VERSION, "network": str(variant.build(shape)), "method": repr(variant.method),
                "rate": variant.rate, "uniform": variant.uniform, "hinge": variant.hinge, "seed": seed,
                "epochs": plan.epochs, "batch_size": plan.batch_size, "keep_weights": keep_weights,
            }  # fmt: skip
            run = _Training(variant, plan, seed, keep_weights)
            trials[name].append(Trial(f"{experiment}-{name}-seed{seed}", run, config))
    every = [trial for of_seed in zip(*trials.values(), strict=True) for trial in of_seed]
    records = run_all(every, data, out, settings, progress)
    return {name: [records[trial.name] for trial in own] for name, own in trials.items()}


def train(variant: Variant, plan: Plan, data: Digits, seed: int) -> tuple[nn.Module, Record]:
    """One network: Adam, learning rate falling exponentially, no choice of epoch; the test images are used once."""
    model, report = variant.model(tuple(data.train.images.shape[1:]), seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=variant.rate)
    if report is not None and report.binarized:
        report.attach(optimizer)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / max(1, plan.epochs - 1)))
    loss_of = squared_hinge_loss if variant.hinge else F.cross_entropy
    generator = torch.Generator().manual_seed(7000 + seed)  # the same batches for every variant
    images, labels = data.train.images, data.train.labels
    batches = len(labels) // plan.batch_size
    losses, errors = [], []
    started = time.monotonic()
    for _ in range(plan.epochs):
        model.train()
        order = torch.randperm(len(labels), generator=generator)
        sum_of_losses = 0.0
        for batch in order[: batches * plan.batch_size].split(plan.batch_size):
            loss = loss_of(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sum_of_losses += float(loss.detach())
        schedule.step()
        losses.append(sum_of_losses / batches)
        errors.append(error(model, data.validation))
    first = next(module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    counts = torch.histc(first.weight.detach().clamp(-1, 1), 41, -1, 1)
    result = {
        "test_error": error(model, data.test),
        "validation_error": errors,
        "training_loss": losses,
        "first_layer_histogram": (counts / counts.sum()).tolist(),
        "seconds": time.monotonic() - started,
    }
    return model, Record(result)


def restore(variant: Variant, record: Record, shape: tuple[int, ...]) -> nn.Module:
    """The trained network of a record, in eval mode."""
    model, _ = variant.model(shape, 0)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in record.arrays.items()})
    return model.eval()


def predict(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Class of each image, in eval mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in images.split(250)])


def error(model: nn.Module, split: Split) -> float:
    """Share of wrong answers, in [0, 1]."""
    return float((predict(model, split.images) != split.labels).double().mean())


def packed_copy(model: nn.Module) -> nn.Module:
    """A copy that runs on binary weights as they are stored: each layer gives way to its ``packed()``."""
    model = copy.deepcopy(model).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, LatentBinary):
            model.set_submodule(name, module.packed())
    return model


def agreement(variant: Variant, records: Sequence[Record], split: Split) -> tuple[int, int]:
    """(equal, all) predictions of the packed networks and of the layers that were trained, in plain torch.

    Raises:
        RuntimeError: in eval mode, a packed network gives other outputs than the trained one.
    """
    same = total = 0
    shape = tuple(split.images.shape[1:])
    for record in records:
        model = restore(variant, record, shape)
        packed = packed_copy(model)
        for images in split.images.split(250):
            with torch.no_grad():
                ours, evaluated = packed(images), model(images)
            if not torch.equal(ours, evaluated):
                raise RuntimeError(f"{variant.title}: the packed network gives other outputs than in eval mode")
            # With gradients the layers do not call the packed operator: signs and scales in plain torch.
            with torch.enable_grad():
                plain = model(images).detach()
            same += int((plain.argmax(1) == ours.argmax(1)).sum())
            total += len(images)
    return same, total


def time_networks(
    dense: nn.Module, others: Mapping[str, nn.Module], images: torch.Tensor, batches: Sequence[int], settings: Settings
) -> dict[int, dict[str, Latency]]:
    """Batch size -> name -> latency: every dense rival of ``dense`` and all ``others``, by turns, in one process."""
    found: dict[int, dict[str, Latency]] = {}
    samples = 5 if settings.quick else 21
    with threads_of_torch(settings.threads), torch.inference_mode():
        for batch in batches:
            x = images[:batch].clone()
            calls: dict[str, Callable[[], object]] = dict(dense_rivals(dense, x))
            for name, model in others.items():
                calls[name] = _call(model.eval(), x)
            found[batch] = interleave(calls, samples=samples)
    return found


def _call(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: model(x)


def speedup(latencies: Mapping[str, Latency], name: str) -> float:
    """Best dense over ``name``, medians."""
    return best_dense(latencies) / latencies[name].median


def errors_of(records: Sequence[Record]) -> list[float]:
    """Test errors of all seeds."""
    return [record.result["test_error"] for record in records]


def row_data(variant: Variant, records: Sequence[Record]) -> dict[str, Any]:
    """What the JSON says about a row."""
    results = [record.result for record in records]
    epochs = len(results[0]["validation_error"])
    return {
        "title": variant.title,
        "method": None if variant.method is None else repr(variant.method),
        "learning_rate": variant.rate,
        "test_error": [round(result["test_error"], 5) for result in results],
        "validation_error": [
            round(statistics.fmean(result["validation_error"][i] for result in results), 5) for i in range(epochs)
        ],
        "training_loss": [
            round(statistics.fmean(result["training_loss"][i] for result in results), 6) for i in range(epochs)
        ],
        "first_layer_histogram": [round(value, 5) for value in results[0]["first_layer_histogram"]],
        "seconds": [round(result["seconds"], 1) for result in results],
    }


def latency_data(by_batch: Mapping[int, Mapping[str, Latency]]) -> dict[str, Any]:
    """Batch -> name -> median and spread in seconds, JSON-ready."""
    return {str(batch): {name: asdict(latency) for name, latency in found.items()} for batch, found in by_batch.items()}
