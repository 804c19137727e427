# SPDX-License-Identifier: Apache-2.0
"""What a student may learn from a teacher, as plain functions of two tensors.

Outputs: `soft_target_loss` and its relatives compare distributions over the classes. Features: `hint_loss`,
`attention_transfer_loss` compare them place by place, `similarity_loss` and `relation_loss` by what they say of pairs
and triples of samples, `contrastive_loss` by telling samples apart. All are means over the batch, computed in float32
or wider, under autocast too, differentiable in both arguments: detach the teacher's or compute it under
``torch.no_grad()``. Vectors that have no direction, such as the features of a sample that no unit reacts to, count as
zero and get no gradient where a formula divides by their length.

All raise TypeError for arguments that are not of the kind they say and ValueError for shapes that do not fit, a
temperature or a number of samples that is not above 0, and weights below 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened outputs, T² KL(teacher ‖ student) (Hinton et al., arXiv 1503.02531, sections 2, 2.1).

    T² keeps the size of the gradient when T changes. Cross-entropy with soft targets differs from it by the teacher's
    entropy, which has no gradient for the student.

    Args:
        student_logits, teacher_logits: ``[batch, classes]``, floating point. A class may be ruled out by ``-inf``.
        temperature: T > 0, by which both are divided before the softmax.

    Returns:
        Scalar, mean over the batch, in nats times T².
    """
    student, teacher = _logits(student_logits, teacher_logits)
    scale = check_temperature(temperature)
    return scale**2 * _mean(_kl(_log_softmax(teacher / scale), _log_softmax(student / scale)))


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
        target_weight: α >= 0, of the right class against the rest.
        other_weight: β >= 0, among the others.

    Returns:
        Scalar, mean over the batch, times T².
    """
    student, teacher = _logits(student_logits, teacher_logits)
    scale = check_temperature(temperature)
    check_weight("target_weight", target_weight)
    check_weight("other_weight", other_weight)
    classes = student.shape[1]
    if classes < 2:
        raise ValueError(f"student_logits: expected two classes or more, got {classes}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if labels.shape != student.shape[:1]:
        raise ValueError(f"labels: expected shape [{student.shape[0]}], got {list(labels.shape)}")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise ValueError(
            f"labels: expected numbers from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    right = torch.arange(classes, device=labels.device) == labels[:, None]
    log_student, log_teacher = _log_softmax(student / scale), _log_softmax(teacher / scale)
    target = _kl(_against_rest(log_teacher, right), _against_rest(log_student, right))
    others = ~right
    others_student = _log_softmax((student / scale)[others].view(-1, classes - 1))
    others_teacher = _log_softmax((teacher / scale)[others].view(-1, classes - 1))
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
        inter_weight, intra_weight: β and γ, >= 0.

    Returns:
        Scalar: weighted sum of 1 - Pearson correlation, each times T², as in the authors' code. What is constant within
        rounding, as every class is in a batch of one sample, correlates with nothing: 1, without a gradient.
    """
    student, teacher = _logits(student_logits, teacher_logits)
    scale = check_temperature(temperature)
    check_weight("inter_weight", inter_weight)
    check_weight("intra_weight", intra_weight)
    p, q = F.softmax(student / scale, dim=1), F.softmax(teacher / scale, dim=1)
    inter = _mean(1 - _correlation(p, q))
    intra = _mean(1 - _correlation(p.t(), q.t())) if len(p) else p.sum()
    return scale**2 * (inter_weight * inter + intra_weight * intra)


