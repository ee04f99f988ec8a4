"""The best held-out cross-entropy of a run so far, and when to stop waiting for a better one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class BestHeldOut:
    """What the evaluations have shown; plain values, so that a checkpoint can hold them."""

    cross_entropy: float | None = None  # of all held-out text, nats per token
    step: int = 0  # where it was
    evaluations_since: int = 0
    stopped: bool = False  # the run ends here

    def take(self, step: int, cross_entropy: float, patience: int) -> bool:
        """Take in an evaluation; whether it is the best so far. A patience of 0 never stops the run."""
        if self.cross_entropy is None or cross_entropy < self.cross_entropy:
            self.cross_entropy, self.step, self.evaluations_since = cross_entropy, step, 0
            return True
        self.evaluations_since += 1
        self.stopped = 0 < patience <= self.evaluations_since
        return False
