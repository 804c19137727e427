# SPDX-License-Identifier: Apache-2.0
"""Layers of low rank: shapes, exactness at full rank, best approximations, and that they are drop-in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.design import LowRankConv2d, LowRankLinear, costs
from slimtorch.design._decompose import KINDS, composed, factors, full_rank
from slimtorch.measure import count_macs

each_kind = pytest.mark.parametrize("kind", KINDS)
RANKS: dict[str, Any] = {"channel": 3, "spatial": 4, "tucker": (2, 3), "cp": 5}
GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same", "bias": False},
    {"kernel_size": (2, 3), "padding": (1, 1), "padding_mode": "reflect", "stride": 2},
    {"kernel_size": 1},
]


def conv(**geometry: Any) -> nn.Conv2d:
    return nn.Conv2d(6, 8, **geometry)


@each_kind
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_parts_compute_what_their_weight_does(kind: str, geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    dense = conv(**geometry).double()
    layer = LowRankConv2d.from_dense(dense, RANKS[kind], kind)
    expected = RANKS[kind] if kind != "tucker" or geometry["kernel_size"] != 1 else (2, 2)  # a third adds nothing
    assert layer.rank == expected
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode"):
        assert getattr(layer, name) == getattr(dense, name)
    x = torch.randn(2, 6, 9, 10, dtype=torch.float64)
    twin = layer.to_dense()
    assert twin.weight.shape == dense.weight.shape
    torch.testing.assert_close(layer(x), twin(x))
    if layer.bias is not None:
        assert torch.equal(layer.bias, dense.bias)
    again = LowRankConv2d.from_geometry(layer.geometry(), dtype=torch.float64)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(x), layer(x))
    assert again.geometry() == layer.geometry()


@pytest.mark.parametrize("kind", ["channel", "spatial", "tucker"])
def test_full_rank_is_exact(kind: str) -> None:
    torch.manual_seed(0)
    dense = conv(kernel_size=(3, 2), padding=1).double()
    layer = LowRankConv2d.from_dense(dense, full_rank(dense.weight.shape, kind), kind)
    torch.testing.assert_close(layer.weight, dense.weight)


def test_cp_finds_a_sum_of_products() -> None:
    torch.manual_seed(1)
    sides = [torch.randn(n, 2, dtype=torch.float64) for n in (7, 5, 3, 3)]
    weight = torch.einsum("or,ir,hr,wr->oihw", *sides)
    made = composed(factors(weight, 2, "cp"), "cp")
    assert float((made - weight).norm() / weight.norm()) < 1e-3


def test_weights_are_the_best_of_their_rank() -> None:
    """Eckart-Young: what is left is the singular values that were left out; more rank never is worse for the others."""
    torch.manual_seed(0)
    weight = torch.randn(9, 7, dtype=torch.float64)
    last, first = factors(weight, 3)[::-1]
    left = torch.linalg.svdvals(weight)[3:].square().sum()
    torch.testing.assert_close((weight - last @ first).square().sum(), left)
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    spatial = weight - composed(factors(weight, 4, "spatial"), "spatial")
    torch.testing.assert_close(
        spatial.square().sum(),
        torch.linalg.svdvals(weight.permute(1, 2, 0, 3).reshape(15, 18))[4:].square().sum(),
    )
    for kind, ranks in (("tucker", [(2, 2), (3, 4), (5, 6)]), ("cp", [2, 6, 20])):
        errors = [float((weight - composed(factors(weight, r, kind), kind)).norm()) for r in ranks]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 1.1 * errors[-1]


@each_kind
def test_a_metric_gives_less_error_of_the_outputs(kind: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    mix = torch.randn(45, 45, dtype=torch.float64) * torch.logspace(0, -2, 45, dtype=torch.float64)
    metric = mix.T @ mix

    def error(parts: list[Tensor]) -> float:
        change = (weight - composed(parts, kind)).flatten(1)
        return float(((change @ metric) * change).sum())

    rank = RANKS[kind]
    plain, fitted = error(factors(weight, rank, kind)), error(factors(weight, rank, kind, metric))
    assert fitted < 0.9 * plain
    if kind == "channel":  # the least that any weight of this rank can have: by the whitened weight's singular values
        values = torch.linalg.svdvals(weight.flatten(1) @ torch.linalg.cholesky(metric))
        assert fitted == pytest.approx(float(values[rank:].square().sum()))


@pytest.mark.parametrize("shape", [(40, 30, None), (30, 40, None), (8, 6, 3)])
def test_drop_in(shape: tuple[int, int, int | None]) -> None:
    torch.manual_seed(0)
    out, c_in, size = shape
    layer: nn.Module
    if size is None:
        layer = LowRankLinear.from_dense(nn.Linear(c_in, out), 5)
        x = torch.randn(4, 3, c_in)[:, ::2]
        expected = F.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    else:
        layer = LowRankConv2d.from_dense(nn.Conv2d(c_in, out, size), 5, "spatial")
        x = torch.randn(4, c_in, 9, 8).transpose(2, 3)
        expected = F.conv2d(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert layer(x[:0]).shape == (0, *expected.shape[1:])
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    layer(x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())
    assert all(p.grad is None for p in twin.parameters())
    exported = torch.export.export(twin.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), twin(x))


@each_kind
@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if g.get("padding") != "same"], ids=str)
def test_costs_are_what_is_counted(kind: str, geometry: dict[str, Any]) -> None:
    layer = LowRankConv2d(6, 8, rank=RANKS[kind], kind=kind, **geometry)
    plain = {name: value for name, value in geometry.items() if name != "padding_mode"}
    cost = costs.low_rank_conv2d(6, 8, size=(9, 10), rank=RANKS[kind], kind=kind, **plain)
    assert cost.parameters == sum(p.numel() for p in layer.parameters())
    assert cost.macs == count_macs(layer, torch.randn(1, 6, 9, 10))[1]


def test_costs_of_a_linear_one() -> None:
    layer = LowRankLinear(30, 20, 4)
    cost = costs.low_rank_linear(30, 20, 4, positions=7)
    assert cost.parameters == sum(p.numel() for p in layer.parameters()) == 4 * 50 + 20
    assert cost.macs == count_macs(layer, torch.randn(7, 30))[1] == 7 * 4 * 50


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match=r"kind: expected one of 'channel'.*got 'svd'"):
        LowRankConv2d(3, 4, 3, 2, kind="svd")
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        LowRankLinear(3, 4, 0)
    with pytest.raises(TypeError, match=r"rank: expected an int, got 2\.5"):
        LowRankLinear(3, 4, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rank: expected at most 3 for a weight of \(4, 3\), got 5"):
        LowRankLinear.from_dense(nn.Linear(3, 4), 5)
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Linear, got Conv2d"):
        LowRankLinear.from_dense(nn.Conv2d(3, 4, 1), 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Conv2d, got Conv1d"):
        LowRankConv2d.from_dense(nn.Conv1d(3, 4, 3), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind: expected one of"):
        LowRankConv2d.from_dense(nn.Conv2d(3, 4, 3), 1, "svd")
    with pytest.raises(ValueError, match="rank: expected at most"):
        LowRankConv2d.from_dense(nn.Conv2d(3, 4, 3), (4, 4), "tucker")
    broken = nn.Linear(3, 4)
    with torch.no_grad():
        broken.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="module: its weight holds NaN or infinity"):
        LowRankLinear.from_dense(broken, 1)
    with pytest.raises(ValueError, match="without groups, got groups=2"):
        LowRankConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2), 1)
    with pytest.raises(ValueError, match="padding_mode: expected zeros"):
        LowRankConv2d(3, 4, 3, 2, padding_mode="ones")
    with pytest.raises(ValueError, match="geometry: expected bias"):
        slim.design.LowRankLinear.from_geometry({"in_features": 3})
    good = LowRankLinear(3, 4, 2).geometry()
    with pytest.raises(TypeError, match="bias: expected true or false"):
        LowRankLinear.from_geometry({**good, "bias": 1})
