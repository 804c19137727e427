# SPDX-License-Identifier: Apache-2.0
"""The terms of a distillation loss, as a user lists them for a `Distiller`.

A term of *outputs* is computed from logits. A term of *features* names a layer of the student and one of the teacher
(``dict(model.named_modules())`` has the names), and becomes a small module once their shapes are known: it holds the
projection, where one is needed, and is trained with the student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch.distill import losses
from slimtorch.distill.contrast import ContrastiveMemory, check_contrast
from slimtorch.distill.losses import check_temperature, check_weight


@dataclass(frozen=True, kw_only=True)
class OutputTerm:
    """A term that sees logits; ``weight`` >= 0 multiplies it."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_weight(f"{type(self).__name__}.weight", self.weight)

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Of logits ``[batch, classes]``, without the weight."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SoftTargets(OutputTerm):
    """Softened outputs: :func:`~slimtorch.distill.soft_target_loss`, T² included."""

    temperature: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        return losses.soft_target_loss(student, teacher, self.temperature)


@dataclass(frozen=True, kw_only=True)
class LogitRegression(OutputTerm):
    """The logits themselves: :func:`~slimtorch.distill.logit_regression_loss`."""

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        return losses.logit_regression_loss(student, teacher)


@dataclass(frozen=True, kw_only=True)
class Decoupled(OutputTerm):
    """Right class and others apart: :func:`~slimtorch.distill.decoupled_loss`. Needs labels."""

    temperature: float = 4.0
    target_weight: float = 1.0
    other_weight: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)
        check_weight("Decoupled.target_weight", self.target_weight)
        check_weight("Decoupled.other_weight", self.other_weight)

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError("labels: Decoupled needs them, got None")
        return losses.decoupled_loss(
            student, teacher, labels, self.temperature,
            target_weight=self.target_weight, other_weight=self.other_weight,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Dist(OutputTerm):
    """Correlations of the outputs: :func:`~slimtorch.distill.dist_loss`."""

    temperature: float = 1.0
    inter_weight: float = 1.0
    intra_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)
        check_weight("Dist.inter_weight", self.inter_weight)
        check_weight("Dist.intra_weight", self.intra_weight)

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        return losses.dist_loss(
            student, teacher, self.temperature, inter_weight=self.inter_weight, intra_weight=self.intra_weight
        )


@dataclass(frozen=True)
class FeatureTerm:
    """A term that sees what two layers put out.

    Attributes:
        student, teacher: names of the layers; ``""`` is the whole model.
        weight: >= 0, multiplies it.
        member: which teacher, where there are several.
    """

    student: str
    teacher: str
    weight: float = 1.0
    member: int = 0

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for which, layer in (("student", self.student), ("teacher", self.teacher)):
            if not isinstance(layer, str):
                raise TypeError(f"{kind}.{which}: expected the name of a layer, got {layer!r}")
        if isinstance(self.member, bool) or not isinstance(self.member, int):
            raise TypeError(f"{kind}.member: expected the number of a teacher, got {self.member!r}")
        check_weight(f"{kind}.weight", self.weight)

    def build(self, student: Tensor, teacher: Tensor) -> nn.Module:
        """A module ``(student, teacher, indices) -> loss`` for features of these shapes, batch first."""
        raise NotImplementedError


@dataclass(frozen=True)
class Hint(FeatureTerm):
    """Features place by place: :func:`~slimtorch.distill.hint_loss`.

    Attributes:
        project: a learned projection from the student's features to the teacher's: of channels by a 1×1 convolution,
            after averaging or repeating to the teacher's height and width; of features by a linear layer. None: where
            shapes differ. FitNets always has one.
    """

    project: bool | None = None

    def build(self, student: Tensor, teacher: Tensor) -> nn.Module:
        same = student.shape[1:] == teacher.shape[1:]
        if same and not self.project:
            return _Loss(losses.hint_loss)
        if self.project is False:
            raise ValueError(
                f"Hint({self.student!r}, {self.teacher!r}): shapes {list(student.shape[1:])} and "
                f"{list(teacher.shape[1:])} beyond the batch differ, and project is False"
            )
        return _Projected(self, student, teacher)


