# SPDX-License-Identifier: Apache-2.0
"""Slimmable networks: every width is the plain network of the first channels, trained together, taken out alone."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.dynamic import (
    Channels,
    Slimmable,
    SlimmableBatchNorm1d,
    SlimmableBatchNorm2d,
    SlimmableConv1d,
    SlimmableConv2d,
    SlimmableLinear,
    at_width,
    export,
    recalibrate_,
    sandwich_step,
    sandwich_widths,
    set_width,
    slimmable_,
    slimmable_loss,
    width_of,
    widths_of,
)
from slimtorch.measure import count_macs
from slimtorch.models import LeNet5, LeNet300, mobilenet_v1, resnet18, resnet20

WIDTHS = (0.25, 0.5, 0.75, 1.0)


class Net(nn.Module):
    """Everything at once: depthwise, residual, concatenation, flattening, norms in one and two dimensions."""

    def __init__(self, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.inner = nn.Conv2d(width, width, 1)
        self.side = nn.Conv2d(2, width // 2, 3, stride=1, padding=1)
        self.bn2 = nn.BatchNorm2d(width + width // 2)
        self.pool = nn.MaxPool2d(4)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear((width + width // 2) * 4, hidden)
        self.bn3 = nn.BatchNorm1d(hidden)
        self.fc2 = nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.stem(x)))
        h = h + self.inner(F.relu(self.depthwise(h)))
        h = self.bn2(torch.cat([h, self.side(x)], 1))
        return self.fc2(F.relu(self.bn3(self.fc1(self.flatten(self.pool(h))))))


def images(count: int = 6, seed: int = 0, channels: int = 2, size: int = 8) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def some(model: nn.Module, x: Tensor) -> nn.Module:
    """Batch norms with statistics that are no 0 and 1, scales that are no 1."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    model.train()
    model(x)
    return model.eval()


@pytest.fixture
def dense() -> nn.Module:
    torch.manual_seed(3)
    return some(Net(), images(16, 9))


def first(channels: Tensor | int, share: float) -> int:
    size = channels if isinstance(channels, int) else len(channels)
    return max(1, int(size * share + 0.5))


def by_hand(dense: Any, x: Tensor, width: float) -> Tensor:
    """The definition, from the dense network's tensors."""
    n, m, k = first(8, width), first(4, width), first(12, width)

    def norm(bn: Any, h: Tensor, keep: Tensor) -> Tensor:
        tensors = (t[keep] for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
        return F.batch_norm(h, *tensors, False, 0, bn.eps)

    h = F.relu(norm(dense.bn1, F.conv2d(x, dense.stem.weight[:n], padding=1), torch.arange(n)))
    d = F.relu(F.conv2d(h, dense.depthwise.weight[:n], dense.depthwise.bias[:n], padding=1, groups=n))
    h = h + F.conv2d(d, dense.inner.weight[:n, :n], dense.inner.bias[:n])
    s = F.conv2d(x, dense.side.weight[:m], dense.side.bias[:m], padding=1)
    keep = torch.cat([torch.arange(n), 8 + torch.arange(m)])
    h = F.max_pool2d(norm(dense.bn2, torch.cat([h, s], 1), keep), 4).flatten(1)
    columns = (keep[:, None] * 4 + torch.arange(4)).flatten()
    h = F.relu(norm(dense.bn3, F.linear(h, dense.fc1.weight[:k, columns], dense.fc1.bias[:k]), torch.arange(k)))
    return F.linear(h, dense.fc2.weight[:, :k], dense.fc2.bias)


def test_each_width_is_the_network_of_the_first_channels(dense: Any) -> None:
    x = images()
    model = copy.deepcopy(dense)
    weight = model.fc1.weight
    report = slimmable_(model, WIDTHS, example_inputs=x)
    assert model.fc1.weight is weight  # an optimizer goes on
    assert width_of(model) == 1
    assert widths_of(model) == WIDTHS
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x))
        for width in (0.5, 0.25, 1.0, 0.75):
            set_width(model, width)
            torch.testing.assert_close(model(x), by_hand(dense, x, width))
            assert model.fc1.inputs.count(width) == 4 * (first(8, width) + first(4, width))
    set_width(model, 0.5)
    assert "0.5" in repr(model.stem)
    assert model(x[:0]).shape == (0, 5)
    torch.testing.assert_close(model(x[:1]), by_hand(dense, x[:1], 0.5))
    strided = x.repeat(1, 1, 1, 2)[..., ::2]
    torch.testing.assert_close(model(strided), by_hand(dense, strided.contiguous(), 0.5))
    assert report.layers["stem"] == [2, 4, 6, 8]
    assert [cost.width for cost in report.costs] == list(WIDTHS)
    assert report.costs[-1].macs == count_macs(dense, x)[1]
    assert report.costs[-1].parameters == sum(p.numel() for p in dense.parameters())
    assert "'fc2': all neurons kept, they reach the model's output" in report.notes
    assert all(len(line) <= 100 for line in str(report).splitlines())


