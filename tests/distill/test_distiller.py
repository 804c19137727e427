# SPDX-License-Identifier: Apache-2.0
"""The distiller: taps, projections, ensembles, exits, and that it fits anyone's loop."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtorch as slim
from slimtorch import distill
from slimtorch.distill import Distiller


def convolutional(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(2 * width * 4, 5),
    )  # fmt: skip


def pair() -> tuple[nn.Sequential, nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    return convolutional(2), convolutional(3), torch.randn(6, 1, 8, 8), torch.randint(5, (6,))


def test_projection_adapts_the_size() -> None:
    """4 channels of 2 x 2 pixels are shown where the teacher has 3 channels of 8 x 8."""
    student, teacher, x, y = pair()
    distiller = Distiller(student, teacher, distill.Hint("3", "0"), hard_loss=None, example_inputs=x)
    assert student[:4](x).shape[1:] == (4, 2, 2)
    weight = distiller.heads[0].projection.weight
    shown = F.interpolate(F.conv2d(student[:4](x), weight), scale_factor=4)
    torch.testing.assert_close(distiller(x, y)[0], F.mse_loss(shown, teacher[0](x)))


class Tokens(nn.Module):
    """[batch, tokens, width], then their mean to logits."""

    def __init__(self, width: int, tokens: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(4, tokens * width), nn.Unflatten(1, (tokens, width)))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x).mean(1))


def test_projection_of_tokens() -> None:
    torch.manual_seed(0)
    student, teacher, x = Tokens(2), Tokens(7), torch.randn(6, 4)
    distiller = Distiller(student, teacher, distill.Hint("tokens", "tokens"), hard_loss=None, example_inputs=x)
    shown = student.tokens(x) @ distiller.heads[0].projection.weight.t()
    torch.testing.assert_close(distiller(x)[0], F.mse_loss(shown, teacher.tokens(x)))
    with pytest.raises(ValueError, match="expected sequences of one length, got 3 and 4"):
        Distiller(student, Tokens(7, 4), distill.Hint("tokens", "tokens"), example_inputs=x)


def test_projection_where_shapes_are_the_same() -> None:
    """None unless it is asked for, as FitNets does."""
    student, teacher, x, _ = pair()
    term = distill.Hint("6", "6")
    plain = Distiller(student, teacher, term, hard_loss=None, example_inputs=x)
    torch.testing.assert_close(plain(x)[0], F.mse_loss(student(x), teacher(x)))
    assert not list(plain.heads.parameters())
    asked = Distiller(student, teacher, replace(term, project=True), hard_loss=None, example_inputs=x)
    shown = student(x) @ asked.heads[0].projection.weight.t()
    torch.testing.assert_close(asked(x)[0], F.mse_loss(shown, teacher(x)))


def test_loss_is_the_sum_of_its_terms() -> None:
    student, teacher, x, y = pair()
    terms = [distill.SoftTargets(temperature=3.0, weight=0.7), distill.LogitRegression(weight=0.1)]
    distiller = Distiller(student, teacher, terms, hard_weight=0.3)
    loss, logits = distiller(x, y)
    s, t = student(x), teacher(x).detach()
    expected = 0.3 * F.cross_entropy(s, y) + 0.7 * distill.soft_target_loss(s, t, 3.0)
    expected = expected + 0.1 * distill.logit_regression_loss(s, t)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, s)
    parts = distiller.parts(x, y)[2]
    assert list(parts) == ["hard", "0 SoftTargets", "1 LogitRegression"]
    torch.testing.assert_close(sum(parts.values()), expected.detach())


def test_every_term_trains() -> None:
    student, teacher, x, y = pair()
    terms = [
        distill.Decoupled(), distill.Dist(), distill.Hint("3", "3"), distill.Attention("3", "3"),
        distill.Similarity("5", "5"), distill.Relation("5", "5"),
        distill.Contrastive("5", "5", samples=20, features=4, negatives=3),
    ]  # fmt: skip
    for term in terms:
        distiller = Distiller(copy.deepcopy(student), teacher, term, hard_loss=None, example_inputs=x)
        loss, _ = distiller(x, y, indices=torch.arange(6))
        loss.backward()
        grad = distiller.student[0].weight.grad
        assert grad is not None, term
        assert float(grad.abs().sum()) > 0, term
    assert all(p.grad is None for p in teacher.parameters())


def test_projection_is_learned() -> None:
    """Student and teacher of other widths: the hint goes through a 1x1 convolution, which the optimizer gets."""
    student, teacher, x, y = pair()
    distiller = Distiller(student, teacher, distill.Hint("3", "3"), hard_loss=None, example_inputs=x)
    names = [name for name, _ in distiller.named_parameters() if not name.startswith("student")]
    assert names == ["heads.0.projection.weight"]
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.05)
    first = None
    for _ in range(60):
        loss, _ = distiller(x, y)
        first = float(loss.detach()) if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.6 * first


def test_teacher_is_not_touched() -> None:
    student, teacher, x, y = pair()
    teacher.append(nn.BatchNorm1d(5))
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(student, teacher, distill.SoftTargets())
    distiller(x, y)[0].backward()
    assert teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student"}
    assert not any(module._forward_hooks for module in [*teacher.modules(), *student.modules()])


def test_teacher_runs_in_eval_mode() -> None:
    student, teacher, x, y = pair()
    teacher.append(nn.Dropout(0.5))
    teacher.train()
    distiller = Distiller(student, teacher, distill.LogitRegression(), hard_loss=None)
    assert float(distiller(x, y)[0].detach()) == float(distiller(x, y)[0].detach())


def test_ensemble_is_the_geometric_mean() -> None:
    student, teacher, x, y = pair()
    other = convolutional(4)
    distiller = Distiller(student, [teacher, other], distill.SoftTargets(temperature=2.0), hard_loss=None)
    product = F.softmax(teacher(x) / 2, 1) * F.softmax(other(x) / 2, 1)
    p = product.sqrt() / product.sqrt().sum(1, keepdim=True)
    log_q = F.log_softmax(student(x) / 2, 1)
    expected = 4 * (p * (p.log() - log_q)).sum(1).mean()
    torch.testing.assert_close(distiller(x, y)[0], expected)


def test_second_teacher_is_tapped() -> None:
    student, teacher, x, y = pair()
    other = convolutional(2)
    distiller = Distiller(student, [teacher, other], distill.Hint("3", "3", member=1), hard_loss=None, example_inputs=x)
    torch.testing.assert_close(distiller(x, y)[0], F.mse_loss(student[:4](x), other[:4](x)))


def test_known_logits_replace_the_teacher(tmp_path: Path) -> None:
    student, teacher, x, y = pair()
    cache = distill.TeacherCache.fill(tmp_path, teacher, x.split(2), len(x))
    shuffled = torch.tensor([4, 0, 3, 5])
    known = Distiller(student, None, distill.SoftTargets())
    told = Distiller(student, teacher, distill.SoftTargets())
    loss = known(x[shuffled], y[shuffled], teacher_logits=cache[shuffled])[0]
    torch.testing.assert_close(loss, told(x[shuffled], y[shuffled])[0])
    assert abs(float((loss - known(x[shuffled], y[shuffled], teacher_logits=cache[:4])[0]).detach())) > 1e-4


def test_known_logits_spare_the_teachers_that_nothing_taps() -> None:
    student, teacher, x, y = pair()
    runs: list[str] = []
    other = convolutional(2)
    teacher.register_forward_hook(lambda *_: runs.append("first"))
    other.register_forward_hook(lambda *_: runs.append("second"))
    terms = [distill.SoftTargets(), distill.Hint("3", "3", member=1)]
    distiller = Distiller(student, [teacher, other], terms, hard_loss=None, example_inputs=x)
    runs.clear()
    logits = torch.randn(6, 5)
    loss = distiller(x, y, teacher_logits=logits)[0]
    assert runs == ["second"]
    expected = distill.soft_target_loss(student(x), logits, 4.0) + F.mse_loss(student[:4](x), other[:4](x))
    torch.testing.assert_close(loss, expected)


class Exits(nn.Module):
    def __init__(self, kind: type = list) -> None:
        super().__init__()
        self.kind = kind
        self.body = nn.Linear(4, 6)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        return self.kind([self.first(x), self.last(self.body(x).relu())])


@pytest.mark.parametrize("kind", [list, tuple])
def test_student_with_exits(kind: type) -> None:
    torch.manual_seed(0)
    student, teacher = Exits(kind), nn.Linear(4, 5)
    x, y = torch.randn(7, 4), torch.randint(5, (7,))
    loss, outputs = Distiller(student, teacher, distill.SoftTargets(temperature=2.0))(x, y)
    expected = sum(F.cross_entropy(o, y) + distill.soft_target_loss(o, teacher(x).detach(), 2.0) for o in outputs) / 2
    assert len(outputs) == 2
    torch.testing.assert_close(loss, expected)


def test_teacher_with_exits() -> None:
    """Its last exit is what it says."""
    torch.manual_seed(0)
    student, teacher, x = nn.Linear(4, 5), Exits(), torch.randn(7, 4)
    expected = distill.logit_regression_loss(student(x), teacher(x)[-1].detach())
    torch.testing.assert_close(Distiller(student, teacher, distill.LogitRegression())(x)[0], expected)


def test_hard_loss_of_each_sample() -> None:
    """Its mean counts; without labels, or with a weight of 0, nothing of it."""
    student, teacher, x, y = pair()
    each = partial(F.cross_entropy, reduction="none")
    terms = distill.SoftTargets()
    distiller = Distiller(student, teacher, terms, hard_loss=each, hard_weight=0.5)
    plain = Distiller(student, teacher, terms, hard_weight=0.5)
    torch.testing.assert_close(distiller(x, y)[0], plain(x, y)[0])
    assert distiller.parts(x, y)[2]["hard"].shape == ()
    soft = Distiller(student, teacher, terms, hard_loss=None)(x, y)[0]
    assert torch.equal(distiller(x)[0], soft)
    assert torch.equal(Distiller(student, teacher, terms, hard_weight=0)(x, y)[0], soft)


def compressed(kind: str) -> nn.Sequential:
    """16-24-5, its layers of one kind."""
    student = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5))
    slim.prune_(student, slim.prune.Magnitude(0.5))
    if kind == "masked":
        return student
    slim.prune.bake_(student)
    if kind == "clustered":
        slim.cluster_(student, slim.quantize.KMeans(bits=2))
    elif kind == "binary":
        slim.binarize_(student, slim.quantize.BinaryConnect())
    elif kind == "binary inputs":
        slim.binarize_(student, slim.quantize.XnorNet())
    else:
        layer = getattr(slim.nn, kind)
        student[0], student[2] = layer.from_dense(student[0]), layer.from_dense(student[2])
    return student


PACKED = ["SparseLinear", "BlockSparseLinear", "CodebookLinear", "SparseCodebookLinear", "BinaryLinear"]


@pytest.mark.parametrize("kind", [*PACKED, "masked", "clustered", "binary", "binary inputs"])
def test_compressed_students(kind: str) -> None:
    """They get the gradients that the same loss gives when it is written out, and learn."""
    torch.manual_seed(0)
    student = compressed(kind).train()
    teacher = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))
    x, y = torch.randn(8, 16), torch.randint(5, (8,))
    distiller = Distiller(student, teacher, [distill.SoftTargets(), distill.Hint("0", "0")], example_inputs=x)
    loss, logits = distiller(x, y)
    hidden = student[0](x)
    with torch.no_grad():
        seen, told = teacher[0](x), teacher(x)
    expected = F.cross_entropy(student[2](hidden.relu()), y) + distill.soft_target_loss(logits, told, 4.0)
    expected = expected + F.mse_loss(distiller.heads[0].projection(hidden), seen)
    torch.testing.assert_close(loss, expected)
    learned = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(expected, learned, retain_graph=True)
    for grad, wanted in zip(torch.autograd.grad(loss, learned), grads, strict=True):
        assert float(wanted.abs().sum()) > 0
        torch.testing.assert_close(grad, wanted)
    optimizer = torch.optim.Adam(learned, lr=0.02)
    losses = []
    for _ in range(30):
        loss, _ = distiller(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    """Models run in half precision; the loss is what it is of their outputs in float32, and so are its gradients."""
    student, teacher, x, y = pair()
    distiller = Distiller(student, teacher, [distill.SoftTargets(), distill.Hint("3", "3")], example_inputs=x)
    with torch.autocast("cpu", dtype=dtype):
        loss, logits = distiller(x, y)
        hidden = student[:4](x)
        with torch.no_grad():
            seen, told = teacher[:4](x).float(), teacher(x).float()
        projected = distiller.heads[0].projection(hidden)
        assert {value.dtype for value in (logits, hidden, projected)} == {dtype}
        own = student[4:](hidden)
    # cast for each, so that gradients are rounded where those of the terms are
    expected = F.cross_entropy(own.float(), y) + distill.soft_target_loss(own.float(), told, 4.0)
    expected = expected + F.mse_loss(projected.float(), seen)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    learned = list(distiller.parameters())
    grads = torch.autograd.grad(expected, learned)
    for grad, wanted in zip(torch.autograd.grad(loss, learned), grads, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_one_dtype(dtype: torch.dtype) -> None:
    """Projections and embeddings stay float32 at least, and so does the loss."""
    student, teacher, x, y = pair()
    terms = [
        distill.SoftTargets(), distill.Hint("3", "3"), distill.Hint("6", "6", project=True),
        distill.Contrastive("5", "5", samples=20, features=4, negatives=3),
    ]  # fmt: skip
    distiller = Distiller(student.to(dtype), teacher.to(dtype), terms, example_inputs=x.to(dtype))
    loss = distiller(x.to(dtype), y, indices=torch.arange(6))[0]
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in distiller.parameters())
    again = copy.deepcopy(distiller).to(dtype)
    again.load_state_dict(distiller.state_dict())
    assert again(x.to(dtype), y, indices=torch.arange(6))[0].dtype == loss.dtype


def test_a_loss_in_float64_is_exact() -> None:
    student, teacher, x, y = pair()
    x = x.double()
    terms = [distill.SoftTargets(), distill.Dist(), distill.Hint("3", "3")]
    distiller = Distiller(student.double(), teacher.double(), terms, example_inputs=x)
    bias = student[6].bias

    def loss(values: Tensor) -> Tensor:
        return torch.func.functional_call(distiller, {"student.6.bias": values}, (x, y))[0]

    assert torch.autograd.gradcheck(loss, (bias.detach().clone().requires_grad_(),))


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    student, teacher, x, y = pair()
    distiller = Distiller(student, teacher, [distill.SoftTargets(), distill.Hint("3", "3")], example_inputs=x)
    whole = torch.autograd.grad(distiller(x, y)[0], list(distiller.parameters()))
    for part in (slice(0, 3), slice(3, 6)):
        (distiller(x[part], y[part])[0] / 2).backward()
    for grad, parameter in zip(whole, distiller.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


def test_copies_and_dtypes() -> None:
    student, teacher, x, y = pair()
    distiller = Distiller(student, teacher, distill.Hint("3", "3"), example_inputs=x)
    again = copy.deepcopy(distiller).double()
    assert next(again.teachers[0].parameters()).dtype == torch.float64
    torch.testing.assert_close(again(x.double(), y)[0].float(), distiller(x, y)[0], rtol=1e-4, atol=1e-5)
    fresh = Distiller(convolutional(2), teacher, distill.Hint("3", "3"), example_inputs=x)
    fresh.load_state_dict(distiller.state_dict())
    torch.testing.assert_close(fresh(x, y)[0], distiller(x, y)[0])


def test_pickle() -> None:
    student, teacher, x, y = pair()
    terms = [
        distill.Decoupled(), distill.Dist(), distill.Hint("3", "3"), distill.Attention("3", "3"),
        distill.Similarity("5", "5"), distill.Relation("5", "5"), distill.Contrastive("5", "5", samples=6, negatives=3),
    ]  # fmt: skip
    distiller = Distiller(student, teacher, terms, example_inputs=x).eval()
    distiller(x, y, indices=torch.arange(6))[0].backward()
    again = pickle.loads(pickle.dumps(distiller))
    for one in (distiller, copy.deepcopy(distiller), again):
        torch.manual_seed(1)  # negatives are drawn
        value = one(x, y, indices=torch.arange(6))[0]
        if one is distiller:
            expected = value
        assert torch.equal(value, expected)
    assert again.teachers[0] is not teacher
    assert {name.split(".")[0] for name in again.state_dict()} == {"student", "heads"}


class Body(nn.Module):
    """One layer under two names that runs twice, then one that changes in place what the one before it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.norm, self.relu, self.head = nn.LayerNorm(4), nn.ReLU(inplace=True), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.norm(self.second(self.first(x)))))


