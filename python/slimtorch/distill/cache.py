# SPDX-License-Identifier: Apache-2.0
"""A teacher's logits on disk, computed once: memory-mapped, resumable, checked against data and teacher.

A folder holds ``logits.npy`` (``[samples, classes]``) and ``cache.json``: how many rows are done, their checksum, and
hashes of the teacher and of the inputs of those rows. Rows count only once both are written, so that a crash loses at
most the last pieces, never a whole run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from slimtorch._files import write_atomically
from slimtorch._progress import shown
from slimtorch.measure import eval_mode, split_inputs

_LOGITS, _FACTS = "logits.npy", "cache.json"
_FLUSH = 16  # batches between notes of what is done


class TeacherCache:
    """Logits of a teacher over a data set: ``cache[indices]`` gives ``[n, classes]`` float32.

    The inputs must be the same in every epoch: random augmentation would pair logits with other images. Any number of
    processes may read a cache; its pages are shared, and a pickled one holds no more than the name of the folder.

    Args:
        folder: made by `TeacherCache.fill`.

    Raises:
        ValueError: the folder holds no cache, one that is damaged, or one that is not finished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        facts = _facts(self.folder)
        if facts is None:
            raise ValueError(f"folder: expected a cache made by TeacherCache.fill, got {str(self.folder)!r}")
        if not facts["complete"]:
            raise ValueError(
                f"folder: {str(self.folder)!r} is not finished ({facts['done']:,} samples done); call "
                "TeacherCache.fill again with the same teacher and data"
            )
        self.classes: int = facts["classes"]
        self._facts = facts
        self._logits = _open(self.folder, (facts["done"], facts["classes"]))

    def __reduce__(self) -> tuple[Any, ...]:
        """Opened anew where it is unpickled, as in the workers of a DataLoader."""
        return type(self), (self.folder.absolute(),)

    @classmethod
    def fill(
        cls, folder: str | Path, teacher: nn.Module, batches: Iterable[Any], samples: int, *, progress: bool = True
    ) -> TeacherCache:
        """Run a teacher over all batches, or over those that an interrupted call has left, and open the cache.

        All batches are read in any case, to see that they are the same. A process that finds another one at work in the
        folder, as those of DistributedDataParallel do, waits for it.

        Args:
            folder: made where it is missing.
            teacher: gives logits ``[batch, classes]``; run in eval mode without gradients on the device it is on.
            batches: of inputs, or ``(inputs, *targets)``, always in the same order: sample i of the cache is the i-th.
            samples: how many there are in all.
            progress: show a bar.

        Raises:
            TypeError: an argument or a batch of another kind.
            ValueError: the folder was filled from another teacher, other inputs or another number of them, or is
                damaged; ``batches`` has more or fewer samples than said; the teacher gives no logits. What was done is
                kept.
        """
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher: expected a module, got {type(teacher).__name__}")
        if isinstance(samples, bool) or not isinstance(samples, int):
            raise TypeError(f"samples: expected a whole number, 1 or more, got {samples!r}")
        if samples < 1:
            raise ValueError(f"samples: expected a whole number, 1 or more, got {samples!r}")
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            _fill(path, teacher, shown(batches, "teacher", None) if progress else batches, samples)
        return cls(path)

    def __len__(self) -> int:
        return len(self._logits)

    def __getitem__(self, indices: Tensor | int | slice) -> Tensor:
        """Logits of these samples, float32 on the CPU."""
        where = indices.cpu().numpy() if isinstance(indices, Tensor) else indices
        return torch.from_numpy(np.array(self._logits[where]))

    def check(self, teacher: nn.Module) -> None:
        """ValueError if the logits are not those of this teacher, or not those that were written; reads them all."""
        if teacher_digest(teacher) != self._facts["teacher"]:
            raise ValueError(f"teacher: {str(self.folder)!r} holds logits of another one")
        _check_rows(self.folder, self._facts, self._logits)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a loader's workers were forked meanwhile
        os.close(descriptor)


