# SPDX-License-Identifier: Apache-2.0
"""How a tensor lies in a file: as its plain bytes, or as something smaller that gives the same bits back.

    plain      the bytes, little-endian, row-major
    distinct   at most 256 bit patterns: a table of them, and an index for each element
    zeros      many elements are 0: gaps between the others, signs of the zeros, the other values (plain or distinct)
    codes      a bit stream of indices (see formats/_bits.py): the indices one by one
    columns    positions that ascend within rows: gaps between them
    counts     row offsets: the number of entries of each row

All but the first are made of *symbols*, numbers below 256 one after another, which again have several codings:

    bytes      a byte each
    bits0 … 7  so many bits each, lowest first, without gaps (bits0: all of them are 0, nothing is stored)
    huffman    torch.ops.slimtorch.huffman_encode

Gaps and counts of any size become symbols by escape: 255 means "255 more, and go on".
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from slimtorch.formats._bits import pack_bits, stream_bytes, unpack_bits
from slimtorch.storage._container import Reader, Section, SectionWriter, fail, natural, naturals, take

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "bfloat16",
        "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
    )
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PATTERNS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

ESCAPE = 255
_RECORD_BYTES = 32  # about what another section costs in a header: an encoding must save more
_SAMPLE = 1 << 12


# --- symbols ------------------------------------------------------------------------------------------------------


def escape(numbers: np.ndarray) -> np.ndarray:
    """Numbers ``[n]`` int64, not negative, as symbols."""
    times = numbers // ESCAPE
    ends = np.cumsum(times + 1) - 1
    symbols = np.full(int(ends[-1]) + 1 if ends.size else 0, ESCAPE, np.uint8)
    symbols[ends] = numbers % ESCAPE
    return symbols


def unescape(symbols: np.ndarray, count: int, place: str) -> np.ndarray:
    """The ``count`` numbers that ``symbols`` say, int64."""
    ends = np.flatnonzero(symbols != ESCAPE)
    if len(ends) != count or (symbols.size and ends[-1:].tolist() != [symbols.size - 1]):
        fail(place, f"expected {count} numbers, got {len(ends)} and {symbols.size - len(ends)} escapes")
    sums = np.cumsum(symbols, dtype=np.int64)[ends]
    return np.diff(sums, prepend=np.int64(0))


def huffman_bytes(counts: np.ndarray) -> int:
    """Bytes that Huffman coding takes for symbols that occur so often."""
    return int(torch.ops.slimtorch.huffman_size(torch.from_numpy(counts)))


@dataclass(frozen=True)
class Stream:
    """Symbols in a file."""

    coding: str
    symbols: int
    section: Section
    place: str

    @classmethod
    def parse(cls, record: Any, place: str) -> Stream:
        coding, symbols, section = take(record, place, coding=str, symbols=int, section=dict)
        natural(symbols, f"{place}.symbols")
        stored = Section.parse(section, f"{place}.section")
        if coding == "huffman":
            if symbols > 8 * stored.length:  # no code is shorter than a bit
                fail(f"{place}.symbols", f"expected at most {8 * stored.length}, got {symbols}")
        elif coding in _BITS:
            wanted = stream_bytes(symbols, _BITS[coding])
            if stored.length != wanted:
                fail(f"{place}.section.length", f"expected {wanted}, got {stored.length}")
        else:
            fail(f"{place}.coding", f"expected bytes, bits0 … bits7 or huffman, got {coding!r:.40}")
        return cls(coding, symbols, stored, place)

    def decode(self, reader: Reader) -> np.ndarray:
        """The symbols, uint8. The caller has judged their number."""
        data = reader.read(self.section, f"{self.place}.section")
        bits = _BITS.get(self.coding)
        if bits == 8:
            return data
        if bits == 0:
            return np.zeros(self.symbols, np.uint8)
        stored = torch.from_numpy(data)
        if bits is None:
            try:
                return torch.ops.slimtorch.huffman_decode(stored, self.symbols).numpy()
            except RuntimeError as error:
                fail(
                    f"{self.place}.section", f"no Huffman code of {self.symbols} symbols: {str(error).splitlines()[0]}"
                )
        spare = 8 * data.size - bits * self.symbols
        if spare and data[-1] >> (8 - spare):
            fail(f"{self.place}.section", f"expected zeros in the last {spare} bits")
        return unpack_bits(stored, bits, self.symbols).numpy()


_BITS = {"bytes": 8, **{f"bits{bits}": bits for bits in range(8)}}


@dataclass(frozen=True)
class _Symbols:
    """Symbols to be written, and the coding that takes the fewest bytes."""

    symbols: np.ndarray
    coding: str
    nbytes: int

    @classmethod
    def of(cls, symbols: np.ndarray) -> _Symbols:
        counts = np.bincount(symbols, minlength=256).astype(np.int64)
        present = np.flatnonzero(counts)
        bits = int(present[-1]).bit_length() if present.size else 0
        coding, size = next(name for name, width in _BITS.items() if width == bits), stream_bytes(symbols.size, bits)
        if present.size > 1:
            coded = huffman_bytes(counts)
            if coded < size:
                coding, size = "huffman", coded
        return cls(symbols, coding, size)

    def write(self, writer: SectionWriter) -> dict[str, Any]:
        if self.coding == "huffman":
            data = torch.ops.slimtorch.huffman_encode(torch.from_numpy(self.symbols)).numpy()
        elif self.coding == "bits0":
            data = self.symbols[:0]
        else:
            data = pack_bits(torch.from_numpy(self.symbols), _BITS[self.coding]).numpy()
        return {"coding": self.coding, "symbols": int(self.symbols.size), "section": writer.add(data)}


# --- reading tensors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorRecord:
    """What the header says of one tensor.

    Attributes:
        place: in the header, for messages.
        encoding: see the top of this file.
        crc32: of the decoded bytes; None of a plain tensor, whose section has one.
        section: of a plain tensor its bytes, of a distinct one its table.
        count: of a distinct one the entries of the table, of codes their bits, of columns the number of the tensor
            with the row offsets.
        stream: of the others, their symbols.
        signs: of "zeros", one symbol for each: 0, or 1 for -0.0.
        values: of "zeros", the elements that are none.
    """

    place: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    encoding: str
    crc32: int | None = None
    section: Section | None = None
    count: int = 0
    stream: Stream | None = None
    signs: Stream | None = None
    values: TensorRecord | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Decoded."""
        return self.numel * self.dtype.itemsize

    def sections(self) -> list[tuple[Section, str]]:
        """Every section with its place, in the order of the file."""
        found = [] if self.section is None else [(self.section, f"{self.place}.section")]
        found += [(stream.section, f"{stream.place}.section") for stream in self._streams()]
        return found + ([] if self.values is None else self.values.sections())

    def _streams(self) -> list[Stream]:
        return [stream for stream in (self.stream, self.signs) if stream is not None]

    @property
    def stored_bytes(self) -> int:
        """In the file."""
        return sum(section.length for section, _ in self.sections())

    @property
    def codings(self) -> list[str]:
        """Of its parts, in the order of the file; "plain" for bytes as they are."""
        own = [] if self.section is None else ["plain"]
        own += [stream.coding for stream in self._streams() if stream.section.length]
        return own + ([] if self.values is None else self.values.codings)

    @classmethod
    def parse(cls, record: Any, place: str, number: int, nested: bool = False) -> TensorRecord:
        """Check one tensor's record for itself; ``number`` is its place among the tensors."""
        encoding = record.get("encoding") if type(record) is dict else None
        fields = _FIELDS.get(encoding) if isinstance(encoding, str) else None
        if not isinstance(encoding, str) or fields is None or (nested and encoding not in ("plain", "distinct")):
            fail(f"{place}.encoding", f"expected {', '.join(_FIELDS)}, got {encoding!r:.40}")
        dtype_name, shape, _, *rest = take(record, place, dtype=str, shape=list, encoding=str, **fields)
        own = dict(zip(fields, rest, strict=True))
        dtype = DTYPES.get(dtype_name)
        if dtype is None:
            fail(f"{place}.dtype", f"expected one of {', '.join(DTYPES)}, got {dtype_name!r:.40}")
        sizes = naturals(shape, f"{place}.shape")
        numel = math.prod(sizes)
        if numel > 1 << 48:
            fail(f"{place}.shape", f"{numel} elements")
        crc32 = natural(own["crc32"], f"{place}.crc32", 0xFFFFFFFF) if "crc32" in own else None
        section = Section.parse(own["section"], f"{place}.section") if "section" in own else None
        count = 0
        signs, values = None, None
        if encoding == "plain":
            assert section is not None
            if section.length != numel * dtype.itemsize:
                fail(f"{place}.section.length", f"expected {numel * dtype.itemsize}, got {section.length}")
            return cls(place, dtype, sizes, encoding, None, section)
        name, key = _STREAMS[encoding]
        stream = Stream.parse(own[name], f"{place}.{name}")
        if key is not None:
            count = natural(own[key], f"{place}.{key}")
        symbols = stream.symbols
        if encoding in ("distinct", "zeros") and dtype.itemsize not in _PATTERNS:
            fail(f"{place}.encoding", f"{encoding!r} does not go with {dtype_name}")
        if encoding == "distinct":
            assert section is not None
            if not 1 <= count <= 256 or section.length != count * dtype.itemsize:
                fail(f"{place}.count", f"expected 1 … 256 for a table of {section.length} bytes, got {count}")
            if symbols != numel:
                fail(f"{place}.{name}.symbols", f"expected {numel}, got {symbols}")
        elif encoding == "zeros":
            values = cls.parse(own["values"], f"{place}.values", number, nested=True)
            if values.dtype != dtype or len(values.shape) != 1 or values.numel > numel:
                fail(f"{place}.values", f"expected at most {numel} values of {dtype_name}")
            _check_escaped(symbols, values.numel, numel, f"{place}.{name}.symbols")
            signs = Stream.parse(own["signs"], f"{place}.signs")
            if signs.symbols != numel - values.numel or (signs.coding != "bits0" and not dtype.is_floating_point):
                fail(f"{place}.signs", f"expected {numel - values.numel} of {dtype_name}, got {signs.symbols}")
        elif encoding == "codes":
            if not 1 <= count <= 8 or dtype != torch.uint8 or sizes != (stream_bytes(symbols, count),):
                fail(place, f"{symbols} codes of {count} bits make no {dtype_name} {list(sizes)}")
        else:
            if dtype != torch.int32 or len(sizes) != 1 or numel == (0 if encoding == "counts" else -1):
                fail(place, f"{encoding!r} does not go with {dtype_name} {list(sizes)}")
            if encoding == "columns" and count >= number:
                fail(f"{place}.offsets", f"expected the number of an earlier tensor, got {count}")
        return cls(place, dtype, sizes, encoding, crc32, section, count, stream, signs, values)

    def check_positions(self, bound: int) -> None:
        """Refuse more symbols than positions in a weight of ``bound`` entries can have."""
        if self.encoding in ("columns", "counts"):
            assert self.stream is not None
            numbers = self.numel if self.encoding == "columns" else self.numel - 1
            _check_escaped(self.stream.symbols, numbers, bound, f"{self.stream.place}.symbols")

    def decode(self, reader: Reader, earlier: Mapping[int, Tensor]) -> Tensor:
        """The tensor. The caller has judged its size; ``earlier`` holds the tensors that others refer to."""
        data = self._decode(reader, earlier)
        if self.crc32 is not None and _crc32(data) != self.crc32:
            fail(self.place, "the checksum of the decoded tensor is wrong")
        if self.dtype == torch.bool and data.size and data.max() > 1:
            fail(self.place, "expected bytes 0 and 1 in a bool tensor")
        if not data.size:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.from_numpy(data)
        return (flat if self.dtype == torch.uint8 else flat.view(self.dtype)).reshape(self.shape)

    def _decode(self, reader: Reader, earlier: Mapping[int, Tensor]) -> np.ndarray:
        """The bytes, uint8 [nbytes]."""
        if self.encoding == "plain":
            assert self.section is not None
            return reader.read(self.section, f"{self.place}.section")
        stream = cast(Stream, self.stream)
        if self.encoding == "distinct":
            assert self.section is not None
            pattern = _PATTERNS[self.dtype.itemsize]
            table = reader.read(self.section, f"{self.place}.section").view(pattern)
            symbols = stream.decode(reader)
            if symbols.size and int(symbols.max()) >= self.count:
                fail(stream.place, f"expected indices below {self.count}, got {int(symbols.max())}")
            out = _empty(self.numel, pattern)
            np.take(table, symbols, out=out, mode="clip")
            return out.view(np.uint8)
        if self.encoding == "zeros":
            assert self.values is not None
            pattern = _PATTERNS[self.dtype.itemsize]
            gaps = unescape(stream.decode(reader), self.values.numel, stream.place)
            at = np.cumsum(gaps + 1) - 1
            if at.size and int(at[-1]) >= self.numel:
                fail(stream.place, f"expected positions below {self.numel}, got {int(at[-1])}")
            values = self.values.decode(reader, earlier)
            out = _empty(self.numel, pattern)
            out[:] = 0
            if self.signs is not None and self.signs.coding != "bits0":
                signs = self.signs.decode(reader)
                if signs.size and signs.max() > 1:
                    fail(self.signs.place, f"expected 0 and 1, got {signs.max()}")
                zero = np.ones(self.numel, bool)
                zero[at] = False
                out[zero] = signs.astype(pattern) << pattern(8 * self.dtype.itemsize - 1)
            out[at] = values.view(torch.uint8).numpy().view(pattern)
            return out.view(np.uint8)
        if self.encoding == "codes":
            symbols = stream.decode(reader)
            if symbols.size and int(symbols.max()) >> self.count:
                fail(stream.place, f"expected indices of {self.count} bits, got {int(symbols.max())}")
            return pack_bits(torch.from_numpy(symbols), self.count).numpy()
        if self.encoding == "counts":
            numbers = np.cumsum(unescape(stream.decode(reader), self.numel - 1, stream.place))
            _check_int32(numbers, stream.place)
            out = _empty(self.numel, np.int32)
            out[0] = 0
            out[1:] = numbers
            return out.view(np.uint8)
        offsets = _row_offsets(earlier.get(self.count), self.numel, f"{self.place}.offsets")
        numbers = np.cumsum(unescape(stream.decode(reader), self.numel, stream.place) + 1)
        before = np.concatenate([np.zeros(1, np.int64), numbers])[offsets[:-1]]
        numbers -= np.repeat(before, np.diff(offsets)) + 1
        _check_int32(numbers, stream.place)
        out = _empty(self.numel, np.int32)
        out[:] = numbers
        return out.view(np.uint8)


