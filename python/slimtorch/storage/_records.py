# SPDX-License-Identifier: Apache-2.0
"""What a file says of each layer, and what of it can be checked without a model.

A record has the name of the layer in the model, its kind ("Linear"), the format of its weight ("dense", "sparse", …),
the geometry that its constructor takes, the options of the format, and the number of each of its tensors.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtorch.design import DepthwiseSeparableConv2d, LowRankConv2d, LowRankLinear
from slimtorch.formats import Binary, BlockSparse, Codebook, Format, Sparse, SparseCodebook
from slimtorch.formats._bits import stream_bytes
from slimtorch.formats._common import INDEX_LIMIT, matrix_shape
from slimtorch.formats.block_sparse import MAX_BLOCK
from slimtorch.formats.codebook import check_group_size, table_count
from slimtorch.nn import (
    BinaryConv2d,
    BinaryLinear,
    BlockSparseConv2d,
    BlockSparseLinear,
    CodebookConv2d,
    CodebookLinear,
    PackedLayer,
    SparseCodebookConv2d,
    SparseCodebookLinear,
    SparseConv2d,
    SparseLinear,
)
from slimtorch.nn._packed import PackedConv2d, PackedLinear
from slimtorch.storage._container import FormatError, fail, natural, naturals, take
from slimtorch.storage._encodings import TensorRecord, TensorWriter

Geometry = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


# --- kinds of layers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A class of torch.nn whose tensors follow from a few numbers.

    Attributes:
        name: in files.
        types: the classes.
        sized: attributes that removing channels changes: whole numbers, or tuples of them.
        fixed: attributes that must be those of the model.
        shapes: geometry to the shape of each tensor that the layer may have.
    """

    name: str
    types: tuple[type[nn.Module], ...]
    sized: tuple[str, ...]
    fixed: tuple[str, ...]
    shapes: Callable[[Geometry], Shapes]

    def geometry(self, module: nn.Module) -> Geometry:
        """The geometry of a layer, JSON-ready."""
        return {name: _jsonable(getattr(module, name)) for name in (*self.sized, *self.fixed)}


