# SPDX-License-Identifier: Apache-2.0
"""Magnitude pruning: exact counts, order, ties, scopes, errors that change nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slimtorch import prune
from slimtorch.prune import Magnitude, prune_
from slimtorch.prune.magnitude import keep_largest, kth_smallest, largest

from .networks import CASES

SPARSITIES = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.98]), st.floats(0, 0.999))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), key


def blocks(weight: Tensor, r: int, c: int) -> list[Tensor]:
    matrix = weight.reshape(weight.shape[0], -1)
    rows, columns = matrix.shape
    return [matrix[i : i + r, j : j + c] for i in range(0, rows, r) for j in range(0, columns, c)]


# --- selection ----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60), st.data())
def test_kth_smallest_is_that_of_a_sort(values: list[float], data: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    parts = [scores[:cut], scores[cut:]]
    for wide, chunks in ((False, parts), (True, [p.double() for p in parts])):
        value, smaller = kth_smallest([lambda c=c: c for c in chunks], k, wide)
        assert value == float(scores.sort().values[k - 1])
        assert smaller == int((scores < value).sum())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_ties_go_by_position(values: list[int], data: st.DataObject) -> None:
    remove = data.draw(st.integers(0, len(values)))
    keep = keep_largest(torch.tensor(values, dtype=torch.float32), remove)
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    assert (~keep).nonzero().flatten().tolist() == sorted(order[:remove])


def test_ties_across_chunks() -> None:
    chunks = [torch.ones(3), torch.ones(4), torch.zeros(1)]
    marks = largest([lambda c=c: c for c in chunks], 0.75)
    assert torch.cat(marks).tolist() == [False] * 5 + [True] * 2 + [False]


# --- counts -------------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 23), st.integers(1, 29), SPARSITIES, st.sampled_from([1, 2]), st.data())
def test_exact_counts_on_linear(rows: int, columns: int, sparsity: float, norm: Any, data: st.DataObject) -> None:
    layer = nn.Linear(columns, rows)
    if data.draw(st.booleans()):  # many ties
        layer.weight.data.mul_(4).round_()
    kind = data.draw(st.sampled_from(["weight", "row", "column", "block"]))
    granularity: Any = kind
    r, c = {"weight": (1, 1), "row": (1, columns), "column": (rows, 1), "block": (3, 4)}[kind]
    if kind == "block":
        r, c = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
        granularity = (r, c)
    original = layer.weight.detach().clone()
    report = prune_(layer, Magnitude(sparsity, granularity, norm=norm))
    mask = prune.masks(layer)[""]
    kept = [bool(b.any()) for b in blocks(mask, r, c)]
    assert all(bool(b.all()) == k for b, k in zip(blocks(mask, r, c), kept, strict=True))
    assert len(kept) - sum(kept) == round(sparsity * len(kept))
    assert torch.equal(layer.weight, torch.where(mask, original, 0))

    def size(block: Tensor) -> float:
        return float(block.double().abs().mean() if norm == 1 else block.double().square().mean().sqrt())

    sizes = [size(b) for b in blocks(original, r, c)]
    gone = [s for s, k in zip(sizes, kept, strict=True) if not k]
    left = [s for s, k in zip(sizes, kept, strict=True) if k]
    if gone and left:
        assert max(gone) <= min(left) * (1 + 1e-5) + 1e-12
    assert math.isclose(report.layers[0].sparsity_after, prune.sparsity(layer), abs_tol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 2]), SPARSITIES)
def test_exact_counts_on_conv(out: int, inputs: int, kernel: int, groups: int, sparsity: float) -> None:
    layer = nn.Conv2d(inputs * groups, out * groups, (kernel, 2), groups=groups)
    n = layer.weight.numel()
    prune_(layer, Magnitude(sparsity))
    assert int((~prune.masks(layer)[""]).sum()) == round(sparsity * n)
    layer = nn.Conv2d(inputs * groups, out * groups, (kernel, 2), groups=groups)
    prune_(layer, Magnitude(sparsity, (2, 3)))
    gone = [not bool(b.any()) for b in blocks(prune.masks(layer)[""], 2, 3)]
    assert sum(gone) == round(sparsity * len(gone))


@pytest.mark.parametrize("granularity", ["weight", "row", "column", (4, 4), (1, 16)])
def test_global_scope_ranks_all_layers_together(granularity: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10), nn.Conv2d(4, 6, 3))
    model[0].weight.data.mul_(5)
    before = [m.weight.detach().clone() for m in model]
    prune_(model, Magnitude(0.6, granularity, scope="global", norm=2))
    sizes, kept = [], []
    for weight, mask in zip(before, prune.masks(model).values(), strict=True):
        rows, columns = weight.shape[0], weight[0].numel()
        r, c = {"weight": (1, 1), "row": (1, columns), "column": (rows, 1)}.get(granularity, granularity)
        sizes += [float(b.double().square().mean()) for b in blocks(weight, r, c)]
        kept += [bool(b.any()) for b in blocks(mask, r, c)]
    assert len(kept) - sum(kept) == round(0.6 * len(kept))
    worst_kept = min(s for s, k in zip(sizes, kept, strict=True) if k)
    assert max(s for s, k in zip(sizes, kept, strict=True) if not k) <= worst_kept * (1 + 1e-5)
    shares = [float(m.float().mean()) for m in prune.masks(model).values()]
    assert shares[0] > shares[1]  # the layer with large weights keeps more


def test_layer_scope_is_per_layer() -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    model[0].weight.data.mul_(100)
    prune_(model, Magnitude(0.75))
    assert [int((~m).sum()) for m in prune.masks(model).values()] == [450, 150]


def test_edge_blocks_compete_by_mean() -> None:
    layer = nn.Linear(5, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0]])  # sums 4 and 2, means 1 and 2
    prune_(layer, Magnitude(0.5, (1, 4)))
    assert layer.weight.tolist() == [[0, 0, 0, 0, 2]]


def test_same_masks_on_every_run() -> None:
    layer = nn.Linear(64, 64)
    layer.weight.data.mul_(3).round_()
    twin = copy.deepcopy(layer)
    prune_(layer, Magnitude(0.7))
    prune_(twin, Magnitude(0.7))
    assert torch.equal(prune.masks(layer)[""], prune.masks(twin)[""])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    layer = nn.Linear(31, 17).to(dtype)
    prune_(layer, Magnitude(0.8))
    assert layer.weight.dtype == dtype
    assert int((layer.weight == 0).sum()) == round(0.8 * 31 * 17)


def test_float64_is_ranked_in_float64() -> None:
    layer = nn.Linear(4, 1, bias=False).double()
    layer.weight.data = torch.tensor([[1 + 3e-12, 1 + 1e-12, 1 + 4e-12, 1 + 2e-12]], dtype=torch.float64)
    prune_(layer, Magnitude(0.5))
    assert prune.masks(layer)[""].tolist() == [[True, False, True, False]]


def test_infinite_weights_stay() -> None:
    layer = nn.Linear(10, 1)
    layer.weight.data[0, 3] = -math.inf
    prune_(layer, Magnitude(0.9))
    assert prune.masks(layer)[""].nonzero().tolist() == [[0, 3]]


def test_non_contiguous_weight() -> None:
    layer = nn.Linear(8, 6, bias=False)
    layer.weight = nn.Parameter(torch.randn(8, 6).t())
    before = layer.weight.detach().clone()
    prune_(layer, Magnitude(0.5))
    assert int((layer.weight == 0).sum()) == 24
    assert float(before[prune.masks(layer)[""]].abs().min()) >= float(before[~prune.masks(layer)[""]].abs().max())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 0.99), min_size=2, max_size=5), st.sampled_from(["weight", "row", (3, 2)]))
def test_pruning_again_only_removes_more(steps: list[float], granularity: Any) -> None:
    layer = nn.Linear(17, 13)
    previous = torch.ones(13, 17, dtype=torch.bool)
    most = 0.0
    for sparsity in steps:
        prune_(layer, Magnitude(sparsity, granularity))
        mask = prune.masks(layer)[""]
        assert not bool((mask & ~previous).any())
        most = max(most, sparsity)
        if granularity == "weight":
            assert int((~mask).sum()) == round(most * mask.numel())
        previous = mask.clone()
        with torch.no_grad():  # training moves the weights in between
            layer.parametrizations.weight.original.add_(torch.randn(13, 17))


def test_weights_then_blocks_keeps_both() -> None:
    layer = nn.Linear(16, 16)
    prune_(layer, Magnitude(0.5))
    first = prune.masks(layer)[""].clone()
    prune_(layer, Magnitude(0.5, (4, 4)))
    second = prune.masks(layer)[""]
    assert not bool((second & ~first).any())
    assert sum(not bool(b.any()) for b in blocks(second, 4, 4)) == 8


def test_zeros_go_first() -> None:
    layer = nn.Linear(10, 10)
    layer.weight.data[:, ::2] = 0
    prune_(layer, Magnitude(0.5))
    assert torch.equal(prune.masks(layer)[""], torch.tensor([False, True] * 5).expand(10, 10))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_empty_weight() -> None:
    layer = nn.Linear(0, 4)
    assert prune_(layer, Magnitude(0.5)).layers[0].sparsity_after == 0
    assert layer(torch.ones(2, 0)).shape == (2, 4)


def test_large_layer_in_several_chunks() -> None:
    layer = nn.Linear(1200, 700, bias=False)
    prune_(layer, Magnitude(0.9))
    weight = layer.parametrizations.weight.original.detach().abs()
    mask = prune.masks(layer)[""]
    assert int((~mask).sum()) == 756000
    assert float(weight[mask].min()) >= float(weight[~mask].max())


# --- configuration ------------------------------------------------------------------------------------------------


def test_dict_filter_and_report() -> None:
    model = CASES["conv"].model()
    config = {"conv*": Magnitude(0.5), "out": None, "*": Magnitude(0.9, (4, 4))}
    report = prune_(model, config, filter_fn=lambda m, n: n != "conv2")
    assert list(prune.masks(model)) == ["conv1", "fc"]
    assert [x.granularity for x in report.layers] == ["weight", "4×4"]
    assert report.layers[0].parameters_after == 108 + 8
    assert report.parameters_before == sum(p.numel() for p in model.parameters())
    assert report.parameters_after == report.parameters_before - sum(
        int((~m).sum()) for m in prune.masks(model).values()
    )
    text = str(report)
    assert "conv1" in text
    assert "50.00%" in text
    assert report.to_dict()["layers"][0]["shape_before"] == [8, 3, 3, 3]


def test_nothing_to_prune_says_so() -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))
    before = state(model)
    report = prune_(model, Magnitude(0.5))
    assert report.layers == []
    assert "Nothing to prune" in str(report)
    assert_unchanged(model, before)
    layer = nn.Linear(3, 3)
    assert "Nothing to prune" in str(prune_(layer, Magnitude(0.5), filter_fn=lambda m, n: False))
    assert type(layer) is nn.Linear


def test_a_layer_left_without_weights_is_noted() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data.mul_(1e-3)
    assert "layer '1' has no weights left" in str(prune_(model, Magnitude(0.5, scope="global")))


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 1.5, math.nan, math.inf])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity: expected a number in \[0, 1\)"):
        Magnitude(sparsity)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"sparsity": "0.5"}, TypeError),
        ({"sparsity": True}, TypeError),
        ({"granularity": "block"}, ValueError),
        ({"granularity": (0, 4)}, ValueError),
        ({"granularity": (4, -1)}, ValueError),
        ({"granularity": (4,)}, ValueError),
        ({"granularity": (4.0, 4)}, ValueError),
        ({"granularity": 4}, ValueError),
        ({"scope": "network"}, ValueError),
        ({"norm": 3}, ValueError),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        Magnitude(**{"sparsity": 0.5, **options})


def _nan(model: nn.Module) -> None:
    model.get_submodule("out").weight.data[0, 0] = math.nan  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("damage", "config", "options", "error", "match"),
    [
        (_nan, Magnitude(0.5), {}, ValueError, "layer 'out' holds NaN"),
        (_nan, Magnitude(0.5, scope="global"), {}, ValueError, "layer 'out' holds NaN"),
        (None, {"fcc": Magnitude(0.5)}, {}, ValueError, "'fcc' matches no"),
        (None, {}, {}, ValueError, "empty"),
        (None, 0.5, {}, TypeError, "config"),
        (None, {"*": "l1"}, {}, TypeError, "config"),
        (None, {"fc": Magnitude(0.5), "*": prune.Neurons(0.5)}, {}, TypeError, "got both"),
        (None, Magnitude(0.5), {"filter_fn": "fc"}, TypeError, "filter_fn"),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_bad_input_changes_nothing(
    damage: Any, config: Any, options: dict[str, Any], error: type[Exception], match: str, masked: bool
) -> None:
    model = CASES["conv"].model()
    if masked:
        prune_(model, {"conv*": Magnitude(0.3)})
    if damage:
        damage(model)
    before = state(model)
    with pytest.raises(error, match=match):
        prune_(model, config, **options)
    assert_unchanged(model, before)


def test_weights_that_cannot_be_ranked() -> None:
    with pytest.raises(ValueError, match="not initialised"):
        prune_(nn.Sequential(nn.LazyLinear(3)), Magnitude(0.5))
    with pytest.raises(ValueError, match="meta device"):
        prune_(nn.Linear(3, 3, device="meta"), Magnitude(0.5))
    with pytest.raises(TypeError, match="model"):
        prune_(torch.ones(3), Magnitude(0.5))  # type: ignore[arg-type]
