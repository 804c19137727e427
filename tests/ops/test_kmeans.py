# SPDX-License-Identifier: Apache-2.0
"""One-dimensional k-means: Lloyd's algorithm written out in float64, assignments by every distance, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimtorch.ops import assign_1d, initial_centroids, kmeans_1d

DTYPES = [torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
HOW = ["linear", "density", "random"]
# Around 64 (a block of sums), 4096 (from where on the sort is by radix; a block of blocks), 16 (a step of assign_1d).
SIZES = [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 1000, 4095, 4096, 4097, 20_000]
KS = [1, 2, 3, 16, 25, 26, 255, 256]  # assign_1d changes its way between 25 and 26


def lloyd(values: Tensor, centroids: Tensor, importance: Tensor | None = None, iterations: int = 300) -> Tensor:
    """The specification: ties to the lower centroid, empty clusters keep theirs, until nothing changes."""
    x, c = values.double(), centroids.double().sort().values
    w = torch.ones_like(x) if importance is None else importance.double()
    before = None
    for _ in range(iterations):
        codes = nearest(x, c)
        if before is not None and torch.equal(codes, before):
            break
        before = codes
        mass = torch.zeros_like(c).index_add_(0, codes, w)
        mean = torch.zeros_like(c).index_add_(0, codes, w * x) / mass
        c = torch.where(mass > 0, mean, c).sort().values  # one of equal centroids may overtake the others
    return c


def nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """By every distance; argmin takes the first, which is the lower, of equal ones."""
    distance = (values.double()[:, None] - centroids.double()).abs()
    return torch.from_numpy(distance.numpy().argmin(1))


def random(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: Tensor, expected: Tensor, values: Tensor) -> bool:
    """Equal but for rounding to the dtype and that of a float64 sum."""
    scale = float(values.double().abs().max()) if values.numel() else 0.0
    eps = torch.finfo(found.dtype).eps + values.numel() * torch.finfo(torch.float64).eps
    return bool(((found.double() - expected).abs() <= eps * max(scale, float(expected.abs().max()))).all())


# ---- k-means ---------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("n", SIZES)
def test_as_written_out(n: int, how: Any, dtype: torch.dtype) -> None:
    values = random(n).to(dtype)
    weights = random(n, 1).abs().to(dtype)
    for k in (1, 2, 3, 16, 40):
        start = random(k, 2).to(dtype)
        if n:
            start = initial_centroids(values, k, how, generator=torch.Generator().manual_seed(3))
        for importance in (None, weights):
            found = kmeans_1d(values, start, importance, iterations=20)
            assert found.dtype == dtype
            assert close(found, lloyd(values, start, importance, 20), values)


@each_dtype
@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_iterations(iterations: int, dtype: torch.dtype) -> None:
    values = random(5000).to(dtype)
    start = torch.linspace(-9, 9, 16, dtype=dtype)  # the outer ones are empty
    found = kmeans_1d(values, start, iterations=iterations)
    assert close(found, lloyd(values, start, iterations=iterations), values)
    assert torch.equal(found[:3], start[:3])
    assert iterations == 0 or not torch.equal(found, start)


def test_a_fixed_point_is_reached() -> None:
    values = random(10_000).float()
    start = initial_centroids(values, 16, "linear")
    found = kmeans_1d(values, start, iterations=10_000)
    assert torch.equal(kmeans_1d(values, found, iterations=10_000), found)
    codes = assign_1d(values, found).long()
    means = torch.zeros(16, dtype=torch.float64).index_add_(0, codes, values.double()) / codes.bincount(minlength=16)
    assert close(found, means, values)


def test_tolerance() -> None:
    values = random(10_000)
    start = initial_centroids(values, 16, "linear")
    exact, coarse = (kmeans_1d(values, start, iterations=10_000, tolerance=t) for t in (0.0, 1e-2))
    c, steps = start, 0
    moved = math.inf
    while moved > 1e-2:
        c, moved = (after := lloyd(values, c, iterations=1)), float((after - c).abs().max())
        steps += 1
    assert steps < 100
    assert close(coarse, c, values)
    assert not close(exact, c, values)


def test_order_of_centroids_and_values_does_not_matter() -> None:
    values, start = random(3000).float(), random(16, 1).float()
    shuffled = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    found = kmeans_1d(values, start)
    assert torch.equal(found, found.sort().values)
    assert torch.equal(kmeans_1d(values[shuffled], start.flip(0)), found)


@each_dtype
def test_few_distinct_values_are_found_exactly(dtype: torch.dtype) -> None:
    distinct = torch.tensor([-0.3, -0.0, 0.1, 0.7, 1e-30, 1e30], dtype=dtype)
    values = distinct.repeat(3000)
    assert torch.equal(kmeans_1d(values, distinct), distinct.sort().values)
    found = kmeans_1d(values, torch.cat([distinct, distinct, torch.tensor([5e29], dtype=dtype)]))
    assert torch.equal(found[assign_1d(values, found).long()], values)


def test_an_outlier_does_not_drown_the_rest() -> None:
    values = torch.cat([torch.tensor([-1e30]), random(100_000).float() * 0.01])
    found = kmeans_1d(values, torch.tensor([-1e30, -0.01, 0.01]))
    rest = kmeans_1d(values[1:], torch.tensor([-0.01, 0.01]))
    assert torch.equal(found[1:], rest)


def test_importance() -> None:
    values = torch.tensor([0.0, 1.0, 10.0, 11.0])
    weights = torch.tensor([3.0, 1.0, 0.0, 0.0])
    assert kmeans_1d(values, torch.tensor([0.0, 10.0]), weights).tolist() == [0.25, 10.0]  # no weight: where it was
    repeated = torch.repeat_interleave(values, torch.tensor([3, 1, 2, 5]))
    counted = kmeans_1d(values, torch.tensor([0.0, 10.0]), torch.tensor([3.0, 1.0, 2.0, 5.0]))
    assert torch.equal(counted, kmeans_1d(repeated, torch.tensor([0.0, 10.0])))


def test_other_dtypes_and_shapes() -> None:
    values = random(600).view(20, 30)
    for dtype in (torch.bfloat16, torch.float16):
        x = values.to(dtype)
        start = initial_centroids(x, 8, "density")
        found = kmeans_1d(x.t(), start)
        assert found.dtype == dtype == start.dtype
        assert torch.equal(found, kmeans_1d(x.float().flatten(), start.float()).to(dtype))
    parameter = torch.nn.Parameter(values)
    assert not kmeans_1d(parameter, initial_centroids(parameter, 4)).requires_grad


whole = st.integers(-6, 6)


@settings(max_examples=300)
@given(
    st.lists(whole, max_size=30), st.lists(whole, min_size=1, max_size=8), st.sampled_from(DTYPES), st.booleans()
)  # fmt: skip
def test_ties_and_duplicates(values: list[int], start: list[int], dtype: torch.dtype, weighted: bool) -> None:
    """Small whole numbers: sums are exact and midpoints are often values."""
    x, c = torch.tensor(values, dtype=dtype), torch.tensor(start, dtype=dtype)
    weights = (x * 3).abs() % 4 if weighted else None
    for iterations in (1, 2):
        assert close(kmeans_1d(x, c, weights, iterations=iterations), lloyd(x, c, weights, iterations), x)
    ordered = c.sort().values
    assert torch.equal(assign_1d(x, ordered).long(), nearest(x, ordered))


# ---- assignment ------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("k", KS)
def test_assignment(k: int, dtype: torch.dtype) -> None:
    centroids = random(k, 1).to(dtype).sort().values
    for n in SIZES:
        values = random(n).to(dtype)
        codes = assign_1d(values, centroids)
        assert codes.dtype == torch.uint8
        assert torch.equal(codes.long(), nearest(values, centroids))
    middles = (centroids[1:] + centroids[:-1]) / 2
    above, below = (middles.nextafter(torch.tensor(end, dtype=dtype)) for end in (9.0, -9.0))
    around = torch.cat([middles, above, below, centroids])
    if dtype == torch.float32:  # in float64 the distances themselves are rounded
        assert torch.equal(assign_1d(around, centroids).long(), nearest(around, centroids))


def test_the_rounding_of_a_midpoint_does_not_matter() -> None:
    tiny = 2.0**-100
    values = torch.tensor([1.0])
    assert assign_1d(values, torch.tensor([0.0, 2.0])).tolist() == [0]
    assert assign_1d(values, torch.tensor([tiny, 2.0])).tolist() == [0]
    assert assign_1d(values, torch.tensor([-tiny, 2.0])).tolist() == [1]
    exact = torch.tensor([1.0], dtype=torch.float64)
    assert assign_1d(exact, torch.tensor([-tiny, 2.0], dtype=torch.float64)).tolist() == [1]


@each_dtype
def test_assignment_of_extremes(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    values = torch.tensor([-math.inf, -most, -0.0, 0.0, most, math.inf], dtype=dtype)
    for k in (3, 30, 256):
        centroids = torch.linspace(-1, 1, k, dtype=dtype)
        assert assign_1d(values, centroids).tolist() == [0, 0, (k - 1) // 2, (k - 1) // 2, k - 1, k - 1]
    assert assign_1d(values, torch.tensor([-most, most], dtype=dtype)).tolist() == [0, 0, 0, 0, 1, 1]
    assert assign_1d(values, torch.zeros(256, dtype=dtype)).tolist() == [0] * 6
    with_infinity = torch.tensor([0.0, math.inf], dtype=dtype)
    assert assign_1d(values, with_infinity).tolist()[:5] == [0] * 5


# ---- initial centroids -----------------------------------------------------------------------------------------------


def test_linear() -> None:
    values = torch.tensor([3.0, -1.0, 0.0])
    assert initial_centroids(values, 5, "linear").tolist() == [-1.0, 0.0, 1.0, 2.0, 3.0]
    assert initial_centroids(values, 1, "linear").tolist() == [1.0]
    wide = torch.tensor([-3e38, 3e38])
    assert torch.equal(initial_centroids(wide, 2), wide)


def test_density() -> None:
    values = random(4000)
    ordered = values.sort().values
    assert torch.equal(initial_centroids(values, 4, "density"), ordered[[499, 1499, 2499, 3499]])
    assert torch.equal(initial_centroids(values, 1, "density"), ordered[[1999]])
    weights = torch.where(values < 0, 3.0, 1.0).double()
    found = initial_centroids(values, 10, "density", importance=weights)
    mass = weights[values.argsort()].cumsum(0)
    for i, c in enumerate(found):
        goal = mass[-1] * (i + 0.5) / 10
        at = int((ordered == c).nonzero()[0])
        assert mass[at] >= goal > mass[at] - 3
    assert initial_centroids(torch.tensor([7.0]), 3, "density").tolist() == [7.0] * 3


def test_random() -> None:
    values = random(500)
    one, two = (initial_centroids(values, 100, "random", generator=torch.Generator().manual_seed(5)) for _ in range(2))
    other = initial_centroids(values, 100, "random", generator=torch.Generator().manual_seed(6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert len(one.unique()) == 100
    assert bool(torch.isin(one, values).all())
    weights = (values > 0).double()
    assert bool((initial_centroids(values, 100, "random", importance=weights) > 0).all())
    assert initial_centroids(values[:3], 8, "random").unique().tolist() == sorted(values[:3].tolist())
    only = torch.zeros(500)
    only[7] = 1e-30
    assert initial_centroids(values, 3, "random", importance=only).tolist() == [float(values[7])] * 3


# ---- bad input -------------------------------------------------------------------------------------------------------

GOOD = torch.tensor([1.0, 2.0, 3.0])
NAN, INF = torch.tensor([1.0, math.nan, 2.0]), torch.tensor([1.0, -math.inf, 2.0])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: kmeans_1d(NAN, GOOD), ValueError, "values: expected finite"),
        (lambda: kmeans_1d(INF, GOOD), ValueError, "values: expected finite"),
        (lambda: kmeans_1d(INF.double(), GOOD), ValueError, "values: expected finite"),
        (lambda: kmeans_1d(GOOD, NAN), ValueError, "centroids: expected finite"),
        (lambda: kmeans_1d(GOOD, INF), ValueError, "centroids: expected finite"),
        (lambda: kmeans_1d(GOOD, GOOD, NAN), ValueError, "importance: expected finite"),
        (lambda: kmeans_1d(GOOD, GOOD, INF), ValueError, "importance: expected finite"),
        (lambda: kmeans_1d(GOOD, GOOD, -GOOD), ValueError, "importance: expected no negative"),
        (lambda: kmeans_1d(GOOD, GOOD, GOOD[:2]), ValueError, "importance: expected 3 entries"),
        (lambda: kmeans_1d(GOOD, torch.zeros(0)), ValueError, "centroids: expected 1 to 256"),
        (lambda: kmeans_1d(GOOD, torch.zeros(257)), ValueError, "centroids: expected 1 to 256"),
        (lambda: kmeans_1d(GOOD, torch.zeros(2, 2)), ValueError, "centroids: expected 1 to 256"),
        (lambda: kmeans_1d(GOOD, GOOD, iterations=-1), ValueError, "iterations: expected at least 0"),
        (lambda: kmeans_1d(GOOD, GOOD, tolerance=-1.0), ValueError, "tolerance: expected at least 0"),
        (lambda: kmeans_1d(GOOD, GOOD, tolerance=math.nan), ValueError, "tolerance: expected at least 0"),
        (lambda: kmeans_1d(GOOD, GOOD, iterations=1.5), TypeError, "iterations: expected an int"),  # type: ignore[arg-type]
        (lambda: kmeans_1d([1.0], GOOD), TypeError, "values: expected a torch.Tensor"),  # type: ignore[arg-type]
        (lambda: kmeans_1d(GOOD.int(), GOOD), TypeError, "values: expected a floating-point"),
        (lambda: kmeans_1d(GOOD, GOOD.int()), TypeError, "centroids: expected a floating-point"),
        (lambda: assign_1d(NAN, GOOD), ValueError, "values: expected numbers, got NaN"),
        (lambda: assign_1d(NAN.repeat(20), GOOD), ValueError, "values: expected numbers, got NaN"),
        (lambda: assign_1d(NAN, torch.zeros(100)), ValueError, "values: expected numbers, got NaN"),
        (lambda: assign_1d(GOOD, GOOD.flip(0)), ValueError, "centroids: expected ascending"),
        (lambda: assign_1d(GOOD, NAN), ValueError, "centroids: expected ascending"),
        (lambda: assign_1d(GOOD, NAN[1:2]), ValueError, "centroids: expected ascending"),
        (lambda: assign_1d(GOOD, torch.zeros(0)), ValueError, "centroids: expected 1 to 256"),
        (lambda: initial_centroids(GOOD, 0), ValueError, "k: expected 1 to 256"),
        (lambda: initial_centroids(GOOD, 257), ValueError, "k: expected 1 to 256"),
        (lambda: initial_centroids(GOOD, 2.0), TypeError, "k: expected an int"),  # type: ignore[arg-type]
        (lambda: initial_centroids(GOOD, 2, "kmeans++"), ValueError, "how: expected"),  # type: ignore[arg-type]
        (lambda: initial_centroids(GOOD[:0], 2), ValueError, "values: expected at least one"),
        (lambda: initial_centroids(NAN, 2, "linear"), ValueError, "values: expected finite"),
        (lambda: initial_centroids(NAN, 2, "density"), ValueError, "values: expected finite"),
        (lambda: initial_centroids(GOOD, 2, "density", importance=GOOD * 0), ValueError, "importance: expected a pos"),
        (lambda: initial_centroids(GOOD, 2, "random", importance=GOOD * 0), ValueError, "importance: expected a pos"),
        (lambda: initial_centroids(GOOD, 2, "random", importance=-GOOD), ValueError, "importance: expected no neg"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_bad_input_of_raw_operators() -> None:
    ops = torch.ops.slimtorch
    for call in (
        lambda: ops.kmeans_1d(GOOD, GOOD.double(), None, 1, 0.0),
        lambda: ops.kmeans_1d(GOOD, GOOD, GOOD[:2], 1, 0.0),
        lambda: ops.kmeans_1d(GOOD, GOOD, None, -1, 0.0),
        lambda: ops.kmeans_1d(GOOD, GOOD, None, 1, math.nan),
        lambda: ops.kmeans_1d(GOOD[None], GOOD, None, 1, 0.0),
        lambda: ops.kmeans_1d(GOOD.half(), GOOD.half(), None, 1, 0.0),
        lambda: ops.kmeans_1d(GOOD, torch.zeros(257), None, 1, 0.0),
        lambda: ops.quantiles_1d(GOOD, None, 0),
        lambda: ops.quantiles_1d(GOOD, None, 257),
        lambda: ops.quantiles_1d(GOOD[:0], None, 2),
        lambda: ops.quantiles_1d(GOOD, GOOD[:1], 2),
        lambda: ops.assign_1d(GOOD, torch.zeros(0)),
        lambda: ops.assign_1d(GOOD, torch.zeros(257)),
        lambda: ops.assign_1d(GOOD, GOOD.double()),
        lambda: ops.assign_1d(GOOD.view(3, 1), GOOD),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            call()


# ---- what torch asks of an operator ----------------------------------------------------------------------------------


@pytest.mark.slow_sanitized
@each_dtype
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.slimtorch
    values, centroids = random(100).to(dtype), torch.linspace(-1, 1, 5, dtype=dtype)
    torch.library.opcheck(ops.kmeans_1d.default, (values, centroids, values.abs(), 3, 0.0))
    torch.library.opcheck(ops.kmeans_1d.default, (values[::2], centroids, None, 3, 0.0))
    torch.library.opcheck(ops.quantiles_1d.default, (values, values.abs(), 7))
    torch.library.opcheck(ops.assign_1d.default, (values[::2], centroids))
