# SPDX-License-Identifier: Apache-2.0
"""Which layers a verb touches, and with which configuration: shared by every verb."""

from __future__ import annotations

import difflib
import fnmatch
import glob as globs
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

FilterFn = Callable[[nn.Module, str], bool]
"""`filter_fn(module, name) -> bool`: True where the verb may touch the layer."""

Config = TypeVar("Config")


def candidates(model: nn.Module, types: tuple[type[nn.Module], ...]) -> list[tuple[str, nn.Module]]:
    """Every layer of one of `types`, once, in the model's own order; a bare layer has the name ""."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return [(name, module) for name, module in model.named_modules() if isinstance(module, types)]


def resolve(
    model: nn.Module,
    config: Config | Mapping[str, Config | None],
    filter_fn: FilterFn | None = None,
    *,
    types: tuple[type[nn.Module], ...],
) -> list[tuple[str, nn.Module, Config]]:
    """The layers to touch, each with its configuration, in the model's order.

    Args:
        model: any module; a single layer works too and has the name "".
        config: one configuration for every layer, or a mapping from glob of names to configuration. The first glob
            that matches a name wins; a value of None leaves the layer alone; a name that no glob matches is left alone.
        filter_fn: called as `filter_fn(module, name)`; a layer for which it is false is left alone.
        types: the classes of layers the verb knows.

    Raises:
        TypeError: `model` is no module, a glob is no string, or `filter_fn` cannot be called.
        ValueError: a glob matches no layer; the message names the closest layers.
    """
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: expected a callable (module, name) -> bool, got {type(filter_fn).__name__}")
    layers = candidates(model, types)
    configs: dict[str, Config | None] = {}
    if isinstance(config, Mapping):
        for glob, value in config.items():
            if not isinstance(glob, str):
                raise TypeError(f"config: expected globs of layer names as keys, got {glob!r}")
            matched = check_glob(glob, [name for name, _ in layers], types=types, argument="config")
            for name in matched:
                configs.setdefault(name, value)
    else:
        configs = {name: config for name, _ in layers}
    chosen: list[tuple[str, nn.Module, Config]] = []
    for name, module in layers:
        value = configs.get(name)
        if value is not None and (filter_fn is None or filter_fn(module, name)):
            chosen.append((name, module, value))
    return chosen


def check_glob(glob: str, names: list[str], *, types: tuple[type[nn.Module], ...], argument: str) -> list[str]:
    """The `names` that `glob` matches (case matters); ValueError, with the closest names, where it matches none."""
    matched = [name for name in names if fnmatch.fnmatchcase(name, glob)]
    if matched:
        return matched
    wanted = " or ".join(sorted(t.__name__ for t in types))
    near = difflib.get_close_matches(glob, names, n=3, cutoff=0.3) or names[:3]
    hint = f"; closest names: {', '.join(map(repr, near))}" if near else "; the model has none"
    raise ValueError(f"{argument}: the glob {glob!r} matches no {wanted} layer of the model{hint}")


def literal(name: str) -> str:
    """A glob that matches this name and no other."""
    return globs.escape(name)
