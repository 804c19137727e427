# SPDX-License-Identifier: Apache-2.0
"""Student and teacher side by side, in anyone's training loop.

A `Distiller` is a module whose parameters are those of the student and of the projections between them. Its forward
gives the loss and the student's output; all else (optimizer, autocast, accumulation, DistributedDataParallel) stays
with the loop. Layers are tapped by hooks that live for one forward pass.

With DistributedDataParallel wrap the Distiller, not the student, so that projections are synchronised too. Terms that
relate the samples of a batch to each other (Dist, Similarity, Relation) see the part of it that a process has. With
torch.compile, too, wrap the Distiller: compiled code runs no hooks, so a model that is compiled by itself runs
uncompiled while it is tapped.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from slimtorch.distill.losses import _wide, check_weight
from slimtorch.distill.terms import FeatureTerm, OutputTerm
from slimtorch.measure import eval_mode, split_inputs

Term = OutputTerm | FeatureTerm
HardLoss = Callable[[Tensor, Tensor], Tensor]
Output = Tensor | list[Tensor]
_COMPILED = "_orig_mod"  # what torch.compile wraps; to import its class takes a second


class Distiller(nn.Module):
    """Loss of a student that learns from a teacher, or from several.

        distiller = Distiller(student, teacher, [SoftTargets(temperature=4, weight=0.9)], hard_weight=0.1)
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
        for inputs, labels in loader:
            loss, logits = distiller(inputs, labels)
            ...

    Args:
        student: gives logits ``[batch, classes]``, or a list of them, one for each exit: then terms of outputs and the
            hard loss are means over the exits. Any layers: packed, clustered and binary ones train as they do alone.
        teacher: a model or several; never trained, run in eval mode without gradients, not among the parameters. The
            logits of several are averaged, which is the geometric mean of their distributions (1503.02531, section 1);
            of a teacher with exits the last counts. None: every batch brings ``teacher_logits``, from a `TeacherCache`
            for example.
        terms: what the student learns from the teacher, at least one. A layer that is tapped gives one tensor, batch
            first; of one that runs several times in a pass, the last output counts. A layer has the name that it has in
            the model, whether that is wrapped (DistributedDataParallel, torch.compile) or not.
        hard_loss: of (logits, labels), its mean where it is no scalar. None: labels are not learned.
        hard_weight: of it, >= 0.
        example_inputs: a batch as both models take it (a tensor, a tuple or a dict), for terms of features: the shapes
            of what they tap, from which projections are made.
        output_fn: from what a model returns to its logits; None: it returns logits.

    Raises:
        TypeError: an argument, an output or a tapped output of another kind.
        ValueError: no terms; a layer that the model does not have (the closest names are suggested) or does not run;
            features that a term cannot compare; a weight below 0; no teacher or example inputs where terms need them.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module] | None,
        terms: Sequence[Term] | Term,
        *,
        hard_loss: HardLoss | None = F.cross_entropy,
        hard_weight: float = 1.0,
        example_inputs: Any = None,
        output_fn: Callable[[Any], Output] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student: expected a module, got {type(student).__name__}")
        for name, function in (("hard_loss", hard_loss), ("output_fn", output_fn)):
            if function is not None and not callable(function):
                raise TypeError(f"{name}: expected a function or None, got {function!r}")
        self.student = student
        # a plain tuple: teachers are not trained, saved or synchronised with the student
        self.teachers = _teachers(teacher, student)
        self.terms = tuple(terms) if isinstance(terms, Sequence) and not isinstance(terms, str) else (terms,)
        if not self.terms:
            raise ValueError("terms: expected at least one, got none")
        for term in self.terms:
            if not isinstance(term, (OutputTerm, FeatureTerm)):
                raise TypeError(f"terms: expected terms such as SoftTargets() or Hint(...), got {term!r}")
        check_weight("hard_weight", hard_weight)
        self.hard_loss, self.hard_weight, self.output_fn = hard_loss, hard_weight, output_fn
        self.heads = nn.ModuleList()
        if any(isinstance(term, FeatureTerm) for term in self.terms):
            self._build_heads(example_inputs)

    def forward(
        self,
        inputs: Any,
        labels: Tensor | None = None,
        *,
        teacher_logits: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Output]:
        """Loss and the student's output for a batch.

        Args:
            inputs: a tensor, or a tuple or dict of a model's arguments.
            labels: what ``hard_loss`` takes; None: without it.
            teacher_logits: ``[batch, classes]``, known beforehand. Teachers then run only where a term taps them.
            indices: ``[batch]``, numbers of the samples in the training set, for `Contrastive`.

        Returns:
            Scalar loss, float32 or wider, and the student's logits, a list of them where it has several exits.

        Raises:
            TypeError: outputs that are no logits (see ``output_fn``), logits or indices of another kind.
            ValueError: student and teacher, or several teachers, that disagree in classes or batch; logits, labels or
                indices missing where a term needs them.
        """
        loss, output, _ = self.parts(inputs, labels, teacher_logits=teacher_logits, indices=indices)
        return loss, output

    def parts(
        self,
        inputs: Any,
        labels: Tensor | None = None,
        *,
        teacher_logits: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Output, dict[str, Tensor]]:
        """As `forward`, with each part of the loss by name, weight included, detached: ``hard``, ``0 SoftTargets``."""
        wanted = self._taps_of_teachers()
        if teacher_logits is None and not self.teachers:
            raise ValueError("teacher_logits: expected them with each batch where teacher is None, got None")
        if teacher_logits is not None and not isinstance(teacher_logits, Tensor):
            raise TypeError(f"teacher_logits: expected a tensor or None, got {type(teacher_logits).__name__}")
        with _tapped(self.student, self._taps(), "student") as features:
            output = self._logits(self.student, inputs, "student")
        seen: list[dict[str, Tensor]] = []
        logits: list[Tensor] = []
        with torch.no_grad():
            for number, teacher in enumerate(self.teachers):
                if teacher_logits is not None and not wanted[number]:
                    seen.append({})
                    continue
                with eval_mode(teacher), _tapped(teacher, wanted[number], "teacher") as found:
                    logits.append(_last(self._logits(teacher, inputs, "teacher")))
                seen.append(found)
        exits = output if isinstance(output, list) else [output]
        parts: dict[str, Tensor] = {}
        if self.hard_loss is not None and labels is not None and self.hard_weight:
            parts["hard"] = self.hard_weight * _mean([self.hard_loss(one, labels).mean() for one in exits])
        heads = iter(self.heads)
        # terms of features alone ask nothing of the logits, not even that several teachers agree in classes
        target = None
        if any(isinstance(term, OutputTerm) for term in self.terms):
            target = _average(logits) if teacher_logits is None else teacher_logits.detach()
        for number, term in enumerate(self.terms):
            name = f"{number} {type(term).__name__}"
            if isinstance(term, OutputTerm):
                assert target is not None
                value = _mean([term.loss(one, target, labels) for one in exits])
            else:
                value = next(heads)(features[term.student], seen[term.member][term.teacher], indices)
            parts[name] = term.weight * value
        loss = torch.stack(_wide(*parts.values())).sum()
        return loss, output, {name: value.detach() for name, value in parts.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        """Teachers go along to another device or dtype."""
        for teacher in self.teachers:
            teacher._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def _features(self) -> list[FeatureTerm]:
        return [term for term in self.terms if isinstance(term, FeatureTerm)]

    def _taps(self) -> list[str]:
        return sorted({term.student for term in self._features()})

    def _taps_of_teachers(self) -> list[list[str]]:
        return [
            sorted({term.teacher for term in self._features() if term.member == number})
            for number in range(len(self.teachers))
        ]

    def _build_heads(self, example_inputs: Any) -> None:
        """Check all taps, run both models once, and make what lies between their features."""
        if not self.teachers:
            raise ValueError("terms: terms of features need a teacher to tap, got teacher=None")
        if example_inputs is None:
            raise ValueError("example_inputs: terms of features need a batch to learn shapes from, got None")
        for term in self._features():
            if not 0 <= term.member < len(self.teachers):
                raise ValueError(f"{term!r}: expected member from 0 to {len(self.teachers) - 1}")
            _module(self.student, term.student, "student")
            _module(self.teachers[term.member], term.teacher, "teacher")
        with torch.no_grad(), ExitStack() as stack:
            features = stack.enter_context(_tapped(self.student, self._taps(), "student"))
            stack.enter_context(eval_mode(self.student))
            self._logits(self.student, example_inputs, "student")
            seen = []
            for teacher, names in zip(self.teachers, self._taps_of_teachers(), strict=True):
                stack.enter_context(eval_mode(teacher))
                seen.append(stack.enter_context(_tapped(teacher, names, "teacher")))
                self._logits(teacher, example_inputs, "teacher")
        for term in self._features():
            ours, theirs = features[term.student], seen[term.member][term.teacher]
            self.heads.append(term.build(ours, theirs).to(ours.device))

    def _logits(self, model: nn.Module, inputs: Any, which: str) -> Output:
        args, kwargs = split_inputs(inputs)
        output = model(*args, **kwargs)
        if self.output_fn is not None:
            output = self.output_fn(output)
        if isinstance(output, tuple):
            output = list(output)
        values = output if isinstance(output, list) else [output]
        if not values or not all(isinstance(value, Tensor) for value in values):
            raise TypeError(f"{which}: expected logits, or a list of them, got {type(output).__name__}; see output_fn")
        assert isinstance(output, (Tensor, list))
        return output


def _teachers(teacher: nn.Module | Sequence[nn.Module] | None, student: nn.Module) -> tuple[nn.Module, ...]:
    teachers = () if teacher is None else (teacher,) if isinstance(teacher, nn.Module) else tuple(teacher)
    if teacher is not None and not teachers:
        raise ValueError("teacher: expected a model, several, or None, got an empty sequence")
    for one in teachers:
        if not isinstance(one, nn.Module):
            raise TypeError(f"teacher: expected a module, or a sequence of them, got {type(one).__name__}")
        if one is student:
            raise ValueError("teacher: expected another model than the student; give it a copy")
    return teachers


def _module(model: nn.Module, name: str, which: str) -> nn.Module:
    """The layer of this name, in the model or in what it wraps; one that is shared has several."""
    modules: dict[str, nn.Module] = {}
    wrapped: nn.Module | None = model
    while wrapped is not None:
        modules |= dict(wrapped.named_modules(remove_duplicate=False))
        wrapped = wrapped.module if isinstance(wrapped, DistributedDataParallel) else getattr(wrapped, _COMPILED, None)
    if name in modules:
        return modules[name]
    names = [known for known in modules if known]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    hint = f"; closest: {', '.join(map(repr, close))}" if close else ", nor any but itself, ''"
    raise ValueError(f"terms: the {which} has no layer {name!r}{hint}")


def _compiled(model: nn.Module) -> bool:
    return any(hasattr(module, _COMPILED) or module._compiled_call_impl for module in model.modules())


@contextmanager
def _tapped(model: nn.Module, names: Sequence[str], which: str) -> Iterator[dict[str, Tensor]]:
    """What the named layers put out in the passes within; ValueError afterwards for one that was not run."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                kind = type(output).__name__
                raise TypeError(f"terms: layer {name!r} of the {which} gives {kind}, expected a tensor")
            found[name] = output.clone()  # what follows may change it in place, as ReLU(inplace=True) does

        return hook

    # hooks that come after compilation are not run; what compiles the Distiller sees them
    eager = bool(names) and not torch.compiler.is_compiling() and _compiled(model)
    with ExitStack() as stack:
        for name in names:
            stack.callback(_module(model, name, which).register_forward_hook(keep(name)).remove)
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            yield found
    missed = [name for name in names if name not in found]
    if missed:
        raise ValueError(f"terms: layer {missed[0]!r} of the {which} is not on the path that the model takes")


def _average(logits: Sequence[Tensor]) -> Tensor:
    """Of all teachers, which must agree in classes."""
    shapes = {tuple(value.shape) for value in logits}
    if len(shapes) > 1:
        raise ValueError(f"teacher: expected logits of one shape from all, got {sorted(map(list, shapes))}")
    return torch.stack(_wide(*logits)).mean(0)


def _last(output: Output) -> Tensor:
    return output[-1] if isinstance(output, list) else output


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)
