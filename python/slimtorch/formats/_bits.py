# SPDX-License-Identifier: Apache-2.0
"""Bit streams: unsigned numbers of 1 … 8 bits one after another, without gaps.

Number i occupies the bits [i * bits, (i + 1) * bits) of the stream, its lowest bit first; bit b of the stream is bit
b & 7 of byte b >> 3. Eight numbers fill exactly ``bits`` bytes. Bits after the last number are 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def stream_bytes(count: int, bits: int) -> int:
    """Bytes of a stream of ``count`` numbers."""
    return (count * bits + 7) // 8


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """``numbers [n]`` uint8, each below ``2**bits``, as a stream ``[ceil(n * bits / 8)]`` uint8."""
    if bits == 8:
        return numbers.clone()
    count = numbers.numel()
    eights = F.pad(numbers, (0, -count % 8)).reshape(-1, 8).long()
    words = torch.zeros(eights.shape[0], dtype=torch.int64, device=numbers.device)
    for i in range(8):  # eight numbers of at most 7 bits fit into one word
        words |= eights[:, i] << (i * bits)
    stream = torch.stack([(words >> (8 * b)) & 255 for b in range(bits)], dim=1).to(torch.uint8)
    return stream.reshape(-1)[: stream_bytes(count, bits)].clone()


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` numbers of a stream, ``[count]`` uint8."""
    if bits == 8:
        return stream[:count].clone()
    eights = -(-count // 8)
    octets = F.pad(stream, (0, eights * bits - stream.numel())).reshape(-1, bits).long()
    words = torch.zeros(octets.shape[0], dtype=torch.int64, device=stream.device)
    for b in range(bits):
        words |= octets[:, b] << (8 * b)
    mask = (1 << bits) - 1
    numbers = torch.stack([(words >> (i * bits)) & mask for i in range(8)], dim=1).to(torch.uint8)
    return numbers.reshape(-1)[:count]


def check_stream(name: str, stream: Tensor, count: int, bits: int) -> None:
    """A stream of ``count`` numbers, no byte more or less, its last bits 0."""
    if stream.dtype != torch.uint8:
        raise TypeError(f"{name}: expected torch.uint8, got {stream.dtype}")
    size = stream_bytes(count, bits)
    if stream.shape != (size,):
        raise ValueError(f"{name}: expected shape [{size}] ({count} numbers of {bits} bits), got {list(stream.shape)}")
    spare = size * 8 - count * bits
    if spare and int(stream[-1]) >> (8 - spare):
        raise ValueError(f"{name}: expected zeros in the last {spare} bits")
