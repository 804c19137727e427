# SPDX-License-Identifier: Apache-2.0
"""The phases of a recipe: each takes a network and gives one, smaller, better or faster.

A phase is a small frozen dataclass. What it is told beside the network (data, seed, teachers, where to keep progress)
is a `Work`.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from slimtorch.data import Digits
from slimtorch.design import LowRank, Separable, factorize_, separate_
from slimtorch.design._replace import ReplaceReport
from slimtorch.distill import Distiller, SoftTargets
from slimtorch.distill.losses import check_weight
from slimtorch.distill.terms import FeatureTerm, OutputTerm
from slimtorch.dynamic import EarlyExit, Entropy, Learned, MaxProbability, Patience
from slimtorch.measure import eval_mode
from slimtorch.packing import FORMATS, pack_
from slimtorch.prune import Magnitude, Neurons, bake_, prune_
from slimtorch.prune.magnitude import check_count
from slimtorch.quantize import BinaryConnect, BinaryNet, BinaryWeight, KMeans, Uniform, XnorNet, binarize_, cluster_
from slimtorch.recipe.training import LOSSES, Progress, train

PACK_BATCH = 64
Term = OutputTerm | FeatureTerm


@dataclass(frozen=True)
class Work:
    """What a phase is told.

    Attributes:
        data: to train and choose with.
        seed: of this phase.
        progress: of this phase.
        network: gives a copy of the network after an earlier phase, by its name; None: the one before anything was
            made smaller.
        note: takes a line for the report.
    """

    data: Digits
    seed: int
    progress: Progress
    network: Callable[[str | None], nn.Module]
    note: Callable[[str], None]

    def example(self, size: int) -> Tensor:
        """The first images to train on."""
        return self.data.train.images[:size]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One step of a recipe.

    Attributes:
        name: in the report, and for later phases to refer to; "" for one made of its place and kind, ``3-prune``.
    """

    kind: ClassVar[str]
    trains: ClassVar[bool] = False
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name: expected a text, got {self.name!r}")

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        """The network after this phase; ``model`` may be changed."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: all that the result of the phase depends on."""
        held = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"kind": self.kind, **held}


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Train(Phase):
    """Training on labels. Masks of pruning stay in force, tables of clustering are what is trained.

    Attributes:
        epochs: over the training images; a fraction too, at least one step.
        rate: the optimizer's, at the beginning.
        batch_size: images in a batch.
        optimizer: "adam" or "sgd".
        momentum: of "sgd".
        weight_decay: of either.
        schedule: "cosine" falls to 0, "constant" stays.
        loss: "cross_entropy" or "squared_hinge". Of a network with several exits, the mean over exits.
    """

    kind = "train"
    trains = True
    epochs: float
    rate: float = 1e-3
    batch_size: int = 64
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    loss: str = "cross_entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "rate"):
            _check_number(name, getattr(self, name), above=True)
        for name in ("momentum", "weight_decay"):
            _check_number(name, getattr(self, name))
        check_count("batch_size", self.batch_size, 1)
        _check_choice("optimizer", self.optimizer, ("adam", "sgd"))
        _check_choice("schedule", self.schedule, ("cosine", "constant"))
        _check_choice("loss", self.loss, tuple(LOSSES))

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        train(model, self, work.data, work.seed, work.progress)
        return model


@dataclass(frozen=True, kw_only=True)
class Distill(Train):
    """Training with a teacher (:class:`slimtorch.distill.Distiller`): an earlier stage of the same network, or another.

    Attributes:
        terms: what is learned from the teacher.
        hard_weight: of the loss on labels.
        teacher: name of the phase after which the network is the teacher, or ``package.module:function`` that gives
            one; None: the network as it was before the first phase that does not train.
    """

    kind = "distill"
    terms: tuple[Term, ...] = (SoftTargets(temperature=4.0, weight=0.9),)
    hard_weight: float = 0.1
    teacher: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "terms", tuple(self.terms))
        if not self.terms:
            raise ValueError("terms: expected at least one, got none")
        for term in self.terms:
            if not isinstance(term, (OutputTerm, FeatureTerm)):
                raise TypeError(f"terms: expected terms such as SoftTargets(), got {term!r}")
        check_weight("hard_weight", self.hard_weight)
        if self.teacher is not None and not isinstance(self.teacher, str):
            raise TypeError(
                f"teacher: expected the name of a phase, package.module:function or None, got {self.teacher!r}"
            )

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        if self.teacher is not None and ":" in self.teacher:
            teacher = build(self.teacher, "teacher")
            if not isinstance(teacher, nn.Module):
                raise TypeError(f"teacher: expected {self.teacher!r} to give a module, got {type(teacher).__name__}")
        else:
            teacher = work.network(self.teacher)
        distiller = Distiller(
            model, teacher, self.terms, hard_loss=LOSSES[self.loss], hard_weight=self.hard_weight,
            example_inputs=work.example(2),
        )  # fmt: skip
        train(model, self, work.data, work.seed, work.progress, distiller)
        return model


