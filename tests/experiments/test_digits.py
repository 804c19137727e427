# SPDX-License-Identifier: Apache-2.0
"""The split of the digits: fixed, stratified, disjoint."""

import builtins

import pytest
import torch

from slimtorch import data


def _rows(split):
    return {image.numpy().tobytes() for image in split.images}


def test_sizes_classes_and_normalisation():
    digits = data.digits()
    assert [len(part) for part in (digits.train, digits.validation, digits.test)] == [3500, 500, 1000]
    assert digits.train.images.shape == (3500, 1, 28, 28)
    assert digits.train.images.dtype == torch.float32
    assert digits.train.labels.dtype == torch.int64
    for part in (digits.train, digits.validation, digits.test):
        assert part.labels.bincount().tolist() == [len(part) // 10] * 10
    low, high = (-data.MEAN / data.STD, (1 - data.MEAN) / data.STD)
    assert float(digits.train.images.min()) == pytest.approx(low)
    assert float(digits.train.images.max()) == pytest.approx(high)
    assert abs(float(digits.train.images.mean())) < 0.02


def test_the_split_depends_on_no_seed():
    torch.manual_seed(1)
    first = data.digits()
    torch.manual_seed(2)
    second = data.digits()
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels)


def test_parts_are_disjoint_and_the_test_part_stays_whatever_is_trained_on():
    full, small = data.digits(), data.digits(train=100, validation=50)
    assert torch.equal(full.test.images, small.test.images)
    test, train, validation = _rows(full.test), _rows(full.train), _rows(full.validation)
    assert len(test) + len(train) + len(validation) == len(test | train | validation)
    assert not _rows(small.train) & test


@pytest.mark.parametrize(
    ("sizes", "name"), [((0, 10, 10), "train"), ((10, 15, 10), "validation"), ((10, 10, -10), "test")]
)
def test_bad_sizes(sizes, name):
    with pytest.raises(ValueError, match=f"{name}: expected a positive multiple of 10"):
        data.digits(*sizes)


def test_too_many():
    with pytest.raises(ValueError, match="at most 5000, got 5010"):
        data.digits(4000, 500, 510)


def test_missing_package_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("mlxtend"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    data._raw.cache_clear()
    with pytest.raises(ImportError, match=r"slimtorch\[experiments\]"):
        data.digits()
