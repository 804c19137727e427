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


def test_dist_of_rare_classes() -> None:
    """A class that has next to no probability in the whole batch correlates like any other."""
    s, t = (logits(seed) - torch.tensor([0.0, 0, 0, 0, 30]) for seed in range(2))
    p, q = F.softmax(s, 1), F.softmax(t, 1)
    assert float(p[:, 4].max()) < 1e-12
    intra = sum(1 - float(torch.corrcoef(torch.stack([a, b]))[0, 1]) for a, b in zip(p.t(), q.t(), strict=True)) / 5
    assert float(distill.dist_loss(s, t, inter_weight=0)) == pytest.approx(intra, rel=1e-6)


@pytest.mark.parametrize("below", [15, 40, 60, 80, 95, 110])
def test_dist_of_classes_at_the_end_of_float32(below: float) -> None:
    """Probabilities of e^-15 to e^-110, whose squares, and at last they themselves, are 0 in float32."""
    s, t = (logits(seed) - below * torch.tensor([0.0, 0, 0, 1, 1]) for seed in range(2))
    t.requires_grad_(), s.requires_grad_()
    narrow = [value.detach().float().requires_grad_() for value in (s, t)]
    loss = distill.dist_loss(*narrow)
    grads = torch.autograd.grad(loss, narrow)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    if below > 70:  # nothing is left of two classes, which then correlate with nothing
        return
    exact = distill.dist_loss(s, t)
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-4)
    for grad, wanted in zip(grads, torch.autograd.grad(exact, (s, t)), strict=True):
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-3, atol=1e-5)


def test_dist_of_one_sample() -> None:
    """Its classes correlate with the teacher's; a class of a single sample correlates with nothing."""
    s, t = logits(0, 1), logits(1, 1)
    inter = 1 - float(torch.corrcoef(torch.cat([F.softmax(s, 1), F.softmax(t, 1)]))[0, 1])
    assert float(distill.dist_loss(s, t, inter_weight=0.5, intra_weight=3.0)) == pytest.approx(0.5 * inter + 3)


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


@pytest.mark.parametrize("normalizer", [1.0, 70.0])
def test_contrastive_by_hand(normalizer: float) -> None:
    a, b = F.normalize(logits(0), dim=1), F.normalize(logits(1), dim=1)
    others = F.normalize(torch.randn(6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), dim=2)
    expected = 0.0
    for i in range(6):
        e = math.exp(float(a[i] @ b[i]) / 0.1) / normalizer
        expected -= math.log(e / (e + 4 / 50))
        for other in others[i]:
            e = math.exp(float(a[i] @ other) / 0.1) / normalizer
            expected -= math.log(1 - e / (e + 4 / 50))
    loss = distill.contrastive_loss(a, b, others, 50, 0.1, log_normalizer=math.log(normalizer))
    assert float(loss) == pytest.approx(expected / 6, rel=1e-9)


def test_contrast_goes_both_ways() -> None:
    """Of two samples each is the only negative of the other, so nothing is drawn. The critic is that of the paper."""
    memory = distill.ContrastiveMemory(4, 6, samples=2, features=3, negatives=2, temperature=0.5).eval()
    memory.log_normalizers.zero_()
    s, t, indices = torch.randn(2, 4), torch.randn(2, 6), torch.tensor([1, 0])
    a = F.normalize(memory.student_embedding(s), dim=1)
    b = F.normalize(memory.teacher_embedding(t), dim=1)
    others = torch.tensor([[0, 0], [1, 1]])
    expected = distill.contrastive_loss(a, b, memory.teacher_memory[others], 2, 0.5)
    expected = expected + distill.contrastive_loss(b, a, memory.student_memory[others], 2, 0.5)
    torch.testing.assert_close(memory(s, t, indices), expected)


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_gradients_of_logit_losses(name: str) -> None:
    t = logits(1)
    assert torch.autograd.gradcheck(lambda s: LOGIT_LOSSES[name](s, t), (logits(0).requires_grad_(),))


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_gradients_of_feature_losses(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=g) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: FEATURE_LOSSES[name](x, t), (s.requires_grad_(),))


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_second_gradients_of_feature_losses(name: str) -> None:
    """As of a penalty on gradients; a dead sample has none."""
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=g) for _ in range(2))
    assert torch.autograd.gradgradcheck(lambda x: FEATURE_LOSSES[name](x, t), (s.clone().requires_grad_(),))
    s[1] = 0
    s.requires_grad_()
    (first,) = torch.autograd.grad(FEATURE_LOSSES[name](s, t), s, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), s)
    assert bool(second.isfinite().all())


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