# --- smaller ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prune(Phase):
    """:func:`slimtorch.prune_`: weights, blocks, rows or columns (`Magnitude`), or neurons (`Neurons`).

    Attributes:
        config: one, or a mapping from glob of layer names to one or None. Importances on data see the training
            images, 64 at a time.
    """

    kind = "prune"
    config: Magnitude | Neurons | Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_config(self.config, (Magnitude, Neurons))

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        train_set = work.data.train
        data = list(zip(train_set.images.split(64), train_set.labels.split(64), strict=True))
        report = prune_(model, self.config, example_inputs=work.example(2), data=data)
        work.note(_last_note(report.notes))
        return model


@dataclass(frozen=True, kw_only=True)
class Cluster(Phase):
    """:func:`slimtorch.cluster_`: weights share few values, which later phases train.

    Attributes:
        config: `KMeans` or `Uniform`, or a mapping from glob of layer names to one of them or None.
    """

    kind = "cluster"
    config: KMeans | Uniform | Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_config(self.config, (KMeans, Uniform))

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        work.note(_last_note(cluster_(model, self.config).table().notes[:1]))
        return model


@dataclass(frozen=True, kw_only=True)
class Binarize(Phase):
    """:func:`slimtorch.binarize_`: layers that train binary weights in the phases that follow.

    Attributes:
        config: `BinaryConnect`, `BinaryNet`, `BinaryWeight` or `XnorNet`, or a mapping from globs to them or None.
    """

    kind = "binarize"
    config: BinaryConnect | BinaryNet | BinaryWeight | XnorNet | Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_config(self.config, (BinaryConnect, BinaryNet, BinaryWeight, XnorNet))

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        report = binarize_(model, self.config)
        work.note(f"{len(report.binarized)} of {len(report.layers)} layers binarized")
        return model


@dataclass(frozen=True, kw_only=True)
class _Replace(Phase):
    """What both phases that put other layers in have in common."""

    objective: Literal["latency", "size"] | None = "latency"
    min_gain: float = 0.05
    batch: int = PACK_BATCH
    samples: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective is not None:
            _check_choice("objective", self.objective, ("latency", "size"))
        _check_number("min_gain", self.min_gain)
        check_count("batch", self.batch, 1)
        check_count("samples", self.samples, 0)

    def _apply(self, verb: Callable[..., ReplaceReport], config: Any, word: str, model: nn.Module, work: Work) -> None:
        data = list(work.example(self.samples).split(64)) if self.samples else None
        report = verb(model, config, work.example(self.batch), data, objective=self.objective, min_gain=self.min_gain)
        kept = [layer.name or "(model)" for layer in report.replaced]
        work.note(f"{word}: {', '.join(kept) or 'nothing, no layer gains'}")


@dataclass(frozen=True, kw_only=True)
class Factorize(_Replace):
    """:func:`slimtorch.factorize_`: linear layers and convolutions of low rank, fitted to training images.

    Attributes:
        config: a `LowRank`, or a mapping from glob of layer names to one or None.
        objective: "latency" (measured, so that the choice may differ from run to run), "size", or None for all layers.
        min_gain: share of the time that a layer must gain.
        batch: images that layers are raced on, and that a budget of MACs or time is for.
        samples: training images that the new weights are fitted to; 0: none.
    """

    kind = "factorize"
    config: LowRank | Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_config(self.config, (LowRank,))

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        self._apply(factorize_, self.config, "factorized", model, work)
        return model


@dataclass(frozen=True, kw_only=True)
class Separate(_Replace):
    """:func:`slimtorch.separate_`: convolutions become depthwise and 1x1 ones, fitted to training images.

    Attributes:
        config: a `Separable`, or a mapping from glob of layer names to one or None.
        objective: "latency" (measured, so that the choice may differ from run to run), "size", or None for all layers.
        min_gain: share of the time that a layer must gain.
        batch: images that layers are raced on.
        samples: training images that the new weights are fitted to; 0: none.
    """

    kind = "separate"
    config: Separable | Mapping[str, Any] = field(default_factory=Separable)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_config(self.config, (Separable,))

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        self._apply(separate_, self.config, "separated", model, work)
        return model


