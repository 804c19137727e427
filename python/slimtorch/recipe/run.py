# SPDX-License-Identifier: Apache-2.0
"""A recipe: training and the verbs of this library in an order, kept after each phase, measured at the end.

    network ─▶ phase ─▶ kept ─▶ phase ─▶ kept ─▶ … ─▶ all kept networks, by turns ─▶ report
                 └── a training phase also keeps its progress now and then

Between two phases a network always goes through its kept form. So a run that was killed goes on from the very objects
that an uninterrupted one works with, and ends with the same result.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimtorch import storage
from slimtorch._files import write_atomically
from slimtorch.data import Digits, Split, fingerprint, load
from slimtorch.experiments.loop import evaluate
from slimtorch.measure import (
    Latency,
    count_macs,
    count_parameters,
    device_of,
    interleave,
    memory_bytes,
    threads_of_torch,
)
from slimtorch.nn import PackedLayer
from slimtorch.prune import bake_
from slimtorch.prune.magnitude import check_count
from slimtorch.recipe.checkpoints import Folder, dump, restore
from slimtorch.recipe.phases import Distill, Phase, Work, build, closest, find
from slimtorch.recipe.report import PhaseReport, RecipeReport, phase_of

START = "0-start"
SINGLES = 64  # images that are run one after the other for the latency of batch 1
MAC_IMAGES = 256

Show = Callable[[str, int, int], None]
"""``show(stage, done, total)``."""
ModelSpec = nn.Module | str | Mapping[str, Any] | Callable[[], nn.Module]


class PhaseError(ValueError):
    """A phase could not be done; ``phase`` is its place, from 1. What earlier phases gave is kept."""

    def __init__(self, phase: int, text: str) -> None:
        super().__init__(text)
        self.phase = phase


@dataclass(frozen=True)
class RecipeResult:
    """What a run gave: the last network, in eval mode, and the report, which prints."""

    model: nn.Module
    report: RecipeReport

    def __str__(self) -> str:
        return str(self.report)


@dataclass(frozen=True)
class Recipe:
    """An ordered list of phases that make a network smaller and faster.

        recipe = slim.Recipe([
            slim.recipe.Train(epochs=5),
            slim.recipe.Prune(config=slim.prune.Magnitude(0.9, scope="global")),
            slim.recipe.Distill(epochs=3),
            slim.recipe.Cluster(config=slim.quantize.KMeans(bits=4)),
            slim.recipe.Distill(epochs=2),
            slim.recipe.Pack(),
        ])
        result = recipe.run(slim.models.LeNet300, folder="run")
        print(result.report)

    Attributes:
        phases: at least one.
        seed: of everything that is drawn; each phase draws from its own.
        model: for runs that are given none: ``package.module:function``, or a dict with that as ``function`` and its
            arguments.
        data: for runs that are given none: "digits" (the 5,000 embedded ones), "mnist", "cifar10", a folder with their
            files, or ``package.module:function`` that gives a :class:`slimtorch.data.Digits`.
        batches: batch sizes to measure latency at; empty: none.
        threads: of torch, training and measuring; None leaves them.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range; two phases of one name; a teacher that is
            no earlier phase.
    """

    phases: Sequence[Phase]
    seed: int = 0
    model: str | Mapping[str, Any] | None = None
    data: str = "digits"
    batches: Sequence[int] = (1, 64)
    threads: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        object.__setattr__(self, "batches", tuple(self.batches))
        if not self.phases:
            raise ValueError("phases: expected at least one, got none")
        for phase in self.phases:
            if not isinstance(phase, Phase):
                raise TypeError(f"phases: expected phases such as Train(epochs=5), got {phase!r}")
        check_count("seed", self.seed, 0)
        for batch in self.batches:
            check_count("batches", batch, 1)
        if self.threads is not None:
            check_count("threads", self.threads, 1)
        names = self.names
        for number, name in enumerate(names):
            if name in names[:number]:
                raise PhaseError(number, f"name: expected names of their own, got {name!r} twice")
        for number, phase in enumerate(self.phases, 1):
            if isinstance(phase, Distill) and (phase.teacher is None or ":" not in phase.teacher):
                self._teacher(phase.teacher, number)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the networks: "0-start", then one for each phase."""
        made = [phase.name or f"{number}-{phase.kind}" for number, phase in enumerate(self.phases, 1)]
        return (START, *made)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """From a file; see :mod:`slimtorch.recipe.reading`.

        Raises:
            RecipeError: with file, line and key.
            OSError: the file cannot be read.
        """
        from slimtorch.recipe.reading import read

        return read(Path(path)).recipe

    def run(
        self,
        model: ModelSpec | None = None,
        data: Digits | str | None = None,
        folder: str | Path | None = None,
        *,
        every: float = 30.0,
        samples: int = 15,
        show: Show | None = None,
    ) -> RecipeResult:
        """Does all phases that ``folder`` does not hold yet, and measures.

        Args:
            model: what to begin with: a module, which is not changed; or a function, or its name, which is called
                after the recipe's seed is set, so that it gives the same network when a run goes on.
            data: to train, choose and test with; on the device of the model.
            folder: keeps what is done: a run that was killed goes on from there. Its networks are pickles: use no
                folder of somebody you do not trust. None: nothing is kept.
            every: seconds between two states of a training phase that are kept.
            samples: of each latency.
            show: told the stage, how much of it is done, and how much there is.

        Returns:
            The last network and the report.

        Raises:
            PhaseError: a phase failed; the message says which and why.
            ValueError: the folder holds the run of another recipe, model or data.
            TypeError: ``model`` or ``data`` of another kind.
        """
        told = show or (lambda stage, done, total: None)
        with (
            tempfile.TemporaryDirectory() as temporary,
            _own_random_numbers(),
            threads_of_torch(self.threads) as threads,
        ):
            digits, words = _data_of(self.data if data is None else data)
            torch.manual_seed(self.seed)
            start = _model_of(self.model if model is None else model)
            kept = Folder(Path(temporary) if folder is None else Path(folder))
            kept.claim(self._asked(start, digits))
            digits = _to(digits, device_of(start, (digits.test.images,), {}) if _tensors(start) else None)
            rows = self._phases(kept, start, digits, every, told)
            self._time(kept, rows, digits, samples, told)
            last = kept.load(len(self.phases))
            assert last is not None
            return RecipeResult(restore(last["model"]), RecipeReport(rows, words, threads))

    # --- the parts ---

    def _asked(self, start: nn.Module, data: Digits) -> dict[str, Any]:
        return {
            "recipe": 1,
            "torch": torch.__version__,
            "seed": self.seed,
            "phases": [phase.to_dict() for phase in self.phases],
            "model": {"class": type(start).__qualname__, "weights": _checksum(start)},
            "data": fingerprint(data),
        }

    def _phases(
        self, kept: Folder, start: nn.Module, data: Digits, every: float, show: Show
    ) -> list[PhaseReport]:
        """Rows of all phases; those that are not kept yet are done."""
        rows: list[PhaseReport] = []
        names = self.names
        done = kept.load(0)
        if done is None:
            try:
                done = _found(names[0], "start", start, data, 0.0, "")
            except RuntimeError as error:
                shape = list(data.train.images.shape[1:])
                raise ValueError(f"model: does not take images {shape}: {error}") from error
            kept.save(0, done)
        rows.append(phase_of(done["row"]))
        for index, phase in enumerate(self.phases, 1):
            following = kept.load(index)
            if following is None:
                following = self._phase(index, phase, done, kept, data, every, show)
                kept.save(index, following)
            else:
                show(names[index], 1, 1)
            done = following
            rows.append(phase_of(done["row"]))
        return rows

    def _phase(
        self, index: int, phase: Phase, before: dict[str, Any], kept: Folder, data: Digits, every: float, show: Show
    ) -> dict[str, Any]:
        name, begun = self.names[index], time.perf_counter()
        seed = self.seed * 1_009 + index
        notes: list[str] = []

        def network(wanted: str | None) -> nn.Module:
            held = kept.load(self._teacher(wanted, index))
            if held is None:
                raise ValueError(f"teacher: the network after {wanted!r} is not in the folder any more")
            return restore(held["model"])

        progress = _Progress(kept, index, name, every, show)
        if not phase.trains:
            show(name, 0, 1)
        torch.manual_seed(seed)
        try:
            model = phase.apply(restore(before["model"]), Work(data, seed, progress, network, notes.append))
            found = _found(name, phase.kind, model, data, time.perf_counter() - begun, "; ".join(filter(None, notes)))
        except (ValueError, TypeError, RuntimeError, ImportError) as error:
            raise PhaseError(index, f"phase {name}: {error}") from error
        show(name, *(progress.last or (1, 1)))
        return found

    def _teacher(self, wanted: str | None, index: int) -> int:
        """The number of phases after which the network is the teacher of phase ``index``."""
        names = self.names
        if wanted is None:
            for number, phase in enumerate(self.phases[: index - 1]):
                if not phase.trains:
                    return number
            raise PhaseError(
                index, f"teacher: phase {names[index]} follows no phase that makes the network smaller; name a teacher"
            )
        if wanted not in names[:index]:
            near = closest(wanted, names[:index])
            raise PhaseError(
                index, f"teacher: expected the name of a phase before {names[index]}, got {wanted!r}{near}"
            )
        return names.index(wanted)

    def _time(self, kept: Folder, rows: list[PhaseReport], data: Digits, samples: int, show: Show) -> None:
        """Latencies of all kept networks, by turns; kept in ``times.json``."""
        if not self.batches:
            return
        file = kept.path / "times.json"
        asked = {"batches": list(self.batches), "threads": torch.get_num_threads(), "samples": samples}
        times = _times_kept(file, asked)
        if times is None:
            models = [_baked(kept, index) for index in range(len(rows))]
            calls = {row.name: model for row, model in zip(rows, models, strict=True)}
            times = measure_by_turns(calls, data.test, self.batches, samples, show)
            found = {batch: {name: asdict(t) for name, t in by_name.items()} for batch, by_name in times.items()}
            text = json.dumps({"asked": asked, "times": found})
            write_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        for row in rows:
            row.latency = {batch: by_name[row.name] for batch, by_name in times.items()}


