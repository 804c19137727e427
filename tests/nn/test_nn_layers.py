# SPDX-License-Identifier: Apache-2.0
"""Construction, conversion, shapes and layouts of inputs, errors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import slimtorch as slim
from slimtorch.formats import BlockSparse, Sparse, SparseCodebook
from slimtorch.ops import _common
from tests.nn.cases import (
    CODEBOOKS,
    Case,
    assert_as_good,
    compare,
    each_case,
    each_conv,
    each_quantized,
    each_sparse,
    stored,
    with_dtype,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# --- construction and conversion ---


@each_sparse
def test_fresh_layer_has_the_twins_initialisation(case: Case) -> None:
    torch.manual_seed(7)
    twin = case.dense()
    torch.manual_seed(7)
    layer = case.fresh()
    torch.manual_seed(7)
    layer.reset_parameters()  # `fresh` has drawn random numbers of its own before it built the layer
    assert torch.equal(layer.weight, twin.weight)
    assert layer.bias is not None
    assert torch.equal(layer.bias, twin.bias)
    assert layer.format.density >= 1
    compare(case, layer, twin, case.input(5))


@each_quantized
def test_fresh_quantized_layer_has_the_twins_initialisation_as_near_as_it_can(case: Case) -> None:
    torch.manual_seed(7)
    twin = case.dense()
    expected = case.packed_class.from_dense(twin, **case.options)
    torch.manual_seed(7)
    layer = case.fresh()
    torch.manual_seed(7)
    layer.reset_parameters()  # `fresh` has drawn random numbers of its own before it built the layer
    assert torch.equal(layer.weight, expected.weight)
    assert torch.equal(layer.bias, twin.bias)
    assert layer.format.density == 1
    off = float((layer.weight - twin.weight).square().mean() / twin.weight.square().mean())
    assert off < (0.3 if case.binary else 0.05)  # uniform weights: 1/4 of the power by signs, 1/64 by eight values
    compare(case, layer, layer.to_dense(), case.input(5))


def test_constructor_draws_what_the_twin_draws() -> None:
    torch.manual_seed(3)
    twin = nn.Conv2d(4, 6, 3)
    torch.manual_seed(3)
    layer = slim.nn.BlockSparseConv2d(4, 6, 3, block_size=(4, 8))
    assert torch.equal(layer.weight, twin.weight)
    assert layer.bias is not None
    assert torch.equal(layer.bias, twin.bias)


@each_case
def test_to_dense_gives_the_twin_back(case: Case) -> None:
    twin, packed = case.twin(), case.packed()
    back = packed.to_dense()
    assert type(back) is type(twin)
    assert repr(back) == repr(twin)
    assert torch.equal(back.weight, twin.weight)
    assert torch.equal(back.bias, twin.bias)
    back.weight.data.zero_()  # a copy
    assert torch.equal(packed.weight, twin.weight)


@each_case
def test_from_dense_copies_and_keeps_flags(case: Case) -> None:
    twin = case.twin().eval()
    twin.weight.requires_grad_(False)
    packed = case.packed_class.from_dense(twin, **case.options)
    assert not packed.training
    assert not packed._values().requires_grad
    assert packed.bias.requires_grad
    before = packed.weight.clone()
    with torch.no_grad():
        twin.weight.zero_()
        twin.bias.zero_()
    assert torch.equal(packed.weight, before)
    assert float(packed.bias.detach().abs().sum()) > 0


@each_sparse
def test_from_dense_sees_through_a_mask(case: Case) -> None:
    twin = case.twin()
    slim.prune_(twin, slim.prune.Magnitude(sparsity=0.8))
    packed = case.packed_class.from_dense(twin, **case.options)
    assert torch.equal(packed.weight, twin.weight)


@each_case
def test_dense_and_empty_weights(case: Case) -> None:
    for density in (0.0, 1.0):
        twin = case.twin()
        with torch.no_grad():
            twin.weight.copy_(case.representable(density * torch.randn_like(twin.weight)))
        packed = case.packed_class.from_dense(twin, **case.options)
        compare(case, packed, twin, case.input(3))


@each_case
def test_without_bias(case: Case) -> None:
    twin = case.twin()
    twin.bias = None
    packed = case.packed_class.from_dense(twin, **case.options)
    assert packed.bias is None
    assert "bias=False" in repr(packed)
    torch.testing.assert_close(packed(case.input(3)), twin(case.input(3)))
    assert packed.to_dense().bias is None


@each_case
def test_weight_is_differentiable(case: Case) -> None:
    packed = case.packed()
    packed.weight.square().sum().backward()
    expected = packed._gather(2 * packed.weight.detach())
    torch.testing.assert_close(packed._values().grad, expected)
    assert bool(expected.any())


@pytest.mark.parametrize("case", CODEBOOKS, ids=lambda case: case.name)
def test_the_zero_of_a_codebook_stays_zero(case: Case) -> None:
    twin = case.twin()
    packed = case.packed_class.from_dense(twin, **{**case.options, "zero": True})
    pruned = twin.weight == 0
    assert "zero=True" in repr(packed)
    assert torch.equal(packed.codebook[:, 0], torch.zeros(packed.codebook.shape[0]))
    optimizer = torch.optim.AdamW(packed.parameters(), 0.1, weight_decay=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        packed(case.input(5, seed=seed)).square().sum().backward()
        assert bool((packed.codebook.grad[:, 0] == 0).all())
        assert bool((packed.codebook.grad[:, 1:] != 0).any())
        optimizer.step()
    assert bool((packed.weight[pruned] == 0).all())
    assert not torch.equal(packed.weight, twin.weight)


@each_case
def test_repr_says_what_is_stored(case: Case) -> None:
    packed = case.packed()
    text = repr(packed)
    if isinstance(packed.format, (Sparse, BlockSparse)):
        assert f"stored={packed.format.values.numel()}" in text
    if isinstance(packed.format, SparseCodebook):
        assert f"stored={int((packed.weight != 0).sum())}" in text
    for name, value in case.options.items():
        assert f"{name}={value!r}" in text or value is False


@each_case
def test_fused_relu(case: Case) -> None:
    twin = case.twin()
    packed = case.packed_class.from_dense(twin, activation="relu", **case.options)
    x = case.input(4).requires_grad_()
    y = packed(x)
    torch.testing.assert_close(y, twin(x).relu())
    grad = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, grad)
    (theirs,) = torch.autograd.grad(twin(x).relu(), x, grad)
    torch.testing.assert_close(ours, theirs)
    dense = packed.to_dense()
    torch.testing.assert_close(dense(x), y)
    assert "activation='relu'" in repr(packed)


# --- inputs ---


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_any_batch(case: Case, dtype: torch.dtype, training: bool) -> None:
    case = with_dtype(case, dtype)
    twin, packed = case.twin().train(training), case.packed().train(training)
    batches: list[tuple[int, ...]] = [(), (0,), (1,), (2,), (7,), (33,)]
    if len(case.sample) == 1:
        batches += [(2, 3), (2, 0), (2, 1, 3, 2)]
    for batch in batches:
        compare(case, packed, twin, case.input(*batch))


def _layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values (or, expanded, the first of them) in other memory layouts."""
    misaligned = torch.zeros(x.numel() + 3, dtype=x.dtype)[3:].view(x.shape)
    misaligned.copy_(x)
    strided = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2]
    strided.copy_(x)
    layouts = {
        "misaligned": misaligned,
        "strided": strided,
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "expanded": x[:1].expand(x.shape),
        "sliced": torch.cat([x, x])[1 : 1 + x.shape[0]],
    }
    if x.dim() == 4:
        layouts["channels_last"] = x.to(memory_format=torch.channels_last)
        layouts["spatially_transposed"] = x.transpose(2, 3).contiguous().transpose(2, 3)
    return layouts


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout(case: Case, dtype: torch.dtype) -> None:
    case = with_dtype(case, dtype)
    twin, packed = case.twin(), case.packed()
    for x in _layouts(case.input(5)).values():
        compare(case, packed, twin, x)


