"""Numbers of any width packed into bytes without gaps, read back at any place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]


def bits_for(count: int) -> int:
    """Bits that tell `count` things apart."""
    return max(1, (count - 1).bit_length())


def row_bytes(columns: int, width: int) -> int:
    """Bytes of a row of `columns` numbers of `width` bits; each row begins at a byte."""
    return (columns * width + 7) // 8


def pack(values_NK: Words, width: int) -> Bytes:
    """Rows `[N, row_bytes]` of the lowest `width` bits of every number, highest bit first."""
    n, k = values_NK.shape
    wide = np.ascontiguousarray(values_NK, dtype=">u8").view(np.uint8).reshape(n, k, 8)
    used = wide[..., 8 - (width + 7) // 8 :]
    bits = np.unpackbits(used, axis=-1)[..., -width:]
    return np.packbits(bits.reshape(n, k * width), axis=-1)


def unpack(flat: Bytes, start_bits: NDArray[np.int64], width: int) -> Words:
    """The numbers of `width` (at most 56) bits that begin at the given bits of a flat array of bytes."""
    first, skip = start_bits >> 3, (start_bits & 7).astype(np.uint64)
    count = (width + 14) // 8
    out = np.zeros(start_bits.shape, dtype=np.uint64)
    last = max(0, len(flat) - 1)
    for i in range(count):
        # What lies behind the last byte is shifted out again.
        out = (out << np.uint64(8)) | flat[np.minimum(first + i, last)].astype(np.uint64)
    shift = np.uint64(8 * count - width) - skip
    return (out >> shift) & np.uint64((1 << width) - 1)
