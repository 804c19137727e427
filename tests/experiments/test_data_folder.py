# SPDX-License-Identifier: Apache-2.0
"""Full data sets: MNIST's and CIFAR-10's own file formats from disk, and what torchvision gives."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from slimtorch.data import load, load_folder

COUNT = 20_010  # the least that leaves images to train on beside 10,000 for validation


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def _mnist(folder: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (COUNT, 4, 5), np.uint8),
        "train-labels-idx1-ubyte": rng.integers(0, 10, COUNT, np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (30, 4, 5), np.uint8),
        "t10k-labels-idx1-ubyte": rng.integers(0, 10, 30, np.uint8),
    }
    for name, array in arrays.items():
        (folder / name).write_bytes(_idx(array))
    return arrays


def test_mnist(tmp_path: Path) -> None:
    inner = tmp_path / "MNIST" / "raw"
    inner.mkdir(parents=True)
    arrays = _mnist(inner)
    images = inner / "train-images-idx3-ubyte"
    (inner / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images.read_bytes()))
    images.unlink()
    data = load_folder(tmp_path)
    assert len(data.train) == COUNT - 10_000
    assert len(data.validation) == 10_000
    assert data.test.images.shape == (30, 1, 4, 5)
    assert torch.equal(data.test.labels, torch.from_numpy(arrays["t10k-labels-idx1-ubyte"]).long())
    everything = torch.cat([data.train.images, data.validation.images])
    assert abs(float(everything.mean())) < 1e-3
    assert abs(float(everything.std()) - 1) < 1e-3
    raw = torch.from_numpy(arrays["train-images-idx3-ubyte"])[:, None].double() / 255
    expected = (raw - raw.mean()) / raw.std()
    assert torch.allclose(everything.double(), expected, atol=1e-5)


def test_cifar(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (COUNT, 3073), np.uint8)
    records[:, 0] %= 10
    (tmp_path / "data_batch_1.bin").write_bytes(records[:10_000].tobytes())
    (tmp_path / "data_batch_2.bin").write_bytes(records[10_000:].tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records[:7].tobytes())
    data = load_folder(tmp_path)
    assert data.test.images.shape == (7, 3, 32, 32)
    assert torch.equal(data.train.labels[:5], torch.from_numpy(records[:5, 0]).long())
    assert float(data.train.images.mean((0, 2, 3)).abs().max()) < 0.01


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data: expected a folder"):
        load_folder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="found neither"):
        load_folder(tmp_path)
    _mnist(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte' is damaged"):
        load_folder(tmp_path)
    labels.write_bytes(b"x" + whole[1:])
    with pytest.raises(ValueError, match="expected an IDX file"):
        load_folder(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073))
    with pytest.raises(ValueError, match="data_batch_1"):
        load_folder(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3072))
    with pytest.raises(ValueError, match="records of 3073 bytes"):
        load_folder(tmp_path)


def test_data_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None, a folder, and data sets as torchvision holds them: images [N, H, W] or [N, H, W, C], lists of labels."""
    small, words = load(quick=True)
    assert len(small.train) == 1000
    assert words == "real handwritten digits, at small scale (1,000 images to train on, 1,000 held out for the test)"
    assert len(load()[0].train) == 3500
    folder = tmp_path / "files"
    folder.mkdir()
    arrays = _mnist(folder)
    expected, words = load(str(folder))
    assert words.startswith("the full data set in 'files' (10,010 images")

    rng = np.random.default_rng(1)
    colour = rng.integers(0, 256, (COUNT, 4, 5, 3), np.uint8)

    class DataSet:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert download
            assert Path(root) == tmp_path / "cache" / "slimtorch"
            part = "train" if train else "t10k"
            self.data: object = torch.from_numpy(arrays[f"{part}-images-idx3-ubyte"])
            self.targets: object = torch.from_numpy(arrays[f"{part}-labels-idx1-ubyte"]).long()

    class Colour(DataSet):
        def __init__(self, root: str, train: bool, download: bool) -> None:
            super().__init__(root, train, download)
            self.data, self.targets = colour, [3] * COUNT

    class Unreachable(DataSet):
        def __init__(self, root: str, train: bool, download: bool) -> None:
            raise RuntimeError("Error downloading")

    package, datasets = ModuleType("torchvision"), ModuleType("torchvision.datasets")
    package.datasets = datasets  # type: ignore[attr-defined]
    datasets.MNIST, datasets.CIFAR10 = DataSet, Colour  # type: ignore[attr-defined]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "torchvision", package)
    digits, words = load("mnist")
    assert words.startswith("MNIST (10,010 images")
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(digits, part).images, getattr(expected, part).images)
        assert torch.equal(getattr(digits, part).labels, getattr(expected, part).labels)
    images, _ = load("cifar10")
    assert images.train.images.shape == (COUNT - 10_000, 3, 4, 5)
    raw = torch.from_numpy(colour[:COUNT]).double() / 255
    normal = (raw - raw.mean((0, 1, 2))) / raw.std((0, 1, 2))
    assert torch.allclose(images.train.images[:3].double(), normal[:3].permute(0, 3, 1, 2), atol=1e-5)
    assert images.train.labels.unique().tolist() == [3]
    datasets.MNIST = Unreachable  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="--data mnist: could not be downloaded"):
        load("mnist")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"pip install slimtorch\[data\]"):
        load("cifar10")
