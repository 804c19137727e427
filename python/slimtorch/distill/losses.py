# SPDX-License-Identifier: Apache-2.0
"""What a student may learn from a teacher, as plain functions of two tensors.

Outputs: `soft_target_loss` and its relatives compare distributions over the classes. Features: `hint_loss`,
`attention_transfer_loss` compare them place by place, `similarity_loss` and `relation_loss` by what they say of pairs
and triples of samples, `contrastive_loss` by telling samples apart. All are means over the batch, computed in float32
or wider, differentiable in both arguments: detach the teacher's or compute it under ``torch.no_grad()``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened outputs, T² KL(teacher ‖ student) (Hinton et al., arXiv 1503.02531, sections 2, 2.1).

    T² keeps the size of the gradient when T changes. Cross-entropy with soft targets differs from it by the teacher's
    entropy, which has no gradient for the student.

    Args:
        student_logits, teacher_logits: ``[batch, classes]``, floating point.
        temperature: T > 0, by which both are divided before the softmax.

    Returns:
        Scalar, mean over the batch, in nats times T².
    """
    student, teacher = _logits(student_logits, teacher_logits)
    scale = _temperature(temperature)
    log_student = F.log_softmax(student / scale, dim=1)
    log_teacher = F.log_softmax(teacher / scale, dim=1)
    return scale**2 * _mean(F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1))


def logit_regression_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Half the squared distance of the logits, before any softmax (Ba & Caruana, arXiv 1312.6184, equation 1).

    Args:
        student_logits, teacher_logits: ``[batch, classes]``, floating point.

    Returns:
        Scalar: sum over the classes, mean over the batch.
    """
    student, teacher = _logits(student_logits, teacher_logits)
    return 0.5 * _mean((student - teacher).square().sum(1))


def decoupled_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    *,
    target_weight: float = 1.0,
    other_weight: float = 8.0,
) -> Tensor:
    """Decoupled knowledge distillation (Zhao et al., arXiv 2203.08679, equation 7).

    The divergence of `soft_target_loss` is a sum: that of the probability of the right class against all others, plus
    that among the others, weighted by how unsure the teacher is. Here both have weights of their own.

    Args:
        student_logits, teacher_logits: ``[batch, classes]``, floating point, two classes at least.
        labels: ``[batch]``, integer: the right class.
        temperature: T > 0.
        target_weight: α, of the right class against the rest.
        other_weight: β, among the others.

    Returns:
        Scalar, mean over the batch, times T².
    """
    student, teacher = _logits(student_logits, teacher_logits)
    scale = _temperature(temperature)
    if student.shape[1] < 2:
        raise ValueError(f"student_logits: expected two classes or more, got {student.shape[1]}")
    if labels.shape != student.shape[:1]:
        raise ValueError(f"labels: expected shape [{student.shape[0]}], got {list(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    right = F.one_hot(labels.long(), student.shape[1]).bool()
    log_student = F.log_softmax(student / scale, dim=1)
    log_teacher = F.log_softmax(teacher / scale, dim=1)
    target = _kl(_against_rest(log_teacher, right), _against_rest(log_student, right))
    others = ~right
    others_student = F.log_softmax((student / scale)[others].view(len(student), -1), dim=1)
    others_teacher = F.log_softmax((teacher / scale)[others].view(len(teacher), -1), dim=1)
    return scale**2 * _mean(target_weight * target + other_weight * _kl(others_teacher, others_student))


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
) -> Tensor:
    """Correlations in place of equality: DIST (Huang et al., arXiv 2205.10536, equations 9, 10).

    Asks only that student and teacher order and space the classes of a sample (inter-class) and the samples of a class
    (intra-class) alike, which a much weaker student can do.

    Args:
        student_logits, teacher_logits: ``[batch, classes]``, floating point.
        temperature: T > 0.
        inter_weight, intra_weight: β and γ.

    Returns:
        Scalar: weighted sum of 1 - Pearson correlation, each times T².
    """
    student, teacher = _logits(student_logits, teacher_logits)
    scale = _temperature(temperature)
    p, q = F.softmax(student / scale, dim=1), F.softmax(teacher / scale, dim=1)
    inter = _mean(1 - _correlation(p, q))
    intra = _mean(1 - _correlation(p.t(), q.t())) if len(p) else p.sum()
    return scale**2 * (inter_weight * inter + intra_weight * intra)


def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared difference of two feature maps of one shape: FitNets' hint (Romero et al., 1412.6550, equation 3).

    Where shapes differ a regressor goes before it; see :class:`slimtorch.distill.Hint`.

    Args:
        student_features, teacher_features: any shape, the same, floating point.

    Returns:
        Scalar: mean over all elements.
    """
    if student_features.shape != teacher_features.shape:
        raise ValueError(
            f"student_features: expected the shape of teacher_features {list(teacher_features.shape)}, "
            f"got {list(student_features.shape)}"
        )
    student, teacher = _features(student_features, teacher_features)
    return _mean((student - teacher).square())


