# SPDX-License-Identifier: Apache-2.0
"""pack_ with shared values and signs: nothing is approximated, clustered layers are raced, refusals have reasons."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import slimtorch as slim
from slimtorch import packing
from slimtorch.measure import Latency
from slimtorch.nn import PackedLayer


def _fastest(monkeypatch: pytest.MonkeyPatch, *order: str) -> None:
    """Make the clock say that formats are the faster the earlier in `order`; others come before the last of it."""

    def seconds(label: str) -> float:
        place = order.index(label) if label in order else len(order) - 0.5
        return 1e-3 * (1 + place)

    def timed(calls: dict[str, Any], **_: Any) -> dict[str, Latency]:
        if set(calls) == {"dense", "packed"}:
            return {"dense": _latency(2e-3), "packed": _latency(1e-3)}
        return {label: _latency(seconds(label)) for label in calls}

    monkeypatch.setattr(packing, "interleave", timed)


def _latency(seconds: float) -> Latency:
    from slimtorch.measure import _latency as of

    return of([seconds] * 3, 1)


def _shared(layer: nn.Linear | nn.Conv2d, levels: int = 7, keep: float = 1.0) -> nn.Linear | nn.Conv2d:
    with torch.no_grad():
        weight = layer.weight
        weight.copy_((weight / weight.abs().max() * (levels // 2)).round() + 0.25)
        weight.mul_(torch.rand(weight.shape) < keep)
    return layer


def _binary(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    with torch.no_grad():
        layer.weight.copy_(torch.where(layer.weight >= 0, 0.5, -0.5))
    return layer


LAYERS: tuple[tuple[Any, tuple[int, ...]], ...] = (
    (lambda: nn.Linear(40, 30), (8, 40)),
    (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 7, 7)),
)
each_layer = pytest.mark.parametrize(("build", "shape"), LAYERS, ids=["linear", "conv2d"])


@each_layer
@pytest.mark.parametrize("format", ["codebook", "sparse_codebook", "binary"])
def test_a_weight_that_fits_is_packed_without_loss(
    monkeypatch: pytest.MonkeyPatch, build: Any, shape: tuple[int, ...], format: str
) -> None:
    torch.manual_seed(0)
    _fastest(monkeypatch, format, "dense")
    keep = 0.4 if format == "sparse_codebook" else 1.0
    model = nn.Sequential(_binary(build()) if format == "binary" else _shared(build(), keep=keep))
    layer, weight, x = model[0], model[0].weight.detach().clone(), torch.randn(shape)
    bias, y = layer.bias, model(x).detach()
    report = slim.pack_(model, x)
    assert model[0] is layer
    assert isinstance(layer, PackedLayer)
    assert packing._family(layer.format) == format
    assert torch.equal(layer.weight, weight)
    assert layer.bias is bias
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    assert report.layers[0].chosen == format
    assert report.layers[0].trial(format).nbytes < report.layers[0].trials[0].nbytes


@each_layer
def test_other_weights_are_not_approximated(build: Any, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(build())
    model[0].weight.data.normal_()
    if model[0].weight.numel() <= 256:
        model[0] = nn.Conv2d(6, 80, 3, padding=1, groups=2)
    weight = model[0].weight.detach().clone()
    for formats in ("codebook", "sparse_codebook", "binary", ["codebook", "sparse_codebook", "binary"]):
        report = slim.pack_(model, torch.randn(shape), formats=formats)  # type: ignore[arg-type]
        assert report.layers[0].chosen == "dense"
        for name in [formats] if isinstance(formats, str) else formats:
            assert f"{name}: " in report.layers[0].reason
        assert torch.equal(model[0].weight, weight)
    report = slim.pack_(model, torch.randn(shape))
    assert not {"codebook", "sparse_codebook", "binary"} & {trial.label for trial in report.layers[0].trials}


@each_layer
@pytest.mark.parametrize("kind", ["Codebook", "SparseCodebook"])
def test_a_clustered_layer_is_raced_against_what_else_it_could_be(
    monkeypatch: pytest.MonkeyPatch, build: Any, shape: tuple[int, ...], kind: str
) -> None:
    own = {"Codebook": "codebook", "SparseCodebook": "sparse_codebook"}[kind]
    x = torch.randn(shape)
    for winner in ("dense", own, "sparse"):
        torch.manual_seed(0)
        dense = _shared(build(), keep=0.3)
        packed_class = getattr(slim.nn, kind + type(dense).__name__)
        model = nn.Sequential(packed_class.from_dense(dense, bits=4))
        layer, values, weight = model[0], model[0].codebook, model[0].weight.detach().clone()
        calls: list[str] = []
        layer.register_forward_hook(lambda module, *_, calls=calls: calls.append(type(module).__name__))
        y = model(x).detach()
        _fastest(monkeypatch, winner, own, "dense")
        report = slim.pack_(model, x)
        monkeypatch.undo()
        assert report.layers[0].chosen == winner
        assert model[0] is layer
        assert torch.equal(layer.weight, weight)
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
        assert calls[-1] == type(layer).__name__
        if winner == own:
            assert layer.codebook is values
        elif winner == "dense":
            assert type(layer) is type(dense)
            assert not hasattr(layer, "bits")
        else:
            assert isinstance(layer, (slim.nn.SparseLinear, slim.nn.SparseConv2d))


def test_what_a_layer_is_already_need_not_gain() -> None:
    """A clustered layer that is as fast as dense stays clustered: it is smaller."""
    race = packing._Race("latency", 0.05, [])
    layer = slim.nn.CodebookLinear.from_dense(_shared(nn.Linear(40, 30)))
    unit = packing._Unit(packing.LayerReport("", "Linear", (30, 40), 0.0), ("auto",), [packing._Member.of(layer, [])])
    for seconds, chosen in ((0.99e-3, "codebook"), (1.01e-3, "dense")):
        unit.winner, unit.report.chosen = None, "dense"
        unit.report.trials = [
            packing.Trial("dense", None, 1.0, 4800, _latency(1e-3), 0.0),
            packing.Trial("codebook", None, 1.0, 664, _latency(seconds), 0.0),
        ]
        race._choose(unit, ["dense", "codebook"])
        assert unit.report.chosen == chosen


@each_layer
def test_size_keeps_the_smallest_that_is_fast_enough(
    monkeypatch: pytest.MonkeyPatch, build: Any, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    _fastest(monkeypatch, "sparse", "codebook", "sparse_codebook", "dense")
    model = nn.Sequential(_shared(build(), keep=0.3))
    report = slim.pack_(model, torch.randn(shape), objective="size")
    sizes = {trial.label: trial.nbytes for trial in report.layers[0].trials}
    assert report.layers[0].chosen == min(sizes, key=sizes.__getitem__)
    assert report.layers[0].chosen in ("codebook", "sparse_codebook")


def test_tied_clustered_weights_stay_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    _fastest(monkeypatch, "codebook", "dense")
    first, second = _shared(nn.Linear(30, 30)), nn.Linear(30, 30)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    slim.pack_(model, torch.randn(4, 30))
    assert isinstance(model[0], slim.nn.CodebookLinear)
    assert model[0].codebook is model[1].codebook


def test_a_fused_relu_is_a_reason_to_leave_a_layer_alone() -> None:
    layer = slim.nn.CodebookLinear(20, 10, activation="relu")
    report = slim.pack_(layer, torch.randn(3, 20))
    assert report.layers[0].reason == "a ReLU is fused into it"
    assert isinstance(layer, slim.nn.CodebookLinear)


class _Trained(nn.Linear):
    """Stands in for a layer of binary training: real weights, and a packed layer to become."""

    signed = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = torch.where(input >= 0, 1.0, -1.0) if self.signed else input
        return nn.functional.linear(x, torch.where(self.weight >= 0, 1.0, -1.0), self.bias)

    def packed(self) -> nn.Module:
        return slim.nn.BinaryLinear.from_dense(
            _plain(self), binarize_input=self.signed, scale=False
        )


def _plain(layer: nn.Linear) -> nn.Linear:
    twin = nn.Linear(layer.in_features, layer.out_features)
    twin.load_state_dict(layer.state_dict())
    return twin


@pytest.mark.parametrize(("signed", "winner"), list(itertools.product([True, False], ["binary", "dense"])))
def test_layers_of_binary_training(monkeypatch: pytest.MonkeyPatch, signed: bool, winner: str) -> None:
    torch.manual_seed(0)
    _fastest(monkeypatch, winner, "dense", "binary")
    layer = _Trained(33, 12)
    layer.signed = signed
    model, x = nn.Sequential(layer), torch.randn(5, 33)
    y = model(x).detach()
    report = slim.pack_(model, x)
    assert report.layers[0].chosen == ("binary" if signed else winner)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    assert model[0] is layer
    # Over signs there is no dense layer to become: packed it is the faster of what there is.
    assert type(layer) is (slim.nn.BinaryLinear if winner == "binary" or signed else nn.Linear)
