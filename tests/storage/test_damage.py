# SPDX-License-Identifier: Apache-2.0
"""Damaged, forged and oversized files: a FormatError that says where, no memory taken, the model as it was."""

from __future__ import annotations

import copy
import struct
import tracemalloc
import zlib

import pytest
import torch
from torch import nn

import slimtorch as slim
from slimtorch.storage import _container
from tests.storage import fuzz
from tests.storage.fuzz import dump, join, same_bits, split


@pytest.fixture(scope="module")
def samples():
    return {sample.name: sample for sample in fuzz.corpus()}


def refused(data, model, tmp_path, match):
    path = tmp_path / "x.slim"
    path.write_bytes(data)
    state = copy.deepcopy(model.state_dict())
    tracemalloc.start()
    try:
        with pytest.raises(slim.FormatError, match=match):
            slim.load(path, model)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20  # numpy's and python's
    finally:
        tracemalloc.stop()
    assert same_bits(model.state_dict(), state)
    return path


def test_no_byte_of_a_file_can_change_unseen(samples, tmp_path):
    for name in ("sparse_codebook_linear", "dense"):
        sample = samples[name]
        model = sample.fresh()
        path = tmp_path / "x.slim"
        for at in range(len(sample.data)):
            data = bytearray(sample.data)
            data[at] ^= 1 << at % 8
            path.write_bytes(data)
            with pytest.raises(slim.FormatError):
                slim.load(path, model)


def test_a_file_cut_anywhere_is_refused(samples, tmp_path):
    sample = samples["sparse_linear-plain"]
    model, path = sample.fresh(), tmp_path / "x.slim"
    for length in range(len(sample.data)):
        path.write_bytes(sample.data[:length])
        with pytest.raises(slim.FormatError):
            slim.load(path, model)
    path.write_bytes(sample.data)
    slim.load(path, model)


def prologue(version=1, checksum=0, stored=0, length=0, magic=b"\x89SLIM\r\n\x1a"):
    return struct.pack("<8sIIII", magic, version, checksum, stored, length)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "byte 0: this is no .slim file"),
        (b"PK\x03\x04" + bytes(60), "byte 0: this is no .slim file"),
        (b"\x89SLIM\r\n\x1a", "byte 8: the file ends within its first fields"),
        (prologue(magic=b"\x89SLIM\n\x1a\n"), "byte 0: this is no .slim file"),  # line ends converted on the way
        (prologue(version=3), "byte 8: the file has version 3, this library reads up to 2: use a newer slimtorch"),
        (prologue(version=0), "byte 8: expected a version from 1 on, got 0"),
        (prologue(stored=1 << 31, length=1 << 31), "byte 16: a header of 2147483648 bytes in a file of 24"),
        (prologue(length=1 << 31), "byte 20: expected a header of 0 … 88064"),
        (prologue(stored=4, length=4) + b"{}  ", "byte 12: the checksum of the header is wrong"),
        (join(b"[1]", b""), "header: expected an object, got list"),
        (join(b"{", b""), "header: not JSON: .* at character 1"),
        (join(b'{"a": "\xff"}', b""), "header: not UTF-8 at byte 7"),
        (join(b"[" * 6000, b""), "header: 6000 values in 6000 bytes"),
        (join(b'{"a":' + b'[  "' * 5000, b""), "header: (nested too deeply|not JSON)"),
        (join(b'{"a":' * 5000, b""), "header: nested too deeply"),
        (join(b'{"a": NaN}', b""), "header: expected whole numbers only, got NaN"),
        (join(b'{"a": 1e400}', b""), "header: expected whole numbers only, got 1e400"),
        (join(b'{"a": ' + b"9" * 5000 + b"}", b""), "header: a number of 5000 digits"),
        (join(b'{"a": 1, "b": 2, "a": 3}', b""), "header: the field 'a' occurs twice"),
        (join(b'{"library":"x","layers":[]}', b""), "header: misses field 'tensors'"),
        (join(b'{"library":"x","layers":[],"tensors":[],"more":1}', b""), "header: has the unknown field 'more'"),
        (join(b'{"library":1,"layers":[],"tensors":[]}', b""), "header.library: unexpected int 1"),
        (join(b'{"library":"x","layers":[],"tensors":[]}', b"x"), "byte 64: expected the end of the file, got .* more"),
        (join(b"x" * 100, b"", length=99), "byte 20: expected a header of 100"),
        (join(b"{}" + b" " * 70000, b"", length=60000, deflate=True), "header: does not inflate to 60000 bytes"),
        (join(b" " * 10_000_000, b"", deflate=True), "byte 20: expected a header of"),  # a zip bomb
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else "",
)
def test_prologue_and_header(data, message, tmp_path):
    path = refused(data, nn.Linear(2, 2), tmp_path, message)
    if "10000000" not in message and len(data) < 9000:
        with pytest.raises(slim.FormatError):
            slim.storage.inspect(path)


