# SPDX-License-Identifier: Apache-2.0
"""state_dict, copies, pickles, devices and dtypes."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slimtorch as slim
from slimtorch.nn import PackedLayer
from tests.nn.cases import Case, compare, each_case, each_quantized, each_sparse, with_dtype


def _through_torch(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _other(case: Case, density: float) -> Case:
    return Case(case.name, case.packed_class, case.dense, case.sample, case.block_size, case.options, density=density)


# Names in the state of a family: what is trained, and where it stands.
FIELDS: dict[str, tuple[str, set[str]]] = {
    "sparse": ("values", {"columns", "row_offsets"}),
    "block_sparse": ("values", {"block_columns", "block_row_offsets"}),
    "codebook": ("codebook", {"codes"}),
    "sparse_codebook": ("codebook", {"codes", "gaps", "row_offsets"}),
    "binary": ("scale", {"signs"}),
}


@each_case
def test_the_state_is_canonical(case: Case) -> None:
    packed = case.packed()
    values, positions = FIELDS[case.name.rsplit("_", 1)[0]]
    assert set(packed.state_dict()) == {values, "bias", "weight_shape", *positions}
    assert {name for name, _ in packed.named_parameters()} == {values, "bias"}
    assert packed.state_dict()["weight_shape"].tolist() == list(case.twin().weight.shape)
    for name in positions:
        narrow = name in ("codes", "gaps", "signs")
        assert packed.state_dict()[name].dtype == (torch.uint8 if narrow else torch.int32)


@each_sparse
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.3, 1.0])
def test_a_sparser_or_denser_state_loads(case: Case, assign: bool, density: float) -> None:
    source = _other(case, density)
    target = case.fresh() if density < 1 else case.packed()
    values, bias = target._values(), target.bias
    optimizer = torch.optim.SGD(target.parameters(), 0.1)
    x = case.input(4)
    target(x).sum().backward()
    target.load_state_dict(_through_torch(source.packed().state_dict()), assign=assign)
    assert torch.equal(target.weight, source.twin().weight)
    compare(case, target, source.twin(), x)
    assert target._values().grad is None or target._values().grad.shape == target._values().shape
    if not assign:
        assert target._values() is values
        assert target.bias is bias
        optimizer.zero_grad()
        target(x).sum().backward()
        optimizer.step()  # the same parameters, in their new size
        assert not torch.equal(target.weight, source.twin().weight) or density == 0
    # what the backward pass needs follows too
    y = x.clone().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(target(y).sum(), y)[0],
        torch.autograd.grad(_dense_of(target)(y).sum(), y)[0],
        rtol=1e-4,
        atol=1e-5,
    )


def _dense_of(layer: PackedLayer) -> nn.Module:
    return layer.to_dense()


@each_case
def test_loading_casts_like_the_twin(case: Case) -> None:
    target = with_dtype(case, torch.bfloat16).fresh()
    target.load_state_dict(case.packed().state_dict())
    assert target._values().dtype == torch.bfloat16
    assert torch.equal(target.weight, case.twin().weight.bfloat16())


def _break(state: dict[str, torch.Tensor], case: Case, how: str) -> str:
    """Damage a state; returns the name of the tensor that should be blamed."""
    columns, offsets = ("block_columns", "block_row_offsets") if "block" in case.name else ("columns", "row_offsets")
    if how == "column out of range":
        state[columns][-1] = 10_000
        return columns
    if how == "negative column":
        state[columns][0] = -1
        return columns
    if how == "columns fall":
        state[columns][:2] = state[columns][:2].flip(0)
        return columns
    if how == "columns missing":
        state[columns] = state[columns][:-1]
        return columns
    if how == "int64":
        state[columns] = state[columns].long()
        return columns
    if how == "offsets fall":
        state[offsets][1] = 10_000
        return offsets
    if how == "offsets end early":
        state[offsets][-1] -= 1
        return offsets
    if how == "too few offsets":
        state[offsets] = state[offsets][1:]
        return offsets
    if how == "integer values":
        state["values"] = state["values"].int()
        return "values"
    if how == "other shape":
        state["weight_shape"] = state["weight_shape"] + 1
        return "weight_shape"
    assert how == "bias"
    state["bias"] = state["bias"][1:]
    return "bias"


@each_sparse
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        "column out of range", "negative column", "columns fall", "columns missing", "int64", "offsets fall",
        "offsets end early", "too few offsets", "integer values", "other shape", "bias",
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused_and_changes_nothing(case: Case, how: str, assign: bool) -> None:
    donor = _other(case, 0.7).packed()
    state = {name: tensor.clone() for name, tensor in donor.state_dict().items()}
    blamed = _break(state, case, how)
    model = nn.Sequential(case.packed())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    y = model(case.input(3))
    with pytest.raises(RuntimeError, match=rf"0\.{blamed}: expected"):
        model.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}, assign=assign)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(case.input(3)), y)


def _damages(layer: PackedLayer) -> dict[str, tuple[str, torch.Tensor]]:
    """Ways to damage the state of a quantized layer: tensor to blame, and what it becomes."""
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    stream = "signs" if "signs" in state else "codes"
    damages = {
        "stream too short": (stream, state[stream][:-1]),
        "stream too long": (stream, torch.cat([state[stream], state[stream][:1]])),
        "stream of another dtype": (stream, state[stream].int()),
        "integer values": (layer.VALUES, state[layer.VALUES].int()),
        "values of another size": (layer.VALUES, state[layer.VALUES][..., 1:]),
        "other shape": ("weight_shape", state["weight_shape"] + 1),
    }
    if "gaps" in state:
        gaps, offsets = state["gaps"], state["row_offsets"]
        last = int(offsets[torch.nonzero(offsets)[0]]) - 1  # the last entry of the first row that has any
        far, skip = gaps.clone(), gaps.clone()
        far[last], skip[last] = 254, 255
        fall, early = offsets.clone(), offsets.clone()
        fall[1], early[-1] = 10_000, early[-1] - 1
        damages |= {
            "column out of range": ("gaps", far),
            "row that ends with a skip": ("gaps", skip),
            "offsets fall": ("row_offsets", fall),
            "offsets end early": ("row_offsets", early),
            "too few offsets": ("row_offsets", offsets[1:]),
        }
    return damages


@each_quantized
@pytest.mark.parametrize("assign", [False, True])
def test_a_damaged_quantized_state_is_refused_and_changes_nothing(case: Case, assign: bool) -> None:
    donor = case.packed()
    for blamed, tensor in _damages(donor).values():
        model = nn.Sequential(case.packed())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        y = model(case.input(3))
        state = {f"0.{name}": value.clone() for name, value in donor.state_dict().items()}
        with pytest.raises(RuntimeError, match=rf"0\.{blamed}: expected"):
            model.load_state_dict({**state, f"0.{blamed}": tensor}, assign=assign)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert torch.equal(model(case.input(3)), y)


def test_sparser_and_denser_sparse_codebooks_load() -> None:
    torch.manual_seed(0)
    target = slim.nn.SparseCodebookLinear(300, 20)
    for density in (0.0, 0.005, 0.4):
        dense = nn.Linear(300, 20)
        with torch.no_grad():
            dense.weight.mul_(torch.rand(20, 300) < density)
        donor = slim.nn.SparseCodebookLinear.from_dense(dense)
        target.load_state_dict(_through_torch(donor.state_dict()))
        x = torch.randn(5, 300)
        assert torch.equal(target(x), donor(x))
        assert torch.equal(target.weight, donor.weight)


def test_another_block_size_is_refused() -> None:
    donor = slim.nn.BlockSparseLinear(64, 64, block_size=(8, 8))
    target = slim.nn.BlockSparseLinear(64, 64, block_size=(16, 16))
    with pytest.raises(RuntimeError, match=r"values: expected shape \[nblocks, 16, 16\]"):
        target.load_state_dict(donor.state_dict())


@each_case
def test_missing_and_unexpected_keys_are_reported_as_by_the_twin(case: Case) -> None:
    packed = case.packed()
    state = packed.state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        case.fresh().load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        case.fresh().load_state_dict({**state, "weight": case.twin().weight})
    with pytest.raises(RuntimeError, match="Missing key"):
        case.fresh().load_state_dict(case.twin().state_dict())
    # values alone fit the positions that are there
    doubled = 2 * packed.weight.detach()
    result = packed.load_state_dict({packed.VALUES: 2 * state[packed.VALUES]}, strict=False)
    assert "bias" in result.missing_keys
    assert torch.equal(packed.weight, doubled)


@each_case
def test_deepcopy_and_pickle(case: Case) -> None:
    packed, x = case.packed(), case.input(3)
    y = packed(x)
    copies = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))]
    for twin in copies:
        assert torch.equal(twin(x), y)
        assert repr(twin) == repr(packed)
        with torch.no_grad():
            twin._values().zero_()
        assert torch.equal(packed(x), y)
    assert len(pickle.dumps(packed)) < len(pickle.dumps(packed.state_dict())) + 20_000  # no plans inside


@each_case
def test_torch_save(case: Case, tmp_path: Path) -> None:
    packed, x = case.packed(), case.input(3)
    torch.save(packed, tmp_path / "module.pt")
    torch.save(packed.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    assert torch.equal(loaded(x), packed(x))
    fresh = case.fresh()
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, mmap=True))
    assert torch.equal(fresh(x), packed(x))


@each_case
def test_to_dtype(case: Case) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        packed, twin = case.packed().to(dtype), case.twin().to(dtype)
        assert packed._values().dtype == packed.bias.dtype == dtype
        assert not any(position.is_floating_point() for position in packed._positions())
        assert torch.equal(packed.weight, twin.weight)
        compare(with_dtype(case, dtype), packed, twin, with_dtype(case, dtype).input(5))


@each_case
def test_meta_and_back(case: Case) -> None:
    packed, x = case.packed(), case.input(3)
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    y = packed(x)
    hollow = packed.to("meta")
    assert all(tensor.is_meta for tensor in hollow.state_dict().values())
    hollow.load_state_dict(state, assign=True)
    assert torch.equal(hollow(x), y)
    # to_empty leaves positions that mean nothing: an error, never a wild read
    empty = case.packed().to("meta").to_empty(device="cpu")
    for position in empty._positions():
        position.fill_(7 if position.dtype == torch.uint8 else -7)
    empty._prepare()
    if "row_offsets" in state or "block_row_offsets" in state:  # of the others, any bits are a weight
        with pytest.raises(ValueError, match="expected"):
            empty(x)
    empty.load_state_dict(state)
    assert torch.equal(empty(x), y)


@each_sparse
def test_plans_survive_what_keeps_positions(case: Case) -> None:
    packed = case.packed()
    plans = packed._plans
    assert plans
    packed.bfloat16().float().double().requires_grad_(False).share_memory()
    assert packed._plans is plans
    held = packed.format
    assert held.plan(packed.groups) is packed.format.plan(packed.groups)  # cached in the layer, not in the object


@each_sparse
def test_evaluation_derives_no_backward_plan(case: Case) -> None:
    twin = case.twin().eval()
    packed = case.packed_class.from_dense(twin, **case.options)
    assert set(packed._plans) == {(packed.groups, False)}
    packed.train()
    assert set(packed._plans) == {(packed.groups, False), (packed.groups, True)}


@each_case
@pytest.mark.parametrize("gradients", [False, True])
def test_no_change_of_the_values_goes_unnoticed(case: Case, gradients: bool) -> None:
    """Nothing that a call derives from the values may outlive them, however they are changed."""
    packed, x = case.packed(), case.input(70)

    def call() -> torch.Tensor:
        with torch.set_grad_enabled(gradients):
            return (packed(x) - packed.bias.view(-1, *[1] * (len(case.sample) - 1))).detach()

    y = call()

    def assert_scaled(factor: float) -> None:
        torch.testing.assert_close(call(), factor * y, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        packed._values().mul_(2)
    assert_scaled(2)
    packed._values().data = packed._values().data * 2
    assert_scaled(4)
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector([packed._values()]) * 2, [packed._values()])
    assert_scaled(8)
    packed.load_state_dict({**packed.state_dict(), packed.VALUES: packed._values().detach() * 2})
    assert_scaled(16)
    setattr(packed, packed.VALUES, nn.Parameter(packed._values().detach() * 2))
    assert_scaled(32)
    packed._values().data.mul_(2)  # which torch's version counter does not see
    assert_scaled(64)


@each_case
def test_to_dtype_and_pickle_after_use(case: Case) -> None:
    packed, twin, x = case.packed(), case.twin(), case.input(70)
    packed(x)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        packed(x.to(packed._values().dtype))
        packed, twin = packed.to(dtype), twin.to(dtype)
        compare(with_dtype(case, dtype), packed, twin, x.to(dtype))
    for same in (copy.deepcopy(packed.format), pickle.loads(pickle.dumps(packed.format))):
        assert torch.equal(same.to_dense(), packed.weight)
