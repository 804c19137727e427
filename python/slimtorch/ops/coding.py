# SPDX-License-Identifier: Apache-2.0
"""One-dimensional k-means and Huffman codes, both native and on the CPU. Schemas: csrc/bindings/library.cpp.

Neither is differentiable. Tensors of other devices are copied to the CPU and results back.

**The Huffman blob** is self-contained bytes. Integers are little-endian; bit ``b`` of a stream is bit ``b & 7`` of byte
``b >> 3``.

====== ======== ==================================================================================================
offset type     meaning
====== ======== ==================================================================================================
0      u8       version, 1
1      u8       kind: 0 constant (no symbol, or one symbol ``n`` times; the blob ends after ``n``), 1 coded
2      u8       constant: the symbol (0 if ``n`` is 0); coded: the largest symbol that occurs
3      u8       streams ``S``: constant 0; coded 1 if ``n < 2**14``, else 4
4      u64      ``n``, the number of symbols
12     nibbles  code lengths of the symbols 0 to the largest, low nibble first, the last byte filled up with 0. 0: does
                not occur; 1 to 12: its length; ``13 a b``: ``a + 16 * b + 3`` symbols that do not occur; ``14 a``: the
                length before, ``a + 3`` times more
next   u64 * S  the bit at which each stream ends; the next begins there
next   bits     the streams; bits of the last byte that are left over are 0
====== ======== ==================================================================================================

Stream ``s`` holds the symbols ``s * c`` to ``(s + 1) * c - 1`` with ``c = ceil(n / S)``. Codes are canonical: numbered
upwards by length, then by symbol, most significant bit first in the stream. Lengths are those of least total size
among all of at most 12 bits (package-merge, Larmore and Hirschberg 1990). A blob is refused unless its lengths are
those of a complete prefix code, its streams end where it says and all bits left over are 0; whether the symbols are
those that were once encoded is for a checksum to say.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor

_ops = torch.ops.slimtorch

MAX_CENTROIDS = 256
Initialization = Literal["linear", "density", "random"]


def kmeans_1d(
    values: Tensor,
    centroids: Tensor,
    importance: Tensor | None = None,
    *,
    iterations: int = 300,
    tolerance: float = 0.0,
) -> Tensor:
    """Lloyd's algorithm (1957) on numbers, exact: the values are sorted once, clusters are intervals of them.

    Sums are in float64. The result does not depend on the order of ``values`` beyond the rounding of those sums, nor on
    the number of threads. Memory: two copies of ``values`` and ``importance``.

    Args:
        values: ``[n]`` (any other shape is flattened): float32 or float64; float16 and bfloat16 are widened.
        centroids: ``[k]``, where to begin; k from 1 to 256. :func:`initial_centroids` makes them.
        importance: as many entries as ``values``, none negative: what each counts in the mean of its cluster.
        iterations: at most so many.
        tolerance: stop when no centroid moves by more than this. At 0, stop at a fixed point only.

    Returns:
        ``[k]`` centroids of dtype and device of ``values``, **ascending**. A cluster without values, or whose
        importances sum to 0, keeps its centroid. A value halfway between two centroids belongs to the lower.

    Raises:
        TypeError: an argument is no tensor, or not floating-point.
        ValueError: sizes do not fit, a number is NaN or infinite, or an importance negative.
    """
    flat = _values(values)
    start = _like(centroids, flat, "centroids")
    if start.dim() != 1 or not 1 <= len(start) <= MAX_CENTROIDS:
        raise ValueError(f"centroids: expected 1 to {MAX_CENTROIDS} of them, shape [k], got {list(start.shape)}")
    if not isinstance(iterations, int) or isinstance(iterations, bool):
        raise TypeError(f"iterations: expected an int, got {iterations!r}")
    if iterations < 0:
        raise ValueError(f"iterations: expected at least 0, got {iterations}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected at least 0, got {tolerance}")
    weights = _importance(importance, flat)
    try:
        found = _ops.kmeans_1d(flat, start, weights, iterations, tolerance)
    except RuntimeError as error:
        _check_finite(values=flat, centroids=start, importance=weights)
        raise error
    return found.to(values)


def assign_1d(values: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of every value, exactly; the lower of two equally near ones.

    Args:
        values: ``[n]`` (any other shape is flattened), floating-point. Infinite values are allowed.
        centroids: ``[k]``, ascending; k from 1 to 256.

    Returns:
        uint8 ``[n]`` indices into ``centroids``.

    Raises:
        TypeError: an argument is no tensor, or not floating-point.
        ValueError: a value is NaN, or the centroids do not ascend.
    """
    flat = _values(values)
    table = _like(centroids, flat, "centroids")
    if table.dim() != 1 or not 1 <= len(table) <= MAX_CENTROIDS:
        raise ValueError(f"centroids: expected 1 to {MAX_CENTROIDS} of them, shape [k], got {list(table.shape)}")
    try:
        return _ops.assign_1d(flat, table).to(values.device)
    except RuntimeError as error:
        if bool(flat.isnan().any()):
            raise ValueError("values: expected numbers, got NaN") from error
        if not bool((table[1:] >= table[:-1]).all()) or bool(table.isnan().any()):
            raise ValueError("centroids: expected ascending numbers") from error
        raise


