# SPDX-License-Identifier: Apache-2.0
"""Distillation: what a small network learns from a large one that labels do not tell it.

After Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531, section 3: a student over
temperatures, a digit that it never sees, few units) and Ba & Caruana, "Do Deep Nets Really Need to be Deep?"
(arXiv 1312.6184: shallow networks that regress a deep one's logits). Teachers are trained with dropout, max-norm and
images shifted by up to two pixels; students without any of it. All networks are fully connected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch.data import CLASSES, Digits, Split, load
from slimtorch.distill import Distiller, LogitRegression, SoftTargets
from slimtorch.experiments.catalogue import Experiment, Progress, Result, Settings
from slimtorch.experiments.distillation_report import figures, tables
from slimtorch.experiments.loop import Diverged, draw, order_of
from slimtorch.experiments.machine import describe
from slimtorch.experiments.pruned import check_digits, steps_of
from slimtorch.experiments.store import Record
from slimtorch.experiments.trials import Trial, run_all
from slimtorch.measure import eval_mode

VERSION = 1  # raise it when the code below trains differently
PIXELS = 28 * 28
SHIFT = 2  # pixels, each way
OMITTED = {"without 3": (3,), "7 and 8 only": (0, 1, 2, 3, 4, 5, 6, 9)}
RAISES = tuple(step / 4 for step in range(-8, 65))  # of the logits of omitted digits: -2 to 16


@dataclass(frozen=True)
class Plan:
    """All numbers of the experiment.

    Attributes:
        seeds: of initialisation and order of batches; teacher and students of a seed belong together.
        teacher: hidden layers of the teacher.
        student: hidden layers of the student.
        deep: hidden layers of the deep network of the second part; the shallow one has as many parameters.
        units: in both hidden layers of the students with few units.
        temperatures: of the soft targets.
        other_temperature: where images are shifted or digits are left out.
        omitted: which digits, of `OMITTED`; labels alone only in the first case.
        teacher_epochs, epochs: of training.
        few_epochs: of training of students with few units.
        jitter_epochs: of students that see shifted images.
        rate: of Adam, with a cosine to 0.
        few_rate: of students with few units.
        logit_rate: of logit regression.
        dropout: share of the hidden units that a teacher drops while it trains.
        max_norm: longest vector of weights into a teacher's hidden unit.
        hard_weight: of the labels beside the soft targets.
        batch_size: images in a step.
    """

    seeds: int = 5
    teacher: tuple[int, ...] = (800, 800)
    student: tuple[int, ...] = (300, 300)
    deep: tuple[int, ...] = (300, 300, 300)
    units: tuple[int, ...] = (10, 20, 30, 100)
    temperatures: tuple[float, ...] = (1.0, 2.5, 4.0, 8.0, 20.0)
    other_temperature: float = 4.0
    omitted: tuple[str, ...] = tuple(OMITTED)
    teacher_epochs: float = 40
    epochs: float = 30
    few_epochs: float = 30
    jitter_epochs: float = 40
    rate: float = 1e-3
    few_rate: float = 5e-3
    logit_rate: float = 1e-3
    dropout: float = 0.5
    max_norm: float = 3.0
    hard_weight: float = 0.1
    batch_size: int = 100


def plan(settings: Settings) -> Plan:
    """The numbers of a quick or a full run."""
    if settings.quick:
        small = Plan(
            seeds=2, teacher=(200, 200), student=(100, 100), deep=(100, 100), units=(), temperatures=(4.0, 20.0),
            omitted=("without 3",), teacher_epochs=30, epochs=24, jitter_epochs=18, rate=2e-3, logit_rate=2e-3,
            dropout=0.3, batch_size=50,
        )  # fmt: skip
        return replace(small, seeds=settings.seeds or small.seeds)
    return replace(Plan(), seeds=settings.seeds or Plan.seeds)


# --- networks and training --------------------------------------------------------------------------------------------


def network(hidden: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """784-hidden-10 with ReLU; dropout after each hidden layer."""
    layers: list[nn.Module] = [nn.Flatten()]
    for wide, narrow in pairwise((PIXELS, *hidden)):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(hidden[-1], CLASSES))


def parameters(hidden: Sequence[int]) -> int:
    """Weights and biases of `network`."""
    return sum((wide + 1) * narrow for wide, narrow in pairwise((PIXELS, *hidden, CLASSES)))


def shallow(hidden: Sequence[int]) -> tuple[int]:
    """One hidden layer with as many parameters, rounded."""
    return (round((parameters(hidden) - CLASSES) / (PIXELS + 1 + CLASSES)),)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [N, 1, H, W] moved by -2 to 2 pixels along both axes; what comes in is its darkest value."""
    height, width = images.shape[2:]
    padded = F.pad(images, (SHIFT,) * 4, value=float(images.min()))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [N, 1, 5, 5, H, W]
    down, right = torch.randint(2 * SHIFT + 1, (2, len(images)), generator=generator)
    return windows[torch.arange(len(images)), :, down, right]


