# SPDX-License-Identifier: Apache-2.0
"""What the compiler made of each CUDA kernel, from the built library: `python -m bench.cuda_resources --help`.

Registers, shared memory, local memory (spills), how many of a multiprocessor's warps the registers and threads of a
block leave room for, and which of the instructions that matter occur, for each architecture the library holds. Needs no
GPU: cuobjdump and nvdisasm, from the CUDA toolkit or from PyPI (`nvidia-cuda-cuobjdump`, `nvidia-cuda-nvdisasm`), read
the machine code. The shared memory that a launch asks for is not in it, so it does not lower the occupancy shown
unless it is named with `--shared`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.run import guarded
from slimtorch import _C
from slimtorch.report import Table

# Longest first: one name is part of another.
FAMILIES = ("sparse_codebook", "block_sparse", "codebook", "binary", "sparse")
# Tensor cores of either kind, copies in the background, matrices from shared memory, TMA.
INSTRUCTIONS = ("HMMA", "BMMA", "IMMA", "HGMMA", "BGMMA", "LDGSTS", "LDSM", "UTMALDG")


class ToolsMissingError(ValueError):
    """cuobjdump or nvdisasm is not to be found."""


@dataclass(frozen=True)
class Kernel:
    """One `__global__` function on one architecture.

    Attributes:
        name: demangled, without the namespace `slim::cuda` and the parameters.
        family: of formats, or "common".
        arch: such as "sm_80".
        registers: a thread.
        shared: bytes of a block, those known when it was compiled.
        local: bytes of a thread in local memory: spilled registers, and arrays indexed at run time.
        threads: of a block, at most; 1024 where the kernel does not say.
        instructions: how often each of INSTRUCTIONS occurs, by its first word; those of BMMA with their operation.
        float_atomics: floating-point atomics, whose order is not fixed.
    """

    name: str
    family: str
    arch: str
    registers: int
    shared: int
    local: int
    threads: int
    instructions: dict[str, int]
    float_atomics: int

    def occupancy(self, dynamic_shared: int = 0) -> float:
        """Share of a multiprocessor's warps that can be there at once."""
        return occupancy(self.arch, self.registers, self.threads, self.shared + dynamic_shared)


