"""Measures models on held-out text. Training uses it; it does not depend on training."""
