"""The shape of a model as plain values: sizes and variant, without transformers.

IndraQuantumConfig adds what transformers wants to know. A checkpoint holds all of it; what writes and evaluates text
reads this part alone, because importing transformers takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import TypeAdapter


@dataclass(kw_only=True, repr=False)  # IndraQuantumConfig has the repr of transformers
class ModelShape:
    """Sizes and variant of IndraQuantumPhase2. ModelSettings describes the fields."""

    vocab_size: int = 32_000
    d_model: int = 128
    state_width: int | None = None  # None: d_model
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    intermediate_size: int = 688
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    projector: Literal["quantum", "phase-only", "frozen", "gated", "linear", "mlp", "none"] = "quantum"
    head: Literal["interference", "born"] = "interference"
    bias: Literal["learned", "none"] = "learned"
    readout: Literal["reference", "mean"] = "reference"
    readout_references: int = 1
    phase_spread: float = 0.02
    magnitude: Literal["softplus", "exp", "linear"] = "linear"
    table_std: float | None = None  # None: by the projector
    residual: bool = False
    residual_head: Literal["same", "turned"] = "same"  # older checkpoints lack it
    ends: Literal["shared", "separate"] = "separate"

    def __post_init__(self) -> None:
        """Fill in what follows from other fields."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.projector == "none":
            self.ends = "shared"

    def validate_architecture(self) -> None:
        """Refuse impossible sizes, and options that don't fit each other. transformers calls this on construction."""
        if self.state_width is not None and self.state_width < 1:
            raise ValueError(f"state_width: got {self.state_width}; must be at least 1")
        if self.state_width is not None and self.projector == "none":
            raise ValueError(f"state_width: got {self.state_width}; must be left out with projector none")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"num_attention_heads: got {self.num_attention_heads}; must divide the width {self.hidden_size} "
                "into parts of an even width"
            )
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_key_value_heads: got {self.num_key_value_heads}; must divide num_attention_heads "
                f"{self.num_attention_heads}"
            )
        may_turn = self.projector == "none" or (self.residual and self.ends == "separate")
        if self.residual_head == "turned" and not may_turn:
            raise ValueError("residual_head: got turned; must be same without a residual, or with ends shared")
        if self.readout_references < 1:
            raise ValueError(f"readout_references: got {self.readout_references}; must be at least 1")

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> ModelShape:
        """Return the shape in a checkpoint's `model_config`, whose other values are ignored.

        Raises:
            ValueError: a value is of another type than the field, not one of the choices, or an impossible size.
        """
        names = {field.name for field in fields(cls)}
        shape = TypeAdapter(cls).validate_python({name: values[name] for name in names & values.keys()})
        shape.validate_architecture()
        return shape

    @property
    def complex_width(self) -> int:
        """Complex width c of a state. The plain control has no complex states."""
        return self.d_model if self.state_width is None else self.state_width

    @property
    def hidden_size(self) -> int:
        """Real width D of a state: twice the complex width, except for the plain control, which has one width."""
        return self.d_model if self.projector == "none" else 2 * self.complex_width

    @property
    def key_value_heads(self) -> int:
        """Attention heads of keys and values: as many as of queries, or a divisor of that."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads
