# SPDX-License-Identifier: Apache-2.0
"""Mutated .slim files: every one is refused with a FormatError, or loads as something that is sound.

    python -m tests.storage.fuzz --count 100000 --seed 0

Files of every format are damaged in two ways. *Blind* damage (flipped bits, cut and spliced bytes) must be refused, or
load bit for bit as the original. *Forged* files have their checksums made good again, as an attacker would: they must
be refused, or give formats that pass their own checks, in a model that still runs or says what is wrong in Python. The
model is left as it was by every refusal, and the memory of the process may not grow.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import json
import os
import random
import resource
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import slimtorch as slim
from slimtorch.design import LowRank
from slimtorch.nn import PackedLayer
from slimtorch.storage._container import Reader
from slimtorch.storage._encodings import TensorRecord, parse_tensors

PROLOGUE = struct.Struct("<8sIIII")
MEMORY = 192 << 20  # how much more address space than at the start a run may take, and resident memory


@dataclass(frozen=True)
class Sample:
    """A valid file, and how to build the model that it loads into."""

    name: str
    data: bytes
    fresh: Callable[[], nn.Module]
    state: dict[str, Tensor]
    shape: tuple[int, ...]


def _masked(layer: nn.Module, density: float = 0.3) -> nn.Module:
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < density)
    return layer


def _linear() -> nn.Module:
    return nn.Linear(19, 13)


def _wide() -> nn.Module:
    return nn.Linear(700, 3)


def _conv() -> nn.Module:
    return nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)


def _replaceable() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3, bias=False), nn.Linear(2, 5))


class _Tied(nn.Module):
    """Shared tensors, a batch norm, few distinct values, many zeros, dtypes of several widths."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.two.weight = self.one.weight
        self.norm = nn.BatchNorm1d(12)
        self.scale = nn.Parameter(torch.randn(40, 12).round() * (torch.rand(40, 12) < 0.2))
        self.register_buffer("table", torch.arange(300, dtype=torch.int64) % 7)
        self.register_buffer("flags", torch.rand(100) < 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.two(self.one(x)))


def corpus() -> list[Sample]:
    """A small file of each format on each layer, compressed and not, and of a model with shared tensors."""
    torch.manual_seed(0)
    n = slim.nn
    packers = [
        ("sparse", n.SparseLinear, n.SparseConv2d, {}),
        ("block_sparse", n.BlockSparseLinear, n.BlockSparseConv2d, {"block_size": (4, 4)}),
        ("codebook", n.CodebookLinear, n.CodebookConv2d, {"bits": 3, "group_size": 6}),
        ("sparse_codebook", n.SparseCodebookLinear, n.SparseCodebookConv2d, {"bits": 5, "group_size": "row"}),
        ("binary", n.BinaryLinear, n.BinaryConv2d, {}),
    ]
    models: list[tuple[str, nn.Module, Callable[[], nn.Module], tuple[int, ...]]] = []
    for name, linear, conv, options in packers:
        models.append((f"{name}_linear", linear.from_dense(_masked(_linear()), **options), _linear, (2, 19)))
        models.append((f"{name}_conv2d", conv.from_dense(_masked(_conv()), **options), _conv, (1, 4, 5, 5)))
    models.append(("sparse_wide", n.SparseLinear.from_dense(_masked(_wide(), 0.01)), _wide, (2, 700)))
    models.append(("skips", n.SparseCodebookLinear.from_dense(_masked(_wide(), 0.005), bits=2), _wide, (2, 700)))
    models.append(("dense", _Tied(), _Tied, (4, 12)))
    replaced = _replaceable()
    slim.factorize_(replaced, {"0": LowRank(rank=2, kind="cp"), "2": LowRank(rank=3)}, objective=None)
    slim.separate_(replaced, objective=None)
    models.append(("replaced", replaced, _replaceable, (1, 3, 6, 6)))
    samples = []
    for name, model, fresh, shape in models:
        for compress in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "x.slim")
                slim.save(model, path, compress=compress)
                with open(path, "rb") as file:
                    data = file.read()
            state = {key: value.clone() for key, value in model.state_dict().items()}
            samples.append(Sample(f"{name}{'' if compress else '-plain'}", data, fresh, state, shape))
    return samples


