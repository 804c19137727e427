# SPDX-License-Identifier: Apache-2.0
"""Print where torch is and its version, without importing it.

An isolated build (plain ``pip install .``) has a Python environment of its own without torch, and torch is deliberately
not among the build requirements: that would download gigabytes and might not be the torch the user runs. So this looks,
in order, at the argument, SLIMTORCH_TORCH_DIR, what this Python would import, and the site-packages that the isolated
environment was made from.
"""

import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path


def candidates(argument: str) -> list[Path]:
    found = [Path(p) for p in (argument, os.environ.get("SLIMTORCH_TORCH_DIR", "")) if p]
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        found.append(Path(spec.origin).parent)
    prefixes = [sysconfig.get_path("platlib"), *(p for p in sys.path if p.endswith("-packages"))]
    return found + [Path(p) / "torch" for p in prefixes if p]


def main() -> int:
    looked = candidates(sys.argv[1] if len(sys.argv) > 1 else "")
    for path in looked:
        version_file = path / "version.py"
        if not version_file.is_file() or not (path / "include/torch/csrc/stable/library.h").is_file():
            continue
        match = re.search(r"__version__ *= *['\"]([^'\"]+)", version_file.read_text())
        if match:
            print(f"{path.as_posix()};{match.group(1)}", end="")
            return 0
    print("looked in: " + ", ".join(map(str, dict.fromkeys(looked))), file=sys.stderr, end="")
    return 1


if __name__ == "__main__":
    sys.exit(main())
