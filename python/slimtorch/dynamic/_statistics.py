# SPDX-License-Identifier: Apache-2.0
"""Batch norms of a network that has become another one: their statistics are taken anew.

Yu & Huang 2019, "Universally Slimmable Networks" (1903.05134, section 3.3), do so for every width; layers that are
dropped shift what the following ones see in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slimtorch.measure import eval_mode

_State = list[tuple[nn.modules.batchnorm._BatchNorm, dict[str, Tensor]]]


def renew_statistics_(model: nn.Module, data: Iterable[Any]) -> int:
    """Sets mean and variance of all batch norms to the average over the given batches; nothing is trained.

    Everything but the batch norms runs in evaluation mode; modes are as before afterwards.

    Args:
        model: any module; without batch norms nothing happens.
        data: batches `inputs` or `(inputs, …)`, of the size that it was trained with; a thousand samples do.

    Returns:
        How many batch norms it has.

    Raises:
        ValueError: no batch. As on any error, the statistics are then as they were.
    """
    before = statistics(model)
    momenta = [norm.momentum for norm, _ in before]
    count = 0
    with eval_mode(model), torch.no_grad():
        try:
            for norm, _ in before:
                norm.reset_running_stats()
                norm.momentum = None  # the plain average over batches
                norm.train()
            for batch in data:
                model(batch[0] if isinstance(batch, (tuple, list)) else batch)
                count += 1
            if not count:
                raise ValueError("data: expected at least one batch, got none")
        except BaseException:
            restore_statistics(before)
            raise
        finally:
            for (norm, _), momentum in zip(before, momenta, strict=True):
                norm.momentum = momentum
    return len(before)


def statistics(model: nn.Module) -> _State:
    """The batch norms that keep statistics, each with a copy of them."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    return [(norm, {name: value.clone() for name, value in norm.named_buffers(recurse=False)}) for norm in norms]


def restore_statistics(state: _State) -> None:
    """What `statistics` has copied."""
    with torch.no_grad():
        for norm, buffers in state:
            for name, value in buffers.items():
                getattr(norm, name).copy_(value)
