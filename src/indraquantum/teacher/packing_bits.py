"""Packs numbers of any fixed width bit by bit: a teacher's draw takes 21 bits instead of the 64 of an int64.

Number `i` lies in bits `[i * width, (i + 1) * width)`, least significant bit first in each byte. The stream
ends with `SPARE_BYTES` zero bytes, so that a reader may load 8 bytes wherever a number begins. NumPy's packbits packs
single bits only, and would need a bool for each of them.

Legend: M numbers.
"""

from __future__ import annotations

import numpy as np

SPARE_BYTES = 8
MAX_WIDTH = 57  # 7 bits of shift within the first byte + 57 = one 64-bit load
_NUMBERS_AT_ONCE = 1 << 16  # a multiple of 8, so that each part ends at a byte


def packed_bytes(count: int, width: int) -> int:
    """Return the bytes that `count` packed numbers of `width` bits take, including the spare bytes."""
    return (count * width + 7) // 8 + SPARE_BYTES


def pack_bits(numbers_M: np.ndarray, width: int) -> np.ndarray:
    """Pack non-negative integers.

    Args:
        numbers_M: (M,) integers, each below 2**width.
        width: bits for each number, 1 to 57.

    Returns:
        uint8 array of `packed_bytes(M, width)` bytes.

    Raises:
        ValueError: a number does not fit, or the width is out of range.
    """
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"width {width} must be from 1 to {MAX_WIDTH}")
    if numbers_M.size and not 0 <= int(numbers_M.min()) <= int(numbers_M.max()) < 1 << width:
        raise ValueError(f"numbers must be from 0 to {(1 << width) - 1}")
    packed = np.zeros(packed_bytes(len(numbers_M), width), np.uint8)
    places = np.arange(width, dtype=np.uint64)
    for begin in range(0, len(numbers_M), _NUMBERS_AT_ONCE):
        part = numbers_M[begin : begin + _NUMBERS_AT_ONCE].astype(np.uint64)
        bits = ((part[:, None] >> places) & np.uint64(1)).astype(np.uint8)
        part_bytes = np.packbits(bits.reshape(-1), bitorder="little")
        first = begin * width // 8
        packed[first : first + len(part_bytes)] = part_bytes
    return packed


def unpack_bits(packed: np.ndarray, which_M: np.ndarray, width: int) -> np.ndarray:
    """Read any of the packed numbers, in any order.

    Args:
        packed: what `pack_bits` returned; it may be memory-mapped.
        which_M: (M,) int64, the places of the wanted numbers.
        width: bits for each number, as given to `pack_bits`.

    Returns:
        (M,) int64.
    """
    # An 8-byte number seen at every byte: numpy reads unaligned items one by one, nothing is copied.
    windows = np.ndarray((len(packed) - 7,), "<u8", buffer=packed, strides=(1,))
    first_bit_M = which_M * width
    shift_M = (first_bit_M & 7).astype(np.uint64)
    mask = np.uint64((1 << width) - 1)
    return ((windows[first_bit_M >> 3] >> shift_M) & mask).astype(np.int64)