_FIELDS: dict[str, dict[str, type]] = {
    "plain": {"section": dict},
    "distinct": {"crc32": int, "count": int, "section": dict, "indices": dict},
    "zeros": {"crc32": int, "gaps": dict, "signs": dict, "values": dict},
    "codes": {"crc32": int, "bits": int, "indices": dict},
    "columns": {"crc32": int, "offsets": int, "gaps": dict},
    "counts": {"crc32": int, "counts": dict},
}
_STREAMS: dict[str, tuple[str, str | None]] = {  # field of the symbols, field that becomes `count`
    "distinct": ("indices", "count"), "zeros": ("gaps", None), "codes": ("indices", "bits"),
    "columns": ("gaps", "offsets"), "counts": ("counts", None),
}  # fmt: skip


def _crc32(data: np.ndarray) -> int:
    return zlib.crc32(data.data)


def _empty(count: int, dtype: Any) -> np.ndarray:
    """As np.empty, aligned as torch's tensors are."""
    return torch.empty(count * np.dtype(dtype).itemsize, dtype=torch.uint8).numpy().view(dtype)


def _check_escaped(symbols: int, numbers: int, total: int, place: str) -> None:
    """So many numbers that add up to at most ``total``."""
    if not numbers <= symbols <= numbers + total // ESCAPE:
        fail(place, f"expected {numbers} … {numbers + total // ESCAPE}, got {symbols}")


