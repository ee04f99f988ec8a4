"""IndraQuantumPhase2: embeddings, a quantum projector at both ends, Llama layers in between, and two readouts.

    table = projector(E)   ->   states psi = layers(table[input_ids])   ->   logits = scale * psi . table^T + bias
                                                                        ->   c = <r, psi>, magnitude |c|, phase arg c

The layers are transformers' own Llama, fed by `inputs_embeds`, with its rotary positions, KV caches and attention
kernels. A training step lifts the table once (`lift_table`), passes it to `hidden_states` and to the objective, and
never builds logits. `forward` takes the arguments of Llama's. In training mode, with labels, it does the same.

Legend: B batch, T positions, N = B*T, d width of the table, D real width (2c, where c is the complex width),
    V vocabulary, K kept teacher tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init  # transformers guards it where a checkpoint has brought the weights
from transformers import AutoModelForCausalLM, GenerationMixin, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from indraquantum.files import NOT_ITS_SUM, SUMS_NAME, damaged_file
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.core import QuantumCore
from indraquantum.model.head import InterferenceHead
from indraquantum.model.masks import document_mask_for
from indraquantum.model.objective import Objective, Signals, TrainingLoss
from indraquantum.model.output import CACHE, PASSED_ON, IndraQuantumOutput, unknown_argument
from indraquantum.model.projector import LiftLinear, PhaseLinear, uniform_by_fan_in
from indraquantum.model.readout import ReferenceReadout
from indraquantum.model.vocabulary import LiftedVocabulary


class Backbone(LlamaModel):
    """Llama's layers on given inputs, without its unused table, and with initial weights that depend on the width."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        del self.embed_tokens

    def get_input_embeddings(self) -> None:
        """Return None: the inputs come from the projector."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            uniform_by_fan_in(module)
        else:
            super()._init_weights(module)


# Outputs of the layers that the configuration can ask for too.
RECORDED = ("output_hidden_states", "output_attentions")


def _has_restarts(position_ids: Tensor | None) -> bool:
    """Return whether several documents share a row of `position_ids` (B, T); a cache would mix them."""
    return position_ids is not None and find_packed_sequence_indices(position_ids) is not None


def _kept(states_BTD: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Return the states of the last positions, or of those that a tensor names for all rows, for each, or as a mask."""
    if isinstance(logits_to_keep, int):
        return states_BTD[:, -logits_to_keep:]
    if logits_to_keep.ndim < 2:
        return states_BTD[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return states_BTD[logits_to_keep]
    return states_BTD.take_along_dim(logits_to_keep[..., None], dim=1)


def _shifted(labels_BT: Tensor, segment_ids_BT: Tensor | None) -> Tensor:
    """Return the labels of the next positions, (B, T); -100 at the row's end and where another document begins."""
    shifted_BT = F.pad(labels_BT[:, 1:], (0, 1), value=-100)
    if segment_ids_BT is None:
        return shifted_BT
    following_BT = F.pad(segment_ids_BT[:, 1:], (0, 1), value=-1)
    return shifted_BT.masked_fill((following_BT != segment_ids_BT) | (segment_ids_BT < 0), -100)


class IndraQuantumPhase2(TrainingLoss, LiftedVocabulary, QuantumCore, PreTrainedModel, GenerationMixin):
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
    if TYPE_CHECKING:  # transformers would read the annotation
        config: IndraQuantumConfig

    def __init__(self, config: IndraQuantumConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # so Trainer counts the labels that the shift leaves
        embedding = nn.Embedding(config.vocab_size, config.d_model)
        self._add_parts(config, embedding, lambda: Backbone(config.backbone()))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for every module, also for those a checkpoint lacks; its default would draw
        # every Linear and Embedding with std 0.02, which puts all phases near 0.
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.table_std or self.projector.table_std)
        elif isinstance(module, LiftLinear | PhaseLinear | InterferenceHead | ReferenceReadout):
            module.initialise()

    def _document_mask(self, segment_ids_BT: Tensor) -> Tensor:
        attention = cast(Backbone, self.backbone).config._attn_implementation
        return document_mask_for(attention, segment_ids_BT, self.dtype)

    def _run_layers(self, states_BTD: Tensor, mask: Tensor | None, position_ids_BT: Tensor | None) -> Tensor:
        return self.backbone(
            inputs_embeds=states_BTD, attention_mask=mask, position_ids=position_ids_BT, use_cache=False
        ).last_hidden_state

    def next_logits(self, ids_BT: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """Return the logits (B, V) of the token after `ids_BT`, and the cache to pass together with that token.

        Args:
            ids_BT: (B, T) the beginning of the text, or with `past` the next token (B, 1).
            past: the cache from the last call; None at the beginning of a text.
        """
        output = self(ids_BT, cache=past, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1], output[CACHE]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: float | Tensor | None = None,
        skip_logits: bool | None = None,
        segment_ids: Tensor | None = None,
        signals: Signals | None = None,
        objective: Objective | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> IndraQuantumOutput:
        """Return logits and, with labels, the loss. The arguments have the same meaning as Llama's.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, all positions so far) 1 for real tokens, 0 for padding; or a 4-D mask as
                transformers takes it.
            position_ids: (B, T) positions within each document.
            past_key_values: the cache of earlier positions, under transformers' name before 5.24.
            inputs_embeds: (B, T, d) instead of input_ids, as `get_input_embeddings()` gives them.
            labels: (B, T) usually a copy of input_ids. The model shifts them: position t learns labels[:, t + 1]; -100
                is ignored. With segment_ids, position t learns nothing if t + 1 belongs to another document.
            use_cache: return a cache for the next positions. By default it does what the configuration says, but not
                in training mode and not for packed documents.
            logits_to_keep: how many of the last positions get logits; 0 for all. The loss is of all positions.
            num_items_in_batch: labelled tokens of the whole optimiser step, which divide the loss. By default they are
                those of this call. With segment_ids, transformers' Trainer counts the first token of each document too,
                which no position learns: set its label to -100, or give shift_labels beside labels.
            skip_logits: leave out the logits. By default, calls with labels do as the configuration's skip_logits says.
                If that is None, they leave them out in training mode, where they would take most of the memory.
            segment_ids: (B, T) number of the document within the row, -1 on padding. It can't be combined with
                attention_mask or a cache.
            signals: the teacher's signals for the N = B*T positions, row by row, or a dict of their fields. Those of
                position t are about the token after t, like logits[:, t] and shift_labels[:, t], and count if that
                token is labelled.
            objective: the loss. By default it is CE alone or, with signals, has the weights at the end of v4: 0.05 for
                distillation, 0.1 for the phase if the signals have entropy_N, and 0.1 for the magnitude if they have
                confidence_N. Signals of another temperature than 1 need an objective of theirs.
            cache: the cache of earlier positions.
            kwargs: `shift_labels` (B, T) instead of labels, already aligned: position t learns shift_labels[:, t];
                output_hidden_states, output_attentions, return_dict. Others of TransformersKwargs go to the layers.

        Raises:
            TypeError: an argument is unknown.
            ValueError: segment_ids comes together with attention_mask or a cache, there is not exactly one of input_ids
                and inputs_embeds, embeddings or labels have another shape, or the objective is for another head or
                another temperature than the signals.
        """
        if cache is None:
            cache = past_key_values
        # Not a parameter: Trainer would take each one with "label" in its name for something that every batch has.
        shift_labels = kwargs.pop("shift_labels", None)
        for name in (
            "tokenizer",
            "assistant_tokenizer",
        ):  # `generate(stop_strings=..., tokenizer=...)` passes them along
            kwargs.pop(name, None)
        if unknown := kwargs.keys() - PASSED_ON:
            raise unknown_argument(min(unknown), self.forward)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: must be given, or inputs_embeds in their place, and not both")
        if segment_ids is not None:
            if attention_mask is not None or cache is not None or use_cache:
                raise ValueError("segment_ids: must not be given together with attention_mask or a cache")
            attention_mask = self._document_mask(segment_ids)
        if use_cache is None:
            packed = segment_ids is not None or (attention_mask is None and _has_restarts(position_ids))
            use_cache = self.config.use_cache and not self.training and not packed
        if inputs_embeds is None:
            inputs_embeds = self.embedding(input_ids)
        elif inputs_embeds.shape[-1] != self.config.d_model:
            got, must = inputs_embeds.shape[-1], self.config.d_model
            raise ValueError(f"inputs_embeds: got width {got}; must be d_model, {must}")
        for name in RECORDED:
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self.config, name)
        table_VD = self._table(use_cache)
        outputs = self.backbone(
            inputs_embeds=self.input_states(inputs_embeds),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )
        states_BTD = outputs.last_hidden_state
        amplitude_BT = self.amplitude(states_BTD)
        if shift_labels is None and labels is not None:
            shift_labels = _shifted(labels, segment_ids)
        terms = logits = None
        if shift_labels is not None:
            if shift_labels.shape != amplitude_BT.shape:
                shape, expected = tuple(shift_labels.shape), tuple(amplitude_BT.shape)
                raise ValueError(f"labels: got shape {shape}; must be (B, T) = {expected}")
            terms = self._terms(
                states_BTD, table_VD, amplitude_BT, shift_labels, signals, objective, num_items_in_batch
            )
        if skip_logits is None and terms is not None:
            skip_logits = self.training if self.config.skip_logits is None else self.config.skip_logits
        if not skip_logits:
            logits = self.logits(_kept(states_BTD, logits_to_keep), table_VD)
        return IndraQuantumOutput(
            loss=None if terms is None else terms.total,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            magnitude=amplitude_BT.abs(),
            phase=amplitude_BT.angle(),
            terms=terms,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does. If the folder has a SHA256SUMS, check the files in it.

        Raises:
            OSError: a file of weights, or config.json, does not match SHA256SUMS.
        """
        folder = Path(str(pretrained_model_name_or_path))
        if (name := damaged_file(folder, ["config.json", *(p.name for p in folder.glob("*.safetensors"))])) is not None:
            raise OSError(f"{folder / name} {NOT_ITS_SUM}")
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info
        if model.config.projector == "frozen":  # transformers makes each loaded weight trainable
            for projector in (model.projector, model.input_projector):
                if projector is not None:
                    projector.requires_grad_(False)
        return loaded

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with a SHA256SUMS that is empty, so that none of an earlier export remains.

        It holds no checksums: others rewrite such a folder later, without knowing of that file.
        """
        if self._auto_class is None:  # transformers copies the code that config.json names only for code of a folder
            self.config.__dict__.pop("auto_map", None)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if self.should_save_on_this_rank(is_main_process):
            self._without_sums(save_directory)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        # A push adds files to a repository and replaces some, but removes none.
        self._without_sums(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @staticmethod
    def _without_sums(folder: Any) -> None:
        (Path(folder) / SUMS_NAME).write_text("")

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Write text as transformers' generate does, with its arguments. Each call lifts the table at most once."""
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
            learning_rate: the learning rate of everything except table and projector.
            table_rate: the embedding table's learning rate, as a multiple of learning_rate.
            weight_decay: decoupled weight decay of the matrices; biases, norms, scale and references have none.
            projector_rate: the projector's learning rate, as a multiple of learning_rate.
            table_weight_decay: the weight decay of the table.

        Returns:
            The groups that are not empty, each with "name", "params", "lr", "weight_decay" and the constant "rate", so
            that a schedule can set lr = base * rate.
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
# Trainer's label smoothing shifts the labels only of classes that are named here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[IndraQuantumConfig.model_type] = IndraQuantumPhase2.__name__
