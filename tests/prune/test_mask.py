# SPDX-License-Identifier: Apache-2.0
"""Masks as parametrizations: training, state dicts, copies, baking."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimtorch import prune
from slimtorch.prune import Magnitude, prune_

from .networks import CASES

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


def pruned(name: str = "conv", sparsity: float = 0.8) -> tuple[nn.Module, Any]:
    model = CASES[name].model()
    prune_(model, Magnitude(sparsity))
    return model, CASES[name].inputs()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, after: Callable[[], Any] = lambda: None
) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(16, 20, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
        after()


def test_masked_weights_get_no_gradient() -> None:
    model, x = pruned()
    model(x).square().sum().backward()
    for name, mask in prune.masks(model).items():
        original = model.get_submodule(name).parametrizations.weight.original  # type: ignore[union-attr]
        assert original.grad is not None
        assert not bool(original.grad[~mask].any())
        assert bool(original.grad[mask].any())


def test_gradient_of_kept_weights_is_that_of_the_zeroed_dense_layer() -> None:
    layer = nn.Linear(12, 9).double()
    prune_(layer, Magnitude(0.5))
    dense = copy.deepcopy(layer)
    prune.bake_(dense)
    x = torch.randn(5, 12, dtype=torch.float64)
    layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    mask = prune.masks(layer)[""]
    assert torch.equal(layer.parametrizations.weight.original.grad, torch.where(mask, dense.weight.grad, 0))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_built_before_pruning_goes_on(kind: str) -> None:
    """Same parameters, same state: as an optimizer that zeroes by hand."""
    model = CASES["mlp"].model()
    optimizer = OPTIMIZERS[kind](model.parameters())
    identities = {id(p) for p in model.parameters()}
    train(model, optimizer, 5)
    state_before = {id(p): s for p, s in optimizer.state.items()}
    prune_(model, Magnitude(0.7))
    assert {id(p) for p in model.parameters()} == identities
    masks = prune.masks(model)
    kept_before = {n: model.get_submodule(n).weight.detach().clone() for n in masks}  # type: ignore[union-attr, operator]
    train(model, optimizer, 10)
    assert all(optimizer.state[p] is state_before[id(p)] for p in model.parameters() if id(p) in state_before)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight.detach()  # type: ignore[union-attr, operator]
        assert not bool(weight[~mask].any())
        assert bool((weight[mask] != kept_before[name][mask]).any())

    assert prune.bake_(model) == list(masks)
    assert {id(p) for p in model.parameters()} == identities
    before = model.get_submodule("fc1").weight.detach().clone()  # type: ignore[union-attr, operator]
    train(model, optimizer, 1)
    assert not torch.equal(model.get_submodule("fc1").weight, before)  # type: ignore[arg-type]


def test_gradients_present_when_pruning_are_kept() -> None:
    model = CASES["mlp"].model()
    model(CASES["mlp"].inputs()).sum().backward()
    grads = {id(p): p.grad for p in model.parameters()}
    prune_(model, Magnitude(0.5))
    assert all(p.grad is grads[id(p)] for p in model.parameters())


def test_frozen_weights_stay_frozen() -> None:
    layer = nn.Linear(4, 4)
    layer.weight.requires_grad_(False)
    prune_(layer, Magnitude(0.5))
    assert not layer.parametrizations.weight.original.requires_grad
    prune.bake_(layer)
    assert not layer.weight.requires_grad
    assert isinstance(layer.weight, nn.Parameter)


def test_state_dict_into_an_equally_masked_model() -> None:
    model, x = pruned()
    fresh = CASES["conv"].build()
    assert prune.mask_like_(fresh, model.state_dict()) == list(prune.masks(model))
    fresh.load_state_dict(model.state_dict())
    model.eval()
    fresh.eval()
    assert torch.equal(fresh(x), model(x))
    assert prune.sparsity(fresh) == prune.sparsity(model)


def test_state_dict_into_a_model_with_other_masks() -> None:
    model, x = pruned()
    other = CASES["conv"].build()
    prune_(other, Magnitude(0.1))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_state_dict_through_a_file() -> None:
    model, x = pruned()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = CASES["conv"].build()
    prune.mask_like_(fresh, state)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_mask_like_on_a_bare_layer_and_without_masks() -> None:
    layer = nn.Linear(6, 5)
    prune_(layer, Magnitude(0.5))
    fresh = nn.Linear(6, 5)
    assert prune.mask_like_(fresh, layer.state_dict()) == [""]
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.weight, layer.weight)
    assert prune.mask_like_(nn.Linear(6, 5), nn.Linear(6, 5).state_dict()) == []


@pytest.mark.parametrize("damage", ["name", "shape", "dtype"])
def test_mask_like_refuses_what_does_not_fit(damage: str) -> None:
    model, _ = pruned("mlp")
    state = dict(model.state_dict())
    key = "out.parametrizations.weight.0.mask"
    mask = state.pop(key)
    if damage == "name":
        state["output.parametrizations.weight.0.mask"] = mask
    else:
        state[key] = mask[:, 1:] if damage == "shape" else mask.float()
    fresh = CASES["mlp"].build()
    with pytest.raises(ValueError, match="state_dict: 'out"):
        prune.mask_like_(fresh, state)
    assert prune.masks(fresh) == {}


def test_deepcopy_is_independent() -> None:
    model, x = pruned()
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    prune_(twin, Magnitude(0.95))
    assert round(prune.sparsity(model), 2) == 0.8
    assert round(prune.sparsity(twin), 2) == 0.95


def test_baking_a_copy_leaves_the_original_masked() -> None:
    """torch keeps the property in a class that a deep copy shares."""
    model, x = pruned()
    expected = model.eval()(x)
    twin = copy.deepcopy(model)
    prune.bake_(twin)
    assert torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)
    assert len(prune.masks(model)) == 4
    again = copy.deepcopy(model)
    prune.bake_(model)
    assert torch.equal(again(x), expected)
    prune_(twin, Magnitude(0.9))
    assert torch.equal(model(x), expected)

    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    twin = copy.deepcopy(layer)
    prune_(twin, Magnitude(0.5))
    assert not bool((layer.weight == 0).any())
    prune.bake_(twin)
    assert parametrize.is_parametrized(twin, "bias")
    assert int((twin.weight == 0).sum()) == 8


def test_to_dtype() -> None:
    model, x = pruned()
    model.to(torch.bfloat16).eval()
    assert all(m.dtype == torch.bool for m in prune.masks(model).values())
    assert model(x.bfloat16()).dtype == torch.bfloat16
    model.to("meta")
    assert all(m.is_meta for m in prune.masks(model).values())


def test_nan_behind_the_mask_does_not_leak() -> None:
    layer = nn.Linear(8, 8)
    prune_(layer, Magnitude(0.5))
    mask = prune.masks(layer)[""]
    with torch.no_grad():
        layer.parametrizations.weight.original[~mask] = float("nan")
    assert bool(layer(torch.ones(2, 8)).isfinite().all())
    prune.bake_(layer)
    assert bool(layer.weight.isfinite().all())


def test_assigning_the_weight_keeps_the_mask() -> None:
    layer = nn.Linear(8, 8)
    prune_(layer, Magnitude(0.5))
    mask = prune.masks(layer)[""]
    layer.weight = torch.ones(8, 8)
    assert torch.equal(layer.weight, mask.float())
    with pytest.raises(ValueError, match="shape"):
        layer.weight = torch.ones(8, 7)


def test_bake_gives_plain_layers() -> None:
    model, x = pruned()
    expected = model.eval()(x)
    keys = list(CASES["conv"].build().state_dict())
    assert prune.bake_(model) == ["conv1", "conv2", "fc", "out"]
    assert list(model.state_dict()) == keys
    assert type(model.get_submodule("fc")) is nn.Linear
    assert torch.equal(model(x), expected)
    assert prune.masks(model) == {}
    assert round(prune.sparsity(model), 2) == 0.8
    assert prune.bake_(model) == []


def test_other_parametrizations() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Double())
    dense = layer.weight.detach().clone()
    prune_(layer, Magnitude(0.5))
    prune_(layer, Magnitude(0.75))
    mask = prune.masks(layer)[""]
    assert int(mask.sum()) == 16
    assert torch.equal(layer.weight, torch.where(mask, dense, 0))
    with pytest.raises(ValueError, match="also parametrized by Double"):
        prune.bake_(layer)
    fresh = nn.Linear(8, 8)
    parametrize.register_parametrization(fresh, "weight", Double())
    prune.mask_like_(fresh, layer.state_dict())
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.weight, layer.weight)


def test_failure_half_way_leaves_no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASES["mlp"].model()
    prune_(model, {"fc1": Magnitude(0.5)})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    register = parametrize.register_parametrization

    def fail_on_out(layer: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if layer.weight.shape[0] == 4:  # type: ignore[union-attr]
            raise RuntimeError("boom")
        return register(layer, *args, **kwargs)

    monkeypatch.setattr(parametrize, "register_parametrization", fail_on_out)
    with pytest.raises(RuntimeError, match="boom"):
        prune_(model, Magnitude(0.9))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_under_no_grad_functional_call_and_autocast() -> None:
    model, x = pruned()
    model.eval()
    with torch.no_grad():
        expected = model(x)
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert torch.equal(torch.func.functional_call(model, values, (x,)), expected)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_pruned_and_baked_under_inference_mode() -> None:
    model, x = CASES["conv"].model(), CASES["conv"].inputs()
    with torch.inference_mode():
        prune_(model, Magnitude(0.5))
        prune_(model, Magnitude(0.8))
    model(x).sum().backward()
    with torch.inference_mode():
        prune.bake_(model)
    model(x).sum().backward()


def test_sparsity_of_models_without_layers() -> None:
    assert prune.sparsity(nn.ReLU()) == 0.0