# --- exits ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Exits(Phase):
    """:class:`slimtorch.dynamic.EarlyExit`: new heads at points of a sequential network, which later phases train.

    A network that is no ``nn.Sequential`` is taken apart into its modules, one after the other; whether that is what
    it computes is checked.

    A head averages a feature map to at most ``pool`` × ``pool`` and ends in a linear layer.

    Attributes:
        exits: point of the backbone → width of a hidden layer of its head, or None for a linear head.
        pool: 1 or more; None: the map as it is.
        criterion: when a sample leaves: "entropy", "max_probability", "patience" or "learned". `Calibrate` sets its
            thresholds.
    """

    kind = "early_exit"
    exits: Mapping[str, int | None]
    pool: int | None = 4
    criterion: Literal["entropy", "max_probability", "patience", "learned"] = "entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool is not None:
            check_count("pool", self.pool, 1)
        if not isinstance(self.exits, Mapping) or not self.exits:
            raise TypeError(f"exits: expected a mapping from points to a width or None, got {self.exits!r}")
        for width in self.exits.values():
            if width is not None:
                check_count("exits", width, 1)
        _check_choice("criterion", self.criterion, tuple(CRITERIA))

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        x = work.example(2)
        parts = model if isinstance(model, nn.Sequential) else _in_order(model, x)
        with eval_mode(model), torch.no_grad():
            classes = model(x).shape[-1]
        backbone = EarlyExit(parts, {point: nn.Identity() for point in self.exits})
        heads: dict[str, nn.Module] = {}
        with eval_mode(backbone), torch.no_grad():
            for point, stage in zip(backbone.points, backbone.stages, strict=False):
                x = stage(x)
                heads[point] = _head(x, self.pool, self.exits[point], classes).to(x.device)
        return EarlyExit(parts, heads, CRITERIA[self.criterion]())


@dataclass(frozen=True, kw_only=True)
class Calibrate(Phase):
    """:meth:`slimtorch.dynamic.EarlyExit.calibrate_` on the validation images, for exactly one of these goals.

    Attributes:
        accuracy: share of right answers, in [0, 1].
        within: as much below the accuracy of the last exit alone, in [0, 1].
        macs: mean multiply-accumulates for an image.
    """

    kind = "calibrate"
    accuracy: float | None = None
    within: float | None = None
    macs: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {n: v for n in ("accuracy", "within", "macs") if (v := getattr(self, n)) is not None}
        if len(given) != 1:
            raise ValueError(f"expected exactly one of accuracy, within and macs, got {len(given)}")
        for name, value in given.items():
            _check_number(name, value)
            if name != "macs" and value > 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        if not isinstance(model, EarlyExit):
            raise ValueError(f"expected a network with exits (phase early_exit), got {type(model).__name__}")
        held = work.data.validation
        data = list(zip(held.images.split(250), held.labels.split(250), strict=True))
        accuracy = self.accuracy
        if self.within is not None:
            with eval_mode(model), torch.no_grad():
                right = sum(int((model.all_exits(x)[-1].argmax(1) == y).sum()) for x, y in data)
            accuracy = max(0.0, right / len(held) - self.within)
        found = model.calibrate_(data, accuracy=accuracy, macs=self.macs)
        work.note(_last_note(found.table().notes))
        return model


CRITERIA = {"entropy": Entropy, "max_probability": MaxProbability, "patience": Patience, "learned": Learned}


def _in_order(model: nn.Module, x: Tensor) -> list[tuple[str, nn.Module]]:
    """The modules of a network whose forward is one after the other; ValueError where it is not."""
    parts = list(model.named_children())
    with eval_mode(model), torch.no_grad():
        expected, state = model(x), x
        try:
            for _, module in parts:
                state = module(state)
        except (RuntimeError, TypeError, ValueError):
            state = x[:0]
    if state.shape != expected.shape or not torch.allclose(state, expected, rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"model: exits need a network that runs its modules one after the other; a {type(model).__name__} does "
            "something else between them. Write it as an nn.Sequential"
        )
    return parts


def _head(features: Tensor, pool: int | None, hidden: int | None, classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    if features.dim() == 4 and pool is not None:
        layers.append(nn.AdaptiveAvgPool2d((min(pool, features.shape[2]), min(pool, features.shape[3]))))
        features = layers[0](features)
    width = features[0].numel()
    layers.append(nn.Flatten())
    if hidden is not None:
        layers += [nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, classes))