class _Progress:
    """Of one phase; see `training.Progress`."""

    def __init__(self, kept: Folder, index: int, name: str, seconds: float, show: Show) -> None:
        self._kept, self._index, self._name, self._show = kept, index, name, show
        self.seconds = seconds
        self.last: tuple[int, int] | None = None

    def load(self) -> dict[str, Any] | None:
        return self._kept.load_progress(self._index)

    def save(self, state: dict[str, Any]) -> None:
        self._kept.save_progress(self._index, state)

    def show(self, done: int, total: int) -> None:
        self.last = (total, total)
        if done < total:
            self._show(self._name, done, total)


def measure_by_turns(
    models: Mapping[str, nn.Module], images: Split, batches: Sequence[int], samples: int, show: Show | None = None
) -> dict[int, dict[str, Latency]]:
    """Latency of several networks on the same images, by batch size, then by name.

    A call at batch 1 is the mean over `SINGLES` different images, one after the other, so that networks which spend
    more on some images than on others are measured on both kinds.
    """
    found: dict[int, dict[str, Latency]] = {}
    with torch.inference_mode():
        for batch in batches:
            x = _cycled(images.images, batch)
            inputs = [x] if batch > 1 else list(images.images[:SINGLES].split(1))
            stage = f"latency, batch {batch}"

            def call(model: nn.Module, inputs: list[Tensor] = inputs) -> Callable[[], object]:
                model.eval()
                return lambda: [model(x) for x in inputs]

            told = None if show is None else (lambda done, stage=stage: show(stage, done, samples))
            times = interleave(
                {name: call(model) for name, model in models.items()}, samples=samples, device=x.device, on_round=told
            )
            share = 1 / len(inputs)
            found[batch] = {
                name: Latency(t.median * share, t.p10 * share, t.p90 * share, t.samples, t.calls * len(inputs))
                for name, t in times.items()
            }
    return found