@pytest.mark.parametrize("name", ["first", "second"])
def test_shared_layer_that_runs_twice(name: str) -> None:
    """It is found under both names, and its last output counts."""
    torch.manual_seed(0)
    student, teacher, x = Body(), Body(), torch.randn(3, 4)
    distiller = Distiller(student, teacher, distill.Hint(name, "second"), hard_loss=None, example_inputs=x)
    expected = F.mse_loss(student.first(student.first(x)), teacher.first(teacher.first(x)))
    torch.testing.assert_close(distiller(x)[0], expected)


def test_what_follows_a_tap_may_change_it_in_place() -> None:
    torch.manual_seed(0)
    student, teacher, x = Body(), Body(), torch.randn(3, 4)
    distiller = Distiller(student, teacher, distill.Hint("norm", "norm"), hard_loss=None, example_inputs=x)
    with torch.no_grad():
        ours = student.norm(student.second(student.first(x)))
        theirs = teacher.norm(teacher.second(teacher.first(x)))
    assert float(ours.min()) < 0
    loss = distiller(x)[0]
    torch.testing.assert_close(loss, F.mse_loss(ours, theirs))
    loss.backward()
    assert student.first.weight.grad is not None
    assert float(student.first.weight.grad.abs().sum()) > 0


def test_errors_leave_no_hooks_and_no_modes() -> None:
    student, teacher, x, y = pair()
    teacher.train()
    distiller = Distiller(student, teacher, [distill.Hint("0", "0"), distill.Hint("3", "3")], example_inputs=x)
    with pytest.raises(RuntimeError, match="channels"):
        distiller(x.repeat(1, 2, 1, 1), y)  # the student breaks down
    distiller.student = convolutional(2)
    teacher[6] = nn.Linear(7, 5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        distiller(x, y)  # the teacher does, after its taps
    student[3] = nn.Identity()
    distiller.student = nn.Sequential(student[0])
    with pytest.raises(ValueError, match="the student has no layer '3'; closest: '0'"):
        distiller(x, y)  # the second tap is not found
    assert teacher.training
    assert all(module.training for module in teacher.modules())
    for model in (student, teacher, distiller.student):
        assert not any(module._forward_hooks for module in model.modules())


def test_gradients_end_at_known_logits() -> None:
    student, teacher, x, y = pair()
    Distiller(student, None, distill.SoftTargets())(x, y, teacher_logits=teacher(x))[0].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_terms_of_features_ask_nothing_of_logits() -> None:
    student, teacher, x, y = pair()
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    terms = [distill.Similarity("5", "5"), distill.Similarity("5", "1", member=1)]
    distiller = Distiller(student, [teacher, other], terms, hard_loss=None, example_inputs=x)
    features, shown = student[:6](x), other(x).detach()
    expected = distill.similarity_loss(features, teacher[:6](x)) + distill.similarity_loss(features, shown)
    torch.testing.assert_close(distiller(x, y)[0], expected)


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("student", "3"), ("student", "_orig_mod.3"), ("student in place", "3"), ("part", "3"), ("teacher", "3"),
        ("teacher", "_orig_mod.3"), ("distiller", "3"),
    ],
)  # fmt: skip
def test_compiled(way: str, name: str) -> None:
    """Compiled code runs no hooks that came after it; taps see each batch nevertheless."""
    torch._dynamo.reset()
    student, teacher, x, y = pair()
    terms = [distill.SoftTargets(), distill.Hint("3", "3")]
    plain = Distiller(student, teacher, terms, example_inputs=x)
    compiled = partial(torch.compile, backend="eager")
    wrapped, told = student, teacher
    if way == "student":
        wrapped = compiled(student)
        terms = [terms[0], distill.Hint(name, "3")]
    elif way == "student in place":
        wrapped = copy.deepcopy(student)
        wrapped.compile(backend="eager")
    elif way == "part":
        wrapped = copy.deepcopy(student)
        wrapped[3] = compiled(wrapped[3])
    elif way == "teacher":
        told = compiled(teacher)
        terms = [terms[0], distill.Hint("3", name)]
    wrapped(x), told(x)  # compiled before anything is tapped
    distiller = Distiller(wrapped, told, terms, example_inputs=x)
    distiller.heads.load_state_dict(plain.heads.state_dict())
    call = compiled(distiller) if way == "distiller" else distiller
    for batch in torch.randn(3, 6, 1, 8, 8):
        loss = call(batch, y)[0]
        torch.testing.assert_close(loss, plain(batch, y)[0])
        wrapped(batch)  # untapped calls between
    loss.backward()
    weight = next(distiller.student.parameters())
    assert weight.grad is not None
    assert float(weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int) -> None:
    """As the last of an epoch may be, or an example."""
    student, teacher, x, y = pair()
    terms = [
        distill.SoftTargets(), distill.Decoupled(), distill.Dist(), distill.Hint("3", "3"),
        distill.Attention("3", "3"), distill.Similarity("5", "5"), distill.Relation("5", "5"),
        distill.Contrastive("5", "5", samples=20, features=4, negatives=3),
    ]  # fmt: skip
    distiller = Distiller(student, teacher, terms, hard_loss=None, example_inputs=x[:batch])
    loss, _ = distiller(x[:batch], y[:batch], indices=torch.arange(batch))
    loss.backward()
    assert (float(loss.detach()) > 0) == bool(batch)
    assert all(bool(parameter.grad.isfinite().all()) for parameter in distiller.parameters())
    assert math.isfinite(float(distiller(x, y, indices=torch.arange(6))[0].detach()))


def test_contrastive_scores_are_normalized_once() -> None:
    """The first batch in train mode says what scores are divided by: M times their mean."""
    torch.manual_seed(0)
    memory = distill.ContrastiveMemory(4, 6, samples=2, features=3, negatives=2, temperature=0.5)
    s, t, indices = torch.randn(2, 4), torch.randn(2, 6), torch.tensor([0, 1])
    a, b = F.normalize(memory.student_embedding(s), dim=1), F.normalize(memory.teacher_embedding(t), dim=1)
    swapped = torch.tensor([1, 0])
    scores = ((a * memory.teacher_memory[swapped]).sum(1), (b * memory.student_memory[swapped]).sum(1))
    expected = torch.stack([(2 * (2 * one).exp().mean()).log() for one in scores])
    loss = memory(s, t, indices)
    torch.testing.assert_close(memory.log_normalizers, expected)
    held = memory.log_normalizers.clone()
    memory(s.flip(0), t, indices)
    assert torch.equal(memory.log_normalizers, held)
    assert math.isfinite(float(loss.detach()))


def test_contrastive_learns_to_tell_samples_apart() -> None:
    """Without a normalisation of the scores the loss starts in the hundreds, and half as many are found."""
    torch.manual_seed(0)
    x = torch.randn(300, 8)
    teacher = nn.Sequential(nn.Linear(8, 32), nn.ReLU()).requires_grad_(False)
    student = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
    memory = distill.ContrastiveMemory(16, 32, samples=300, features=32, negatives=64)
    optimizer = torch.optim.Adam([*student.parameters(), *memory.parameters()], lr=3e-3)
    for step in range(150):
        indices = torch.randperm(300)[:50]
        loss = memory(student(x[indices]), teacher(x[indices]), indices)
        if not step:
            assert float(loss.detach()) < 30
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        ours = F.normalize(memory.student_embedding(student(x)), dim=1)
        theirs = F.normalize(memory.teacher_embedding(teacher(x)), dim=1)
    found = (ours @ theirs.t()).argmax(1) == torch.arange(300)
    assert float(found.float().mean()) > 0.5


