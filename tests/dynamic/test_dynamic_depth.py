# SPDX-License-Identifier: Apache-2.0
"""DynamicDepth: every sample takes its own path, whatever batch it comes in, and what it skips is not computed."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.dynamic import DynamicDepth, PooledGate, StochasticDepth, drop_layers_
from slimtorch.measure import count_macs
from slimtorch.models.resnet import _cifar


class Plain(nn.Module):
    """A residual block that says nothing about itself, without batch norm: the same in training and evaluation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


def decided(model: DynamicDepth, seed: int = 0) -> DynamicDepth:
    """Gates that let some samples through and others not."""
    torch.manual_seed(seed)
    for gate in model.gates:
        assert isinstance(gate, PooledGate)
        nn.init.normal_(gate.hidden.weight, std=3)
        nn.init.normal_(gate.score.weight)
        nn.init.zeros_(gate.score.bias)
    return model


def images(count: int, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(count, 2, 8, 8) * (0.3 + torch.rand(count, 1, 1, 1)) + torch.randn(count, 2, 1, 1)


@pytest.fixture
def model() -> DynamicDepth:
    torch.manual_seed(2)
    network = _cifar(14, 5, 2, None, 4)
    made = decided(DynamicDepth(network, images(2)))
    made.train()
    for _ in range(3):
        made(images(16))  # batch norms see something
    return made.eval()


def alone(model: DynamicDepth, x: Tensor) -> tuple[Tensor, list[list[bool]]]:
    """The definition: sample by sample, block by block."""
    outputs, paths = [], []
    with torch.no_grad():
        for sample in x.split(1):
            h, path = sample, []
            for name, module in model.model.named_children():
                if name in model.blocks:
                    path.append(float(model.gates[len(path)](h)) >= 0)
                    own: Any = module
                    y = own.bn2(own.conv2(torch.relu(own.bn1(own.conv1(h)))))
                    h = torch.relu(own.shortcut(h) + y) if path[-1] else torch.relu(own.shortcut(h))
                else:
                    h = module(h)
            outputs.append(h)
            paths.append(path)
    return torch.cat(outputs), paths


def test_each_sample_takes_its_own_path(model: DynamicDepth) -> None:
    x = images(23)
    expected, paths = alone(model, x)
    assert len({tuple(path) for path in paths}) > 2  # or the test would see nothing
    sizes: dict[str, list[int]] = {name: [] for name in model.blocks}
    for name in model.blocks:
        convolution = model.model.get_submodule(name).conv1
        convolution.register_forward_pre_hook(lambda _, args, name=name: sizes[name].append(len(args[0])))  # type: ignore
    found = model(x)
    torch.testing.assert_close(found, expected)
    assert [sum(sizes[name]) for name in model.blocks] == [sum(column) for column in zip(*paths, strict=True)]
    run = model.run(x)
    assert run.ran.tolist() == paths
    assert torch.equal(run.logits, found)


@pytest.mark.parametrize("size", [1, 2, 7, 23])
def test_the_batch_does_not_matter(model: DynamicDepth, size: int) -> None:
    x = images(23)
    whole = model.run(x)
    parts = [model.run(part) for part in x.split(size)]
    assert torch.equal(torch.cat([part.ran for part in parts]), whole.ran)
    assert torch.equal(torch.cat([part.macs for part in parts]), whole.macs)
    torch.testing.assert_close(torch.cat([part.logits for part in parts]), whole.logits)
    backwards = model.run(x.flip(0))
    assert torch.equal(backwards.ran.flip(0), whole.ran)


class Wobbly(nn.Module):
    """A gate whose rounding depends on the batch, exaggerated so that it shows."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.new_full((len(x), 1), -5e-5 if len(x) % 2 else 5e-5)


def test_a_score_next_to_the_threshold_is_decided_by_the_sample_alone() -> None:
    model = DynamicDepth(_cifar(8, 5, 2, None, 4), images(2), gate=Wobbly).eval()
    for size in (1, 2, 3, 4):
        assert not model.run(images(size)).ran.any()
    model.margin = 0.0
    assert [bool(model.run(images(size)).ran.any()) for size in (1, 2, 3, 4)] == [False, True, False, True]


def test_a_sample_alone_is_laid_out_like_any_other(model: DynamicDepth) -> None:
    """Kernels round by the place in memory too, so that a view into a batch is no argument for another path."""
    seen: list[bool] = []
    model.model[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous() and args[0].data_ptr() % 64 == 0)
    )
    x = images(1)
    expected = model(x)
    for offset in (1, 4, 8):
        moved = torch.empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)
        assert torch.equal(model(moved), expected)
    assert torch.equal(model(x.to(memory_format=torch.channels_last)), expected)
    assert all(seen)


def test_macs_are_those_of_the_blocks_that_ran(model: DynamicDepth) -> None:
    x = images(23)
    run = model.run(x)
    gates = sum(gate.hidden.weight.numel() + gate.score.weight.numel() for gate in model.gates)  # type: ignore
    for sample, ran, macs in zip(x.split(1), run.ran, run.macs, strict=True):
        kept = [name for name, own in zip(model.blocks, ran.tolist(), strict=True) if own]
        if kept:
            fewer = copy.deepcopy(model.model)
            drop_layers_(fewer, kept)
            assert int(macs) == count_macs(fewer, (sample,))[0] + gates
    report = model.report([(x[:10], torch.zeros(10).long()), (x[10:], torch.zeros(13).long())])
    assert report.macs == pytest.approx(float(run.macs.double().mean()))
    assert report.macs_whole == count_macs(model.model, (x[:1],))[0]
    assert report.share == pytest.approx(run.ran.double().mean(0).tolist())
    assert report.depths == tuple(int((run.ran.sum(1) == depth).sum()) for depth in range(7))
    assert report.paths == len({tuple(row) for row in run.ran.tolist()})
    assert report.accuracy == float((run.logits.argmax(1) == 0).double().mean())
    assert report.samples == 23
    assert f"{report.accuracy:.2%}" in str(report)
    assert model.report([x]).accuracy is None


def test_a_threshold_for_a_share_of_computation(model: DynamicDepth) -> None:
    x = images(16)
    costs = torch.tensor([count_macs(block, (h,))[0] for block, h in _inputs_of_blocks(model, x[:1])]).double()
    shares = []
    for share in (0.0, 0.4, 0.8, 1.0):
        found = model.calibrate_([x[:9], (x[9:], None)], share)
        ran = model.run(x).ran.double()
        assert found == pytest.approx(float((ran @ (costs / costs.sum())).mean()))
        assert found <= share
        threshold = float(model.threshold)
        if 0 < share < 1:
            model.threshold.fill_(threshold - 1e-3)  # a little lower: a score on the other side
            while (more := float((model.run(x).ran.double() @ (costs / costs.sum())).mean())) == found:
                model.threshold.sub_(0.2)
            assert more > share
            model.threshold.fill_(threshold)
        shares.append(found)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert shares == sorted(shares)
    model.calibrate_([x], 0.4)
    whole = model.run(x).ran
    assert 0 < whole.double().mean() < 1
    assert torch.equal(torch.cat([model.run(sample).ran for sample in x.split(1)]), whole)
    with torch.no_grad():
        torch.testing.assert_close(model(x[:1]), model(x)[:1])
    model.calibrate_([x], 0.3)
    fresh = DynamicDepth(_cifar(14, 5, 2, None, 4), x).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.run(x).ran, model.run(x).ran)
    with pytest.raises(ValueError, match=r"share: expected a number in \[0, 1\], got 1.5"):
        model.calibrate_([x], 1.5)
    with pytest.raises(ValueError, match="data: expected at least one sample, got none"):
        model.calibrate_([], 0.5)


def _inputs_of_blocks(model: DynamicDepth, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    found = []
    for name, module in model.model.named_children():
        if name in model.blocks:
            found.append((module, x))
        x = module(x)
    return found


def test_a_projection_shortcut_is_no_saving() -> None:
    torch.manual_seed(0)
    network = slim.models.resnet18(5, 2, width=4)
    x = torch.randn(9, 2, 32, 32)
    model = decided(DynamicDepth(network, x)).eval()
    run = model.run(x)
    assert run.ran.any()
    assert not run.ran.all()
    for sample, ran, macs in zip(x.split(1), run.ran, run.macs, strict=True):
        kept = [name for name, own in zip(model.blocks, ran.tolist(), strict=True) if own]
        fewer = copy.deepcopy(network)
        if kept:
            drop_layers_(fewer, kept)
            gates = sum(count_macs(gate, (torch.zeros(1, gate.hidden.in_features),))[0] for gate in model.gates)  # type: ignore
            assert int(macs) == count_macs(fewer, (sample,))[0] + gates


def test_training_applies_the_hard_decisions() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 6), nn.Sequential(Plain(6), Plain(6)), nn.Linear(6, 4))
    x = torch.randn(20, 3)
    model = DynamicDepth(network, x, blocks="1.*", sampling="straight-through")
    assert model.blocks == ("1.0", "1.1")
    decided(model)
    trained = model(x)
    share = model.computed().detach()
    run = model.run(x)
    assert 0 < run.ran.float().mean() < 1
    torch.testing.assert_close(trained, run.logits)  # nothing here differs between training and evaluation
    assert float(share) == pytest.approx(float(run.ran.float().mean()))  # both blocks cost the same
    assert float(model.penalty().detach()) == pytest.approx((float(share) - 0.5) ** 2)
    model.per_block, model.penalty_weight = True, 3.0
    each = (run.ran.float().mean(0) - 0.5) ** 2
    assert float(model.penalty().detach()) == pytest.approx(3 * float(each.mean()))


def test_the_gradient_is_that_of_the_soft_decision() -> None:
    torch.manual_seed(0)
    block, x = Plain(4), torch.randn(5, 4)
    model = DynamicDepth(nn.Sequential(block), x, blocks="0", sampling="straight-through", temperature=0.7)
    weight = torch.randn(5, 4)
    (model(x) * weight).sum().backward()
    gate = model.gates[0]
    assert isinstance(gate, PooledGate)
    soft = torch.sigmoid(gate(x) / 0.7)
    slope = soft * (1 - soft) / 0.7 * ((block(x) - x) * weight).sum(1)
    assert gate.score.bias.grad is not None
    torch.testing.assert_close(gate.score.bias.grad, slope.sum().detach().reshape(1))


def test_gumbel_draws_by_the_score() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 4)
    model = DynamicDepth(nn.Sequential(Plain(4)), x, blocks="0")
    assert isinstance(model.gates[0], PooledGate)
    nn.init.zeros_(model.gates[0].score.weight)
    model(x)
    assert float(model.computed().detach()) == pytest.approx(0.85, abs=0.02)  # the share it starts with, not 1
    model.sampling = "straight-through"
    model(x)
    assert float(model.computed().detach()) == pytest.approx(1)


def test_the_penalty_draws_to_the_target() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    model = DynamicDepth(nn.Sequential(Plain(4), Plain(4)), x, blocks="*", target=0.3)
    optimizer = torch.optim.Adam(model.gates.parameters(), lr=0.02)
    for _ in range(100):
        model(x)
        optimizer.zero_grad()
        model.penalty().backward()
        optimizer.step()
    assert float(model.computed().detach()) == pytest.approx(0.3, abs=0.08)


def test_nan_runs_and_stays_with_its_sample(model: DynamicDepth) -> None:
    x = images(6)
    clean = model.run(x)
    x[2] = torch.nan
    run = model.run(x)
    assert run.ran[2].all()
    assert run.logits[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(run.ran[others], clean.ran[others])
    torch.testing.assert_close(run.logits[others], clean.logits[others])


def test_drop_in(model: DynamicDepth) -> None:
    x = images(9)
    expected = model(x)
    assert model(images(0)).shape == (0, 5)
    assert model.run(images(0)).ran.shape == (0, 6)
    wide = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(wide), expected)
    assert torch.equal(model.run(wide[:1]).ran, model.run(x).ran[:1])
    model.train()(x)  # holds a graph now
    model.eval()
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), model(x))
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), model(x))
    with pytest.raises(RuntimeError, match="no forward in training mode"):
        copied.penalty()
    fresh = DynamicDepth(_cifar(14, 5, 2, None, 4), x).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.run(x).ran, model.run(x).ran)
    torch.testing.assert_close(fresh(x), model(x))
    mixed = model.to(torch.float64)
    assert mixed(x.double()).dtype == torch.float64
    (model(x.double().requires_grad_()).sum()).backward()  # evaluation, with gradients
    assert model.model[0].weight.grad is not None


def test_autocast(model: DynamicDepth) -> None:
    x = images(9)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), model.run(x).logits.float())
        model.train()(x).sum().backward()
    assert float(model.penalty().detach()) >= 0


def test_packed_layers_inside(model: DynamicDepth, tmp_path: Path) -> None:
    x = images(9)
    slim.prune_(model, {"model.*": slim.prune.Magnitude(0.8)}, filter_fn=lambda m, _: isinstance(m, nn.Conv2d))
    slim.prune.bake_(model)
    expected = model.run(x)
    report = slim.pack_(model, (x,), formats="sparse", objective="size", time_budget=0.5, min_gain=1e9)
    assert any(layer.name.startswith("model.") and ".conv" in layer.name for layer in report.packed)
    found = model.run(x)
    assert torch.equal(found.ran, expected.ran)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert int(found.macs.sum()) < int(expected.macs.sum())  # zeros are not multiplied
    slim.save(model, tmp_path / "model.slim")
    loaded = slim.load(tmp_path / "model.slim", DynamicDepth(_cifar(14, 5, 2, None, 4), x)).eval()
    assert isinstance(loaded, DynamicDepth)
    assert torch.equal(loaded.run(x).ran, found.ran)
    torch.testing.assert_close(loaded(x), found.logits)


def _export(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    batch = torch.export.Dim("batch", min=1, max=4096)
    return torch.export.export(module, (x,), dynamic_shapes=({0: batch},)).module()  # type: ignore[return-value]


def test_segments_are_exported_as_one_graph_each() -> None:
    torch.manual_seed(0)
    model = decided(DynamicDepth(_cifar(8, 5, 2, None, 4), images(2))).eval()
    x = images(11)
    assert 0 < float(model.run(x).ran.float().mean()) < 1
    assert list(model.segments())[:4] == ["0", "gate:3", "block:3", "skip:3"]
    assert list(model.segments())[-1] == "6"
    with torch.no_grad():
        exported = model.prepare(_export, x[:3])
        for size in (1, 2, 11):
            torch.testing.assert_close(exported(x[:size]), model(x[:size]))


def test_segments_are_compiled_without_a_break() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 6), Plain(6), Plain(6))
    model = decided(DynamicDepth(network, torch.randn(2, 3), blocks=["1", "2"]))
    x = torch.randn(12, 3)
    model.eval()

    def convert(module: nn.Module, _: Tensor) -> Callable[[Tensor], Tensor]:
        return torch.compile(module, fullgraph=True, dynamic=True, backend="eager")  # type: ignore[return-value]

    with torch.no_grad():
        compiled = model.prepare(convert, x)
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_mobilenet_blocks_by_name() -> None:
    torch.manual_seed(0)
    network = slim.models.mobilenet_v2(4, 1, width=0.25)
    names = [name for name, module in network.named_children() if getattr(module, "adds", False)]
    x = torch.randn(5, 1, 32, 32)
    model = decided(DynamicDepth(network, x, blocks=names)).eval()
    assert len(model.blocks) == len(names) == 11
    run = model.run(x)
    assert torch.equal(torch.cat([model.run(sample).ran for sample in x.split(1)]), run.ran)
    with pytest.raises(ValueError, match=r"blocks: '4' \(InvertedResidual\) turns \[1, 8, 16, 16\] into"):
        DynamicDepth(network, x, blocks="4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0}, r"target: expected a share in \(0, 1\], got 0.0"),
        ({"target": 1.5}, "target: expected a share"),
        ({"penalty_weight": -1.0}, "penalty_weight: expected a number from 0 on, got -1.0"),
        ({"temperature": 0.0}, "temperature: expected a number above 0, got 0.0"),
        ({"sampling": "soft"}, "sampling: expected 'gumbel' or 'straight-through', got 'soft'"),
        ({"blocks": "33"}, "blocks: '33' matches nothing that the model runs; closest names: '3'"),
        ({"blocks": []}, "blocks: expected at least one name, got none"),
        ({"blocks": "1"}, "blocks: 1 multiply nothing"),
        ({"blocks": "0"}, r"blocks: '0' \(Conv2d\) turns \[1, 2, 8, 8\] into \[1, 4, 8, 8\]"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicDepth(_cifar(8, 5, 2, None, 4), images(2), **options)


def test_bad_input(model: DynamicDepth) -> None:
    with pytest.raises(TypeError, match=r"model: expected an nn.Sequential, got LeNet5"):
        DynamicDepth(slim.models.LeNet5(), images(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: expected residual blocks with methods branch and join, got none"):
        DynamicDepth(slim.models.conv2(size=8, channels=2), images(2))
    with pytest.raises(TypeError, match="blocks: expected globs of names, got 3"):
        DynamicDepth(model.model, images(2), blocks=[3])  # type: ignore[list-item,arg-type]
    with pytest.raises(TypeError, match="example_inputs: expected a tensor"):
        DynamicDepth(model.model, [images(2)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"example_inputs: expected a batch .* of at least 1"):
        DynamicDepth(model.model, images(0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data: expected at least one sample, got none"):
        model.report([])
    wrong = DynamicDepth(_cifar(8, 5, 2, None, 4), images(2), gate=lambda channels: nn.Flatten())
    with pytest.raises(ValueError, match=r"gate: expected one score for each of 3 samples, got \[3, 256\]"):
        wrong(images(3))


class _Sevenfold(nn.Sequential):
    """More than its modules in a row."""

    def forward(self, x: Tensor) -> Tensor:
        return 7 * super().forward(x)


@pytest.mark.parametrize("wrapper", [lambda network: DynamicDepth(network, images(2)), StochasticDepth])
def test_a_network_that_is_more_than_its_modules_is_refused(wrapper: Callable[[nn.Sequential], nn.Module]) -> None:
    network = _cifar(8, 5, 2, None, 4)
    with pytest.raises(ValueError, match="model: expected modules that run one after the other, got a _Sev"):
        wrapper(_Sevenfold(*network.children()))
    inner = nn.Sequential(OrderedDict(body=network))
    handle = network.register_forward_hook(lambda module, args, output: output + 1)
    for hooked, place in ((network, "model"), (inner, "model.body")):
        with pytest.raises(ValueError, match=f"{place}: expected .* got a Sequential with hooks of its own"):
            wrapper(hooked)
    handle.remove()
    assert wrapper(inner).eval()(images(3)).shape == (3, 5)


def test_an_empty_batch_costs_nothing() -> None:
    torch.manual_seed(0)
    for per_block in (False, True):
        options: dict[str, Any] = {"blocks": "*", "per_block": per_block, "penalty_weight": 2.0}
        model = DynamicDepth(nn.Sequential(Plain(4), Plain(4)), torch.randn(2, 4), **options)
        assert model(torch.randn(0, 4)).shape == (0, 4)
        assert float(model.computed()) == 0
        model.penalty().backward()
        for parameter in model.gates.parameters():
            assert parameter.grad is not None
            assert parameter.grad.eq(0).all()


def test_a_block_that_stands_there_twice() -> None:
    """Two places, two gates, one block."""
    torch.manual_seed(0)
    block, x = Plain(4), torch.randn(30, 4)
    model = decided(DynamicDepth(nn.Sequential(block, nn.Sequential(block)), x, blocks=["0", "1.0"])).eval()
    ran = model.run(x).ran
    assert len({tuple(row) for row in ran.tolist()}) > 2
    times = ran.sum(1)
    expected = torch.stack([x, block(x), block(block(x))], 1)[torch.arange(30), times]
    torch.testing.assert_close(model(x), expected)


def test_only_the_gates_learn_in_a_frozen_network() -> None:
    network = _cifar(8, 5, 2, None, 4).requires_grad_(False)
    model = DynamicDepth(network, images(2))
    model(images(4)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.gates.parameters())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_no_parameter_goes_unused_in_training(tmp_path: Path) -> None:
    model = DynamicDepth(_cifar(8, 5, 2, None, 4), images(2))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model.train())
        for _ in range(2):  # the second finds out whether the first left something open
            (wrapped(images(6)).sum() + model.penalty()).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_arguments_of_another_kind(model: DynamicDepth) -> None:
    for options, message in [
        ({"target": "0.5"}, "target: expected a number, got '0.5'"),
        ({"target": True}, "target: expected a number, got True"),
        ({"penalty_weight": None}, "penalty_weight: expected a number, got None"),
        ({"temperature": "1"}, "temperature: expected a number, got '1'"),
        ({"gate": 3}, "gate: expected a function of the channels or None, got 3"),
        ({"gate": lambda channels: channels}, "gate: expected a module for 4 channels, got 4"),
    ]:
        with pytest.raises(TypeError, match=message):
            DynamicDepth(_cifar(8, 5, 2, None, 4), images(2), **options)
    with pytest.raises(TypeError, match=r"share: expected a number, got '0\.5'"):
        model.calibrate_([images(2)], "0.5")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"survival: expected a number, got '0\.5'"):
        StochasticDepth(_cifar(8, 5, 2, None, 4), "0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data: expected labels \[4\], got \[3\]"):
        model.report([(images(4), torch.zeros(3).long())])
