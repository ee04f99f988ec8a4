"""Bit packing against Python's own integers: one long number whose bits are the stream."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from indraquantum.teacher.packing_bits import MAX_WIDTH, SPARE_BYTES, pack_bits, packed_bytes, unpack_bits


def stream_of(numbers, width):
    """The stream as one Python integer, the first number in its lowest bits."""
    return sum(int(number) << (place * width) for place, number in enumerate(numbers))


@pytest.mark.parametrize("width", [1, 7, 8, 13, 21, 34, MAX_WIDTH])
def test_stream_equals_python_integers(width):
    numbers = [int(n) % (1 << width) for n in np.random.default_rng(width).integers(0, 1 << 62, 101)]
    packed = pack_bits(np.array(numbers), width)
    assert len(packed) == packed_bytes(101, width) == -(-101 * width // 8) + SPARE_BYTES
    assert int.from_bytes(packed.tobytes(), "little") == stream_of(numbers, width)


@given(st.integers(1, MAX_WIDTH), st.data())
def test_any_number_comes_back_from_any_place(width, data):
    numbers = np.array(data.draw(st.lists(st.integers(0, (1 << width) - 1), min_size=1, max_size=40)))
    which = np.array(data.draw(st.lists(st.integers(0, len(numbers) - 1), max_size=20)), np.int64)
    np.testing.assert_array_equal(unpack_bits(pack_bits(numbers, width), which, width), numbers[which])


def test_parts_join_without_a_seam():
    numbers = np.random.default_rng(0).integers(0, 1 << 21, (1 << 16) + 11)
    np.testing.assert_array_equal(unpack_bits(pack_bits(numbers, 21), np.arange(len(numbers)), 21), numbers)


def test_no_numbers():
    assert len(pack_bits(np.zeros(0, np.int64), 21)) == SPARE_BYTES


@pytest.mark.parametrize(("numbers", "width"), [([8], 3), ([-1], 3), ([0], 0), ([0], MAX_WIDTH + 1)])
def test_what_does_not_fit_is_refused(numbers, width):
    with pytest.raises(ValueError, match="must be from"):
        pack_bits(np.array(numbers), width)
