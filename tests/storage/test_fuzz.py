# SPDX-License-Identifier: Apache-2.0
"""Some thousand mutated files, and that the fuzzer would notice; `python -m tests.storage.fuzz` runs many more."""

from __future__ import annotations

import types
import zlib

import pytest
import torch

import slimtorch as slim
from slimtorch.storage import _container
from tests.storage.fuzz import Failure, Fuzzer, corpus


@pytest.fixture(scope="module")
def samples():
    return corpus()


def run(fuzzer, steps):
    for _ in range(steps):
        fuzzer.step()


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_are_refused_or_sound(seed, samples):
    fuzzer = Fuzzer(seed, samples)
    run(fuzzer, 800)
    assert fuzzer.counts["blind: refused"] > 200
    assert fuzzer.counts["forged: refused"] > 150
    assert fuzzer.counts["forged: loaded, sound"] > 10
    assert len(fuzzer.errors) >= 4  # refused by the prologue, the header, tensors, layers


class EqualToAll(int):
    def __ne__(self, _other):
        return False

    __eq__, __hash__ = None, None


def test_the_fuzzer_sees_a_checksum_that_is_not_looked_at(samples, monkeypatch):
    careless = types.SimpleNamespace(
        **{**vars(zlib), "crc32": lambda data, start=0: EqualToAll(zlib.crc32(data, start))}
    )
    monkeypatch.setattr(_container, "zlib", careless)
    fuzzer = Fuzzer(0, samples)
    with pytest.raises(Failure):
        run(fuzzer, 800)


@pytest.mark.parametrize("name", ["Sparse", "BlockSparse", "SparseCodebook"])
def test_the_fuzzer_sees_a_format_that_is_not_checked(name, samples, monkeypatch):
    validate = getattr(slim.formats, name).validate
    loading = [False]

    def careless(held):
        return held if loading[0] else validate(held)

    monkeypatch.setattr(getattr(slim.formats, name), "validate", careless)
    load = slim.load

    def hasty(path, model):
        loading[0] = True
        try:
            return load(path, model)
        finally:
            loading[0] = False

    monkeypatch.setattr(slim, "load", hasty)
    monkeypatch.setattr(slim.nn.PackedLayer, "_prepare", lambda self: setattr(self, "_planned", None))
    wanted = {"Sparse": "sparse_", "BlockSparse": "block", "SparseCodebook": "sparse_codebook"}[name]
    fuzzer = Fuzzer(0, [sample for sample in samples if sample.name.startswith(wanted)])
    with pytest.raises(Failure):
        run(fuzzer, 1500)


def test_corpus_has_every_encoding(samples, tmp_path):
    encodings, codings = set(), set()
    for sample in samples:
        (tmp_path / "x.slim").write_bytes(sample.data)
        for layer in slim.storage.inspect(tmp_path / "x.slim").layers:
            encodings |= {tensor.encoding for tensor in layer.tensors}
            codings |= {coding for tensor in layer.tensors for coding in tensor.codings}
    assert encodings == {"plain", "distinct", "zeros", "codes", "columns", "counts"}
    assert {"plain", "huffman", "bytes"} <= codings
    assert any(coding.startswith("bits") for coding in codings)
    assert torch.is_tensor(samples[0].state["values"])
