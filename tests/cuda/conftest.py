# SPDX-License-Identifier: Apache-2.0
"""The devices that CUDA kernels are tested on: the emulator in its two modes, and a GPU if there is one.

A test takes ``device`` and calls ``device.ops.sparse_linear(...)`` on tensors from ``device.move``: on the emulator
(tests/cuda_host) these stay on the CPU, and any finding (race, out of bounds, misaligned, divergence, deadlock) is a
RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from slimtorch.formats import _common as formats
from slimtorch.ops import _common as ops

try:
    from slimtorch import _cuda_host
except ImportError:  # a build without it: a wheel's, say
    _cuda_host = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Device:
    name: str
    ops: Any

    @property
    def emulated(self) -> bool:
        return self.name != "cuda"

    def move(self, tensor: Tensor) -> Tensor:
        return tensor if self.emulated else tensor.cuda()


def _emulated(mode: str) -> Any:
    return pytest.param(
        mode, id=f"emulated-{mode}", marks=pytest.mark.skipif(_cuda_host is None, reason="built without the emulator")
    )


@pytest.fixture(params=[_emulated("lazy"), _emulated("eager"), pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Device:
    if request.param == "cuda":
        return Device("cuda", torch.ops.slimtorch)
    _cuda_host.set_mode(request.param)
    return Device(f"emulated-{request.param}", torch.ops.slimtorch_cuda_host)


_registered: set[str] = set()


@pytest.fixture
def wrappers(device: Device, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """``wrappers("sparse")`` is slimtorch.ops.sparse with its operators on ``device``, gradients included."""

    def of(family: str) -> Any:
        module = import_module(f"slimtorch.ops.{family}")
        if device.emulated:
            monkeypatch.setattr(module, "_ops", device.ops)
            monkeypatch.setattr(import_module(f"slimtorch.formats.{family}"), "_ops", device.ops, raising=False)
            monkeypatch.setitem(ops.KERNEL_DTYPES, "cpu", DTYPES)
            monkeypatch.setattr(formats, "GPU_DEVICE_TYPES", frozenset({"cpu"}))
            for kind in ("linear", "conv2d"):
                name = f"slimtorch_cuda_host::{family}_{kind}"
                if name not in _registered:
                    _registered.add(name)
                    torch.library.register_autograd(
                        name, getattr(module, f"_{kind}_backward"), setup_context=getattr(module, f"_{kind}_setup")
                    )
        return module

    return of


_LAST = "test_every_kernel.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What looks back on all other tests comes after them."""
    items.sort(key=lambda item: item.path.name == _LAST)


@pytest.fixture
def whole_folder(request: pytest.FixtureRequest) -> bool:
    """Whether no test of this folder was left out of the run."""
    here = request.path.parent
    selected = {item.path.name for item in request.session.items if item.path.parent == here}
    everything = {path.name for path in here.glob("test_*.py")}
    return selected == everything and not request.config.getoption("keyword")
