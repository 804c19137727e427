# SPDX-License-Identifier: Apache-2.0
"""Huffman codes: round trips, the format bit by bit, least size, and blobs that are damaged in every way."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimtorch.ops import huffman_decode, huffman_encode, huffman_lengths, huffman_size

MANY = 2**14  # from here on there are four streams
LONGEST = 12


def symbols_of(n: int, alphabet: int, skew: float, seed: int = 0) -> Tensor:
    """n symbols below `alphabet`; symbol i is exp(-skew) times as likely as i - 1."""
    generator = np.random.default_rng(seed)
    p = np.exp(-skew * np.arange(alphabet))
    return torch.from_numpy(generator.choice(alphabet, n, p=p / p.sum()).astype(np.uint8))


def round_trip(symbols: Tensor) -> Tensor:
    blob = huffman_encode(symbols)
    assert torch.equal(huffman_decode(blob, len(symbols)), symbols)
    assert huffman_size(torch.bincount(symbols, minlength=1)) == len(blob)
    return blob


def refused(blob: Tensor, n: int, match: str = "not a Huffman code") -> None:
    with pytest.raises(ValueError, match=match):
        huffman_decode(blob, n)


# ---- a decoder written out -------------------------------------------------------------------------------------------


def read(data: bytes) -> list[int]:
    """The format as documented, one bit at a time."""
    version, kind, last, streams, n = struct.unpack_from("<BBBBQ", data)
    assert version == 1
    if kind == 0:
        return [last] * n
    nibbles = itertools.chain.from_iterable((byte & 15, byte >> 4) for byte in data[12:])
    lengths: list[int] = []
    read_count = 0

    def take() -> int:
        nonlocal read_count
        read_count += 1
        return next(nibbles)

    while len(lengths) <= last:
        value = take()
        if value == 13:
            a, b = take(), take()
            lengths += [0] * (a + 16 * b + 3)
        elif value == 14:
            lengths += [lengths[-1]] * (take() + 3)
        else:
            lengths.append(value)
    at = 12 + (read_count + 1) // 2
    ends = struct.unpack_from(f"<{streams}Q", data, at)
    bits = np.unpackbits(np.frombuffer(data[at + 8 * streams :], np.uint8), bitorder="little").tolist()
    codes, code = {}, 0
    for length in range(1, LONGEST + 1):
        code <<= 1
        for symbol in range(last + 1):
            if lengths[symbol] == length:
                codes[length, code] = symbol
                code += 1
    out, position, chunk = [], 0, -(-n // streams)
    for stream in range(streams):
        for _ in range(max(0, min(chunk, n - stream * chunk))):
            length = code = 0
            while (length, code) not in codes:
                code = code * 2 + bits[position]
                position, length = position + 1, length + 1
            out.append(codes[length, code])
        assert position == ends[stream]
    assert not any(bits[position:])
    assert len(bits) - position < 8
    return out


@pytest.mark.parametrize(
    ("n", "alphabet", "skew"),
    [(0, 1, 0.0), (1, 5, 0.0), (900, 16, 0.3), (900, 256, 0.05), (900, 256, 0.6), (MANY + 3, 7, 1.0)],
)
def test_the_documented_format(n: int, alphabet: int, skew: float) -> None:
    symbols = symbols_of(n, alphabet, skew)
    assert read(bytes(huffman_encode(symbols).tolist())) == symbols.tolist()


def test_a_blob_does_not_change() -> None:
    """What was written once is read for ever."""
    symbols = torch.tensor([0, 1, 0, 2, 0, 255, 0, 0, 1, 9], dtype=torch.uint8)
    stored = "0101ff01" "0a00000000000000" "31d303d3f203" "1400000000000000" "a24e06"
    assert bytes(huffman_encode(symbols).tolist()).hex() == stored
    assert torch.equal(huffman_decode(torch.tensor(list(bytes.fromhex(stored)), dtype=torch.uint8), 10), symbols)


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew", [0.0, 0.05, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("alphabet", [1, 2, 3, 4, 16, 17, 255, 256])
def test_round_trip(alphabet: int, skew: float) -> None:
    for n in (0, 1, 2, 3, 7, 8, 9, 100, 1000, MANY - 1, MANY, MANY + 1, MANY + 2, MANY + 3, 70_001):
        round_trip(symbols_of(n, alphabet, skew, n))


def test_one_symbol() -> None:
    for symbol, n in itertools.product((0, 7, 255), (1, 2, MANY, 10**6)):
        assert len(round_trip(torch.full((n,), symbol, dtype=torch.uint8))) == 12


def test_streams_of_different_kinds() -> None:
    """One stream ends long before the others, in every order."""
    rare, common = symbols_of(5000, 256, 0.0), torch.zeros(5000, dtype=torch.uint8)
    for mask in range(16):
        round_trip(torch.cat([rare if mask >> s & 1 else common for s in range(4)]))


def test_views_and_repeated_calls() -> None:
    symbols = symbols_of(40_000, 16, 0.3)
    strided = torch.stack([symbols, symbols], 1)[:, 0]
    blob = round_trip(strided)
    assert torch.equal(blob, huffman_encode(symbols))
    assert torch.equal(huffman_decode(torch.cat([blob[:1], blob])[1:], 40_000), symbols)  # at an odd address
    assert torch.equal(huffman_decode(torch.stack([blob, blob], 1)[:, 0], 40_000), symbols)


@settings(max_examples=300)
@given(
    st.lists(st.integers(0, 255), min_size=1, max_size=40),
    st.lists(st.integers(0, 4000), min_size=1, max_size=40),
    st.integers(0, 2**32),
)
def test_any_distribution(alphabet: list[int], counts: list[int], seed: int) -> None:
    symbols = np.repeat(np.array(alphabet, np.uint8), np.resize(counts, len(alphabet)))
    np.random.default_rng(seed).shuffle(symbols)
    round_trip(torch.from_numpy(symbols))


# ---- size ------------------------------------------------------------------------------------------------------------


def cost(counts: list[int], lengths: list[int]) -> int:
    return sum(c * n for c, n in zip(counts, lengths, strict=True))


def limited(counts: list[int], limit: int) -> int:
    """Least cost of a prefix code of at most `limit` bits, by trying every profile of sorted lengths."""
    ordered = sorted(counts, reverse=True)
    best = math.inf

    def extend(i: int, shortest: int, left: Fraction, so_far: int) -> None:
        nonlocal best
        if so_far >= best:
            return
        if i == len(ordered):
            best = so_far
            return
        for length in range(shortest, limit + 1):
            share = Fraction(1, 2**length)
            if share * (len(ordered) - i) <= left or share <= left - Fraction(len(ordered) - i - 1, 2**limit):
                extend(i + 1, length, left - share, so_far + ordered[i] * length)

    extend(0, 1, Fraction(1), 0)
    return int(best)


@pytest.mark.parametrize("seed", range(6))
def test_least_size_of_small_alphabets(seed: int) -> None:
    generator = np.random.default_rng(seed)
    for m in range(2, 9):
        counts = [int(c) for c in np.exp(generator.uniform(0, 9, m)).astype(int) + 1]
        lengths = huffman_lengths(torch.tensor(counts)).tolist()
        assert not any(lengths[m:])
        assert cost(counts, lengths[:m]) == limited(counts, LONGEST)


def test_least_size_where_the_limit_binds() -> None:
    """Fibonacci counts want lengths of up to m - 1; with 14 symbols the limit costs two symbols each a bit."""
    counts = [1, 1]
    while len(counts) < 14:
        counts.append(counts[-1] + counts[-2])
    lengths = huffman_lengths(torch.tensor(counts)).tolist()[:14]
    assert max(lengths) == LONGEST
    assert cost(counts, lengths) == limited(counts, LONGEST)
    assert cost(counts, lengths) > limited(counts, 13)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 2**20) | st.integers(0, 30) | st.just(2**48), max_size=256))
def test_lengths_of_any_histogram(counts: list[int]) -> None:
    lengths = huffman_lengths(torch.tensor(counts, dtype=torch.int64)).tolist()
    present = [(c, n) for c, n in zip(counts, lengths, strict=False) if c]
    assert all(n == 0 for c, n in zip(counts, lengths, strict=False) if not c)
    if len(present) < 2:
        assert not any(lengths)
        return
    assert sum(Fraction(1, 2**n) for _, n in present) == 1
    assert all(1 <= n <= LONGEST for _, n in present)
    assert all(n <= m for c, n in present for d, m in present if c > d)
    total = sum(c for c, _ in present)
    entropy = sum(c * math.log2(total / c) for c, _ in present)
    # A Huffman code is less than a bit a symbol above the entropy; the limit costs at most 2**-4 more with 256 symbols.
    assert cost([c for c, _ in present], [n for _, n in present]) < entropy + (1 + 2**-4) * total


@pytest.mark.parametrize(("alphabet", "skew"), [(16, 0.3), (256, 0.08), (256, 0.01), (2, 3.0)])
def test_size_against_entropy(alphabet: int, skew: float) -> None:
    symbols = symbols_of(200_000, alphabet, skew)
    counts = torch.bincount(symbols).double()
    p = counts[counts > 0] / len(symbols)
    entropy = float(-(p * p.log2()).sum())
    bits = 8 * len(huffman_encode(symbols)) / len(symbols)
    # Gallager's bound on the redundancy: the largest probability plus 0.086; and at most 200 bytes of header.
    assert entropy <= bits <= entropy + float(p.max()) + 0.086 + 8 * 200 / len(symbols)


# ---- damaged blobs ---------------------------------------------------------------------------------------------------


def good_blobs() -> Iterator[tuple[Tensor, Tensor]]:
    for n, alphabet, skew in [
        (0, 1, 0.0), (50, 1, 0.0), (2, 2, 0.0), (300, 16, 0.3), (300, 256, 0.05), (5000, 3, 2.0),
        (MANY, 16, 0.3), (MANY + 1, 256, 0.05), (20_000, 256, 1.0),
    ]:  # fmt: skip
        symbols = symbols_of(n, alphabet, skew)
        yield symbols, huffman_encode(symbols)


def decodes_or_refuses(blob: Tensor, n: int) -> bool:
    """Nothing but a result of n symbols or RuntimeError: anything else fails the test (or the process)."""
    try:
        symbols = torch.ops.slimtorch.huffman_decode(blob, n)
    except RuntimeError:
        return False
    assert symbols.shape == (n,)
    return True


def test_every_truncation_is_refused() -> None:
    for symbols, blob in good_blobs():
        ends = range(len(blob)) if len(blob) < 1000 else [*range(300), *range(len(blob) - 300, len(blob))]
        for end in ends:
            assert not decodes_or_refuses(blob[:end].clone(), len(symbols)), end
        assert not decodes_or_refuses(torch.cat([blob, blob[:1]]), len(symbols))
        assert not decodes_or_refuses(torch.cat([blob, blob.new_zeros(1)]), len(symbols))


def test_another_number_of_symbols_is_refused() -> None:
    for symbols, blob in good_blobs():
        for n in (0, 1, len(symbols) - 1, len(symbols) + 1, 2**31, 2**40, 2**62, 2**63 - 1):
            if n >= 0 and n != len(symbols):
                refused(blob, n, "n: not the number of symbols")


def test_a_claim_beyond_the_bytes_is_refused_before_memory_is_taken() -> None:
    for n in (2**31, 2**40, 2**62, 2**63 - 1):
        for symbols, blob in good_blobs():
            if len(symbols) < 2 or int(blob[1]) == 0:
                continue
            claims = blob.clone()
            claims[4:12] = torch.tensor(list(struct.pack("<Q", n)), dtype=torch.uint8)
            claims[3] = 4
            refused(claims, n, "streams: ends that no such symbols have|code lengths|streams: the")


def test_every_flipped_bit_of_a_header() -> None:
    kept = 0
    for symbols, blob in good_blobs():
        for bit in range(8 * min(len(blob), 200)):
            damaged = blob.clone()
            damaged[bit >> 3] ^= 1 << (bit & 7)
            kept += decodes_or_refuses(damaged, len(symbols))
            if bit < 8 * 12 and int(blob[1]) == 1:
                assert not decodes_or_refuses(damaged, len(symbols))  # nothing there but what is checked
    assert kept  # symbols for other symbols of the same length are another blob


def test_what_is_wrong_is_said() -> None:
    symbols = symbols_of(300, 16, 0.3)
    blob = huffman_encode(symbols)

    def changed(at: int, value: int) -> Tensor:
        damaged = blob.clone()
        damaged[at] = value
        return damaged

    refused(blob[:11], 300, "shorter than its header")
    refused(changed(0, 2), 300, "version: expected 1")
    refused(changed(1, 2), 300, "kind: expected 0 or 1")
    refused(changed(1, 0), 300, "streams: expected 0 for a constant")
    refused(changed(3, 4), 300, "streams: expected 4, or 1")
    refused(changed(12, 0), 300, "code lengths: not those of a complete prefix code")
    refused(changed(12, 0xFF), 300, "code lengths: a code longer than 12 bits")
    refused(changed(12, 14), 300, "code lengths: a repetition of nothing")
    refused(blob[:13], 300, "code lengths: the blob ends within them")
    refused(blob[:-1], 300, "streams: ")
    refused(torch.cat([blob, blob.new_zeros(1)]), 300, "streams: the last does not end with the blob")
    constant = huffman_encode(torch.zeros(5, dtype=torch.uint8))
    refused(torch.cat([constant, constant]), 5, "bytes after its end")


def test_a_stream_that_ends_elsewhere() -> None:
    symbols = symbols_of(MANY, 5, 0.5)
    blob = huffman_encode(symbols)
    at = 12 + 3  # five nibbles of lengths
    first = struct.unpack("<Q", bytes(blob[at : at + 8].tolist()))[0]
    for wrong in (first - 1, first + 1, 0, 2**63, 2**64 - 1):
        damaged = blob.clone()
        damaged[at : at + 8] = torch.tensor(list(struct.pack("<Q", wrong)), dtype=torch.uint8)
        refused(damaged, MANY, "streams: one does not end where the header says|streams: ends that no such")


def test_tens_of_thousands_of_mutations() -> None:
    generator = np.random.default_rng(0)
    refusals = total = 0
    for symbols, blob in good_blobs():
        source = blob.numpy()
        for i in range(4000):
            damaged = source.copy()
            kind = i % 4
            at = int(generator.integers(len(damaged) if i % 8 < 4 else min(len(damaged), 160)))
            if kind == 0:
                damaged[at] ^= 1 << generator.integers(8)
            elif kind == 1:
                damaged[at : at + int(generator.integers(1, 9))] = generator.integers(256)
            elif kind == 2:
                damaged = np.delete(damaged, slice(at, at + int(generator.integers(1, 5))))
            else:
                other = generator.integers(0, 256, int(generator.integers(1, 5)), dtype=np.uint8)
                damaged = np.insert(damaged, at, other)
            total += 1
            refusals += not decodes_or_refuses(torch.from_numpy(damaged), len(symbols))
    assert total == 36_000
    assert refusals > total / 2


@settings(max_examples=1000)
@given(st.binary(max_size=80), st.booleans())
def test_any_bytes(body: bytes, whole: bool) -> None:
    """Random bytes, with or without a header that lets them through to the lengths."""
    n = body[0] + 2 if body else 2
    head = b"" if whole else struct.pack("<BBBBQ", 1, 1, body[1] % 8 if len(body) > 1 else 1, 1, n)
    decodes_or_refuses(torch.tensor(list(head + body), dtype=torch.uint8), n)


@settings(max_examples=500)
@given(st.lists(st.integers(0, 15), max_size=40), st.integers(0, 255), st.integers(0, 400), st.integers(0, 20))
def test_any_code_lengths(nibbles: list[int], last: int, bits: int, n: int) -> None:
    padded = nibbles + [0] * (len(nibbles) % 2)
    packed = bytes(a | b << 4 for a, b in zip(padded[::2], padded[1::2], strict=True))
    blob = struct.pack("<BBBBQ", 1, 1, last, 1, n) + packed + struct.pack("<Q", bits) + bytes((bits + 7) // 8)
    decodes_or_refuses(torch.tensor(list(blob), dtype=torch.uint8), n)


# ---- bad input -------------------------------------------------------------------------------------------------------

SOME = torch.tensor([1, 2, 2, 3], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: huffman_encode(SOME.int()), TypeError, r"symbols: expected torch\.uint8"),
        (lambda: huffman_encode(SOME[None]), ValueError, r"symbols: expected shape \[n\]"),
        (lambda: huffman_encode([1, 2]), TypeError, r"symbols: expected a torch\.Tensor"),  # type: ignore[arg-type]
        (lambda: huffman_decode(SOME.long(), 4), TypeError, r"blob: expected torch\.uint8"),
        (lambda: huffman_decode(SOME, 4.0), TypeError, "n: expected an int"),  # type: ignore[arg-type]
        (lambda: huffman_decode(SOME, -1), ValueError, "n: expected at least 0"),
        (lambda: huffman_decode(SOME[:0], 0), ValueError, "blob: not a Huffman code of 0 symbols"),
        (lambda: huffman_size(SOME), TypeError, r"histogram: expected torch\.int64"),
        (lambda: huffman_size(torch.zeros(257, dtype=torch.int64)), ValueError, "histogram: expected at most 256"),
        (lambda: huffman_lengths(torch.tensor([1, -1])), ValueError, "histogram: expected counts from 0"),
        (lambda: huffman_lengths(torch.tensor([2**48 + 1])), ValueError, "histogram: expected counts from 0"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_bad_input_of_raw_operators() -> None:
    ops = torch.ops.slimtorch
    for call in (
        lambda: ops.huffman_encode(SOME.int()),
        lambda: ops.huffman_encode(SOME[None]),
        lambda: ops.huffman_decode(SOME.int(), 4),
        lambda: ops.huffman_decode(SOME, -1),
        lambda: ops.huffman_lengths(SOME),
        lambda: ops.huffman_lengths(torch.zeros(257, dtype=torch.int64)),
        lambda: ops.huffman_size(torch.tensor([-1])),
        lambda: ops.huffman_size(torch.tensor([[1]])),
    ):
        with pytest.raises(RuntimeError, match=r"expected|shorter"):
            call()


# ---- what torch asks of an operator ----------------------------------------------------------------------------------


@pytest.mark.slow_sanitized
def test_opcheck() -> None:
    ops = torch.ops.slimtorch
    symbols = symbols_of(500, 16, 0.3)
    torch.library.opcheck(ops.huffman_encode.default, (symbols,))
    torch.library.opcheck(ops.huffman_decode.default, (huffman_encode(symbols), 500))
    torch.library.opcheck(ops.huffman_lengths.default, (torch.bincount(symbols),))
    torch.library.opcheck(ops.huffman_size.default, (torch.bincount(symbols),))
