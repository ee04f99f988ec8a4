"""The fused linear objective: output head, cross-entropy and distillation without an N x V tensor."""

from indraquantum.kernels.arguments import ObjectiveOptions, ObjectiveResult
from indraquantum.kernels.dispatch import Implementation, fused_linear_objective

__all__ = ["Implementation", "ObjectiveOptions", "ObjectiveResult", "fused_linear_objective"]
