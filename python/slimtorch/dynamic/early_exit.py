# SPDX-License-Identifier: Apache-2.0
"""Networks that answer as soon as they are sure: exits at named points of a sequential backbone.

    backbone  ── segment 0 ──┬── segment 1 ──┬── segment 2 ──▶ logits
                           head "a"        head "b"

In train mode all exits answer; in eval mode a sample that leaves costs nothing further (`_walk.py`). Thresholds are set
on validation data for an accuracy or for a budget of multiply-accumulates (`_calibrate.py`).
"""

from __future__ import annotations

import difflib
import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch._paths import shows_all
from slimtorch.distill import self_distillation_loss
from slimtorch.dynamic._blocks import check_number, check_sequence, hooked
from slimtorch.dynamic._calibrate import Calibration, calibrate
from slimtorch.dynamic._walk import State, Walk, check_logits, first_of, rows_of, walk, walk_one
from slimtorch.dynamic.criteria import Criterion, Entropy
from slimtorch.measure import count_macs, eval_mode, interleave
from slimtorch.packing import PackReport, pack_


@dataclass(frozen=True)
class Run:
    """What came of a batch.

    Attributes:
        logits: [N, classes], in the order of the inputs.
        exits: int64 [N], the number of the exit where each sample left, from 0.
        macs: int64 [N], multiply-accumulates really spent on each sample. A sample that was run a second time, alone,
            because its decision was close (see `EarlyExit`) has both.
        alone: how many samples those were.
        seconds: of the whole batch.
    """

    logits: Tensor
    exits: Tensor
    macs: Tensor
    alone: int
    seconds: float