@pytest.mark.parametrize("universal", [False, True])
def test_export(dense: Any, universal: bool) -> None:
    x = images()
    model = copy.deepcopy(dense)
    slimmable_(model, WIDTHS, example_inputs=x, universal=universal)
    for width in WIDTHS:
        narrow: Any = export(model, width)
        assert not any(type(module).__name__.startswith("Slimmable") for module in narrow.modules())
        torch.testing.assert_close(narrow(x), by_hand(dense, x, width))
        with at_width(model, width):
            assert count_macs(model, x) == count_macs(narrow, x)
        assert narrow.depthwise.groups == first(8, width)
        assert not narrow.training
        narrow.stem.weight.data.zero_()  # shares nothing
        torch.testing.assert_close(export(model, width)(x), by_hand(dense, x, width))
    assert width_of(model) == 1
    model.train()
    model.fc1.weight.requires_grad_(False)
    narrow = export(model, 0.25)
    assert narrow.bn1.training
    assert narrow.stem.weight.requires_grad
    assert not narrow.fc1.weight.requires_grad


def test_an_exported_network_is_one_of_its_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LeNet300()
    x = torch.randn(3, 1, 28, 28)
    slimmable_(model, example_inputs=x)
    narrow = export(model, 0.25)
    same = LeNet300((75, 25))
    same.load_state_dict(narrow.state_dict())
    torch.testing.assert_close(same(x), narrow(x))
    # packs, saves, loads into the class of the original
    slim.prune_(narrow, slim.prune.Magnitude(sparsity=0.9))
    narrow.fc1 = slim.nn.SparseLinear.from_dense(narrow.fc1)  # type: ignore[arg-type]
    expected = narrow(x)
    slim.save(narrow, tmp_path / "narrow.slim")
    torch.testing.assert_close(slim.load(tmp_path / "narrow.slim", LeNet300())(x), expected)


def test_torch_export_and_compile(dense: Any) -> None:
    x = images()
    slimmable_(dense, example_inputs=x)
    set_width(dense, 0.5)
    expected = dense(x)
    batch = {"x": {0: torch.export.Dim("batch")}}
    for module in (dense, export(dense, 0.5).eval()):
        program = torch.export.export(module, (x,), dynamic_shapes=batch)
        torch.testing.assert_close(program.module()(x), expected)
        torch.testing.assert_close(program.module()(x[:3]), expected[:3])
    compiled = torch.compile(dense, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    set_width(dense, 0.25)
    torch.testing.assert_close(compiled(x), dense(x))


def test_other_networks() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 1, 32, 32)
    model: nn.Module = resnet18(10, 1, 8)
    slimmable_(model, example_inputs=x)
    narrow = resnet18(10, 1, 2).eval()
    narrow.load_state_dict(export(model, 0.25).state_dict())
    with at_width(model, 0.25):
        torch.testing.assert_close(narrow(x), model.eval()(x))
    x = torch.randn(2, 1, 28, 28)
    model = mobilenet_v1(10, 1, 0.25).eval()
    slimmable_(model, (0.5, 1.0), example_inputs=x)
    set_width(model, 0.5)
    torch.testing.assert_close(export(model)(x), model(x))
    sequence = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 5, 2)).eval()
    signal = torch.randn(4, 3, 7)
    expected = sequence(signal)
    slimmable_(sequence, example_inputs=signal)
    torch.testing.assert_close(sequence(signal), expected)
    with at_width(sequence, 0.25):
        assert isinstance(sequence[0], SlimmableConv1d)
        assert isinstance(sequence[1], SlimmableBatchNorm1d)
        torch.testing.assert_close(sequence(signal), export(sequence, 0.25)(signal))
    assert "slim.dynamic" not in str(type(export(sequence, 0.25)[0]))  # type: ignore[index]


