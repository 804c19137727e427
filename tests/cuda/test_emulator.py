# SPDX-License-Identifier: Apache-2.0
"""The emulator finds what it is there for: planted mistakes, each in a kernel that is right without it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

_cuda_host = pytest.importorskip("slimtorch._cuda_host")

MODES = ("lazy", "eager")


def run(
    bug: str, mode: str, *, rows: int = 100, columns: int = 11, depth: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    w = torch.randint(-8, 9, (rows, depth), generator=generator).to(torch.bfloat16)
    x = torch.randint(-8, 9, (columns, depth), generator=generator).to(torch.bfloat16)
    y = torch.full((columns, rows), float("nan"))
    _cuda_host.set_mode(mode)
    _cuda_host.planted(_cuda_host.bugs[bug], w.data_ptr(), x.data_ptr(), y.data_ptr(), rows, columns, depth)
    return y, x.float() @ w.float().T  # sums of small whole numbers: exact


@pytest.fixture
def unchecked() -> Iterator[None]:
    _cuda_host.set_checks(False)
    yield
    _cuda_host.set_checks(True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rows", "columns", "depth"), [(64, 8, 32), (1, 1, 32), (65, 9, 96), (200, 17, 256)])
def test_right_without_a_mistake(mode: str, rows: int, columns: int, depth: int) -> None:
    y, exact = run("none", mode, rows=rows, columns=columns, depth=depth)
    assert torch.equal(y, exact)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("bug", "found"),
    [
        ("missing_wait", "which a copy_async is on its way to"),
        ("missing_barrier", "with no barrier between|which a copy_async is on its way to"),
        ("missing_trailing_barrier", "race: writes shared byte .* read, with no barrier between"),
        ("out_of_bounds_tail", "out of bounds: read of global memory that is not the launch's, .* of a tensor of"),
        ("misaligned", "address not a multiple of 16"),
        ("divergent_barrier", "divergent barrier: warp .* waits at another one"),
        ("deadlock", "barrier of the block after warp 3.* has ended|deadlock"),
        ("divergent_warp", "divergent warp: .* waits at another instruction"),
        ("shared_overrun", "out of bounds: shared byte 11520 of 11520"),
    ],
)
def test_planted_mistakes_are_found_and_placed(mode: str, bug: str, found: str) -> None:
    with pytest.raises(RuntimeError, match=found) as error:
        run(bug, mode)
    assert "planted::matmul: block (" in str(error.value)
    assert "tests/cuda_host/planted.cu:" in str(error.value)
    y, exact = run("none", mode)  # and the next launch is as good as new
    assert torch.equal(y, exact)


@pytest.mark.parametrize("mode", MODES)
def test_swapped_fragment_shows_in_the_result(mode: str) -> None:
    y, exact = run("swapped_fragment", mode)
    assert not torch.equal(y, exact)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("mode", "bug"), [("lazy", "missing_wait"), ("eager", "missing_trailing_barrier")])
def test_modes_alone_bring_out_what_each_is_for(mode: str, bug: str) -> None:
    y, exact = run(bug, mode)
    assert not torch.equal(y, exact)


def test_launches_that_no_gpu_would_take() -> None:
    with pytest.raises(ValueError, match="mode: expected 'lazy' or 'eager', got 'fast'"):
        _cuda_host.set_mode("fast")


def test_counts() -> None:
    before = _cuda_host.statistics()
    run("none", "lazy", rows=64, columns=8, depth=32)
    after = _cuda_host.statistics()
    assert after["launches"] - before["launches"] == 1
    assert after["threads"] - before["threads"] == 128
    assert (
        after["warp_instructions"] - before["warp_instructions"] == 4 * 2 * 3
    )  # warps, depth / 16, two loads and an mma
    assert len(after["kernels_lazy"]["planted::matmul"]) == 1
