# SPDX-License-Identifier: Apache-2.0
"""Blocks of a residual network that can be skipped, and what is left of them then.

    block(x) = join(x, branch(x))     skipped: join(x, None)

A block of this library's residual networks says so itself, by methods `branch` and `join`. Of any other block whose
output has the shape of its input, the branch is what it adds to its input, and nothing is left of it when skipped.
"""

from __future__ import annotations

import difflib
import fnmatch
import numbers
from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn


def steps(model: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that a sequential network runs one after the other, with their names; nested ones in place."""
    for name, module in model._modules.items():
        if module is None:
            continue
        if type(module) is nn.Sequential:
            yield from steps(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def hooked(module: nn.Module) -> bool:
    """Whether something runs before or after the module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def check_sequence(model: nn.Sequential, place: str) -> None:
    """ValueError where a sequential network computes more than its modules one after the other."""
    if hooked(model) or type(model).forward is not nn.Sequential.forward:
        got = f"a {type(model).__name__} with {'hooks' if hooked(model) else 'a forward'} of its own"
        raise ValueError(f"{place}: expected modules that run one after the other, got {got}")


def check_steps(model: nn.Sequential, place: str = "model") -> None:
    """ValueError unless `steps` are all that the network does."""
    check_sequence(model, place)
    for name, module in model._modules.items():
        if type(module) is nn.Sequential:
            check_steps(module, f"{place}.{name}")


def check_number(argument: str, value: object) -> None:
    """TypeError for what is no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument}: expected a number, got {value!r}")


def splits(block: nn.Module) -> bool:
    """Whether the block itself has `branch` and `join`."""
    return callable(getattr(block, "branch", None)) and callable(getattr(block, "join", None))


def choose(model: nn.Sequential, blocks: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of the blocks to skip, in the network's order.

    Args:
        model: sequential, also nested.
        blocks: globs of names; None: all that have `branch` and `join`.

    Raises:
        TypeError: `model` is not sequential; a glob is no string.
        ValueError: a glob that matches nothing (with the closest names), or no block at all.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"model: expected an nn.Sequential, got {type(model).__name__}")
    own = list(steps(model))
    names = [name for name, _ in own]
    if blocks is None:
        chosen = {name for name, module in own if splits(module)}
        if not chosen:
            raise ValueError(
                "model: expected residual blocks with methods branch and join, got none; name the blocks to skip "
                "(blocks=), each with an output of the shape of its input"
            )
    else:
        kind, missed = "globs of names", "matches nothing that the model runs"
        chosen = matched("blocks", blocks, names, kind=kind, missed=missed)
        if not chosen:
            raise ValueError("blocks: expected at least one name, got none")
    return tuple(name for name in names if name in chosen)


def matched(argument: str, globs: str | Sequence[str], names: Sequence[str], *, kind: str, missed: str) -> set[str]:
    """The names that a glob matches; TypeError for one that is no string (not `kind`), ValueError, with the closest
    names, for one that `missed`."""
    found: set[str] = set()
    for glob in (globs,) if isinstance(globs, str) else globs:
        if not isinstance(glob, str):
            raise TypeError(f"{argument}: expected {kind}, got {glob!r}")
        own = fnmatch.filter(names, glob)
        if not own:
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(f"{argument}: {glob!r} {missed}; closest names: {', '.join(map(repr, near))}")
        found.update(own)
    return found


def check_shapes(name: str, block: nn.Module, x: Tensor, y: Tensor) -> None:
    """ValueError where nothing that fits would be left of a skipped block with this input and output."""
    if not splits(block) and x.shape != y.shape:
        raise ValueError(
            f"blocks: {name!r} ({type(block).__name__}) turns {list(x.shape)} into {list(y.shape)}: a block that can "
            "be skipped keeps the shape, or has methods branch(x) and join(x, y)"
        )


def scaled(block: nn.Module, x: Tensor, factor: Tensor | float) -> Tensor:
    """The block with its branch times `factor`, a number or one for each sample [N, 1, …]."""
    if splits(block):
        own = cast(Any, block)
        return own.join(x, factor * own.branch(x))
    return x + factor * (block(x) - x)


def left(block: nn.Module, x: Tensor) -> Tensor:
    """What is left of a block that is skipped."""
    return cast(Any, block).join(x, None) if splits(block) else x


class Skipped(nn.Module):
    """`left` as a module: input and output as the block's, its branch is not computed."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return left(self.block, x)