def _check_int32(numbers: np.ndarray, place: str) -> None:
    if numbers.size and int(numbers.max()) > 2**31 - 1:
        fail(place, f"expected positions below 2**31, got {int(numbers.max())}")


def _row_offsets(tensor: Tensor | None, entries: int, place: str) -> np.ndarray:
    """Offsets that `columns` may trust."""
    if tensor is None or tensor.dtype != torch.int32 or tensor.dim() != 1 or tensor.numel() == 0:
        fail(place, "expected the number of a tensor of row offsets")
    offsets = tensor.numpy().astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != entries or (np.diff(offsets) < 0).any():
        fail(place, f"expected non-decreasing offsets from 0 to {entries}")
    return offsets


# --- writing tensors ----------------------------------------------------------------------------------------------


@dataclass
class TensorWriter:
    """The tensors of a file that is being written; one that comes again is stored once.

    Args:
        compress: take the smallest encoding; otherwise every tensor is plain.
    """

    compress: bool
    sections: SectionWriter = field(default_factory=SectionWriter)
    records: list[dict[str, Any]] = field(default_factory=list)
    _known: dict[object, int] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)  # so that no address is given out twice

    def add(self, tensor: Tensor, bits: int | None = None, count: int = 0, offsets: Tensor | None = None,
            counts: bool = False, noise: bool = False) -> int:  # fmt: skip
        """The number of the tensor in the file.

        Args:
            bits: the tensor is a bit stream of ``count`` numbers of so many bits.
            offsets: the tensor holds positions that ascend within the rows of these offsets.
            counts: the tensor holds row offsets.
            noise: the tensor cannot be made smaller.
        """
        key = _identity(tensor)
        if key in self._known:
            return self._known[key]
        host = tensor.detach()
        if host.is_complex():
            host = host.resolve_conj()
        host = host.resolve_neg().cpu().contiguous()
        self._kept += [tensor, host]
        data = host.reshape(-1).view(torch.uint8).numpy()
        record: dict[str, Any] = {"dtype": NAMES[host.dtype], "shape": list(host.shape)}
        if self.compress and not noise:
            if bits is not None:
                record |= self._codes(host, bits, count, data)
            elif offsets is not None:
                record |= self._columns(host, offsets, data)
            elif counts:
                record |= self._counts(host, data)
            else:
                record |= self._values(data, host.dtype)
        else:
            record |= self._plain(data)
        self.records.append(record)
        self._known[key] = len(self.records) - 1
        return self._known[key]

    def _plain(self, data: np.ndarray) -> dict[str, Any]:
        return {"encoding": "plain", "section": self.sections.add(data)}

    def _codes(self, stream: Tensor, bits: int, count: int, data: np.ndarray) -> dict[str, Any]:
        symbols = _Symbols.of(unpack_bits(stream, bits, count).numpy())
        if symbols.nbytes + _RECORD_BYTES >= data.size:
            return self._plain(data)
        return {"encoding": "codes", "crc32": _crc32(data), "bits": bits, "indices": symbols.write(self.sections)}

    def _columns(self, columns: Tensor, offsets: Tensor, data: np.ndarray) -> dict[str, Any]:
        number = self._known[_identity(offsets)]
        positions = columns.numpy().astype(np.int64)
        starts = offsets.detach().cpu().numpy().astype(np.int64)
        before = np.concatenate([np.full(1, -1), positions[:-1]])[: positions.size]
        before[starts[:-1][starts[:-1] < starts[1:]]] = -1
        symbols = _Symbols.of(escape(positions - before - 1))
        if symbols.nbytes + _RECORD_BYTES >= data.size:
            return self._plain(data)
        gaps = symbols.write(self.sections)
        return {"encoding": "columns", "crc32": _crc32(data), "offsets": number, "gaps": gaps}

    def _counts(self, offsets: Tensor, data: np.ndarray) -> dict[str, Any]:
        symbols = _Symbols.of(escape(np.diff(offsets.numpy().astype(np.int64))))
        if symbols.nbytes + _RECORD_BYTES >= data.size:
            return self._plain(data)
        return {"encoding": "counts", "crc32": _crc32(data), "counts": symbols.write(self.sections)}

    def _values(self, data: np.ndarray, dtype: torch.dtype) -> dict[str, Any]:
        pattern = _PATTERNS.get(dtype.itemsize)
        if pattern is None or data.size <= _RECORD_BYTES:
            return self._plain(data)
        elements = data.view(pattern)
        best, best_size = None, data.size - _RECORD_BYTES
        table = distinct(elements)
        if table is not None:
            best = _Distinct.of(elements, table)
            best_size = min(best_size, best.nbytes)
        sign = pattern(1 << (8 * dtype.itemsize - 1)) if dtype.is_floating_point else pattern(0)
        nonzero = (elements & ~sign) != 0
        stored = int(np.count_nonzero(nonzero))
        if 4 * stored <= 3 * elements.size:
            at = np.flatnonzero(nonzero)
            gaps = _Symbols.of(escape(np.diff(at, prepend=np.int64(-1)) - 1))
            values = elements[at]
            table = distinct(values)
            inner = None if table is None or not stored else _Distinct.of(values, table)
            if inner is not None and inner.nbytes + _RECORD_BYTES >= values.nbytes:
                inner = None
            signs = _Symbols.of((elements[~nonzero] != 0).view(np.uint8))
            size = gaps.nbytes + signs.nbytes + _RECORD_BYTES + (values.nbytes if inner is None else inner.nbytes)
            if size < best_size:
                record = {"encoding": "zeros", "crc32": _crc32(data), "gaps": gaps.write(self.sections),
                          "signs": signs.write(self.sections)}  # fmt: skip
                body = values.view(np.uint8)
                own = self._plain(body) if inner is None else inner.write(self.sections)
                return {**record, "values": {"dtype": NAMES[dtype], "shape": [stored], **own}}
        if best is None or best_size != best.nbytes:
            return self._plain(data)
        return best.write(self.sections)