def initial_centroids(
    values: Tensor,
    k: int,
    how: Initialization = "linear",
    *,
    generator: torch.Generator | None = None,
    importance: Tensor | None = None,
) -> Tensor:
    """Where k-means begins (Han et al., Deep Compression, arXiv 1510.00149, section 3.2).

    Args:
        values: ``[n]`` (any other shape is flattened), floating-point, finite, n > 0.
        k: how many, 1 to 256.
        how: ``"linear"``: evenly from the smallest value to the largest, which keeps the few large weights apart.
            ``"density"``: such that as much mass lies between any two neighbours: quantiles (i + 1/2) / k.
            ``"random"``: k of the values, drawn without replacement while there are enough (Forgy).
        generator: for ``"random"``.
        importance: as many entries as ``values``, none negative: mass for ``"density"``, odds for ``"random"``; no
            matter for ``"linear"``.

    Returns:
        ``[k]`` of dtype and device of ``values``, ascending.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: ``k``, ``how``, sizes or numbers out of range.
    """
    flat = _values(values)
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k: expected an int, got {k!r}")
    if not 1 <= k <= MAX_CENTROIDS:
        raise ValueError(f"k: expected 1 to {MAX_CENTROIDS}, got {k}")
    if how not in ("linear", "density", "random"):
        raise ValueError(f"how: expected 'linear', 'density' or 'random', got {how!r}")
    if len(flat) == 0:
        raise ValueError("values: expected at least one")
    weights = _importance(importance, flat)
    if how == "density":
        try:
            return _ops.quantiles_1d(flat, weights, k).to(values)
        except RuntimeError as error:
            _check_finite(values=flat, importance=weights)
            if weights is not None and not float(weights.sum()) > 0:
                raise ValueError("importance: expected a positive sum") from error
            raise
    _check_finite(values=flat, importance=weights)
    if how == "linear":
        low, high = flat.aminmax()
        if k == 1:
            return ((low.double() + high.double()) / 2).to(values).reshape(1)
        steps = torch.linspace(0, 1, k, dtype=torch.float64)
        return (low.double() * (1 - steps) + high.double() * steps).to(values)
    # The k smallest of exponential times with these rates: drawn without replacement (Efraimidis and Spirakis, 2006).
    times = torch.empty(len(flat), dtype=torch.float64).exponential_(generator=generator)
    if weights is not None:
        times /= weights
    possible = min(k, len(flat) if weights is None else int((weights > 0).sum()))
    if possible == 0:
        raise ValueError("importance: expected a positive sum")
    drawn = times.topk(possible, largest=False).indices.repeat(-(-k // possible))[:k]
    return flat[drawn].sort().values.to(values)


def huffman_lengths(histogram: Tensor) -> Tensor:
    """Lengths of the best prefix code of at most 12 bits: uint8 ``[256]``, 0 where the count is 0.

    Args:
        histogram: int64, up to 256 counts of symbols 0, 1, …

    Raises:
        TypeError, ValueError: it is anything else. The only symbol that occurs needs no bit: its length is 0.
    """
    return _ops.huffman_lengths(_histogram(histogram))


def huffman_size(histogram: Tensor) -> int:
    """Exactly how many bytes :func:`huffman_encode` gives for symbols of these counts.

    Args:
        histogram: int64, up to 256 counts of symbols 0, 1, … (``torch.bincount``).

    Raises:
        TypeError, ValueError: it is anything else.
    """
    return int(_ops.huffman_size(_histogram(histogram)))


def huffman_encode(symbols: Tensor) -> Tensor:
    """A Huffman code of bytes, as the self-contained blob that the head of this file describes.

    Args:
        symbols: uint8 ``[n]``.

    Returns:
        uint8 ``[bytes]``, the same for the same symbols on every machine.

    Raises:
        TypeError, ValueError: ``symbols`` is anything else.
    """
    return _ops.huffman_encode(_bytes("symbols", symbols)).to(symbols.device)


def huffman_decode(blob: Tensor, n: int) -> Tensor:
    """The symbols of a blob of :func:`huffman_encode`.

    Safe on any bytes: no more is allocated than ``n`` bytes, and that only after the header is found sound.

    Args:
        blob: uint8 ``[bytes]``.
        n: how many symbols there must be. A blob says so too, but a few bytes may claim any number: the caller knows
            how many it has room for.

    Returns:
        uint8 ``[n]``.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: the blob is damaged, or is not one of ``n`` symbols; the message says what is wrong.
    """
    blob = _bytes("blob", blob)
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"n: expected an int, got {n!r}")
    if not 0 <= n < 2**63:
        raise ValueError(f"n: expected at least 0, got {n}")
    try:
        return _ops.huffman_decode(blob, n)
    except RuntimeError as error:
        # torch puts before the message which line threw it.
        reason = re.sub(r"^\w+, \S+:\d+, ", "", str(error).splitlines()[0])
        raise ValueError(f"blob: not a Huffman code of {n} symbols: {reason}") from None


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    return value.detach().cpu()


def _values(values: Tensor) -> Tensor:
    """Flat float32 or float64 on the CPU."""
    flat = _tensor("values", values).flatten()
    if not flat.is_floating_point():
        raise TypeError(f"values: expected a floating-point dtype, got {flat.dtype}")
    return flat if flat.dtype == torch.float64 else flat.float()


def _like(tensor: Tensor, flat: Tensor, name: str) -> Tensor:
    tensor = _tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
    return tensor.to(flat.dtype)


def _importance(importance: Tensor | None, flat: Tensor) -> Tensor | None:
    if importance is None:
        return None
    weights = _like(importance, flat, "importance").flatten()
    if len(weights) != len(flat):
        raise ValueError(f"importance: expected {len(flat)} entries (as many as values), got {len(weights)}")
    return weights


def _check_finite(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
        if name == "importance" and bool((tensor < 0).any()):
            raise ValueError("importance: expected no negative number")


def _bytes(name: str, value: object) -> Tensor:
    tensor = _tensor(name, value)
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{name}: expected torch.uint8, got {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected shape [n], got {list(tensor.shape)}")
    return tensor


def _histogram(value: Tensor) -> Tensor:
    histogram = _tensor("histogram", value)
    if histogram.dtype != torch.int64:
        raise TypeError(f"histogram: expected torch.int64, got {histogram.dtype}")
    if histogram.dim() != 1 or len(histogram) > 256:
        raise ValueError(f"histogram: expected at most 256 counts, shape [symbols], got {list(histogram.shape)}")
    if bool((histogram < 0).any()) or bool((histogram > 2**48).any()):
        raise ValueError("histogram: expected counts from 0 to 2**48")
    return histogram


# ---- fake kernels ----------------------------------------------------------------------------------------------------


@torch.library.register_fake("slimtorch::kmeans_1d")
def _(values: Tensor, centroids: Tensor, importance: Tensor | None, iterations: int, tolerance: float) -> Tensor:
    return centroids.new_empty(centroids.shape)


@torch.library.register_fake("slimtorch::quantiles_1d")
def _(values: Tensor, importance: Tensor | None, k: int) -> Tensor:
    return values.new_empty([k])


@torch.library.register_fake("slimtorch::assign_1d")
def _(values: Tensor, centroids: Tensor) -> Tensor:
    return values.new_empty(values.shape, dtype=torch.uint8)


@torch.library.register_fake("slimtorch::huffman_lengths")
def _(histogram: Tensor) -> Tensor:
    return histogram.new_empty([256], dtype=torch.uint8)


@torch.library.register_fake("slimtorch::huffman_size")
def _(histogram: Tensor) -> Tensor:
    return histogram.new_empty([])


@torch.library.register_fake("slimtorch::huffman_encode")
def _(symbols: Tensor) -> Tensor:
    return symbols.new_empty([torch.library.get_ctx().new_dynamic_size()])


@torch.library.register_fake("slimtorch::huffman_decode")
def _(blob: Tensor, n: int) -> Tensor:
    return blob.new_empty([n])
