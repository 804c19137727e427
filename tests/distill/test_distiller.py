# SPDX-License-Identifier: Apache-2.0
"""The distiller: taps, projections, ensembles, exits, and that it fits anyone's loop."""

from __future__ import annotations

import copy
import subprocess
import sys
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
    distiller = Distiller(
        student, [teacher, other], distill.Hint("3", "3", member=1), hard_loss=None, example_inputs=x
    )
    torch.testing.assert_close(distiller(x, y)[0], F.mse_loss(student[:4](x), other[:4](x)))


def test_known_logits_replace_the_teacher() -> None:
    student, teacher, x, y = pair()
    known = Distiller(student, None, distill.SoftTargets())(x, y, teacher_logits=teacher(x).detach())[0]
    torch.testing.assert_close(known, Distiller(student, teacher, distill.SoftTargets())(x, y)[0])


class Exits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.first(x), self.last(self.body(x).relu())]


def test_student_with_exits() -> None:
    torch.manual_seed(0)
    student, teacher = Exits(), nn.Linear(4, 5)
    x, y = torch.randn(7, 4), torch.randint(5, (7,))
    loss, outputs = Distiller(student, teacher, distill.SoftTargets(temperature=2.0))(x, y)
    expected = sum(F.cross_entropy(o, y) + distill.soft_target_loss(o, teacher(x).detach(), 2.0) for o in outputs) / 2
    assert len(outputs) == 2
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", ["sparse", "codebook", "binary"])
def test_packed_and_quantized_students(kind: str) -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5))
    x, y = torch.randn(8, 16), torch.randint(5, (8,))
    if kind == "sparse":
        slim.prune_(student, slim.prune.Magnitude(0.5))
        slim.pack_(student, x, formats="sparse")
    elif kind == "codebook":
        slim.cluster_(student, slim.quantize.KMeans(bits=2))
    else:
        slim.binarize_(student, slim.quantize.BinaryConnect())
    student.train()
    teacher = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))
    distiller = Distiller(student, teacher, [distill.SoftTargets(), distill.Hint("0", "0")], example_inputs=x)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss, _ = distiller(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_autocast() -> None:
    student, teacher, x, y = pair()
    distiller = Distiller(student, teacher, [distill.SoftTargets(), distill.Hint("3", "3")], example_inputs=x)
    exact = distiller(x, y)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logits = distiller(x, y)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.02)
    loss.backward()


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
    with pytest.raises(ValueError, match="temperature: expected"):
        distill.SoftTargets(temperature=0)
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
import sys, torch, torch.distributed as dist
from torch import nn
from slimtorch import distill
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
torch.manual_seed(0)
def net(width): return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4))
student, teacher = net(5), net(9)
x, y = torch.randn(12, 6), torch.randint(4, (12,))
terms = [distill.SoftTargets(temperature=3), distill.Hint("0", "0")]
distiller = distill.Distiller(student, teacher, terms, example_inputs=x[:2])
model = nn.parallel.DistributedDataParallel(distiller) if world > 1 else distiller
optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, momentum=0.9)
for step in range(10):
    loss, _ = model(x[rank::world], y[rank::world])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
if rank == 0:
    torch.save(distiller.state_dict(), sys.argv[1])
dist.destroy_process_group()
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
        assert done.returncode == 0, done.stderr[-2000:]
        states.append(torch.load(out))
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6)
