# SPDX-License-Identifier: Apache-2.0
"""Packed activations between binary layers: thresholds that are exact to the bit, and the verb that puts them in."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtorch as slim
from slimtorch import reference
from slimtorch.formats import Binary
from slimtorch.ops import binary as ops
from tests.ops.operators import DTYPES, geometry, product, random
from tests.problems import ConvProblem, LinearProblem, Problem


def last(x: Tensor) -> Tensor:
    """Channels last, as packed activations have them."""
    return x.movedim(1, -1) if x.dim() == 4 else x


def check_bits(problem: Problem) -> None:
    """Bits in and out against the reference, with thresholds that are met, missed by one, and out of reach."""
    x = problem.input()
    weight = Binary.pack(random(*problem.weight().shape, seed=3), scale=False)
    rows, linear = weight.shape[0], isinstance(problem, LinearProblem)
    options: dict[str, Any] = geometry(problem)
    to_bits = ops.binary_linear_to_bits if linear else ops.binary_conv2d_to_bits
    from_bits = ops.binary_linear_from_bits if linear else ops.binary_conv2d_from_bits
    dots = last(product(reference.binarize(x), weight.to_dense(), **options))
    some = dots.reshape(-1, rows)[0] if dots.numel() else torch.zeros(rows)
    thresholds = (some + torch.arange(rows) % 3 - 1).to(torch.int32)
    thresholds[rows // 2] = 2**31 - 1
    rising = torch.arange(rows) % 5 < 3
    expected = torch.where(torch.where(rising, dots >= thresholds, dots <= thresholds), 1.0, -1.0)
    bits = to_bits(x, weight, thresholds, rising, **options)
    assert torch.equal(bits, reference.pack_signs(expected))
    packed = reference.pack_signs(last(x))
    assert torch.equal(to_bits(packed, weight, thresholds, rising, **options), bits)
    bias = random(rows, seed=4)
    plain = slim.ops.binary_linear if linear else slim.ops.binary_conv2d
    assert torch.equal(from_bits(packed, weight, bias, **options), plain(x, weight, bias, **options))
    relu = from_bits(packed, weight, bias, activation="relu", **options)
    assert torch.equal(relu, plain(x, weight, bias, activation="relu", **options))


PROBLEMS: tuple[Problem, ...] = (
    *(LinearProblem(f"k{k}", 7, 70, k, seed=k) for k in (1, 7, 8, 63, 64, 65, 200)),
    *(LinearProblem(f"n{n}", 5, n, 40, seed=n) for n in (1, 7, 8, 31, 33, 63, 64, 65, 128, 130)),
    LinearProblem("empty", 0, 5, 9),
    *(ConvProblem(f"c{c}", 2, c, 20, 6, 5, padding=(1, 1), seed=c) for c in (1, 7, 8, 33, 64, 65)),
    ConvProblem("groups_in_bytes", 2, 32, 12, 7, 6, padding=(1, 1), groups=4, seed=1),
    ConvProblem("groups_between_bytes", 2, 15, 9, 7, 6, padding=(1, 1), groups=3, seed=2),
    ConvProblem("groups_of_whole_words", 1, 16, 128, 9, 9, groups=2, seed=3),
    ConvProblem("depthwise", 2, 70, 70, 5, 5, groups=70, padding=(1, 1), seed=4),
    ConvProblem("conv_all", 3, 6, 10, 15, 12, (3, 2), (2, 3), (2, 1), (2, 1), 2, seed=5),
    ConvProblem("pointwise", 2, 20, 100, 9, 9, (1, 1), seed=6),
    ConvProblem("no_images", 0, 8, 9, 5, 5, seed=7),
)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_bits(problem: Problem) -> None:
    check_bits(problem)


@pytest.mark.parametrize("count", [1, 8, 63, 64, 65, 200])
def test_packed_signs_round_trip(count: int) -> None:
    x = random(3, 4, count)
    bits = reference.pack_signs(x)
    assert bits.shape == (3, 4, (count + 63) // 64 * 8)
    assert torch.equal(reference.unpack_signs(bits, count), reference.binarize(x))


# ---- thresholds ------------------------------------------------------------------------------------------------------


def awkward_norm(kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d], channels: int, seed: int) -> nn.Module:
    """Batch norm as training leaves it, and worse: gamma negative or zero, tiny variance, means that dots hit."""
    norm = kind(channels)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.weight.copy_(random(channels, seed=seed))
        norm.weight[::5] = 0
        norm.bias.copy_(random(channels, seed=seed + 1))
        norm.bias[1::4] = 0
        norm.running_mean.copy_((random(channels, seed=seed + 2) * 3).round())
        norm.running_var.copy_(random(channels, seed=seed + 3).abs() + 0.1)
        norm.running_var[::7] = 1e-12
        norm.running_mean[3::9] = 1e9  # out of reach
    return norm.eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("scale", [False, True], ids=("ones", "scaled"))
@pytest.mark.parametrize("relu", [False, True], ids=("plain", "relu"))
@pytest.mark.parametrize("k", [9, 64, 301])
def test_thresholds_of_every_dot_product(k: int, relu: bool, scale: bool, dtype: torch.dtype) -> None:
    """All k + 1 dot products, through the layer and batch norm, against the bits."""
    rows = 67
    weight = Binary.pack(random(rows, k, seed=k).to(dtype), scale=scale)
    if scale:
        weight.scale[::3] *= -1
    bias = random(rows, dtype=dtype, seed=2)
    bias[::2] = 0
    then = nn.Sequential(awkward_norm(nn.BatchNorm1d, rows, k).to(dtype), nn.Hardtanh())
    activation = "relu" if relu else None
    thresholds, rising = ops.binary_thresholds(weight, bias, then, activation=activation)  # type: ignore[arg-type]
    # Input i agrees with row r in i places: its signs, i of them kept, the others turned.
    keep = torch.where(torch.arange(k) < torch.arange(k + 1)[:, None], 1.0, -1.0).to(dtype)
    for r in range(rows):
        x = keep * (weight.bits()[r].to(dtype) * 2 - 1)
        expected = reference.pack_signs(then(slim.ops.binary_linear(x, weight, bias, activation=activation)))  # type: ignore[arg-type]
        assert torch.equal(ops.binary_linear_to_bits(x, weight, thresholds, rising), expected)


# ---- the verb --------------------------------------------------------------------------------------------------------


def linear_network() -> nn.Sequential:
    torch.manual_seed(1)
    sizes = (50, 130, 64, 33)
    layers: list[nn.Module] = [slim.nn.BinaryLinear(20, 50, binarize_input=False), nn.BatchNorm1d(50)]
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [slim.nn.BinaryLinear(a, b, scale=i != 1), awkward_norm(nn.BatchNorm1d, b, i), nn.Hardtanh()]
    layers += [nn.Dropout(), slim.nn.BinaryLinear(33, 10), nn.BatchNorm1d(10)]
    return nn.Sequential(*layers).eval()


def conv_network() -> nn.Sequential:
    torch.manual_seed(2)
    conv = slim.nn.BinaryConv2d
    features = nn.Sequential(
        conv(3, 20, 3, padding=1, binarize_input=False), nn.BatchNorm2d(20), nn.Hardtanh(),
        conv(20, 40, 3, padding=1), awkward_norm(nn.BatchNorm2d, 40, 1), nn.Hardtanh(),
        conv(40, 70, 3, padding=1, stride=2, groups=2), awkward_norm(nn.BatchNorm2d, 70, 2),
        conv(70, 70, 3, padding=1, groups=70, bias=False),
        conv(70, 24, 1), awkward_norm(nn.BatchNorm2d, 24, 3), nn.MaxPool2d(2),
        conv(24, 16, 3, padding="same"), nn.BatchNorm2d(16),
        conv(16, 8, 2, padding="same"), nn.BatchNorm2d(8),
    )  # fmt: skip
    return nn.Sequential(features, nn.Flatten(), nn.Linear(8 * 5 * 4, 10)).eval()


@pytest.mark.parametrize(
    ("network", "shape", "links"), [(linear_network, (33, 20), 3), (conv_network, (5, 3, 19, 17), 3)]
)
def test_fused_networks_predict_the_same(network: Any, shape: tuple[int, ...], links: int) -> None:
    model = network()
    fused = copy.deepcopy(model)
    report = slim.nn.fuse_binary_(fused)
    assert len(report.links) == links
    assert "thresholds" in str(report)
    seen: list[torch.dtype] = []
    for module in fused.modules():
        if isinstance(module, slim.nn.FusedBinary):
            module.register_forward_hook(lambda _, given, out: seen.extend((given[0].dtype, out.dtype)))
    x = random(*shape, seed=9)
    with torch.inference_mode():
        expected = model(x)
        assert float(expected.std()) > 0
        assert torch.equal(fused(x), expected)
        assert torch.equal(copy.deepcopy(fused)(x[:1]), model(x[:1]))
    assert seen.count(torch.uint8) == 2 * links * 2
    fresh = network()
    slim.nn.fuse_binary_(fresh)
    fresh.load_state_dict(fused.state_dict())
    with torch.inference_mode():
        assert torch.equal(fresh(x), expected)


def test_what_is_not_fused() -> None:
    model = linear_network()
    with pytest.raises(ValueError, match="model"):
        slim.nn.fuse_binary_(model.train())
    with pytest.raises(TypeError, match="model"):
        slim.nn.fuse_binary_("model")  # type: ignore[arg-type]
    listened = linear_network()
    listened[3].register_forward_hook(lambda *_: None)
    before = len(slim.nn.fuse_binary_(linear_network()).links)
    assert len(slim.nn.fuse_binary_(listened).links) == before - 1
    softmax = nn.Sequential(slim.nn.BinaryLinear(4, 5), nn.Softmax(-1), slim.nn.BinaryLinear(5, 3)).eval()
    assert slim.nn.fuse_binary_(softmax).links == []


def test_even_kernels_with_padding_same() -> None:
    """Uneven padding is zeros too, not +1."""
    layer = slim.nn.BinaryConv2d(3, 4, (2, 4), padding="same", dilation=(1, 3))
    dense = layer.to_dense()
    x = random(2, 3, 6, 7)
    assert torch.allclose(layer(x), dense(reference.binarize(x)), atol=1e-5)


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_opcheck(layer: str) -> None:
    problem: Problem = (
        LinearProblem("", 5, 70, 33) if layer == "linear" else ConvProblem("", 2, 5, 9, 6, 5, padding=(1, 1))
    )
    x, weight = problem.input(), Binary.pack(random(*problem.weight().shape))
    rows = weight.shape[0]
    shape = [] if layer == "linear" else [[3, 3], [1, 1], [1, 1], [1, 1], 1]
    bits, width = reference.pack_signs(last(x)), weight.shape[1]
    thresholds, rising = torch.zeros(rows, dtype=torch.int32), torch.ones(rows, dtype=torch.bool)
    to_bits = getattr(torch.ops.slimtorch, f"binary_{layer}_to_bits").default
    for given in (x, bits):
        torch.library.opcheck(to_bits, (given, width, weight.signs, weight.plan(), thresholds, rising, *shape))
    from_bits = getattr(torch.ops.slimtorch, f"binary_{layer}_from_bits").default
    arguments = (bits, width, weight.signs, weight.scale, weight.plan(), None, *shape, True)
    torch.library.opcheck(from_bits, arguments)
    dots = torch.arange(2 * rows, dtype=torch.int32).reshape(2, rows)
    torch.library.opcheck(torch.ops.slimtorch.binary_scale_dots.default, (dots, weight.scale, None, True))


def test_bad_bits() -> None:
    weight = Binary.pack(random(10, 70))
    thresholds, rising = torch.zeros(10, dtype=torch.int32), torch.ones(10, dtype=torch.bool)
    bits = reference.pack_signs(random(3, 70))
    assert ops.binary_linear_to_bits(bits, weight, thresholds, rising).shape == (3, 8)
    with pytest.raises(RuntimeError, match="x"):
        ops.binary_linear_to_bits(bits[:, :8], weight, thresholds, rising)
    with pytest.raises(RuntimeError, match="x"):
        ops.binary_linear_from_bits(bits.int(), weight)
    with pytest.raises(RuntimeError, match="rising"):
        ops.binary_linear_to_bits(bits, weight, thresholds, rising[:9])
    with pytest.raises(RuntimeError, match="signs"):
        ops.binary_linear_to_bits(bits, weight, thresholds[:9], rising[:9])
    with pytest.raises(RuntimeError, match="thresholds"):
        ops.binary_linear_to_bits(bits, weight, thresholds - 2**31, rising)
    conv = Binary.pack(random(4, 5, 3, 3))
    with pytest.raises(RuntimeError):
        ops.binary_conv2d_from_bits(reference.pack_signs(random(2, 2, 2, 5)), conv)
    with pytest.raises(RuntimeError):
        ops.binary_conv2d_from_bits(reference.pack_signs(random(2, 6, 6, 70)), conv)