def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared difference of two feature maps of one shape: FitNets' hint (Romero et al., 1412.6550, equation 3).

    Where shapes differ a regressor goes before it; see :class:`slimtorch.distill.Hint`.

    Args:
        student_features, teacher_features: ``[batch, …]``, of one shape, floating point.

    Returns:
        Scalar: mean over all elements (the paper: half their sum).
    """
    student, teacher = _features(student_features, teacher_features)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_features: expected the shape of teacher_features {list(teacher.shape)}, got {list(student.shape)}"
        )
    return _mean((student - teacher).square())


def attention_transfer_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Where a layer looks: distance of normalised activation maps (Zagoruyko & Komodakis, 1612.03928, equation 2).

    A map is the mean square over the channels, as a vector of unit length; numbers of channels may differ. A larger
    map is averaged down to the smaller one.

    Args:
        student_features, teacher_features: ``[batch, channels, height, width]``, floating point.

    Returns:
        Scalar: mean squared difference of the maps, as in the authors' code (the paper: its root, summed).
    """
    student, teacher = _features(student_features, teacher_features)
    for name, value in (("student_features", student), ("teacher_features", teacher)):
        if value.dim() != 4:
            raise ValueError(f"{name}: expected shape [batch, channels, height, width], got {list(value.shape)}")
    size = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return _mean((_attention(student, size) - _attention(teacher, size)).square())


def similarity_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Similarity-preserving distillation (Tung & Mori, arXiv 1907.09682, equations 1 to 4).

    Inputs that excite a layer of the teacher alike shall excite the student's alike. Shapes beyond the batch may
    differ.

    Args:
        student_features, teacher_features: ``[batch, …]``, floating point.

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

    Shapes beyond the batch may differ. Memory grows with batch² times features, and with batch³.

    Args:
        student_features, teacher_features: ``[batch, …]``, floating point.
        distance_weight: >= 0, of the distances, which are in units of their mean.
        angle_weight: >= 0, of the cosines at each sample between all pairs of others.

    Returns:
        Scalar: weighted sum of the mean Huber losses of both (the paper: their sums). Between samples that are alike
        within rounding there is no angle: 0.
    """
    check_weight("distance_weight", distance_weight)
    check_weight("angle_weight", angle_weight)
    student, teacher = (value.flatten(1) for value in _features(student_features, teacher_features))
    distance = F.smooth_l1_loss(_distances(student), _distances(teacher), reduction="none")
    loss = distance_weight * _mean(distance)
    if angle_weight:
        loss = loss + angle_weight * _mean(F.smooth_l1_loss(_angles(student), _angles(teacher), reduction="none"))
    return loss


def contrastive_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    samples: int,
    temperature: float = 0.07,
    *,
    log_normalizer: Tensor | float = 0.0,
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
        log_normalizer: log Z, scalar. 0: the critic of the paper. The authors' code divides scores by an estimate of
            Z = M · mean e^(a·b/τ); without it, unit vectors must all turn away from each other before they tell
            samples apart.

    Returns:
        Scalar: -log h(positive) - Σ log(1 - h(negative)), mean over the batch; h = s / (s + count/M),
        s = e^(a·b/τ) / Z.
    """
    scale = check_temperature(temperature)
    for name, value in (("anchors", anchors), ("positives", positives), ("negatives", negatives)):
        _check_floating(name, value)
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
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise TypeError(f"samples: expected a whole number above 0, got {samples!r}")
    if samples < 1:
        raise ValueError(f"samples: expected a whole number above 0, got {samples!r}")
    anchors, positives, negatives = _wide(anchors, positives, negatives)
    # h is a sigmoid of a·b/τ - log(Z count/M), and log(1 - sigmoid(z)) = logsigmoid(-z)
    shift = math.log(negatives.shape[1] / samples) + log_normalizer
    right = F.logsigmoid((anchors * positives).sum(1) / scale - shift)
    wrong = F.logsigmoid(shift - _product(negatives, anchors.unsqueeze(2)).squeeze(2) / scale)
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


