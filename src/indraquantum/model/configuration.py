"""The configuration of an IndraQuantumPhase2 model, which `config.json` beside its weights holds.

It is a transformers config class, so that save_pretrained, from_pretrained and the Auto classes work as usual.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig

from indraquantum.config import ModelSettings
from indraquantum.errors import UserError
from indraquantum.model.shape import ModelShape


@strict
class IndraQuantumConfig(ModelShape, PreTrainedConfig):
    """The shape of IndraQuantumPhase2, and what transformers needs besides. ModelSettings describes the fields."""

    model_type = "indraquantum"
    # What Trainer's compute_metrics gets is the logits alone, as of a Llama.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "magnitude", "phase", "terms"]

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = None
    use_cache: bool = True
    skip_logits: bool | None = None  # in calls with labels; None: only in training mode
    # The head reuses the lifted table by construction; transformers has no second weight to tie.
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        """Fill in what follows from other fields."""
        for name in ("rope_parameters", "rope_scaling"):
            self._require_default_positions(name, kwargs.pop(name, None) or {})
        ModelShape.__post_init__(self)
        PreTrainedConfig.__post_init__(self, **kwargs)

    def _require_default_positions(self, name: str, rope: Any) -> None:
        """Refuse a dict of rotary positions, as other models have, that asks for more than the layers do."""
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{name}: got the type {kind}; must be default")
        if (base := rope.get("rope_theta", self.rope_theta)) != self.rope_theta:
            raise ValueError(f"{name}: got rope_theta {base}; must be the field rope_theta, {self.rope_theta}")

    @property
    def hidden_size(self) -> int:
        """Real width D of a state. It follows from other fields, so it can't be set to another value."""
        return ModelShape.hidden_size.__get__(self)

    @hidden_size.setter
    def hidden_size(self, value: int | None) -> None:
        self._require_derived("hidden_size", value)

    @property
    def head_dim(self) -> int:
        """Width of one attention head. It follows from other fields, so it can't be set to another value."""
        return ModelShape.head_dim.__get__(self)

    @head_dim.setter
    def head_dim(self, value: int | None) -> None:
        self._require_derived("head_dim", value)

    def _require_derived(self, name: str, value: int | None) -> None:
        if value not in (None, derived := getattr(self, name)):
            raise ValueError(f"{name}: got {value}; must be left out, or {derived}, which follows from other fields")

    def update(self, config_dict: dict[str, Any]) -> None:
        """Set fields as transformers does; those that follow from others come last."""
        derived = ("hidden_size", "head_dim")
        super().update(dict(sorted(config_dict.items(), key=lambda item: item[0] in derived)))

    def to_dict(self) -> dict[str, Any]:
        """Return all values, and the width of a head, which PEFT's prefix tuning would else compute from d_model."""
        return super().to_dict() | {"head_dim": self.head_dim}

    def backbone(self) -> LlamaConfig:
        """Return the configuration of the Llama layers between projector and head."""
        self._require_default_positions("rope_parameters", getattr(self, "rope_parameters", None) or {})  # set later
        return LlamaConfig(
            vocab_size=1,  # its own table is never used; see modeling.Backbone
            bos_token_id=None,
            eos_token_id=None,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            rms_norm_eps=self.rms_norm_eps,
            attention_dropout=self.attention_dropout,
            attn_implementation=self._attn_implementation,
        )

    @classmethod
    def from_settings(
        cls,
        settings: ModelSettings,
        vocab_size: int,
        bos_token_id: int | None,
        eos_token_id: int,
        max_position_embeddings: int = 2048,
    ) -> IndraQuantumConfig:
        """Return the configuration of a model with these settings.

        Args:
            settings: the options of the command.
            vocab_size: number of tokens V, including control tokens.
            bos_token_id: id of the token that begins a document; None if documents begin with their text.
            eos_token_id: id of the token that ends a document.
            max_position_embeddings: the longest text, in tokens, that the model is built for.

        Raises:
            UserError: the heads don't divide the width into even parts, or an option needs a projector.
        """
        if settings.projector == "none" and settings.ends == "separate" and "ends" in settings.model_fields_set:
            raise UserError("--ends", settings.ends, "must be shared with --projector none")
        if settings.projector == "none" and settings.has_residual:
            raise UserError("--residual", "true", "must be left out with --projector none")
        has_a_projector_each = settings.has_residual and settings.ends == "separate"
        if settings.residual_head == "turned" and settings.projector != "none" and not has_a_projector_each:
            raise UserError("--residual-head", "turned", "must be same without a residual, and with --ends shared")
        if settings.table_start == "bigrams" and settings.residual_of_head != "turned":
            raise UserError("--table-start", "bigrams", "must be another one where --residual-head is not turned")
        if settings.projector == "none" and settings.state_width is not None:
            raise UserError("--state-width", settings.state_width, "must be left out with --projector none")
        if settings.width % (2 * settings.heads):
            allowed = f"must divide the width {settings.width} into parts of an even width"
            raise UserError("--heads", settings.heads, allowed)
        return cls(  # type: ignore[call-arg]  # some are of transformers' base
            vocab_size=vocab_size,
            d_model=settings.d_model,
            state_width=settings.complex_width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            intermediate_size=settings.mlp_width_or_default,
            max_position_embeddings=max_position_embeddings,
            attention_dropout=settings.dropout,
            projector=settings.projector,
            head=settings.head,
            bias=settings.bias,
            readout=settings.readout,
            phase_spread=settings.phase_spread,
            magnitude=settings.magnitude,
            table_std=settings.table_std,
            residual=settings.has_residual,
            residual_head=settings.residual_of_head,
            ends=settings.ends,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
        )
