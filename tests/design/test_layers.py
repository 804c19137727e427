# SPDX-License-Identifier: Apache-2.0
"""Layers of `slim.design`: against torch and against the papers' drawings written out, as drop-in modules, and their
costs against counted ones."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import slimtorch as slim
from slimtorch.design import (
    DepthwiseSeparableConv2d,
    Fire,
    GhostConv2d,
    InvertedResidual,
    LowRankConv2d,
    LowRankLinear,
    ShuffledGroupConv2d,
    ShuffleUnit,
    channel_shuffle,
    costs,
)
from slimtorch.design.costs import Cost
from slimtorch.measure import Latency, count_macs, count_parameters

SIZE = (9, 7)
_A = {"stride": (2, 1), "padding": (2, 0), "dilation": (1, 2)}

Case = tuple[Callable[[], nn.Module], int, Callable[[], Cost]]
CASES: dict[str, Case] = {
    "linear": (lambda: nn.Linear(5, 3), 0, lambda: costs.linear(5, 3)),
    "linear, no bias": (lambda: nn.Linear(5, 3, bias=False), 0, lambda: costs.linear(5, 3, bias=False)),
    "conv": (lambda: nn.Conv2d(4, 6, (3, 2), **_A), 4, lambda: costs.conv2d(4, 6, (3, 2), SIZE, **_A)),
    "separable": (
        lambda: DepthwiseSeparableConv2d(4, 6, 3, padding=1),
        4,
        lambda: costs.depthwise_separable(4, 6, 3, SIZE, padding=1),
    ),
    "separable, all options": (
        lambda: DepthwiseSeparableConv2d(4, 6, (3, 2), bias=False, multiplier=2, norm=True, **_A),
        4,
        lambda: costs.depthwise_separable(4, 6, (3, 2), SIZE, bias=False, multiplier=2, norm=True, **_A),
    ),
    "low-rank linear": (lambda: LowRankLinear(5, 3, 2), 0, lambda: costs.low_rank_linear(5, 3, 2)),
    "channel": (
        lambda: LowRankConv2d(4, 6, (3, 2), 2, kind="channel", **_A),
        4,
        lambda: costs.low_rank_conv2d(4, 6, (3, 2), SIZE, 2, kind="channel", **_A),
    ),
    "spatial": (
        lambda: LowRankConv2d(4, 6, (3, 2), 2, kind="spatial", bias=False, **_A),
        4,
        lambda: costs.low_rank_conv2d(4, 6, (3, 2), SIZE, 2, kind="spatial", bias=False, **_A),
    ),
    "tucker": (
        lambda: LowRankConv2d(4, 6, (3, 2), (2, 5), kind="tucker", **_A),
        4,
        lambda: costs.low_rank_conv2d(4, 6, (3, 2), SIZE, (2, 5), kind="tucker", **_A),
    ),
    "cp": (
        lambda: LowRankConv2d(4, 6, (3, 2), 3, kind="cp", **_A),
        4,
        lambda: costs.low_rank_conv2d(4, 6, (3, 2), SIZE, 3, kind="cp", **_A),
    ),
    "shuffled": (
        lambda: ShuffledGroupConv2d(4, 6, (3, 2), groups=2, **_A),
        4,
        lambda: costs.conv2d(4, 6, (3, 2), SIZE, groups=2, **_A),
    ),
    "fire": (lambda: Fire(4, 2, 3, 5), 4, lambda: costs.fire(4, 2, 3, 5, SIZE)),
    "inverted": (lambda: InvertedResidual(4, 4), 4, lambda: costs.inverted_residual(4, 4, SIZE)),
    "inverted, stride 2": (
        lambda: InvertedResidual(4, 6, 2, 3, 5),
        4,
        lambda: costs.inverted_residual(4, 6, SIZE, stride=2, factor=3, kernel_size=5),
    ),
    "inverted, factor 1": (
        lambda: InvertedResidual(4, 6, 1, 1),
        4,
        lambda: costs.inverted_residual(4, 6, SIZE, factor=1),
    ),
    "shuffle unit": (lambda: ShuffleUnit(24, 24), 24, lambda: costs.shuffle_unit(24, 24, SIZE)),
    "shuffle unit, stride 2": (
        lambda: ShuffleUnit(5, 17, 2, 2, 4, group_first=False),
        5,
        lambda: costs.shuffle_unit(5, 17, SIZE, stride=2, groups=2, bottleneck=4, group_first=False),
    ),
    "ghost": (
        lambda: GhostConv2d(4, 7, (3, 2), **_A),
        4,
        lambda: costs.ghost(4, 7, (3, 2), SIZE, **_A),
    ),
    "ghost, ratio 3": (
        lambda: GhostConv2d(4, 7, 3, padding=1, ratio=3, cheap_kernel=5, norm=True),
        4,
        lambda: costs.ghost(4, 7, 3, SIZE, padding=1, ratio=3, cheap_kernel=5, norm=True),
    ),
    "ghost, ratio 1": (lambda: GhostConv2d(4, 7, ratio=1), 4, lambda: costs.ghost(4, 7, 1, SIZE, ratio=1)),
}
IMAGES = [name for name, case in CASES.items() if case[1]]
OWN_AND_LOW_RANK = [name for name in CASES if name not in ("linear", "linear, no bias", "conv")]
OWN = [name for name in IMAGES if name not in ("conv", "channel", "spatial", "tucker", "cp")]


def inputs(channels: int, batch: int) -> Tensor:
    shape = (batch, channels, *SIZE) if channels else (batch, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
def test_formulas_equal_what_is_counted(name: str) -> None:
    build, channels, formula = CASES[name]
    module = build()
    assert formula().parameters == count_parameters(module)[0]
    assert formula().macs == count_macs(module, inputs(channels, 1))[1]
    assert 3 * formula().macs == count_macs(module, inputs(channels, 3))[1]


def drawn(seed: int) -> tuple[str, Callable[[], nn.Module], int, Callable[[], Cost], tuple[int, int]]:
    """A layer of some kind and sizes, which it may refuse, its input channels, its formula and the size of an image."""
    draw = random.Random(seed)

    def upto(most: int) -> int:
        return draw.randint(1, most)

    c_in, out, kernel, size = upto(9), upto(9), (upto(3), upto(3)), (3 + upto(6), 3 + upto(6))
    more = {
        "stride": (upto(3), upto(2)), "padding": (draw.randint(0, 2), draw.randint(0, 2)),
        "dilation": (upto(2), upto(2)), "bias": draw.random() < 0.5,
    }  # fmt: skip
    kind = draw.choice(["separable", "low rank", "shuffled", "fire", "inverted", "unit", "ghost"])
    own: dict[str, Any]
    if kind == "separable":
        own = {"multiplier": upto(3), "norm": draw.random() < 0.5, **more}
        layer, cost, sizes = DepthwiseSeparableConv2d, costs.depthwise_separable, (c_in, out, kernel)
    elif kind == "low rank":
        how = draw.choice(["channel", "spatial", "tucker", "cp"])
        own = {"rank": (upto(5), upto(5)) if how == "tucker" else upto(5), "kind": how, **more}
        layer, cost, sizes = LowRankConv2d, costs.low_rank_conv2d, (c_in, out, kernel)
    elif kind == "shuffled":
        own = {"groups": upto(3), **more}
        layer, cost, sizes = ShuffledGroupConv2d, costs.conv2d, (c_in, out, kernel)
    elif kind == "fire":
        own = {"squeeze": upto(4), "expand1x1": upto(4), "expand3x3": upto(4)}
        layer, cost, sizes = Fire, costs.fire, (c_in,)
    elif kind == "inverted":
        own = {"stride": upto(3), "factor": upto(4), "kernel_size": upto(5)}
        layer, cost, sizes = InvertedResidual, costs.inverted_residual, (c_in, out)
    elif kind == "unit":
        out = c_in if draw.random() < 0.6 else out
        own = {
            "stride": upto(3), "groups": upto(3), "bottleneck": draw.choice([None, 3, 6]),
            "group_first": draw.random() < 0.7,
        }  # fmt: skip
        layer, cost, sizes = ShuffleUnit, costs.shuffle_unit, (c_in, out)
    else:
        own = {"ratio": upto(4), "cheap_kernel": upto(5), "norm": draw.random() < 0.5, **more}
        layer, cost, sizes = GhostConv2d, costs.ghost, (c_in, out, kernel)
    return kind, lambda: layer(*sizes, **own), c_in, lambda: cost(*sizes, size=size, **own), size  # type: ignore[operator]


def test_formulas_equal_what_torch_counts_for_any_sizes() -> None:
    """torch's own counter sees the calls that are made, not the layers; sizes that a layer refuses have no cost."""
    counted: Counter[str] = Counter()
    for seed in range(400):
        kind, build, channels, formula, size = drawn(seed)
        try:
            module = build().eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                module(torch.zeros(1, channels, *size))
        except (ValueError, RuntimeError):  # RuntimeError: the kernel is larger than the image
            with pytest.raises(ValueError, match="expected"):
                formula()
            continue
        counted[kind] += 1
        assert 2 * formula().macs == counter.get_total_flops(), seed
        assert formula().parameters == count_parameters(module)[0], seed
    assert min(counted.values()) >= 5, counted
    assert len(counted) == 7


def test_reductions_are_the_papers() -> None:
    for multiplier in (1, 2):
        thin = costs.depthwise_separable(32, 64, 3, 14, padding=1, bias=False, multiplier=multiplier)
        dense = costs.conv2d(32, 64, 3, 14, padding=1, bias=False)
        assert thin.reduction(dense) == pytest.approx(multiplier * (1 / 64 + 1 / 9))
        assert costs.separable_reduction(64, 3, multiplier) == pytest.approx(thin.reduction(dense))
    # MobileNet: 1704.04861, table 3 (one layer of 14x14x512): 52.3 against 462 mega-MACs
    assert costs.depthwise_separable(512, 512, 3, 14, padding=1, bias=False).macs == pytest.approx(52.3e6, rel=2e-3)
    assert costs.conv2d(512, 512, 3, 14, padding=1, bias=False).macs == pytest.approx(462e6, rel=2e-3)
    # ShuffleNet: 1707.01083, section 3.2: h w (2 c m / g + 9 m) for a unit
    assert costs.shuffle_unit(240, 240, 28).macs == 28 * 28 * (2 * 240 * 60 // 3 + 9 * 60)


def test_bad_sizes_in_formulas() -> None:
    with pytest.raises(ValueError, match="groups: expected a divisor of in_channels, 4, got 3"):
        costs.conv2d(4, 6, 3, 8, groups=3)
    with pytest.raises(ValueError, match=r"size: expected an image that the kernel fits into, got \(2, 2\)"):
        costs.conv2d(4, 6, 3, 2)
    with pytest.raises(ValueError, match="kind: expected one of 'channel', 'spatial', 'tucker', 'cp', got 'svd'"):
        costs.low_rank_conv2d(4, 6, 3, 8, 2, kind="svd")
    with pytest.raises(ValueError, match=r"rank: expected one number for kind='cp', got \(2, 3\)"):
        costs.low_rank_conv2d(4, 6, 3, 8, (2, 3), kind="cp")
    with pytest.raises(TypeError, match=r"rank: expected an int, got 2\.5"):
        costs.low_rank_linear(4, 6, 2.5)  # type: ignore[arg-type]


# --- what they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_shuffle_is_torchs(batch: int) -> None:
    x = torch.arange(batch * 12 * 6.0).reshape(batch, 12, 2, 3)
    for groups in (1, 2, 3, 12):
        there = channel_shuffle(x, groups)
        assert there.shape == x.shape
        assert there.is_contiguous()
        for channel in range(12):  # channel g · n + i goes to i · groups + g
            g, i = divmod(channel, 12 // groups)
            assert torch.equal(there[:, i * groups + g], x[:, channel])
        if batch:
            assert torch.equal(there, nn.ChannelShuffle(groups)(x))
        assert torch.equal(channel_shuffle(there, 12 // groups), x)  # and back


def test_shuffle_bad_input() -> None:
    with pytest.raises(ValueError, match="groups: expected a divisor of the channels of x, 6, got 4"):
        channel_shuffle(torch.zeros(1, 6, 1, 1), 4)
    with pytest.raises(ValueError, match=r"x: expected \[N, C, ...\], got \[3\]"):
        channel_shuffle(torch.zeros(3), 1)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_separable_equals_its_dense_twin(padding_mode: str) -> None:
    layer = DepthwiseSeparableConv2d(3, 5, (3, 2), padding_mode=padding_mode, multiplier=2, **_A).double()
    dense = layer.to_dense()
    x = inputs(3, 2).double()
    assert torch.allclose(layer(x), dense(x))
    assert torch.allclose(layer(x[0]), dense(x[0]))  # without a batch
    again = DepthwiseSeparableConv2d.from_dense(dense, multiplier=2)  # it has rank 2 per channel: nothing is lost
    assert torch.allclose(again(x), dense(x))
    full = nn.Conv2d(3, 7, (3, 2), **_A).double()
    exact = DepthwiseSeparableConv2d.from_dense(full, multiplier=6)  # as many kernels as taps: any convolution
    assert torch.allclose(exact(x), full(x))


def test_separable_starts_nearest_to_the_weight() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(3, 5, 3).double()
    near = DepthwiseSeparableConv2d.from_dense(dense).to_dense()
    lost = (dense.weight - near.weight).square().sum((0, 2, 3))
    for channel in range(3):  # Eckart & Young, by numpy's own singular values
        values = torch.linalg.svdvals(dense.weight[:, channel].flatten(1))
        assert float(lost[channel].detach()) == pytest.approx(float(values[1:].square().sum().detach()))
    assert torch.equal(near.bias, dense.bias)  # type: ignore[arg-type]


def test_separable_same_padding_and_geometry() -> None:
    layer = DepthwiseSeparableConv2d(3, 5, (3, 4), padding="same", bias=False, norm=True)
    assert layer(inputs(3, 2)).shape == (2, 5, *SIZE)
    again = DepthwiseSeparableConv2d.from_geometry(layer.geometry())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.eval()(inputs(3, 2)), layer.eval()(inputs(3, 2)))
    assert (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride) == (3, 5, (3, 4), (1, 1))
    assert (layer.padding, layer.dilation, layer.padding_mode, layer.bias) == ("same", (1, 1), "zeros", None)
    assert not hasattr(layer, "weight")  # with batch norm and ReLU between there is none
    with pytest.raises(ValueError, match="to_dense: with batch norm and ReLU between"):
        layer.to_dense()
    with pytest.raises(ValueError, match="geometry: expected bias, dilation"):
        DepthwiseSeparableConv2d.from_geometry({"in_channels": 3})
    with pytest.raises(TypeError, match="norm: expected true or false, got 1"):
        DepthwiseSeparableConv2d.from_geometry({**layer.geometry(), "norm": 1})


def test_units_against_the_drawings() -> None:
    """Each forward, written out from the papers' figures with functions alone."""
    torch.manual_seed(2)
    x = inputs(6, 2)
    fire = Fire(6, 2, 3, 4)
    s = F.relu(F.conv2d(x, fire.squeeze.weight, fire.squeeze.bias))
    one = F.relu(F.conv2d(s, fire.expand1x1.weight, fire.expand1x1.bias))
    three = F.relu(F.conv2d(s, fire.expand3x3.weight, fire.expand3x3.bias, padding=1))
    assert torch.allclose(fire(x), torch.cat([one, three], 1))

    def norm(value: Tensor) -> Tensor:  # fresh batch norm in train mode
        mean, var = value.mean((0, 2, 3), keepdim=True), value.var((0, 2, 3), unbiased=False, keepdim=True)
        return (value - mean) / (var + 1e-5).sqrt()

    def conv(value: Tensor, module: nn.Module, **options: Any) -> Tensor:
        return F.conv2d(value, module.weight, **options)  # type: ignore[arg-type]

    inverted = InvertedResidual(6, 6, 1, 2)
    body = inverted.body
    y = norm(conv(x, body[0])).clamp(0, 6)
    y = norm(conv(y, body[3], padding=1, groups=12)).clamp(0, 6)
    assert torch.allclose(inverted(x), x + norm(conv(y, body[6])), atol=1e-5)
    assert not InvertedResidual(6, 6, 2).adds
    assert not InvertedResidual(6, 8).adds

    unit = ShuffleUnit(6, 6, groups=3, bottleneck=12)
    y = nn.ChannelShuffle(3)(F.relu(norm(conv(x, unit.compress, groups=3))))
    y = norm(conv(y, unit.depthwise, padding=1, groups=12))
    assert torch.allclose(unit(x), F.relu(x + norm(conv(y, unit.expand, groups=3))), atol=1e-5)
    halved = ShuffleUnit(6, 12, 2, groups=3)
    assert halved(x).shape == (2, 12, 5, 4)
    assert torch.allclose(halved(x)[:, :6], F.relu(F.avg_pool2d(x, 3, 2, 1)))

    ghost = GhostConv2d(6, 7, 3, padding=1, ratio=3)
    own = F.conv2d(x, ghost.primary.weight, ghost.primary.bias, padding=1)
    assert ghost.cheap is not None
    weights, biases = ghost.cheap.weight.split(3), ghost.cheap.bias.split(3)  # type: ignore[union-attr]
    rest = [F.conv2d(own, w, b, padding=1, groups=3) for w, b in zip(weights, biases, strict=True)]
    assert torch.allclose(ghost(x), torch.cat([own, *rest], 1)[:, :7], atol=1e-6)

    shuffled = ShuffledGroupConv2d(6, 4, 3, groups=2)
    assert torch.equal(shuffled(x), nn.ChannelShuffle(2)(shuffled.conv(x)))


# --- drop-in ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_drop_in(name: str) -> None:
    torch.manual_seed(3)
    build, channels, _ = CASES[name]
    module = build()
    x = inputs(channels, 3).requires_grad_()
    module(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())
    assert x.grad is not None
    x = x.detach()
    module.eval()
    expected = module(x)
    fresh = build().eval()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), expected)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert not turned.is_contiguous()
    assert torch.allclose(module(turned), expected, atol=1e-6)
    assert module(x[:0]).shape == (0, *expected.shape[1:])
    assert torch.allclose(module(x[:1]), expected[:1], atol=1e-6)
    assert module.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", [name for name in IMAGES if not any(
    isinstance(m, nn.BatchNorm2d) for m in CASES[name][0]().modules()
)])  # fmt: skip
def test_without_a_batch(name: str) -> None:
    build, channels, _ = CASES[name]
    module, x = build(), inputs(channels, 2)
    torch.testing.assert_close(module(x[0]), module(x)[0])


def test_fire_without_a_batch_where_both_parts_have_the_same_channels() -> None:
    fire, x = Fire(4, 2, 3, 3), inputs(4, 2)
    torch.testing.assert_close(fire(x[0]), fire(x)[0])


@pytest.mark.parametrize("name", OWN_AND_LOW_RANK)
def test_copies_casts_and_pickles(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    build, channels, _ = CASES[name]
    module = build().eval()
    x = inputs(channels, 3)
    expected = module(x).detach()
    torch.save(module, tmp_path / "whole")
    assert torch.equal(torch.load(tmp_path / "whole", weights_only=False)(x), expected)
    torch.save(module.state_dict(), tmp_path / "state")
    fresh = build().eval()
    fresh.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(fresh(x), expected)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    torch.testing.assert_close(module(x.to(memory_format=torch.channels_last) if channels else x), expected)
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert float((half(x.bfloat16()) - expected).detach().norm() / expected.norm()) < 0.05
    meta = copy.deepcopy(module).to("meta")
    assert meta(x.to("meta")).shape == expected.shape
    with torch.inference_mode():
        assert torch.equal(module(x), expected)
    given = {key: value.clone() for key, value in module.state_dict().items()}
    assert torch.equal(torch.func.functional_call(module, given, (x,)), expected)
    assert module(x[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("name", ["low-rank linear", "channel", "spatial", "tucker", "cp"])
def test_low_rank_compiles_and_exports_for_any_batch(name: str) -> None:
    torch.manual_seed(3)
    build, channels, _ = CASES[name]
    module = build().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (inputs(channels, 3),), dynamic_shapes=({0: batch},)).module()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for size in (3, 5):
        x = inputs(channels, size)
        torch.testing.assert_close(program(x), module(x))
        torch.testing.assert_close(compiled(x), module(x))


def test_neurons_are_removed_around_several_kernels_per_channel() -> None:
    torch.manual_seed(3)
    separable = DepthwiseSeparableConv2d(6, 8, 3, multiplier=2)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), separable, nn.Conv2d(8, 4, 1)).eval()
    slim.prune_(model, slim.prune.Neurons(0.5), example_inputs=inputs(4, 1))
    layer = model[1]
    assert isinstance(layer, DepthwiseSeparableConv2d)
    assert (layer.in_channels, layer.out_channels, layer.depthwise.out_channels) == (3, 4, 6)
    x = inputs(3, 2)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


@pytest.mark.parametrize("ratio", [2, 3])
def test_removing_neurons_around_a_ghost_ends(ratio: int) -> None:
    """Where a tensor is put beside itself twice over, torch-pruning looks for dependencies forever."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), GhostConv2d(6, 12, 3, ratio=ratio), nn.Conv2d(12, 4, 1)).eval()
    slim.prune_(model, {"0": slim.prune.Neurons(0.5)}, example_inputs=inputs(4, 1))
    assert model[0].out_channels == 3
    assert model(inputs(4, 2)).shape == (2, 4, 5, 3)


@pytest.mark.parametrize("name", OWN)
def test_export(name: str) -> None:
    torch.manual_seed(3)
    build, channels, _ = CASES[name]
    module = build().eval()
    x = inputs(channels, 3)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    other = inputs(channels, 5)
    assert torch.allclose(program.module()(other), module(other), atol=1e-6)


def test_compiles_as_one_graph() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        DepthwiseSeparableConv2d(4, 6, 3), ShuffledGroupConv2d(6, 6, 1), Fire(6, 2, 3, 3), InvertedResidual(6, 6),
        ShuffleUnit(6, 6), GhostConv2d(6, 5),
    ).eval()  # fmt: skip
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for batch in (3, 5):
        assert torch.allclose(compiled(inputs(4, batch)), model(inputs(4, batch)), atol=1e-6)


def test_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    def alike(calls: Any, **_: Any) -> dict[str, Latency]:  # all as fast as one another: size decides
        return {name: Latency(1.0, 1.0, 1.0, 1, 1) for name in calls}

    monkeypatch.setattr("slimtorch.packing.interleave", alike)
    torch.manual_seed(3)
    model = nn.Sequential(DepthwiseSeparableConv2d(32, 256, 3, multiplier=4), nn.ReLU(), Fire(256, 16, 4, 4)).eval()
    x = inputs(32, 1)
    slim.prune_(model, {"*.pointwise": slim.prune.Magnitude(0.98)})
    expected = model(x)
    report = slim.pack_(model, x, formats={"*.pointwise": "sparse"}, objective="size")
    assert [layer.name for layer in report.packed] == ["0.pointwise"], str(report)
    assert torch.allclose(model(x), expected, atol=1e-5)


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: DepthwiseSeparableConv2d(0, 4, 3), ValueError, "in_channels: expected at least 1, got 0"),
    (lambda: DepthwiseSeparableConv2d(4, 4.0, 3), TypeError, "out_channels: expected an int, got 4.0"),  # type: ignore[arg-type]
    (lambda: DepthwiseSeparableConv2d(4, 4, 0), ValueError, "kernel_size: expected at least 1, got 0"),
    (lambda: DepthwiseSeparableConv2d(4, 4, 3, multiplier=0), ValueError, "multiplier: expected at least 1, got 0"),
    (lambda: DepthwiseSeparableConv2d(4, 4, 3, padding=-1), ValueError, "padding: expected at least 0, got -1"),
    (lambda: DepthwiseSeparableConv2d(4, 4, 2.5), TypeError, r"kernel_size: expected an int or two, got 2\.5"),  # type: ignore[arg-type]
    (lambda: DepthwiseSeparableConv2d(4, 4, (3, 3, 3)), TypeError, "kernel_size: expected an int or two"),  # type: ignore[arg-type]
    (lambda: DepthwiseSeparableConv2d.from_dense(nn.Linear(3, 3)), TypeError, "expected a torch.nn.Conv2d, got Linear"),  # type: ignore[arg-type]
    (lambda: DepthwiseSeparableConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2)), ValueError, "got groups=2"),
    (lambda: DepthwiseSeparableConv2d.from_dense(nn.Conv2d(4, 4, 2), 5), ValueError, "multiplier: .* at most 4"),
    (lambda: ShuffledGroupConv2d(4, 6, 3, groups=4), ValueError, "groups: .* divisor of out_channels, 6, got 4"),
    (lambda: ShuffledGroupConv2d(6, 4, 3, groups=4), ValueError, "groups: .* divisor of in_channels, 6, got 4"),
    (lambda: Fire(4, 0, 1, 1), ValueError, "squeeze: expected at least 1, got 0"),
    (lambda: InvertedResidual(4, 4, factor=0), ValueError, "factor: expected at least 1, got 0"),
    (lambda: InvertedResidual(4, 4, kernel_size=2), ValueError, "kernel_size: expected an odd number, got 2"),
    (lambda: ShuffleUnit(6, 6, 3), ValueError, "stride: expected 1 or 2, got 3"),
    (lambda: ShuffleUnit(6, 9, 1), ValueError, "out_channels: expected 6 as in_channels for stride 1, got 9"),
    (lambda: ShuffleUnit(6, 6, 2), ValueError, "out_channels: expected more than the 6 of the input, got 6"),
    (lambda: ShuffleUnit(6, 6, groups=4), ValueError, "groups: expected a divisor of the new channels, 6, got 4"),
    (lambda: ShuffleUnit(6, 6, bottleneck=4), ValueError, "groups: expected a divisor of bottleneck, 4, got 3"),
    (lambda: GhostConv2d(4, 2, ratio=3), ValueError, "ratio: expected at most out_channels, 2, got 3"),
    (lambda: GhostConv2d(4, 4, cheap_kernel=2), ValueError, "cheap_kernel: expected an odd number, got 2"),
]


@pytest.mark.parametrize(("build", "kind", "message"), BAD)
def test_bad_sizes(build: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()


def test_a_weight_that_is_not_finite() -> None:
    conv = nn.Conv2d(2, 2, 3)
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="module: its weight holds NaN or infinity"):
        DepthwiseSeparableConv2d.from_dense(conv)