def test_layers_left_out() -> None:
    """Zero padding ties the blocks of ResNet-20 in a way that cannot be cut; inside blocks it can."""
    x = torch.randn(2, 1, 8, 8)
    model = resnet20(10, 1, width=4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"does not run at width 0\.25.*filter_fn="):
        slimmable_(model, example_inputs=x)
    assert not any(isinstance(module, SlimmableConv2d) for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    report = slimmable_(model, example_inputs=x, filter_fn=lambda module, name: name.endswith("conv1"))
    assert sum(isinstance(module, SlimmableConv2d) for module in model.modules()) == 18
    assert sum(isinstance(module, SlimmableBatchNorm2d) for module in model.modules()) == 19  # what they see changes
    assert sum(min(counts) < max(counts) for counts in report.layers.values()) == 18
    with at_width(model, 0.25):
        assert model(x).shape == (2, 10)

    grouped = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 6, 1), nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 1),
        nn.Conv2d(6, 6, 1, padding_mode="reflect"), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    report = slimmable_(grouped, example_inputs=torch.randn(1, 2, 5, 5))
    assert list(report.layers) == ["6"]
    text = "; ".join(report.notes)
    for part in ("'0'", "'1'", "'2': all neurons kept, some of them", "'5' pads with other values"):
        assert part in text, part