def test_contrastive_memory_moves() -> None:
    memory = distill.ContrastiveMemory(4, 6, samples=10, features=3, negatives=5, momentum=0.5)
    before = memory.student_memory.clone()
    s, t, indices = torch.randn(2, 4), torch.randn(2, 6), torch.tensor([3, 7])
    memory(s, t, indices)
    changed = (memory.student_memory != before).any(1).nonzero().flatten().tolist()
    assert changed == [3, 7]
    embedding = F.normalize(memory.student_embedding(s), dim=1)
    torch.testing.assert_close(memory.student_memory[indices], F.normalize(before[indices] + embedding, dim=1))
    memory.eval()
    held = memory.student_memory.clone()
    memory(s, t, indices)
    assert torch.equal(memory.student_memory, held)


def test_bad_input() -> None:
    student, teacher, x, y = pair()
    soft = distill.SoftTargets()
    for terms, text in (
        ([], "terms: expected at least one"),
        (distill.Hint("layer1.conv", "3"), "terms: the student has no layer 'layer1.conv'; closest: '0', '1', '2'"),
        (distill.Hint("3x", "3"), "terms: the student has no layer '3x'; closest: '3'"),
        (distill.Hint("3", "9"), "terms: the teacher has no layer '9'"),
        (distill.Hint("3", "3", member=1), "member from 0 to 0"),
        (distill.Hint("3", "6"), "as many on both sides"),
        (distill.Hint("3", "3", project=False), "project is False"),
        (distill.Attention("6", "3"), "channels, height, width"),
    ):
        with pytest.raises(ValueError, match=text):
            Distiller(student, teacher, terms, example_inputs=x)
    with pytest.raises(ValueError, match="example_inputs: terms of features need a batch"):
        Distiller(student, teacher, distill.Hint("3", "3"))
    with pytest.raises(ValueError, match="another model than the student"):
        Distiller(student, student, soft)
    with pytest.raises(TypeError, match="terms: expected terms such as"):
        Distiller(student, teacher, [distill.soft_target_loss])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"terms: expected terms such as .* got 'soft'"):
        Distiller(student, teacher, "soft")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"terms: expected terms such as .* got 3"):
        Distiller(student, teacher, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="student: expected a module, got function"):
        Distiller(lambda x: x, teacher, soft)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"teacher: expected a module, or a sequence of them, got str"):
        Distiller(student, ["teacher"], soft)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="teacher: expected a model, several, or None, got an empty sequence"):
        Distiller(student, [], soft)
    with pytest.raises(TypeError, match="hard_loss: expected a function or None, got 'ce'"):
        Distiller(student, teacher, soft, hard_loss="ce")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="terms of features need a teacher to tap"):
        Distiller(student, None, distill.Hint("3", "3"), example_inputs=x)
    with pytest.raises(ValueError, match="one batch, got 6 and 5 samples"):
        Distiller(student, None, soft)(x, y, teacher_logits=torch.zeros(5, 5))
    with pytest.raises(TypeError, match="teacher_logits: expected a tensor or None, got list"):
        Distiller(student, None, soft)(x, y, teacher_logits=[0.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels: Decoupled needs them"):
        Distiller(student, teacher, distill.Decoupled())(x)
    with pytest.raises(ValueError, match=r"SoftTargets.weight: expected a finite number, 0 or more, got -1"):
        distill.SoftTargets(weight=-1)
    with pytest.raises(ValueError, match="same classes, got 5 and 7"):
        Distiller(student, nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), soft)(x, y)
    with pytest.raises(ValueError, match="teacher_logits: expected them with each batch"):
        Distiller(student, None, soft)(x, y)
    with pytest.raises(ValueError, match="teacher: expected logits of one shape"):
        Distiller(student, [teacher, nn.Sequential(nn.Flatten(), nn.Linear(64, 7))], soft)(x, y)
    with pytest.raises(ValueError, match="indices: Contrastive needs"):
        Distiller(student, teacher, distill.Contrastive("5", "5", samples=9), example_inputs=x)(x, y)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: distill.SoftTargets(temperature=0), ValueError, "temperature: expected a finite number above 0"),
        (lambda: distill.Decoupled(temperature=-1), ValueError, "temperature: expected a finite number above 0"),
        (lambda: distill.Dist(temperature=math.inf), ValueError, "temperature: expected a finite number above 0"),
        (lambda: distill.Decoupled(target_weight=-1), ValueError, r"Decoupled.target_weight: .* got -1"),
        (lambda: distill.Decoupled(other_weight=math.nan), ValueError, r"Decoupled.other_weight: .* got nan"),
        (lambda: distill.Dist(inter_weight=-1), ValueError, r"Dist.inter_weight: .* got -1"),
        (lambda: distill.Dist(intra_weight="1"), TypeError, r"Dist.intra_weight: .* got '1'"),  # type: ignore[arg-type]
        (lambda: distill.Relation("3", "3", distance_weight=-1), ValueError, r"Relation.distance_weight: .* got -1"),
        (lambda: distill.Relation("3", "3", angle_weight=-1), ValueError, r"Relation.angle_weight: .* got -1"),
        (lambda: distill.Hint(3, "3"), TypeError, "Hint.student: expected the name of a layer, got 3"),  # type: ignore[arg-type]
        (lambda: distill.Hint("3", None), TypeError, "Hint.teacher: expected the name of a layer, got None"),  # type: ignore[arg-type]
        (lambda: distill.Hint("3", "3", member="1"), TypeError, "Hint.member: expected the number"),  # type: ignore[arg-type]
        (lambda: distill.Hint("3", "3", weight=-2), ValueError, r"Hint.weight: .* got -2"),
        (lambda: distill.Contrastive("3", "3"), ValueError, "samples: expected a whole number, 2 or more, got 0"),
        (lambda: distill.Contrastive("3", "3", samples=2.5), TypeError, "samples: .* got 2.5"),  # type: ignore[arg-type]
        (lambda: distill.Contrastive("3", "3", samples=9, negatives=0), ValueError, "negatives: .* 1 or more, got 0"),
        (lambda: distill.Contrastive("3", "3", samples=9, features=0), ValueError, "features: .* 1 or more, got 0"),
        (lambda: distill.Contrastive("3", "3", samples=9, momentum=1), ValueError, "momentum: .* got 1"),
        (lambda: distill.Contrastive("3", "3", samples=9, temperature=0), ValueError, "temperature: .* got 0"),
        (lambda: distill.ContrastiveMemory(4, 4, 9, temperature=0), ValueError, "temperature: .* got 0"),
    ],
)
def test_bad_terms(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("indices", "error", "text"),
    [
        ([3, 7], TypeError, "indices: expected a tensor, got list"),
        (torch.tensor([3.0, 7.0]), TypeError, "indices: expected integers, got torch.float32"),
        (torch.tensor([True, False]), TypeError, "indices: expected integers, got torch.bool"),
        (torch.tensor([3]), ValueError, r"indices: expected shape \[2\], got \[1\]"),
        (torch.tensor([3, 10]), ValueError, "indices: expected numbers from 0 to 9, got 3 to 10"),
        (torch.tensor([-1, 3]), ValueError, "indices: expected numbers from 0 to 9, got -1 to 3"),
    ],
)
def test_bad_indices(indices: object, error: type[Exception], text: str) -> None:
    memory = distill.ContrastiveMemory(4, 6, samples=10, features=3, negatives=5)
    with pytest.raises(error, match=text):
        memory(torch.randn(2, 4), torch.randn(2, 6), indices)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_indices_of_any_integers(dtype: torch.dtype) -> None:
    memory = distill.ContrastiveMemory(4, 6, samples=10, features=3, negatives=5)
    before = memory.teacher_memory.clone()
    memory(torch.randn(2, 4), torch.randn(2, 6), torch.tensor([3, 7], dtype=dtype))
    assert (memory.teacher_memory != before).any(1).nonzero().flatten().tolist() == [3, 7]


