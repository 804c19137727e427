# SPDX-License-Identifier: Apache-2.0
"""binarize_: which layers, reports, bad input; formulas of the gradients; what optimizers do; packing."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.quantize import (
    BinaryConnect,
    BinaryNet,
    BinaryWeight,
    LatentBinary,
    LatentBinaryConv2d,
    LatentBinaryLinear,
    XnorNet,
    squared_hinge_loss,
    xnor_block,
)

METHODS = [BinaryConnect(), BinaryConnect(stochastic=True), BinaryNet(), BinaryWeight(), XnorNet()]
IDS = ["connect", "stochastic", "net", "weight", "xnor"]


def mlp(width: int = 16, relu: bool = False) -> nn.Sequential:
    """Layers 0, 2 and 4 are linear."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, width), nn.BatchNorm1d(width), nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 3)
    )
    if relu:
        model[1], model[3] = (nn.Sequential(nn.BatchNorm1d(width), nn.ReLU()) for _ in range(2))
        model.append(nn.BatchNorm1d(3))
    return model


def convnet() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        *xnor_block(6, 8, 3, padding=1, pool=2),
        *xnor_block(8, 8, 3, stride=2),
        nn.Flatten(),
        nn.BatchNorm1d(8 * 2 * 2),
        nn.Linear(32, 4),
    )


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LatentBinary)]