def attention_transfer_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Where a layer looks: distance of normalised activation maps (Zagoruyko & Komodakis, 1612.03928, equation 2).

    A map is the mean square over the channels, as a vector of unit length; numbers of channels may differ. A larger
    map is averaged down to the smaller one.

    Args:
        student_features, teacher_features: ``[batch, channels, height, width]``.

    Returns:
        Scalar: mean squared difference of the maps.
    """
    for name, value in (("student_features", student_features), ("teacher_features", teacher_features)):
        if value.dim() != 4:
            raise ValueError(f"{name}: expected shape [batch, channels, height, width], got {list(value.shape)}")
    student, teacher = _features(student_features, teacher_features)
    size = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return _mean((_attention(student, size) - _attention(teacher, size)).square())


def similarity_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Similarity-preserving distillation (Tung & Mori, arXiv 1907.09682, equations 1 to 4).

    Inputs that excite a layer of the teacher alike shall excite the student's alike. Shapes beyond the batch may
    differ.

    Args:
        student_features, teacher_features: ``[batch, …]``.

    Returns:
        Scalar: mean squared difference of the two ``[batch, batch]`` matrices of products, rows of unit length.
    """
    student, teacher = _features(student_features, teacher_features)
    return _mean((_products(student) - _products(teacher)).square())


def relation_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    distance_weight: float = 1.0,
    angle_weight: float = 2.0,
) -> Tensor:
    """Relational distillation (Park et al., arXiv 1904.05068, equations 4 to 9): distances of pairs, angles of triples.

    Shapes beyond the batch may differ. Memory of the angles grows with batch³.

    Args:
        student_features, teacher_features: ``[batch, …]``.
        distance_weight: of the distances, which are in units of their mean.
        angle_weight: of the cosines at each sample between all pairs of others.

    Returns:
        Scalar: weighted sum of the mean Huber losses of both.
    """
    student, teacher = (value.flatten(1) for value in _features(student_features, teacher_features))
    distance = F.smooth_l1_loss(_distances(student), _distances(teacher), reduction="none")
    loss = distance_weight * _mean(distance)
    if angle_weight:
        loss = loss + angle_weight * _mean(F.smooth_l1_loss(_angles(student), _angles(teacher), reduction="none"))
    return loss


def contrastive_loss(
    anchors: Tensor, positives: Tensor, negatives: Tensor, samples: int, temperature: float = 0.07
) -> Tensor:
    """Contrastive representation distillation (Tian et al., arXiv 1910.10699, equations 10, 18, 19).

    A critic tells whether two embeddings are of one sample or of two; where it can, the student knows of the input
    what the teacher does. :class:`slimtorch.distill.Contrastive` makes the embeddings and keeps the negatives.

    Args:
        anchors: ``[batch, features]``, unit vectors of one network.
        positives: ``[batch, features]``, unit vectors of the other, of the same samples.
        negatives: ``[batch, count, features]``, unit vectors of the other, of other samples.
        samples: M, number of samples that the negatives are drawn from.
        temperature: τ > 0 of the critic.

    Returns:
        Scalar: -log h(positive) - Σ log(1 - h(negative)), mean over the batch, h = e^(a·b/τ) / (e^(a·b/τ) + count/M).
    """
    scale = _temperature(temperature)
    if anchors.dim() != 2 or positives.shape != anchors.shape:
        raise ValueError(
            f"positives: expected the shape [batch, features] of anchors, got {list(positives.shape)} "
            f"and {list(anchors.shape)}"
        )
    expected = (anchors.shape[0], anchors.shape[1])
    if negatives.dim() != 3 or (negatives.shape[0], negatives.shape[2]) != expected or not negatives.shape[1]:
        raise ValueError(
            f"negatives: expected shape [{expected[0]}, count >= 1, {expected[1]}], got {list(negatives.shape)}"
        )
    if samples < 1:
        raise ValueError(f"samples: expected a positive number, got {samples!r}")
    anchors, positives, negatives = _wide(anchors), _wide(positives), _wide(negatives)
    # h is a sigmoid of a·b/τ - log(count/M), and log(1 - sigmoid(z)) = logsigmoid(-z)
    shift = math.log(negatives.shape[1] / samples)
    right = F.logsigmoid((anchors * positives).sum(1) / scale - shift)
    wrong = F.logsigmoid(shift - (negatives @ anchors.unsqueeze(2)).squeeze(2) / scale)
    return -_mean(right + wrong.sum(1))


