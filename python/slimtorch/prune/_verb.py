# SPDX-License-Identifier: Apache-2.0
"""`prune_`: the verb."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import nn

from slimtorch._select import FilterFn
from slimtorch.prune.magnitude import Magnitude, prune_weights_
from slimtorch.prune.neurons import Neurons, remove_neurons_
from slimtorch.prune.report import PruneReport


def prune_(
    model: nn.Module,
    config: Magnitude | Neurons | Mapping[str, Magnitude | None] | Mapping[str, Neurons | None],
    *,
    filter_fn: FilterFn | None = None,
    example_inputs: Any = None,
    data: Iterable[Any] | None = None,
) -> PruneReport:
    """Prunes a model in place, at once. For pruning along a training run see `Pruner`.

    Args:
        model: any module, or a single layer (whose name is then "").
        config: `Magnitude` masks weights, blocks, rows or columns of Linear and Conv2d layers; `Neurons` removes
            neurons and channels, which leaves a smaller dense network. Or a mapping from glob of layer names to
            configurations of one of the two kinds: the first glob that matches wins, None leaves a layer alone.
        filter_fn: `filter_fn(module, name) -> bool`; layers for which it is false are left alone.
        example_inputs: for `Neurons`: a tensor, a tuple of positional arguments or a dict of keyword arguments that
            the model takes. `Magnitude` does not look at it.
        data: for importances that look at activations or gradients: an iterable of `inputs` or `(inputs, *targets)`.

    Returns:
        What was done, per layer; prints as a table. A model with nothing to prune gives an empty one that says so.

    Raises:
        TypeError: `config` is of another kind.
        ValueError: a sparsity out of range, NaN weights, inputs that do not fit, a glob that matches nothing …
            On any error the model is left as it was.
    """
    values = [v for v in config.values() if v is not None] if isinstance(config, Mapping) else [config]
    if isinstance(config, Mapping) and not config:
        raise ValueError("config: expected at least one glob, got an empty mapping")
    for value in values:
        if not isinstance(value, (Magnitude, Neurons)):
            raise TypeError(f"config: expected Magnitude, Neurons or a mapping of globs to them, got {value!r}")
    if all(isinstance(value, Magnitude) for value in values):
        weights = cast("Magnitude | dict[str, Magnitude | None]", config)
        return prune_weights_(model, weights, filter_fn=filter_fn, data=data)
    if all(isinstance(value, Neurons) for value in values):
        return remove_neurons_(
            model,
            cast("Neurons | dict[str, Neurons | None]", config),
            filter_fn=filter_fn,
            example_inputs=example_inputs,
            data=data,
        )
    raise TypeError("config: expected Magnitude or Neurons throughout, got both; call prune_ once for each")