def pack(model: nn.Module) -> nn.Module:
    """A copy of the model with every layer replaced by what runs at inference."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LatentBinary):
            if not name:
                return module.packed()
            model.set_submodule(name, module.packed())
    return model


def train(model: nn.Module, x: Tensor, t: Tensor, optimizer: torch.optim.Optimizer, steps: int = 60) -> list[float]:
    model.train()
    losses = []
    for _ in range(steps):
        loss = squared_hinge_loss(model(x), t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def toy(features: tuple[int, ...] = (12,), classes: int = 3, count: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    t = torch.randint(0, classes, (count,), generator=generator)
    centres = torch.randn(classes, *features, generator=generator)
    return centres[t] + 0.3 * torch.randn(count, *features, generator=generator), t


# --- which layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_first_and_last_layer_as_the_papers_have_them(method):
    model = mlp()
    parameters = list(model.parameters())
    report = slim.binarize_(model, method)
    real_ends = isinstance(method, (BinaryWeight, XnorNet))
    assert [layer.method is None for layer in report.layers] == [real_ends, False, real_ends]
    assert [type(model[i]) for i in (0, 2, 4)] == [
        nn.Linear if layer.method is None else LatentBinaryLinear for layer in report.layers
    ]
    inputs = isinstance(method, (BinaryNet, XnorNet))
    assert model[2].binarize_input is inputs
    if isinstance(method, BinaryNet):
        assert [model[i].binarize_input for i in (0, 2, 4)] == [False, True, True]
        assert "input stays real" in report.layers[0].reason
    if real_ends:
        assert "first layer stays real" in report.layers[0].reason
        assert "last layer stays real" in report.layers[2].reason
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True)), "parameters are other objects"


def test_ends_can_be_chosen():
    model = mlp()
    slim.binarize_(model, XnorNet(first="binary", last="binary", binarize_first_input=True))
    assert [layer.binarize_input for layer in layers(model)] == [True, True, True]
    model = mlp()
    slim.binarize_(model, BinaryNet(first="real", last="real"))
    assert [type(model[i]) for i in (0, 2, 4)] == [nn.Linear, LatentBinaryLinear, nn.Linear]
    model = mlp()
    slim.binarize_(model, XnorNet(first="binary"))
    assert [layer.binarize_input for layer in layers(model)] == [False, True]


@pytest.mark.parametrize("method", METHODS, ids=IDS)
@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Conv2d(3, 4, 3)], ids=["linear", "conv2d"])
def test_a_single_layer_is_neither_first_nor_last(layer, method):
    layer = copy.deepcopy(layer)
    report = slim.binarize_(layer, method)
    assert isinstance(layer, (LatentBinaryLinear, LatentBinaryConv2d))
    assert layer.binarize_input is isinstance(method, (BinaryNet, XnorNet))
    assert [row.name for row in report.layers] == [""]
    assert "(model)" in str(report)


def test_the_only_layer_of_a_model_is_first_and_last():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    report = slim.binarize_(model, XnorNet())
    assert type(model[1]) is nn.Linear
    assert "first and last" in report.layers[0].reason
    assert "Nothing was binarized" in str(report)


def test_globs_and_filter():
    model = mlp()
    report = slim.binarize_(model, {"2": XnorNet(), "4": None, "*": BinaryConnect()})
    assert [layer.method for layer in report.layers] == ["BinaryConnect", "XnorNet", None]
    assert report.layers[2].reason == "left alone"
    model = mlp()
    slim.binarize_(model, BinaryConnect(), filter_fn=lambda module, name: module.out_features == 16 and name != "0")
    assert [type(model[i]) for i in (0, 2, 4)] == [nn.Linear, LatentBinaryLinear, nn.Linear]


def test_report_says_what_and_why():
    model = convnet()
    report = slim.binarize_(model, BinaryConnect())
    text = str(report)
    assert "attach" in text
    assert "8x6x3x3" in text
    data = report.to_dict()
    assert data["layers"][0]["shape"] == [6, 1, 3, 3]
    assert max(map(len, text.splitlines())) <= 100


def test_layers_that_cannot_be_binarized_stay_real_with_a_reason():
    class Own(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    masked, shared = nn.Linear(8, 8), nn.Linear(8, 8)
    embedding = nn.Embedding(8, 8)
    embedding.weight = shared.weight
    slim.prune_(masked, slim.prune.Magnitude(sparsity=0.5))
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "own": Own(8, 8),
            "masked": masked,
            "shared": shared,
            "embedding": embedding,
            "reflect": nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
            "empty": nn.Linear(1, 3),
        }
    )
    model["empty"].weight = nn.Parameter(torch.empty(3, 0))
    report = slim.binarize_(model, BinaryConnect())
    reasons = {row.name: row.reason for row in report.layers if row.method is None}
    assert set(reasons) == {"own", "masked", "shared", "reflect", "empty"}
    for name, word in (("own", "class"), ("masked", "masked"), ("shared", "'embedding'"), ("reflect", "reflect")):
        assert word in reasons[name]
    assert [row.name for row in report.binarized] == ["plain"]


def test_two_layers_that_share_a_weight_stay_tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    report = slim.binarize_(model, BinaryConnect())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    report.attach(optimizer)
    before = model[0].weight.detach().clone()
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    expected = before - 1e-3 * model[0].learning_rate_scale * model[0].weight.grad
    torch.testing.assert_close(model[0].weight, nn.Parameter(expected.clamp(-1, 1)))  # scaled once, not twice
    assert model[1].weight is model[0].weight


# --- bad input ----------------------------------------------------------------------------------------------------


def unchanged(model: nn.Module, config: Any, error: type[Exception], match: str, **options: Any) -> None:
    kinds, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        slim.binarize_(model, config, **options)
    assert [type(m) for m in model.modules()] == kinds
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0, equal_nan=True)


def test_bad_input_names_the_argument_and_changes_nothing():
    unchanged(mlp(), "xnor", TypeError, "config: expected BinaryConnect")
    unchanged(mlp(), XnorNet, TypeError, "config")
    unchanged(mlp(), None, TypeError, "config")
    unchanged(mlp(), {}, ValueError, "config: expected at least one glob")
    unchanged(mlp(), {"conv*": XnorNet()}, ValueError, r"config: the glob 'conv\*' matches no")
    unchanged(mlp(), {0: XnorNet()}, TypeError, "config")
    unchanged(mlp(), XnorNet(), TypeError, "filter_fn", filter_fn="2")
    with pytest.raises(TypeError, match="model: expected"):
        slim.binarize_([nn.Linear(2, 2)], XnorNet())  # type: ignore[arg-type]
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 1] = math.nan
    unchanged(model, BinaryConnect(), ValueError, "'2' holds NaN")
    with pytest.raises(ValueError, match="not initialised"):
        slim.binarize_(nn.Sequential(nn.LazyLinear(3)), BinaryConnect())
    lazy = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3), nn.Linear(3, 3))
    assert slim.binarize_(lazy, {"1": BinaryConnect()}).layers[0].reason == "left alone"
    with pytest.raises(ValueError, match="meta device"):
        slim.binarize_(nn.Linear(2, 2, device="meta"), BinaryConnect())


def test_a_second_call_is_refused():
    model = mlp()
    slim.binarize_(model, BinaryNet())
    unchanged(model, XnorNet(first="binary"), ValueError, r"layer '0' is binarized already \(BinaryNet\)")
    model = mlp()
    slim.binarize_(model, {"2": BinaryNet()})
    report = slim.binarize_(model, {"0": BinaryConnect()})  # other layers: fine
    assert "binarized before" in report.layers[1].reason


@pytest.mark.parametrize("method", [BinaryConnect, BinaryNet, BinaryWeight, XnorNet])
def test_configurations_check_their_fields(method):
    for end in ("first", "last"):
        with pytest.raises(ValueError, match=f"{end}: expected 'binary' or 'real', got 'Real'"):
            method(**{end: "Real"})
    flag = {BinaryConnect: "stochastic", BinaryNet: "scale_learning_rate"}.get(method, "center")
    with pytest.raises(TypeError, match=f"{flag}: expected a bool"):
        method(**{flag: 1})


def test_attach_checks_the_optimizer():
    model = mlp()
    report = slim.binarize_(model, BinaryNet())
    with pytest.raises(TypeError, match="optimizer: expected"):
        report.attach(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizer: expected one that holds"):
        report.attach(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = report.attach(optimizer)
    with pytest.raises(ValueError, match="attached already"):
        report.attach(optimizer)
    handle.remove()
    report.attach(optimizer)


# --- formulas -----------------------------------------------------------------------------------------------------


def test_signs_and_gradient_of_activations():
    layer = nn.Linear(7, 1, bias=False)
    slim.binarize_(layer, BinaryNet())
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.5, 0.0, 0.2, -0.2, 1.0, -1.0]]))
    x = torch.tensor([-1.5, -1.0, -0.3, 0.0, 0.7, 1.0, 1.01], requires_grad=True)
    signs_x = torch.tensor([-1.0, -1, -1, 1, 1, 1, 1])
    signs_w = torch.tensor([1.0, -1, 1, 1, -1, 1, -1])
    y = layer(x)
    assert y.item() == float(signs_x @ signs_w)
    y.backward()
    assert torch.equal(x.grad, signs_w * torch.tensor([0.0, 1, 1, 1, 1, 1, 0]))
    assert torch.equal(layer.weight.grad, signs_x[None])  # straight to the real weight


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("method", [BinaryWeight(), XnorNet()], ids=["weight", "xnor"])
def test_xnor_gradient(kind, method):
    torch.manual_seed(3)
    layer: Any = nn.Linear(6, 4) if kind == "linear" else nn.Conv2d(4, 6, 3, groups=2)
    layer, x = layer.double(), torch.randn((5, 6) if kind == "linear" else (2, 4, 5, 5)).double()
    with torch.no_grad():
        layer.weight.mul_(8)  # some beyond ±1
    slim.binarize_(layer, method)
    y = layer(x)
    weight = layer.weight.detach()
    assert float(weight.abs().max()) == 1  # clipped on the way
    assert bool((weight.abs() == 1).any())
    assert bool((weight.abs() < 1).any())
    axes = tuple(range(1, weight.dim()))
    alpha = weight.abs().mean(axes, keepdim=True)
    used = (alpha * weight.sign()).requires_grad_()
    real = torch.where(x >= 0, 1.0, -1.0).double() if isinstance(method, XnorNet) else x
    expected = F.linear(real, used, layer.bias) if kind == "linear" else F.conv2d(real, used, layer.bias, groups=2)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    (gradient,) = torch.autograd.grad(expected, used, upstream)
    factor = alpha * (weight.abs() < 1) + 1 / weight[0].numel()
    torch.testing.assert_close(layer.weight.grad, gradient * factor)


def test_deterministic_binary_connect_uses_signs_both_ways():
    layer = nn.Linear(5, 3)
    slim.binarize_(layer, BinaryConnect())
    x = torch.randn(4, 5, requires_grad=True)
    layer(x).sum().backward()
    signs = torch.where(layer.weight >= 0, 1.0, -1.0)
    assert torch.equal(x.grad, signs.sum(0).expand(4, 5))
    assert torch.allclose(layer.weight.grad, x.sum(0).expand(3, 5))


def test_stochastic_binary_connect_draws_with_hard_sigmoid():
    torch.manual_seed(0)
    layer = nn.Linear(5, 1, bias=False)
    slim.binarize_(layer, BinaryConnect(stochastic=True))
    values = torch.tensor([[-1.0, -0.5, 0.0, 0.8, 1.0]])
    with torch.no_grad():
        layer.weight.copy_(values)
    draws = torch.stack([layer.used_weight().detach() for _ in range(4000)])
    assert set(draws.unique().tolist()) == {-1.0, 1.0}
    share = (draws == 1).double().mean(0)
    expected = ((values + 1) / 2).clamp(0, 1).double()
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert bool(((share - expected).abs() <= 5 * deviation).all())
    assert not torch.equal(layer(torch.eye(5)), layer(torch.eye(5)))
    layer.eval()
    x = torch.randn(3, 5)
    assert torch.equal(layer(x), F.linear(x, values))  # real weights
    packed = layer.packed()
    assert type(packed) is nn.Linear
    assert torch.equal(packed(x), F.linear(x, values))


def test_out_of_range_weights_are_drawn_as_if_clipped():
    layer = nn.Linear(2, 1, bias=False)
    slim.binarize_(layer, BinaryConnect(stochastic=True))
    layer.weight.data = torch.tensor([[-3.0, 3.0]])
    assert all(torch.equal(layer.used_weight(), torch.tensor([[-1.0, 1.0]])) for _ in range(50))


# --- optimizers ---------------------------------------------------------------------------------------------------


def test_learning_rate_scale():
    model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Flatten(), nn.Linear(40, 10))
    slim.binarize_(model, BinaryConnect())
    assert model[0].learning_rate_scale == pytest.approx(1 / math.sqrt(1.5 / (3 * 25 + 8 * 25)))
    assert model[2].learning_rate_scale == pytest.approx(1 / math.sqrt(1.5 / 50))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    slim.binarize_(model, {"0": BinaryConnect(scale_learning_rate=False), "1": XnorNet(), "2": BinaryWeight()})
    assert [layer.learning_rate_scale for layer in layers(model)] == [1, 1]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.002),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.002, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.002),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.002, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.002, foreach=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.002),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [True, False], ids=["optimizer-first", "binarize-first"])
def test_attach_scales_what_the_optimizer_did_and_clips(name, before):
    """The attached step equals the plain optimizer's step on a copy, scaled around the old weight, then clipped."""
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters()) if before else None
    report = slim.binarize_(model, BinaryNet())
    optimizer = optimizer or OPTIMIZERS[name](model.parameters())
    report.attach(optimizer)
    x, t = toy()
    for _ in range(3):
        shadow = copy.deepcopy(model)
        plain = OPTIMIZERS[name](shadow.parameters())
        plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        loss = squared_hinge_loss(model(x), t)
        optimizer.zero_grad()
        loss.backward()
        for a, b in zip(model.parameters(), shadow.parameters(), strict=True):
            b.grad = a.grad.clone()
        old = [p.detach().clone() for p in model.parameters()]
        plain.step()
        optimizer.step()
        scales = {id(layer.weight): layer.learning_rate_scale for layer in layers(model)}
        assert min(scales.values()) > 3
        for start, ours, theirs in zip(old, model.parameters(), shadow.parameters(), strict=True):
            expected = theirs.detach()
            if id(ours) in scales:
                expected = (start + scales[id(ours)] * (expected - start)).clamp(-1, 1)
            torch.testing.assert_close(ours.detach(), expected, rtol=1e-5, atol=1e-6)