def test_switchable_norms_keep_each_width_apart() -> None:
    torch.manual_seed(0)
    norm = SlimmableBatchNorm2d(8, widths=(0.5, 1.0))
    plain = {width: nn.BatchNorm2d(int(8 * width)) for width in (0.5, 1.0)}
    for step, width in enumerate((1.0, 0.5, 0.5, 1.0)):
        x = images(4, step, int(8 * width), 3) * 2 + 1
        norm.set_width(width)
        torch.testing.assert_close(norm(x), plain[width](x))
    norm.eval()
    for width, own in plain.items():
        own.eval()
        norm.set_width(width)
        x = images(4, 7, int(8 * width), 3)
        torch.testing.assert_close(norm(x), own(x))
        made = norm.export()
        for name, value in own.state_dict().items():
            torch.testing.assert_close(made.state_dict()[name], value)
    with pytest.raises(ValueError, match="expected a 4D tensor, got 2D"):
        norm(torch.zeros(2, 8))

    # channels that are not neighbours: the statistics are written back
    runs = Channels(((4, 1, True), (2, 2, False), (2, 2, True)))
    flat = SlimmableBatchNorm1d(12, widths=(0.5, 1.0), slim=runs, momentum=None)
    flat.set_width(0.5)
    one, two = torch.randn(6, 8), torch.randn(6, 8)
    flat(one)
    flat(two)
    reference = nn.BatchNorm1d(8, momentum=None)
    reference(one)
    reference(two)
    torch.testing.assert_close(flat.export().running_mean, reference.running_mean)
    torch.testing.assert_close(flat.export().running_var, reference.running_var)
    assert flat.running_mean is not None
    assert flat.running_mean[0, [2, 3, 10, 11]].eq(0).all()  # not there at this width
    without = SlimmableBatchNorm1d(4, affine=False, track_running_stats=False, widths=(0.5, 1.0)).eval()
    without.set_width(0.5)
    x = torch.randn(5, 2)
    torch.testing.assert_close(without(x), F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(without.export()(x), without(x))


def test_the_loss_and_its_gradients(dense: Any) -> None:
    """Against each width as a plain network of its own, whose gradients add up in the first channels."""
    x, labels = images(10), torch.arange(10) % 5
    slimmable_(dense, (0.25, 0.5, 1.0), example_inputs=x)
    dense.train()
    plain = {width: export(dense, width) for width in (1.0, 0.5, 0.25)}
    logits = {width: network(x) for width, network in plain.items()}
    teacher = logits[1.0].detach().softmax(1)
    expected = {1.0: F.cross_entropy(logits[1.0], labels)}
    for width in (0.5, 0.25):
        expected[width] = -(teacher * (logits[width].log_softmax(1) - teacher.log())).sum(1).mean()
    sum(expected.values()).backward()  # type: ignore[union-attr]

    twin = copy.deepcopy(dense)
    loss, whole = slimmable_loss(dense, x, labels)
    torch.testing.assert_close(whole, logits[1.0])
    torch.testing.assert_close(loss, sum(expected.values()))
    loss.backward()
    total = torch.zeros_like(dense.fc1.weight)
    for width, network in plain.items():
        columns = torch.cat([torch.arange(a, b) for a, b in dense.fc1.inputs.spans(width)])
        gradient: Any = network.fc1.weight.grad
        total[: len(gradient)][:, columns] += gradient
        row = (0.25, 0.5, 1.0).index(width)
        own: Any = network.bn2.weight.grad
        spread = torch.zeros(12)
        spread[[channel for a, b in dense.bn2.inputs.spans(width) for channel in range(a, b)]] = own
        torch.testing.assert_close(dense.bn2.weight.grad[row], spread)
    torch.testing.assert_close(dense.fc1.weight.grad, total)

    losses = sandwich_step(twin, x, labels)
    assert list(losses) == [1.0, 0.5, 0.25]
    for width, value in losses.items():
        torch.testing.assert_close(value, expected[width].detach())
    for (name, one), two in zip(dense.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)
    for one, two in zip(dense.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, two)
    assert width_of(dense) == 1

    scaled = copy.deepcopy(dense)
    scaled.zero_grad()
    seen: list[float] = []
    hard = sandwich_step(scaled, x, labels, distill=False, backward=lambda loss: seen.append(float(loss.detach())))
    assert scaled.fc1.weight.grad is None
    assert seen == [float(value) for value in hard.values()]
    torch.testing.assert_close(hard[0.25], F.cross_entropy(plain[0.25](x), labels).detach())


def test_training_brings_every_width_forward() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(256, 1, 8, 8), torch.arange(256) % 2
    x[labels == 1, :, :4] += 1
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 2)
    )
    slimmable_(model, example_inputs=x[:2], universal=True)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    draws = torch.Generator().manual_seed(0)
    for step in range(40):
        optimizer.zero_grad()
        batch = slice(64 * (step % 4), 64 * (step % 4) + 64)
        losses = sandwich_step(model, x[batch], labels[batch], generator=draws)
        assert len(losses) == 4
        optimizer.step()
    data = [(part, None) for part in x.split(64)]
    recalibrate_(model, data)
    for width in (0.25, 0.6, 1.0):
        if width == 0.6:
            recalibrate_(model, data, [width])
        with at_width(model.eval(), width):
            assert (model(x).argmax(1) == labels).float().mean() > 0.9, width