def _cycled(images: Tensor, count: int) -> Tensor:
    """So many images, from the beginning again where there are fewer."""
    return images[torch.arange(count) % len(images)]


def _times_kept(file: Path, asked: Mapping[str, Any]) -> dict[int, dict[str, Latency]] | None:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        if held["asked"] != asked:
            return None
        return {int(b): {n: Latency(**t) for n, t in v.items()} for b, v in held["times"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _baked(kept: Folder, index: int) -> nn.Module:
    held = kept.load(index)
    if held is None:
        raise ValueError(f"folder: {str(kept.path / f'{index}.pt')!r} is gone or damaged; run again")
    model = restore(held["model"])
    bake_(model)
    return model.eval()


def _found(name: str, kind: str, model: nn.Module, data: Digits, seconds: float, note: str) -> dict[str, Any]:
    """What is kept after a phase: the network and its row."""
    model.eval()
    plain = copy.deepcopy(model)
    bake_(plain)
    images = data.validation.images[:MAC_IMAGES]
    stored, _ = count_parameters(plain)
    row = PhaseReport(
        name=name, kind=kind, seconds=seconds, validation=evaluate(plain, data.validation)[1],
        test=evaluate(plain, data.test)[1], parameters=stored, nonzero=_nonzero(plain), bytes_file=_file_bytes(plain),
        bytes_memory=memory_bytes(plain), macs=count_macs(plain, images)[1] / len(images), note=note,
    )  # fmt: skip
    return {"model": dump(model), "row": asdict(row)}


def _nonzero(model: nn.Module) -> int:
    """Weights and biases that are not zero, whatever format holds them; shared ones once."""
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, PackedLayer):
            held = getattr(module, module.VALUES)
            tensors[id(held)] = module.weight
            if module.bias is not None:
                tensors[id(module.bias)] = module.bias
        else:
            tensors.update((id(parameter), parameter) for parameter in module.parameters(recurse=False))
    return sum(int(torch.count_nonzero(tensor.detach())) for tensor in tensors.values())


def _file_bytes(model: nn.Module) -> int | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return storage.save(model, Path(folder) / "model.slim")
        except ValueError:  # a layer that the format does not know
            return None


def _model_of(spec: ModelSpec | None) -> nn.Module:
    if spec is None:
        raise ValueError("model: expected a module, a function or package.module:function, got none")
    if isinstance(spec, nn.Module):
        return copy.deepcopy(spec)
    arguments: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        arguments = dict(spec)
        spec = arguments.pop("function", None)
        if not isinstance(spec, str):
            raise ValueError(f"model: expected function: package.module:function, got {spec!r}")
    if not isinstance(spec, str) and not callable(spec):
        raise TypeError(f"model: expected a module, a function or package.module:function, got {spec!r}")
    function = find(spec, "model") if isinstance(spec, str) else spec
    try:
        model = function(**arguments)
    except TypeError as error:
        raise TypeError(f"model: {error}") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module from {spec!r}, got {type(model).__name__}")
    return model


def _data_of(spec: Digits | str) -> tuple[Digits, str]:
    if isinstance(spec, Digits):
        words = f"{len(spec.train):,} images to train on, {len(spec.test):,} held out for the test"
        return spec, words
    if not isinstance(spec, str):
        raise TypeError(f"data: expected slimtorch.data.Digits or a name, got {type(spec).__name__}")
    if ":" not in spec:
        return load(None if spec == "digits" else spec)
    made = build(spec, "data")
    if not isinstance(made, Digits):
        raise TypeError(f"data: expected slimtorch.data.Digits from {spec!r}, got {type(made).__name__}")
    return _data_of(made)


def _to(data: Digits, device: torch.device | None) -> Digits:
    if device is None:
        return data
    parts = (data.train, data.validation, data.test)
    return Digits(*(Split(part.images.to(device), part.labels.to(device)) for part in parts))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _checksum(model: nn.Module) -> int:
    """Changes with any value of the state, or its name."""
    value = 0
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            held = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            value = zlib.crc32(np.ascontiguousarray(held).data, zlib.crc32(name.encode(), value))
    return value


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """What a run draws leaves the caller's generators as they are."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
