# SPDX-License-Identifier: Apache-2.0
"""After all other tests of this folder: every kernel in every configuration has run in the emulator, in both modes."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

_cuda_host = pytest.importorskip("slimtorch._cuda_host")

_KERNEL = re.compile(r"^([0-9a-f]+) \w (?:void )?(slim::cuda::(?:[\w:]|\(anonymous namespace\))*_kernel(?:<.*>)?)\(")


def kernels() -> dict[int, str]:
    """Every function named …_kernel in the emulator's module, by its offset there."""
    listing = subprocess.run(
        ["nm", "--demangle", "--defined-only", _cuda_host.__file__], capture_output=True, text=True, check=True
    ).stdout
    found = (_KERNEL.match(line) for line in listing.splitlines() if "[clone" not in line and "{lambda" not in line)
    return {int(match[1], 16): match[2] for match in found if match}


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
@pytest.mark.parametrize("mode", ["lazy", "eager"])
def test_every_configuration_has_run(mode: str, whole_folder: bool) -> None:
    if not whole_folder:
        pytest.skip("only after all of tests/cuda")
    ran = {offset for offsets in _cuda_host.statistics()[f"kernels_{mode}"].values() for offset in offsets}
    everything = kernels()
    assert everything, "no kernel found"
    missing = sorted(name for offset, name in everything.items() if offset not in ran)
    assert not missing, f"{len(missing)} of {len(everything)} never ran: {missing}"
    print(f"{len(everything)} kernels, all of them run ({mode})")