def decoupled(s: Tensor, t: Tensor) -> Tensor:
    return distill.decoupled_loss(s, t, torch.arange(len(s)) % s.shape[1])


def contrastive(s: Tensor, t: Tensor) -> Tensor:
    return distill.contrastive_loss(s, t, torch.stack([t.roll(1, 0), t.roll(2, 0)], dim=1), 50, 50.0)


ALL_LOSSES = {**LOGIT_LOSSES, **FEATURE_LOSSES, "decoupled": decoupled, "contrastive": contrastive}


def inputs(name: str, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    shape = (6, 32, 3, 3) if name in FEATURE_LOSSES else (6, 32)
    g = torch.Generator().manual_seed(0)
    student, teacher = ((scale * torch.randn(shape, generator=g)).to(dtype) for _ in range(2))
    return student, teacher


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(name: str, batch: int) -> None:
    loss = ALL_LOSSES[name]
    shape = (batch, 3, 2, 2) if name in FEATURE_LOSSES else (batch, 5)
    s = torch.randn(shape, requires_grad=True)
    value = loss(s, torch.randn(shape))
    value.backward()
    assert math.isfinite(float(value.detach()))
    assert batch or float(value.detach()) == 0
    assert s.grad is not None
    assert bool(s.grad.isfinite().all())


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    """Sums of squares of these are beyond float16."""
    s, t = inputs(name, dtype, 100.0)
    loss = ALL_LOSSES[name](s, t)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ALL_LOSSES[name](s.float(), t.float()))


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_narrow_a_loss(name: str, dtype: torch.dtype) -> None:
    s, t = inputs(name, torch.float32, 100.0)
    s.requires_grad_()
    (grad,) = torch.autograd.grad(ALL_LOSSES[name](s, t), s)
    with torch.autocast("cpu", dtype=dtype):
        loss = ALL_LOSSES[name](s, t)
    assert torch.equal(loss, ALL_LOSSES[name](s, t))
    assert bool(grad.isfinite().all())
    assert torch.equal(torch.autograd.grad(loss, s)[0], grad)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_the_wider_of_two_dtypes_counts(name: str) -> None:
    s, t = inputs(name, torch.float32)
    s.requires_grad_()
    loss = ALL_LOSSES[name](s, t.double())
    torch.testing.assert_close(loss, ALL_LOSSES[name](s.double(), t.double()), rtol=1e-12, atol=0)
    loss.backward()
    assert s.grad is not None
    assert s.grad.dtype == torch.float32
    torch.testing.assert_close(ALL_LOSSES[name](s.half(), t), ALL_LOSSES[name](s.half().float(), t), rtol=0, atol=0)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
@pytest.mark.parametrize("kind", ["a dead sample", "all dead", "two alike", "nearly alike"])
def test_no_direction_no_gradient(name: str, kind: str) -> None:
    """A quotient by a length of 0 has no gradient; by a small number in its place it has one that swamps all others."""
    s, t = inputs(name, torch.float32)
    if kind == "a dead sample":
        s[2] = 0
    elif kind == "all dead":
        s.zero_()
    else:
        s[2] = s[4] if kind == "two alike" else s[4] + torch.finfo(s.dtype).eps
    others = [0, 1, 3, 5]
    usual = torch.autograd.grad(FEATURE_LOSSES[name](a := inputs(name, torch.float32)[0].requires_grad_(), t), a)[0]
    (grad,) = torch.autograd.grad(FEATURE_LOSSES[name](s.requires_grad_(), t), s)
    assert bool(grad.isfinite().all())
    assert float(grad.abs().max()) < 10 * float(usual.abs().max())
    if kind != "all dead":
        assert float(grad[others].abs().max()) > 0.1 * float(usual[others].abs().max())


@pytest.mark.parametrize("name", [*LOGIT_LOSSES, "decoupled"])
def test_a_student_that_says_nothing(name: str) -> None:
    """All classes are as likely, in all samples: as from a last layer that starts at 0."""
    t = inputs(name, torch.float32)[1]
    s = torch.full_like(t, 0.3, requires_grad=True)
    loss = ALL_LOSSES[name](s, t)
    (grad,) = torch.autograd.grad(loss, s)
    assert 0 < float(loss.detach()) < math.inf
    assert float(grad.abs().max()) < 10
    if name == "dist":
        assert float(loss.detach()) == pytest.approx(2.0**2 * 2, rel=1e-6)  # correlates with nothing


