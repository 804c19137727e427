# SPDX-License-Identifier: Apache-2.0
"""Golden tests: each intrinsic of csrc/cuda/common/device.cuh does what PTX says, in the emulator and on a GPU.

What is expected is worked out here, with numpy and from the PTX manual's tables alone; the kernels are in
tests/cuda_host/golden.cu. Where the emulator passes and a GPU fails, our reading of the manual was wrong, and with it
what the emulator shows of kernels.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cuda.conftest import Device

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests/cuda_host/golden.cu"
Words = np.ndarray  # of uint32
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4  # as PTX names them: groupID and threadID_in_group


# ---- running one kernel ----------------------------------------------------------------------------------------------


def _bound(library: ctypes.CDLL) -> ctypes.CDLL:
    library.slim_golden.restype = library.slim_golden_name.restype = ctypes.c_char_p
    pointer = ctypes.c_void_p
    library.slim_golden.argtypes = [
        ctypes.c_char_p, pointer, ctypes.c_int, pointer, ctypes.c_int, ctypes.c_int, ctypes.c_int, pointer,
    ]  # fmt: skip
    return library


@functools.cache
def emulated() -> ctypes.CDLL:
    from slimtorch import _cuda_host

    return _bound(ctypes.CDLL(_cuda_host.__file__))


@functools.cache
def on_gpu() -> ctypes.CDLL:
    """The same source, built by nvcc for the GPU at hand; kept in the temporary folder by its digest."""
    from bench.cuda_resources import tool

    nvcc = tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc to build tests/cuda_host/golden.cu with")
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}{'a' if major >= 9 else ''}"
    sources = [SOURCE, *sorted((ROOT / "csrc/cuda/common").iterdir())]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"slimtorch-golden-{arch}-{digest}.so"
    if not library.exists():
        built = library.with_suffix(f".{id(digest)}")
        subprocess.run(
            [
                str(nvcc), "-std=c++17", "-O2", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-I",
                str(ROOT / "csrc"), "-shared", "-Xcompiler", "-fPIC", "-o", str(built), str(SOURCE),
            ],
            check=True,
        )  # fmt: skip
        built.replace(library)
    return _bound(ctypes.CDLL(str(library)))


def run(device: Device, test: str, inputs: Any, out_words: int, n: int, threads: int = 32) -> Words:
    """The words that kernel `test` writes, over memory full of ones."""
    words = np.ascontiguousarray(np.asarray(inputs, dtype=np.uint32)).reshape(-1)
    given = device.move(torch.from_numpy(words.view(np.int32).copy()))
    out = device.move(torch.full((out_words,), -1, dtype=torch.int32))
    stream = None if device.emulated else ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    library = emulated() if device.emulated else on_gpu()
    error = library.slim_golden(
        test.encode(), given.data_ptr(), given.numel(), out.data_ptr(), out_words, n, threads, stream
    )
    if error is not None:
        raise RuntimeError(error.decode())
    return out.cpu().numpy().view(np.uint32)


def random_words(count: int, seed: int = 0) -> Words:
    return np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32)


def floats(words: Words) -> np.ndarray:
    return words.view(np.float32)


def bits(values: Any, dtype: str = "float32") -> Words:
    """The bits of numbers, each in a word of its own; of "bfloat16" too, which numpy does not have."""
    values = np.asarray(values, dtype=np.float32)
    if dtype == "float32":
        return values.view(np.uint32).copy()
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy().astype(np.uint32)


# ---- numbers ---------------------------------------------------------------------------------------------------------

# Around every rounding: ties, the largest, subnormals, infinities, both zeros, no NaN (whose bits are free).
AWKWARD = np.array(
    [0.0, -0.0, 1.0, -1.0, 65504.0, 65519.9, 65520.0, -65520.0, 1e30, -1e30, np.inf, -np.inf, 2.0**-24, 2.0**-25,
     2.0**-25 * 1.0001, 6.1e-5, 5.96e-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-9,
     1e-40, -1e-40, 3.3895e38, 3.4e38, 0.1, -0.3, 1 / 3],
    dtype=np.float32,
)  # fmt: skip


def many_floats() -> np.ndarray:
    words = random_words(2000, 3)
    ordinary = np.random.default_rng(4).standard_normal(2000).astype(np.float32)
    every = np.concatenate([floats(words), ordinary, AWKWARD])
    return every[~np.isnan(every)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_to_float(device: Device, dtype: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint32)
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    expected = torch.from_numpy(every.astype(np.uint16)).view(kind).float().numpy()
    actual = floats(run(device, f"to_float:{dtype}", every, len(every), len(every)))
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(actual), nan)
    assert np.array_equal(actual[~nan].view(np.uint32), expected[~nan].view(np.uint32))


def test_to_float_and_from_float_leave_float32_as_it_is(device: Device) -> None:
    words = many_floats().view(np.uint32)
    for test in ("to_float:float32", "from_float:float32"):
        assert np.array_equal(run(device, test, words, len(words), len(words)), words)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_from_float(device: Device, dtype: str) -> None:
    values = many_floats()
    actual = run(device, f"from_float:{dtype}", bits(values), len(values), len(values))
    assert np.array_equal(actual, bits(values, dtype))
    nan = run(device, f"from_float:{dtype}", bits([np.nan]), 1, 1).astype(np.uint16)
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    assert bool(torch.from_numpy(nan).view(kind).isnan())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_pack2(device: Device, dtype: str) -> None:
    low = many_floats()
    high = low[::-1].copy()
    actual = run(device, f"pack2:{dtype}", [bits(low), bits(high)], len(low), len(low))
    assert np.array_equal(actual, bits(low, dtype) | bits(high, dtype) << 16)


def test_to_tf32(device: Device) -> None:
    values = many_floats()
    values = values[np.abs(values) < 1e38]
    words = bits(values)
    # Ten bits are stored; half of the last one is added to the magnitude, and what lies below is cut off.
    expected = ((words & 0x7FFFFFFF) + 0x1000) & 0x7FFFE000 | (words & 0x80000000)
    actual = run(device, "to_tf32:", words, len(words), len(words))
    assert np.array_equal(actual, expected)


def test_to_tf32_keeps_what_is_not_finite(device: Device) -> None:
    actual = floats(run(device, "to_tf32:", bits([np.inf, -np.inf, np.nan]), 3, 3))
    assert actual[0] == np.inf
    assert actual[1] == -np.inf
    assert np.isnan(actual[2])


def test_as_float_and_as_bits(device: Device) -> None:
    values = many_floats()
    values = values[np.abs(values) < 1e38]
    doubled = run(device, "as_float:", bits(values), len(values), len(values))
    assert np.array_equal(doubled, bits(values + values))
    whole = np.array([0, 1, 2, 3, 1000, 65535, 1 << 20, (1 << 24) - 1], dtype=np.uint32)
    assert np.array_equal(run(device, "as_bits:", whole, len(whole), len(whole)), bits(whole.astype(np.float32)))


EDGES = np.array([0, 1, 2, 3, 0x80000000, 0x7FFFFFFF, 0xFFFFFFFF, 0x00010000, 0x0000FFFF], dtype=np.uint32)


def _ones(value: int) -> int:
    return bin(value).count("1")


def test_counts_of_bits(device: Device) -> None:
    words = np.concatenate([EDGES, random_words(200)])
    n = len(words)
    assert run(device, "popcount:32", words, n, n).tolist() == [_ones(int(w)) for w in words]
    high = words[::-1].copy()
    both = [_ones(int(a)) + _ones(int(b)) for a, b in zip(words, high, strict=True)]
    assert run(device, "popcount:64", [words, high], n, n).tolist() == both
    assert run(device, "leading_zeros:", words, n, n).tolist() == [32 - int(w).bit_length() for w in words]
    first = [(int(w) & -int(w)).bit_length() - 1 for w in words]  # -1 for 0
    assert run(device, "first_bit:", words, n, n).view(np.int32).tolist() == first


def test_byte_permute(device: Device) -> None:
    low, high, selector = random_words(300, 1), random_words(300, 2), random_words(300, 3) & 0x7777
    selector[:3] = 0x3210, 0x7654, 0x0426
    expected = []
    for a, b, s in zip(low.tolist(), high.tolist(), selector.tolist(), strict=True):
        every = (b << 32 | a).to_bytes(8, "little")
        expected.append(int.from_bytes(bytes(every[s >> 4 * i & 7] for i in range(4)), "little"))
    assert run(device, "byte_permute:", [low, high, selector], 300, 300).tolist() == expected


def test_funnel_right(device: Device) -> None:
    low, high, shift = random_words(300, 1), random_words(300, 2), random_words(300, 3)
    shift[:70] = np.arange(70)
    operands = zip(low.tolist(), high.tolist(), shift.tolist(), strict=True)
    expected = [(b << 32 | a) >> (s & 31) & 0xFFFFFFFF for a, b, s in operands]
    assert run(device, "funnel_right:", [low, high, shift], 300, 300).tolist() == expected


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_dynamic_shared(device: Device) -> None:
    words = random_words(32)
    assert np.array_equal(run(device, "dynamic_shared:", words, 32, 32), words[::-1])


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_load_constant(device: Device, size: int) -> None:
    words = random_words(64)
    n = 64 * 4 // size
    actual = run(device, f"load_constant:{size}", words, max(64, n), n)
    expected = words.view({1: np.uint8, 2: np.uint16}.get(size, np.uint32)).astype(np.uint32)
    assert np.array_equal(actual, expected)


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("valid", ["all", "some", "none"])
def test_copy_async(device: Device, size: int, valid: str) -> None:
    each = size // 4
    words = random_words(32 * each)
    counts = {"all": np.full(32, size), "none": np.zeros(32), "some": LANES % (size + 1)}[valid].astype(np.uint32)
    actual = run(device, f"copy_async:{size}", np.concatenate([words, counts]), 32 * each, 32)
    expected = words.view(np.uint8).reshape(32, size).copy()
    expected[np.arange(size)[None] >= counts[:, None]] = 0
    assert np.array_equal(actual.view(np.uint8).reshape(32, size), expected)


@pytest.mark.parametrize("test", ["copy_commit:", "copy_wait:"])
def test_groups_of_copies(device: Device, test: str) -> None:
    words = random_words(96)
    assert np.array_equal(run(device, test, words, 96, 32), words)


@pytest.mark.parametrize("kind", ["unsigned", "int"])
def test_atomic_add(device: Device, kind: str) -> None:
    actual = run(device, f"atomic_add:{kind}", np.ones(96), 97, 96, threads=96)
    assert actual[0] == 96
    assert sorted(actual[1:].tolist()) == list(range(96))
    mixed = (np.arange(96) - 40).astype(np.int32).view(np.uint32)
    assert run(device, f"atomic_add:{kind}", mixed, 97, 96, threads=96)[:1].view(np.int32)[0] == 96 * 95 // 2 - 40 * 96


def test_thread_fence(device: Device) -> None:
    words = random_words(96)
    actual = run(device, "thread_fence:", words, 2 * 96 + 1, 96, threads=96)
    assert np.array_equal(actual[:96], words)
    assert actual[-1] == 96


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_barriers(device: Device) -> None:
    words = random_words(96)
    assert np.array_equal(run(device, "sync_threads:", words, 96, 96, threads=96), np.roll(words, -37))
    assert np.array_equal(run(device, "sync_warp:", words[:32], 32, 32), words[LANES ^ 31])
    expected = np.concatenate([words[:64][::-1], words[64:][::-1]])
    assert np.array_equal(run(device, "sync_some:", words, 96, 96, threads=96), expected)


def test_shuffle(device: Device) -> None:
    words, source = random_words(32), np.random.default_rng(1).integers(0, 32, 32)
    assert np.array_equal(run(device, "shuffle:", [words, source], 32, 32), words[source])
    assert np.array_equal(run(device, "shuffle_xor:float", bits(LANES), 32, 32), bits(LANES ^ 16))


@pytest.mark.parametrize("by", [0, 1, 2, 4, 5, 16, 31])
def test_shuffle_by(device: Device, by: int) -> None:
    words = random_words(32)

    def shuffled(name: str) -> Words:
        return run(device, name, np.append(words, by), 32, 32)

    assert np.array_equal(shuffled("shuffle_xor:"), words[LANES ^ by])
    # Lanes that would reach beyond the warp keep what they have.
    assert np.array_equal(shuffled("shuffle_up:"), words[np.where(by <= LANES, LANES - by, LANES)])
    assert np.array_equal(shuffled("shuffle_down:"), words[np.where(LANES + by < 32, LANES + by, LANES)])


@pytest.mark.parametrize("pattern", [0, 1, 0x80000000, 0xFFFFFFFF, 0x12345678])
def test_warp_ballot(device: Device, pattern: int) -> None:
    votes = pattern >> LANES & 1
    assert run(device, "warp_ballot:", votes * 7, 32, 32).tolist() == [pattern] * 32


# ---- matrices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "trans"), [(1, False), (2, False), (4, False), (2, True), (4, True)])
def test_load_matrix(device: Device, count: int, trans: bool) -> None:
    rows = random_words(128).view(np.uint16).reshape(32, 8)  # lane i points at row i: matrix i / 8, row i % 8
    words = rows.reshape(-1).view(np.uint32)
    actual = run(device, f"load_matrix{'_trans' if trans else ''}:{count}", words, 32 * count, 32)
    matrices = rows.reshape(4, 8, 8)[:count]
    if trans:
        matrices = matrices.transpose(0, 2, 1)
    # PTX, "Matrix fragments for ldmatrix": register j of a thread gets elements 2t and 2t + 1 of row g of matrix j.
    expected = matrices[:, G, 2 * T].astype(np.uint32) | matrices[:, G, 2 * T + 1].astype(np.uint32) << 16
    assert np.array_equal(actual.reshape(32, count), expected.T)


def halves(low: np.ndarray, high: np.ndarray, dtype: str) -> Words:
    """Two 16-bit numbers in each word, the lower index in the lower half."""
    return bits(low, dtype).reshape(low.shape) | bits(high, dtype).reshape(high.shape) << 16


def accumulators(matrix: np.ndarray) -> np.ndarray:
    """C and D of all shapes [32, 4]: c0, c1 in row g, c2, c3 in row g + 8, columns 2t and 2t + 1."""
    return np.stack([matrix[G, 2 * T], matrix[G, 2 * T + 1], matrix[G + 8, 2 * T], matrix[G + 8, 2 * T + 1]], axis=1)


def a_m16n8k16(a: np.ndarray, dtype: str) -> Words:
    """PTX, mma.m16n8k16 for .f16 and .bf16: rows g, g + 8, g, g + 8; columns 2t, 2t, 2t + 8, 2t + 8 and the next."""
    places = [(G, 2 * T), (G + 8, 2 * T), (G, 2 * T + 8), (G + 8, 2 * T + 8)]
    return np.stack([halves(a[row, k], a[row, k + 1], dtype) for row, k in places], axis=1)


def b_m16n8k16(b: np.ndarray, dtype: str) -> Words:
    """Rows 2t and 2t + 8 and the next, column g."""
    return np.stack([halves(b[k, G], b[k + 1, G], dtype) for k in (2 * T, 2 * T + 8)], axis=1)


def small(*shape: int, seed: int) -> np.ndarray:
    """Multiples of 1/4 up to 2: products and sums of any number of them are exact."""
    return (np.random.default_rng(seed).integers(-8, 9, shape) / 4).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma_m16n8k16(device: Device, dtype: str) -> None:
    for seed in range(3):
        a, b, c = small(16, 16, seed=seed), small(16, 8, seed=seed + 10), small(16, 8, seed=seed + 20)
        given = [a_m16n8k16(a, dtype).ravel(), b_m16n8k16(b, dtype).ravel(), bits(accumulators(c)).ravel()]
        actual = run(device, f"mma_m16n8k16:{dtype}", np.concatenate(given), 128, 32)
        assert np.array_equal(floats(actual).reshape(32, 4), accumulators(a @ b + c))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma_m16n8k16_of_one_product(device: Device, dtype: str) -> None:
    """One in one place of each operand: a wrong place shows where a sum might hide it."""
    for row, k, column in ((0, 0, 0), (3, 5, 6), (11, 9, 1), (8, 15, 7), (15, 8, 3)):
        a, b = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
        a[row, k], b[k, column] = 3, 5
        given = [a_m16n8k16(a, dtype).ravel(), b_m16n8k16(b, dtype).ravel(), np.zeros(128, np.uint32)]
        actual = floats(run(device, f"mma_m16n8k16:{dtype}", np.concatenate(given), 128, 32)).reshape(32, 4)
        assert np.array_equal(actual, accumulators(a @ b))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma_m16n8k16_sums_in_float32(device: Device, dtype: str) -> None:
    draw = np.random.default_rng(7)
    kind = torch.float16 if dtype == "float16" else torch.bfloat16
    a, b = (torch.from_numpy(draw.standard_normal(s)).to(kind).float().numpy() for s in ((16, 16), (16, 8)))
    c = draw.standard_normal((16, 8)).astype(np.float32)
    given = [a_m16n8k16(a, dtype).ravel(), b_m16n8k16(b, dtype).ravel(), bits(accumulators(c)).ravel()]
    actual = floats(run(device, f"mma_m16n8k16:{dtype}", np.concatenate(given), 128, 32)).reshape(32, 4)
    wide = a.astype(np.float64), b.astype(np.float64)
    exact, size = wide[0] @ wide[1] + c, np.abs(wide[0]) @ np.abs(wide[1]) + np.abs(c)
    # Tensor cores cut off where they align summands; 17 of them, to 24 bits each.
    assert (np.abs(actual - accumulators(exact)) <= 18 * 2.0**-23 * accumulators(size)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma_m16n8k16_hands_on_nan_and_inf(device: Device, dtype: str) -> None:
    a, b = small(16, 16, seed=1) + 4, small(16, 8, seed=2) + 4
    a[2, 3], a[9, 1], b[4, 5] = np.nan, np.inf, -np.inf
    given = [a_m16n8k16(a, dtype).ravel(), b_m16n8k16(b, dtype).ravel(), np.zeros(128, np.uint32)]
    actual = floats(run(device, f"mma_m16n8k16:{dtype}", np.concatenate(given), 128, 32)).reshape(32, 4)
    with np.errstate(invalid="ignore"):
        expected = accumulators(a @ b)
    assert np.array_equal(actual, expected, equal_nan=True)


def test_mma_m16n8k8_tf32(device: Device) -> None:
    for seed in range(3):
        a, b, c = small(16, 8, seed=seed), small(8, 8, seed=seed + 10), small(16, 8, seed=seed + 20)
        # PTX, mma.m16n8k8 for .tf32: rows g, g + 8, g, g + 8, columns t, t, t + 4, t + 4; rows t, t + 4, column g.
        of_a = np.stack([a[G, T], a[G + 8, T], a[G, T + 4], a[G + 8, T + 4]], axis=1)
        of_b = np.stack([b[T, G], b[T + 4, G]], axis=1)
        given = np.concatenate([bits(of_a).ravel(), bits(of_b).ravel(), bits(accumulators(c)).ravel()])
        actual = run(device, "mma_m16n8k8_tf32:", given, 128, 32)
        assert np.array_equal(floats(actual).reshape(32, 4), accumulators(a @ b + c))


def test_mma_m16n8k256_and(device: Device) -> None:
    draw = np.random.default_rng(5)
    for density in (0.5, 0.02, 1.0):
        a, b = draw.random((16, 256)) < density, draw.random((256, 8)) < density
        c = draw.integers(-1000, 1000, (16, 8)).astype(np.int32)
        # The lowest bit of a word is the lowest index. PTX, mma.m16n8k256 for .b1: bits 32t and 32t + 128 and on, of
        # rows g and g + 8, and of column g.
        rows, columns = (
            np.ascontiguousarray(np.packbits(m, axis=1, bitorder="little")).view(np.uint32) for m in (a, b.T)
        )  # [16, 8] and [8, 8]
        of_a = np.stack([rows[G, T], rows[G + 8, T], rows[G, T + 4], rows[G + 8, T + 4]], axis=1)
        of_b = np.stack([columns[G, T], columns[G, T + 4]], axis=1)
        given = np.concatenate([of_a.ravel(), of_b.ravel(), accumulators(c).view(np.uint32).ravel()])
        actual = run(device, "mma_m16n8k256_and:", given, 128, 32).view(np.int32).reshape(32, 4)
        assert np.array_equal(actual, accumulators(a.astype(np.int32) @ b.astype(np.int32) + c))


# ---- nothing is left out ---------------------------------------------------------------------------------------------


def test_every_intrinsic_has_a_golden_test() -> None:
    header = (ROOT / "csrc/cuda/common/device.cuh").read_text(encoding="utf-8")
    declared = set(re.findall(r"^__device__ __forceinline__ [\w: ]+\*? (\w+)(?:<[^>]*>)?\(", header, re.MULTILINE))
    declared -= {"shared_address"}  # what others are made of
    tested = set(re.findall(r'^\s*\{"(\w+):', SOURCE.read_text(encoding="utf-8"), re.MULTILINE))
    assert {"mma_m16n8k16", "copy_async", "shuffle"} <= declared
    assert tested == declared
    mine = Path(__file__).read_text(encoding="utf-8")
    called = set(re.findall(r'"(\w+):', mine)) | {"load_matrix", "load_matrix_trans"}
    assert declared <= called


def test_an_unknown_test_is_refused(device: Device) -> None:
    with pytest.raises(RuntimeError, match="no such test"):
        run(device, "nothing:", [0], 1, 1)
