# SPDX-License-Identifier: Apache-2.0
"""Group lasso: the penalty and its proximal step by hand, and what goes when groups are zero."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.prune import GroupLasso, Magnitude, masks, prune_

from .networks import CASES
from .test_magnitude import assert_unchanged, state


def conv(groups: int = 1) -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(4, 6, (3, 2), groups=groups).double()


def by_hand(layer: nn.Module, groups: Any) -> list[Tensor]:
    """Each group of a layer as one flat tensor, taken out with plain indexing."""
    weight, bias = layer.weight, layer.bias  # type: ignore[union-attr]
    rows = weight.shape[0]
    if groups == "filters":
        return [torch.cat([weight[i].flatten(), bias[i : i + 1]]) for i in range(rows)]
    if groups == "depth":
        return [torch.cat([weight.flatten(), bias])]
    if groups == "channels":
        parts = getattr(layer, "groups", 1)
        per = rows // parts
        return [weight[g * per : (g + 1) * per, c].flatten() for g in range(parts) for c in range(weight.shape[1])]
    matrix = weight.reshape(rows, -1)
    r, c = (rows, 1) if groups == "shapes" else groups
    return [
        matrix[i : i + r, j : j + c].flatten() for i in range(0, rows, r) for j in range(0, matrix.shape[1], c)
    ]


KINDS: list[Any] = ["filters", "channels", "shapes", "depth", (4, 5), (1, 1), (100, 100)]


@pytest.mark.parametrize("groups", KINDS)
@pytest.mark.parametrize("parts", [1, 2])
def test_value_gradient_and_proximal_step(groups: Any, parts: int) -> None:
    layer, other = conv(parts), conv(parts)
    with torch.no_grad():  # one group of zeros, one small
        for net in (layer, other):
            for size, group in zip((0.0, 1e-3), by_hand(net, groups)[:2], strict=False):
                for p in (net.weight, net.bias):
                    p.mul_(torch.where(torch.isin(p, group.detach()), size, 1.0))
    penalty = GroupLasso(layer, 0.3, groups)
    expected = sum(0.3 * math.sqrt(g.numel()) * torch.linalg.vector_norm(g) for g in by_hand(other, groups))
    value = penalty()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    value.backward()
    expected.backward()  # type: ignore[union-attr]
    torch.testing.assert_close(layer.weight.grad, other.weight.grad, rtol=1e-10, atol=1e-12)
    if groups in ("filters", "depth"):
        torch.testing.assert_close(layer.bias.grad, other.bias.grad, rtol=1e-10, atol=1e-12)
    else:
        assert layer.bias.grad is None

    # the proximal step minimises |v - w|²/2 + lr · strength · √p · |v| over v, group by group
    lr = 0.1
    before = by_hand(copy.deepcopy(layer), groups)
    penalty.proximal_(lr)
    for old, new in zip(before, by_hand(layer, groups), strict=True):
        step = lr * 0.3 * math.sqrt(old.numel())
        norm = old.norm().item()
        if norm <= step:
            assert bool((new == 0).all())
        else:
            torch.testing.assert_close(new, old * (1 - step / norm), rtol=1e-10, atol=1e-14)
    if groups not in ("filters", "depth"):
        assert torch.equal(layer.bias, other.bias)


def test_proximal_training_gives_zeros_where_the_subgradient_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator)
    y = x[:, :3] @ torch.randn(3, 4, generator=generator)  # nine inputs say nothing
    found = {}
    for proximal in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(12, 4)
        penalty = GroupLasso(layer, 0.05, "shapes")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            loss = F.mse_loss(layer(x), y)
            (loss if proximal else loss + penalty()).backward()
            optimizer.step()
            if proximal:
                penalty.proximal_(0.1)
        found[proximal] = penalty.report().layers[0]
        assert bool((layer.weight.norm(dim=0)[:3] > 0.1).all())
    assert (found[True].count, found[True].zero) == (12, 9)
    assert found[False].zero == 0
    assert found[False].smallest < 0.02
    assert found[True].smallest > 0.1


def test_globs_and_several_penalties() -> None:
    model = CASES["mlp"].model()
    penalty = GroupLasso(model, {"fc1": 0.5, "fc2": 0.25, "out": None}, {"fc1": "filters", "*": "shapes"})
    report = penalty.report()
    assert [(x.name, x.groups, x.count) for x in report.layers] == [("fc1", "filters", 32), ("fc2", "shapes", 32)]
    expected = 0.5 * sum(math.sqrt(21) * g.norm() for g in by_hand(model.fc1, "filters"))
    expected += 0.25 * sum(4 * g.norm() for g in by_hand(model.fc2, "shapes"))
    assert report.penalty == pytest.approx(expected.item(), rel=1e-5)
    assert "fc2" in str(report)
    assert report.to_dict()["layers"][1]["zero"] == 0
    left_out = GroupLasso(model, 1.0, "filters", filter_fn=lambda _, name: name != "out").report()
    assert [x.name for x in left_out.layers] == ["fc1", "fc2"]


def test_a_masked_layer_shrinks_within_its_mask() -> None:
    layer = nn.Linear(6, 4)
    prune_(layer, Magnitude(0.5))
    (mask,) = masks(layer).values()
    penalty = GroupLasso(layer, 0.1)
    rows = torch.cat([torch.where(mask, layer.weight, 0), layer.bias[:, None]], 1).detach()
    assert penalty().item() == pytest.approx(0.1 * math.sqrt(7) * rows.norm(dim=1).sum().item(), rel=1e-5)
    penalty.proximal_(1.0)
    factor = 1 - 0.1 * math.sqrt(7) / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer.weight.detach(), rows[:, :6] * factor.clamp(min=0))


# --- removal ------------------------------------------------------------------------------------------------------


def zero_rows(layer: Any, rows: list[int]) -> None:
    with torch.no_grad():
        layer.weight[rows] = 0
        if layer.bias is not None:
            layer.bias[rows] = 0


def test_filters_of_zeros_are_removed_without_a_trace() -> None:
    model, x = CASES["mlp"].model(), CASES["mlp"].inputs()
    zero_rows(model.fc1, [0, 5, 31])
    zero_rows(model.fc2, [2])
    before, kept = model(x), model.fc1.weight[[1, 2, 3]].clone()
    penalty = GroupLasso(model, 1.0, filter_fn=lambda _, name: name != "out")
    assert [x.zero for x in penalty.report().layers] == [3, 1]
    report = penalty.remove_(x)
    assert (model.fc1.out_features, model.fc2.in_features, model.fc2.out_features) == (29, 29, 15)
    assert torch.equal(model.fc1.weight[:3], kept)
    torch.testing.assert_close(model(x), before)
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert "Outputs on example_inputs moved by" in report.notes[-1]


def test_threshold_and_batch_norm() -> None:
    model, x = CASES["conv"].model(), CASES["conv"].inputs()
    with torch.no_grad():
        model.conv2.weight[:4] *= 1e-4
        model.bn2.bias.fill_(0.5)  # what a filter of zeros still adds
    penalty = GroupLasso(model, {"conv2": 1.0})
    assert penalty.report().layers[0].zero == 0
    assert penalty.report(1e-3).layers[0].zero == 4
    report = penalty.remove_(x, threshold=1e-3)
    assert model.conv2.out_channels == model.bn2.num_features == 8
    assert model.fc.in_features == 8 * 16
    moved = float(report.notes[-1].split("moved by ")[1].split()[0])
    assert moved > 1e-3


def test_channels_nobody_reads_are_removed_without_a_trace() -> None:
    model, x = CASES["conv"].model(), CASES["conv"].inputs()
    with torch.no_grad():
        model.conv2.weight[:, [1, 7]] = 0
        model.fc.weight[:, 16 * 3 : 16 * 4] = 0  # all places of channel 3
        model.fc.weight[:, 5] = 0  # one place of channel 0: that stays
    model.eval()
    before = model(x)
    GroupLasso(model, 1.0, "channels").remove_(x)
    assert (model.conv1.out_channels, model.conv2.out_channels) == (6, 11)
    torch.testing.assert_close(model(x), before)


def test_tied_filters_go_only_together() -> None:
    model, x = CASES["residual"].model(), CASES["residual"].inputs()
    zero_rows(model.a2, [1, 2])
    zero_rows(model.a1, [3])
    GroupLasso(model, 1.0, filter_fn=lambda _, name: name != "out").remove_(x)
    assert model.a1.out_channels == 7
    assert model.a2.out_channels == model.stem.out_channels == 8  # the stem's channels 1 and 2 still say something
    zero_rows(model.stem, [2])
    GroupLasso(model, 1.0, filter_fn=lambda _, name: name != "out").remove_(x)
    assert model.a2.out_channels == model.stem.out_channels == 7


def test_masks_of_blocks_pack() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    with torch.no_grad():
        model[0].weight.view(3, 16, 4, 16)[:, :, 1:, :] = 0
    bias = model[0].bias.clone()
    report = GroupLasso(model, 1.0, {"0": (16, 16)}).mask_()
    (mask,) = masks(model).values()
    assert int(mask.sum()) == 3 * 256
    assert bool(mask[:, :16].all())
    assert report.layers[0].granularity == "16×16"
    assert report.layers[0].sparsity_after == 0.75
    assert report.parameters_after == 3 * 256 + 48 + 490
    assert torch.equal(model[0].bias, bias)
    x = torch.randn(5, 64)
    before = model(x)
    slim.pack_(model, x, formats={"0": "block_sparse"}, block_sizes=[(16, 16)], min_gain=0.0, time_budget=0.1)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_mask_of_columns_keeps_an_earlier_mask() -> None:
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[:, 2] = 0
        layer.weight[0, 0] = 1e-9
    prune_(layer, Magnitude(5 / 24))
    GroupLasso(layer, 1.0, "shapes").mask_()
    (mask,) = masks(layer).values()
    assert int(mask.sum()) == 19
    assert not bool(mask[0, 0])
    assert not bool(mask[:, 2].any())


# --- depth --------------------------------------------------------------------------------------------------------


def shallow(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = slim.models.resnet20()
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.normal_(norm.bias)
        nn.init.uniform_(norm.running_mean)
    return model.eval()


@pytest.mark.parametrize("which", [["conv1", "conv2"], ["conv2"], ["conv1"]])
@pytest.mark.parametrize("position", [1, 3])  # with and without a change of shape in the shortcut
def test_a_branch_of_zeros_becomes_its_shortcut(which: list[str], position: int) -> None:
    model, x = shallow(), torch.randn(2, 3, 32, 32)
    blocks = [n for n, m in model.named_modules() if type(m).__name__ == "_BasicBlock"]
    name = blocks[position]
    block = model.get_submodule(name)
    for child in which:
        zero_rows(getattr(block, child), list(range(block.conv1.out_channels)))
    expected = copy.deepcopy(model)
    ours = expected.get_submodule(name)
    ours.forward = lambda x: F.relu(ours.shortcut(x))
    before = sum(p.numel() for p in block.parameters())
    total = sum(p.numel() for p in model.parameters())
    penalty = GroupLasso(model, 1.0, "depth", branches={"b": f"{name}.conv?"} if len(which) == 2 else None)
    report = penalty.remove_(x)
    torch.testing.assert_close(model(x), expected(x))
    assert sum(p.numel() for p in block.parameters()) == sum(p.numel() for p in block.shortcut.parameters())
    assert report.parameters_after == total - before + sum(p.numel() for p in block.shortcut.parameters())
    assert {x.name for x in report.layers} == {f"{name}.conv1", f"{name}.conv2"}
    model.train()
    F.cross_entropy(model(x), torch.tensor([1, 2])).backward()  # it trains on
    assert penalty().item() > 0
    assert len(penalty.report().layers) == (20 + sum("shortcut.0" in n for n, _ in model.named_modules()) - 2)


def test_depth_without_a_shortcut() -> None:
    for case, layer in (("mlp", "fc2"), ("conv", "conv2"), ("mlp", "out")):
        model, x = CASES[case].model(), CASES[case].inputs()
        zero_rows(getattr(model, layer), list(range(getattr(model, layer).weight.shape[0])))
        before = state(model)
        with pytest.raises(ValueError, match=f"'{layer}', one has no shortcut around it"):
            GroupLasso(model, 1.0, "depth").remove_(x)
        assert_unchanged(model, before)
    model, x = CASES["mlp"].model(), CASES["mlp"].inputs()
    report = GroupLasso(model, 1.0, "depth").remove_(x)
    assert "Nothing to remove" in report.notes[0]


# --- bad input ----------------------------------------------------------------------------------------------------


def test_losing_everything_is_refused() -> None:
    for groups, act in (("filters", "remove_"), ("channels", "remove_"), ("shapes", "mask_"), ((4, 4), "mask_")):
        model, x = CASES["mlp"].model(), CASES["mlp"].inputs()
        zero_rows(model.fc2, list(range(16)))
        zero_rows(model.fc1, [0])
        before = state(model)
        penalty = GroupLasso(model, 1.0, groups, filter_fn=lambda _, name: name != "out")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="would leave layer 'fc2' without"):
            penalty.remove_(x) if act == "remove_" else penalty.mask_()
        assert_unchanged(model, before)


def test_bad_arguments() -> None:
    model, x = CASES["mlp"].model(), CASES["mlp"].inputs()
    for strength in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="strength: expected a finite number above 0"):
            GroupLasso(model, {"fc1": strength})
    with pytest.raises(TypeError, match="strength"):
        GroupLasso(model, "much")  # type: ignore[arg-type]
    for groups in ("rows", (0, 4), (1, 2, 3), 7, (True, 2)):
        with pytest.raises(ValueError, match="groups: expected one of 'filters'"):
            GroupLasso(model, 1.0, groups)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="closest names"):
        GroupLasso(model, {"fc9": 1.0})
    with pytest.raises(ValueError, match="no Linear or Conv2d layer was selected"):
        GroupLasso(nn.ReLU(), 1.0)
    with pytest.raises(ValueError, match="branches: expected only with groups='depth'"):
        GroupLasso(model, 1.0, branches={"a": "fc1"})
    with pytest.raises(ValueError, match="'fc1' is in 'a' and in 'b'"):
        GroupLasso(model, 1.0, "depth", branches={"a": "fc1", "b": ["fc*"]})
    penalty = GroupLasso(model, 1.0, "shapes")
    for bad in (0, -1, math.nan):
        with pytest.raises(ValueError, match="learning_rate"):
            penalty.proximal_(bad)
    with pytest.raises(ValueError, match="threshold"):
        penalty.mask_(-1)
    with pytest.raises(ValueError, match="takes 'filters', 'channels' or 'depth'"):
        penalty.remove_(x)
    with pytest.raises(ValueError, match="a mask would leave a layer empty"):
        GroupLasso(model, 1.0, "depth").mask_()
    with pytest.raises(ValueError, match="example_inputs: do not fit"):
        GroupLasso(model, 1.0).remove_(torch.randn(2, 3))


def test_nan_stops_and_changes_nothing() -> None:
    model = CASES["mlp"].model()
    penalty = GroupLasso(model, 1.0)
    model.fc2.weight.data[3, 3] = math.nan
    before = state(model)
    with pytest.raises(ValueError, match="penalty of 'fc2' is nan"):
        penalty()
    with pytest.raises(ValueError, match="weights of 'fc2' are no longer finite"):
        penalty.proximal_(0.1)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="holds NaN"):
        GroupLasso(model, 1.0)