def self_distillation_loss(outputs: Sequence[Tensor], temperature: float) -> Tensor:
    """Earlier exits learn from the last (Zhang et al., *Be Your Own Teacher*, arXiv 1905.08094, section 3).

    Args:
        outputs: logits of all exits in order, ``[batch, classes]`` each, two at least. The last is not changed by it.
        temperature: T > 0.

    Returns:
        Scalar: mean of `soft_target_loss` over all exits but the last.
    """
    if len(outputs) < 2:
        raise ValueError(f"outputs: expected logits of two exits or more, got {len(outputs)}")
    teacher = outputs[-1].detach()
    return torch.stack([soft_target_loss(student, teacher, temperature) for student in outputs[:-1]]).mean()


# --- what they share ----------------------------------------------------------------------------------------------


def _logits(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    for name, value in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected floating point, got {value.dtype}")
        if value.dim() != 2:
            raise ValueError(f"{name}: expected shape [batch, classes], got {list(value.shape)}")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student_logits, teacher_logits: expected one batch, got {student.shape[0]} and {teacher.shape[0]} samples"
        )
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student_logits, teacher_logits: expected the same classes, got {student.shape[1]} and {teacher.shape[1]}"
        )
    return _wide(student), _wide(teacher)


def _features(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    for name, value in (("student_features", student), ("teacher_features", teacher)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected floating point, got {value.dtype}")
        if value.dim() < 2:
            raise ValueError(f"{name}: expected shape [batch, ...], got {list(value.shape)}")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student_features, teacher_features: expected one batch, got {student.shape[0]} and "
            f"{teacher.shape[0]} samples"
        )
    return _wide(student), _wide(teacher)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _temperature(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"temperature: expected a number above 0, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"temperature: expected a finite number above 0, got {value!r}")
    return float(value)


def _mean(value: Tensor) -> Tensor:
    """Of no elements, 0 and not NaN: an empty batch has nothing to teach."""
    return value.sum() / max(value.numel(), 1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def _against_rest(log_p: Tensor, right: Tensor) -> Tensor:
    """Log probabilities ``[batch, 2]`` of the right class and of all others together."""
    rest = log_p.masked_fill(right, -math.inf).logsumexp(1)
    return torch.stack([log_p[right], rest], dim=1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of each row."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1, eps=1e-8)


def _attention(features: Tensor, size: Sequence[int]) -> Tensor:
    energy = features.square().mean(1, keepdim=True)
    if list(energy.shape[2:]) != list(size):
        energy = F.adaptive_avg_pool2d(energy, (size[0], size[1]))
    return F.normalize(energy.flatten(1), dim=1)


def _products(features: Tensor) -> Tensor:
    flat = features.flatten(1)
    return F.normalize(flat @ flat.t(), dim=1)


def _distances(flat: Tensor) -> Tensor:
    """``[batch, batch]``, in units of the mean distance of two samples."""
    squares = (flat.unsqueeze(0) - flat.unsqueeze(1)).square().sum(2)
    apart = squares > 0
    # the root has no gradient at 0, where a sample meets itself
    distances = torch.where(apart, squares, torch.ones_like(squares)).sqrt() * apart
    return distances / (distances.sum() / apart.sum().clamp(min=1)).clamp(min=1e-12)


def _angles(flat: Tensor) -> Tensor:
    """``[batch, batch, batch]``: cosine at sample i between those to j and k."""
    to = F.normalize(flat.unsqueeze(0) - flat.unsqueeze(1), dim=2)
    return to @ to.transpose(1, 2)
