# SPDX-License-Identifier: Apache-2.0
"""A training phase that can be killed at any step: resumed, it ends with the same weights, bit for bit.

Everything that the next step depends on is either a function of (seed, step), as the order of the batches is, or is
in the progress that is kept now and then: weights, optimizer, schedule, heads of the distiller, random generators.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch.data import Digits, Split
from slimtorch.distill import Distiller
from slimtorch.experiments.loop import Diverged
from slimtorch.quantize import LatentBinary, squared_hinge_loss
from slimtorch.quantize.binary import Attachment

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "squared_hinge": squared_hinge_loss,
}


class Settings(Protocol):
    """The part of a training phase that says how to step."""

    @property
    def epochs(self) -> float: ...
    @property
    def rate(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def optimizer(self) -> str: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def loss(self) -> str: ...


class Progress(Protocol):
    """Where a training phase keeps what it needs to go on."""

    def load(self) -> dict[str, Any] | None:
        """The state kept last, None at the beginning."""
        ...

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state in place of the last one."""
        ...

    @property
    def seconds(self) -> float:
        """Between two states."""
        ...

    def show(self, done: int, total: int) -> None:
        """Tell whoever waits."""
        ...


def batch(split: Split, size: int, seed: int, step: int) -> Tensor:
    """The images of a step, int64 ``[size]``: epoch after epoch in another order, which only ``seed`` decides.

    The last images of an order that fill no batch are left out.
    """
    size = min(size, len(split))
    epoch, at = divmod(step, len(split) // size)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return order[at * size : (at + 1) * size]


def steps_of(settings: Settings, split: Split) -> int:
    """Batches in all, at least one."""
    return max(1, round(settings.epochs * (len(split) // min(settings.batch_size, len(split)))))


def train(
    model: nn.Module,
    settings: Settings,
    data: Digits,
    seed: int,
    progress: Progress,
    distiller: Distiller | None = None,
) -> None:
    """Trains in place, from the state that is kept, if there is one.

    A model that gives a list of logits in train mode, one for each exit, learns from the mean of the losses.

    Raises:
        Diverged: a loss is not finite.
        ValueError: the model has nothing to train.
    """
    trained: nn.Module = model if distiller is None else distiller
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("model: expected parameters to train, got none (is it packed already?)")
    optimizer = _optimizer(parameters, settings)
    latent = [module for module in model.modules() if isinstance(module, LatentBinary)]
    if latent:
        Attachment(latent, optimizer)
    steps = steps_of(settings, data.train)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _factor(settings.schedule, step, steps)
    )
    start = _restore(progress.load(), trained, optimizer, schedule)
    model.train()
    kept = time.monotonic()
    for step in range(start, steps):
        progress.show(step, steps)
        chosen = batch(data.train, settings.batch_size, seed, step).to(data.train.labels.device)
        images, labels = data.train.images[chosen], data.train.labels[chosen]
        if distiller is None:
            loss = _loss(model(images), labels, LOSSES[settings.loss])
        else:
            loss, _ = distiller(images, labels, indices=chosen)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(step, value)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step + 1 < steps and time.monotonic() - kept >= progress.seconds:
            progress.save(_state(step + 1, trained, optimizer, schedule))
            kept = time.monotonic()
    progress.show(steps, steps)
    model.eval()


def _loss(output: Any, labels: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    if isinstance(output, Tensor):
        return loss_fn(output, labels)
    return torch.stack([loss_fn(exit_, labels) for exit_ in output]).mean()


def _optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.Adam(parameters, lr=settings.rate, weight_decay=settings.weight_decay)


def _factor(schedule: str, step: int, steps: int) -> float:
    """What the rate is multiplied by: a function of the step alone."""
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))


def _state(
    step: int, trained: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
) -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "step": step, "trained": trained.state_dict(), "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(), "random": torch.get_rng_state(), "cuda": cuda,
    }  # fmt: skip


def _restore(
    state: dict[str, Any] | None,
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    if state is None:
        return 0
    trained.load_state_dict(state["trained"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["random"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    return int(state["step"])
