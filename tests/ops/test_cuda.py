# SPDX-License-Identifier: Apache-2.0
"""Layers of every family on a GPU: results, gradients, streams, graphs, devices, sizes, memory. Skipped without one.

Single kernels and their edges are tested in tests/cuda, on a GPU and in the emulator; this is what only a GPU has.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.nn import PackedLayer
from tests.nn.cases import CASES, Case, assert_as_good, each_case, stored, with_dtype

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("error:slimtorch.*has no kernel.* on cuda")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

SIGNS = tuple(
    replace(case, name=f"{case.name}_of_signs", options={"binarize_input": True})
    for case in CASES
    if case.binary
)
ALL = (*CASES, *SIGNS)
each_layer = pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
LINEAR = tuple(case for case in ALL if "linear" in case.name)
each_linear = pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """The dense twins compute in float32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def sized(case: Case, k: int, n: int) -> Case:
    """A linear case of other sizes."""
    return replace(case, dense=lambda: nn.Linear(k, n), sample=(k,))


def in_double(layer: PackedLayer) -> PackedLayer:
    """The same weight on the CPU in float64: its kernels there are tested for themselves."""
    return copy.deepcopy(layer).double()


def run(layer: nn.Module, x: Tensor, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Output, and with `grad` the gradients of input and parameters, on the CPU."""
    x = x.detach().clone().requires_grad_(grad is not None)
    layer.zero_grad()
    y = layer(x)
    found = {"output": y}
    if grad is not None:
        y.backward(grad)
        found["x"] = x.grad
        found |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def compare(case: Case, *batch: int, gradients: bool = False) -> None:
    """A layer on the GPU is as near to float64 as the CPU's own in that dtype."""
    layer = case.packed()
    x = case.input(*batch)
    wide = in_double(layer)
    grad = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(5)).to(x.dtype) if gradients else None
    exact = run(wide, x.double(), None if grad is None else grad.double())
    here = run(layer, x, grad)
    there = run(copy.deepcopy(layer).cuda(), x.cuda(), None if grad is None else grad.cuda())
    assert set(there) == set(exact)
    for name, tensor in there.items():
        assert_as_good(tensor, here[name], exact[name])


@each_dtype
@each_layer
def test_results_and_gradients(case: Case, dtype: torch.dtype) -> None:
    case = with_dtype(case, dtype)
    for batch in (1, 5, 33):
        compare(case, batch, gradients=True)
    compare(case, 0)


@each_dtype
@each_linear
def test_larger_layers(case: Case, dtype: torch.dtype) -> None:
    for k, n in ((130, 300), (1024, 257), (64, 2048)):
        for m in (1, 8, 17, 256):
            compare(with_dtype(sized(case, k, n), dtype), m)


def on_gpu(case: Case, dtype: torch.dtype = torch.float16, batch: int = 16) -> tuple[PackedLayer, Tensor]:
    case = with_dtype(case, dtype)
    return case.packed().cuda().requires_grad_(False), case.input(batch).cuda()


@each_layer
def test_same_inputs_same_bits(case: Case) -> None:
    layer, x = on_gpu(case)
    first = layer(x)
    assert all(torch.equal(layer(x), first) for _ in range(5))
    layer.requires_grad_()
    grads = [run(layer, x, torch.ones_like(first)) for _ in range(3)]
    for name, tensor in grads[0].items():
        assert all(torch.equal(other[name], tensor) for other in grads)


@each_layer
def test_runs_on_the_current_stream(case: Case) -> None:
    layer, x = on_gpu(case)
    expected = layer(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)  # the layer must wait for what its stream does first
        late.copy_(x)
        y = layer(late)
    stream.synchronize()
    assert torch.equal(y, expected)


@each_layer
def test_captured_in_a_graph(case: Case) -> None:
    layer, x = on_gpu(case)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.mul_(-2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, layer(x))


@each_layer
def test_does_not_wait_for_the_gpu(case: Case) -> None:
    layer, x = on_gpu(case)
    layer(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_layer
def test_inputs_that_lie_anyhow(case: Case) -> None:
    layer, x = on_gpu(case)
    expected = layer(x)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x)
    strided = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device="cuda")[..., ::2].copy_(x)
    for other in (shifted, strided):
        assert_as_good(layer(other), expected, expected.double())
    many = x[:1].expand(7, *x.shape[1:])
    assert_as_good(layer(many), layer(many.contiguous()), layer(many.contiguous()).double())
    if x.dim() == 4:
        other = x.contiguous(memory_format=torch.channels_last)
        assert_as_good(layer(other), expected, expected.double())


@each_case
def test_nan_reaches_exactly_what_it_meets(case: Case) -> None:
    layer, x = on_gpu(case)
    if x.dim() == 2:
        x[3, 17] = float("nan")
        hit = x.isnan().double().cpu() @ stored(layer.cpu()).double().T > 0
    else:
        x[3, 2, 4, 5] = float("nan")
        twin = case.twin().double()
        twin.weight = nn.Parameter(stored(layer.cpu()).double())
        twin.bias = None
        hit = twin(x.isnan().double().cpu()) > 0
    assert torch.equal(layer.cuda()(x).isnan().cpu(), hit)