# --- damage -------------------------------------------------------------------------------------------------------


def split(data: bytes) -> tuple[dict, bytes]:
    """Header and sections (the latter from the first section's place on)."""
    _, _, _, stored, length = PROLOGUE.unpack_from(data)
    text = data[PROLOGUE.size : PROLOGUE.size + stored]
    start = PROLOGUE.size + stored
    return json.loads(text if stored == length else zlib.decompress(text)), data[start + -start % 8 :]


def join(text: bytes, sections: bytes, version: int = 2, length: int | None = None, deflate: bool = False) -> bytes:
    """A file of this header and these sections, its checksum right."""
    stored = zlib.compress(text) if deflate else text
    sizes = struct.pack("<II", len(stored), len(text) if length is None else length)
    start = b"\x89SLIM\r\n\x1a" + struct.pack("<I", version)
    checksum = zlib.crc32(stored, zlib.crc32(sizes, zlib.crc32(start)))
    head = start + struct.pack("<I", checksum) + sizes + stored
    return head + bytes(-len(head) % 8) + sections if sections else head


def dump(header: object) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def blind(r: random.Random, data: bytes, other: bytes) -> bytes:
    """Damage without repair."""
    out = bytearray(data)
    at = r.randrange(len(out))
    kind = r.randrange(7)
    if kind == 0:
        for _ in range(r.choice((1, 1, 1, 2, 8))):
            out[r.randrange(len(out))] ^= 1 << r.randrange(8)
    elif kind == 1:
        del out[at:]
    elif kind == 2:
        out += r.randbytes(r.choice((1, 7, 8, 64)))
    elif kind == 3:
        out[at:at] = r.randbytes(r.randint(1, 16))
    elif kind == 4:
        del out[at : at + r.randint(1, 16)]
    elif kind == 5:
        out[at:] = other[r.randrange(len(other)) :]
    else:
        size = r.randint(1, 32)
        out[at : at + size] = bytes(len(out[at : at + size]))
    return bytes(out)


NASTY: list[object] = [
    -1, 0, 1, 2, 3, 7, 8, 9, 255, 256, 2**31 - 1, 2**31, 2**32, 2**47, 2**48, 2**63, 2**64, 10**30, True, False, None,
    "", "x", "dense", "sparse", "codebook", "binary", "plain", "huffman", "bits0", "bytes", "distinct", "zeros",
    "codes", "columns", "counts", "float64", "float16", "bfloat16", "uint8", "int32", "bool", "relu", "row", "Linear",
    "Conv2d",
    "BatchNorm", "\ud800", [], {}, [1], [2**40, 2**40], [0], [[]], {"x": 1}, 1.5, float("nan"), float("inf"),
]  # fmt: skip


