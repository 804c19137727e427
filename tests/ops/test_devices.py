# SPDX-License-Identifier: Apache-2.0
"""What is said of devices without kernels, with too old a GPU or with too little memory; needs no GPU."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import slimtorch as slim
from slimtorch.ops import _common as common
from tests.nn.cases import Case, each_case


class OnGpu:
    """As much of a tensor as the wrappers ask for before they call an operator."""

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        self.device, self.dtype = torch.device("cuda", 0), dtype


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Warnings are said once in a process."""
    monkeypatch.setattr(common, "_warned", set())
    common._too_old.cache_clear()
    yield
    common._too_old.cache_clear()


def capability(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (major, minor))


def test_a_build_without_cuda_kernels_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    capability(monkeypatch, 9, 0)
    with pytest.warns(UserWarning, match=r"sparse_linear has no kernel for torch.float16 on cuda \(this build of slim"):
        assert not common.has_kernel("sparse_linear", OnGpu(), {"cpu": (torch.float32,)})  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not common.has_kernel("sparse_linear", OnGpu(), {"cpu": (torch.float32,)})  # type: ignore[arg-type]


@pytest.mark.parametrize(("version", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_an_old_gpu_runs_the_reference(
    version: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    capability(monkeypatch, *version)
    kernels = {"cuda": (torch.float16,)}
    assert common.has_kernel("binary_linear", OnGpu(), kernels) is runs  # type: ignore[arg-type]
    said = [str(w.message) for w in recwarn]
    assert len(said) == (not runs)
    if not runs:
        assert "its compute capability is 7.5, the kernels need 8.0 or later" in said[0]


def test_a_dtype_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    capability(monkeypatch, 8, 0)
    with pytest.warns(UserWarning, match=r"no kernel for torch.float64 on cuda: running dense torch"):
        assert not common.has_kernel("codebook_linear", OnGpu(torch.float64), {"cuda": (torch.float16,)})  # type: ignore[arg-type]


def raising(error: Exception) -> Any:
    def sparse_linear(x: torch.Tensor) -> torch.Tensor:
        """Ours."""
        raise error

    return common.says_out_of_memory(sparse_linear)


# What the stable interface makes of any error of an allocation.
ALLOCATION = 'torch_call_dispatcher( "aten::new_empty", "", stack.data(), 0) API call failed at ops.h, line 939'


def test_no_memory_on_a_gpu_is_an_out_of_memory_error() -> None:
    failed = RuntimeError(ALLOCATION)
    with pytest.raises(torch.OutOfMemoryError, match="sparse_linear: out of memory on cuda:0") as caught:
        raising(failed)(OnGpu())
    assert caught.value.__cause__ is failed


@pytest.mark.parametrize("error", [RuntimeError("CUDA: too large"), torch.OutOfMemoryError("torch's"), ValueError("x")])
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        raising(error)(OnGpu())
    assert caught.value is error
    assert raising(error).__doc__ == "Ours."


def test_on_the_cpu_an_allocation_that_fails_stays_a_runtime_error() -> None:
    with pytest.raises(RuntimeError) as caught:
        raising(RuntimeError(ALLOCATION))(SimpleNamespace(device=torch.device("cpu")))
    assert not isinstance(caught.value, torch.OutOfMemoryError)


@each_case
def test_mixed_devices_are_refused(case: Case) -> None:
    layer = case.packed()
    operator = getattr(slim.ops, case.name)
    options = {} if "linear" in case.name else {"stride": 2, "padding": 1, "groups": 2}
    with pytest.raises(ValueError, match=r"weight: expected device meta \(that of x\), got cpu"):
        operator(case.input(2).to("meta"), layer.format, None, **options)
    with pytest.raises(ValueError, match=r"bias: expected device cpu \(that of x\), got meta"):
        operator(case.input(2), layer.format, layer.bias.detach().to("meta"), **options)