def test_a_layer_that_gives_no_tensor() -> None:
    student = nn.Sequential(nn.Flatten(2), nn.LSTM(64, 5, batch_first=True))
    x = torch.randn(3, 1, 8, 8)
    with pytest.raises(TypeError, match="terms: layer '1' of the student gives tuple, expected a tensor"):
        Distiller(
            student, convolutional(2), distill.Similarity("1", "5"), example_inputs=x, output_fn=lambda out: out[0]
        )
    assert not any(module._forward_hooks for module in student.modules())


def test_outputs_that_are_no_logits() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = convolutional(2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.model(x)}

    _, teacher, x, y = pair()
    student = Named()
    with pytest.raises(TypeError, match="student: expected logits, or a list of them, got dict; see output_fn"):
        Distiller(student, teacher, distill.SoftTargets())(x, y)
    distiller = Distiller(
        student, teacher, distill.SoftTargets(), hard_loss=None,
        output_fn=lambda out: out["logits"] if isinstance(out, dict) else out,
    )  # fmt: skip
    expected = distill.soft_target_loss(student.model(x), teacher(x).detach(), 4.0)
    torch.testing.assert_close(distiller(x, y)[0], expected)


def test_a_layer_that_is_not_run_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="layer 'idle' of the student is not on the path"):
        Distiller(Idle(), nn.Linear(4, 5), distill.Hint("idle", ""), example_inputs=x)