@each_case
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [3, 70])
def test_nan_and_inf_come_out_where_a_stored_weight_meets_them(case: Case, value: float, batch: int) -> None:
    packed = case.packed()
    x = case.input(batch)
    clean = packed(x)
    x[1].view(-1)[5] = x[2].view(-1)[-1] = value
    pattern = case.dense()
    pattern.weight = nn.Parameter(stored(packed))
    meets = pattern((~x.isfinite()).float()) - pattern(torch.zeros_like(x)) > 0.5
    y = packed(x)
    assert torch.equal(~y.isfinite(), meets)
    assert bool(meets.any())
    torch.testing.assert_close(y[~meets], clean[~meets])


@each_conv
@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": "same"},
        {"padding": "same", "kernel_size": 2},
        {"padding": "same", "kernel_size": (4, 3), "dilation": (1, 3)},
        {"padding": "valid"},
        {"padding": (2, 0), "stride": (1, 3)},
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2, "padding": 1},
        {"groups": 6, "out_channels": 12},
    ],
    ids=str,
)
def test_conv_geometries(case: Case, geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    twin = nn.Conv2d(**{"in_channels": 6, "out_channels": 10, "kernel_size": 3, **geometry})
    with torch.no_grad():
        twin.weight.copy_(case.representable(twin.weight))
    options = {**case.options, "group_size": None} if "group_size" in case.options else case.options
    packed = case.packed_class.from_dense(twin, **options)
    for batch in ((), (2,)):
        x = case.input(*batch).requires_grad_()
        y, expected = packed(x), twin(x)
        torch.testing.assert_close(y, expected)
        grad = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(expected, x, grad)[0], rtol=1e-4, atol=1e-5
        )
    assert packed.to_dense().padding == twin.padding


