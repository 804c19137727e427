# SPDX-License-Identifier: Apache-2.0
"""A teacher's logits on disk, computed once: memory-mapped, resumable, checked against data and teacher.

A folder holds ``logits.npy`` (``[samples, classes]``) and ``cache.json``: how many rows are done, and hashes of the
teacher and of the inputs of those rows. Rows count only once both are written, so that a crash loses at most the last
pieces, never a whole run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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

    The inputs must be the same in every epoch: random augmentation would pair logits with other images.

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
        self._teacher: str = facts["teacher"]
        self._logits = _open(self.folder, (facts["done"], facts["classes"]))

    @classmethod
    def fill(
        cls, folder: str | Path, teacher: nn.Module, batches: Iterable[Any], samples: int, *, progress: bool = True
    ) -> TeacherCache:
        """Run a teacher over all batches, or over those that an interrupted call has left, and open the cache.

        Args:
            folder: made where it is missing.
            teacher: gives logits ``[batch, classes]``; run in eval mode without gradients on the device it is on.
            batches: of inputs, or ``(inputs, *targets)``, always in the same order: sample i of the cache is the i-th.
            samples: how many there are in all.
            progress: show a bar.

        Raises:
            ValueError: the folder was filled from another teacher or other inputs, or ``batches`` has more or fewer
                samples than said. What was done is kept.
        """
        path = Path(folder)
        if samples < 1:
            raise ValueError(f"samples: expected 1 or more, got {samples!r}")
        path.mkdir(parents=True, exist_ok=True)
        digest = teacher_digest(teacher)
        facts = _facts(path) or {"done": 0, "classes": None, "teacher": digest, "inputs": "", "complete": False}
        if facts["teacher"] != digest:
            raise ValueError(f"teacher: {str(path)!r} holds logits of another one; give another folder")
        logits: np.memmap | None = None
        parameter = next(iter(teacher.parameters()), None)
        device = parameter.device if parameter is not None else torch.device("cpu")
        items: Iterable[Any] = shown(batches, "teacher", None) if progress else batches
        try:
            with eval_mode(teacher), torch.inference_mode():
                for number, (start, end, inputs, inputs_hash) in enumerate(_missing(items, facts, samples, path), 1):
                    args, kwargs = split_inputs(_to(inputs, device))
                    output = teacher(*args, **kwargs)
                    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != end - start:
                        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                        raise ValueError(f"teacher: expected logits [{end - start}, classes], got {shape}")
                    if logits is None:
                        facts["classes"] = output.shape[1]
                        logits = _open(path, (samples, output.shape[1]), write=True)
                    logits[start:end] = output.float().cpu().numpy()
                    facts.update(done=end, inputs=inputs_hash)
                    if number % _FLUSH == 0:
                        _note(path, facts, logits)
        finally:  # what was computed before an error counts
            if logits is not None:
                _note(path, facts, logits)
        if not facts["complete"]:
            facts["complete"] = True
            _note(path, facts, None)
        return cls(path)

    def __len__(self) -> int:
        return len(self._logits)

    def __getitem__(self, indices: Tensor | int | slice) -> Tensor:
        """Logits of these samples, float32 on the CPU."""
        where = indices.cpu().numpy() if isinstance(indices, Tensor) else indices
        return torch.from_numpy(np.array(self._logits[where]))

    def check(self, teacher: nn.Module) -> None:
        """ValueError if the logits are not those of this teacher."""
        if teacher_digest(teacher) != self._teacher:
            raise ValueError(f"teacher: {str(self.folder)!r} holds logits of another one")


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
    """SHA-256 over class, names, shapes and values of all that a model keeps."""
    hashed = hashlib.sha256(f"{type(teacher).__module__}.{type(teacher).__qualname__}".encode())
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
        if not whole or (facts["done"] and not isinstance(facts["classes"], int)):
            raise ValueError("wrong types")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"folder: {str(path)!r} is damaged ({error})") from None
    assert isinstance(facts, dict)
    return facts


def _open(folder: Path, shape: tuple[int, int], write: bool = False) -> np.memmap:
    """The logits, mapped; made where they are missing. A file of another shape is an error, not overwritten."""
    path = folder / _LOGITS
    if write and not path.exists():
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    try:
        logits = np.lib.format.open_memmap(path, mode="r+" if write else "r")
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