def _jsonable(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [int(item) for item in value]
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value


def _same(names: tuple[str, ...], size: tuple[int, ...]) -> Shapes:
    return dict.fromkeys(names, size)


def _conv(g: Geometry) -> Shapes:
    groups = _divides(g)
    weight = (g["out_channels"], g["in_channels"] // groups, *g["kernel_size"])
    return {"weight": weight, "bias": (g["out_channels"],)}


def _conv_transpose(g: Geometry) -> Shapes:
    groups = _divides(g)
    weight = (g["in_channels"], g["out_channels"] // groups, *g["kernel_size"])
    return {"weight": weight, "bias": (g["out_channels"],)}


def _divides(g: Geometry) -> int:
    groups = g["groups"]
    if groups < 1 or g["in_channels"] % groups or g["out_channels"] % groups:
        fail("geometry", f"{groups} groups do not divide {g['in_channels']} and {g['out_channels']} channels")
    return cast(int, groups)


def _group_norm(g: Geometry) -> Shapes:
    if g["num_groups"] < 1 or g["num_channels"] % g["num_groups"]:
        fail("geometry", f"{g['num_groups']} groups do not divide {g['num_channels']} channels")
    return _same(("weight", "bias"), (g["num_channels"],))


def _running(g: Geometry) -> Shapes:
    names = ("weight", "bias", "running_mean", "running_var")
    return {**_same(names, (g["num_features"],)), "num_batches_tracked": ()}


_CHANNELS = ("in_channels", "out_channels", "groups")
_WINDOW = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
_KINDS = (
    Kind("Linear", (nn.Linear, PackedLinear), ("in_features", "out_features"), (),
         lambda g: {"weight": (g["out_features"], g["in_features"]), "bias": (g["out_features"],)}),
    Kind("Conv1d", (nn.Conv1d,), _CHANNELS, _WINDOW, _conv),
    Kind("Conv2d", (nn.Conv2d, PackedConv2d), _CHANNELS, _WINDOW, _conv),
    Kind("Conv3d", (nn.Conv3d,), _CHANNELS, _WINDOW, _conv),
    Kind("ConvTranspose1d", (nn.ConvTranspose1d,), _CHANNELS, (*_WINDOW, "output_padding"), _conv_transpose),
    Kind("ConvTranspose2d", (nn.ConvTranspose2d,), _CHANNELS, (*_WINDOW, "output_padding"), _conv_transpose),
    Kind("ConvTranspose3d", (nn.ConvTranspose3d,), _CHANNELS, (*_WINDOW, "output_padding"), _conv_transpose),
    Kind("BatchNorm", (nn.modules.batchnorm._BatchNorm,), ("num_features",), (), _running),
    Kind("InstanceNorm", (nn.modules.instancenorm._InstanceNorm,), ("num_features",), (), _running),
    Kind("GroupNorm", (nn.GroupNorm,), ("num_groups", "num_channels"), (), _group_norm),
    Kind("LayerNorm", (nn.LayerNorm,), ("normalized_shape",), (),
         lambda g: _same(("weight", "bias"), tuple(g["normalized_shape"]))),
    Kind("RMSNorm", (nn.RMSNorm,), ("normalized_shape",), (), lambda g: {"weight": tuple(g["normalized_shape"])}),
    Kind("Embedding", (nn.Embedding, nn.EmbeddingBag), ("num_embeddings", "embedding_dim"), (),
         lambda g: {"weight": (g["num_embeddings"], g["embedding_dim"])}),
    Kind("PReLU", (nn.PReLU,), ("num_parameters",), (), lambda g: {"weight": (g["num_parameters"],)}),
)  # fmt: skip
KINDS = {kind.name: kind for kind in _KINDS}


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a layer, None where it is none of those known."""
    for base in type(module).__mro__:
        for kind in _KINDS:
            if base in kind.types:
                return kind
    return None


# --- formats of weights -------------------------------------------------------------------------------------------

_SIZE = (type(None), str, int)


@dataclass(frozen=True)
class Family:
    """A format and the two layers that hold it.

    Attributes:
        name: in files.
        layers: kind of layer -> class.
        values: the field that is the layer's parameter.
        options: field of the record -> types, beside the activation.
        write: stores the format's tensors.
        check: refuses a record whose tensors do not fit its shape and options, before anything is decoded.
        build: the format from its tensors.
    """

    name: str
    layers: dict[str, type[PackedLayer]]
    values: str
    options: dict[str, tuple[type, ...]]
    write: Callable[[TensorWriter, Any], dict[str, int]]
    check: Callable[[LayerRecord, Mapping[str, TensorRecord]], None]
    build: Callable[[LayerRecord, dict[str, Tensor]], Format]


def _write_sparse(writer: TensorWriter, held: Sparse) -> dict[str, int]:
    return {
        "row_offsets": writer.add(held.row_offsets, counts=True),
        "columns": writer.add(held.columns, offsets=held.row_offsets),
        "values": writer.add(held.values),
    }


def _check_sparse(record: LayerRecord, tensors: Mapping[str, TensorRecord]) -> None:
    rows, width = matrix_shape(record.shape)
    stored = tensors["values"].numel
    if stored > rows * width:
        fail(tensors["values"].place, f"{stored} values in a weight of {rows * width}")
    _expect(tensors, "values", (stored,), None)
    _expect(tensors, "columns", (stored,), torch.int32, rows * width)
    _expect(tensors, "row_offsets", (rows + 1,), torch.int32, rows * width)


def _write_block_sparse(writer: TensorWriter, held: BlockSparse) -> dict[str, int]:
    return {
        "block_row_offsets": writer.add(held.block_row_offsets, counts=True),
        "block_columns": writer.add(held.block_columns, offsets=held.block_row_offsets),
        "values": writer.add(held.values),
    }


def _check_block_sparse(record: LayerRecord, tensors: Mapping[str, TensorRecord]) -> None:
    rows, width = matrix_shape(record.shape)
    place = f"{record.place}.options.block_size"
    sizes = naturals(record.options["block_size"], place, MAX_BLOCK)
    if len(sizes) != 2 or not all(sizes):
        fail(place, f"expected two numbers in 1 … {MAX_BLOCK}, got {list(sizes)}")
    down, across = -(-rows // sizes[0]), -(-width // sizes[1])
    stored = tensors["block_columns"].numel
    if stored > down * across:
        fail(tensors["block_columns"].place, f"{stored} blocks in a weight of {down * across}")
    _expect(tensors, "values", (stored, *sizes), None)
    _expect(tensors, "block_columns", (stored,), torch.int32, down * across)
    _expect(tensors, "block_row_offsets", (down + 1,), torch.int32, down * across)


def _write_codebook(writer: TensorWriter, held: Codebook) -> dict[str, int]:
    rows, width = matrix_shape(held.shape)
    return {
        "codes": writer.add(held.codes, bits=held.bits, count=rows * width),
        "codebook": writer.add(held.codebook),
    }


def _check_codebook(record: LayerRecord, tensors: Mapping[str, TensorRecord]) -> None:
    rows, width = matrix_shape(record.shape)
    bits = _check_tables(record, tensors)
    _expect(tensors, "codes", (stream_bytes(rows * width, bits),), torch.uint8)


def _check_tables(record: LayerRecord, tensors: Mapping[str, TensorRecord]) -> int:
    """Bits and group size, and the tables that follow from them; returns the bits."""
    rows, width = matrix_shape(record.shape)
    bits = natural(record.options["bits"], f"{record.place}.options.bits", 8)
    if bits < 1:
        fail(f"{record.place}.options.bits", "expected 1 … 8, got 0")
    group = record.options["group_size"]
    try:
        check_group_size(group, None if rows * width == 0 else width)
    except (TypeError, ValueError) as error:
        fail(f"{record.place}.options", str(error))
    _expect(tensors, "codebook", (table_count(record.shape, group), 1 << bits), None)
    return bits


def _write_sparse_codebook(writer: TensorWriter, held: SparseCodebook) -> dict[str, int]:
    entries = held.gaps.numel()
    return {
        "row_offsets": writer.add(held.row_offsets, counts=True),
        "gaps": writer.add(held.gaps, bits=8, count=entries),
        "codes": writer.add(held.codes, bits=held.bits, count=entries),
        "codebook": writer.add(held.codebook),
    }


def _check_sparse_codebook(record: LayerRecord, tensors: Mapping[str, TensorRecord]) -> None:
    rows, width = matrix_shape(record.shape)
    bits = _check_tables(record, tensors)
    entries = tensors["gaps"].numel
    if entries > rows * width:  # each moves on by a column at least
        fail(tensors["gaps"].place, f"{entries} entries in a weight of {rows * width}")
    _expect(tensors, "gaps", (entries,), torch.uint8)
    _expect(tensors, "row_offsets", (rows + 1,), torch.int32, rows * width)
    _expect(tensors, "codes", (stream_bytes(entries, bits),), torch.uint8)


def _write_binary(writer: TensorWriter, held: Binary) -> dict[str, int]:
    return {"signs": writer.add(held.signs, noise=True), "scale": writer.add(held.scale)}


def _check_binary(record: LayerRecord, tensors: Mapping[str, TensorRecord]) -> None:
    rows, width = matrix_shape(record.shape)
    _expect(tensors, "signs", (stream_bytes(rows * width, 1),), torch.uint8)
    _expect(tensors, "scale", (rows,), None)


def _expect(
    tensors: Mapping[str, TensorRecord], name: str, shape: tuple[int, ...], dtype: torch.dtype | None, bound: int = 0
) -> None:
    """``tensors[name]`` must have this shape and dtype (None: some floating one)."""
    tensor = tensors[name]
    if tensor.shape != shape:
        fail(f"{tensor.place}.shape", f"expected {list(shape)} of {name!r}, got {list(tensor.shape)}")
    if tensor.dtype != dtype if dtype is not None else not tensor.dtype.is_floating_point:
        fail(f"{tensor.place}.dtype", f"expected {dtype or 'floating point'} of {name!r}, got {tensor.dtype}")
    tensor.check_positions(bound)


_FAMILIES = (
    Family(
        "sparse", {"Linear": SparseLinear, "Conv2d": SparseConv2d}, "values", {}, _write_sparse, _check_sparse,
        lambda r, t: Sparse(t["values"], t["columns"], t["row_offsets"], r.shape),
    ),
    Family(
        "block_sparse", {"Linear": BlockSparseLinear, "Conv2d": BlockSparseConv2d}, "values", {"block_size": (list,)},
        _write_block_sparse, _check_block_sparse,
        lambda r, t: BlockSparse(
            t["values"], t["block_columns"], t["block_row_offsets"], r.shape,
            cast("tuple[int, int]", tuple(r.options["block_size"])),
        ),
    ),
    Family(
        "codebook", {"Linear": CodebookLinear, "Conv2d": CodebookConv2d}, "codebook",
        {"bits": (int,), "group_size": _SIZE, "zero": (bool,)}, _write_codebook, _check_codebook,
        lambda r, t: Codebook(
            t["codebook"], t["codes"], r.shape, r.options["bits"], r.options["group_size"], r.options["zero"]
        ),
    ),
    Family(
        "sparse_codebook", {"Linear": SparseCodebookLinear, "Conv2d": SparseCodebookConv2d}, "codebook",
        {"bits": (int,), "group_size": _SIZE}, _write_sparse_codebook, _check_sparse_codebook,
        lambda r, t: SparseCodebook(
            t["codebook"], t["codes"], t["gaps"], t["row_offsets"], r.shape, r.options["bits"], r.options["group_size"]
        ),
    ),
    Family(
        "binary", {"Linear": BinaryLinear, "Conv2d": BinaryConv2d}, "scale",
        {"binarize_input": (bool,), "scale": (bool,)}, _write_binary, _check_binary,
        lambda r, t: Binary(t["signs"], t["scale"], r.shape),
    ),
)  # fmt: skip
FAMILIES = {family.name: family for family in _FAMILIES}
_TENSORS = {
    "sparse": ("row_offsets", "columns", "values"),
    "block_sparse": ("block_row_offsets", "block_columns", "values"),
    "codebook": ("codes", "codebook"),
    "sparse_codebook": ("row_offsets", "gaps", "codes", "codebook"),
    "binary": ("signs", "scale"),
}


def family_of(layer: PackedLayer) -> Family:
    """The family of a packed layer; TypeError where it is of none."""
    for family in _FAMILIES:
        if isinstance(layer, tuple(family.layers.values())):
            return family
    raise TypeError(f"{type(layer).__name__} is no packed layer that files know")


def options_of(layer: PackedLayer) -> dict[str, Any]:
    """The options of a packed layer as a record has them."""
    options: dict[str, Any] = {"activation": layer.activation}
    for name in family_of(layer).options:
        options[name] = _jsonable(getattr(layer, "scaled" if name == "scale" else name))
    return options


# --- layers in place of dense ones ------------------------------------------------------------------------------------

REPLACED = "replaced"  # the format of their records, which have no tensors: those are in the records of the parts
REPLACEMENTS: dict[str, Any] = {
    kind.__name__: kind for kind in (LowRankLinear, LowRankConv2d, DepthwiseSeparableConv2d)
}


def stand_in(kind: str, geometry: Geometry, place: str) -> nn.Module:
    """A layer of this geometry without memory; FormatError where there is none."""
    if kind not in REPLACEMENTS:
        fail(f"{place}.kind", f"expected {', '.join(REPLACEMENTS)}, got {kind!r:.40}")
    try:
        return cast(nn.Module, REPLACEMENTS[kind].from_geometry(geometry, device="meta"))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        fail(f"{place}.geometry", str(error).splitlines()[0][:200] if str(error) else type(error).__name__)


def version_of(layers: Sequence[Mapping[str, Any]]) -> int:
    """The first version of the format that can say what these records do."""
    return 2 if any(layer["format"] == REPLACED for layer in layers) else 1


# --- records ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerRecord:
    """What the header says of one layer.

    Attributes:
        place: in the header, for messages.
        name: in the model, "" for a bare layer.
        kind: a key of `KINDS` or `REPLACEMENTS`, or the name of some other class.
        format: "dense", a key of `FAMILIES`, or "replaced": a key of `REPLACEMENTS` in place of a dense layer.
        geometry: attributes of the kind, or what its `from_geometry` takes.
        options: of the format.
        numbers: name of each tensor -> its number in the file.
    """

    place: str
    name: str
    kind: str
    format: str
    geometry: Geometry
    options: dict[str, Any]
    numbers: dict[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight of a packed layer."""
        return KINDS[self.kind].shapes(self.geometry)["weight"]

    @property
    def family(self) -> Family | None:
        return FAMILIES.get(self.format)

    @classmethod
    def parse(cls, record: Any, place: str, tensors: Sequence[TensorRecord], version: int) -> LayerRecord:
        """Check one record, and its tensors against it."""
        name, kind, form, geometry, options, members = take(
            record, place, name=str, kind=str, format=str, geometry=dict, options=dict, tensors=dict
        )
        known = KINDS.get(kind)
        own = cls(place, name, kind, form, geometry, options, members)
        for key, number in members.items():
            if not 0 <= natural(number, f"{place}.tensors.{key}") < len(tensors):
                fail(f"{place}.tensors.{key}", f"expected a number below {len(tensors)}, got {number}")
        if form == REPLACED:
            if version < 2:
                fail(f"{place}.format", f"{form!r} is of version 2 of the format, the file has version {version}")
            if options or members:
                fail(place, "expected neither options nor tensors of a layer in place of a dense one")
            stand_in(kind, geometry, place)
            return own
        mine = {key: tensors[number] for key, number in members.items()}
        shapes = {} if known is None else _check_geometry(known, geometry, f"{place}.geometry")
        if known is None and geometry:
            fail(f"{place}.geometry", f"expected none of a {kind}")
        if form == "dense":
            if options:
                fail(f"{place}.options", "expected none of a dense layer")
            for key, tensor in mine.items():
                if key in shapes and tensor.shape != shapes[key]:
                    fail(f"{tensor.place}.shape", f"expected {list(shapes[key])} of {key!r}, got {list(tensor.shape)}")
                if tensor.encoding in ("columns", "counts"):
                    fail(f"{tensor.place}.encoding", f"{tensor.encoding!r} does not go with a dense layer")
            return own
        family = FAMILIES.get(form)
        if family is None:
            fail(f"{place}.format", f"expected dense, {', '.join(FAMILIES)}, got {form!r:.40}")
        if kind not in family.layers:
            fail(f"{place}.kind", f"expected {' or '.join(family.layers)} of a {form} layer, got {kind!r:.40}")
        take(options, f"{place}.options", activation=(str, type(None)), **family.options)
        if options["activation"] not in (None, "relu"):
            fail(f"{place}.options.activation", f"expected null or 'relu', got {options['activation']!r:.40}")
        if kind == "Conv2d" and geometry["padding_mode"] != "zeros":
            fail(f"{place}.geometry.padding_mode", f"expected 'zeros', got {geometry['padding_mode']!r:.40}")
        if math.prod(own.shape) > INDEX_LIMIT:
            fail(f"{place}.geometry", f"a weight of {math.prod(own.shape)} entries")
        needed = _TENSORS[form]
        if mine.keys() - {"bias"} != set(needed):
            fail(f"{place}.tensors", f"expected {', '.join(needed)} and perhaps bias, got {', '.join(mine)}")
        family.check(own, mine)
        if "bias" in mine:
            _expect(mine, "bias", (own.shape[0],), None)
        return own

    def build(self, tensors: Mapping[str, Tensor]) -> Format:
        """The format of a packed layer, all its invariants checked."""
        family = FAMILIES[self.format]
        try:
            held = family.build(self, dict(tensors))
            return held.validate()
        except FormatError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            fail(f"{self.place} ({self.name!r})", str(error))


def _check_geometry(kind: Kind, geometry: Geometry, place: str) -> Shapes:
    wanted: dict[str, tuple[type, ...]] = dict.fromkeys(kind.sized, (int, list))
    take(geometry, place, **wanted, **dict.fromkeys(kind.fixed, (int, list, str)))
    for name in kind.sized:
        if name == "normalized_shape":
            naturals(geometry[name], f"{place}.{name}")
        else:
            natural(geometry[name], f"{place}.{name}")
    for name in kind.fixed:
        if type(geometry[name]) is list:
            naturals(geometry[name], f"{place}.{name}", 1 << 31)
        elif name == "kernel_size" or type(geometry[name]) is int:
            fail(f"{place}.{name}", f"unexpected {geometry[name]!r:.40}")
    rank = kind.name[-2:-1]
    if "kernel_size" in geometry and len(geometry["kernel_size"]) != int(rank):
        fail(f"{place}.kernel_size", f"expected {rank} numbers, got {geometry['kernel_size']}")
    try:
        return kind.shapes(geometry)
    except FormatError as error:
        fail(place, str(error).removeprefix("geometry: "))


def parse_layers(records: Sequence[Any], tensors: Sequence[TensorRecord], version: int) -> list[LayerRecord]:
    """The layers of a header, each name once and no tensor without a layer."""
    layers = [LayerRecord.parse(record, f"layers[{index}]", tensors, version) for index, record in enumerate(records)]
    names: set[str] = set()
    used: set[int] = set()
    for layer in layers:
        if layer.name in names:
            fail(f"{layer.place}.name", f"the layer {layer.name!r} occurs twice")
        names.add(layer.name)
        used.update(layer.numbers.values())
    unused = [tensor for number, tensor in enumerate(tensors) if number not in used]
    if unused:
        fail(unused[0].place, "the tensor belongs to no layer")
    return layers