def occupancy(arch: str, registers: int, threads: int, shared: int) -> float:
    """Resident warps over the most there can be, from the limits in the CUDA C++ programming guide, table 30."""
    major = int(re.sub(r"\D", "", arch)) // 10
    shared_of_sm = {8: 164, 9: 228}.get(major, 228) * 1024
    per_block = -(-threads // 32)
    # Registers are dealt out in units of 256 to a warp, warps in units of four; a block costs 1 KiB of shared memory.
    warps = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4 if registers else 64
    blocks = min(32, 64 // per_block, warps // per_block, shared_of_sm // (-(-(shared + 1024) // 128) * 128))
    return blocks * per_block / 64


# ---- the tools -------------------------------------------------------------------------------------------------------


def _folders() -> list[Path]:
    """Where CUDA's tools may lie: PATH, the toolkit, wheels from PyPI."""
    found = [Path(part) for part in os.environ.get("PATH", "").split(os.pathsep) if part]
    found += [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    found += [Path("/usr/local/cuda/bin")]
    for place in sys.path:
        found += sorted((Path(place) / "nvidia").glob("*/bin"))
    return found


def tool(name: str) -> Path | None:
    """The path of one of CUDA's tools."""
    for folder in _folders():
        path = folder / name
        if os.access(path, os.X_OK) and path.is_file():
            return path
    return None


def _cuobjdump(library: Path, *options: str) -> str:
    paths = {name: tool(name) for name in ("cuobjdump", "nvdisasm")}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        wheels = " ".join(f"nvidia-cuda-{name}" for name in missing)
        raise ToolsMissingError(f"{' and '.join(missing)} not found: `pip install {wheels}`, or a CUDA toolkit in PATH")
    folders = os.pathsep.join(str(path.parent) for path in paths.values() if path is not None)  # it starts nvdisasm
    environment = {**os.environ, "PATH": folders + os.pathsep + os.environ.get("PATH", "")}
    done = subprocess.run(
        [str(paths["cuobjdump"]), *options, str(library)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no message"]
        raise ValueError(f"{library}: cuobjdump: {said[-1]}")
    return done.stdout


def _demangled(names: Sequence[str]) -> dict[str, str]:
    """Mangled to demangled; as they are where no tool can tell."""
    filters = tool("c++filt") or tool("cu++filt")
    if filters is None or not names:
        return {name: name for name in names}
    done = subprocess.run([str(filters)], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


# ---- what they say ---------------------------------------------------------------------------------------------------

_ARCH = re.compile(r"^arch = (\S+)$", re.MULTILINE)
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_FLOAT_ATOMIC = re.compile(r"(RED|ATOM)[GS]?\..*\.(F16|F32|F64|BF16)")
_USAGE = re.compile(r"^ Function (\S+):\n\s+(.*)$", re.MULTILINE)


def by_arch(output: str) -> dict[str, str]:
    """cuobjdump's output, cut up by the architecture that it is about."""
    parts: dict[str, str] = {}
    marks = list(_ARCH.finditer(output))
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        parts[mark[1]] = parts.get(mark[1], "") + output[mark.end() : following.start() if following else None]
    return parts


def usage(output: str) -> dict[str, dict[str, int]]:
    """Of `--dump-resource-usage`, for one architecture: REG, STACK, SHARED, LOCAL by function."""
    return {
        name: {key: int(value) for key, value in re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", numbers)}
        for name, numbers in _USAGE.findall(output)
    }


def opcodes(output: str) -> dict[str, Counter[str]]:
    """Of `--dump-sass`, for one architecture: how often each instruction occurs, by function."""
    parts = re.split(r"^\s*Function : (\S+)$", output, flags=re.MULTILINE)
    return {name: Counter(_OPCODE.findall(text)) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def max_threads(output: str) -> dict[str, int]:
    """Of `--dump-elf`, for one architecture: the threads of a launch bound, by function."""
    found: dict[str, int] = {}
    sections = re.findall(r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.|\Z)", output, re.MULTILINE | re.DOTALL)
    for name, text in sections:
        bound = re.search(r"EIATTR_MAX_THREADS\s+Format:.*?\n?\s*Value:\s*((?:0x[0-9a-f]+\s*){3})", text)
        if bound:
            x, y, z = (int(value, 16) for value in bound[1].split()[:3])
            found[name] = x * y * z
    return found


def short_name(demangled: str) -> str:
    """`void slim::cuda::binary::kernel<slim::cuda::Half>(...)` as `binary::kernel<Half>`."""
    name = demangled.removeprefix("void ")
    depth = 0
    for place, letter in enumerate(name):  # the parameters begin at the first parenthesis outside of < >
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and not name.startswith("(anonymous namespace)", place):
            name = name[:place]
            break
    return name.replace("slim::cuda::", "").replace("(anonymous namespace)::", "")


def family_of(name: str) -> str:
    """The family in whose namespace a kernel, or what it is instantiated with, stands."""
    return next((family for family in FAMILIES if re.search(rf"\b{family}::", name)), "common")


def _interesting(counts: Counter[str]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for opcode, count in counts.items():
        head, *modifiers = opcode.split(".")
        if head in ("BMMA", "BGMMA"):  # which operation decides between native and emulated
            head += "".join(f".{m}" for m in modifiers if m in ("AND", "XOR"))
        if head.split(".")[0] in INSTRUCTIONS:
            found[head] += count
    return dict(sorted(found.items()))


def kernels(library: Path) -> list[Kernel]:
    """Every kernel in a library, object file or cubin. Raises ValueError where it holds none or cannot be read."""
    if not library.is_file():
        raise ValueError(f"{library}: no such file")
    used = by_arch(_cuobjdump(library, "--dump-resource-usage"))
    if not used:
        raise ValueError(f"{library}: holds no machine code for a GPU")
    found: list[Kernel] = []
    with ThreadPoolExecutor() as pool:  # disassembling is what takes long: all architectures side by side
        sass = {arch: pool.submit(_cuobjdump, library, "--gpu-architecture", arch, "--dump-sass") for arch in used}
        elf = by_arch(_cuobjdump(library, "--dump-elf"))
    for arch, text in used.items():
        resources = usage(text)
        counts, bounds = opcodes(sass[arch].result()), max_threads(elf.get(arch, ""))
        names = _demangled(list(resources))
        for mangled, numbers in resources.items():
            name = short_name(names[mangled])
            count = counts.get(mangled, Counter())
            atomics = sum(n for opcode, n in count.items() if _FLOAT_ATOMIC.match(opcode))
            spilled = numbers["LOCAL"] + numbers["STACK"]
            shared = numbers["SHARED"]
            if shared >= 1024 and not arch.startswith("sm_8"):
                shared -= 1024  # from Hopper on, what each block costs anyway is in the number
            found.append(
                Kernel(
                    name, family_of(names[mangled]), arch, numbers["REG"], shared, spilled,
                    bounds.get(mangled, 1024), _interesting(count), atomics,
                )
            )  # fmt: skip
    return sorted(found, key=lambda kernel: (kernel.family, kernel.name, kernel.arch))


# ---- the table -------------------------------------------------------------------------------------------------------


def table(found: Sequence[Kernel], dynamic_shared: int = 0) -> Table:
    rows: list[list[object]] = [
        [
            k.name, k.arch, k.threads, k.registers, k.shared, k.local, f"{k.occupancy(dynamic_shared):.0%}",
            " ".join(f"{name} {count}" for name, count in k.instructions.items()) or None,
        ]
        for k in found
    ]  # fmt: skip
    columns = ["kernel", "arch", "threads", "registers", "shared", "local", "occupancy", "instructions"]
    spilled = sum(k.local > 0 for k in found)
    asked = f", and {dynamic_shared} bytes asked for at the launch," if dynamic_shared else ""
    notes = [
        f"{len(found)} kernels, {spilled} with local memory; shared: bytes that the compiler knows of; "
        f"occupancy: as registers, threads and these bytes{asked} allow"
    ]
    return Table("CUDA kernels as compiled", columns, rows, notes)


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_resources", description=__doc__)
    what = "libraries, objects or cubins (default: the built slimtorch._C)"
    parser.add_argument("files", type=Path, nargs="*", help=what)
    parser.add_argument("--arch", help="one architecture, such as sm_80")
    parser.add_argument("--family", choices=(*FAMILIES, "common"))
    parser.add_argument("--shared", type=int, default=0, metavar="BYTES", help="shared memory that launches ask for")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if not options.files and not _C.cuda_archs():
        raise ValueError("slimtorch._C was built without CUDA kernels: build it where nvcc is, or name object files")
    found = [kernel for path in options.files or [Path(_C.__file__)] for kernel in kernels(path)]
    found = [k for k in found if options.arch in (None, k.arch) and options.family in (None, k.family)]
    if options.json:
        content = [{**asdict(k), "occupancy": k.occupancy(options.shared)} for k in found]
        print(json.dumps(content, indent=1))
    else:
        print(table(found, options.shared))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