WORKER = """
import contextlib, copy, os, sys, torch, torch.distributed as dist
from torch import nn
from slimtorch import distill
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
torch.manual_seed(0)
def net(width): return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4))
student, teacher = net(5), net(9)
x, y = torch.randn(12, 6), torch.randint(4, (12,))
terms = [
    distill.SoftTargets(temperature=3), distill.LogitRegression(weight=0.1), distill.Decoupled(weight=0.1),
    distill.Hint("0", "0"),
]
distiller = distill.Distiller(student, teacher, terms, example_inputs=x[:2])
# a student that is wrapped already has the same layers and the same loss
wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(student))
other = distill.Distiller(wrapped, teacher, terms, example_inputs=x[:2])
other.heads.load_state_dict(distiller.heads.state_dict())
assert torch.equal(other(x, y)[0], distiller(x, y)[0])
model = nn.parallel.DistributedDataParallel(distiller) if world > 1 else distiller
optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, momentum=0.9)
for step in range(10):
    optimizer.zero_grad()
    for part in range(2):  # gradients are accumulated, and sent with the last part
        mine = slice(rank + part * world, None, 2 * world)
        with model.no_sync() if world > 1 and part == 0 else contextlib.nullcontext():
            (model(x[mine], y[mine])[0] / 2).backward()
    optimizer.step()
# what is remembered of samples is of those of all processes, here 7 of 12, and alike in all
term = distill.Contrastive("0", "0", samples=12, features=4, negatives=3)
contrastive = distill.Distiller(net(5), teacher, term, hard_loss=None, example_inputs=x[:2])
model = nn.parallel.DistributedDataParallel(contrastive) if world > 1 else contrastive
mine = torch.arange(7)[rank::world]
model(x[mine], indices=mine)[0].backward()
memory = contrastive.heads[0]
for value in (memory.student_memory, memory.teacher_memory, memory.log_normalizers):
    first = value.clone()
    dist.broadcast(first, 0)
    assert torch.equal(first, value) and bool(value.isfinite().all())
if rank == 0:
    memories = {"student": memory.student_memory, "teacher": memory.teacher_memory}
    torch.save({**distiller.state_dict(), **memories}, sys.argv[1])
# Neither leaves before the other is done, which the launcher's store tells: a process that ends while the other is in
# its last collective breaks that off. What threads do while Python is torn down is not looked at here.
store = dist.distributed_c10d._get_default_store()
store.set(f"done {rank}", "yes")
store.wait([f"done {other}" for other in range(world)])
sys.stdout.flush()
os._exit(0)
"""


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    """DistributedDataParallel over gloo, started by torchrun."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    states = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
            str(script), str(out),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        states.append(torch.load(out))
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6)