@each_case
def test_there_and_back(case: Case) -> None:
    layer = case.packed()
    x = case.input(5)
    expected, state = layer(x), copy.deepcopy(layer.state_dict())
    layer.cuda()
    assert all(t.is_cuda for t in layer.state_dict().values() if isinstance(t, Tensor))
    y = layer(x.cuda()).cpu()
    assert_as_good(y, expected, in_double(copy.deepcopy(layer).cpu())(x.double()))
    again = copy.deepcopy(layer)
    again.load_state_dict(state)
    assert torch.equal(again(x.cuda()).cpu(), y)
    layer.cpu()
    assert torch.equal(layer(x), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@each_layer
def test_a_second_device(case: Case) -> None:
    layer, x = on_gpu(case)
    expected = layer(x)
    there = copy.deepcopy(layer).to("cuda:1")
    y = there(x.to("cuda:1"))
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(y.to("cuda:0"), expected)


@each_layer
def test_mixed_devices_are_refused(case: Case) -> None:
    layer, x = on_gpu(case)
    with pytest.raises(ValueError, match=r"weight: expected device cpu \(that of x\), got cuda:0"):
        layer(x.cpu())
    with pytest.raises(ValueError, match=r"weight: expected device cuda:0 \(that of x\), got cpu"):
        layer.cpu()(x)
    torch.cuda.synchronize()


@each_case
def test_a_dtype_without_a_kernel_runs_the_reference(case: Case) -> None:
    layer = case.packed().double()
    x = case.input(3).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = copy.deepcopy(layer).cuda()(x.cuda()).cpu()
    assert_as_good(y, layer(x), layer(x))


# ---- sizes and memory ------------------------------------------------------------------------------------------------


def _needs(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


@each_linear
@pytest.mark.parametrize("side", ["input", "output"])
def test_more_than_two_to_the_31_elements(case: Case, side: str) -> None:
    _needs(24)
    k, n = (64, 8) if side == "input" else (8, 64)
    layer, _ = on_gpu(sized(case, k, n))
    rows = 2**31 // 64 + 3
    x = torch.randn(64, k, device="cuda", dtype=torch.float16).repeat(rows // 64 + 1, 1)[:rows]
    y = layer(x)
    assert y.shape == (rows, n)
    expected = layer(x[:64])
    scale = float(expected.abs().max())
    # Rows repeat every 64: every block of the output is the first one, up to where a tile begins.
    for begin in range(0, rows, 1 << 22):
        part = y[begin : begin + (1 << 22)]
        fits = len(part) // 64 * 64
        difference = (part[:fits].view(-1, 64, n).float() - expected.float()).abs().amax()
        assert float(difference) <= 4 * torch.finfo(torch.float16).eps * scale
    assert_as_good(y[-3:], layer(x[-3:]), layer(x[-3:]).double())


def test_a_convolution_of_more_than_two_to_the_31_elements() -> None:
    _needs(24)
    case = next(case for case in CASES if case.name == "sparse_conv2d")
    layer, x = on_gpu(case, batch=64)
    batch = 2**31 // (6 * 9 * 11) // 64 * 64 + 128
    y = layer(x.repeat(batch // 64, 1, 1, 1))
    expected = layer(x)
    scale = float(expected.abs().max())
    for begin in range(0, batch, 1 << 18):
        part = y[begin : begin + (1 << 18)]
        difference = (part.view(-1, 64, *y.shape[1:]).float() - expected.float()).abs().amax()
        assert float(difference) <= 4 * torch.finfo(torch.float16).eps * scale


@each_linear
def test_too_little_memory_is_said_and_leaves_the_gpu_usable(case: Case) -> None:
    layer, x = on_gpu(sized(case, 64, 64))
    expected = layer(x)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    rows = 1 << 22
    wide = torch.zeros(rows, 64, dtype=torch.float16, device="cuda")  # half a gigabyte, as the output would be
    limit = (torch.cuda.memory_reserved() + (64 << 20)) / total
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            layer(wide)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(layer(x), expected)
    torch.cuda.synchronize()  # no error is left behind


# ---- whole models ----------------------------------------------------------------------------------------------------


def test_pack_measures_and_converts_on_the_gpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
    slim.prune_(model, slim.prune.Magnitude(sparsity=0.9, granularity=(16, 16)))
    model = model.half().cuda().eval()
    x = torch.randn(64, 512, device="cuda", dtype=torch.float16)
    expected = model(x)
    report = slim.pack_(model, x, formats="block_sparse", objective="size", min_gain=1000.0, time_budget=5)
    assert report.device == "cuda:0"
    assert len(report.packed) == 2, str(report)
    trials = [trial for layer in report.layers for trial in layer.trials]
    assert all(trial.latency is not None and trial.error <= 1 for trial in trials)
    assert all(isinstance(layer, slim.nn.BlockSparseLinear) for layer in (model[0], model[2]))
    assert float((model(x) - expected).abs().max()) <= 8 * torch.finfo(torch.float16).eps * float(expected.abs().max())


@each_dtype
def test_autocast(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        pytest.skip("autocast is to 16 bits")
    case: Any = CASES[0]
    layer, x = case.packed().cuda(), case.input(4).cuda()
    with torch.autocast("cuda", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert_as_good(y.cpu(), case.packed()(x.cpu()).to(dtype), in_double(layer.cpu())(x.cpu().double()))