# --- bad input ---


@each_case
def test_bad_inputs_are_named(case: Case) -> None:
    packed = case.packed()
    with pytest.raises(ValueError, match="x: expected shape"):
        packed(torch.randn(4, 5, 5, 5) if len(case.sample) == 3 else torch.randn(4, 36))
    with pytest.raises(TypeError, match=r"x: expected torch\.float32"):
        packed(case.input(2).double())
    with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor"):
        packed([1.0])
    with pytest.raises(ValueError, match="device"):
        packed(case.input(2).to("meta"))


@each_case
def test_bad_modules_are_named(case: Case) -> None:
    build = case.packed_class.from_dense
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn"):
        build(nn.ReLU())
    twin = case.twin()
    twin.weight.data.view(-1)[3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        build(twin, **case.options)
    with pytest.raises(ValueError, match="meta"):
        build(case.twin().to("meta"), **case.options)
    with pytest.raises(ValueError, match="activation"):
        build(case.twin(), activation="gelu", **case.options)

    class Own(type(twin)):  # type: ignore[misc]
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    own = case.twin()
    own.__class__ = Own
    with pytest.raises(TypeError, match="Own"):
        build(own, **case.options)


@each_conv
def test_padding_modes_other_than_zeros_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="padding_mode"):
        case.packed_class.from_dense(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), **case.options)
    with pytest.raises(ValueError, match="padding_mode"):
        case.packed_class(3, 4, 3, padding=1, padding_mode="circular", **case.options)


@pytest.mark.parametrize("size", [(0, 4), (-1, 4), (4, 2048)])
def test_bad_block_sizes_are_named(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="block_size"):
        slim.nn.BlockSparseLinear(8, 8, block_size=size)
    with pytest.raises(ValueError, match="block_size"):
        slim.nn.BlockSparseLinear.from_dense(nn.Linear(8, 8), block_size=size)
    with pytest.raises(TypeError, match="block_size"):
        slim.nn.BlockSparseLinear(8, 8, block_size=4)  # type: ignore[arg-type]


# --- fallback ---


@each_case
def test_a_dtype_without_kernel_runs_the_reference_and_says_so_once(case: Case) -> None:
    case = with_dtype(case, torch.float16)
    twin, packed = case.twin(), case.packed()
    _common._warned.clear()
    with pytest.warns(UserWarning, match="no kernel for torch.float16 on cpu"):
        y = packed(case.input(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed(case.input(3))
    torch.testing.assert_close(y, twin(case.input(3)), rtol=2e-3, atol=2e-3)


@each_case
def test_meta(case: Case) -> None:
    packed, twin = case.packed().to("meta"), case.twin().to("meta")
    y = packed(case.input(3).to("meta"))
    assert y.is_meta
    assert y.shape == twin(case.input(3).to("meta")).shape
    kwargs = {"device": "meta", **case.options}
    dense = case.dense()
    if isinstance(dense, nn.Linear):
        fresh = case.packed_class(dense.in_features, dense.out_features, **kwargs)
    else:
        fresh = case.packed_class(dense.in_channels, dense.out_channels, dense.kernel_size, groups=2, **kwargs)
    assert fresh._values().is_meta


@each_sparse
def test_padding_of_edge_blocks_has_no_effect(case: Case) -> None:
    packed, twin = case.fresh(), case.twin()
    torch.manual_seed(1)
    with torch.no_grad():
        packed._values().normal_()  # also where blocks reach beyond the weight
        twin.weight.copy_(packed.weight)
        twin.bias.copy_(packed.bias)
    x = case.input(4).requires_grad_()
    y = compare(case, packed, twin, x)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, packed._values()], grad)
    theirs = torch.autograd.grad(twin(x), [x, twin.weight], grad)
    exact = double_gradients(case, twin, x, grad)
    assert_as_good(ours[0], theirs[0], exact)
    torch.testing.assert_close(ours[1], packed._gather(theirs[1]), rtol=1e-4, atol=1e-4)


def double_gradients(case: Case, twin: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    wide = case.dense().double()
    wide.load_state_dict({name: tensor.double() for name, tensor in twin.state_dict().items()})
    x = x.detach().double().requires_grad_()
    return torch.autograd.grad(wide(x), x, grad.double())[0]
