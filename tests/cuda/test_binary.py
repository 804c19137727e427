# SPDX-License-Identifier: Apache-2.0
"""Binary on CUDA: sign x sign exactly, bits in and out, signs x floats within rounding, gradients, fused networks."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtorch as slim
from slimtorch import reference
from slimtorch.formats import Binary
from slimtorch.formats import binary as binary_format
from tests.cuda.conftest import DTYPES, Device
from tests.ops.operators import assert_close, geometry, product, random
from tests.problems import EDGE_CONV, EDGE_LINEAR, ConvProblem, LinearProblem, Problem

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_input = pytest.mark.parametrize("binarize", [True, False], ids=("signs", "floats"))


@pytest.fixture
def ops(wrappers: Callable[[str], Any], device: Device, monkeypatch: pytest.MonkeyPatch) -> Any:
    """slimtorch.ops.binary on the device, plans included."""
    monkeypatch.setattr(binary_format, "_ops", device.ops)
    return wrappers("binary")


def moved(weight: Binary, device: Device) -> Binary:
    return Binary(device.move(weight.signs), device.move(weight.scale), weight.shape)


def apply(ops: Any, x: Tensor, weight: Binary, bias: Tensor | None = None, **options: Any) -> Tensor:
    op = ops.binary_linear if len(weight.shape) == 2 else ops.binary_conv2d
    return op(x, weight, bias, **options)


def exact(x: Tensor, weight: Binary, bias: Tensor | None, binarize: bool, **options: Any) -> Tensor:
    x = reference.binarize(x.double()) if binarize else x.double()
    dense = Binary(weight.signs, weight.scale.double(), weight.shape).to_dense()
    return product(x, dense, None if bias is None else bias.double(), **options)


def check(ops: Any, device: Device, problem: Problem, dtype: torch.dtype, binarize: bool) -> None:
    x = problem.input().to(dtype)
    weight, bias = Binary.pack(problem.weight().to(dtype), scale=False), problem.bias().to(dtype)
    options, on = {**geometry(problem), "binarize_input": binarize}, device.move(x)
    if binarize:
        # Whole numbers below 2**24: one rounding to 16 bits, none elsewhere.
        y = apply(ops, on, moved(weight, device), **options)
        assert torch.equal(y.cpu(), exact(x, weight, None, True, **geometry(problem)).to(dtype))
    weight = replace(weight, scale=random(weight.shape[0], dtype=torch.float32, seed=7).to(dtype), _plans={})
    there, shift = moved(weight, device), device.move(bias)
    y = apply(ops, on, there, shift, **options)
    assert y.dtype == dtype
    assert y.is_contiguous()
    magnitudes = Binary(torch.full_like(weight.signs, 255), weight.scale.abs(), weight.shape)
    ones = torch.ones_like(x) if binarize else x.abs()
    bound = exact(ones, magnitudes, bias.abs(), False, **geometry(problem))
    # Sign x sign sums nothing but a product and a bias. As two products of tf32, a float32 keeps 22 bits: 4 units.
    terms = 2 if binarize else math.prod(weight.shape[1:]) + (6 if dtype == torch.float32 else 2)
    assert_close(y.cpu(), exact(x, weight, bias, binarize, **geometry(problem)), bound, terms)
    assert torch.equal(apply(ops, on, there, shift, activation="relu", **options), y.relu())


# ---- values ----------------------------------------------------------------------------------------------------------


def linear() -> Iterator[LinearProblem]:
    """Columns, rows and depths around the edges of tiles 32 x 8, 64 x 64, 64 x 16 and steps of 64, 128 and 1024."""
    for m in (0, 1, 2, 7, 8, 9, 15, 16, 17, 48, 49, 63, 64, 65, 129):
        yield LinearProblem(f"m{m}", m, 37, 150, seed=m)
    for n in (1, 3, 4, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200):
        yield LinearProblem(f"n{n}", 17, n, 70, seed=n)
        yield LinearProblem(f"few_n{n}", 5, n, 70, seed=n)
    for k in (1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 136, 255, 257, 1000, 1023, 1024, 1025, 1088, 3137):
        yield LinearProblem(f"k{k}", 19, 33, k, seed=k)
        yield LinearProblem(f"few_k{k}", 3, 40, k, seed=k)
    yield LinearProblem("one_by_one", 1, 1, 1, seed=1)


@each_dtype
@each_input
def test_linear(ops: Any, device: Device, binarize: bool, dtype: torch.dtype) -> None:
    for problem in linear():
        check(ops, device, problem, dtype, binarize)


@each_dtype
@each_input
def test_edges_of_all_kernels(ops: Any, device: Device, binarize: bool, dtype: torch.dtype) -> None:
    mine = DTYPES.index(dtype)  # a third of them for each dtype
    for problem in (*EDGE_LINEAR, *EDGE_CONV)[mine :: len(DTYPES)]:
        if "density" not in problem.name:
            check(ops, device, problem, dtype, binarize)


def channels() -> Iterator[ConvProblem]:
    for c in (1, 31, 33, 63, 64, 65, 128, 130):
        yield ConvProblem(f"c{c}", 2, c, 9, 6, 5, padding=(1, 1), seed=c)
    yield ConvProblem("aligned", 2, 16, 70, 8, 8, padding=(1, 1), seed=1)
    yield ConvProblem("groups_of_12", 2, 36, 15, 7, 6, padding=(1, 1), groups=3, seed=1)
    yield ConvProblem("groups_of_128", 1, 256, 66, 5, 5, padding=(1, 1), groups=2, seed=1)
    yield ConvProblem("depthwise", 2, 70, 70, 5, 5, padding=(1, 1), groups=70, seed=2)
    yield ConvProblem("few_pixels", 1, 70, 40, 3, 3, padding=(1, 1), seed=3)
    yield ConvProblem("taps_all_outside", 1, 4, 5, 3, 3, (2, 2), padding=(6, 6), seed=3)
    yield ConvProblem("border_of_dilation", 1, 5, 6, 7, 8, (3, 3), (2, 1), (3, 4), (3, 2), seed=4)
    yield ConvProblem("all", 3, 6, 10, 15, 12, (3, 2), (2, 3), (2, 1), (2, 1), 2, seed=5)
    yield ConvProblem("pointwise", 2, 20, 100, 9, 9, (1, 1), seed=6)
    yield ConvProblem("no_images", 0, 8, 9, 5, 5, seed=7)


@each_dtype
@each_input
def test_conv2d(ops: Any, device: Device, binarize: bool, dtype: torch.dtype) -> None:
    for problem in channels():
        check(ops, device, problem, dtype, binarize)


# The largest tiles are taken when they fill three quarters of the GPU; 132 multiprocessors in the emulator.
LARGE: tuple[Problem, ...] = (
    LinearProblem("large_linear", 256 * 50 - 3, 129, 70, seed=1),
    ConvProblem("large_conv", 2, 50, 25 * 66, 23, 23, (2, 2), padding=(1, 1), groups=25, seed=2),
)


@pytest.mark.parametrize("problem", LARGE, ids=str)
def test_large_tiles(ops: Any, device: Device, problem: Problem) -> None:
    x, weight = problem.input().half(), Binary.pack(problem.weight().half(), scale=False)
    there, on, options = moved(weight, device), device.move(x), geometry(problem)
    dots = exact(x.float(), weight, None, True, **options)
    assert torch.equal(apply(ops, on, there, **options).cpu(), dots.half())
    rows = weight.shape[0]
    thresholds, rising = torch.arange(rows, dtype=torch.int32) % 9 - 4, torch.arange(rows) % 3 < 2
    to_bits = ops.binary_linear_to_bits if dots.dim() == 2 else ops.binary_conv2d_to_bits
    bits = to_bits(on, there, device.move(thresholds), device.move(rising), **options)
    dots = last(dots)
    beyond = torch.where(rising, dots >= thresholds, dots <= thresholds)
    assert torch.equal(bits.cpu(), reference.pack_signs(torch.where(beyond, 1.0, -1.0)))


def test_counts_beyond_16_bits(ops: Any, device: Device) -> None:
    """Rows so long that sums of 16 bits would overflow, all alike and all different."""
    x = device.move(torch.ones(3, 70001))
    weight = Binary.pack(torch.ones(33, 70001), scale=False)
    weight.signs[: 70001 // 8] = 0
    there = moved(weight, device)
    y = ops.binary_linear(x, there)
    assert torch.equal(y[:, 1:].cpu(), torch.full((3, 32), 70001.0))
    assert torch.equal(y[:, 0].cpu(), torch.full((3,), -69999.0))
    assert torch.equal(ops.binary_linear(-x, there), -y)


@each_dtype
def test_what_counts_as_plus_one(ops: Any, device: Device, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, -0.0, 6e-8, -6e-8, inf, -inf, nan, -nan]], dtype=dtype)
    eye = Binary.pack(torch.eye(8, dtype=dtype) * 2 - 1, scale=False)
    signs = torch.tensor([[1, 1, 1, -1, 1, -1, -1, -1]], dtype=dtype)
    expected = signs @ eye.to_dense().T
    assert torch.equal(ops.binary_linear(device.move(x), moved(eye, device)).cpu(), expected)
    odd = torch.cat([x[:, :7], x[:, :1]], 1)[:, :7]  # not whole vectors
    seven = Binary.pack(torch.eye(7, dtype=dtype) * 2 - 1, scale=False)
    y = ops.binary_linear(device.move(odd), moved(seven, device)).cpu()
    assert torch.equal(y, signs[:, :7] @ seven.to_dense().T)
    image, kernel = x.reshape(1, 8, 1, 1).expand(1, 8, 3, 11), Binary(eye.signs, eye.scale, (8, 8, 1, 1))
    y = ops.binary_conv2d(device.move(image.contiguous()), moved(kernel, device)).cpu()
    assert torch.equal(y, expected.reshape(1, 8, 1, 1).expand_as(y))


@each_dtype
def test_nan_and_inf_among_floats(ops: Any, device: Device, dtype: torch.dtype) -> None:
    for m in (5, 70):
        x, weight = random(m, 150).to(dtype), Binary.pack(random(40, 150, seed=1).to(dtype), scale=False)
        x[3, 17], x[4, 149] = float("nan"), float("-inf")
        y = ops.binary_linear(device.move(x), moved(weight, device), binarize_input=False).cpu()
        rows = torch.arange(m)[:, None].expand(m, 40)
        assert torch.equal(y.isnan(), rows == 3)
        assert torch.equal(y.isinf(), rows == 4)
        assert torch.equal(y[4], -torch.inf * weight.to_dense()[:, 149])
    image = random(1, 3, 9, 9).to(dtype)
    image[0, 1, 4, 4] = float("nan")
    kernel = Binary.pack(random(5, 3, 3, 3).to(dtype))
    y = ops.binary_conv2d(device.move(image), moved(kernel, device), padding=1, binarize_input=False).cpu()
    hit = torch.zeros(9, 9, dtype=torch.bool)
    hit[3:6, 3:6] = True
    assert torch.equal(y.isnan(), hit.expand(1, 5, 9, 9))


@each_dtype
@each_input
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_misaligned_views(ops: Any, device: Device, offset: int, binarize: bool, dtype: torch.dtype) -> None:
    for shape, kernel in (((9, 64), (33, 64)), ((2, 8, 6, 4), (5, 8, 3, 3)), ((1, 8, 6, 4), (5, 8, 1, 1))):
        x = random(math.prod(shape) + offset).to(dtype)
        weight, bias = Binary.pack(random(*kernel, seed=1).to(dtype)), random(kernel[0], seed=2).to(dtype)
        view, there = device.move(x)[offset:].view(shape), moved(weight, device)
        shift = device.move(torch.cat([bias[:1], bias]))[1:]
        scale = device.move(torch.cat([weight.scale[:1], weight.scale]))[1:]
        y = apply(ops, view, replace(there, scale=scale), shift, binarize_input=binarize)
        straight = apply(ops, view.clone(), there, shift.clone(), binarize_input=binarize)
        assert torch.equal(y, straight)


@each_input
def test_without_a_plan(device: Device, binarize: bool) -> None:
    kind = 0 if binarize else 1
    x, weight = random(7, 200), Binary.pack(random(70, 200))
    signs, scale = device.move(weight.signs), device.move(weight.scale)
    plan = device.ops.binary_plan(signs, 70, 200, (1, 1), 1, kind)
    y = device.ops.binary_linear(device.move(x), signs, scale, plan, None, binarize, False)
    assert torch.equal(device.ops.binary_linear(device.move(x), signs, scale, None, None, binarize, False), y)
    for wrong in (plan[:-16], torch.cat([plan, plan])):
        with pytest.raises(RuntimeError, match="plan"):
            device.ops.binary_linear(device.move(x), signs, scale, wrong, None, binarize, False)
    image, kernel = random(2, 12, 5, 6), Binary.pack(random(8, 6, 3, 2))
    signs, scale = device.move(kernel.signs), device.move(kernel.scale)
    plan = device.ops.binary_plan(signs, 8, 6, (3, 2), 2, kind)
    shape = (None, (3, 2), (1, 1), (1, 1), (1, 1), 2, binarize, True)
    y = device.ops.binary_conv2d_inference(device.move(image), signs, scale, plan, *shape)
    assert torch.equal(device.ops.binary_conv2d_inference(device.move(image), signs, scale, None, *shape), y)


@each_input
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_weights(ops: Any, device: Device, shape: tuple[int, int], binarize: bool) -> None:
    rows, width = shape
    weight = moved(Binary(torch.zeros(0, dtype=torch.uint8), torch.ones(rows), shape), device)
    bias = random(rows)
    y = ops.binary_linear(device.move(random(3, width)), weight, device.move(bias), binarize_input=binarize)
    assert torch.equal(y.cpu(), bias.expand(3, rows))


@each_dtype
def test_long_sums_are_split_and_repeat_to_the_bit(ops: Any, device: Device, dtype: torch.dtype) -> None:
    problem = LinearProblem("", 3, 70, 4500, seed=1)
    check(ops, device, problem, dtype, False)
    check(ops, device, ConvProblem("", 1, 300, 30, 5, 5, padding=(1, 1), seed=2), dtype, False)
    check(ops, device, LinearProblem("", 60, 70, 2000, seed=3), dtype, False)
    x, weight = device.move(problem.input().to(dtype)), moved(Binary.pack(problem.weight().to(dtype)), device)
    first = ops.binary_linear(x, weight, binarize_input=False)
    assert torch.equal(ops.binary_linear(x, weight, binarize_input=False), first)


def test_bad_input(device: Device) -> None:
    weight = Binary.pack(random(10, 70))
    x, signs, scale = device.move(random(3, 70)), device.move(weight.signs), device.move(weight.scale)
    linear = device.ops.binary_linear
    with pytest.raises(RuntimeError, match="signs"):
        linear(x[:, :60].contiguous(), signs, scale, None, None, True, False)
    with pytest.raises(RuntimeError, match="scale"):
        linear(x, signs, scale.half(), None, None, True, False)
    with pytest.raises(RuntimeError, match="bias"):
        linear(x, signs, scale, None, scale[:9], True, False)
    with pytest.raises(RuntimeError, match="x"):
        linear(x.double(), signs, scale.double(), None, None, False, False)
    with pytest.raises(RuntimeError, match="kind"):
        device.ops.binary_plan(signs, 10, 70, (1, 1), 1, 2)


# ---- bits ------------------------------------------------------------------------------------------------------------


def last(x: Tensor) -> Tensor:
    """Channels last, as packed activations have them."""
    return x.movedim(1, -1) if x.dim() == 4 else x


def check_bits(ops: Any, device: Device, problem: Problem, dtype: torch.dtype = torch.float16) -> None:
    """Bits in and out against the reference, with thresholds that are met, missed by one, and out of reach."""
    x = problem.input().to(dtype)
    weight = Binary.pack(random(*problem.weight().shape, seed=3).to(dtype), scale=False)
    rows, linear = weight.shape[0], isinstance(problem, LinearProblem)
    options: dict[str, Any] = geometry(problem)
    to_bits = ops.binary_linear_to_bits if linear else ops.binary_conv2d_to_bits
    from_bits = ops.binary_linear_from_bits if linear else ops.binary_conv2d_from_bits
    dots = last(exact(x.float(), weight, None, True, **options))
    some = dots.reshape(-1, rows)[0] if dots.numel() else torch.zeros(rows)
    thresholds = (some + torch.arange(rows) % 3 - 1).to(torch.int32)
    thresholds[rows // 2] = 2**31 - 1
    rising = torch.arange(rows) % 5 < 3
    expected = torch.where(torch.where(rising, dots >= thresholds, dots <= thresholds), 1.0, -1.0)
    there, limits = moved(weight, device), (device.move(thresholds), device.move(rising))
    bits = to_bits(device.move(x), there, *limits, **options)
    assert torch.equal(bits.cpu(), reference.pack_signs(expected))
    packed = device.move(reference.pack_signs(last(x)))
    assert torch.equal(to_bits(packed, there, *limits, **options), bits)
    bias = device.move(random(rows, seed=4).to(dtype))
    plain = apply(ops, device.move(x), there, bias, **options)
    assert torch.equal(from_bits(packed, there, bias, **options), plain)
    assert torch.equal(from_bits(packed, there, bias, activation="relu", **options), plain.relu())


BITS: tuple[Problem, ...] = (
    *(LinearProblem(f"k{k}", 7, 70, k, seed=k) for k in (1, 7, 63, 64, 65, 128, 200)),
    *(LinearProblem(f"n{n}", 5, n, 40, seed=n) for n in (1, 7, 31, 32, 33, 63, 64, 65, 96, 128, 130)),
    *(LinearProblem(f"many_n{n}", 40, n, 40, seed=n) for n in (1, 31, 33, 63, 64, 65, 96, 130)),
    LinearProblem("empty", 0, 5, 9),
    *(ConvProblem(f"c{c}", 2, c, 20, 6, 5, padding=(1, 1), seed=c) for c in (1, 7, 33, 64, 65)),
    ConvProblem("groups_in_words", 2, 256, 64, 4, 4, padding=(1, 1), groups=2, seed=1),
    ConvProblem("groups_in_half_words", 2, 96, 96, 4, 4, padding=(1, 1), groups=3, seed=1),
    ConvProblem("groups_in_bytes", 2, 32, 12, 7, 6, padding=(1, 1), groups=4, seed=1),
    ConvProblem("groups_between_bytes", 2, 15, 9, 7, 6, padding=(1, 1), groups=3, seed=2),
    ConvProblem("groups_across_words", 1, 135, 141, 3, 3, padding=(1, 1), groups=3, seed=2),
    ConvProblem("depthwise", 2, 70, 70, 5, 5, groups=70, padding=(1, 1), seed=4),
    ConvProblem("few_pixels", 1, 70, 40, 3, 3, padding=(1, 1), groups=2, seed=3),
    ConvProblem("all", 3, 6, 10, 15, 12, (3, 2), (2, 3), (2, 1), (2, 1), 2, seed=5),
    ConvProblem("pointwise", 2, 20, 100, 9, 9, (1, 1), seed=6),
    ConvProblem("no_images", 0, 8, 9, 5, 5, seed=7),
)


@pytest.mark.parametrize("problem", BITS, ids=str)
def test_bits(ops: Any, device: Device, problem: Problem) -> None:
    check_bits(ops, device, problem, DTYPES[len(problem.name) % len(DTYPES)])


def test_bad_bits(device: Device) -> None:
    weight = Binary.pack(random(10, 70))
    signs, scale = device.move(weight.signs), device.move(weight.scale)
    thresholds, rising = device.move(torch.zeros(10, dtype=torch.int32)), device.move(torch.ones(10, dtype=torch.bool))
    bits = device.move(reference.pack_signs(random(3, 70)))
    assert device.ops.binary_linear_to_bits(bits, 70, signs, None, thresholds, rising).shape == (3, 8)
    with pytest.raises(RuntimeError, match="x"):
        device.ops.binary_linear_to_bits(bits[:, :8].contiguous(), 70, signs, None, thresholds, rising)
    with pytest.raises(RuntimeError, match="x"):
        device.ops.binary_linear_from_bits(bits.int(), 70, signs, scale, None, None, False)
    with pytest.raises(RuntimeError, match="rising"):
        device.ops.binary_linear_to_bits(bits, 70, signs, None, thresholds, rising[:9])
    with pytest.raises(RuntimeError, match="signs"):
        device.ops.binary_linear_to_bits(bits, 70, signs, None, thresholds[:9], rising[:9])


@each_dtype
@pytest.mark.parametrize("relu", [False, True], ids=("plain", "relu"))
def test_thresholds_of_every_dot_product(ops: Any, device: Device, relu: bool, dtype: torch.dtype) -> None:
    """All k + 1 dot products, through the layer and batch norm, against the bits."""
    rows, k = 33, 65
    weight = Binary.pack(random(rows, k, seed=k).to(dtype))
    weight.scale[::3] *= -1
    there, bias = moved(weight, device), random(rows, seed=2).to(dtype)
    bias[::2] = 0
    norm = nn.BatchNorm1d(rows)
    with torch.no_grad():
        norm.weight.copy_(random(rows, seed=3))
        norm.weight[::5] = 0
        assert norm.running_mean is not None
        norm.running_mean.copy_((random(rows, seed=5) * 3).round())
    then = nn.Sequential(norm, nn.Hardtanh()).to(dtype).eval()
    if not device.emulated:
        then.cuda()
    activation, shift = "relu" if relu else None, device.move(bias)
    limits = ops.binary_thresholds(there, shift, then, activation=activation)
    # Input i agrees with row r in i places: its signs, i of them kept, the others turned.
    keep = torch.where(torch.arange(k) < torch.arange(k + 1)[:, None], 1.0, -1.0).to(dtype)
    with torch.no_grad():
        for r in range(0, rows, 4):
            x = device.move(keep * (weight.bits()[r].to(dtype) * 2 - 1))
            expected = reference.pack_signs(then(ops.binary_linear(x, there, shift, activation=activation)))
            assert torch.equal(ops.binary_linear_to_bits(x, there, *limits), expected)


def network() -> nn.Sequential:
    torch.manual_seed(2)
    conv, dense = slim.nn.BinaryConv2d, slim.nn.BinaryLinear
    features = nn.Sequential(
        conv(3, 20, 3, padding=1, binarize_input=False), nn.BatchNorm2d(20), nn.Hardtanh(),
        conv(20, 40, 3, padding=1), nn.BatchNorm2d(40), nn.Hardtanh(),
        conv(40, 70, 3, padding=1, stride=2, groups=2), nn.BatchNorm2d(70),
        conv(70, 24, 1), nn.BatchNorm2d(24),
    )  # fmt: skip
    head = nn.Sequential(dense(24 * 5 * 4, 65), nn.BatchNorm1d(65), nn.Hardtanh(), dense(65, 10), nn.BatchNorm1d(10))
    model = nn.Sequential(features, nn.Flatten(), head)
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert norm.running_mean is not None
            with torch.no_grad():
                norm.weight.copy_(random(norm.num_features, seed=norm.num_features))
                norm.running_mean.copy_(random(norm.num_features, seed=3))
    return model.eval()


@pytest.mark.usefixtures("ops")
def test_fused_networks_predict_the_same(device: Device) -> None:
    model = network()
    if not device.emulated:
        model.cuda()
    fused = copy.deepcopy(model)
    assert len(slim.nn.fuse_binary_(fused).links) == 3
    x = device.move(random(3, 3, 9, 7, seed=9))
    with torch.inference_mode():
        expected = model(x)
        assert float(expected.std()) > 0
        assert torch.equal(fused(x), expected)


# ---- gradients -------------------------------------------------------------------------------------------------------


@each_dtype
@each_input
def test_gradients(ops: Any, device: Device, binarize: bool, dtype: torch.dtype) -> None:
    for shape, kernel, options in (
        ((9, 70), (33, 70), {}),
        ((2, 6, 7, 5), (4, 3, 3, 3), {"padding": 1, "stride": 2, "groups": 2}),
    ):
        weight = Binary.pack(random(*kernel, seed=1).to(dtype))
        wide = Binary(weight.signs, weight.scale.double().requires_grad_(), kernel)
        x, bias = random(*shape, seed=2).to(dtype), random(kernel[0], seed=3).to(dtype)
        exact_in, exact_bias = x.double().requires_grad_(), bias.double().requires_grad_()
        of = reference.binary_linear if len(shape) == 2 else reference.binary_conv2d
        pairs = {k: (v, v) for k, v in options.items() if k != "groups"} | {
            k: v for k, v in options.items() if k == "groups"
        }
        y = of(exact_in, wide, exact_bias, **pairs, binarize_input=binarize)
        grad = random(*y.shape, seed=4).to(dtype)
        y.backward(grad.double())
        on, shift = device.move(x).requires_grad_(), device.move(bias).requires_grad_()
        there = moved(weight, device)
        there = replace(there, scale=there.scale.requires_grad_())
        apply(ops, on, there, shift, binarize_input=binarize, **options).backward(device.move(grad))
        for mine, theirs in ((on, exact_in), (there.scale, wide.scale), (shift, exact_bias)):
            assert mine.grad is not None
            assert theirs.grad is not None
            assert mine.grad.dtype == dtype
            unit = torch.finfo(dtype).eps
            scale = float(theirs.grad.abs().max())
            assert float((mine.grad.cpu().double() - theirs.grad).abs().max()) <= max(2 * unit, 1e-5) * scale


@pytest.mark.parametrize("count", [1, 255, 256, 257])
def test_scaled_dots(device: Device, count: int) -> None:
    dots = torch.arange(-count, count, 2, dtype=torch.int32).repeat(3, 1)
    for dtype, bias in itertools.product(DTYPES, (None, random(count, seed=1))):
        scale, shift = random(count).to(dtype), None if bias is None else bias.to(dtype)
        y = device.ops.binary_scale_dots(
            device.move(dots), device.move(scale), None if shift is None else device.move(shift), True
        )
        exact_shift = torch.zeros(count) if shift is None else shift
        expected = (dots.double() * scale.double() + exact_shift.double()).relu()
        assert_close(y.cpu(), expected, dots.abs().double() * scale.abs().double() + exact_shift.abs().double(), 2)
