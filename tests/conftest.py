"""Fixtures for all tests: offline, one thread, and the real inputs of ../shared where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before any test imports them: libraries that would ask a hub must fail at once instead.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text, tokenizer and teacher beside the project."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not here")
    return SHARED
