# SPDX-License-Identifier: Apache-2.0
"""MSDNet: what comes out where, the scales, and that it is an EarlyExit like any other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimtorch.dynamic import EarlyExit, MaxProbability
from slimtorch.models import msdnet


def small(**options: Any) -> EarlyExit:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"exits": 3, "base": 1, "step": 1, "width": 4, "growth": 4, "head": 8}
    return msdnet(10, 1, **{**sizes, **options})


def states(model: EarlyExit, x: Tensor) -> list[list[tuple[int, ...]]]:
    found, state = [], x
    for stage in list(model.stages)[:-1]:
        state = stage(state)
        found.append([tuple(part.shape[1:]) for part in state])
    return found


def test_scales_and_channels() -> None:
    """Three layers, three scales: the first layer keeps all, the second and third give up one and halve the rest."""
    model = small().eval()
    x = torch.randn(2, 1, 28, 28)
    first = [(8, 28, 28), (16, 14, 14), (32, 7, 7)]  # width + growth, times 1, 2, 4
    second = [(12, 14, 14), (24, 7, 7)]  # (16 + 8) / 2, (32 + 16) / 2
    assert states(model, x) == [first, second]
    assert [logits.shape for logits in model.all_exits(x)] == [(2, 10)] * 3
    assert states(small(reduction=1.0).eval(), x)[1] == [(24, 14, 14), (48, 7, 7)]
    assert states(small(stride=2).eval(), x)[0] == [(8, 14, 14), (16, 7, 7), (32, 4, 4)]


def test_a_layer_joins_old_finer_and_same_scale() -> None:
    """Channels of a scale: what was there, half of the growth from the finer scale, half from this one."""
    torch.manual_seed(0)
    model = small(bottleneck=(None, None, None)).eval()
    stem, layer = model.stages[0][0][0], model.stages[0][0][1]  # type: ignore[index]
    x = torch.randn(1, 1, 28, 28)
    fine, middle, coarse = stem(x)
    convolution, norm, relu = layer.finer[1]
    assert (convolution.stride, convolution.in_channels, convolution.out_channels) == ((2, 2), 8, 8)
    expected = torch.cat((coarse, relu(norm(convolution(middle))), layer.same[2](coarse)), 1)
    torch.testing.assert_close(layer((fine, middle, coarse))[2], expected)
    assert torch.equal(layer((fine, middle, coarse))[0][:, :4], fine)


def test_is_an_early_exit() -> None:
    model = small(criterion=MaxProbability(0.11)).eval()
    assert model.points == ["block0", "block1"]
    x = torch.randn(30, 1, 28, 28)
    with torch.no_grad():
        outputs = model.all_exits(x)
        surest = sorted(float(p) for p in outputs[0].softmax(1).max(1).values)
        model.criterion.cuts.fill_(math.log(surest[15]) - math.log1p(-surest[15]) + 1e-3)
        run = model.run(x)
        assert len(set(run.exits.tolist())) >= 2
        torch.testing.assert_close(run.logits, torch.stack(outputs, 1)[torch.arange(30), run.exits])
        single = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(single, run.logits)
    fresh = small()
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), run.logits)
    losses = [output.sum() for output in model.train()(x)]
    torch.stack(losses).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_segments_export() -> None:
    """One graph each, for any number of samples."""
    model = small(bottleneck=(None, None, None)).eval()
    state: Any = torch.randn(3, 1, 28, 28)
    rows = torch.export.Dim("rows", min=1, max=64)
    programs = []
    for segment in model.segments():
        shapes = {0: rows} if isinstance(state, Tensor) else tuple({0: rows} for _ in state)
        programs.append(torch.export.export(segment, (state,), dynamic_shapes=(shapes,)).module())
        result = segment(state)
        state = result[0] if isinstance(result, tuple) else result
    x = torch.randn(9, 1, 28, 28)
    with torch.no_grad():
        surest = model.all_exits(x)[0].softmax(1).max(1).values.sort().values
        model.criterion.cuts[0] = float(torch.logit(surest[3:5].double().mean()))
        assert sorted(set(model.run(x).exits.tolist())) == [0, 2]
        for count in (9, 1):
            torch.testing.assert_close(model.with_segments(programs)(x[:count]), model(x[:count]))


def test_bad_sizes() -> None:
    for name in ("exits", "base", "step", "width", "growth", "head", "stride"):
        with pytest.raises(TypeError, match=rf"{name}: expected an int, got 2\.5"):
            small(**{name: 2.5})
    with pytest.raises(ValueError, match="width, head, stride: expected at least 1, got 0, 8 and 1"):
        small(width=0)
    for options, message in [
        ({"exits": 1}, "exits, base, step: expected at least 2, 1 and 1, got 1, 1 and 1"),
        ({"bottleneck": (1,)}, "bottleneck: expected one for each of 3 scales"),
        ({"reduction": 0}, "reduction: expected a number in"),
        ({"growth": 1}, "growth: expected 2 or more channels in a layer, got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            small(**options)
