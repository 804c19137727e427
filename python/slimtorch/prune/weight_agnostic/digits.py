# SPDX-License-Identifier: Apache-2.0
"""Classifying small images with networks of one shared weight (1906.04358, section 5)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimtorch.data import Digits, Split
from slimtorch.prune.magnitude import check_count
from slimtorch.prune.weight_agnostic.genome import Genome
from slimtorch.prune.weight_agnostic.network import Networks, Weights

_CHUNK = 500  # images at a time: bounds the memory of a long test


class Classification:
    """The task for `search`: images scaled down to `size` x `size` by area, pixels from 0 to 1.

    A reward is minus the mean cross-entropy of the outputs, as the authors take it. Outputs that are not finite count
    as 0: they say nothing for their class.

    Args:
        data: images [N, C, H, W] and labels; colours become more inputs.
        size: of the small images, in pixels.
        batch: training images per generation, other ones in each, the same for the whole population.

    Raises:
        ValueError: a batch larger than the training set, or images smaller than `size`.
    """

    def __init__(self, data: Digits, size: int = 8, batch: int = 100) -> None:
        check_count("size", size, 1)
        check_count("batch", batch, 1)
        if batch > len(data.train):
            raise ValueError(f"batch: expected at most {len(data.train)} images, got {batch}")
        if size > min(data.train.images.shape[2:]):
            raise ValueError(f"size: expected at most {min(data.train.images.shape[2:])} pixels, got {size}")
        self.size, self.batch = size, batch
        low, high = float(data.train.images.min()), float(data.train.images.max())
        self._parts = {name: self._small(getattr(data, name), low, high) for name in ("train", "validation", "test")}
        self.inputs = self._parts["train"].images.shape[1]
        self.outputs = int(data.train.labels.max()) + 1

    def _small(self, split: Split, low: float, high: float) -> Split:
        small = F.interpolate((split.images - low) / (high - low), (self.size, self.size), mode="area")
        return Split(small.flatten(1).contiguous(), split.labels)

    def part(self, name: str) -> Split:
        """Images [N, inputs] and labels of "train", "validation" or "test"."""
        if name not in self._parts:
            raise ValueError(f"name: expected one of {', '.join(self._parts)}, got {name!r}")
        return self._parts[name]

    def describe(self) -> Mapping[str, Any]:
        """What a search is remembered by."""
        state = hashlib.sha256(self._parts["train"].images.numpy().tobytes())
        state.update(self._parts["train"].labels.numpy().tobytes())
        data = state.hexdigest()[:16]
        return {"task": "classification", "size": self.size, "batch": self.batch, "data": data}

    def rewards(
        self, genomes: Sequence[Genome], shared: Tensor, seed: int, weights: Weights = None
    ) -> Tensor:
        """[population, W]: minus the mean cross-entropy on a batch drawn with `seed`."""
        train = self._parts["train"]
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: self.batch]
        return self._over(genomes, shared, Split(train.images[chosen], train.labels[chosen]), weights)[0]

    def validate(self, genomes: Sequence[Genome], shared: Tensor, weights: Weights = None) -> Tensor:
        """[population, W]: minus the mean cross-entropy on the validation images."""
        return self._over(genomes, shared, self._parts["validation"], weights)[0]

    def accuracy(
        self, genomes: Sequence[Genome], shared: Tensor, part: str, weights: Weights = None
    ) -> Tensor:
        """[population, W]: share of right answers on a part, in [0, 1]."""
        return self._over(genomes, shared, self.part(part), weights)[1]

    def test(self, genomes: Sequence[Genome], shared: Tensor, weights: Weights = None) -> Tensor:
        """[population, W]: share of right answers on the test images."""
        return self.accuracy(genomes, shared, "test", weights)

    def _over(
        self, genomes: Sequence[Genome], shared: Tensor, split: Split, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        networks = Networks(genomes, weights)
        reward, right = torch.zeros(len(genomes), len(shared)), torch.zeros(len(genomes), len(shared))
        for images, labels in zip(split.images.split(_CHUNK), split.labels.split(_CHUNK), strict=True):
            outputs = networks(images, shared).nan_to_num(0, 0, 0)
            at = labels.expand(outputs.shape[:-1])[..., None]
            reward += (outputs.gather(-1, at)[..., 0] - outputs.logsumexp(-1)).sum(-1)
            right += (outputs.argmax(-1) == labels).sum(-1)
        return reward / len(split), right / len(split)