def _fill(path: Path, teacher: nn.Module, batches: Iterable[Any], samples: int) -> None:
    digest = teacher_digest(teacher)
    facts = _facts(path) or {
        "done": 0, "classes": None, "checksum": 0, "teacher": digest, "inputs": "", "complete": False,
    }  # fmt: skip
    if facts["teacher"] != digest:
        raise ValueError(f"teacher: {str(path)!r} holds logits of another one; give another folder")
    if facts["done"] > samples or (facts["complete"] and facts["done"] != samples):
        raise ValueError(f"samples: {str(path)!r} holds {facts['done']:,}, got {samples:,}; give another folder")
    logits: np.memmap | None = None
    if facts["done"]:
        logits = _open(path, (samples, facts["classes"]), "r" if facts["complete"] else "r+")
        _check_rows(path, facts, logits)
    parameter = next(iter(teacher.parameters()), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    noted = facts["done"]
    try:
        with eval_mode(teacher), torch.inference_mode():
            for number, (start, end, inputs, inputs_hash) in enumerate(_missing(batches, facts, samples, path), 1):
                args, kwargs = split_inputs(_to(inputs, device))
                output = teacher(*args, **kwargs)
                shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                classes = facts["classes"] or (shape[-1] if isinstance(shape, list) and shape else 0)
                if shape != [end - start, classes] or not classes:
                    raise ValueError(
                        f"teacher: expected logits [{end - start}, {facts['classes'] or 'classes'}], got {shape}"
                    )
                if logits is None:  # nothing is noted, so whatever a killed process has left counts for nothing
                    logits = np.lib.format.open_memmap(
                        path / _LOGITS, mode="w+", dtype=np.float32, shape=(samples, classes)
                    )
                logits[start:end] = output.float().cpu().numpy()
                checksum = zlib.crc32(logits[start:end].data, facts["checksum"])
                facts.update(done=end, classes=classes, checksum=checksum, inputs=inputs_hash)
                if number % _FLUSH == 0:
                    _note(path, facts, logits)
                    noted = end
    finally:  # what was computed before an error counts
        if logits is not None and facts["done"] > noted:
            _note(path, facts, logits)
    if not facts["complete"]:
        facts["complete"] = True
        _note(path, facts, None)


def _check_rows(folder: Path, facts: Mapping[str, Any], logits: np.memmap) -> None:
    """ValueError if the rows that are done are not those that were written."""
    if zlib.crc32(logits[: facts["done"]].data) != facts["checksum"]:
        raise ValueError(f"folder: {str(folder / _LOGITS)!r} is damaged (wrong checksum); delete it and fill it again")


def _missing(
    batches: Iterable[Any], facts: Mapping[str, Any], samples: int, path: Path
) -> Iterator[tuple[int, int, Any, str]]:
    """(first sample, end, inputs, hash of all inputs until end) of the batches that are not done yet."""
    known = int(facts["done"])
    hashed = hashlib.sha256()
    seen = 0
    for item in batches:
        inputs = item[0] if isinstance(item, (tuple, list)) else item
        start, seen = seen, seen + _count(inputs)
        if seen > samples:
            raise ValueError(f"batches: expected {samples:,} samples, got more")
        _hash(hashed, inputs)
        if seen > known:
            if start < known:
                raise ValueError(
                    f"batches: {known:,} samples are done, which is not a multiple of these batches; "
                    "give batches of the same size"
                )
            yield start, seen, inputs, hashed.hexdigest()
        elif seen == known and hashed.hexdigest() != facts["inputs"]:
            raise ValueError(
                f"batches: the first {known:,} inputs are not those that {str(path)!r} was filled from; "
                "give the same data in the same order, or another folder"
            )
    if seen != samples:
        raise ValueError(f"batches: expected {samples:,} samples, got {seen:,}")


def teacher_digest(teacher: nn.Module) -> str:
    """SHA-256 over names and classes of all layers, and names, shapes and values of all that they keep."""
    layers = [f"{name} {type(module).__qualname__}" for name, module in teacher.named_modules(remove_duplicate=False)]
    hashed = hashlib.sha256("\n".join(layers).encode())
    for name, value in sorted(teacher.state_dict().items()):
        if isinstance(value, Tensor):
            hashed.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            _hash(hashed, value)
        else:
            hashed.update(f"{name} {value!r}".encode())
    return hashed.hexdigest()


def _hash(hashed: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        dense = value.detach().cpu().contiguous()
        hashed.update(dense.flatten().view(torch.uint8).numpy().tobytes() if dense.numel() else b"")
    elif isinstance(value, Mapping):
        for key in sorted(value):
            hashed.update(str(key).encode())
            _hash(hashed, value[key])
    elif isinstance(value, (tuple, list)):
        for item in value:
            _hash(hashed, item)
    else:
        raise TypeError(f"batches: expected tensors, tuples or dicts of tensors, got {type(value).__name__}")


def _count(inputs: Any) -> int:
    while isinstance(inputs, (tuple, list, Mapping)):
        inputs = next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs))
    if not isinstance(inputs, Tensor) or not inputs.dim():
        raise TypeError(f"batches: expected tensors with a batch dimension, got {type(inputs).__name__}")
    return len(inputs)


def _to(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: _to(value, device) for key, value in inputs.items()}
    return tuple(_to(value, device) for value in inputs)


def _facts(folder: Path) -> dict[str, Any] | None:
    path = folder / _FACTS
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(facts["done"], int) and isinstance(facts["complete"], bool) and facts["done"] >= 0
        whole = whole and isinstance(facts["teacher"], str) and isinstance(facts["inputs"], str)
        whole = whole and isinstance(facts["checksum"], int)
        if not whole or (facts["done"] and not isinstance(facts["classes"], int)):
            raise ValueError("wrong types")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"folder: {str(path)!r} is damaged ({error})") from None
    assert isinstance(facts, dict)
    return facts


def _open(folder: Path, shape: tuple[int, int], mode: Literal["r", "r+"] = "r") -> np.memmap:
    """The logits, mapped. A file of another shape is an error, not overwritten."""
    path = folder / _LOGITS
    try:
        logits = np.lib.format.open_memmap(path, mode=mode)
    except (ValueError, OSError) as error:
        raise ValueError(f"folder: {str(path)!r} is damaged or missing ({error})") from None
    if logits.shape != shape or logits.dtype != np.float32:
        raise ValueError(
            f"folder: expected float32 logits of shape {list(shape)} in {str(path)!r}, "
            f"got {logits.dtype} {list(logits.shape)}"
        )
    return logits


def _note(folder: Path, facts: Mapping[str, Any], logits: np.memmap | None) -> None:
    """Rows first, then the note that they are there."""
    if logits is not None:
        logits.flush()
    text = json.dumps(dict(facts), indent=1)
    write_atomically(folder / _FACTS, lambda path: path.write_text(text, encoding="utf-8"))