class Segment(nn.Module):
    """A piece of the backbone and the head at its end: ``state -> (state, logits)``, the last ``state -> logits``."""

    def __init__(self, stage: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.stage, self.head = stage, head

    def forward(self, state: State) -> Any:
        state = self.stage(state)
        return state if self.head is None else (state, self.head(state))


class EarlyExit(nn.Module):
    """A sequential backbone with exits.

    ``train()``: gives the list of all exits' logits, the last exit's last, for `exit_loss`. ``eval()``: gives logits
    ``[N, classes]``; samples that the criterion lets go leave the batch, which really shrinks.

    No sample's answer and exit depend on the batch that it came in: where a decision or an answer is closer than
    ``margin``, far above what the number of rows changes in the last bits of logits, that sample is run again alone.
    (A network that itself magnifies rounding, by taking signs of activations for example, wants a larger margin.)

    The backbone's modules are taken over, not copied: its weights are trained and packed here. ``criterion`` can be set
    anew; a criterion keeps its thresholds, also calibrated ones, as long as the number of exits is the same.

    Args:
        backbone: an ``nn.Sequential``, or a sequence of (name, module). Points are the names of its modules; an
            ``nn.Sequential`` inside counts by its parts ("features.3"). What goes from one to the next may be a tuple
            or list of tensors, batch first. One that has a ``forward`` or hooks of its own computes something else than
            its modules one after the other, and is refused.
        exits: point → head: a module that makes logits [N, classes] of what that point gives. Any order.
        criterion: when a sample leaves; None: `Entropy(0.3)`.
        margin: relative to 1 + the largest logit; None: by the coarsest dtype on the way (float32: 1e-4). 0: trust the
            batch; ``inf``: run every sample alone.

    Raises:
        TypeError: backbone, heads or criterion of another kind.
        ValueError: no exit; a point that the backbone does not have (the closest ones are named), that lies inside a
            module which is no ``nn.Sequential``, or that is the end, where the backbone answers itself; a backbone that
            is more than its modules in a row; a number of thresholds that is not the number of exits.

    What only shows when it runs is refused there: a ValueError for logits that are not [N, classes] with the same
    classes at every exit, or for a state that has not N rows; a TypeError for either that is no tensor.
    """

    def __init__(
        self,
        backbone: nn.Sequential | Sequence[tuple[str, nn.Module]],
        exits: Mapping[str, nn.Module],
        criterion: Criterion | None = None,
        *,
        margin: float | None = None,
    ) -> None:
        super().__init__()
        parts = _parts(backbone)
        names = [name for name, _ in parts]
        if not isinstance(exits, Mapping) or not all(isinstance(head, nn.Module) for head in exits.values()):
            raise TypeError("exits: expected a mapping from point of the backbone to a head, a torch.nn.Module")
        if not exits:
            raise ValueError("exits: expected one or more, got none")
        for point in exits:
            _check_point(point, parts)
        if margin is not None:
            check_number("margin", margin)
        if margin is not None and not margin >= 0:
            raise ValueError(f"margin: expected 0 or more, or None, got {margin!r}")
        points = sorted(exits, key=names.index)
        cuts = [0, *(names.index(point) + 1 for point in points), len(parts)]
        self.points = points
        self.stages = nn.ModuleList(_stage(parts[a:b]) for a, b in itertools.pairwise(cuts))
        self.heads = nn.ModuleList(exits[point] for point in points)
        self.criterion = Entropy() if criterion is None else criterion
        self.margin = margin
        self._estimates: list[tuple[float, float]] | None = None  # seconds of one sample, of a further one, by segment

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "criterion":
            if not isinstance(value, Criterion):
                raise TypeError(f"criterion: expected one of slimtorch.dynamic's, got {type(value).__name__}")
            value.bind(len(self.points))
            # thresholds lie on the host, from where a process group of GPUs cannot send them: every process has its own
            self._ddp_params_and_buffers_to_ignore = [f"criterion.{own}" for own, _ in value.named_buffers()]
        super().__setattr__(name, value)

    # --- running ------------------------------------------------------------------------------------------------------

    def forward(self, x: State) -> list[Tensor] | Tensor:
        """Train mode: logits of all exits, in order. Eval mode: logits [N, classes], each of the exit of its sample."""
        if self.training or shows_all():
            return self.all_exits(x)
        return _answer(self._calls(), x, self.criterion, self.margin)

    def all_exits(self, x: State) -> list[Tensor]:
        """Logits [N, classes] of every exit in either mode; nobody leaves."""
        outputs = []
        for stage, head in zip(self.stages, self.heads, strict=False):
            x = stage(x)
            outputs.append(head(x))
        return [*outputs, self.stages[-1](x)]

    @torch.no_grad()
    def run(self, x: State) -> Run:
        """As ``forward`` in eval mode, with each sample's exit and cost; MACs are counted in the layers as they are."""
        with eval_mode(self):
            macs = self._macs(x)
            start = time.perf_counter()
            found = walk(self._calls(), x, self.criterion, self.margin)
            seconds = time.perf_counter() - start
        return _run(found, macs, seconds)

    @torch.no_grad()
    def predict(self, x: State, deadline: float) -> Run:
        """The best answers that can be had in time: samples that are sure leave, the others go on until the deadline.

        Before each segment the time left is compared with what it should take for the samples that are left: as
        measured by `measure_`, between its times for one sample and for its batch in a straight line, at least the time
        for one; without such a measurement a segment is begun whenever time is left. The first exit is always computed.
        With a deadline answers may depend on the batch, whatever the margin is.

        Args:
            deadline: seconds from the call, above 0.

        Returns:
            As `run`; its ``seconds`` tell whether the deadline was kept.
        """
        if isinstance(deadline, bool) or not isinstance(deadline, (int, float)):
            raise TypeError(f"deadline: expected seconds, got {deadline!r}")
        if not deadline > 0:
            raise ValueError(f"deadline: expected seconds above 0, got {deadline!r}")
        start = time.perf_counter()
        estimates = self._estimates

        def proceed(segment: int, count: int) -> bool:
            left = deadline - (time.perf_counter() - start)
            if estimates is None:
                return left > 0
            one, more = estimates[segment]
            return one + more * (count - 1) <= left

        with eval_mode(self):
            found = walk(self._calls(), x, self.criterion, self.margin, proceed)
            seconds = time.perf_counter() - start
            macs = self._macs(x)
        return _run(found, macs, seconds)

    # --- thresholds -------------------------------------------------------------------------------------------------

    def calibrate_(
        self, data: Iterable[tuple[State, Tensor]], *, accuracy: float | None = None, macs: float | None = None
    ) -> Calibration:
        """Set the criterion's thresholds on validation data, in place.

        The shares of samples that leave follow a geometric distribution, q^k at exit k (MSDNet, 1703.09844, section
        4.2): one number, which is searched. For `Patience` its number is. `Learned` is fitted first.

        Args:
            data: batches (inputs, labels), read once.
            accuracy: wanted share of right answers in [0, 1], on these data: the cheapest thresholds that reach it.
            macs: mean multiply-accumulates per sample allowed: the most accurate thresholds that keep to them.

        Returns:
            What was chosen, and all that was tried; prints as a table.

        Raises:
            TypeError: a goal that is no number; data that are no such pairs.
            ValueError: not exactly one of accuracy and macs; no data; labels that do not fit; a goal that cannot be
                met, with the best that can. The thresholds are then as they were, as on any error.
        """
        if (accuracy is None) == (macs is None):
            raise ValueError("accuracy, macs: expected exactly one of them")
        for name, goal in (("accuracy", accuracy), ("macs", macs)):
            if goal is not None:
                check_number(name, goal)
        logits: list[list[np.ndarray]] = []
        targets: list[np.ndarray] = []
        cost: list[int] | None = None
        with eval_mode(self), torch.no_grad():
            for batch in data:
                if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                    raise TypeError(f"data: expected pairs (inputs, labels), got {type(batch).__name__}")
                inputs, labels = batch
                outputs = self.all_exits(inputs)
                count, classes = len(first_of(inputs)), None
                for number, output in enumerate(outputs):
                    classes = check_logits(output, count, number, classes)
                _check_labels(labels, count, outputs[-1].shape[1])
                if cost is None and len(labels):
                    cost = np.cumsum(self._macs(inputs)).tolist()
                logits.append([output.to("cpu", torch.float64).numpy() for output in outputs])
                targets.append(labels.cpu().numpy())
        if cost is None:
            raise ValueError("data: expected at least one sample, got none")
        joined = [np.concatenate(parts) for parts in zip(*logits, strict=True)]
        return calibrate(self.criterion, self.points, joined, np.concatenate(targets), cost, accuracy, macs)

    # --- costs --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure_(self, x: State, samples: int = 15) -> list[float]:
        """Seconds that each segment takes for this batch when nobody leaves; `predict` plans with them from then on.

        Args:
            x: a typical batch, one sample at least; one sample of it is timed too.
            samples: as of `slimtorch.measure.interleave`.

        Returns:
            One number per segment: the 90th percentile, as it is the slow ones that miss a deadline.
        """
        batch = len(first_of(x))
        if not batch:
            raise ValueError("x: expected at least one sample, got none")
        with eval_mode(self):
            states = [x]
            for stage in self.stages[:-1]:
                states.append(stage(states[-1]))
            alone = [rows_of(state, torch.tensor([0]), batch) for state in states]
            calls = {
                f"{kind}/{number}": (lambda call=call, state=state: call(state))
                for kind, every in (("one", alone), ("all", states))
                for number, (call, state) in enumerate(zip(self._calls(), every, strict=True))
                if kind == "all" or batch > 1
            }
            found = interleave(calls, samples=samples, device=first_of(x).device)
        whole = [found[f"all/{number}"].p90 for number in range(len(states))]
        if batch == 1:
            self._estimates = [(seconds, seconds) for seconds in whole]
        else:
            one = [found[f"one/{number}"].p90 for number in range(len(states))]
            self._estimates = [(a, max(0.0, (b - a) / (batch - 1))) for a, b in zip(one, whole, strict=True)]
        return whole

    @torch.no_grad()
    def latencies(self, x: State, samples: int = 5) -> Tensor:
        """Measured seconds of each sample as a batch of one, float64 [N]: the median of so many runs of it."""
        with eval_mode(self):
            calls = self._calls()
            found = []
            count = len(first_of(x))
            for number in range(count):
                one = rows_of(x, torch.tensor([number]), count)
                call = {"one": lambda one=one: _answer(calls, one, self.criterion, self.margin)}
                found.append(interleave(call, samples=samples, min_sample_seconds=0.0)["one"].median)
        return torch.tensor(found, dtype=torch.float64)

    def segments(self) -> list[Segment]:
        """One module per segment, exportable on its own: ``state -> (state, logits)``, the last ``state -> logits``.

        They share this network's modules. `with_segments` runs what was made of them.
        """
        heads = [*self.heads, None]
        return [Segment(stage, head).train(self.training) for stage, head in zip(self.stages, heads, strict=True)]

    def with_segments(self, segments: Sequence[Callable[[State], Any]]) -> Callable[[State], Tensor]:
        """A function ``x -> logits [N, classes]`` with this network's criterion and other code for its segments:
        exported, compiled or frozen ones, in the order of `segments`.

        Raises:
            ValueError: more or fewer segments than this network has.
        """
        if len(segments) != len(self.stages):
            raise ValueError(f"segments: expected {len(self.stages)}, got {len(segments)}")
        calls, criterion, margin = list(segments), self.criterion, self.margin
        return lambda x: _answer(calls, x, criterion, margin)

    def pack_(self, example_inputs: State, **options: Any) -> list[PackReport]:
        """`slimtorch.pack_` on each segment, with as many of these samples as really arrive there (one at least).

        Args:
            example_inputs: a typical batch.
            options: as of `slimtorch.pack_`.

        Returns:
            A report for each segment.
        """
        if not len(first_of(example_inputs)):
            raise ValueError("example_inputs: expected at least one sample, got none")
        reports = []
        arrived = self.run(example_inputs).exits
        state = example_inputs
        with eval_mode(self), torch.no_grad():
            for number, segment in enumerate(self.segments()):
                rows = torch.nonzero(arrived >= number).flatten()
                if not len(rows):
                    rows = arrived.argmax()[None]
                reports.append(pack_(segment, (rows_of(state, rows, len(arrived)),), **options))
                if number < len(self.heads):
                    state = self.stages[number](state)
        return reports

    def extra_repr(self) -> str:
        return f"points={self.points}"

    def _calls(self) -> list[Callable[[State], Any]]:
        calls: list[Callable[[State], Any]] = []
        for stage, head in zip(self.stages, self.heads, strict=False):
            calls.append(lambda state, stage=stage, head=head: _with_head(stage(state), head))  # type: ignore[misc]
        return [*calls, self.stages[-1]]

    def _macs(self, x: State) -> list[int]:
        """MACs that one sample costs in each segment, head included; layers as they are now."""
        count = len(first_of(x))
        if not count:
            return [0] * len(self.stages)
        state, found = rows_of(x, torch.tensor([0]), count), []
        for segment in self.segments():
            found.append(count_macs(segment, (state,))[1])
            state = segment.stage(state)
        return found


def _with_head(state: State, head: nn.Module) -> tuple[State, Any]:
    return state, head(state)


def _answer(calls: Sequence[Callable[[State], Any]], x: State, criterion: Criterion, margin: float | None) -> Tensor:
    """Logits alone. A batch of one waits for every line that is run here."""
    if isinstance(x, Tensor) and x.shape[:1] == (1,):
        return walk_one(calls, x, criterion)[0]
    return walk(calls, x, criterion, margin).logits


def _check_labels(labels: object, count: int, classes: int) -> None:
    """int [count], from 0 on below `classes`."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"data: expected a tensor of labels, got {type(labels).__name__}")
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(f"data: expected integer labels [{count}], got {labels.dtype} {list(labels.shape)}")
    least, most = (int(labels.min()), int(labels.max())) if count else (0, 0)
    if least < 0 or most >= classes:
        raise ValueError(f"data: expected labels from 0 to {classes - 1}, got {least} to {most}")


def _run(found: Walk, macs: list[int], seconds: float) -> Run:
    """What was spent: everything up to the exit; for samples run twice, what the batch had spent on them too."""
    until = np.cumsum(macs)
    cost = until[found.exits]
    for number, exit in found.again.items():
        cost[number] += until[exit]
    return Run(found.logits, torch.from_numpy(found.exits), torch.from_numpy(cost), len(found.again), seconds)


def _parts(backbone: object) -> list[tuple[str, nn.Module]]:
    if isinstance(backbone, nn.Sequential):
        check_sequence(backbone, "backbone")
        return _flat("", backbone)
    if isinstance(backbone, nn.Module) or not isinstance(backbone, Sequence):
        raise TypeError(
            f"backbone: expected an nn.Sequential or a sequence of (name, module), got {type(backbone).__name__}"
        )
    found: list[tuple[str, nn.Module]] = []
    for item in backbone:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], nn.Module)):
            raise TypeError(f"backbone: expected pairs (name, module), got {item!r}")
        name, module = str(item[0]), item[1]
        if any(name == other for other, _ in found):
            raise ValueError(f"backbone: expected names of their own, got {name!r} twice")
        found.append((name, module))
    return found


def _flat(prefix: str, module: nn.Sequential) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name, child in module._modules.items():  # a module that stands there twice runs twice
        if child is None:
            raise ValueError(f"backbone: expected a module at {prefix + name!r}, got None")
        if type(child) is nn.Sequential and not hooked(child):
            found += _flat(f"{prefix}{name}.", child)
        else:
            found.append((prefix + name, child))
    return found


def _stage(parts: Sequence[tuple[str, nn.Module]]) -> nn.Sequential:
    """These modules in a row; a name of theirs has no dot, and "a.b" and "a_b" stay two."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for name, module in parts:
        own = name.replace(".", "_")
        while own in modules:
            own += "_"
        modules[own] = module
    return nn.Sequential(modules)


def _check_point(point: object, parts: list[tuple[str, nn.Module]]) -> None:
    names = [name for name, _ in parts]
    if point not in names:
        for name, module in parts:
            inside = str(point).removeprefix(name + ".")
            if inside != point and inside in dict(module.named_modules()):
                raise ValueError(
                    f"exits: {point!r} lies inside {name!r}, a {type(module).__name__}: the backbone does not pass "
                    "through it alone; expected a module of the sequence itself"
                )
        near = difflib.get_close_matches(str(point), names, n=3, cutoff=0.3) or names[:3]
        raise ValueError(f"exits: the backbone has no point {point!r}; closest names: {', '.join(map(repr, near))}")
    if point == names[-1]:
        raise ValueError(f"exits: {point!r} is the end of the backbone, which answers there itself")


def exit_loss(
    outputs: Sequence[Tensor],
    labels: Tensor,
    weights: Sequence[float] | None = None,
    distill_temperature: float | None = None,
    distill_weight: float = 1.0,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """Joint loss of all exits: ``sum(weights[k] * loss_fn(outputs[k], labels))``.

    Args:
        outputs: logits ``[N, classes]`` of all exits in order: what an `EarlyExit` in train mode gives.
        labels: int64 [N].
        weights: one per exit, 0 or more (BranchyNet, 1709.01686, section III); None: 1 for each (MSDNet, 1703.09844).
        distill_temperature: T; the last exit teaches the others (Zhang et al., 1905.08094): `distill_weight` times
            `slimtorch.distill.self_distillation_loss` is added. None: not.
        distill_weight: 0 or more.
        loss_fn: of logits and labels.

    Returns:
        Scalar.
    """
    if isinstance(outputs, Tensor) or len(outputs) < 2:
        got = "one tensor (is the model in train mode?)" if isinstance(outputs, Tensor) else str(len(outputs))
        raise ValueError(f"outputs: expected logits of two exits or more, got {got}")
    factors = [1.0] * len(outputs) if weights is None else list(weights)
    if len(factors) != len(outputs):
        raise ValueError(f"weights: expected one for each of {len(outputs)} exits, got {len(factors)}")
    if not all(math.isfinite(factor) and factor >= 0 for factor in (*factors, distill_weight)):
        raise ValueError(f"weights, distill_weight: expected numbers of 0 or more, got {factors}, {distill_weight!r}")
    for output in outputs:
        if output.shape != outputs[0].shape or output.shape[:1] != labels.shape[:1]:
            shapes = ", ".join(str(list(each.shape)) for each in outputs)
            raise ValueError(
                f"outputs, labels: expected as many rows and classes in all, got {shapes} and {list(labels.shape)}"
            )
    total = torch.stack([f * loss_fn(output, labels) for f, output in zip(factors, outputs, strict=True)]).sum()
    if distill_temperature is not None:
        total = total + distill_weight * self_distillation_loss(outputs, distill_temperature)
    return total
