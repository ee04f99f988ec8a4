"""What says that memory does not suffice."""

from __future__ import annotations

import pytest
import torch

from indraquantum.errors import OutOfMemory
from indraquantum.memory import is_out_of_memory, memory_needed

TOO_MANY = 1 << 60  # bytes, more than any machine has


def test_what_the_main_memory_refuses_is_a_lack_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(TOO_MANY, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("expected scalar type Float"))
    assert not is_out_of_memory(OSError("can't allocate memory"))


def test_a_lack_of_memory_says_what_to_do():
    said = r"^--rows: got 7; must be fewer$"
    with pytest.raises(OutOfMemory, match=said), memory_needed("--rows", 7, "must be fewer"):
        torch.empty(TOO_MANY, dtype=torch.uint8)
    with pytest.raises(ValueError, match="of another kind"), memory_needed("--rows", 7, "must be fewer"):
        raise ValueError("of another kind")