def test_without_attach_the_next_forward_clips():
    model = mlp()
    slim.binarize_(model, BinaryConnect())
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    x, t = toy()
    squared_hinge_loss(model(x), t).backward()
    optimizer.step()
    assert float(model[2].weight.detach().abs().max()) > 1
    model(x)
    assert float(model[2].weight.detach().abs().max()) == 1


def test_gradients_accumulate_over_several_forward_passes():
    """Clipping before the first pass must not spoil what an earlier pass saved for its backward."""
    model = convnet()
    slim.binarize_(model, XnorNet())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, t = toy((1, 12, 12), 4, 8)
    for _ in range(2):
        loss = squared_hinge_loss(model(x[:4]), t[:4]) + squared_hinge_loss(model(x[4:]), t[4:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("method", [BinaryWeight(), XnorNet()], ids=["weight", "xnor"])
def test_mean_centring_over_input_channels(method):
    torch.manual_seed(0)
    linear, conv, depthwise = nn.Linear(6, 4), nn.Conv2d(4, 3, 3), nn.Conv2d(4, 4, 3, groups=4)
    for layer, x, axes in (
        (linear, torch.randn(2, 6), (1,)),
        (conv, torch.randn(1, 4, 5, 5), (1,)),
        (depthwise, torch.randn(1, 4, 5, 5), (1, 2, 3)),
    ):
        before = layer.weight.detach().clone()
        slim.binarize_(layer, method)
        layer(x)
        expected = (before - before.mean(axes, keepdim=True)).clamp(-1, 1)
        torch.testing.assert_close(layer.weight.detach(), expected)
        assert bool(expected.any())
        kept = layer.weight.detach().clone()
        layer(x)
        assert torch.equal(layer.weight, kept)  # once per change
    free = nn.Linear(6, 4)
    before = free.weight.detach().clone()
    slim.binarize_(free, XnorNet(center=False))
    free(torch.randn(2, 6))
    assert torch.equal(free.weight, before)


def test_attached_layers_may_be_packed_while_the_optimizer_goes_on():
    model = mlp()
    report = slim.binarize_(model, BinaryConnect())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report.attach(optimizer)
    model[2].__class__, model[2].__dict__ = nn.Linear, nn.Linear(16, 16).__dict__
    x, t = toy()
    train(model, x, t, optimizer, steps=2)


# --- training and packing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=IDS)
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_training_learns_and_packed_equals_eval(method, kind):
    drawn = isinstance(method, BinaryConnect) and method.stochastic
    model = mlp(64, relu=True) if drawn else mlp()  # drawn signs average out over many units only
    report = slim.binarize_(model, method)
    rate = 0.01 if drawn else 0.003
    for layer in layers(model) if drawn else ():
        nn.init.uniform_(layer.weight, -1, 1)  # as the authors of BinaryConnect do
    optimizer: Any = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    if kind == "adam":
        optimizer = torch.optim.Adam(model.parameters(), rate)
    report.attach(optimizer)
    x, t = toy()
    losses = train(model, x, t, optimizer)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    model.eval()
    packed = pack(model)
    assert not layers(packed)
    if drawn:
        assert type(packed[2]) is nn.Linear
    else:
        assert type(packed[2]) is slim.nn.BinaryLinear
        assert packed[2].binarize_input is model[2].binarize_input
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))
        assert float((model(x).argmax(1) == t).double().mean()) > 0.9
    # with gradients the layer computes in plain torch: the same up to rounding
    torch.testing.assert_close(model(x).detach(), packed(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_conv_network_packed_equals_eval(method):
    model = convnet()
    report = slim.binarize_(model, method)
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    report.attach(optimizer)
    x, t = toy((1, 12, 12), 4, 64)
    losses = train(model, x, t, optimizer, steps=25)
    if not layers(model)[0].stochastic:  # whose losses are noisier than 25 steps can tell
        assert sum(losses[-3:]) < sum(losses[:3])
    model.eval()
    packed = pack(model)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))
    if isinstance(method, XnorNet):
        assert [type(m).__name__ for m in packed if "Conv" in type(m).__name__] == [
            "Conv2d", "BinaryConv2d", "BinaryConv2d"
        ]  # fmt: skip
        bits = sum(m.signs.numel() for m in packed if isinstance(m, slim.nn.BinaryConv2d))
        assert bits * 8 == 8 * 6 * 9 + 8 * 8 * 9


