# SPDX-License-Identifier: Apache-2.0
"""Print where torch is and its version, without importing it.

An isolated build (plain ``pip install .``) has a Python environment of its own without torch, and torch is deliberately
not among the build requirements: that would download gigabytes and might not be the torch the user runs. So this looks,
in order, at what this Python would import, at its site-packages (which pip's isolation hides, but does not move), and
at those of the interpreter and the user that the environment was made from. A folder named by the argument or by
SLIMTORCH_TORCH_DIR is the only place looked at.
"""

import importlib.util
import os
import re
import site
import sys
import sysconfig
from pathlib import Path


def candidates(argument: str) -> list[Path]:
    named = argument or os.environ.get("SLIMTORCH_TORCH_DIR", "")
    if named:
        return [Path(named).absolute()]
    found = []
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        found.append(Path(spec.origin).parent)
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    prefixes = [sysconfig.get_path("platlib"), *(p for p in sys.path if p.endswith("-packages"))]
    prefixes += [sysconfig.get_path("platlib", vars=base), site.getusersitepackages()]
    return found + [Path(p) / "torch" for p in prefixes]


def version(folder: Path) -> str | None:
    """The version of the torch package in ``folder``, or None if there is none."""
    file = folder / "version.py"
    match = re.search(r"__version__ *= *['\"]([^'\"]+)", file.read_text()) if file.is_file() else None
    return match.group(1) if match else None


def main() -> int:
    looked = candidates(sys.argv[1] if len(sys.argv) > 1 else "")
    for folder in looked:
        if found := version(folder):
            print(f"{folder.as_posix()};{found}", end="")
            return 0
    print("looked in: " + ", ".join(map(str, dict.fromkeys(looked))), file=sys.stderr, end="")
    return 1


if __name__ == "__main__":
    sys.exit(main())