def _identity(tensor: Tensor) -> object:
    """Equal for tensors that are the same memory seen in the same way, and for nothing else."""
    if tensor.numel() == 0 or tensor.data_ptr() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()


def distinct(elements: np.ndarray) -> np.ndarray | None:
    """The ascending distinct elements if they are at most 256, else None."""
    found = np.unique(elements[:: max(1, elements.size // _SAMPLE)])
    for part in np.array_split(elements, max(1, elements.size >> 20)):
        if found.size > 256:
            return None
        others = (
            part[found[np.searchsorted(found, part).clip(max=max(0, found.size - 1))] != part] if part.size else part
        )
        if others.size:
            found = np.union1d(found, np.unique(others))
    return found if found.size <= 256 else None


@dataclass(frozen=True)
class _Distinct:
    """Elements to be written as indices into a table."""

    table: np.ndarray
    symbols: _Symbols
    crc32: int

    @classmethod
    def of(cls, elements: np.ndarray, table: np.ndarray) -> _Distinct:
        symbols = _Symbols.of(np.searchsorted(table, elements).astype(np.uint8))
        return cls(table, symbols, _crc32(elements.view(np.uint8)))

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + self.symbols.nbytes + _RECORD_BYTES

    def write(self, sections: SectionWriter) -> dict[str, Any]:
        table = sections.add(self.table.view(np.uint8))
        indices = self.symbols.write(sections)
        return {"encoding": "distinct", "crc32": self.crc32, "count": self.table.size, "section": table,
                "indices": indices}  # fmt: skip


def parse_tensors(records: Sequence[Any]) -> list[TensorRecord]:
    """The tensors of a header, each checked for itself."""
    return [TensorRecord.parse(record, f"tensors[{number}]", number) for number, record in enumerate(records)]
