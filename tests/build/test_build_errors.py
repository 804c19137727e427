# SPDX-License-Identifier: Apache-2.0
"""What stops a build says in one line what to do; what does not stop it says so too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sysconfig.get_path("scripts")


def tool(name: str) -> str:
    """CMake or Ninja, of this environment or of the system."""
    path = shutil.which(name, path=os.pathsep.join([SCRIPTS, os.environ.get("PATH", os.defpath)]))
    assert path, f"{name} is missing: pip install {name}"
    return path


def configure(folder: Path, *definitions: str, **environment: str) -> tuple[int, list[str]]:
    """Run CMake's configure step in `folder`; its exit code and the lines it printed, without leading spaces."""
    command = [tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-D{definition}" for definition in definitions]
    inherited = {name: value for name, value in os.environ.items() if name not in ("CXX", "SLIMTORCH_TORCH_DIR")}
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=120)
    return done.returncode, [line.strip() for line in (done.stdout + done.stderr).splitlines()]


def fake_torch(folder: Path, version: str) -> Path:
    """A folder that looks like an installed torch of that version to whoever does not import it."""
    header = folder / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (folder / "version.py").write_text(f"__version__ = '{version}'\n")
    return folder


def only_line(lines: list[str]) -> str:
    """The line of ours, after checking that it is the only one and the first that CMake marks as an error."""
    ours = [line for line in lines if line.startswith("slimtorch: ")]
    assert len(ours) == 1, lines
    errors = [index for index, line in enumerate(lines) if line.startswith("CMake Error")]
    assert len(errors) == 1, lines
    assert lines[errors[0] + 1] == ours[0]
    return ours[0]


def test_no_compiler(tmp_path: Path) -> None:
    for _ in range(2):  # the second time with what the first has left in the cache
        code, lines = configure(tmp_path, CXX="/bin/false")
        assert code != 0
        assert only_line(lines) == (
            "slimtorch: no working C++ compiler; install GCC or Clang, or set CXX to one (CXX is '/bin/false')"
        )


@pytest.mark.parametrize("named_by", ["argument", "environment"])
def test_no_torch(tmp_path: Path, named_by: str) -> None:
    missing = tmp_path / "nowhere"
    if named_by == "argument":
        code, lines = configure(tmp_path / "build", f"SLIM_TORCH_DIR={missing}")
    else:
        code, lines = configure(tmp_path / "build", SLIMTORCH_TORCH_DIR=str(missing))
    assert code != 0
    assert only_line(lines) == (
        "slimtorch: no torch found; install torch >= 2.11 first, or set SLIMTORCH_TORCH_DIR to its folder"
    )
    assert f"looked in: {missing}" in lines  # there alone: a named folder is never passed over in silence


def test_torch_too_old(tmp_path: Path) -> None:
    torch = fake_torch(tmp_path / "torch", "2.5.1+cu121")
    shutil.rmtree(torch / "include")  # as it was then: the stable ABI came later
    code, lines = configure(tmp_path / "build", f"SLIM_TORCH_DIR={torch}")
    assert code != 0
    assert only_line(lines) == f"slimtorch: expected torch >= 2.11, got 2.5.1+cu121 in {torch}; upgrade torch"


def test_torch_without_headers(tmp_path: Path) -> None:
    torch = fake_torch(tmp_path / "torch", "2.13.0")
    shutil.rmtree(torch / "include")
    code, lines = configure(tmp_path / "build", f"SLIM_TORCH_DIR={torch}")
    assert code != 0
    assert only_line(lines) == (
        f"slimtorch: torch 2.13.0 in {torch} has no C++ headers; install a wheel of torch"
    )


def test_no_nvcc_goes_on(tmp_path: Path) -> None:
    import pybind11

    torch = fake_torch(tmp_path / "torch", "2.100.0")  # newer than 2.11, though "100" sorts before it as text
    code, lines = configure(
        tmp_path / "build",
        f"SLIM_TORCH_DIR={torch}",
        f"pybind11_DIR={pybind11.get_cmake_dir()}",
        CUDACXX="/bin/false",
    )
    assert "-- slimtorch: torch 2.100.0" in lines
    assert "-- slimtorch: no nvcc found, building for the CPU only" in lines
    assert code == 0, lines


def locate(python: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SLIMTORCH_"))}
    command = [python, str(ROOT / "cmake/locate_torch.py"), *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=60)


def test_locate_torch_finds_what_python_imports() -> None:
    import torch

    expected = f"{Path(torch.__file__).parent.as_posix()};{torch.__version__}"
    assert locate(sys.executable, "").stdout == expected


def test_locate_torch_under_isolation() -> None:
    """As in pip's isolated builds: this environment's interpreter, without its site-packages on sys.path."""
    import torch

    hidden = (
        "import runpy, sys; sys.path = [p for p in sys.path if not p.endswith('-packages')];"
        "sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", hidden, str(ROOT / "cmake/locate_torch.py")]
    isolated = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert isolated.stdout == f"{Path(torch.__file__).parent.as_posix()};{torch.__version__}", isolated.stderr


def test_locate_torch_prefers_the_argument(tmp_path: Path) -> None:
    first, second = fake_torch(tmp_path / "first", "2.12.0"), fake_torch(tmp_path / "second", "2.11.0")
    assert locate(sys.executable, str(first), SLIMTORCH_TORCH_DIR=str(second)).stdout == f"{first};2.12.0"
    assert locate(sys.executable, "", SLIMTORCH_TORCH_DIR=str(second)).stdout == f"{second};2.11.0"