@dataclass(frozen=True)
class Attention(FeatureTerm):
    """Where layers look: :func:`~slimtorch.distill.attention_transfer_loss`. Of convolutional features."""

    def build(self, student: Tensor, teacher: Tensor) -> nn.Module:
        for which, value in (("student", student), ("teacher", teacher)):
            if value.dim() != 4:
                raise ValueError(
                    f"Attention({self.student!r}, {self.teacher!r}): expected features [batch, channels, height, "
                    f"width] of the {which}, got {list(value.shape)}"
                )
        return _Loss(losses.attention_transfer_loss)


@dataclass(frozen=True)
class Similarity(FeatureTerm):
    """Which samples are alike: :func:`~slimtorch.distill.similarity_loss`."""

    def build(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return _Loss(losses.similarity_loss)


@dataclass(frozen=True)
class Relation(FeatureTerm):
    """Distances and angles between samples: :func:`~slimtorch.distill.relation_loss`."""

    distance_weight: float = 1.0
    angle_weight: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("Relation.distance_weight", self.distance_weight)
        check_weight("Relation.angle_weight", self.angle_weight)

    def build(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return _Loss(
            partial(losses.relation_loss, distance_weight=self.distance_weight, angle_weight=self.angle_weight)
        )


@dataclass(frozen=True)
class Contrastive(FeatureTerm):
    """Telling samples apart: :class:`~slimtorch.distill.ContrastiveMemory`. Needs ``indices`` with each batch.

    Attributes:
        samples: number of samples in the training set, 2 or more; indices are below it.
        features: of the embeddings.
        negatives: other samples that each is told from.
        temperature: τ > 0.
        momentum: of the remembered embeddings, in [0, 1).
    """

    samples: int = 0
    features: int = 128
    negatives: int = 1024
    temperature: float = 0.07
    momentum: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_contrast(self.samples, self.features, self.negatives, self.temperature, self.momentum)

    def build(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return ContrastiveMemory(
            student.shape[1:].numel(), teacher.shape[1:].numel(), self.samples, features=self.features,
            negatives=self.negatives, temperature=self.temperature, momentum=self.momentum,
        )  # fmt: skip


class _Loss(nn.Module):
    """A plain function of two features as a module of a term."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, student: Tensor, teacher: Tensor, indices: Tensor | None) -> Tensor:
        return self.function(student, teacher)


class _Projected(nn.Module):
    """A hint through a learned projection."""

    def __init__(self, term: Hint, student: Tensor, teacher: Tensor) -> None:
        super().__init__()
        if student.dim() != teacher.dim() or student.dim() not in (2, 3, 4):
            raise ValueError(
                f"Hint({term.student!r}, {term.teacher!r}): a projection goes between features of 2 to 4 dimensions, "
                f"as many on both sides, got shapes {list(student.shape)} and {list(teacher.shape)}"
            )
        self.projection: nn.Conv2d | nn.Linear
        if student.dim() == 4:
            self.projection = nn.Conv2d(student.shape[1], teacher.shape[1], 1, bias=False)
        else:
            if student.dim() == 3 and student.shape[1] != teacher.shape[1]:
                raise ValueError(
                    f"Hint({term.student!r}, {term.teacher!r}): expected sequences of one length, "
                    f"got {student.shape[1]} and {teacher.shape[1]}"
                )
            self.projection = nn.Linear(student.shape[-1], teacher.shape[-1], bias=False)
        if student.dtype == torch.float64:
            self.double()

    def forward(self, student: Tensor, teacher: Tensor, indices: Tensor | None) -> Tensor:
        if student.dim() == 4 and student.shape[2:] != teacher.shape[2:]:
            student = F.adaptive_avg_pool2d(student, (teacher.shape[2], teacher.shape[3]))
        # weights stay float32 where the student's features are of half precision
        return losses.hint_loss(self.projection(student.to(self.projection.weight.dtype)), teacher)
