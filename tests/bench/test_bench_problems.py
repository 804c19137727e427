# SPDX-License-Identifier: Apache-2.0
"""The shared problems are what they say: deterministic, exactly as dense as named, with torch's output sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.problems import (
    BENCH_CONV,
    BENCH_LINEAR,
    BLOCK_SIZES,
    EDGE_CONV,
    EDGE_LINEAR,
    SPARSITIES,
    ConvProblem,
    LinearProblem,
    at_densities,
    masked_matrix,
    with_block_sizes,
)


@pytest.mark.parametrize("problems", [EDGE_LINEAR, EDGE_CONV, BENCH_LINEAR, BENCH_CONV])
def test_names_are_unique(problems: tuple[LinearProblem | ConvProblem, ...]) -> None:
    assert len({problem.name for problem in problems}) == len(problems)


@pytest.mark.parametrize("problem", EDGE_LINEAR, ids=str)
def test_linear_shapes_and_density(problem: LinearProblem) -> None:
    weight = problem.weight()
    assert F.linear(problem.input(), weight, problem.bias()).shape == (problem.m, problem.n)
    if not problem.empty_rows:
        assert int((weight != 0).sum()) == round(problem.density * problem.n * problem.k)
    else:
        assert int((weight == 0).all(1).sum()) >= problem.empty_rows


@pytest.mark.parametrize("problem", EDGE_CONV, ids=str)
def test_conv_shapes_and_density(problem: ConvProblem) -> None:
    weight, x = problem.weight(), problem.input()
    output = F.conv2d(x, weight, problem.bias(), problem.stride, problem.padding, problem.dilation, problem.groups)
    assert output.shape == (problem.batch, problem.c_out, *problem.output_size)
    assert weight.flatten(1).shape[1] == problem.columns
    if not problem.empty_rows:
        assert int((weight != 0).sum()) == round(problem.density * weight.numel())


def test_same_problem_same_tensors() -> None:
    first, second = (LinearProblem("p", 3, 20, 30, 0.3, seed=5) for _ in range(2))
    for name in ("weight", "input", "bias"):
        assert torch.equal(getattr(first, name)(), getattr(second, name)())
    other = replace(first, seed=6)
    for name in ("weight", "input", "bias"):
        assert not torch.equal(getattr(first, name)(), getattr(other, name)())


def test_dtype_keeps_the_pattern() -> None:
    problem = LinearProblem("p", 3, 20, 30, 0.3)
    half = replace(problem, dtype=torch.bfloat16)
    assert half.weight().dtype == half.input().dtype == half.bias().dtype == torch.bfloat16
    assert torch.equal(half.weight() != 0, problem.weight() != 0)


@pytest.mark.parametrize("block_size", [(4, 16), (8, 8), (1, 16), (3, 5)])
def test_masks_are_made_of_whole_blocks(block_size: tuple[int, int]) -> None:
    rows, columns = 50, 70  # no block size divides both: edge blocks are cut off
    matrix = masked_matrix(rows, columns, 0.3, 1, block_size=block_size)
    height, width = block_size
    grid = (-(-rows // height), -(-columns // width))
    full = 0
    for i in range(grid[0]):
        for j in range(grid[1]):
            block = matrix[i * height : (i + 1) * height, j * width : (j + 1) * width] != 0
            assert bool(block.all()) or not bool(block.any())
            full += bool(block.all())
    assert full == round(0.3 * grid[0] * grid[1])


def test_grids() -> None:
    grid = with_block_sizes(at_densities(BENCH_LINEAR, SPARSITIES), BLOCK_SIZES)
    assert len(grid) == len(set(grid)) == len(BENCH_LINEAR) * len(SPARSITIES) * len(BLOCK_SIZES)


def test_flops() -> None:
    assert LinearProblem("p", 3, 5, 7).dense_flops == 2 * 3 * 5 * 7
    conv = ConvProblem("c", 2, 4, 6, 8, 8, padding=(1, 1), groups=2)
    assert conv.dense_flops == 2 * (2 * 8 * 8) * 6 * (2 * 9)


def test_bad_problems() -> None:
    with pytest.raises(ValueError, match="density"):
        masked_matrix(3, 3, 1.5, 0)
    with pytest.raises(ValueError, match="groups"):
        ConvProblem("c", 1, 4, 6, 8, 8, groups=4)
