"""IndraQuantumPhase2: embeddings, a quantum projector used at both ends, Llama layers in between, two readouts.

    table = projector(E)   ->   states psi = layers(table[input_ids])   ->   logits = scale * psi . table^T +
                                                                        bias ->   c = <r, psi>, magnitude |c|,
                                                                        phase arg c

The layers are transformers' own Llama, fed by `inputs_embeds`: rotary positions, KV caches and attention
kernels come with it. A training step lifts the table once (`lift_table`), passes it to `hidden_states` and to
the objective, and never builds logits; `forward` with labels does just that.

Legend: B batch, T positions, N = B*T, d complex width, D real width (2d), V vocabulary, K kept teacher
    tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, LlamaConfig, LlamaModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import ModelOutput

from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.head import HEADS, InterferenceHead
from indraquantum.model.masks import additive, document_mask
from indraquantum.model.projector import PROJECTORS, LiftLinear, PhaseLinear, uniform_by_fan_in
from indraquantum.model.readout import READOUTS, ReferenceReadout

if TYPE_CHECKING:
    from indraquantum.loss_v2 import SemanticDistillationLoss, TeacherSignals


@dataclass
class IndraQuantumOutput(ModelOutput):
    """What a forward pass returns; fields that do not apply are None."""

    loss: Tensor | None = None  # the objective's total, if labels were given
    logits: Tensor | None = None  # (B, kept positions, V), only without labels
    terms: Any = None  # loss_v2's named terms, if labels were given
    magnitude: Tensor | None = None  # (B, T) |c|, the state's own confidence
    phase: Tensor | None = None  # (B, T) arg c in (-pi, pi], the state's own uncertainty
    past_key_values: Cache | None = None


class Backbone(LlamaModel):
    """Llama's layers on given inputs: without its unused table, and with weights drawn by width."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        del self.embed_tokens

    def get_input_embeddings(self) -> None:
        """Nothing: the inputs come from the projector."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            uniform_by_fan_in(module)
        else:
            super()._init_weights(module)


class IndraQuantumPhase2(PreTrainedModel, GenerationMixin):
    """A causal language model whose tokens are states with magnitude and phase.

    Args:
        config: sizes and variant.
    """

    config_class = IndraQuantumConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer"]

    def __init__(self, config: IndraQuantumConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.projector = PROJECTORS[config.projector](config)
        self.input_projector = PROJECTORS[config.projector](config) if config.ends == "separate" else None
        self.backbone = Backbone(config.backbone())
        self.head = HEADS[config.head](config)
        self.readout = READOUTS[config.readout](config)
        self._lifted_VD: Tensor | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for every module, also for those a checkpoint lacks; its default would draw
        # every Linear and Embedding with std 0.02, which puts all phases near 0.
        if module is self.embedding:
            init.normal_(module.weight, std=self.config.table_std or self.projector.table_std)
        elif isinstance(module, LiftLinear | PhaseLinear | InterferenceHead | ReferenceReadout):
            module.initialise()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the one table of the model, E (V, d)."""
        return self.embedding

    @property
    def bias_V(self) -> Tensor:
        """The head's bias (V,)."""
        return self.head.bias_V

    @property
    def scale(self) -> Tensor:
        """The head's scale, a differentiable scalar."""
        return self.head.scale_1[0]

    def lift_table(self) -> Tensor:
        """Return the states (V, D) of all tokens: the projector applied to the whole table."""
        return self._lift(self.projector, self.embedding.weight)

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Lift the table once for all gradient-free forward passes inside; the weights must not change meanwhile."""
        before = self._lifted_VD
        with torch.no_grad():
            self._lifted_VD = self.lift_table()
        try:
            yield
        finally:
            self._lifted_VD = before

    def _table(self) -> Tensor:
        """Return the lifted table (V, D): the one of `lifted()` where that is open and no gradient is wanted."""
        if self._lifted_VD is not None and not torch.is_grad_enabled():
            return self._lifted_VD
        return self.lift_table()

    def _embed(self, input_ids_BT: Tensor, table_VD: Tensor | None) -> Tensor:
        """Return the input states (B, T, D), from the lifted table or from the needed rows alone.

        A projector of the inputs' own has another table than the head's.
        """
        if self.input_projector is not None:
            # A phase of several radians loses its digits in 16 bits.
            with torch.autocast(input_ids_BT.device.type, enabled=False):
                return self._lift(self.input_projector, self.embedding(input_ids_BT))
        if table_VD is not None:
            return F.embedding(input_ids_BT, table_VD)
        return self._lift(self.projector, self.embedding(input_ids_BT))

    def _lift(self, projector: nn.Module, embeddings: Tensor) -> Tensor:
        """States (..., D) of `embeddings` (..., d), with the embedding in their real part where that is asked for."""
        states = projector(embeddings)
        return states + F.pad(embeddings, (0, embeddings.shape[-1])) if self.config.residual else states

    def _document_mask(self, segment_ids_BT: Tensor) -> Tensor:
        mask_B1TT = document_mask(segment_ids_BT)
        # Eager attention adds its mask to the scores, so a bool one would silently let everything through.
        return additive(mask_B1TT, self.dtype) if self.config._attn_implementation == "eager" else mask_B1TT

    def hidden_states(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        segment_ids_BT: Tensor | None = None,
        table_VD: Tensor | None = None,
    ) -> Tensor:
        """Run the layers over whole rows.

        Args:
            input_ids_BT: (B, T) token ids.
            position_ids_BT: (B, T) positions within each document; by default 0, 1, ... along the row.
            segment_ids_BT: (B, T) document number within the row, -1 on padding; a position attends only to
                earlier ones of its own document. By default there is no padding and a document begins where
                positions restart.
            table_VD: (V, D) the lifted table, where the caller has it; the inputs are then gathered from it, unless
                they have a projector of their own.

        Returns:
            (B, T, D) the states psi.
        """
        return self.backbone(
            inputs_embeds=self._embed(input_ids_BT, table_VD),
            attention_mask=None if segment_ids_BT is None else self._document_mask(segment_ids_BT),
            position_ids=position_ids_BT,
            use_cache=False,
        ).last_hidden_state

    def logits(self, states: Tensor, table_VD: Tensor) -> Tensor:
        """Return the logits (..., V) of `states` (..., D) against the lifted table."""
        return self.head(states, table_VD)

    def amplitude(self, states: Tensor) -> Tensor:
        """Return the complex readout c (...) of `states` (..., D): |c| is the magnitude, its angle the phase."""
        return self.readout(states)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        signals: TeacherSignals | None = None,
        objective: SemanticDistillationLoss | None = None,
        token_count: int | Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> IndraQuantumOutput:
        """Logits for generation and evaluation, or, with labels, the loss without ever building logits.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, all positions so far) 1 for real tokens, 0 for padding; or a 4-D mask as
                transformers takes it.
            position_ids: (B, T) positions within each document.
            segment_ids: (B, T) document number within the row, -1 on padding; not together with
                attention_mask or a cache.
            past_key_values: the cache of earlier positions.
            inputs_embeds: (B, T, D) states in place of input_ids.
            use_cache: return a cache for the next positions.
            labels: (B, T) already aligned: labels[:, t] is the token after input_ids[:, t]; -100 is ignored.
            signals: the teacher's signals for the N = B*T positions, row by row.
            objective: the loss; by default CE alone, or with signals the weights at which v4 ends.
            token_count: labelled tokens of the whole optimiser step; by default those of this call.
            logits_to_keep: how many of the last positions get logits, 0 for all.
            kwargs: passed on to the Llama layers.

        Raises:
            ValueError: segment_ids together with attention_mask or a cache, or an objective for another head.
        """
        if segment_ids is not None:
            if attention_mask is not None or past_key_values is not None or use_cache:
                raise ValueError("segment_ids: must not be given together with attention_mask or a cache")
            attention_mask = self._document_mask(segment_ids)
        table_VD = self._table()
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, table_VD)
        outputs = self.backbone(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        states_BTD = outputs.last_hidden_state
        amplitude_BT = self.amplitude(states_BTD)
        terms = logits = None
        if labels is None:
            logits = self.logits(slice_logits_to_keep(states_BTD, logits_to_keep), table_VD)
        else:
            terms = self._objective_terms(states_BTD, table_VD, amplitude_BT, labels, signals, objective, token_count)
        return IndraQuantumOutput(
            loss=None if terms is None else terms.total,
            logits=logits,
            terms=terms,
            magnitude=amplitude_BT.abs(),
            phase=amplitude_BT.angle(),
            past_key_values=outputs.past_key_values,
        )

    def _objective_terms(
        self,
        states_BTD: Tensor,
        table_VD: Tensor,
        amplitude_BT: Tensor,
        labels_BT: Tensor,
        signals: TeacherSignals | None,
        objective: SemanticDistillationLoss | None,
        token_count: int | Tensor | None,
    ) -> Any:
        from indraquantum.loss_v2 import SemanticDistillationLoss

        if objective is None:
            weights = (0.0, 0.0, 0.0) if signals is None else (0.05, 0.1, 0.1)
            objective = SemanticDistillationLoss(*weights, head=self.config.head)
        if objective.head != self.config.head:
            raise ValueError(f"objective: its head is {objective.head}; must be the model's, {self.config.head}")
        return objective(
            states_BTD.flatten(0, 1),
            table_VD,
            labels_BT.flatten(),
            bias_V=self.bias_V,
            scale=self.scale,
            signals=signals,
            amplitude_N=amplitude_BT.flatten(),
            token_count=token_count,
        )

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Write text as transformers' generate does, with its arguments; the table is lifted once per call."""
        with self.lifted():
            return super().generate(*args, **kwargs)

    def parameter_groups(
        self,
        learning_rate: float,
        table_rate: float,
        weight_decay: float,
        projector_rate: float = 1.0,
        table_weight_decay: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Split the trainable parameters for an optimiser.

        Args:
            learning_rate: rate of everything but table and projector.
            table_rate: the embedding table's rate as a multiple of learning_rate.
            weight_decay: decoupled decay of the matrices; biases, norms, scale and references have none.
            projector_rate: the projector's rate as a multiple of learning_rate.
            table_weight_decay: the table's decay.

        Returns:
            The groups that are not empty, each with "name", "params", "lr", "weight_decay" and the constant
            "rate", so that a schedule sets lr = base * rate.
        """
        undecayed = {id(parameter) for module in (self.head, self.readout) for parameter in module.parameters()}
        of_projector = {
            id(parameter)
            for module in (self.projector, self.input_projector)
            if module is not None
            for parameter in module.parameters()
        }
        groups: dict[str, dict[str, Any]] = {
            "table": {"rate": table_rate, "weight_decay": table_weight_decay},
            "projector": {"rate": projector_rate, "weight_decay": weight_decay},
            "layers": {"rate": 1.0, "weight_decay": weight_decay},
            "projector biases": {"rate": projector_rate, "weight_decay": 0.0},
            "others": {"rate": 1.0, "weight_decay": 0.0},
        }
        members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
        for parameter in self.parameters():
            matrix = parameter.ndim >= 2 and id(parameter) not in undecayed
            if parameter is self.embedding.weight:
                name = "table"
            elif id(parameter) in of_projector:
                name = "projector" if matrix else "projector biases"
            else:
                name = "layers" if matrix else "others"
            if parameter.requires_grad:
                members[name].append(parameter)
        return [
            {"name": name, "params": members[name], **group, "lr": learning_rate * group["rate"]}
            for name, group in groups.items()
            if members[name]
        ]


AutoModelForCausalLM.register(IndraQuantumConfig, IndraQuantumPhase2)
