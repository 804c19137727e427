# SPDX-License-Identifier: Apache-2.0
"""What nvcc made of the kernels: the instructions meant are there, nothing spills, no sum depends on atomics.

Needs a build with CUDA kernels, cuobjdump and nvdisasm; no GPU.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

from bench import cuda_resources
from bench.cuda_resources import Kernel, ToolsMissingError, kernels, occupancy
from slimtorch import _C

ARCHS = ("sm_80", "sm_90a")

# What a family's kernels must hold somewhere, on both architectures.
MEANT = {
    "block_sparse": ("HMMA", "LDGSTS", "LDSM"),
    "sparse": ("HMMA", "LDGSTS"),
    "codebook": ("HMMA", "LDGSTS"),
    "sparse_codebook": ("HMMA", "LDGSTS"),
    "binary": ("BMMA.AND", "HMMA", "LDGSTS", "LDSM"),
}


@functools.cache
def built() -> list[Kernel]:
    if not _C.cuda_archs():
        pytest.skip("built without CUDA kernels")
    try:
        return kernels(Path(_C.__file__))
    except ToolsMissingError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("family", MEANT)
def test_the_instructions_meant_are_there(family: str, arch: str) -> None:
    found = {name for k in built() if (k.family, k.arch) == (family, arch) for name in k.instructions}
    assert set(MEANT[family]) <= found


@pytest.mark.parametrize("arch", ARCHS)
def test_binary_products_are_never_emulated(arch: str) -> None:
    """XOR is two ANDs and logic from Hopper on."""
    assert not [k.name for k in built() if k.arch == arch and "BMMA.XOR" in k.instructions]


def test_no_kernel_spills() -> None:
    slow = {"block_sparse::product_kernel<float, true>"}  # of blocks that no tensor core takes
    assert {(k.name, k.arch): k.local for k in built() if k.local and k.name not in slow} == {}


def test_no_sum_depends_on_the_order_of_atomics() -> None:
    assert {(k.name, k.arch): k.float_atomics for k in built() if k.float_atomics} == {}


def test_every_kernel_says_how_many_threads_it_is_for() -> None:
    """Without a launch bound, registers are dealt out for blocks of 1024 threads."""
    assert {k.name for k in built() if k.threads == 1024} == {"sparse_codebook::scan_kernel"}  # which is for as many


def test_every_kernel_is_built_for_every_architecture() -> None:
    names = {arch: {k.name for k in built() if k.arch == arch} for arch in ARCHS}
    assert names["sm_80"]
    assert {k.arch for k in built()} == set(ARCHS)


# ---- that all this would be seen -------------------------------------------------------------------------------------

PLANTED = r"""
#include "cuda/common/device.cuh"
namespace slim::cuda::binary {
struct Params { const uint32_t* a; float* out; int i; };
template <int kThreads>
__global__ void __launch_bounds__(kThreads) planted(Params p) {
  unsigned char* s = dynamic_shared();
  copy_async<16>(s + 16 * threadIdx.x, p.a + 4 * threadIdx.x);
  copy_commit();
  copy_wait<0>();
  sync_threads();
  uint32_t a[4];
  load_matrix(a, s + 16 * (threadIdx.x & 31));
  float indexed[40];
  for (int i = 0; i < 40; ++i) indexed[i] = float(a[i & 3] * i);
  const uint32_t b[2] = {a[0], a[1]};
  float d[4] = {0, 0, 0, 0};
  mma_m16n8k16<Half>(d, a, b);
  int32_t e[4] = {0, 0, 0, 0};
  mma_m16n8k256_and(e, a, b);
  p.out[threadIdx.x] = d[0] + indexed[p.i] + float(e[1]);
  atomicAdd(p.out, d[1]);
}
template __global__ void planted<96>(Params);
}  // namespace slim::cuda::binary
"""


def test_spills_atomics_bounds_and_instructions_are_seen(tmp_path: Path) -> None:
    nvcc = cuda_resources.tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    source, target = tmp_path / "planted.cu", tmp_path / "planted.o"
    source.write_text(PLANTED, encoding="utf-8")
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")]
    root = Path(cuda_resources.__file__).parents[1]
    subprocess.run([str(nvcc), "-std=c++17", "-I", str(root / "csrc"), *archs, "-c", source, "-o", target], check=True)
    try:
        found = kernels(target)
    except ToolsMissingError as error:
        pytest.skip(str(error))
    assert [(k.name, k.family, k.arch, k.threads) for k in found] == [
        ("binary::planted<96>", "binary", arch, 96) for arch in ARCHS
    ]
    for kernel in found:
        assert kernel.local >= 160
        assert kernel.float_atomics == 1
        assert kernel.instructions == {"BMMA.AND": 1, "HMMA": 1, "LDGSTS": 1, "LDSM": 1}
        assert kernel.shared == 0
        assert kernel.registers > 0


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "expected"),
    [
        ("sm_80", 32, 1024, 0, 1.0),
        ("sm_80", 128, 128, 0, 0.25),
        ("sm_80", 255, 256, 0, 0.125),
        ("sm_80", 33, 256, 0, 0.75),  # 40 registers after rounding up: 48 warps, six blocks of eight
        ("sm_80", 32, 128, 81 * 1024, 0.125),  # two blocks of 82 KiB in 164
        ("sm_90a", 32, 128, 75 * 1024, 0.1875),  # three of 76 in 228
        ("sm_90a", 168, 384, 200 * 1024, 0.1875),
    ],
)
def test_occupancy(arch: str, registers: int, threads: int, shared: int, expected: float) -> None:
    assert occupancy(arch, registers, threads, shared) == expected


def test_without_tools_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_resources, "tool", lambda name: None)
    with pytest.raises(ToolsMissingError, match="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"):
        kernels(Path(cuda_resources.__file__))


def test_a_file_without_gpu_code_is_refused() -> None:
    built()  # skips where the tools are missing
    with pytest.raises(ValueError, match=r"no machine code|cuobjdump"):
        kernels(Path(shutil.which("true") or "/bin/true"))
