# SPDX-License-Identifier: Apache-2.0
"""Sparse and BlockSparse: packing, unpacking, invariants."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimtorch import reference
from slimtorch.formats import BlockSparse, Sparse
from tests.problems import EDGE_CONV, EDGE_LINEAR, Problem, masked_matrix

BLOCKS = [(1, 1), (1, 4), (4, 16), (8, 8), (16, 16), (3, 5), (64, 64)]
SHAPES = [(0, 5), (5, 0), (1, 1), (7, 9), (16, 16), (17, 33), (6, 3, 3, 3), (10, 1, 1, 1), (5, 2, 1, 7)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _weight(shape: tuple[int, ...], density: float = 0.4, dtype: torch.dtype = torch.float32) -> Tensor:
    return masked_matrix(shape[0], math.prod(shape[1:]), density, 3).reshape(shape).to(dtype)


# --- packing and unpacking ---


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_round_trip(shape: tuple[int, ...], dtype: torch.dtype, density: float) -> None:
    dense = _weight(shape, density, dtype)
    sparse = Sparse.pack(dense).validate()
    assert torch.equal(sparse.to_dense(), dense)
    assert sparse.values.numel() == int(torch.count_nonzero(dense))
    assert sparse.values.dtype == dtype
    assert sparse.shape == shape
    for size in BLOCKS:
        blocks = BlockSparse.pack(dense, size).validate()
        assert torch.equal(blocks.to_dense(), dense)
        assert blocks.values.dtype == dtype
        assert blocks.values.shape[1:] == size


@pytest.mark.parametrize("problem", EDGE_LINEAR[::3] + EDGE_CONV[::3], ids=str)
def test_the_shared_problems(problem: Problem) -> None:
    dense = problem.weight()
    assert torch.equal(Sparse.pack(dense).validate().to_dense(), dense)
    assert torch.equal(BlockSparse.pack(dense, (4, 8)).validate().to_dense(), dense)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40), columns=st.integers(0, 40), density=st.floats(0, 1), seed=st.integers(0, 1000),
    block=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)  # fmt: skip
def test_any_shape_density_and_block(
    rows: int, columns: int, density: float, seed: int, block: tuple[int, int]
) -> None:
    dense = masked_matrix(rows, columns, density, seed)
    sparse, blocks = Sparse.pack(dense), BlockSparse.pack(dense, block)
    assert torch.equal(sparse.validate().to_dense(), dense)
    assert torch.equal(blocks.validate().to_dense(), dense)
    stored = blocks.values.numel()
    assert sparse.values.numel() <= stored
    assert bool((blocks.values != 0).flatten(1).any(1).all())  # no block for nothing


def test_rows_and_columns_in_order() -> None:
    dense = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    sparse = Sparse.pack(dense)
    assert sparse.values.tolist() == [2.0, 1.0, 3.0]
    assert sparse.columns.tolist() == [1, 3, 0]
    assert sparse.columns.dtype == torch.int32
    assert sparse.row_offsets.tolist() == [0, 2, 2, 3]
    assert sparse.row_offsets.dtype == torch.int32
    blocks = BlockSparse.pack(dense, (2, 2))
    assert blocks.block_columns.tolist() == [0, 1, 0]
    assert blocks.block_row_offsets.tolist() == [0, 2, 3]
    assert blocks.values[2].tolist() == [[3.0, 0.0], [0.0, 0.0]]  # padded at the lower edge


def test_negative_zero_is_zero_and_infinity_stays() -> None:
    dense = torch.tensor([[-0.0, math.inf], [1e-45, -math.inf]])
    assert Sparse.pack(dense).values.tolist() == [math.inf, pytest.approx(1e-45), -math.inf]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_keeps_every_entry(shape: tuple[int, ...]) -> None:
    dense = _weight(shape, 0.3)
    sparse = Sparse.full(dense).validate()
    assert sparse.values.numel() == dense.numel()
    assert torch.equal(sparse.to_dense(), dense)
    blocks = BlockSparse.full(dense, (4, 3)).validate()
    assert torch.equal(blocks.to_dense(), dense)
    on_meta = BlockSparse.full(dense.to("meta"), (4, 3))
    assert on_meta.values.is_meta
    assert on_meta.values.shape == blocks.values.shape
    assert Sparse.full(dense.to("meta")).columns.shape == sparse.columns.shape


def test_packing_copies_and_cuts_the_graph() -> None:
    dense = torch.ones(4, 4, requires_grad=True)
    for packed in (Sparse.pack(dense), BlockSparse.pack(dense, (2, 2)), Sparse.full(dense), BlockSparse.full(dense)):
        assert not packed.values.requires_grad
        with torch.no_grad():
            packed.values.zero_()
        assert float(dense.detach().sum()) == 16


def test_strided_weights_pack() -> None:
    dense = _weight((12, 10))
    assert torch.equal(Sparse.pack(dense.t()).to_dense(), dense.t())
    assert torch.equal(BlockSparse.pack(dense[::2, ::3], (2, 2)).to_dense(), dense[::2, ::3])
    conv = _weight((6, 4, 3, 3)).to(memory_format=torch.channels_last)
    assert torch.equal(Sparse.pack(conv).to_dense(), conv)


def test_to_dense_is_differentiable() -> None:
    for held in (Sparse.pack(_weight((9, 7))), BlockSparse.pack(_weight((9, 7)), (4, 4))):
        values = held.values.double().requires_grad_()
        same = dataclasses.replace(held, values=values)
        assert torch.autograd.gradcheck(lambda v, same=same: dataclasses.replace(same, values=v).to_dense(), (values,))


def test_size_and_density() -> None:
    dense = torch.zeros(10, 20)
    dense[0, :10] = 1
    sparse, blocks = Sparse.pack(dense), BlockSparse.pack(dense, (4, 8))
    assert sparse.density == pytest.approx(10 / 200)
    assert sparse.nbytes == 10 * 4 + 10 * 4 + 11 * 4
    assert blocks.density == pytest.approx(2 * 32 / 200)
    assert blocks.nbytes == 2 * 32 * 4 + 2 * 4 + 4 * 4
    assert Sparse.pack(torch.zeros(0, 3)).density == 0


def test_the_reference_is_the_dense_layer() -> None:
    dense, x = _weight((9, 7)), torch.randn(3, 7)
    for held in (Sparse.pack(dense), BlockSparse.pack(dense, (4, 4))):
        assert torch.equal(reference.linear(x, held), torch.nn.functional.linear(x, dense))
        assert torch.equal(reference.linear(x, held, relu=True), torch.nn.functional.linear(x, dense).relu())


# --- bad input ---


@pytest.mark.parametrize("pack", [Sparse.pack, BlockSparse.pack], ids=["sparse", "block_sparse"])
def test_bad_weights_are_named(pack: Any) -> None:
    with pytest.raises(TypeError, match=r"dense: expected a torch\.Tensor, got list"):
        pack([[1.0]])
    with pytest.raises(TypeError, match=r"dense: expected a floating-point tensor, got torch\.int64"):
        pack(torch.ones(2, 2, dtype=torch.int64))
    for shape in ((), (3,), (2, 2, 2), (1, 1, 1, 1, 1)):
        with pytest.raises(ValueError, match="dense: expected a weight of shape"):
            pack(torch.ones(shape))
    with pytest.raises(ValueError, match="NaN"):
        pack(torch.tensor([[1.0, math.nan]]))


@pytest.mark.parametrize(
    ("size", "error"),
    [((0, 4), ValueError), ((4, -1), ValueError), ((2000, 4), ValueError), (4, TypeError), ((4,), TypeError),
     ((4, 4, 4), TypeError), ((4.0, 4), TypeError), ((True, 4), TypeError), ("44", TypeError)],
)  # fmt: skip
def test_bad_block_sizes_are_named(size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="block_size"):
        BlockSparse.pack(torch.ones(8, 8), size)


def _damaged(held: Sparse | BlockSparse, **changes: Any) -> Sparse | BlockSparse:
    return dataclasses.replace(held, **changes, _plans={})


@pytest.mark.parametrize("family", ["sparse", "block_sparse"])
def test_broken_invariants_are_named_before_a_kernel_sees_them(family: str) -> None:
    dense = _weight((9, 12), 0.6)
    held = Sparse.pack(dense) if family == "sparse" else BlockSparse.pack(dense, (2, 3))
    columns, offsets = ("columns", "row_offsets") if family == "sparse" else ("block_columns", "block_row_offsets")
    good_columns, good_offsets = getattr(held, columns), getattr(held, offsets)

    def with_(tensor: Tensor, index: int, value: int) -> Tensor:
        changed = tensor.clone()
        changed[index] = value
        return changed

    cases: list[tuple[dict[str, Any], str]] = [
        ({columns: with_(good_columns, -1, 12)}, columns),
        ({columns: with_(good_columns, 0, -1)}, columns),
        ({columns: with_(good_columns, 1, int(good_columns[0]))}, columns),
        ({columns: good_columns.long()}, columns),
        ({columns: good_columns[:-1]}, columns),
        ({offsets: with_(good_offsets, 0, 1)}, offsets),
        ({offsets: with_(good_offsets, 1, 10_000)}, offsets),
        ({offsets: with_(good_offsets, -1, 1)}, offsets),
        ({offsets: good_offsets[:-1]}, offsets),
        ({offsets: good_offsets.long()}, offsets),
        ({"values": held.values.int()}, "values"),
    ]
    for changes, blamed in cases:
        broken = _damaged(held, **changes)
        with pytest.raises((TypeError, ValueError), match=f"^{blamed}: expected"):
            broken.validate()
        with pytest.raises((TypeError, ValueError), match=f"^{blamed}: expected"):
            broken.plan()
    held.validate()


def test_a_row_may_start_with_any_column() -> None:
    """Columns fall where a row ends, also across empty rows."""
    dense = torch.zeros(6, 5)
    dense[0, 4] = dense[3, 0] = dense[5, 2] = 1
    assert torch.equal(Sparse.pack(dense).validate().to_dense(), dense)


# --- plans ---


def test_plans_are_derived_once_and_know_only_positions() -> None:
    for held in (Sparse.pack(_weight((9, 12))), BlockSparse.pack(_weight((9, 12)), (4, 4))):
        plan = held.plan()
        assert plan is not None
        assert held.plan() is plan
        assert held.plan(transposed=True) is held.plan(transposed=True)
        other = _damaged(held, values=held.values + 1).plan()
        assert other is not None
        assert torch.equal(plan, other)
        assert "plan" not in repr(held)


def test_no_plan_off_the_cpu() -> None:
    assert Sparse.full(torch.ones(4, 4, device="meta")).plan() is None
    assert BlockSparse.full(torch.ones(4, 4, device="meta")).plan() is None
