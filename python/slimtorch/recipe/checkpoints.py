# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what it is a run of, the network after each phase, and how far the present phase is.

    recipe.json        what was asked: recipe, model, data; another recipe does not go on from here
    0.pt, 1.pt, …      the network at the start and after each phase, with what was found there
    progress.pt        of the training phase that is under way

Every file is whole or not there. The networks are pickled modules, since phases change their structure in ways that
only the modules know: **read no folder that you do not trust**. What is handed on is a ``.slim`` file, which is none.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtorch._files import write_atomically
from slimtorch.prune.mask import bake_, mask_like_, masks


def dump(model: nn.Module) -> dict[str, Any]:
    """A network as plain module and state: masks of pruning are parametrizations, which torch does not pickle.

    Raises:
        ValueError: it cannot be pickled.
    """
    plain, state = model, {}
    masked = list(masks(model))
    if masked:
        state = {key: value.detach().clone() for key, value in model.state_dict().items()}
        plain = copy.deepcopy(model)
        bake_(plain)
    buffer = io.BytesIO()
    try:
        torch.save(plain, buffer)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"model: a {type(model).__name__} cannot be kept between phases ({error}); define its classes and "
            "functions at the top level of a module, and remove parametrizations other than masks"
        ) from error
    module = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    return {"module": module, "state": state, "masked": bool(masked)}


def restore(dumped: Mapping[str, Any]) -> nn.Module:
    """The network that `dump` was given."""
    model = torch.load(io.BytesIO(dumped["module"].numpy().tobytes()), weights_only=False)
    assert isinstance(model, nn.Module)
    if dumped["masked"]:
        mask_like_(model, dumped["state"])
        model.load_state_dict(dumped["state"])
    return model


class Folder:
    """A run's folder; see the top of this file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, asked: Mapping[str, Any]) -> None:
        """Begins a run, or goes on with one that was asked for the same.

        Raises:
            ValueError: the folder holds the run of something else; the message says what differs.
        """
        text = json.dumps(asked, indent=1, sort_keys=True)
        file = self.path / "recipe.json"
        if not file.exists():
            write_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
            return
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            held = None
        if not isinstance(held, dict):
            raise ValueError(f"folder: {str(file)!r} is damaged; remove the folder to begin anew")
        difference = _difference(held, json.loads(text))
        if difference:
            raise ValueError(
                f"folder: {str(self.path)!r} holds the run of something else ({difference}); "
                "give another folder, or remove this one"
            )

    def load(self, index: int) -> dict[str, Any] | None:
        """What was kept after phase ``index``; None where that is not there or cannot be read."""
        return _read(self.path / f"{index}.pt", weights_only=True)

    def save(self, index: int, kept: dict[str, Any]) -> None:
        """Keep it; the progress of the phase is no longer needed then."""
        _write(self.path / f"{index}.pt", kept)
        (self.path / "progress.pt").unlink(missing_ok=True)

    def load_progress(self, index: int) -> dict[str, Any] | None:
        """Of phase ``index``."""
        held = _read(self.path / "progress.pt", weights_only=True)
        return held["state"] if held is not None and held["index"] == index else None

    def save_progress(self, index: int, state: dict[str, Any]) -> None:
        """In place of the last one."""
        _write(self.path / "progress.pt", {"index": index, "state": state})


def _write(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, lambda temporary: torch.save(value, temporary))


def _read(path: Path, *, weights_only: bool) -> dict[str, Any] | None:
    try:
        held = torch.load(path, weights_only=weights_only)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError):
        return None  # not there, or damaged: done anew
    return held if isinstance(held, dict) else None


def _difference(held: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The first thing in which two runs differ, in words; empty where they are the same."""
    for key in sorted({*held, *asked} - {"phases"}):
        if held.get(key) != asked.get(key):
            return f"{key}: expected {held.get(key)!r}, got {asked.get(key)!r}"
    old, new = held.get("phases") or [], asked.get("phases") or []
    for number, (one, other) in enumerate(zip(old, new, strict=False), 1):
        if one != other:
            return f"phase {number}: expected {json.dumps(one)}, got {json.dumps(other)}"
    return "" if len(old) == len(new) else f"phases: expected {len(old)}, got {len(new)}"
