# SPDX-License-Identifier: Apache-2.0
"""All of a network whose path depends on the data, for what must see every layer to know which hang together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ALL: ContextVar[bool] = ContextVar("slimtorch_all_paths", default=False)


@contextmanager
def all_paths() -> Iterator[None]:
    """Inside, networks with exits give the logits of all of them, as in training."""
    token = _ALL.set(True)
    try:
        yield
    finally:
        _ALL.reset(token)


def shows_all() -> bool:
    """Whether `all_paths` is in force."""
    return _ALL.get()