def test_recalibrated_statistics_are_the_mean_over_batches(dense: Any) -> None:
    x = images(12)
    slimmable_(dense, (0.25, 1.0), example_inputs=x, universal=True)
    set_width(dense, 0.6)
    with pytest.raises(ValueError, match=r"no statistics for 0\.6; call slimtorch\.dynamic\.recalibrate_"):
        dense(x)
    with pytest.raises(ValueError, match=r"no statistics for 0\.6"):
        export(dense)
    dense.train()
    dense(x)  # by its batch, and nothing is kept
    dense.eval()
    with pytest.raises(ValueError, match=r"no statistics for 0\.6"):
        dense(x)
    before = copy.deepcopy(dense.state_dict())
    recalibrate_(dense, iter(x.split(4)), [0.25, 0.6])  # an iterator serves for both
    assert width_of(dense) == 0.6
    assert not dense.bn1.training
    assert dense.bn1.momentum == 0.1
    with torch.no_grad():
        for width in (0.25, 0.6):
            set_width(dense, width)
            h = [dense.stem(part) for part in x.split(4)]
            narrow: Any = export(dense)
            torch.testing.assert_close(narrow.bn1.running_mean, torch.stack([a.mean((0, 2, 3)) for a in h]).mean(0))
            torch.testing.assert_close(narrow.bn1.running_var, torch.stack([a.var((0, 2, 3)) for a in h]).mean(0))
            torch.testing.assert_close(narrow(x), dense(x))
    assert torch.equal(before["bn1.running_mean"][1], dense.bn1.running_mean[1])  # width 1 has its own still
    half = copy.deepcopy(dense).to(torch.bfloat16)  # the width of the statistics is not rounded
    set_width(half, 0.6)
    assert half(x.to(torch.bfloat16)).isfinite().all()

    state = copy.deepcopy(dense.state_dict())
    for data, message in (([], "at least one batch"), ([x, x[:, :1]], "channels")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            recalibrate_(dense, data, [0.25, 0.7])
        assert all(torch.equal(state[key], value) for key, value in dense.state_dict().items())
        assert dense.bn1.momentum == 0.1
        assert not dense.bn1.training
    with pytest.raises(ValueError, match="at most one beside"):
        recalibrate_(dense, [x], [0.6, 0.7])


def test_drop_in(dense: Any) -> None:
    x = images()
    model = Slimmable(dense, example_inputs=x)
    assert model.widths == WIDTHS
    model.set_width(0.5)
    assert model.width == 0.5
    expected = model(x)
    twin = copy.deepcopy(model)
    twin.set_width(0.25)
    assert model.width == 0.5
    torch.testing.assert_close(model(x), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = Slimmable(Net(), example_inputs=x).eval()
    fresh.load_state_dict(torch.load(buffer))
    fresh.set_width(0.5)
    torch.testing.assert_close(fresh(x), expected)
    torch.testing.assert_close(fresh.export()(x), expected)
    torch.testing.assert_close(fresh.export(0.25)(x), twin(x))
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(wide(x.double()), expected.double(), rtol=1e-4, atol=1e-4)
    assert wide.export().fc1.weight.dtype == torch.float64
    changed = torch.func.functional_call(model, {"model.fc2.bias": torch.full((5,), 7.0)}, (x,))
    torch.testing.assert_close(changed - 7, expected - dense.fc2.bias)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.1)
    model.recalibrate_([x], [0.5])
    assert not torch.allclose(model(x), expected)
    assert model.report.parameters == sum(p.numel() for p in model.parameters())


def test_widths_of_a_step(dense: Any) -> None:
    x = images()
    listed, universal = copy.deepcopy(dense), copy.deepcopy(dense)
    slimmable_(listed, WIDTHS, example_inputs=x)
    slimmable_(universal, (0.25, 1.0), example_inputs=x, universal=True)
    assert sandwich_widths(listed) == (1.0, 0.75, 0.5, 0.25)
    assert sandwich_widths(listed, 0) == (1.0, 0.25)
    draws = torch.Generator().manual_seed(0)
    assert {sandwich_widths(listed, 1, draws) for _ in range(20)} == {(1.0, 0.75, 0.25), (1.0, 0.5, 0.25)}
    found = [sandwich_widths(universal, generator=draws) for _ in range(50)]
    assert all(len(own) == 4 and own[0] == 1 and own[-1] == 0.25 for own in found)
    between = [width for own in found for width in own[1:-1]]
    assert all(0.25 <= width <= 1 for width in between)
    assert min(between) < 0.35
    assert max(between) > 0.9
    assert sandwich_widths(universal, 3, torch.Generator().manual_seed(1)) == sandwich_widths(
        universal, 3, torch.Generator().manual_seed(1)
    )
    for samples, error in ((-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="samples: expected"):
            sandwich_widths(listed, samples)  # type: ignore[arg-type]


def test_single_layers() -> None:
    torch.manual_seed(0)
    linear = SlimmableLinear(8, 6, widths=(0.5, 1.0), slim_out=False)
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias))
    linear.set_width(0.5)
    torch.testing.assert_close(linear(x[..., :4]), F.linear(x[..., :4], linear.weight[:, :4], linear.bias))
    alone = export(linear, 0.5)
    assert isinstance(alone, nn.Linear)
    torch.testing.assert_close(alone(x[..., :4]), linear(x[..., :4]))
    convolution = SlimmableConv2d(4, 6, 3, stride=2, padding="valid", bias=False, widths=(0.5, 1.0))
    convolution.set_width(0.5)
    image = torch.randn(2, 2, 7, 7)
    expected = F.conv2d(image, convolution.weight[:3, :2], stride=2)
    torch.testing.assert_close(convolution(image), expected)
    torch.testing.assert_close(convolution.export()(image), expected)
    assert Channels.plain(1).count(0.01) == 1
    with pytest.raises(ValueError, match=r"groups: expected 1, or a depthwise convolution with 4, got 2"):
        SlimmableConv2d(4, 4, 3, groups=2)
    with pytest.raises(ValueError, match="padding_mode: expected 'zeros', got 'circular'"):
        SlimmableConv2d(4, 4, 3, padding_mode="circular")
    with pytest.raises(ValueError, match="slim_out: expected a depthwise"):
        SlimmableConv2d(4, 4, 3, groups=4, slim_out=False)
    with pytest.raises(ValueError, match="slim_in: expected 8 channels, got 4"):
        SlimmableLinear(8, 4, slim_in=Channels.plain(4))
    with pytest.raises(TypeError, match="slim_out: expected True, False or Channels"):
        SlimmableLinear(8, 4, slim_out=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("widths", "error", "message"),
    [
        ((0.5,), ValueError, r"expected 1\.0, the whole network"),
        ((), ValueError, r"expected 1\.0"),
        ((0.0, 1.0), ValueError, r"expected numbers in \(0, 1\], got 0\.0"),
        ((0.5, 2.0), ValueError, r"got 2\.0"),
        ((0.5, 0.5, 1.0), ValueError, "each one once"),
        ((True, 0.5), TypeError, "got True"),
        ((float("nan"), 1.0), ValueError, "got nan"),
        ("1", TypeError, "expected a sequence"),
        (0.5, TypeError, "expected a sequence"),
    ],
)
def test_bad_widths(widths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"widths: .*{message}"):
        slimmable_(LeNet5(), widths, example_inputs=torch.zeros(1, 1, 28, 28))


