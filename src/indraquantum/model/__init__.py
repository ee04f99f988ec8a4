"""IndraQuantumPhase2: a language model whose tokens are states with magnitude and phase.

The names below are loaded when they are first used, because torch and transformers take a second to import.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "IndraQuantumConfig": "configuration",
    "IndraQuantumPhase2": "modeling",
    "IndraQuantumOutput": "output",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Import the module that defines `name`, and the model, which registers itself with transformers' Auto classes."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(f"{__name__}.modeling")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
