# SPDX-License-Identifier: Apache-2.0
"""What `importance` and `one-shot-vs-iterative` share: a trained network to prune, and training it on afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slimtorch.data import Digits
from slimtorch.experiments.loop import Curve, fit
from slimtorch.experiments.store import Record
from slimtorch.models import LeNet5, LeNet300
from slimtorch.prune import LifeLong

TITLES = {
    "lenet300": "LeNet-300-100",
    "lenet5": "LeNet-5",
    "lenet300-norm": "LeNet-300-100 with batch norm",
}


def build(network: str) -> nn.Module:
    """A network of `TITLES`, not trained; its random numbers are torch's."""
    if network == "lenet300":
        return LeNet300()
    if network == "lenet5":
        return LeNet5()
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.BatchNorm1d(300), nn.ReLU(), nn.Linear(300, 100), nn.BatchNorm1d(100),
        nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


def check_digits(data: Digits) -> None:
    """ValueError where the images are not 28 x 28 with one channel, as these networks take them."""
    shape = tuple(data.train.images.shape[1:])
    if shape != (1, 28, 28):
        raise ValueError(f"data: this experiment's networks take digits of shape (1, 28, 28), got images of {shape}")


def steps_of(epochs: float, data: Digits, batch_size: int) -> int:
    """Steps in so many epochs, at least one."""
    return max(1, round(epochs * len(data.train) / batch_size))


def begin(network: str, seed: int) -> nn.Module:
    """The network as a seed initialises it."""
    torch.manual_seed(seed)
    return build(network)


def restore(network: str, record: Record) -> nn.Module:
    """The trained network of a record of `train_dense`."""
    model = build(network)
    state = {key.removeprefix("state:"): value for key, value in record.arrays.items() if key.startswith("state:")}
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    return model


def train_dense(
    config: Mapping[str, Any], data: Digits, watchers: Sequence[LifeLong] = ()
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of `config` ("network", "seed", "epochs", "rate", "batch_size"), trained, and its state as arrays."""
    model = begin(config["network"], config["seed"])
    optimizer = torch.optim.Adam(model.parameters(), lr=config["rate"])
    for watcher in watchers:
        watcher.watch(model, optimizer)
    steps = steps_of(config["epochs"], data, config["batch_size"])
    fit(model, data, optimizer, steps=steps, batch_size=config["batch_size"], seed=config["seed"])
    return model, {f"state:{key}": value.numpy() for key, value in model.state_dict().items()}


def train_on(
    model: nn.Module,
    data: Digits,
    config: Mapping[str, Any],
    *,
    steps: int,
    after_step: Callable[[], object] | None = None,
    every: int | None = None,
) -> Curve:
    """Fine-tuning with Adam at config["tune_rate"]; other batches than those of the training before."""
    optimizer = torch.optim.Adam(model.parameters(), lr=config["tune_rate"])
    return fit(
        model, data, optimizer, steps=steps, batch_size=config["batch_size"], seed=500 + config["seed"],
        after_step=after_step, every=every,
    )  # fmt: skip
