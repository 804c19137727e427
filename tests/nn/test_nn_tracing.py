# SPDX-License-Identifier: Apache-2.0
"""torch.compile, torch.export, torch.func, autocast, inference_mode."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import slimtorch as slim
from tests.nn.cases import Case, assert_as_good, each_case, with_dtype


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def _assert_trains_alike(compiled: nn.Module, eager: nn.Module, batches: list[torch.Tensor]) -> None:
    for x in batches:
        results = []
        for model in (compiled, eager):
            eager.zero_grad()
            inputs = x.clone().requires_grad_()
            torch._dynamo.mark_dynamic(inputs, 0)
            y = model(inputs)
            y.square().sum().backward()
            results.append([y.detach(), inputs.grad, *(p.grad.clone() for p in eager.parameters())])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


@each_case
def test_compiles_whole_with_dynamic_batch(case: Case) -> None:
    packed = case.packed()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    _assert_trains_alike(compiled, packed, [case.input(3)])
    with torch._dynamo.config.patch(error_on_recompile=True):
        _assert_trains_alike(compiled, packed, [case.input(5), case.input(16)])


@each_case
def test_compiled_layers_follow_a_load(case: Case) -> None:
    packed = case.fresh()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    x = case.input(3)
    compiled(x)
    packed.load_state_dict(case.packed().state_dict())
    torch.testing.assert_close(compiled(x), case.twin()(x))


def test_inductor_trains_a_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        slim.nn.SparseConv2d(3, 8, 3, padding=1, activation="relu"),
        slim.nn.BlockSparseConv2d(8, 4, 3, stride=2, block_size=(4, 4)),
        nn.Flatten(),
        slim.nn.SparseLinear(36, 16),
        nn.ReLU(),
        slim.nn.BlockSparseLinear(16, 5, block_size=(4, 4)),
    )
    compiled = torch.compile(model, fullgraph=True)
    batches = [torch.randn(size, 3, 8, 8) for size in (2, 3, 8)]
    _assert_trains_alike(compiled, model, batches[:1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        _assert_trains_alike(compiled, model, batches[1:])


@each_case
def test_exports_with_dynamic_batch(case: Case) -> None:
    packed, twin = case.packed().eval(), case.twin().eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(packed, (case.input(3),), dynamic_shapes=({0: batch},))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("slimtorch" in name for name in operators)
    assert not any("plan" in name for name in operators)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for module in (program.module(), torch.export.load(buffer).module()):
        for size in (1, 3, 17):
            torch.testing.assert_close(module(case.input(size)), twin(case.input(size)))


@each_case
def test_functional_call_uses_the_given_values(case: Case) -> None:
    packed, twin, x = case.packed(), case.twin(), case.input(3)
    changed = {name: (tensor.detach() * 2).requires_grad_() for name, tensor in packed.named_parameters()}
    y = torch.func.functional_call(packed, changed, (x,))
    torch.testing.assert_close(y, 2 * twin(x))
    torch.testing.assert_close(packed(x), twin(x))
    y.square().sum().backward()
    twin(x).square().sum().backward()
    torch.testing.assert_close(changed[packed.VALUES].grad, 2 * packed._gather(twin.weight.grad), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(changed["bias"].grad, 2 * twin.bias.grad, rtol=1e-4, atol=1e-4)
    assert packed._values().grad is None


@each_case
def test_functional_call_with_other_positions(case: Case) -> None:
    """Plans belong to the positions that they were derived from."""
    packed, x = case.packed(), case.input(3)
    donor = case.fresh()
    y = torch.func.functional_call(packed, dict(donor.state_dict()), (x,))
    torch.testing.assert_close(y, donor(x))
    same = torch.func.functional_call(packed, dict(packed.state_dict()), (x,))
    assert torch.equal(same, packed(x))


@each_case
def test_inference_mode_and_no_grad(case: Case) -> None:
    packed, x = case.packed(), case.input(3)
    y = packed(x)
    with torch.inference_mode():
        assert torch.equal(packed(x), y)
        assert packed(x).is_inference()
    with torch.no_grad():
        assert torch.equal(packed(x), y)
        assert not packed(x).requires_grad


@each_case
def test_autocast_follows_the_twin(case: Case) -> None:
    packed, twin, x = case.packed(), case.twin(), case.input(4)
    exact = case.dense().double()
    exact.load_state_dict({name: tensor.double() for name, tensor in twin.state_dict().items()})
    ours, theirs, wide = x.clone().requires_grad_(), x.clone().requires_grad_(), x.double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = packed(ours), twin(theirs)
        assert y.dtype == expected.dtype == torch.bfloat16
    exact_y = exact(wide)
    assert_as_good(y, expected, exact_y)
    for out in (y, expected, exact_y):
        out.sum().backward()
    assert packed._values().grad.dtype == packed.bias.grad.dtype == torch.float32
    assert_as_good(ours.grad, theirs.grad, wide.grad)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert packed(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), packed(x))


@each_case
def test_autocast_takes_bfloat16_inputs(case: Case) -> None:
    packed, twin = case.packed(), case.twin()
    x = with_dtype(case, torch.bfloat16).input(3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert packed(x).dtype == twin(x).dtype == torch.bfloat16