def _nodes(value: object, found: list[tuple[object, object]]) -> list[tuple[object, object]]:
    """Every (container, key) below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        found.append((value, key))
        _nodes(child, found)
    return found


def forged(r: random.Random, data: bytes, other: bytes) -> bytes:
    """Damage with every checksum made good again."""
    header, sections = split(data)
    body = bytearray(sections)
    kind = r.randrange(8)
    if kind <= 3:  # one or two fields
        for _ in range(r.choice((1, 1, 2))):
            nodes = _nodes(header, [])
            holder, key = r.choice(nodes)
            action = r.randrange(7)
            if action == 0:
                del holder[key]
            elif action == 1 and isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            elif action == 2 and isinstance(holder, dict):
                holder[r.choice(("x", "shape", "offset", "weight", "bias", "values"))] = holder.pop(key)
            elif action == 3 and type(holder[key]) is int:
                holder[key] += r.choice((-8, -1, 1, 8, 64))
            elif action == 4:
                there, that = r.choice(nodes)
                holder[key] = copy.deepcopy(there[that]) if that in there or isinstance(there, list) else 0
            else:
                holder[key] = copy.deepcopy(r.choice(NASTY))
    elif kind <= 6 and body:  # the bytes of sections
        for _ in range(r.choice((1, 1, 3))):
            at = r.randrange(len(body))
            if r.random() < 0.5:
                body[at] ^= 1 << r.randrange(8)
            else:
                body[at : at + 4] = r.randbytes(len(body[at : at + 4]))
        if r.random() < 0.3:
            nodes = [(h, k) for h, k in _nodes(header, []) if type(h[k]) is int and k != "crc32"]
            holder, key = r.choice(nodes)
            holder[key] += r.choice((-1, 1))
    else:  # the text of the header
        text = bytearray(dump(header))
        at = r.randrange(len(text))
        text[at : at + r.randrange(3)] = r.randbytes(r.randrange(3))
        return join(bytes(text), sections, r.choice((1, 1, 1, 0, 2, 2**32 - 1)), r.choice((None, None, None, 0, 2**31)),
                    r.random() < 0.5)  # fmt: skip
    _repair(header, bytes(body))
    if r.random() < 0.8:
        _repair_decoded(header, bytes(body))
    return join(dump(header), bytes(body), deflate=r.random() < 0.3)


def _repair(value: object, body: bytes) -> None:
    """Right checksums for all sections."""
    if isinstance(value, dict):
        offset, length = value.get("offset"), value.get("length")
        if "crc32" in value and type(offset) is int and type(length) is int and offset >= 0 and 0 <= length < 2**40:
            value["crc32"] = zlib.crc32(body[offset : offset + length])
        for child in value.values():
            _repair(child, body)
    elif isinstance(value, list):
        for child in value:
            _repair(child, body)


def _repair_decoded(header: dict, body: bytes) -> None:
    """Right checksums for decoded tensors too, as far as they can be decoded."""
    with tempfile.TemporaryFile() as file:
        file.write(join(dump(header), body))
        file.seek(0)
        decoded: dict[int, Tensor] = {}
        try:
            reader = Reader(file)
            for number, tensor in enumerate(parse_tensors(reader.header["tensors"])):
                bare = _unchecked(tensor)
                if bare.nbytes > 1 << 20 or (bare.stream is not None and bare.stream.symbols > 1 << 20):
                    return
                if tensor.values is not None and tensor.values.crc32 is not None:
                    header["tensors"][number]["values"]["crc32"] = zlib.crc32(bare.values._decode(reader, decoded))
                if tensor.crc32 is not None:
                    header["tensors"][number]["crc32"] = zlib.crc32(bare._decode(reader, decoded))
                decoded[number] = bare.decode(reader, decoded)
        except (slim.FormatError, KeyError, TypeError):
            return


def _unchecked(tensor: TensorRecord) -> TensorRecord:
    values = None if tensor.values is None else _unchecked(tensor.values)
    return dataclasses.replace(tensor, crc32=None, values=values)


# --- judgement ----------------------------------------------------------------------------------------------------


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == b[key].dtype and x.shape == b[key].shape
        and torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (x, b[key])))
        for key, x in a.items()
    )  # fmt: skip


def check_sound(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Formats pass their own checks, and the model runs or raises like any other."""
    for module in model.modules():
        if isinstance(module, PackedLayer):
            module.format.validate()
    try:
        with torch.no_grad():
            model.eval()(torch.ones(shape))
    except (RuntimeError, TypeError, ValueError):  # another dtype, or fewer inputs than we give it
        pass


class Failure(AssertionError):
    """A file that was taken for good, or a model that was left changed; `data` is the file."""

    def __init__(self, message: str, data: bytes) -> None:
        super().__init__(message)
        self.data = data


