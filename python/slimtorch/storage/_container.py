# SPDX-License-Identifier: Apache-2.0
"""The bytes of a .slim file: prologue, header, sections. What they mean is the business of the other files.

      0  magic       89 53 4C 49 4D 0D 0A 1A, ".SLIM", return, newline, end of text
      8  version     u32
     12  checksum    u32, CRC-32 of the file up to the end of the header, these four bytes left out
     16  stored      u32, bytes of the header as it lies here
     20  length      u32, bytes of the header; the same as `stored`, or else it is deflated (zlib)
     24  header      JSON
         zeros       to a multiple of 8
         sections    each at a multiple of 8, zeros between, in the order of the header; the last one ends the file

Everything that is read is checked before it is believed: sizes against the file's own size, before memory is asked for,
and every byte counts, so that no change of a single one goes unseen.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch

MAGIC = b"\x89SLIM\r\n\x1a"
VERSION = 2  # of the newest files; a file has the least that it needs
ALIGNMENT = 8
PROLOGUE = struct.Struct("<8sIIII")
HEADER_LIMIT = 16 << 20  # bytes; some 100,000 tensors
_BYTES_PER_VALUE = 4  # of JSON, taken over a whole header: a real one has three times as many
_SMALL_FILE = 1 << 20  # read at once

Buffer = Any  # bytes, or a flat uint8 array


class FormatError(ValueError):
    """A .slim file that is damaged, of a newer version, or made for another model; the message says where."""


def fail(place: str, message: str) -> NoReturn:
    raise FormatError(f"{place}: {message}")


# --- JSON that is believed in nothing -----------------------------------------------------------------------------


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        fail("header", f"the field {repeated!r} occurs twice in one object")
    return found


def _integer(text: str) -> int:
    if len(text) > 20:
        fail("header", f"a number of {len(text)} digits")
    return int(text)


def _no_number(text: str) -> NoReturn:
    fail("header", f"expected whole numbers only, got {text[:40]}")


def parse_json(data: bytes) -> dict[str, Any]:
    """The header as an object of strings, whole numbers, booleans, nulls, lists and objects; else FormatError."""
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > 64 + len(data) // _BYTES_PER_VALUE:
        fail("header", f"{values} values in {len(data)} bytes")  # each takes memory, far more than its bytes
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        fail("header", f"not UTF-8 at byte {error.start}")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_no_duplicates, parse_int=_integer, parse_float=_no_number, parse_constant=_no_number,
        )  # fmt: skip
    except RecursionError:
        fail("header", "nested too deeply")
    except json.JSONDecodeError as error:
        fail("header", f"not JSON: {error.msg} at character {error.pos}")
    if not isinstance(value, dict):
        fail("header", f"expected an object, got {type(value).__name__}")
    return value


def take(record: Any, place: str, **kinds: type | tuple[type, ...]) -> list[Any]:
    """The fields of an object in the order asked for: all of them, no others, each of its type (bool is no int)."""
    if type(record) is not dict:
        fail(place, f"expected an object, got {type(record).__name__}")
    if record.keys() != kinds.keys():
        missing, surplus = kinds.keys() - record.keys(), record.keys() - kinds.keys()
        problem = "misses" if missing else "has the unknown"
        fail(place, f"{problem} field {min(missing or surplus)!r}")
    for name, kind in kinds.items():
        value = record[name]
        if type(value) not in (kind if isinstance(kind, tuple) else (kind,)):
            fail(f"{place}.{name}", f"unexpected {type(value).__name__} {value!r:.40}")
    return [record[name] for name in kinds]


def natural(value: Any, place: str, limit: int = 1 << 48) -> int:
    """``value`` if it is a whole number in [0, limit]."""
    if type(value) is not int:
        fail(place, f"expected a whole number, got {value!r:.40}")
    if not 0 <= value <= limit:
        fail(place, f"expected 0 … {limit}, got {value}")
    return value


def naturals(value: Any, place: str, limit: int = 1 << 48) -> tuple[int, ...]:
    """``value`` if it is a list of at most 16 whole numbers in [0, limit]."""
    if type(value) is not list or len(value) > 16:
        fail(place, f"expected a list of at most 16 numbers, got {value!r:.40}")
    return tuple([natural(item, place, limit) for item in value])


# --- sections -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """Bytes ``[offset, offset + length)`` counted from the first section's place, and their CRC-32."""

    offset: int
    length: int
    crc32: int

    @classmethod
    def parse(cls, record: Any, place: str) -> Section:
        offset, length, crc32 = take(record, place, offset=int, length=int, crc32=int)
        return cls(
            natural(offset, f"{place}.offset"), natural(length, f"{place}.length"),
            natural(crc32, f"{place}.crc32", 0xFFFFFFFF),
        )  # fmt: skip


class SectionWriter:
    """Collects sections; keeps what it is given without a copy."""

    def __init__(self) -> None:
        self.parts: list[Buffer] = []
        self.end = 0

    def add(self, data: Buffer) -> dict[str, int]:
        """The record of a new section with these bytes."""
        gap = -self.end % ALIGNMENT
        if gap:
            self.parts.append(bytes(gap))
        offset, length = self.end + gap, len(data)
        self.parts.append(data)
        self.end = offset + length
        return {"offset": offset, "length": length, "crc32": zlib.crc32(data)}


