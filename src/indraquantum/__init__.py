"""IndraQuantum phase 2: a small language model with a quantum projector, and the complete system that trains it.

Importing it tells transformers' Auto classes and pipelines about the model, whichever of the two packages is imported
first. Neither transformers nor torch is imported for that.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from wrapt import LazyObjectProxy, when_imported

__version__ = "0.1.0"


def _configuration_class() -> type:
    importlib.import_module("indraquantum.model.modeling")  # which registers the classes themselves
    return importlib.import_module("indraquantum.model.configuration").IndraQuantumConfig


@when_imported("transformers.models.auto.configuration_auto")
def _register(auto: ModuleType) -> None:
    # The class is not imported here: transformers loads this module while others of its own are half loaded.
    auto.CONFIG_MAPPING.register("indraquantum", LazyObjectProxy(_configuration_class, interface=type))
