# SPDX-License-Identifier: Apache-2.0
"""What the package holds and says about itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

import slimtorch

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")


def sources() -> list[Path]:
    """Every file of the repository that holds code or settings."""
    kinds = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".sh", ".toml", ".yaml", ".cmake"}
    folders = ["bench", "cmake", "csrc", "python", "scripts", "tests"]
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    return [*found, *(path for path in ROOT.iterdir() if path.suffix in kinds), ROOT / "Makefile", ROOT / ".ci/run"]


def test_one_version_everywhere() -> None:
    assert slimtorch.__version__ == metadata.version("slimtorch")
    assert slimtorch.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_file_names_its_licence() -> None:
    unnamed = []
    for path in sources():
        head = path.read_text(encoding="utf-8").splitlines()[:2]
        if not any("SPDX-License-Identifier: Apache-2.0" in line for line in head):
            unnamed.append(path.relative_to(ROOT).as_posix())
    assert not unnamed


def test_makefile_installs_what_the_build_requires() -> None:
    requires = re.search(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    tools = re.search(r"^BUILD_TOOLS := (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert requires
    assert tools
    assert set(re.findall(r'"([^"]+)"', requires[1])) <= set(re.findall(r'"([^"]+)"', tools[1]))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_the_documents_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith("https://") and not (ROOT / target).exists():
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_the_documents_exist(document: str) -> None:
    """Whatever is written in code style with a slash and a known first folder is a file or folder of the repository."""
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    made_on_demand = ("bench/results", "docs/img")
    missing = []
    for path in re.findall(r"`((?:bench|cmake|csrc|docs|python|scripts|tests)/[\w./-]*)`", text):
        placeholder = re.search(r"/F[./]", path)  # of a family that somebody may add
        if not placeholder and not path.startswith(made_on_demand) and not (ROOT / path).exists():
            missing.append(path)
    assert not missing


def test_sdist_holds_what_a_wheel_is_built_from(tmp_path: Path) -> None:
    command = "import sys; from scikit_build_core.build import build_sdist; print(build_sdist(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    archive = tmp_path / done.stdout.splitlines()[-1]
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    needed = {"CMakeLists.txt", "pyproject.toml", "cmake/locate_torch.py", "LICENSE", "README.md"}
    needed |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    package = (ROOT / "python/slimtorch").rglob("*.py*")
    needed |= {path.relative_to(ROOT).as_posix() for path in package if "__pycache__" not in path.parts}
    assert not needed - names
    assert not [name for name in names if name.startswith((".venv", "build/", "dist/", "demo/"))]
    assert archive.stat().st_size < 2_000_000


def test_native_library_is_where_the_package_is() -> None:
    assert Path(slimtorch._C.__file__).name.startswith("_C.")
    isas = slimtorch._C.isas()
    assert list(isas)[-1] == "scalar"
    assert isas[slimtorch._C.isa()] == ""
    forced = os.environ.get("SLIMTORCH_CPU")
    assert slimtorch._C.isa() == forced or not forced
