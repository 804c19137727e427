# SPDX-License-Identifier: Apache-2.0
"""The .slim file: a whole model in one file, small, without pickle, and believed in nothing when it is read.

    slim.save(model, "model.slim")
    model = slim.load("model.slim", Net())     # a fresh dense model of the original class

docs/file-format.md has the bytes.

    _container   prologue, header, sections, checksums; writing all or nothing
    _encodings   tensors to sections and back
    _records     what the header says of layers, and what of it must fit
    _model       models to records, records into models
    _inspect     what is in a file, as a table
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from torch import nn

from slimtorch import _C
from slimtorch.storage._container import FormatError, Reader, take, write
from slimtorch.storage._encodings import TensorRecord, TensorWriter, parse_tensors
from slimtorch.storage._inspect import FileReport, LayerReport, TensorReport, examine
from slimtorch.storage._model import Loader, describe, header_limit
from slimtorch.storage._records import LayerRecord, parse_layers, version_of

__all__ = ["FileReport", "FormatError", "LayerReport", "TensorReport", "inspect", "load", "save"]

Path = str | os.PathLike[str]


def save(model: nn.Module, path: Path, *, compress: bool = True) -> int:
    """Write a model to one file: every parameter and persistent buffer, bit for bit.

    Packed layers are stored in their formats, layers of :mod:`slimtorch.design` that stand in place of dense ones with
    their geometry and their parts, shared tensors once. Masks of :func:`slimtorch.prune_` become zeros in
    the weights of the file; the model keeps them. A module with a method ``packed()`` is stored as the module that it
    returns. The file is written under another name and then renamed: whatever happens, ``path`` is the old file or the
    new one.

    Args:
        model: any module, a single layer too.
        path: of the file, ``.slim`` by custom.
        compress: give each tensor the smallest of several lossless encodings (Huffman codes of indices and gaps, say);
            otherwise plain bytes.

    Returns:
        Bytes of the file.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a layer cannot be stored: a parametrization that is no mask, state that is no tensor, a tensor
            without values or with a format that breaks its own rules.
        OSError: the file cannot be written.
    """
    _check_model(model)
    writer = TensorWriter(compress)
    layers = describe(model, writer)
    header = {"library": _C.version, "layers": layers, "tensors": writer.records}
    version = version_of(layers)
    return write(os.fspath(path), header, writer.sections, deflate=compress, version=version)


def load(path: Path, model: nn.Module) -> nn.Module:
    """Put a file into a fresh dense model of the class that was saved, in place.

    Layers become the packed, factorized or separated ones of the file (the same module objects), layers that have lost
    channels become narrower, and all tensors are set bit for bit, with the dtypes of the file, on the devices of the
    model.

    Args:
        path: of the file.
        model: has the layers of the model that was saved, before anything was pruned or packed; its values do not
            matter.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
        FormatError: the file is damaged, of a newer version, or does not fit the model; the message says where. The
            model is left as it was, as on any other exception.
        ValueError: the model is set up for training (masks, binary weights).
        OSError: the file cannot be read.
    """
    _check_model(model)
    with _opened(path, header_limit(model)) as (reader, layers, tensors):
        loader = Loader(model, layers, tensors)
        loader.build(loader.match(), reader)
    loader.commit()
    return model


def inspect(path: Path) -> FileReport:
    """What is in a file, without a model: formats, sizes and entropies of every layer; prints as a table.

    Checks all checksums on the way.

    Raises:
        FormatError: the file is damaged or of a newer version; the message says where.
        OSError: the file cannot be read.
    """
    with _opened(path) as (reader, layers, tensors):
        return examine(os.fspath(path), reader, layers, tensors)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


@contextlib.contextmanager
def _opened(path: Path, limit: int | None = None) -> Iterator[tuple[Reader, list[LayerRecord], list[TensorRecord]]]:
    """A file whose header and layout are sound; messages get its name."""
    try:
        with open(path, "rb") as file:
            reader = Reader(file) if limit is None else Reader(file, limit)
            _, layer_records, tensor_records = take(reader.header, "header", library=str, layers=list, tensors=list)
            tensors = parse_tensors(tensor_records)
            layers = parse_layers(layer_records, tensors, reader.version)
            sections = [section for tensor in tensors for section in tensor.sections()]
            reader.check_layout([section for section, _ in sections], [place for _, place in sections])
            yield reader, layers, tensors
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)}: {error}") from error
    except MemoryError as error:
        raise FormatError(f"{os.fspath(path)}: needs more memory than there is") from error