def test_bad_input(dense: Any) -> None:
    x = images()
    with pytest.raises(TypeError, match="universal: expected True or False"):
        slimmable_(dense, example_inputs=x, universal=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="example_inputs: do not fit"):
        slimmable_(dense, example_inputs=x[:, :1])
    with pytest.raises(ValueError, match="no layer of it can become narrower: '': all neurons kept"):
        slimmable_(nn.Linear(3, 2), example_inputs=torch.zeros(1, 3))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        set_width([1], 0.5)  # type: ignore[arg-type]
    for function in (width_of, widths_of, export):
        with pytest.raises(ValueError, match=r"no layer of it is slimmable; call slimtorch\.dynamic\.slimmable_"):
            function(dense)
    masked = copy.deepcopy(dense)
    slim.prune_(masked, slim.prune.Magnitude(sparsity=0.5))
    with pytest.raises(ValueError, match=r"has masks or other parametrizations; call slimtorch\.prune\.bake_"):
        slimmable_(masked, example_inputs=x)
    slimmable_(dense, example_inputs=x)
    with pytest.raises(ValueError, match="model: is slimmable already"):
        slimmable_(dense, example_inputs=x)
    with pytest.raises(ValueError, match=r"width: expected one of 0\.25, 0\.5, 0\.75, 1, got 0\.3"):
        set_width(dense, 0.3)
    with pytest.raises(TypeError, match=r"width: expected a number, got '0\.5'"):
        set_width(dense, "0.5")  # type: ignore[arg-type]
    dense.stem.set_width(0.5)
    with pytest.raises(ValueError, match=r"different widths: 0\.5, 1"):
        width_of(dense)
    set_width(dense, 1)
    with pytest.raises(ValueError, match=r"logits"):
        slimmable_loss(nn.Sequential(dense, nn.Unflatten(1, (5, 1))), x, torch.zeros(6, 1, dtype=torch.long))
    assert width_of(dense) == 1
    free = Net()
    slimmable_(free, (0.5, 1.0), example_inputs=x, universal=True)
    with pytest.raises(ValueError, match=r"width: expected a number from 0\.5 to 1, got 0\.4"):
        set_width(free, 0.4)