class Fuzzer:
    """Mutates, loads, judges; counts what happened."""

    def __init__(self, seed: int, samples: list[Sample] | None = None) -> None:
        self.random = random.Random(seed)
        self.samples = corpus() if samples is None else samples
        self.counts: collections.Counter[str] = collections.Counter()
        self.errors: collections.Counter[str] = collections.Counter()
        self.targets = {}
        for sample in self.samples:
            model = sample.fresh()
            self.targets[sample.name] = (model, copy.deepcopy(model.state_dict()), list(model.state_dict().values()))
        root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = tempfile.TemporaryDirectory(dir=root)
        self.path = os.path.join(self.folder.name, "x.slim")

    def step(self) -> None:
        r = self.random
        sample, other = r.choice(self.samples), r.choice(self.samples)
        damage = r.choice((blind, forged))
        data = damage(r, sample.data, other.data)
        self.judge(sample, data, damage.__name__)

    def judge(self, sample: Sample, data: bytes, damage: str) -> None:
        with open(self.path, "wb") as file:
            file.write(data)
        name = f"{damage} {sample.name}"
        model, state, objects = self.targets[sample.name]
        try:
            slim.load(self.path, model)
        except slim.FormatError as error:
            if "more memory" in str(error):
                raise Failure(f"{name}: {error}", data) from error
            self.counts[f"{damage}: refused"] += 1
            self.errors[str(error).split(": ", 2)[1].split("[")[0].split(" ")[0]] += 1
            now = model.state_dict()
            if type(model) is not type(sample.fresh()) or any(
                a is not b and a.data_ptr() != b.data_ptr() for a, b in zip(now.values(), objects, strict=True)
            ) or not same_bits(now, state):  # fmt: skip
                raise Failure(f"{name}: the model was changed by a file that was refused", data) from error
        except Exception as error:
            raise Failure(f"{name}: {type(error).__name__}: {error}", data) from error
        else:
            if damage == "blind" and not same_bits(model.state_dict(), sample.state):
                raise Failure(f"{name}: damage went unseen", data)
            self.counts[f"{damage}: {'same' if same_bits(model.state_dict(), sample.state) else 'loaded, sound'}"] += 1
            try:
                check_sound(model, sample.shape)
            except Exception as error:
                raise Failure(f"{name}: {type(error).__name__}: {error}", data) from error
            fresh = sample.fresh()
            self.targets[sample.name] = (fresh, copy.deepcopy(fresh.state_dict()), list(fresh.state_dict().values()))
        if self.random.random() < 0.2:
            try:
                str(slim.storage.inspect(self.path))
            except slim.FormatError:
                self.counts["inspect: refused"] += 1
            except Exception as error:
                raise Failure(f"inspect {name}: {type(error).__name__}: {error}", data) from error
            else:
                self.counts["inspect: shown"] += 1


def limit_memory(extra: int) -> None:
    """Let the address space grow by at most so many bytes from now on."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Mutated .slim files: refused, or sound.")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default="fuzz-failure.slim", help="where a file that fails goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    fuzzer = Fuzzer(arguments.seed)
    for _ in range(200):
        fuzzer.step()  # what is allocated once
    limit_memory(MEMORY)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    for done in range(200, arguments.count):
        try:
            fuzzer.step()
        except Failure as failure:
            with open(arguments.keep, "wb") as file:
                file.write(failure.data)
            print(f"step {done}: {failure}; the file is {arguments.keep}", file=sys.stderr)
            return 1
    seconds = time.monotonic() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{arguments.count} files of {len(fuzzer.samples)} kinds, seed {arguments.seed}, {seconds:.0f} s")
    print(f"peak memory grew by {grown / 1024:.1f} MiB")
    for name, count in sorted(fuzzer.counts.items()):
        print(f"  {name:24} {count}")
    print("refused at: " + ", ".join(f"{place} {count}" for place, count in fuzzer.errors.most_common(12)))
    return 0 if grown * 1024 < MEMORY else 1


if __name__ == "__main__":
    sys.exit(main())