def test_a_deflated_header_must_be_deflated(tmp_path):
    data = bytearray(join(b"{}" + b" " * 90, b"", deflate=True))
    data[24:26] = b"xx"
    data[12:16] = struct.pack("<I", zlib.crc32(data[24:], zlib.crc32(data[16:24], zlib.crc32(data[:12]))))
    refused(bytes(data), nn.Linear(2, 2), tmp_path, "header: cannot be inflated")


def edit(sample, change):
    """The file with its header changed and the checksum made good."""
    header, sections = split(sample.data)
    change(header)
    return join(dump(header), sections)


def put(value, *keys):
    def change(header):
        inner = header
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


T, L = "tensors", "layers"
FORGED = [
    ("sparse_linear", put(-1, T, 0, "shape", 0), r"tensors\[0\].shape: expected 0 … "),
    ("sparse_linear", put(2**60, T, 0, "shape", 0), r"tensors\[0\].shape: expected 0 … "),
    ("sparse_linear", put([2**40, 2**40], T, 2, "shape"), r"tensors\[2\].shape: 12089.* elements"),
    ("sparse_linear", put([1] * 17, T, 2, "shape"), r"tensors\[2\].shape: expected a list of at most 16"),
    ("sparse_linear", put("float33", T, 2, "dtype"), r"tensors\[2\].dtype: expected one of bool, .*, got 'float33'"),
    ("sparse_linear", put("int32", T, 2, "dtype"), r"tensors\[2\].dtype: expected floating point of 'values'"),
    ("sparse_linear", put("zip", T, 2, "encoding"), r"tensors\[2\].encoding: expected plain, .*, got 'zip'"),
    ("sparse_linear", put(True, T, 2, "section", "offset"), r"tensors\[2\].section.offset: unexpected bool True"),
    ("sparse_linear", put(0, T, 2, "section", "offset"), r"tensors\[2\].section.offset: expected \d+, got 0"),
    ("sparse_linear", put(2**47, T, 2, "section", "offset"), r"tensors\[2\].section.offset: expected"),
    ("sparse_linear", put(0, T, 2, "section", "crc32"), r"tensors\[2\].section \(bytes .*: the checksum is wrong"),
    ("sparse_linear", put(0, T, 1, "crc32"), r"tensors\[1\]: the checksum of the decoded tensor is wrong"),
    ("sparse_linear", put(1, T, 1, "offsets"), r"tensors\[1\].offsets: expected the number of an earlier tensor"),
    ("sparse_linear", put("gzip", T, 1, "gaps", "coding"), r"tensors\[1\].gaps.coding: expected bytes, "),
    ("sparse_linear", put(10**9, T, 1, "gaps", "symbols"), r"tensors\[1\].gaps"),
    ("sparse_linear", put("x", L, 0, "name"), r"layers: the file has 'x', which the model lacks; the model has ''"),
    ("sparse_linear", put("dense", L, 0, "format"), r"layers\[0\].options: expected none of a dense layer"),
    ("sparse_linear", put("magic", L, 0, "format"), r"layers\[0\].format: expected dense, sparse"),
    ("sparse_linear", put("PReLU", L, 0, "kind"), r"layers\[0\].geometry: "),
    ("sparse_linear", put(20, L, 0, "geometry", "in_features"), r"in_features: expected at most 19, got 20"),
    ("sparse_linear", put(2**31, L, 0, "geometry", "in_features"), r"layers\[0\].geometry: a weight of 27917287424"),
    ("sparse_linear", put("tanh", L, 0, "options", "activation"), r"options.activation: expected null or 'relu'"),
    ("sparse_linear", put(9, L, 0, "tensors", "values"), r"layers\[0\].tensors.values: expected a number below 4"),
    ("sparse_linear", put(3, L, 0, "tensors", "values"), r"tensors\[.\]"),
    ("block_sparse_linear", put([0, 4], L, 0, "options", "block_size"), r"block_size: expected two numbers in 1"),
    ("block_sparse_linear", put([2048, 4], L, 0, "options", "block_size"), r"block_size: expected 0 … 1024, got 2048"),
    ("codebook_linear", put(9, L, 0, "options", "bits"), r"layers\[0\].options.bits: expected 0 … 8, got 9"),
    ("codebook_linear", put(0, L, 0, "options", "bits"), r"layers\[0\].options.bits: expected 1 … 8, got 0"),
    ("codebook_linear", put(4, L, 0, "options", "bits"), r"tensors\[1\].shape: expected \[4, 16\] of 'codebook'"),
    ("codebook_linear", put(20, L, 0, "options", "group_size"), r"layers\[0\].options: group_size: expected 1 … 19"),
    ("codebook_linear", put("column", L, 0, "options", "group_size"), r"layers\[0\].options: group_size"),
    ("sparse_conv2d", put(3, L, 0, "geometry", "groups"), r"layers\[0\].geometry: 3 groups do not divide 4 and 6"),
    ("sparse_conv2d", put([3], L, 0, "geometry", "kernel_size"), r"kernel_size: expected 2 numbers, got \[3\]"),
    ("sparse_conv2d", put("circular", L, 0, "geometry", "padding_mode"), r"padding_mode: expected 'zeros'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), FORGED, ids=lambda v: v[:50] if isinstance(v, str) else "")
def test_forged_headers(name, change, message, samples, tmp_path):
    sample = samples[name]
    refused(edit(sample, change), sample.fresh(), tmp_path, message)


def test_duplicate_layers_and_stray_tensors(samples, tmp_path):
    sample = samples["sparse_linear"]
    twice = edit(sample, lambda h: h[L].append(copy.deepcopy(h[L][0])))
    refused(twice, sample.fresh(), tmp_path, r"layers\[1\].name: the layer '' occurs twice")
    stray = edit(sample, lambda h: h[T].append(copy.deepcopy(h[T][0])))
    refused(stray, sample.fresh(), tmp_path, r"tensors\[4\]: the tensor belongs to no layer")


def tiny(record, body=b"", shape=(4,), dtype="float32", name="p0"):
    """A file with a single tensor of a module without a kind."""
    layer = {"name": "", "kind": "Holder", "format": "dense", "geometry": {}, "options": {}, "tensors": {name: 0}}
    tensor = {"dtype": dtype, "shape": list(shape), **record}
    data = join(dump({"library": "x", "layers": [layer], "tensors": [tensor]}), body)
    return data if body else data + bytes(-len(data) % 8)


def section(body=b"", offset=0):
    return {"offset": offset, "length": len(body), "crc32": zlib.crc32(body)}


class Holder(nn.Module):
    def __init__(self, tensor):
        super().__init__()
        if tensor.is_floating_point():
            self.p0 = nn.Parameter(tensor)
        else:
            self.register_buffer("p0", tensor)


def test_nothing_that_expands_goes_beyond_the_model(tmp_path):
    """Constant tensors take no bytes at all: what they may say is bounded by the tensor that they are loaded into."""
    table = struct.pack("<f", 1.5)

    def constant(numel):
        return {
            "encoding": "distinct", "crc32": zlib.crc32(table * numel) if numel < 1000 else 0, "count": 1,
            "section": section(table), "indices": {"coding": "bits0", "symbols": numel, "section": section(b"", 8)},
        }  # fmt: skip

    body = table + bytes(4)
    path = tmp_path / "x.slim"
    path.write_bytes(tiny(constant(4), body))
    assert torch.equal(slim.load(path, Holder(torch.zeros(4))).p0, torch.full((4,), 1.5))
    huge = 1 << 40
    path = refused(tiny(constant(huge), body, (huge,)), Holder(torch.zeros(4)), tmp_path, r"expected at most \[4\]")
    assert slim.storage.inspect(path).dense_bytes == 4 * huge  # nothing is decoded that is not needed
    zeros = {
        "encoding": "zeros", "crc32": 0, "gaps": {"coding": "bits0", "symbols": 0, "section": section()},
        "signs": {"coding": "bits0", "symbols": huge, "section": section()},
        "values": {"dtype": "float32", "shape": [0], "encoding": "plain", "section": section()},
    }  # fmt: skip
    refused(tiny(zeros, b"", (huge,)), Holder(torch.zeros(4)), tmp_path, r"expected at most \[4\]")
    counts = {"encoding": "counts", "crc32": 0,
              "counts": {"coding": "bits0", "symbols": huge - 1, "section": section()}}  # fmt: skip
    model = Holder(torch.zeros(4, dtype=torch.int32))
    refused(tiny(counts, b"", (huge,), "int32"), model, tmp_path, "'counts' does not go with a dense layer")
    codes = {"encoding": "codes", "crc32": 0, "bits": 8,
             "indices": {"coding": "bits0", "symbols": huge, "section": section()}}  # fmt: skip
    model = Holder(torch.zeros(4, dtype=torch.uint8))
    refused(tiny(codes, b"", (huge,), "uint8"), model, tmp_path, r"expected at most \[4\]")
    blob = torch.ops.slimtorch.huffman_encode(torch.zeros(1000, dtype=torch.uint8)).numpy().tobytes()
    codes["indices"] = {"coding": "huffman", "symbols": 1000, "section": section(blob)}
    refused(tiny(codes, blob, (1000,), "uint8"), Holder(torch.zeros(1000, dtype=torch.uint8)), tmp_path,
            r"tensors\[0\].indices.symbols: expected at most \d+, got 1000")  # fmt: skip


def test_symbols_that_lie(tmp_path):
    values = struct.pack("<2f", 1, 2)

    def zeros(gaps, symbols=None, shape=(8,)):
        return tiny(
            {
                "encoding": "zeros", "crc32": 0,
                "gaps": {"coding": "bytes", "symbols": len(gaps) if symbols is None else symbols,
                         "section": section(gaps)},
                "signs": {"coding": "bits0", "symbols": shape[0] - 2, "section": section(b"", 8)},
                "values": {"dtype": "float32", "shape": [2], "encoding": "plain", "section": section(values, 8)},
            },
            gaps + bytes(8 - len(gaps)) + values, shape,
        )  # fmt: skip

    model = Holder(torch.zeros(8))
    refused(zeros(bytes([1, 9])), model, tmp_path, r"gaps: expected positions below 8, got 11")
    refused(zeros(bytes([1, 255])), Holder(torch.zeros(800)), tmp_path, "symbols|expected")
    big = Holder(torch.zeros(800))
    refused(zeros(bytes([1, 255]), shape=(800,)), big, tmp_path, "gaps: expected 2 numbers, got 1 and 1 escapes")
    refused(zeros(bytes([1, 1, 1]), shape=(800,)), big, tmp_path, "gaps: expected 2 numbers, got 3 and 0 escapes")
    refused(zeros(bytes([1])), model, tmp_path, r"gaps.symbols: expected 2 … 2, got 1")
    refused(zeros(bytes([1, 1]), 3), model, tmp_path, r"gaps.section.length: expected 3, got 2")
    refused(zeros(bytes([1, 1])), model, tmp_path, "the checksum of the decoded tensor is wrong")
    distinct = {
        "encoding": "distinct", "crc32": 0, "count": 2, "section": section(values),
        "indices": {"coding": "bits2", "symbols": 2, "section": section(b"\x09", 8)},
    }  # fmt: skip
    refused(tiny(distinct, values + b"\x09", (2,)), Holder(torch.zeros(2)), tmp_path, "expected indices below 2, got 2")
    distinct["indices"]["section"] = section(b"\x80", 8)
    refused(tiny(distinct, values + b"\x80", (2,)), Holder(torch.zeros(2)), tmp_path, "zeros in the last 4 bits")
    distinct["indices"] = {"coding": "huffman", "symbols": 2, "section": section(b"\x80" * 9, 8)}
    refused(
        tiny(distinct, values + b"\x80" * 9, (2,)), Holder(torch.zeros(2)), tmp_path, "no Huffman code of 2 symbols"
    )
    flags = {"encoding": "plain", "section": section(b"\x00\x02")}
    model = Holder(torch.zeros(2, dtype=torch.bool))
    refused(tiny(flags, b"\x00\x02", (2,), "bool"), model, tmp_path, "expected bytes 0 and 1 in a bool tensor")


def forge_tensor(sample, name, values):
    """The plain file with a tensor of its layer set to other values, all checksums right."""
    header, body = split(sample.data)
    body = bytearray(body)
    tensor = header[T][header[L][0]["tensors"][name]]
    assert tensor["encoding"] == "plain"
    place = tensor["section"]
    data = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert len(data) == place["length"]
    body[place["offset"] : place["offset"] + len(data)] = data
    place["crc32"] = zlib.crc32(data)
    return join(dump(header), bytes(body))


@pytest.mark.parametrize(
    ("name", "tensor", "change", "message"),
    [
        ("sparse_linear", "columns", lambda t: t + 19, r"layers\[0\] \(''\): columns: expected indices in \[0, 19\)"),
        ("sparse_linear", "columns", lambda t: t.flip(0), "columns: expected indices that ascend strictly"),
        ("sparse_linear", "columns", lambda t: t - 2**31, "columns: expected indices in"),
        ("sparse_linear", "row_offsets", lambda t: t + 1, "row_offsets: expected non-decreasing offsets from 0"),
        ("sparse_linear", "row_offsets", lambda t: t.flip(0), "row_offsets: expected non-decreasing"),
        ("block_sparse_conv2d", "block_columns", lambda t: t - 1, "block_columns: expected indices in"),
        (
            "sparse_codebook_linear",
            "gaps",
            lambda t: torch.full_like(t, 255),
            "gaps: expected no row to end with a skip",
        ),
        ("sparse_codebook_linear", "gaps", lambda t: torch.full_like(t, 254), "gaps: expected columns below 19"),
        ("sparse_codebook_linear", "row_offsets", lambda t: -t, "row_offsets: expected non-decreasing"),
        ("codebook_linear", "codes", lambda t: t | 255, "codes: expected zeros in the last"),
        ("binary_linear", "signs", lambda t: t | 255, "signs: expected zeros in the last"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_forged_formats_meet_their_own_checks(name, tensor, change, message, samples, tmp_path):
    sample = samples[f"{name}-plain"]
    good = sample.state[tensor]
    path = tmp_path / "x.slim"
    path.write_bytes(forge_tensor(sample, tensor, good))
    assert same_bits(slim.load(path, sample.fresh()).state_dict(), sample.state)
    refused(forge_tensor(sample, tensor, change(good)), sample.fresh(), tmp_path, message)


def test_one_tensor_under_two_names_is_bounded_too(samples, tmp_path):
    """Offsets shared by layers of different widths, positions that refer to offsets of another tensor."""
    sample = samples["sparse_linear"]
    data = edit(sample, put(0, L, 0, "tensors", "columns"))
    refused(data, sample.fresh(), tmp_path, r"tensors\[0\].shape: expected \[\d+\] of 'columns', got \[14\]")


def test_a_plain_header_is_readable_and_sections_are_aligned(samples):
    data = samples["sparse_linear-plain"].data
    assert data.startswith(_container.MAGIC)
    header, _ = split(data)
    assert data[24:].startswith(dump({"library": header["library"]})[:-1])
    for tensor in header[T]:
        assert tensor["section"]["offset"] % 8 == 0


def test_large_files_are_read_piece_by_piece(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(_container, "_SMALL_FILE", 0)
    for sample in samples.values():
        path = tmp_path / "x.slim"
        path.write_bytes(sample.data)
        assert same_bits(slim.load(path, sample.fresh()).state_dict(), sample.state)


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(_container, "_SMALL_FILE", 0)
    path = tmp_path / "x.slim"
    slim.save(nn.Linear(200, 200), path, compress=False)
    data = path.read_bytes()
    check = _container.Reader.check_layout

    def shrink(reader, *args):
        check(reader, *args)
        path.write_bytes(data[:-50_000])

    monkeypatch.setattr(_container.Reader, "check_layout", shrink)
    with pytest.raises(slim.FormatError, match="the file ends within the section"):
        slim.load(path, nn.Linear(200, 200))