def test_an_error_inside_gives_the_width_back(dense: Any) -> None:
    slimmable_(dense, example_inputs=images())
    with pytest.raises(RuntimeError), at_width(dense, 0.25):
        dense(images()[:, :1])
    assert width_of(dense) == 1


def test_a_transposed_flattening_is_refused() -> None:
    """Channels last before the flattening: the neurons of the convolution alternate in the columns."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.fc1 = nn.Linear(16, 6)
            self.fc2 = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(torch.relu(self.fc1(self.conv(x).permute(0, 2, 3, 1).flatten(1))))

    model = Last().eval()
    x = torch.randn(2, 1, 4, 4)
    expected = model(x)
    with pytest.raises(ValueError, match=r"mixes channels .*; leave the layers concerned out with filter_fn="):
        slimmable_(model, (0.5, 1.0), example_inputs=x)
    torch.testing.assert_close(model(x), expected)
    report = slimmable_(model, (0.5, 1.0), example_inputs=x, filter_fn=lambda module, name: name == "fc1")
    assert list(report.layers) == ["fc1"]
    torch.testing.assert_close(model(x), expected)
    with at_width(model, 0.5):
        assert isinstance(model.conv, nn.Conv2d)
        torch.testing.assert_close(export(model)(x), model(x))


def test_a_cumulative_average_goes_on() -> None:
    """Without a momentum a batch norm weighs by how many batches it has seen; those before count too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(16, 4)
    for shift in range(3):
        model(x + shift)
    twin: Any = copy.deepcopy(model)
    slimmable_(model, (0.5, 1.0), example_inputs=x)
    model.train()
    model(x + 5)
    twin(x + 5)
    whole: Any = export(model, 1.0)
    torch.testing.assert_close(whole[1].running_mean, twin[1].running_mean)
    torch.testing.assert_close(whole[1].running_var, twin[1].running_var)
    assert int(whole[1].num_batches_tracked) == int(twin[1].num_batches_tracked) == 4
    with at_width(model, 0.5):
        model(x + 5)
    narrow: Any = export(model, 0.5)
    torch.testing.assert_close(narrow[1].running_mean, twin[1].running_mean[:4])


def test_torch_export_of_any_width(dense: Any) -> None:
    """A universal network at a width that has its statistics from `recalibrate_`, and at one that has none."""
    x = images(12)
    slimmable_(dense, (0.25, 1.0), example_inputs=x, universal=True)
    recalibrate_(dense, [x], [0.6])
    fresh = Net().eval()
    slimmable_(fresh, (0.25, 1.0), example_inputs=x, universal=True)
    fresh.load_state_dict(dense.state_dict())
    for model in (dense, fresh):
        set_width(model, 0.6)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
        for count in (12, 3):
            torch.testing.assert_close(program.module()(x[:count]), model(x[:count]))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x))
        set_width(model, 0.7)
        with pytest.raises(ValueError, match=r"no statistics for 0\.7"):
            torch.export.export(model, (x,))


