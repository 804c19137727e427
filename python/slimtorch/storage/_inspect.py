# SPDX-License-Identifier: Apache-2.0
"""What is in a file, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimtorch.formats._bits import unpack_bits
from slimtorch.formats._common import matrix_shape
from slimtorch.formats.sparse_codebook import SKIP
from slimtorch.report import Table, format_bytes
from slimtorch.storage._container import Reader
from slimtorch.storage._encodings import NAMES, TensorRecord, escape
from slimtorch.storage._records import REPLACED, LayerRecord

_DECODE_LIMIT = 1 << 28  # bytes of a tensor that is decoded to be looked at


@dataclass(frozen=True)
class TensorReport:
    """One tensor.

    Attributes:
        name: in its layer.
        dtype: as torch names it.
        shape: decoded.
        encoding: how it is stored.
        codings: of its parts, "plain" for bytes as they are.
        stored_bytes: in the file.
        decoded_bytes: in memory.
        shared: whether an earlier layer has the same one, which is stored once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    codings: list[str]
    stored_bytes: int
    decoded_bytes: int
    shared: bool


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: in the model, "" for a bare layer.
        kind: "Linear" and so on.
        format: of the weight; "replaced" where another layer, `kind`, stands in place of a dense one.
        shape: of the dense weight, or of the first tensor; None where there is none.
        density: stored weights over weights.
        bits: of a stored weight, without its position.
        index_entropy: bits per index into a table, None where there are none.
        gap_entropy: bits per position gap, None where there are none.
        stored_bytes: in the file, shared tensors only at the first of their layers.
        dense_bytes: the same layer dense, in float32.
        tensors: each of them.
    """

    name: str
    kind: str
    format: str
    shape: tuple[int, ...] | None
    density: float
    bits: int
    index_entropy: float | None
    gap_entropy: float | None
    stored_bytes: int
    dense_bytes: int
    tensors: list[TensorReport]


@dataclass(frozen=True)
class FileReport:
    """The answer of :func:`slimtorch.storage.inspect`; prints as a table.

    Attributes:
        path: as given.
        version: of the file format.
        library: version of slimtorch that wrote the file.
        file_bytes: all of it.
        header_bytes: what is no tensor: names, sizes, checksums, padding.
        layers: in the model's order.
    """

    path: str
    version: int
    library: str
    file_bytes: int
    header_bytes: int
    layers: list[LayerReport]

    @property
    def dense_bytes(self) -> int:
        """The whole model dense, in float32."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Dense float32 bytes over bytes of the file."""
        return self.dense_bytes / self.file_bytes

    def table(self) -> Table:
        """One row per layer and a total."""
        rows: list[list[object]] = []
        for layer in self.layers:
            codings = dict.fromkeys(coding for tensor in layer.tensors for coding in tensor.codings)
            rows.append([
                layer.name or "(model)", layer.format if layer.format != "dense" else layer.kind,
                "×".join(map(str, layer.shape)) if layer.shape else None, f"{layer.density:.1%}", layer.bits,
                _bits(layer.index_entropy), _bits(layer.gap_entropy), format_bytes(layer.stored_bytes),
                format_bytes(layer.dense_bytes),
                f"{layer.dense_bytes / max(1, layer.stored_bytes):.1f}x" if layer.tensors else None,
                " ".join(codings),
            ])  # fmt: skip
        rows.append([
            "whole file", "", "", "", "", "", "", format_bytes(self.file_bytes), format_bytes(self.dense_bytes),
            f"{self.ratio:.1f}x", "",
        ])  # fmt: skip
        columns = ["layer", "format", "shape", "kept", "bits", "index", "gap", "stored", "float32", "ratio", "coding"]
        notes = [
            f"header and padding: {format_bytes(self.header_bytes)}; file version {self.version}, "
            f"written by slimtorch {self.library!r:.40}",
            "bits: of a stored weight; index, gap: entropy in bits of indices and position gaps",
        ]
        return Table(self.path, columns, rows, notes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "dense_bytes": self.dense_bytes, "ratio": self.ratio}

    def __str__(self) -> str:
        return str(self.table())


def _bits(entropy: float | None) -> str | None:
    return None if entropy is None else f"{entropy:.2f}"


