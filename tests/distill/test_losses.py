# SPDX-License-Identifier: Apache-2.0
"""Each loss against its formula written out, in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slimtorch import distill

LOGIT_LOSSES = {
    "soft": partial(distill.soft_target_loss, temperature=3.0),
    "logits": distill.logit_regression_loss,
    "dist": partial(distill.dist_loss, temperature=2.0),
}
FEATURE_LOSSES = {
    "hint": distill.hint_loss,
    "attention": distill.attention_transfer_loss,
    "similarity": distill.similarity_loss,
    "relation": distill.relation_loss,
}


def logits(seed: int, batch: int = 6, classes: int = 5) -> Tensor:
    return torch.randn(batch, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_worked_softmax() -> None:
    """Logits 100, 10, 1: certain at T = 1, spread at T = 100."""
    z = torch.tensor([[100.0, 10.0, 1.0]], dtype=torch.float64)
    assert F.softmax(z, 1).round(decimals=2).tolist() == [[1.0, 0.0, 0.0]]
    assert F.softmax(z / 100, 1).round(decimals=2).tolist() == [[0.56, 0.23, 0.21]]
    # the loss of a student that knows nothing is then log 3 less the entropy of those three, times T²
    p = [math.exp(v) / sum(map(math.exp, (1.0, 0.1, 0.01))) for v in (1.0, 0.1, 0.01)]
    expected = 100**2 * (math.log(3) + sum(v * math.log(v) for v in p))
    loss = distill.soft_target_loss(torch.zeros_like(z), z, 100)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_soft_targets_are_cross_entropy_less_entropy() -> None:
    s, t = logits(0), logits(1)
    p = F.softmax(t / 4, 1)
    cross = -(p * F.log_softmax(s / 4, 1)).sum(1).mean()
    entropy = -(p * p.log()).sum(1).mean()
    assert float(distill.soft_target_loss(s, t, 4.0)) == pytest.approx(float(16 * (cross - entropy)), rel=1e-12)


def test_high_temperature_is_logit_regression() -> None:
    """Hinton et al., equation 4: for T far above centred logits the gradient is (s - t) / classes."""
    s, t = logits(0), logits(1)
    s, t = s - s.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    s.requires_grad_()
    (soft,) = torch.autograd.grad(distill.soft_target_loss(s, t, 1e4), s)
    (regression,) = torch.autograd.grad(distill.logit_regression_loss(s, t), s)
    torch.testing.assert_close(soft, regression / 5, rtol=1e-3, atol=1e-6)


def test_decoupled_is_soft_targets_taken_apart() -> None:
    """KL = TCKD + (1 - p of the right class) NCKD (equation 5 of the paper)."""
    s, t = logits(0), logits(1)
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    p = F.softmax(t / 4, 1)
    rows = [
        distill.decoupled_loss(
            s[i : i + 1], t[i : i + 1], labels[i : i + 1], 4.0, target_weight=1.0, other_weight=float(1 - p[i, label])
        )
        for i, label in enumerate(labels)
    ]
    torch.testing.assert_close(torch.stack(rows).mean(), distill.soft_target_loss(s, t, 4.0), rtol=1e-10, atol=0)


def test_dist_by_hand() -> None:
    s, t = logits(0), logits(1)
    p, q = F.softmax(s / 2, 1), F.softmax(t / 2, 1)
    inter = sum(1 - float(torch.corrcoef(torch.stack([a, b]))[0, 1]) for a, b in zip(p, q, strict=True)) / len(p)
    intra = sum(1 - float(torch.corrcoef(torch.stack([a, b]))[0, 1]) for a, b in zip(p.t(), q.t(), strict=True)) / 5
    loss = distill.dist_loss(s, t, 2.0, inter_weight=0.5, intra_weight=3.0)
    assert float(loss) == pytest.approx(4 * (0.5 * inter + 3 * intra), rel=1e-6)


def test_dist_sees_no_shift_of_logits() -> None:
    s = logits(0)
    assert float(distill.dist_loss(s + 7, s)) == pytest.approx(0, abs=1e-9)


def test_attention_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    s = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=g)
    t = torch.randn(2, 5, 8, 8, dtype=torch.float64, generator=g)
    ours = s.square().mean(1).flatten(1)
    theirs = F.avg_pool2d(t.square().mean(1, keepdim=True), 2).flatten(1)
    expected = (ours / ours.norm(dim=1, keepdim=True) - theirs / theirs.norm(dim=1, keepdim=True)).square().mean()
    torch.testing.assert_close(distill.attention_transfer_loss(s, t), expected)


def test_similarity_by_hand() -> None:
    s, t = logits(0), logits(1, classes=9)
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        a, b = s @ s[i], t @ t[i]
        expected += (a / a.norm() - b / b.norm()).square().sum() / 36
    torch.testing.assert_close(distill.similarity_loss(s, t), expected)


def test_relation_by_hand() -> None:
    s, t = logits(0, 4), logits(1, 4, 7)

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        distance = torch.stack([torch.stack([(a - b).norm() for b in x]) for a in x])
        mean = distance.sum() / (distance > 0).sum()
        angle = torch.zeros(4, 4, 4, dtype=x.dtype)
        for i in range(4):
            for j in range(4):
                for k in range(4):
                    if j != i and k != i:
                        angle[i, j, k] = F.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0)
        return distance / mean, angle

    (ds, angles), (dt, anglet) = parts(s), parts(t)
    expected = 3 * F.smooth_l1_loss(ds, dt) + 5 * F.smooth_l1_loss(angles, anglet)
    torch.testing.assert_close(distill.relation_loss(s, t, distance_weight=3, angle_weight=5), expected)


def test_contrastive_by_hand() -> None:
    a, b = F.normalize(logits(0), dim=1), F.normalize(logits(1), dim=1)
    others = F.normalize(torch.randn(6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), dim=2)
    expected = 0.0
    for i in range(6):
        e = math.exp(float(a[i] @ b[i]) / 0.1)
        expected -= math.log(e / (e + 4 / 50))
        for other in others[i]:
            e = math.exp(float(a[i] @ other) / 0.1)
            expected -= math.log(1 - e / (e + 4 / 50))
    loss = distill.contrastive_loss(a, b, others, 50, 0.1)
    assert float(loss) == pytest.approx(expected / 6, rel=1e-9)


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_gradients_of_logit_losses(name: str) -> None:
    t = logits(1)
    assert torch.autograd.gradcheck(lambda s: LOGIT_LOSSES[name](s, t), (logits(0).requires_grad_(),))


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_gradients_of_feature_losses(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=g) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: FEATURE_LOSSES[name](x, t), (s.requires_grad_(),))


def test_gradients_of_the_others() -> None:
    t, labels = logits(1), torch.tensor([0, 4, 2, 2, 1, 3])
    s = logits(0).requires_grad_()
    others = torch.randn(6, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(lambda x: distill.decoupled_loss(x, t, labels), (s,))
    assert torch.autograd.gradcheck(lambda x: distill.contrastive_loss(x, t, others, 50, 1.0), (s,))


@pytest.mark.parametrize("name", [*LOGIT_LOSSES, *FEATURE_LOSSES])
def test_equal_is_zero_and_less_is_not(name: str) -> None:
    loss = {**LOGIT_LOSSES, **FEATURE_LOSSES}[name]
    shape = (4, 5) if name in LOGIT_LOSSES else (4, 3, 2, 2)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert float(loss(x, x)) == pytest.approx(0, abs=1e-6)
    assert float(loss(x, x.flip(0))) > 1e-3


@pytest.mark.parametrize("name", [*LOGIT_LOSSES, *FEATURE_LOSSES])
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(name: str, batch: int) -> None:
    loss = {**LOGIT_LOSSES, **FEATURE_LOSSES}[name]
    shape = (batch, 5) if name in LOGIT_LOSSES else (batch, 3, 2, 2)
    s = torch.randn(shape, requires_grad=True)
    value = loss(s, torch.randn(shape))
    value.backward()
    assert math.isfinite(float(value.detach()))
    assert s.grad is not None
    assert bool(s.grad.isfinite().all())


def test_half_precision_is_computed_in_float32() -> None:
    s, t = logits(0).bfloat16(), logits(1).bfloat16()
    loss = distill.soft_target_loss(s, t, 4.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distill.soft_target_loss(s.float(), t.float(), 4.0))


def test_exits_learn_from_the_last() -> None:
    outputs = [logits(seed).requires_grad_() for seed in range(3)]
    loss = distill.self_distillation_loss(outputs, 2.0)
    last = outputs[2].detach()
    expected = (distill.soft_target_loss(outputs[0], last, 2.0) + distill.soft_target_loss(outputs[1], last, 2.0)) / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert outputs[2].grad is None
    assert outputs[0].grad is not None


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: distill.soft_target_loss(logits(0), logits(1), 0), ValueError, "temperature: expected a finite"),
        (lambda: distill.soft_target_loss(logits(0), logits(1), -1.0), ValueError, "above 0, got -1.0"),
        (lambda: distill.soft_target_loss(logits(0), logits(1), math.nan), ValueError, "temperature"),
        (lambda: distill.soft_target_loss(logits(0), logits(1), "4"), TypeError, "temperature"),  # type: ignore[arg-type]
        (lambda: distill.soft_target_loss(logits(0), logits(1, 6, 4), 1), ValueError, "same classes, got 5 and 4"),
        (lambda: distill.soft_target_loss(logits(0), logits(1, 7), 1), ValueError, "one batch, got 6 and 7"),
        (lambda: distill.soft_target_loss(logits(0)[0], logits(1)[0], 1), ValueError, r"\[batch, classes\], got \[5\]"),
        (lambda: distill.soft_target_loss(logits(0).long(), logits(1), 1), TypeError, "student_logits: expected float"),
        (lambda: distill.decoupled_loss(logits(0), logits(1), torch.zeros(6)), TypeError, "labels"),
        (lambda: distill.decoupled_loss(logits(0), logits(1), torch.zeros(5).long()), ValueError, "labels"),
        (lambda: distill.hint_loss(logits(0), logits(1, 6, 4)), ValueError, r"student_features: .*\[6, 4\], got"),
        (lambda: distill.attention_transfer_loss(logits(0), logits(1)), ValueError, "channels, height, width"),
        (lambda: distill.similarity_loss(logits(0), logits(1, 7)), ValueError, "one batch"),
        (lambda: distill.relation_loss(logits(0)[0], logits(1)[0]), ValueError, "student_features"),
        (lambda: distill.self_distillation_loss([logits(0)], 1.0), ValueError, "outputs: expected logits of two"),
        (
            lambda: distill.contrastive_loss(logits(0), logits(1), logits(2), 9),
            ValueError,
            r"negatives: expected shape \[6, count >= 1, 5\]",
        ),
    ],
)
def test_bad_input(call: object, error: type[Exception], text: str) -> None:
    assert callable(call)
    with pytest.raises(error, match=text):
        call()
