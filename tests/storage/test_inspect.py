# SPDX-License-Identifier: Apache-2.0
"""inspect: the figures are those of the formats, the table fits a terminal, the command prints both."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import slimtorch as slim
from slimtorch.cli import app
from slimtorch.models import resnet18
from slimtorch.storage._inspect import entropy
from tests.storage.test_roundtrip import FORMATS, convert, sparsify

N = slim.nn


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        N.SparseLinear.from_dense(sparsify(nn.Linear(64, 32), 0.1)),
        N.BlockSparseLinear.from_dense(nn.Linear(32, 32), block_size=(8, 8)),
        N.CodebookLinear.from_dense(nn.Linear(32, 32), bits=4),
        N.SparseCodebookLinear.from_dense(sparsify(nn.Linear(32, 64), 0.2), bits=5),
        N.BinaryLinear.from_dense(nn.Linear(64, 16)),
        nn.Linear(16, 10),
    )


@pytest.mark.parametrize("compress", [False, True])
def test_figures(net, compress, tmp_path):
    path = tmp_path / "model.slim"
    size = slim.save(net, path, compress=compress)
    report = slim.storage.inspect(path)
    assert report.file_bytes == size == path.stat().st_size
    assert report.header_bytes + sum(layer.stored_bytes for layer in report.layers) == size
    assert report.dense_bytes == 4 * sum(
        w + b for w, b in ((64 * 32, 32), (32 * 32, 32), (32 * 32, 32), (32 * 64, 64), (64 * 16, 16), (16 * 10, 10))
    )
    assert [x.format for x in report.layers] == [
        "sparse", "block_sparse", "codebook", "sparse_codebook", "binary", "dense"
    ]  # fmt: skip
    assert [x.bits for x in report.layers] == [32, 32, 4, 5, 1, 32]
    for layer, module in zip(report.layers, net, strict=True):
        assert layer.shape == tuple(module.weight.shape)
        if layer.format != "dense":
            assert layer.density == pytest.approx(module.format.density)
    codes = net[2].format.indices().numpy()
    assert report.layers[2].index_entropy == pytest.approx(entropy(codes.reshape(-1)))
    assert report.layers[3].index_entropy == pytest.approx(entropy(net[3].format.indices().numpy()))
    assert report.layers[3].gap_entropy == pytest.approx(entropy(net[3].gaps.numpy()))
    dense = net[0].weight.detach().numpy()
    gaps = np.concatenate([np.diff(np.flatnonzero(row), prepend=-1) - 1 for row in dense])
    assert report.layers[0].gap_entropy == pytest.approx(entropy(gaps))


def test_entropy():
    assert entropy(np.zeros(0, np.uint8)) == 0
    assert entropy(np.zeros(9, np.uint8)) == 0
    assert entropy(np.arange(256, dtype=np.uint8)) == pytest.approx(8)
    assert entropy(np.array([0, 0, 0, 1], np.uint8)) == pytest.approx(0.811278)


def test_shared_tensors_count_once(tmp_path):
    one = nn.Linear(50, 50)
    two = nn.Linear(50, 50)
    two.weight = one.weight
    slim.save(nn.Sequential(one, two), tmp_path / "x.slim", compress=False)
    first, second = slim.storage.inspect(tmp_path / "x.slim").layers
    assert first.dense_bytes == first.stored_bytes == 4 * 51 * 50
    assert second.dense_bytes == second.stored_bytes == 4 * 50
    assert [tensor.shared for tensor in second.tensors] == [True, False]


@pytest.mark.parametrize("compress", [False, True])
def test_table_fits_a_terminal(compress, tmp_path):
    torch.manual_seed(0)
    makers = list(FORMATS.values())
    model = convert(
        resnet18(classes=10, width=8),
        lambda i, layer: makers[i % len(makers)][isinstance(layer, nn.Conv2d)].from_dense(
            sparsify(layer), **makers[i % len(makers)][2]
        ),
    )
    slim.save(nn.ModuleDict({"some_rather_long_name_of_a_backbone": model}), tmp_path / "x.slim", compress=compress)
    report = slim.storage.inspect(tmp_path / "x.slim")
    lines = str(report).splitlines()
    assert max(len(line) for line in lines) <= 100
    text = "".join(lines)
    assert "whole file" in text
    assert "header and padding" in text
    assert f"{report.ratio:.1f}x" in text


def test_command(net, tmp_path):
    path = tmp_path / "model.slim"
    slim.save(net, path)
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 0
    assert shown.output.strip() == str(slim.storage.inspect(path)).strip()
    facts = json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).output)
    assert facts["layers"][3]["format"] == "sparse_codebook"
    assert facts["ratio"] == pytest.approx(slim.storage.inspect(path).ratio)
    assert facts["layers"][0]["tensors"][0]["name"] == "row_offsets"


def test_command_on_a_damaged_file(tmp_path):
    (tmp_path / "x.slim").write_bytes(b"PK")
    ended = CliRunner().invoke(app, ["inspect", str(tmp_path / "x.slim")])
    assert ended.exit_code == 2
    assert "this is no .slim file" in ended.output
    assert CliRunner().invoke(app, ["inspect", str(tmp_path / "none.slim")]).exit_code == 2