def bound_(model: nn.Sequential, max_norm: float) -> None:
    """Scale back weights into hidden units that are longer than ``max_norm`` (1207.0580, section 2)."""
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer in linear[:-1]:
            layer.weight.copy_(layer.weight.renorm(2, 0, max_norm))


def train(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """One network, on labels or on what its teacher (``needed``) says, and its errors.

    ``config["loss"]``: "labels", "soft" or "logits"; ``omit``: digits that the student never sees. A record with
    ``keep`` holds the weights and the logits of the training images.
    """
    torch.manual_seed(1000 + config["seed"])
    model = network(config["hidden"], config["dropout"])
    split = without(data.train, config["omit"])
    order, draws = order_of(config["seed"]), torch.Generator().manual_seed(8000 + config["seed"])
    distiller, told = _distiller(model, config, data, needed)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["rate"])
    steps = steps_of(config["epochs"], Digits(split, data.validation, data.test), config["batch_size"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    numbered = Split(split.images, torch.arange(len(split)))
    model.train()
    for step, (images, numbers) in enumerate(islice(draw(numbered, config["batch_size"], order), steps)):
        labels = split.labels[numbers]
        if config["jitter"]:
            images = shifted(images, draws)
        if distiller is None:
            loss = F.cross_entropy(model(images), labels)
        else:
            loss, _ = distiller(images, labels, teacher_logits=None if told is None else told[numbers])
        if not torch.isfinite(loss):
            raise Diverged(step, float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if config["max_norm"]:
            bound_(model, config["max_norm"])
    result: dict[str, Any] = {part: _errors(logits_of(model, split), split) for part, split in _held_out(data)}
    if config["omit"]:
        result |= recovered(model, data, config["omit"])
    if not config["keep"]:
        return Record(result)
    arrays = {f"state:{key}": value.numpy() for key, value in model.state_dict().items()}
    return Record(result, {**arrays, "logits": logits_of(model, data.train).numpy()})


def _distiller(
    model: nn.Module, config: Mapping[str, Any], data: Digits, needed: Sequence[Record]
) -> tuple[Distiller | None, Tensor | None]:
    """The loss, None for labels alone, and the teacher's logits of the student's images; None where they are shifted:
    then the teacher looks at each batch."""
    if config["loss"] == "labels":
        return None, None
    term: SoftTargets | LogitRegression = LogitRegression()
    if config["loss"] == "soft":
        term = SoftTargets(temperature=config["temperature"])
    weight = config["hard_weight"]
    if config["jitter"]:
        teacher = restore(config["teacher"], needed[0])
        return Distiller(model, teacher, term, hard_weight=weight), None
    told = torch.from_numpy(needed[0].arrays["logits"])[seen(data.train, config["omit"])]
    return Distiller(model, None, term, hard_weight=weight), told


def restore(hidden: Sequence[int], record: Record) -> nn.Sequential:
    """A trained network from its record; without dropout, which has no weights but a place in the names."""
    state = {key: torch.from_numpy(value) for key, value in record.arrays.items() if key.startswith("state:")}
    model = network(hidden)
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model.eval()


def seen(split: Split, omit: Sequence[int]) -> Tensor:
    """[N], bool: the images that are of none of the omitted digits."""
    return ~torch.isin(split.labels, torch.tensor(list(omit), dtype=torch.long))


def without(split: Split, omit: Sequence[int]) -> Split:
    """The images of all other digits."""
    chosen = seen(split, omit)
    return Split(split.images[chosen], split.labels[chosen])


def logits_of(model: nn.Module, split: Split) -> Tensor:
    """[N, 10], in eval mode."""
    with eval_mode(model), torch.no_grad():
        return torch.cat([model(images) for images in split.images.split(500)])


def _held_out(data: Digits) -> tuple[tuple[str, Split], ...]:
    return (("validation", data.validation), ("test", data.test))


def _errors(logits: Tensor, split: Split) -> int:
    return int((logits.argmax(1) != split.labels).sum())


def recovered(model: nn.Module, data: Digits, omit: Sequence[int]) -> dict[str, Any]:
    """Errors of all and of the omitted digits, as trained and with the omitted digits' biases raised.

    The raise is the one with the fewest errors on validation images (of several the middle one): the paper takes the
    best on the test images.
    """
    columns = torch.zeros(CLASSES).index_fill(0, torch.tensor(list(omit)), 1.0)
    validation, test = logits_of(model, data.validation), logits_of(model, data.test)
    wrong = [_errors(validation + amount * columns, data.validation) for amount in RAISES]
    best = [amount for amount, errors in zip(RAISES, wrong, strict=True) if errors == min(wrong)]
    amount = best[len(best) // 2]
    unseen = ~seen(data.test, omit)
    part = Split(data.test.images[unseen], data.test.labels[unseen])
    return {
        "omitted": _errors(test[unseen], part),
        "raise": amount,
        "raised": _errors(test + amount * columns, data.test),
        "raised_omitted": _errors((test + amount * columns)[unseen], part),
        "count": len(part),
    }


# --- the run ----------------------------------------------------------------------------------------------------------


def trials(chosen: Plan) -> dict[tuple[str, int], Trial]:
    """(name, seed) → trial."""
    made: dict[tuple[str, int], Trial] = {}
    for seed in range(chosen.seeds):
        plain: dict[str, Any] = {
            "version": VERSION, "seed": seed, "hidden": list(chosen.student), "loss": "labels", "epochs": chosen.epochs,
            "rate": chosen.rate, "batch_size": chosen.batch_size, "dropout": 0.0, "max_norm": 0.0, "jitter": False,
            "omit": [], "keep": False,
        }  # fmt: skip
        strict: dict[str, Any] = {"dropout": chosen.dropout, "max_norm": chosen.max_norm, "jitter": True, "keep": True}
        strict["epochs"] = chosen.teacher_epochs

        def add(name: str, *needs: Trial, seed: int = seed, base: Mapping[str, Any] = plain, **more: Any) -> Trial:
            made[name, seed] = Trial(f"{name.replace(' ', '-')}-seed{seed}", train, {**base, **more}, needs)
            return made[name, seed]

        def soft(temperature: float) -> dict[str, Any]:
            return {"loss": "soft", "temperature": temperature, "hard_weight": chosen.hard_weight}

        teacher = add("teacher", hidden=list(chosen.teacher), **strict)
        jitter: dict[str, Any] = {"jitter": True, "epochs": chosen.jitter_epochs}
        add("alone")
        add("alone shifted", **jitter)
        for temperature in chosen.temperatures:
            add(f"soft {temperature:g}", teacher, **soft(temperature))
        other = soft(chosen.other_temperature)
        own = {**other, **jitter, "teacher": list(chosen.teacher)}
        add(f"soft {chosen.other_temperature:g} shifted", teacher, **own)
        add(f"alone {chosen.omitted[0]}", omit=list(OMITTED[chosen.omitted[0]]))
        for name in chosen.omitted:
            add(f"soft {name}", teacher, omit=list(OMITTED[name]), **other)
        for count in chosen.units:
            few: dict[str, Any] = {"hidden": [count, count], "epochs": chosen.few_epochs, "rate": chosen.few_rate}
            add(f"{count} units alone", **few)
            for temperature in chosen.temperatures:
                add(f"{count} units {temperature:g}", teacher, **few, **soft(temperature))
        deep = add("deep", hidden=list(chosen.deep), **strict)
        flat: dict[str, Any] = {"hidden": list(shallow(chosen.deep))}
        mimic = {**flat, "loss": "logits", "hard_weight": 0.0, "rate": chosen.logit_rate, "teacher": list(chosen.deep)}
        add("deep plain", hidden=list(chosen.deep))
        add("shallow", **flat)
        add("shallow strict", **{**strict, **flat, "keep": False})
        add("mimic", deep, **mimic)
        add("mimic shifted", deep, **{**mimic, **jitter})
    return made


def run(settings: Settings, out: Path, progress: Progress) -> Result:
    """Train teachers, students alone and with their teachers, and count errors."""
    chosen = plan(settings)
    data, what = load(settings.data, settings.quick)
    check_digits(data)
    made = trials(chosen)
    records = run_all(list(made.values()), data, out, settings, progress)
    rows: dict[str, dict[str, list[Any]]] = {}
    for (name, _), trial in made.items():
        for key, value in records[trial.name].result.items():
            rows.setdefault(name, {}).setdefault(key, []).append(value)
    widths = {"teacher": chosen.teacher, "student": chosen.student, "deep": chosen.deep}
    widths["shallow"] = shallow(chosen.deep)
    found: dict[str, Any] = {
        "experiment": "distillation", "data": what, "plan": asdict(chosen), "machine": describe(settings.threads),
        "test": len(data.test), "validation": len(data.validation), "rows": rows,
        "networks": {name: {"hidden": list(h), "parameters": parameters(h)} for name, h in widths.items()},
    }  # fmt: skip
    lead = (
        f"Trained on {what}. Teachers with dropout, max-norm and shifted images; students learn from their outputs, "
        "or from the labels alone. Errors on held-out images, at small scale."
    )
    return Result("Distillation", lead, tables(found), figures(found), found)


EXPERIMENT = Experiment(
    name="distillation",
    about="a student from a teacher's soft targets, over temperatures; shallow from deep by logits",
    paper="arXiv 1503.02531, 1312.6184",
    config=lambda settings: asdict(plan(settings)),
    run=run,
)
