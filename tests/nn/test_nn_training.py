# SPDX-License-Identifier: Apache-2.0
"""Backward, training loops, DistributedDataParallel."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import slimtorch as slim
from tests.nn.cases import Case, assert_as_good, each_case, each_sparse, stored, with_dtype


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [(), (0,), (1,), (19,)], ids=str)
def test_gradients_equal_the_twins(case: Case, dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    case = with_dtype(case, dtype)
    twin, packed = case.twin(), case.packed()
    exact = case.dense().double()
    exact.load_state_dict({name: tensor.double() for name, tensor in twin.state_dict().items()})
    x = case.input(*batch)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_(), x.double().requires_grad_()]
    y = packed(inputs[0])
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    y.backward(grad)
    twin(inputs[1]).backward(grad)
    exact(inputs[2]).backward(grad.double())
    assert_as_good(inputs[0].grad, inputs[1].grad, inputs[2].grad)
    assert_as_good(packed.bias.grad, twin.bias.grad, exact.bias.grad)
    expected = packed._gather(twin.weight.grad)
    assert_as_good(packed._values().grad, expected, copy.deepcopy(packed).double()._gather(exact.weight.grad))


@each_case
def test_expanded_and_strided_gradients(case: Case) -> None:
    twin, packed = case.twin(), case.packed()
    x, z = case.input(6).requires_grad_(), case.input(6).requires_grad_()
    packed(x).sum().backward()  # an expanded scalar
    twin(z).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed._values().grad, packed._gather(twin.weight.grad), rtol=1e-4, atol=1e-4)
    x.grad = z.grad = None
    packed(x).transpose(0, -1)[..., ::2].square().sum().backward()
    twin(z).transpose(0, -1)[..., ::2].square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-4)


@each_case
def test_only_what_asks_for_gradients_gets_them(case: Case) -> None:
    packed = case.packed()
    packed._values().requires_grad_(False)
    packed(case.input(2)).sum().backward()
    assert packed._values().grad is None
    assert packed.bias.grad is not None
    packed.bias.requires_grad_(False)
    assert not packed(case.input(2)).requires_grad
    x = case.input(2).requires_grad_()
    packed(x).sum().backward()
    assert x.grad is not None
    assert packed._values().grad is None


@each_case
def test_gradcheck(case: Case) -> None:
    case = with_dtype(case, torch.float64)
    for activation in (None, "relu"):
        packed = case.packed_class.from_dense(case.twin(), activation=activation, **case.options)
        x = case.input(2).requires_grad_()
        names = [name for name, _ in packed.named_parameters()]

        def call(
            x: torch.Tensor, *tensors: torch.Tensor, packed: nn.Module = packed, names: list[str] = names
        ) -> torch.Tensor:
            return torch.func.functional_call(packed, dict(zip(names, tensors, strict=True)), (x,))

        inputs = (x, *(p.detach().clone().requires_grad_() for p in packed.parameters()))
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@each_sparse
def test_training_follows_the_masked_twin(case: Case) -> None:
    case = with_dtype(case, torch.float64)
    twin, packed = case.twin(), case.packed()
    pattern = stored(packed)
    ours = torch.optim.Adam(packed.parameters(), 1e-2)
    theirs = torch.optim.Adam(twin.parameters(), 1e-2)
    for step in range(5):
        x = case.input(8, seed=step)
        target = torch.randn(twin(x).shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
        for model, optimizer in ((packed, ours), (twin, theirs)):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), target).backward()
            if model is twin:
                twin.weight.grad.mul_(pattern)
            optimizer.step()
    torch.testing.assert_close(packed.weight, twin.weight)
    torch.testing.assert_close(packed.bias, twin.bias)


@each_case
def test_a_plan_derived_in_inference_mode_serves_training(case: Case) -> None:
    packed = case.packed_class.from_dense(case.twin().eval(), **case.options)
    packed._plans.clear()
    with torch.inference_mode():
        packed(case.input(3))
    packed(case.input(3).requires_grad_()).sum().backward()
    assert packed._values().grad is not None


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        slim.nn.SparseConv2d.from_dense(_pruned(nn.Conv2d(3, 8, 3, padding=1))),
        nn.ReLU(),
        slim.nn.BlockSparseConv2d.from_dense(_pruned(nn.Conv2d(8, 8, 3, stride=2)), block_size=(4, 4)),
        nn.Flatten(),
        slim.nn.SparseLinear.from_dense(_pruned(nn.Linear(72, 16))),
        slim.nn.BlockSparseLinear(16, 5, block_size=(4, 4)),
    )


def _pruned(layer: nn.Module) -> nn.Module:
    slim.prune_(layer, slim.prune.Magnitude(sparsity=0.5))
    return layer


def _train_one_step(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        model = DistributedDataParallel(_model())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        generator = torch.Generator().manual_seed(rank)
        model(torch.randn(4, 3, 8, 8, generator=generator)).square().mean().backward()
        grads = {name: parameter.grad.clone() for name, parameter in model.module.named_parameters()}
        optimizer.step()
        torch.save((grads, model.module.state_dict()), f"{out}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    mp.spawn(_train_one_step, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    (first, first_state), (second, second_state) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first_state[name], second_state[name]) for name in first_state)
    halves = []
    for rank in (0, 1):
        model = _model()
        generator = torch.Generator().manual_seed(rank)
        model(torch.randn(4, 3, 8, 8, generator=generator)).square().mean().backward()
        halves.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in first.items():
        assert torch.equal(grad, second[name])
        torch.testing.assert_close(grad, (halves[0][name] + halves[1][name]) / 2)
