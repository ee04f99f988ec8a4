"""IndraQuantum phase 2: a small language model with a quantum projector, and the complete system that trains it."""

__version__ = "0.1.0"