def _align(position: int) -> int:
    return position + -position % ALIGNMENT


class Reader:
    """An open file whose prologue and header have been read and found good.

    Attributes:
        header: the parsed JSON.
        size: of the file, in bytes.
    """

    def __init__(self, file: BinaryIO, header_limit: int = HEADER_LIMIT) -> None:
        self.size = os.fstat(file.fileno()).st_size
        self._file: Any = io.BytesIO(file.read(self.size)) if self.size <= _SMALL_FILE else file
        prologue = self._file.read(PROLOGUE.size)
        if prologue[: len(MAGIC)] != MAGIC[: len(prologue)] or not prologue:
            fail("byte 0", "this is no .slim file")
        if len(prologue) < PROLOGUE.size:
            fail(f"byte {len(prologue)}", "the file ends within its first fields")
        _, version, checksum, stored, length = PROLOGUE.unpack(prologue)
        self.version = version
        if version > VERSION:
            fail("byte 8", f"the file has version {version}, this library reads up to {VERSION}: use a newer slimtorch")
        if version < 1:
            fail("byte 8", f"expected a version from 1 on, got {version}")
        if stored > self.size - PROLOGUE.size:
            fail("byte 16", f"a header of {stored} bytes in a file of {self.size}")
        if length > header_limit or length < stored:
            fail("byte 20", f"expected a header of {stored} … {header_limit} bytes, got {length}")
        data = self._read(PROLOGUE.size, stored, "header")
        if zlib.crc32(data, zlib.crc32(prologue[16:], zlib.crc32(prologue[:12]))) != checksum:
            fail("byte 12", "the checksum of the header is wrong: the file is damaged")
        self.header = parse_json(data if stored == length else _inflate(data, length))
        self._base = _align(PROLOGUE.size + stored)
        self._end = PROLOGUE.size + stored  # up to where bytes are accounted for

    def _read(self, position: int, length: int, place: str) -> bytes:
        self._file.seek(position)
        data = self._file.read(length)
        if len(data) != length:
            fail(f"byte {position + len(data)}", f"the file ends within {place}")
        return data

    def check_layout(self, sections: Sequence[Section], places: Sequence[str]) -> None:
        """Sections must follow one another with nothing between but zeros, up to the end of the file."""
        end = 0
        for section, place in zip(sections, places, strict=True):
            if section.offset != _align(end):
                fail(f"{place}.offset", f"expected {_align(end)}, got {section.offset}")
            end = section.offset + section.length
            if self._base + end > self.size:
                fail(f"{place}.length", f"the section ends at byte {self._base + end} of a file of {self.size}")
        whole = self._base + end if sections else self._end
        if whole != self.size:
            fail(f"byte {whole}", f"expected the end of the file, got {self.size - whole} more bytes")
        for section, place in zip(sections, places, strict=True):
            start = self._base + section.offset
            if start > self._end and any(self._read(self._end, start - self._end, place)):
                fail(f"byte {self._end}", "expected zeros between sections")
            self._end = start + section.length

    def read(self, section: Section, place: str) -> np.ndarray:
        """The bytes of a section, uint8 [length], checked by their CRC."""
        data: np.ndarray = torch.empty(section.length, dtype=torch.uint8).numpy()  # aligned as torch's own tensors are
        self._file.seek(self._base + section.offset)
        view = data.data
        done = 0
        while done < section.length:
            got = self._file.readinto(view[done:])
            if not got:
                fail(place, "the file ends within the section")
            done += got
        if zlib.crc32(view) != section.crc32:
            fail(f"{place} (bytes {self._base + section.offset} … {self._base + section.offset + section.length})",
                 "the checksum is wrong: the file is damaged")  # fmt: skip
        return data


def _inflate(data: bytes, length: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(data, length + 1)
    except zlib.error as error:
        fail("header", f"cannot be inflated: {error}")
    if len(text) != length or not stream.eof or stream.unused_data:
        fail("header", f"does not inflate to {length} bytes")
    return text


# --- writing ------------------------------------------------------------------------------------------------------


def write(
    path: str, header: dict[str, Any], sections: SectionWriter, *, deflate: bool, version: int = VERSION
) -> int:
    """Write the file to a temporary name and rename it: ``path`` is the old file or the new one. Returns its size."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"model: its description takes {len(text)} bytes, more than the {HEADER_LIMIT} of a header")
    stored = zlib.compress(text, 9) if deflate else text
    if len(stored) >= len(text):
        stored = text
    sizes = struct.pack("<II", len(stored), len(text))
    start = struct.pack("<8sI", MAGIC, version)
    checksum = zlib.crc32(stored, zlib.crc32(sizes, zlib.crc32(start)))
    head = start + struct.pack("<I", checksum) + sizes + stored
    parts = [head]
    if sections.parts:
        parts += [bytes(-len(head) % ALIGNMENT), *sections.parts]
    _write_atomically(os.path.realpath(path), parts)
    return sum(len(part) for part in parts)


def _write_atomically(path: str, parts: Sequence[Buffer]) -> None:
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(6)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            os.chmod(temporary, os.stat(path).st_mode & 0o7777)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Make the rename last through a power cut, where the system lets one."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
