# SPDX-License-Identifier: Apache-2.0
"""Codebook, SparseCodebook and Binary: what they hold, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimtorch.formats import Binary, Codebook, SparseCodebook
from slimtorch.formats._bits import check_stream, pack_bits, unpack_bits
from tests.ops.operators import random
from tests.problems import masked_matrix

BITS = tuple(range(1, 9))
GROUPS: tuple[Any, ...] = (None, "row", 1, 7, 30)
SHAPES = ((20, 30), (1, 30), (6, 5, 3, 2), (33, 30, 1, 1))


def _levels(shape: tuple[int, ...], count: int, seed: int = 0) -> Tensor:
    """A weight of exactly `count` distinct values, none of them zero."""
    values = torch.arange(1, count + 1) * torch.where(torch.arange(count) % 2 == 0, 0.25, -0.375)
    index = torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))
    index.view(-1)[:count] = torch.arange(min(count, index.numel()))
    return values[index]


# ---- bit streams -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(bits=st.integers(1, 8), numbers=st.lists(st.integers(0, 255), max_size=70))
def test_streams_hold_numbers_lowest_bit_first(bits: int, numbers: list[int]) -> None:
    numbers = [number & ((1 << bits) - 1) for number in numbers]
    stream = pack_bits(torch.tensor(numbers, dtype=torch.uint8), bits)
    whole = sum(number << (bits * i) for i, number in enumerate(numbers))
    assert bytes(stream.tolist()) == whole.to_bytes((len(numbers) * bits + 7) // 8, "little")
    assert unpack_bits(stream, bits, len(numbers)).tolist() == numbers
    check_stream("codes", stream, len(numbers), bits)


def test_a_stream_of_another_length_or_with_bits_to_spare_is_refused() -> None:
    stream = pack_bits(torch.tensor([5, 1, 7], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match=r"codes: expected shape \[3\]"):
        check_stream("codes", stream, 6, 3)
    with pytest.raises(TypeError, match=r"codes: expected torch\.uint8"):
        check_stream("codes", stream.int(), 3, 3)
    stream[-1] |= 128
    with pytest.raises(ValueError, match="codes: expected zeros in the last 7 bits"):
        check_stream("codes", stream, 3, 3)


# ---- codebook --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_values_are_held_without_loss(bits: int, shape: tuple[int, ...]) -> None:
    dense = _levels(shape, min(1 << bits, torch.Size(shape).numel()))
    for group_size in (None, "row", 7):
        held = Codebook.pack(dense, bits, group_size, zero=False).validate()
        assert torch.equal(held.to_dense(), dense)
    pruned = dense * (random(*shape) > 0.5)
    sparse = SparseCodebook.pack(pruned, bits).validate()
    assert torch.equal(sparse.to_dense(), pruned)
    if bits > 1:
        fewer = _levels(shape, (1 << bits) - 1) * (random(*shape) > 0.5)
        held = Codebook.pack(fewer, bits).validate()
        assert held.zero
        assert torch.equal(held.to_dense(), fewer)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_each_weight_goes_to_the_nearest_entry_of_its_table(bits: int, group_size: Any) -> None:
    dense = random(20, 30)
    held = Codebook.pack(dense, bits, group_size).validate()
    tables = held.tables()
    assert tables.shape == (20, 30)
    expected = {None: 1, "row": 20}.get(group_size) or -(-30 // group_size)
    assert held.codebook.shape == (expected, 1 << bits)
    distance = (dense[..., None] - held.codebook[tables]).abs()
    assert torch.equal((dense - held.to_dense()).abs(), distance.min(-1).values)
    # centroids: the mean of their members, where they have any and the table is not exact
    for table in range(expected):
        own, used = dense[tables == table], held.indices()[tables == table]
        for entry in used.unique().tolist():
            torch.testing.assert_close(held.codebook[table, entry], own[used == entry].mean())


def test_more_bits_err_less() -> None:
    dense = random(40, 50)
    errors = [float((Codebook.pack(dense, bits).to_dense() - dense).square().sum()) for bits in BITS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 1000
    rows = dense * torch.logspace(-2, 2, 40)[:, None]
    by_row = Codebook.pack(rows, 3, "row").to_dense()
    whole = Codebook.pack(rows, 3).to_dense()
    assert float(((by_row - rows) / rows).abs().median()) < float(((whole - rows) / rows).abs().median()) / 3


def test_zeros_keep_their_entry_where_there_are_many() -> None:
    pruned = masked_matrix(30, 40, 0.3, 0)
    held = Codebook.pack(pruned, 3)
    assert held.zero
    assert torch.equal(held.to_dense() == 0, pruned == 0)
    assert not Codebook.pack(masked_matrix(30, 40, 0.95, 0), 3).zero
    weight = replace(held, codebook=held.codebook.clone().requires_grad_())
    weight.to_dense().sum().backward()
    grad = weight.codebook.grad
    assert grad is not None
    assert torch.equal(grad[0, 1:], torch.bincount(held.indices().flatten(), minlength=8)[1:].float())
    assert float(grad[0, 0]) == 0
    assert Codebook.pack(pruned, 1, zero=True).codebook.count_nonzero() == 1


def test_from_indices_and_bytes() -> None:
    tables, index = random(3, 8), torch.randint(8, (5, 21), dtype=torch.uint8)
    held = Codebook.from_indices(tables, index, (5, 21), 7)
    assert torch.equal(held.indices(), index)
    assert torch.equal(held.to_dense(), tables[torch.arange(21) // 7, index.long()])
    assert held.nbytes == -(-5 * 21 * 3 // 8) + 3 * 8 * 4
    assert held.density == 1


# ---- sparse codebook -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, 0.001, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("group_size", [None, "row", 100])
def test_gaps_lead_to_every_nonzero_weight(density: float, group_size: Any) -> None:
    dense = masked_matrix(23, 1300, density, 3, empty_rows=2)
    held = SparseCodebook.pack(dense, 4, group_size).validate()
    rows, columns = held.positions()
    assert torch.equal(torch.stack([rows, columns], 1), dense.nonzero())
    assert held.nnz == int(torch.count_nonzero(dense))
    assert held.density == held.nnz / dense.numel()
    # by hand, as the class describes it
    position, offsets = [], held.row_offsets.tolist()
    for row in range(23):
        column = -1
        for gap in held.gaps[offsets[row] : offsets[row + 1]].tolist():
            column += 255 if gap == 255 else gap + 1
            if gap < 255:
                position.append([row, column])
    assert position == dense.nonzero().tolist()
    assert torch.equal(held.to_dense() != 0, dense != 0)


@pytest.mark.parametrize("column", [0, 1, 253, 254, 255, 256, 509, 510, 511, 765, 999])
def test_long_gaps_are_bridged_by_skips(column: int) -> None:
    dense = torch.zeros(2, 1000)
    dense[0, column] = dense[1, 999] = 0.5
    held = SparseCodebook.pack(dense).validate()
    assert torch.equal(held.to_dense(), dense)
    assert int((held.gaps[: int(held.row_offsets[1])] == 255).sum()) == column // 255
    assert held.nnz == 2


def test_a_nonzero_weight_takes_a_byte_and_a_half() -> None:
    held = SparseCodebook.pack(masked_matrix(1000, 1000, 0.1, 0), 4)
    assert held.nbytes / held.nnz < 1.56  # 1.51 at 4096 x 4096


def test_full_keeps_zeros_too() -> None:
    dense = _levels((5, 40), 4) * (random(5, 40) > 0)
    held = SparseCodebook.full(dense, 3).validate()
    assert held.nnz == 200
    assert torch.equal(held.to_dense(), dense)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gaps", lambda t: t.int(), "1-D uint8"),
        ("gaps", lambda t: t[None], "1-D uint8"),
        ("row_offsets", lambda t: t[:-1], "shape"),
        ("row_offsets", lambda t: t.long(), "int32"),
        ("row_offsets", lambda t: t.flip(0), "non-decreasing"),
        ("codes", lambda t: t[:-1], "shape"),
        ("codebook", lambda t: t[:, :-1], "shape"),
        ("codebook", lambda t: t.int(), "floating-point"),
        ("bits", lambda b: 9, "expected 1 … 8"),
        ("group_size", lambda g: 1301, "group_size"),
    ],
)
def test_a_broken_sparse_codebook_is_named(name: str, change: Any, message: str) -> None:
    held = SparseCodebook.pack(masked_matrix(23, 1300, 0.01, 3))
    with pytest.raises((TypeError, ValueError), match=f"{name}.*{message}|{message}"):
        replace(held, **{name: change(getattr(held, name))}).validate()


def test_gaps_that_leave_the_row_are_refused() -> None:
    dense = torch.zeros(2, 300)
    dense[0, 299] = dense[1, 0] = 1
    held = SparseCodebook.pack(dense)
    assert held.gaps.tolist() == [255, 44, 0]
    with pytest.raises(ValueError, match="columns below 300, got 300"):
        replace(held, gaps=torch.tensor([255, 45, 0], dtype=torch.uint8)).validate()
    with pytest.raises(ValueError, match="end with a skip"):
        replace(held, gaps=torch.tensor([44, 255, 0], dtype=torch.uint8)).validate()


# ---- binary ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_signs_and_scales(shape: tuple[int, ...]) -> None:
    dense = random(*shape)
    held = Binary.pack(dense).validate()
    rows = dense.reshape(shape[0], -1)
    torch.testing.assert_close(held.scale, rows.abs().mean(1))
    assert torch.equal(held.to_dense().sign(), dense.sign())
    assert torch.equal(Binary.pack(held.to_dense()).to_dense(), held.to_dense())  # exact where it can be
    plain = Binary.pack(dense, scale=False)
    assert torch.equal(plain.to_dense(), torch.where(dense >= 0, 1.0, -1.0))
    assert held.nbytes == -(-dense.numel() // 8) + 4 * shape[0]


def test_zero_counts_as_plus_one() -> None:
    held = Binary.pack(torch.tensor([[0.0, -0.0, -1.0]]), scale=False)
    assert held.bits().tolist() == [[1, 1, 0]]


def test_a_broken_binary_weight_is_named() -> None:
    held = Binary.pack(random(5, 9))
    for change, message in (
        ({"scale": held.scale[1:]}, "scale: expected shape"),
        ({"scale": held.scale.int()}, "scale: expected a floating-point"),
        ({"signs": held.signs[1:]}, "signs: expected shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            replace(held, **change).validate()  # type: ignore[arg-type]


# ---- all three -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Codebook, SparseCodebook, Binary])
def test_what_cannot_be_packed_is_named(kind: Any) -> None:
    with pytest.raises(TypeError, match=r"dense: expected a torch\.Tensor"):
        kind.pack([1.0])
    with pytest.raises(ValueError, match="dimensions"):
        kind.pack(random(3))
    with pytest.raises(ValueError, match="NaN"):
        kind.pack(torch.tensor([[1.0, float("nan")]]))
    if kind is Binary:
        return
    with pytest.raises(ValueError, match="infinity"):
        kind.pack(torch.tensor([[1.0, float("inf")]]))
    for bits in (0, 9, -1):
        with pytest.raises(ValueError, match="bits: expected 1 … 8"):
            kind.pack(random(3, 4), bits)
    for bad in (2.0, True, "4"):
        with pytest.raises(TypeError, match="bits: expected an int"):
            kind.pack(random(3, 4), bad)
    for group_size in (0, -3, 5):
        with pytest.raises(ValueError, match="group_size: expected 1 … 4"):
            kind.pack(random(3, 4), 2, group_size)
    with pytest.raises(TypeError, match="group_size"):
        kind.pack(random(3, 4), 2, "column")


@pytest.mark.parametrize("kind", [Codebook, SparseCodebook, Binary])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_copies_and_empty_weights(kind: Any, dtype: torch.dtype) -> None:
    held = kind.pack(random(7, 9).to(dtype))
    assert held.to_dense().dtype == dtype
    for same in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert torch.equal(same.to_dense(), held.to_dense())
    for shape in ((0, 5), (5, 0), (0, 2, 3, 3)):
        empty = kind.pack(torch.zeros(shape, dtype=dtype)).validate()
        assert empty.to_dense().shape == shape
        assert empty.density in (0, 1)