def test_export_of_each_dtype() -> None:
    """The plain network of a width has the very numbers of the slimmable one, whatever their type."""
    torch.manual_seed(0)
    networks: list[tuple[nn.Module, Tensor]] = [
        (LeNet300(), torch.randn(4, 1, 28, 28)),
        (LeNet5(), torch.randn(4, 1, 28, 28)),
        (resnet18(10, 1, 8), torch.randn(4, 1, 32, 32)),
    ]
    for model, x in networks:
        slimmable_(model.eval(), WIDTHS, example_inputs=x)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            model.to(dtype)
            for width in WIDTHS:
                set_width(model, width)
                torch.testing.assert_close(export(model)(x.to(dtype)), model(x.to(dtype)))


def test_modules_used_twice_and_parameters_shared() -> None:
    class Twice(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.inner = nn.Linear(8, 8)
            self.other = nn.Linear(8, 8) if tied else self.inner
            self.other.weight = self.inner.weight
            self.last = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.other(torch.relu(self.inner(torch.relu(self.first(x))))))

    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model = Twice(tied=False)
    weight, expected = model.inner.weight, model(x)
    slimmable_(model, (0.5, 1.0), example_inputs=x)
    assert model.inner is model.other
    assert model.inner.weight is weight
    torch.testing.assert_close(model(x), expected)
    set_width(model, 0.5)
    narrow: Any = export(model)
    assert narrow.inner is narrow.other
    torch.testing.assert_close(narrow(x), model(x))
    h = torch.relu(F.linear(x, model.first.weight[:4], model.first.bias[:4]))
    for end in (torch.relu, torch.Tensor.clone):
        h = end(F.linear(h, weight[:4, :4], model.inner.bias[:4]))
    torch.testing.assert_close(model(x), F.linear(h, model.last.weight[:, :4], model.last.bias))
    with pytest.raises(ValueError, match="a parameter of 'inner' is shared between layers"):
        slimmable_(Twice(tied=True), (0.5, 1.0), example_inputs=x)


def test_norms_over_channels_keep_them_whole() -> None:
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    report = slimmable_(model, example_inputs=x)
    assert list(report.layers) == ["3"]
    assert any("'0': all neurons kept" in note and "LayerNorm" in note for note in report.notes)
    with at_width(model, 0.25):
        torch.testing.assert_close(export(model)(x), model(x))


def test_gradients_of_several_batches_add_up_and_momentum_goes_on() -> None:
    """As one step of the sums; what is outside of a width has a gradient of zero from it, not none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x, labels = torch.randn(8, 4), torch.arange(8) % 2
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)  # made before: the parameters stay the same
    slimmable_(model, (0.5, 1.0), example_inputs=x)
    twin = copy.deepcopy(model)
    other = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        for half in (slice(0, 4), slice(4, 8)):
            sandwich_step(model, x[half], labels[half], backward=lambda loss: (loss / 2).backward())
        sandwich_step(twin, x, labels)
        for one, two in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad)
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    with at_width(twin, 0.5):
        twin(x).sum().backward()
    first: Any = twin[0]
    assert first.weight.grad[4:].eq(0).all()
    assert first.weight.grad[:4].ne(0).any()


def test_other_parametrizations_and_wrong_inputs(dense: Any) -> None:
    x = torch.randn(2, 4)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="layer '0' has masks or other parametrizations"):
        slimmable_(normed, example_inputs=x)
    slimmable_(dense, example_inputs=images())
    for width in (0.0, -0.5, 1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"width: expected one of 0\.25, 0\.5, 0\.75, 1, got"):
            set_width(dense, width)
    assert width_of(dense) == 1


def test_saved_with_all_its_widths(dense: Any, tmp_path: Path) -> None:
    x = images()
    model = Slimmable(dense, example_inputs=x)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    slim.save(model, tmp_path / "model.slim")
    loaded = slim.load(tmp_path / "model.slim", Slimmable(Net().eval(), example_inputs=x))
    for other in (torch.load(buffer, weights_only=False), loaded):
        for width in WIDTHS:
            model.set_width(width)
            other.set_width(width)
            assert torch.equal(other(x), model(x))
