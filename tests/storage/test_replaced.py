# SPDX-License-Identifier: Apache-2.0
"""Files of models whose layers were factorized or separated, loaded into fresh dense ones."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slimtorch as slim
from slimtorch.design import DepthwiseSeparableConv2d, LowRank, LowRankConv2d, LowRankLinear
from tests.storage.fuzz import join, split


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding="same"), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 20, (3, 2), stride=2, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 16),
        nn.ReLU(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


def replaced() -> nn.Sequential:
    torch.manual_seed(0)
    model = network()
    low = {"0": LowRank(rank=4, kind="cp"), "2": LowRank(rank=(5, 6), kind="tucker"), "8": LowRank(rank=3)}
    slim.factorize_(model, low, objective=None)  # type: ignore[arg-type]
    slim.separate_(model, objective=None)
    return model


X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("step", ["replaced", "narrower", "packed"])
def test_into_a_fresh_dense_model(step: str, tmp_path: Path) -> None:
    model = replaced()
    if step != "replaced":
        slim.prune_(model, slim.prune.Neurons(0.25), example_inputs=X)
    if step == "packed":
        slim.prune_(model, slim.prune.Magnitude(0.7))
        part, last = model[8], model[0]
        part[0] = slim.nn.SparseLinear.from_dense(part[0])  # type: ignore[operator,index]
        last[3] = slim.nn.CodebookConv2d.from_dense(last[3], bits=4)  # type: ignore[operator,index]
    path = tmp_path / "model.slim"
    slim.save(model, path)
    assert struct.unpack_from("<I", path.read_bytes(), 8) == (2,)
    fresh = network()
    first = fresh[0]
    assert slim.load(path, fresh) is fresh
    assert fresh[0] is first
    kinds = (LowRankConv2d, LowRankConv2d, DepthwiseSeparableConv2d, LowRankLinear)
    assert tuple(type(fresh[i]) for i in (0, 2, 5, 8)) == kinds
    assert torch.equal(fresh(X), model(X))
    assert [m.training for m in fresh.modules()] == [False] * len(list(fresh.modules()))
    assert all(p.requires_grad for p in fresh.parameters())
    again = slim.load(path, copy.deepcopy(fresh))  # a model that has these layers already
    assert torch.equal(again(X), model(X))
    report = slim.storage.inspect(path)
    assert {layer.kind for layer in report.layers if layer.format == "replaced"} == {k.__name__ for k in kinds}
    assert "replaced" in str(report)


def test_a_bare_layer_and_one_that_is_used_twice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20, 12)
    slim.factorize_(layer, LowRank(rank=3))
    slim.save(layer, tmp_path / "x.slim")
    fresh = slim.load(tmp_path / "x.slim", nn.Linear(20, 12))
    x = torch.randn(2, 20)
    assert torch.equal(fresh(x), layer(x))

    def twice() -> nn.Module:
        inner = nn.Linear(12, 12)
        return nn.Sequential(inner, nn.ReLU(), inner)

    model = twice()
    slim.factorize_(model, LowRank(rank=2))
    slim.save(model, tmp_path / "x.slim")
    fresh = slim.load(tmp_path / "x.slim", twice())
    assert fresh[0] is fresh[2]  # type: ignore[index]
    assert torch.equal(fresh(x[:, :12]), model(x[:, :12]))


def test_a_dense_model_is_still_a_file_of_version_1(tmp_path: Path) -> None:
    slim.save(network(), tmp_path / "x.slim")
    assert struct.unpack_from("<I", (tmp_path / "x.slim").read_bytes(), 8) == (1,)


@pytest.mark.parametrize(
    ("layer", "changes", "message"),
    [
        (0, {"kind": "Sequential"}, "kind: expected LowRankLinear, LowRankConv2d, Depthwise"),
        (0, {"geometry": {"rank": 0}}, "geometry: rank: expected at least 1"),
        (0, {"geometry": {"rank": 1 << 40}}, "a LowRankConv2d of .* numbers in place of"),
        (0, {"geometry": {"rank": 10**19}}, "geometry"),
        (0, {"geometry": {"rank": "4"}}, "geometry: rank: expected an int"),
        (0, {"geometry": {"kernel_size": [5, 5]}}, "kernel_size: the file has .5, 5., the model .3, 3."),
        (0, {"geometry": {"in_channels": 4}}, "in_channels: expected at most 3, got 4"),
        (0, {"geometry": {"bias": False}}, "only one has a bias"),
        (0, {"geometry": {"stride": [2, 2]}}, "stride: the file has"),
        (0, {"geometry": {"more": 1}}, "geometry: geometry: expected bias"),
        (0, {"geometry": {"kind": "channel"}}, "layers: the file has '0.2'"),
        (0, {"options": {"activation": None}}, "expected neither options nor tensors"),
        (0, {"tensors": {"weight": 0}}, "expected neither options nor tensors"),
        (0, {"name": "1"}, "layers: the file has|the file has a LowRankConv2d"),
    ],
)  # fmt: skip
def test_records_that_lie(layer: int, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.slim"
    slim.save(replaced(), path, compress=False)
    header, sections = split(path.read_bytes())
    record = header["layers"][layer]
    for key, value in changes.items():
        record[key] = {**record[key], **value} if key == "geometry" else value
    path.write_bytes(join(json.dumps(header).encode(), sections))
    fresh = network()
    state = copy.deepcopy(fresh.state_dict())
    with pytest.raises(slim.FormatError, match=message):
        slim.load(path, fresh)
    assert type(fresh[0]) is nn.Conv2d
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in state.items())


def test_a_file_of_version_1_has_no_such_records(tmp_path: Path) -> None:
    path = tmp_path / "x.slim"
    slim.save(replaced(), path, compress=False)
    header, sections = split(path.read_bytes())
    path.write_bytes(join(json.dumps(header).encode(), sections, version=1))
    with pytest.raises(slim.FormatError, match="of version 2 of the format, the file has version 1"):
        slim.load(path, network())


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    slim.save(replaced(), tmp_path / "x.slim")
    other = network()
    other[0] = nn.Conv2d(3, 16, 3, padding=2)
    with pytest.raises(slim.FormatError, match="padding: the file has"):
        slim.load(tmp_path / "x.slim", other)
    other[0] = nn.Conv1d(3, 16, 3)
    with pytest.raises(slim.FormatError, match="a LowRankConv2d for a Conv2d, the model a Conv1d"):
        slim.load(tmp_path / "x.slim", other)