@pytest.mark.parametrize("name", ["soft", "decoupled"])
def test_a_class_that_is_ruled_out(name: str) -> None:
    """-inf is a probability of 0: as if the class were not there. The student alone may not rule a class out."""
    s, t = logits(0), logits(1)
    without = ALL_LOSSES[name](s[:4, :4], t[:4, :4])
    s, t = s[:4].clone(), t[:4].clone()
    s[:, 4] = t[:, 4] = -math.inf
    s.requires_grad_()
    loss = ALL_LOSSES[name](s, t)
    torch.testing.assert_close(loss, without)
    loss.backward()
    assert s.grad is not None
    assert bool(s.grad.isfinite().all())
    t[:, 4] = 0
    assert float(ALL_LOSSES[name](s, t).detach()) > 1e30


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
        (
            lambda: distill.decoupled_loss(logits(0), logits(1), [0] * 6),
            TypeError,
            "labels: expected a tensor, got list",
        ),  # type: ignore[arg-type]
        (
            lambda: distill.decoupled_loss(logits(0), logits(1), torch.tensor([0, 1, 2, 3, 4, 5])),
            ValueError,
            "labels: expected numbers from 0 to 4, got 0 to 5",
        ),
        (
            lambda: distill.decoupled_loss(logits(0), logits(1), torch.tensor([0, 1, 2, 3, 4, -100])),
            ValueError,
            "got -100 to 4",
        ),
        (
            lambda: distill.decoupled_loss(logits(0)[:, :1], logits(1)[:, :1], torch.zeros(6).long()),
            ValueError,
            "student_logits: expected two classes or more, got 1",
        ),
        (
            lambda: distill.decoupled_loss(logits(0), logits(1), torch.zeros(6).long(), other_weight=-1),
            ValueError,
            "other_weight: expected a finite number, 0 or more, got -1",
        ),
        (lambda: distill.dist_loss(logits(0), logits(1), intra_weight=math.nan), ValueError, "intra_weight"),
        (lambda: distill.relation_loss(logits(0), logits(1), angle_weight="2"), TypeError, "angle_weight"),  # type: ignore[arg-type]
        (lambda: distill.soft_target_loss([0.0, 1.0], logits(1), 1), TypeError, "student_logits: expected a tensor"),  # type: ignore[arg-type]
        (lambda: distill.hint_loss([0.0], logits(1)), TypeError, "student_features: expected a tensor, got list"),  # type: ignore[arg-type]
        (lambda: distill.attention_transfer_loss(logits(0), None), TypeError, "teacher_features: expected a tensor"),  # type: ignore[arg-type]
        (lambda: distill.hint_loss(logits(0), logits(1, 6, 4)), ValueError, r"student_features: .*\[6, 4\], got"),
        (lambda: distill.attention_transfer_loss(logits(0), logits(1)), ValueError, "channels, height, width"),
        (lambda: distill.similarity_loss(logits(0), logits(1, 7)), ValueError, "one batch"),
        (lambda: distill.relation_loss(logits(0)[0], logits(1)[0]), ValueError, "student_features"),
        (lambda: distill.self_distillation_loss([logits(0)], 1.0), ValueError, "outputs: expected logits of two"),
        (lambda: distill.contrastive_loss([0.0], logits(1), logits(2), 9), TypeError, "anchors: expected a tensor"),  # type: ignore[arg-type]
        (
            lambda: distill.contrastive_loss(logits(0), logits(1, 7), logits(2).unsqueeze(1), 9),
            ValueError,
            r"positives: expected the shape \[batch, features\] of anchors, got \[7, 5\]",
        ),
        (
            lambda: distill.contrastive_loss(logits(0), logits(1), logits(2).unsqueeze(1), 0),
            ValueError,
            "samples: expected a whole number above 0, got 0",
        ),
        (
            lambda: distill.contrastive_loss(logits(0), logits(1), logits(2).unsqueeze(1), 9, 0.0),
            ValueError,
            "temperature: expected a finite number above 0",
        ),
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