# --- faster -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pack(Phase):
    """:func:`slimtorch.pack_`: each layer to the format that measures fastest, or stays. Masks become zeros for good.

    The choice is measured, so it may differ from run to run; no weight changes by it.

    Attributes:
        batch: images that layers are raced on.
        objective, formats, min_gain, time_budget: see :func:`slimtorch.pack_`.
    """

    kind = "pack"
    batch: int = PACK_BATCH
    objective: Literal["latency", "size"] = "latency"
    formats: str | tuple[str, ...] | Mapping[str, Any] = "auto"
    min_gain: float = 0.05
    time_budget: float = 60.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("batch", self.batch, 1)
        _check_choice("objective", self.objective, ("latency", "size"))
        known = ("auto", "dense", *FORMATS)
        if isinstance(self.formats, list):
            object.__setattr__(self, "formats", tuple(self.formats))
        for value in [self.formats] if isinstance(self.formats, (str, Mapping)) else self.formats:
            if not isinstance(value, Mapping):
                _check_choice("formats", value, known)
        _check_number("min_gain", self.min_gain)
        _check_number("time_budget", self.time_budget)

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        options: dict[str, Any] = {
            "formats": self.formats, "objective": self.objective, "min_gain": self.min_gain,
            "time_budget": self.time_budget,
        }  # fmt: skip
        x = work.example(self.batch)
        reports = model.pack_(x, **options) if isinstance(model, EarlyExit) else [pack_(model, x, **options)]
        bake_(model)
        packed = [layer for report in reports for layer in report.packed]
        chosen = ", ".join(f"{layer.name.removeprefix('stage.') or '(model)'} {layer.chosen}" for layer in packed)
        work.note(f"packed: {chosen or 'nothing, no layer gains'}")
        return model


@dataclass(frozen=True, kw_only=True)
class Apply(Phase):
    """Anything else: a function of a top level that takes the network and gives one, or changes it and gives None.

    Attributes:
        function: the function, or ``package.module:function``.
    """

    kind = "apply"
    function: str | Callable[[nn.Module], nn.Module | None]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.function, str) and not callable(self.function):
            raise TypeError(f"function: expected a function or package.module:function, got {self.function!r}")

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        function = find(self.function, "function") if isinstance(self.function, str) else self.function
        made = function(model)
        if made is None:
            return model
        if not isinstance(made, nn.Module):
            raise TypeError(f"function: expected a module or None from it, got {type(made).__name__}")
        return made


# --- plain values, and names ------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A configuration in JSON's words: what a run is compared by.

    Raises:
        TypeError: it holds something that has no such form, such as a tensor or a lambda.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **held}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    name = getattr(value, "__qualname__", "")
    if callable(value) and name and "<" not in name:
        return f"{value.__module__}:{name}"
    raise TypeError(
        f"phases: expected plain values and functions of a top level, which a resumed run can be compared by, "
        f"got {value!r}"
    )


def find(spec: str, argument: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` names.

    Raises:
        ValueError: it is no such name, the module has no such function, or it cannot be called.
        ImportError: there is no such module.
    """
    module_name, colon, name = spec.partition(":")
    if not (colon and module_name and name):
        raise ValueError(f"{argument}: expected package.module:function, got {spec!r}")
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module is there, and lacks something itself
        raise ImportError(f"{argument}: there is no module {error.name!r} (of {spec!r}) on Python's path") from error
    for part in name.split("."):
        if not hasattr(value, part):
            near = closest(part, [known for known in dir(value) if not known.startswith("_")])
            raise ValueError(f"{argument}: the module {module_name!r} has no {part!r}{near}")
        value = getattr(value, part)
    if not callable(value):
        raise ValueError(f"{argument}: expected a function, got {spec!r}, which is a {type(value).__name__}")
    return value


def build(spec: str, argument: str, **arguments: Any) -> Any:
    """What that function gives; a TypeError of its own call names ``argument``."""
    return find(spec, argument)(**arguments)


def closest(name: str, known: Sequence[str]) -> str:
    """``; closest: 'a', 'b'``, or nothing."""
    import difflib

    near = difflib.get_close_matches(name, known, n=3)
    return f"; closest: {', '.join(map(repr, near))}" if near else ""


def _check_number(name: str, value: object, *, above: bool = False) -> None:
    words = "above 0" if above else "0 or more"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number {words}, got {value!r}")
    if not math.isfinite(value) or value < 0 or (above and value == 0):
        raise ValueError(f"{name}: expected a finite number {words}, got {value!r}")


def _check_choice(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        hint = closest(value, known) if isinstance(value, str) else ""
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}{hint}")


def _check_config(config: Any, kinds: tuple[type, ...]) -> None:
    names = " or ".join(kind.__name__ for kind in kinds)
    if isinstance(config, Mapping) and not config:
        raise ValueError("config: expected at least one glob, got an empty mapping")
    for value in config.values() if isinstance(config, Mapping) else [config]:
        if not isinstance(value, kinds) and not (value is None and isinstance(config, Mapping)):
            raise TypeError(f"config: expected {names}, or a mapping of globs to them, got {value!r}")


def _last_note(notes: Sequence[str]) -> str:
    return notes[-1] if notes else ""