def test_binary_net_products_are_whole_numbers():
    layer = nn.Linear(33, 8, bias=False)
    slim.binarize_(layer, BinaryNet())
    y = layer(torch.randn(5, 33)).detach()
    assert torch.equal(y, y.round())
    assert bool(((y.long() - 33) % 2 == 0).all())


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, 2, 1, 1, 2), nn.Conv2d(4, 6, 4, padding="same", bias=False)])
def test_geometry_survives_packing(layer):
    layer = copy.deepcopy(layer)
    slim.binarize_(layer, XnorNet())
    x = torch.randn(2, 4, 9, 8)
    expected = layer(x).detach()
    layer.eval()
    torch.testing.assert_close(layer.packed()(x).detach(), expected, rtol=1e-5, atol=1e-5)
    assert (layer.packed().bias is None) == (layer.bias is None)


def test_padding_adds_zeros_not_signs():
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.5)
    slim.binarize_(layer, BinaryNet())
    assert layer(torch.ones(1, 1, 3, 3))[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


# --- drop-in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_state_copies_and_pickles_give_the_same_bits(method):
    x, t = toy()
    model = mlp()
    report = slim.binarize_(model, method)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, x, t, optimizer, steps=5)  # not attached: the last step is not clipped yet
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert list(state) == list(mlp().state_dict())
    fresh = mlp()
    slim.binarize_(fresh, method)
    fresh.load_state_dict(state)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [fresh, copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        expected = model.eval()(x)
        for other in copies:
            assert torch.equal(other.eval()(x), expected)
    assert [layer.method for layer in layers(copies[2])] == [method] * len(report.binarized)


def test_moves_and_dtypes():
    model = mlp()
    slim.binarize_(model, BinaryNet())
    model.double()
    assert model(torch.randn(4, 12).double()).dtype == torch.float64
    model.bfloat16().eval()
    with torch.no_grad():
        assert model(torch.randn(4, 12).bfloat16()).dtype == torch.bfloat16
    model.float().train()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(4, 12)).dtype == torch.bfloat16