def examine(path: str, reader: Reader, layers: Sequence[LayerRecord], tensors: Sequence[TensorRecord]) -> FileReport:
    """Every layer of a file whose header and layout are sound; decodes what fits into a modest amount of memory."""
    for tensor in tensors:
        for section, place in tensor.sections():
            reader.read(section, place)
    decoded: dict[int, Tensor] = {}
    for number, tensor in enumerate(tensors):
        if tensor.dtype in (torch.int32, torch.uint8) and tensor.nbytes <= _DECODE_LIMIT:
            decoded[number] = tensor.decode(reader, decoded)
    seen: set[int] = set()
    reports = []
    for layer in layers:
        reports.append(_layer(layer, tensors, decoded, seen))
        seen.update(layer.numbers.values())
    stored = sum(tensor.stored_bytes for tensor in tensors)
    header = reader.header
    return FileReport(path, reader.version, header["library"], reader.size, reader.size - stored, reports)


def _layer(
    layer: LayerRecord, tensors: Sequence[TensorRecord], decoded: dict[int, Tensor], seen: set[int]
) -> LayerReport:
    mine = {name: tensors[number] for name, number in layer.numbers.items()}
    reports = [
        TensorReport(
            name, NAMES[tensor.dtype], tensor.shape, tensor.encoding, tensor.codings,
            0 if layer.numbers[name] in seen else tensor.stored_bytes, tensor.nbytes, layer.numbers[name] in seen,
        )
        for name, tensor in mine.items()
    ]  # fmt: skip
    stored = sum(report.stored_bytes for report in reports)
    first = mine.get("weight") or next(iter(mine.values()), None)
    if layer.format in ("dense", REPLACED):
        dense = sum(4 * tensor.numel for number, tensor in _own(layer, tensors) if number not in seen)
        density, bits = 1.0, 0 if first is None else 8 * first.dtype.itemsize
        if first is not None and first.values is not None:
            density = first.values.numel / max(1, first.numel)
        shape = None if first is None else first.shape
        return LayerReport(
            layer.name, layer.kind, layer.format, shape, density, bits, None, None, stored, dense, reports
        )
    shape = layer.shape
    weights = math.prod(shape)
    dense = 4 * (weights + (mine["bias"].numel if "bias" in mine else 0))
    has = {name: decoded[number] for name, number in layer.numbers.items() if number in decoded}
    density, bits, index, gap = _figures(layer, mine, has, weights)
    return LayerReport(layer.name, layer.kind, layer.format, shape, density, bits, index, gap, stored, dense, reports)


def _own(layer: LayerRecord, tensors: Sequence[TensorRecord]) -> list[tuple[int, TensorRecord]]:
    return [(number, tensors[number]) for number in dict.fromkeys(layer.numbers.values())]


def _figures(
    layer: LayerRecord, mine: dict[str, TensorRecord], has: dict[str, Tensor], weights: int
) -> tuple[float, int, float | None, float | None]:
    """Density, bits of a weight, entropy of indices, entropy of gaps."""
    rows, width = matrix_shape(layer.shape)
    options = layer.options
    if layer.format == "binary":
        return 1.0, 1, None, None
    if layer.format == "codebook":
        codes = has.get("codes")
        index = None if codes is None else entropy(unpack_bits(codes, options["bits"], rows * width).numpy())
        return 1.0, options["bits"], index, None
    if layer.format == "sparse_codebook":
        if "gaps" not in has or "codes" not in has:
            return mine["gaps"].numel / max(1, weights), options["bits"], None, None
        gaps = has["gaps"].numpy()
        codes = unpack_bits(has["codes"], options["bits"], gaps.size).numpy()[gaps != SKIP]
        return codes.size / max(1, weights), options["bits"], entropy(codes), entropy(gaps)
    columns, offsets = (
        ("columns", "row_offsets") if layer.format == "sparse" else ("block_columns", "block_row_offsets")
    )
    gap = None
    if columns in has and offsets in has:
        gap = _gap_entropy(has[columns].numpy().astype(np.int64), has[offsets].numpy().astype(np.int64))
    values = mine["values"]
    stored = min(values.numel, weights) / max(1, weights)
    return stored, 8 * values.dtype.itemsize, None, gap


def _gap_entropy(columns: np.ndarray, offsets: np.ndarray) -> float | None:
    """Of the gaps between positions within rows; None where the positions are not sound."""
    if offsets[0] != 0 or offsets[-1] != columns.size or (np.diff(offsets) < 0).any():
        return None
    gaps = np.diff(columns, prepend=np.int64(-1)) - 1
    starts = offsets[:-1][offsets[:-1] < offsets[1:]]
    gaps[starts] = columns[starts]
    if gaps.size and (gaps.min() < 0 or gaps.max() > 1 << 20):
        return None
    return entropy(escape(gaps))


def entropy(symbols: np.ndarray) -> float:
    """Of numbers below 256 by their frequencies, in bits per number; 0 where there are none."""
    counts = np.bincount(symbols, minlength=1)
    shares = counts[counts > 0] / max(1, symbols.size)
    return float(max(0.0, -(shares * np.log2(shares)).sum()))