def check_weight(name: str, value: float) -> None:
    """A finite number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, 0 or more, got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number, 0 or more, got {value!r}")


def check_temperature(value: float) -> float:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"temperature: expected a number above 0, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"temperature: expected a finite number above 0, got {value!r}")
    return float(value)


def _check_floating(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected floating point, got {value.dtype}")


def _logits(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    for name, value in (("student_logits", student), ("teacher_logits", teacher)):
        _check_floating(name, value)
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
    student, teacher = _wide(student, teacher)
    return student, teacher


def _features(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    for name, value in (("student_features", student), ("teacher_features", teacher)):
        _check_floating(name, value)
        if value.dim() < 2:
            raise ValueError(f"{name}: expected shape [batch, ...], got {list(value.shape)}")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student_features, teacher_features: expected one batch, got {student.shape[0]} and "
            f"{teacher.shape[0]} samples"
        )
    student, teacher = _wide(student, teacher)
    return student, teacher


def _wide(*values: Tensor) -> list[Tensor]:
    """All in one dtype, float32 or wider."""
    dtype = reduce(torch.promote_types, (value.dtype for value in values), torch.float32)
    return [value.to(dtype) for value in values]


def _mean(value: Tensor) -> Tensor:
    """Of no elements, 0 and not NaN: an empty batch has nothing to teach."""
    return value.sum() / max(value.numel(), 1)


def _log_softmax(values: Tensor) -> Tensor:
    """Finite, so that a class of probability 0 adds 0 to a divergence and not 0 · ∞."""
    return F.log_softmax(values, dim=1).clamp(min=torch.finfo(values.dtype).min)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def _against_rest(log_p: Tensor, right: Tensor) -> Tensor:
    """Log probabilities ``[batch, 2]`` of the right class and of all others together."""
    rest = log_p.masked_fill(right, -math.inf).logsumexp(1)
    return torch.stack([log_p[right], rest], dim=1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Not in half precision, which autocast would choose: sums over many features overflow it."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _unit(vectors: Tensor, floor: Tensor | float = 1e-12, dim: int = 1) -> Tensor:
    """Of length 1. What is not longer than ``floor`` becomes 0 without a gradient: one divided by its length would be
    beyond all others."""
    squares = vectors.square().sum(dim, keepdim=True)
    directed = squares > floor**2
    # the root of 0 has no gradient, not even one that a later choice would leave out
    return vectors * directed / torch.where(directed, squares, 1).sqrt()


def _centred(rows: Tensor) -> Tensor:
    """Rows of probabilities less their mean, of length 1; 0 where nothing is left but rounding."""
    # in units of the largest, because float32 does not hold the squares of small ones, nor the inverse of the smallest
    largest = rows.detach().amax(1, keepdim=True)
    rows = rows / torch.where(largest > 1e-30, largest, math.inf)
    rounding = 4 * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(rows.detach(), dim=1, keepdim=True)
    return _unit(rows - rows.mean(1, keepdim=True), rounding)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of each row."""
    return (_centred(a) * _centred(b)).sum(1)


def _attention(features: Tensor, size: Sequence[int]) -> Tensor:
    energy = features.square().mean(1, keepdim=True)
    if list(energy.shape[2:]) != list(size):
        energy = F.adaptive_avg_pool2d(energy, (size[0], size[1]))
    return _unit(energy.flatten(1))


def _products(features: Tensor) -> Tensor:
    flat = features.flatten(1)
    return _unit(_product(flat, flat.t()))


def _distances(flat: Tensor) -> Tensor:
    """``[batch, batch]``, in units of the mean distance of two samples."""
    squares = (flat.unsqueeze(0) - flat.unsqueeze(1)).square().sum(2)
    apart = squares > 0
    # the root has no gradient at 0, where a sample meets itself
    distances = torch.where(apart, squares, torch.ones_like(squares)).sqrt() * apart
    return distances / (distances.sum() / apart.sum().clamp(min=1)).clamp(min=1e-12)


def _angles(flat: Tensor) -> Tensor:
    """``[batch, batch, batch]``: cosine at sample i between those to j and k."""
    rounding = torch.finfo(flat.dtype).eps * torch.linalg.vector_norm(flat.detach())
    to = _unit(flat.unsqueeze(0) - flat.unsqueeze(1), rounding, dim=2)
    return _product(to, to.transpose(1, 2))
