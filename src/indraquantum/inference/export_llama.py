"""Writes the model as a plain LlamaForCausalLM, which every runtime of transformers' format knows. See folding.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from indraquantum.config import ExportSettings
from indraquantum.data.fast_tokenizer import save_chat_tokenizer
from indraquantum.inference.export_transformers import EXAMPLE, give_generation_config
from indraquantum.inference.folding import FoldedModel, fold, with_bias_layer
from indraquantum.inference.load import Loaded
from indraquantum.inference.model_card import Exported
from indraquantum.model.inference_model import InferenceModel
from indraquantum.teacher.refusals import quiet_transformers

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

CHECKED = (8, 32)  # rows and positions of random tokens


def write(loaded: Loaded, folder: Path, settings: ExportSettings) -> Exported:
    """Write the model at `loaded` into `folder`.

    Raises:
        UserError: the model can't be folded.
    """
    folded = with_bias_layer(fold(loaded.inference_model))
    llama = as_llama(folded, loaded)
    found = agreement(loaded, llama)
    with quiet_transformers():
        llama.save_pretrained(folder)
    save_chat_tokenizer(loaded.tokenizer, folder, folded.context)
    return Exported(
        use='AutoModelForCausalLM.from_pretrained("FOLDER") loads it as a plain Llama.',
        example=EXAMPLE.replace(", trust_remote_code=True", ""),
        notes=(*bias_notes(folded), NO_READOUTS, str(found)),
    )


NO_READOUTS = "A Llama has no readouts: magnitude and phase are left out."


def bias_notes(folded: FoldedModel) -> tuple[str, ...]:
    """Return what to say about the head's bias in a Llama."""
    if not folded.mlp_bias:
        return ()
    return (
        "The head's bias is folded in: the model has one layer and some channels more than it was trained with "
        "(`mlp_bias` is true). Their weights are constants; do not train them.",
    )


def as_llama(folded: FoldedModel, loaded: Loaded) -> LlamaForCausalLM:
    """Return transformers' Llama with the weights of `folded`, which have no bias of the head left."""
    from transformers import LlamaForCausalLM

    config = llama_config(
        loaded, hidden_size=folded.width, intermediate_size=folded.mlp_width, num_hidden_layers=folded.layers,
        rms_norm_eps=folded.epsilon, mlp_bias=folded.mlp_bias,
    )  # fmt: skip
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config)  # its buffers are in no file
    llama.load_state_dict(folded.weights, assign=True)
    give_generation_config(llama, loaded)
    return llama.eval()


def llama_config(loaded: Loaded, **changes: Any) -> LlamaConfig:
    """Return the configuration of a Llama with the sizes of the model at `loaded`, except for `changes`."""
    from transformers import LlamaConfig

    shape, tokenizer = loaded.inference_model.config, loaded.tokenizer
    values = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rms_norm_eps": shape.rms_norm_eps,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "dtype": torch.float32,
    }
    return LlamaConfig(**values | changes)


class Agreement(NamedTuple):
    """How far another form of the model is from ours on random tokens."""

    logits: float  # largest difference
    kl: float  # nats per token, mean

    def __str__(self) -> str:
        return (
            f"On random tokens its logits differ from the trained model's by at most {self.logits:.1e}, and its "
            f"distribution by {max(0.0, self.kl):.1e} nats per token."
        )


def agreement(loaded: Loaded, llama: LlamaForCausalLM) -> Agreement:
    """Compare the folded model with the trained one."""
    return agreement_of(loaded.inference_model, lambda ids_BT: llama(ids_BT, use_cache=False).logits)


@torch.no_grad()
def agreement_of(model: InferenceModel, logits_of: Callable[[Tensor], Tensor]) -> Agreement:
    """Compare another form of `model`, which gives logits for token ids (B, T), with the model on random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.config.vocab_size, CHECKED, generator=generator)
    expected = model.logits(model.hidden_states(ids_BT), model.lift_table())
    found = logits_of(ids_BT)
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return Agreement((found - expected).abs().max().item(), (p.exp() * (p - q)).sum(-1).mean().item())