def test_functional_call_leaves_the_weight_alone():
    layer = nn.Linear(4, 3)
    slim.binarize_(layer, XnorNet())
    before = layer.weight.detach().clone()
    other = torch.full((3, 4), 2.0)
    y = torch.func.functional_call(layer, {"weight": other, "bias": torch.zeros(3)}, (torch.ones(1, 4),))
    assert torch.equal(y, torch.full((1, 3), 8.0))
    assert torch.equal(other, torch.full((3, 4), 2.0))
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("method", [BinaryNet(), XnorNet(first="binary", last="binary")], ids=["net", "xnor"])
def test_compiled_training_and_eval_match_eager(method):
    x, t = toy()
    eager = mlp()
    slim.binarize_(eager, method)
    compiled_model = copy.deepcopy(eager)
    compiled = torch.compile(compiled_model, backend="aot_eager", fullgraph=True)
    losses = []
    for model, call in ((eager, eager), (compiled_model, compiled)):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(2):
            loss = squared_hinge_loss(call(x), t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    eager.eval(), compiled_model.load_state_dict(eager.state_dict()), compiled_model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-4)


def test_empty_batch_and_frozen_weights():
    model = mlp()
    slim.binarize_(model, BinaryNet())
    model.eval()
    with torch.no_grad():
        assert model(torch.empty(0, 12)).shape == (0, 3)
    model.requires_grad_(False)
    x = torch.randn(2, 12, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


# --- loss and block -----------------------------------------------------------------------------------------------


def test_squared_hinge_loss():
    logits = torch.tensor([[0.5, -2.0], [3.0, 0.0]], requires_grad=True)
    loss = squared_hinge_loss(logits, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((0.25 + 0 + 16 + 1) / 4)
    loss.backward()
    assert torch.allclose(logits.grad, torch.tensor([[-1.0, 0.0], [8.0, -2.0]]) / 4)
    for bad, error in (
        ((torch.zeros(2, 2).long(), torch.tensor([0, 1])), TypeError),
        ((torch.zeros(2, 2), torch.tensor([0.0, 1.0])), TypeError),
        ((torch.zeros(2, 2), torch.tensor([0, 2])), ValueError),
        ((torch.zeros(2, 2), torch.tensor([-1, 0])), ValueError),
        ((torch.zeros(2, 2), torch.tensor([0])), ValueError),
    ):
        with pytest.raises(error, match=r"^(logits|targets): expected"):
            squared_hinge_loss(*bad)


def test_xnor_block_has_the_papers_order():
    block = xnor_block(3, 5, 3, stride=2, padding=1, pool=2)
    assert [type(m) for m in block] == [nn.BatchNorm2d, nn.Conv2d, nn.MaxPool2d]
    assert block(torch.randn(2, 3, 16, 16)).shape == (2, 5, 4, 4)
    assert len(xnor_block(3, 5, 3)) == 2
