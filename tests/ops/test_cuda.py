# SPDX-License-Identifier: Apache-2.0
"""block_sparse_linear on CUDA, and what the other operators do there. Skipped where there is no device."""

from __future__ import annotations

import pytest
import torch

from slimtorch.formats import BlockSparse
from tests.ops.operators import SPARSE, Format, apply, assert_close, pattern, random, stored_terms, tensors
from tests.problems import EDGE_LINEAR, LinearProblem

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("error:slimtorch.*has no kernel")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def moved(weight: BlockSparse) -> BlockSparse:
    tensors_ = (weight.values, weight.block_columns, weight.block_row_offsets)
    values, columns, offsets = (t.cuda() for t in tensors_)
    return BlockSparse(values, columns, offsets, weight.shape, weight.block_size)


def check(problem: LinearProblem, form: Format, dtype: torch.dtype, *, relu: bool = False) -> None:
    x, weight, bias = tensors(problem, form, dtype)
    assert isinstance(weight, BlockSparse)
    y = apply(x.cuda(), moved(weight), bias.cuda(), relu=relu)
    assert y.is_cuda
    dense = weight.to_dense().double()
    exact = x.double() @ dense.T + bias.double()
    magnitude = x.double().abs() @ dense.abs().T + bias.double().abs()
    assert_close(y.cpu(), exact.relu() if relu else exact, magnitude, stored_terms(weight))


@each_dtype
@pytest.mark.parametrize("size", [(1, 4), (3, 5), (4, 16), (16, 16), (64, 64)], ids=str)
def test_block_sparse_linear(size: tuple[int, int], dtype: torch.dtype) -> None:
    for problem in EDGE_LINEAR:
        check(problem, Format(size), dtype)
    for m in (1, 8, 33, 256):
        check(LinearProblem("", m, 130, 300, 0.3, seed=m), Format(size), dtype, relu=True)


@each_dtype
def test_runs_on_the_current_stream(dtype: torch.dtype) -> None:
    x, weight, bias = tensors(LinearProblem("", 64, 256, 512, 0.2, seed=1), Format((16, 16)), dtype)
    assert isinstance(weight, BlockSparse)
    packed, x, bias = moved(weight), x.cuda(), bias.cuda()
    expected = apply(x, packed, bias)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)  # the operator must wait for what its stream does first
        late.copy_(x)
        y = apply(late, packed, bias)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_captured_in_a_graph() -> None:
    x, weight, bias = tensors(LinearProblem("", 16, 64, 96, 0.3, seed=1), Format((8, 8)), torch.float32)
    assert isinstance(weight, BlockSparse)
    packed, x, bias = moved(weight), x.cuda(), bias.cuda()
    apply(x, packed, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = apply(x, packed, bias)
    x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, apply(x, packed, bias))


def test_nan_reaches_exactly_what_it_meets() -> None:
    x, weight, bias = tensors(LinearProblem("", 9, 45, 150, 0.15, seed=2), Format((4, 8)), torch.float32)
    assert isinstance(weight, BlockSparse)
    x[3, 17] = float("nan")
    hit = x.isnan().double() @ pattern(weight).T > 0
    assert torch.equal(apply(x.cuda(), moved(weight), bias.cuda()).isnan().cpu(), hit)


@pytest.mark.filterwarnings("ignore:slimtorch.*has no kernel")
def test_operators_without_a_kernel_run_the_reference() -> None:
    weight = SPARSE.pack(torch.eye(8))
    x = random(3, 8)
    on_device = type(weight)(weight.values.cuda(), weight.columns.cuda(), weight.row_offsets.cuda(), weight.shape)
    assert torch.equal(apply(x.cuda(), on_device).cpu(), x)
