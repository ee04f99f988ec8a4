"""The output of a forward pass, and the names of the arguments that it passes on.

Legend: B batch, T positions, V vocabulary, D real width.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import TransformersKwargs

# What transformers may pass to any model and what the Llama layers read; this model has no router.
PASSED_ON = frozenset(TransformersKwargs.__annotations__) - {"output_router_logits"}
# What transformers calls the cache of earlier positions: `past_key_values`, and from 5.24 on `cache`.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass
class IndraQuantumOutput(CausalLMOutputWithPast):
    """The output of Llama's forward, and the readouts. Fields that do not apply are None.

    As a tuple (`return_dict=False`, or by index) it equals Llama's: loss, logits, the cache, hidden_states, attentions.
    In training with labels, it has neither logits nor cache, unless you ask for them.
    `hidden_states` begins with the lifted inputs and ends with the states psi, all (B, T, D).
    """

    magnitude: Tensor | None = None  # (B, T) |c|, the state's own confidence
    phase: Tensor | None = None  # (B, T) arg c in (-pi, pi], the state's own uncertainty
    terms: Any = None  # loss_v2's named terms, if there were labels

    def to_tuple(self) -> tuple[Any, ...]:
        """Return Llama's fields in Llama's order, without those that are None."""
        names = ("loss", "logits", CACHE, "hidden_states", "attentions")
        return tuple(self[name] for name in names if name in self)


def unknown_argument(name: str, function: Callable[..., Any]) -> TypeError:
    """Return the error for an argument that neither `function` nor PASSED_ON has, with the most similar name."""
    close = difflib.get_close_matches(name, {*PASSED_ON, "shift_labels", *inspect.signature(function).parameters}, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return TypeError(f"forward() got an unexpected keyword argument '{name}'{hint}")
