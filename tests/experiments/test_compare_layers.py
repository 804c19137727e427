# SPDX-License-Identifier: Apache-2.0
"""Layer comparisons: weights read or drawn, every runner right, the tables and figures they give."""

import json

import numpy as np
import pytest
import torch

from slimtorch.experiments import layers, plots
from slimtorch.models import ALEXNET, LayerShape

SMALL = LayerShape("conv", 12, 8, 3, stride=1, padding=1, groups=2, height=7)
STRIDED = LayerShape("conv", 6, 3, 5, stride=2, padding=2, height=11)


def _file(path, weights):
    arrays = {}
    for name, weight in weights.items():
        matrix = weight.flatten(1).numpy()
        rows, columns = np.nonzero(matrix)
        arrays[f"{name}_values"] = matrix[rows, columns]
        arrays[f"{name}_columns"] = columns.astype(np.uint16)
        arrays[f"{name}_row_offsets"] = np.searchsorted(rows, np.arange(len(matrix) + 1)).astype(np.int32)
    np.savez(path, **arrays)
    return arrays


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    arrays = _file(folder / "alexnet_l1.npz", layers._random_l1())
    _file(folder / "alexnet_ssl.npz", layers._random_ssl())
    return folder, arrays


def test_weights_are_read_back(published):
    folder, _ = published
    for path in (folder, folder / "alexnet_ssl.npz"):
        source, found = layers.alexnet_weights(path)
        assert source == "real pruned weights"
        for name, weight in layers._random_ssl().items():
            assert torch.equal(found["SSL"][name], weight)


def test_without_the_files_masks_are_random_and_labelled_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, found = layers.alexnet_weights(None)
    assert source == "random masks"
    for shape in ALEXNET[:5]:
        for kind, sparsity in (("l1", layers._L1_SPARSITY[shape.name]), ("SSL", layers._SSL_SPARSITY[shape.name][0])):
            weight = found[kind][shape.name]
            assert weight.shape == shape.weight_shape
            assert 1 - int(torch.count_nonzero(weight)) / weight.numel() == pytest.approx(sparsity, abs=0.01)
    ssl = found["SSL"]["conv3"].flatten(1)
    assert int((ssl == 0).all(1).sum()) >= 156
    assert int((ssl == 0).all(0).sum()) >= 1772


def test_files_beside_the_checkout_are_found(published, tmp_path, monkeypatch):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "data").symlink_to(published[0])
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    assert layers.alexnet_weights(None)[0] == "real pruned weights"


def test_a_missing_file_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        layers.alexnet_weights(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: a.pop("conv3_columns"), "array 'conv3_columns' is missing"),
        (lambda a: a["conv2_row_offsets"].__setitem__(-1, 5), "conv2_row_offsets: expected 257 rising offsets"),
        (lambda a: a["conv1_columns"].__setitem__(0, 60000), "conv1_columns: expected .* indices below 363"),
    ],
)
def test_damaged_arrays_are_named(published, tmp_path, change, text):
    arrays = {name: array.copy() for name, array in published[1].items()}
    change(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=text):
        layers.load_alexnet(tmp_path / "bad.npz")


def test_no_archive_at_all(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(ValueError, match="no readable"):
        layers.load_alexnet(tmp_path / "bad.npz")


@pytest.mark.parametrize("shape", [SMALL, STRIDED], ids=["grouped", "strided"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_runner_gives_the_dense_result(shape, batch):
    generator = torch.Generator().manual_seed(0)
    l1 = layers.random_weight(shape, 0.7, generator)
    ssl = layers.random_weight(shape, 0.2, generator)
    ssl[1] = 0
    ssl[:, 0, 1] = 0
    x = torch.randn(shape.input_shape(batch), generator=generator)
    with torch.inference_mode():
        calls, size = layers._whole_calls(shape, l1, ssl, x)  # checks each result itself
        assert {"torch", "ours, l1", "ours, SSL", "ours, SSL blocks", "MKL CSR, l1", "SSL dense rest"} <= set(calls)
        assert size in layers._BLOCK_SIZES
        assert calls["SSL dense rest"]().shape == calls["torch"]().shape
        products, _ = layers._matmul_calls(shape, l1, ssl, x)
        kept = int((ssl.flatten(1) != 0).any(1).sum())
        assert products["SSL dense rest"]().shape == (kept, batch * shape.out_height**2)


def test_a_wrong_result_is_never_timed():
    with pytest.raises(RuntimeError, match="conv1, ours gives another result"):
        layers._check("conv1, ours", torch.ones(3), torch.zeros(3))
    with pytest.raises(RuntimeError):
        layers._check("conv1, ours", torch.full((3,), torch.nan), torch.ones(3))


def test_random_blocks_are_blocks():
    weight = layers.random_weight(LayerShape("fc", 33, 50, 0), 0.5, torch.Generator().manual_seed(0), (16, 16))
    assert set((weight[:16, :16] != 0).unique().tolist()) in ({True}, {False})
    assert weight.shape == (33, 50)


def test_shapes_end_to_end(monkeypatch):
    monkeypatch.setitem(layers.SHAPES, "resnet50", (SMALL, LayerShape("fc", 10, 20, 0, count=3)))
    steps = []
    result = layers.compare_shapes("resnet50", (0.5, 0.9), samples=2, progress=lambda *step: steps.append(step))
    assert steps[-1] == ("timing ResNet-50", 2, 2)
    assert result.contenders(layers.WHOLE) == ["sparse 50%", "blocks 50%", "sparse 90%", "blocks 90%"]
    back = json.loads(json.dumps(result.to_dict()))
    assert back["schema"] == "slimtorch.layers/1"
    assert back["source"] == "random masks"
    (table,) = result.tables()
    assert "random masks" in table.title
    assert max(map(len, str(table).splitlines())) <= 100
    assert [name for name, _ in plots.layer_speedups(result)] == [layers.WHOLE]


def test_alexnet_end_to_end(published, monkeypatch):
    monkeypatch.setattr(layers, "_BLOCK_SIZES", ((16, 4),))
    result = layers.compare_alexnet(published[0], samples=1)
    assert result.kinds() == [layers.WHOLE, layers.MATMUL]
    assert result.layer_names() == ["conv1", "conv2", "conv3", "conv4", "conv5"]
    for table in result.tables():
        text = str(table)
        assert max(map(len, text.splitlines())) <= 100
        assert "3.03" in text
        assert "5.07" in text
    json.dumps(result.to_dict())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(("vgg19",), "network: expected 'vgg16' or 'resnet50'"), (("vgg16", (1.5,)), "sparsities: expected shares")],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        layers.compare_shapes(*arguments)
