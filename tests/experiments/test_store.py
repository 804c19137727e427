# SPDX-License-Identifier: Apache-2.0
"""Stored units: found only whole, only for their own configuration."""

import numpy as np
import pytest

from slimtorch._files import write_atomically
from slimtorch.experiments.store import Record, Store, digest

CONFIG = {"method": "blocks", "sparsity": 0.9}


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "units")
    store.save("unit", CONFIG, Record({"test": 0.5}, {"fc1.weight": np.eye(3, dtype=np.float32)}))
    return store


def test_round_trip(store):
    record = store.load("unit", CONFIG)
    assert record.result == {"test": 0.5}
    np.testing.assert_array_equal(record.arrays["fc1.weight"], np.eye(3))
    assert [path.name for path in store.folder.iterdir()] == [f"unit-{digest(CONFIG)}.npz"]  # no temporary file left


def test_another_configuration_is_another_record(store):
    assert store.load("unit", {**CONFIG, "sparsity": 0.8}) is None
    assert store.load("other", CONFIG) is None


def test_a_record_under_a_wrong_name_is_not_believed(store):
    other = {**CONFIG, "sparsity": 0.8}
    store.path("unit", CONFIG).rename(store.path("unit", other))
    assert store.load("unit", other) is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_counts_as_missing(store, share):
    path = store.path("unit", CONFIG)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert store.load("unit", CONFIG) is None


def test_any_flipped_byte_is_noticed_or_harmless(store):
    path = store.path("unit", CONFIG)
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(bytes(damaged))
        record = store.load("unit", CONFIG)
        if record is not None:  # a byte that says nothing: a time stamp, an attribute
            assert record.result == {"test": 0.5}
            for array in record.arrays.values():
                np.testing.assert_array_equal(array, np.eye(3))


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def crash(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, crash)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_once_makes_what_is_not_there(store):
    made = []

    def make():
        made.append(1)
        return {"test": 0.25}

    assert store.once("unit", CONFIG, make) == {"test": 0.5}
    assert not made
    other = {**CONFIG, "sparsity": 0.8}
    assert [store.once("unit", other, make) for _ in range(2)] == [{"test": 0.25}] * 2
    assert made == [1]
    assert Store(store.folder).load("unit", other).result == {"test": 0.25}
