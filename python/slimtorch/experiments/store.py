# SPDX-License-Identifier: Apache-2.0
"""Finished pieces of long work, one file each, so that an interrupted job goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimtorch._files import write_atomically


@dataclass(frozen=True)
class Record:
    """What one piece of work gave: JSON-ready ``result`` and named ``arrays`` (weights)."""

    result: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def digest(config: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that change with any value of ``config`` (JSON-ready)."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """A folder of records, each under the hash of the configuration that made it.

    A record is one ``.npz`` file without pickles (zip checks its contents), written to a temporary name and renamed: a
    file is there complete or not at all. A record whose configuration changed is not found; a damaged one counts as not
    there, and is written anew.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, config: Mapping[str, Any]) -> Path:
        return self.folder / f"{name}-{digest(config)}.npz"

    def load(self, name: str, config: Mapping[str, Any]) -> Record | None:
        """The record of this very configuration, or None when there is none that can be read."""
        try:
            with np.load(self.path(name, config), allow_pickle=False) as file:
                record = json.loads(str(file["record"]))
                arrays = {key.removeprefix("array:"): file[key] for key in file.files if key.startswith("array:")}
            if record["config"] != json.loads(json.dumps(config)):
                return None
            return Record(record["result"], arrays)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
            return None

    def once(self, name: str, config: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of this very configuration: as it was kept, or else made and kept now."""
        record = self.load(name, config)
        if record is None:
            record = Record(make())
            self.save(name, config, record)
        return record.result

    def save(self, name: str, config: Mapping[str, Any], record: Record) -> None:
        """Write the record; a crash at any moment leaves either the old file or the new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"config": config, "result": record.result}, sort_keys=True)
        arrays = {f"array:{key}": value for key, value in record.arrays.items()}
        write_atomically(self.path(name, config), lambda path: _write_npz(path, {"record": np.array(text), **arrays}))


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # pruned weights are mostly zeros
