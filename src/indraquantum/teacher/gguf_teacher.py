"""Makes sure that transformers loads a GGUF file as the model that it is, and completes what transformers leaves out.

transformers 5.23 reads GGUF files of many architectures. It silently drops every tensor and every setting that it does
not know, and the model then gives other logits. So only the architectures below are taken, whose logits were compared
with llama.cpp's, and only with the tensors and settings listed here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from indraquantum.data.gguf_file import GgufFile, read_tensor
from indraquantum.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1 and later divide the frequencies of their positions by these
_SIZES = (
    "context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
)  # fmt: skip
_WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")  # of one head
_OTHER_SETTINGS = (*_WIDTHS, "rope.freq_base", "vocab_size")
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_TENSORS = ("attn_norm", *_MATRICES, "ffn_norm")


class _Architecture(NamedTuple):
    """What transformers understands of an architecture."""

    model_type: str  # its name in transformers
    settings: tuple[str, ...] = ()
    layer_tensors: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()


_QK_NORMS = ("attn_q_norm", "attn_k_norm")
_KNOWN = {
    "llama": _Architecture("llama", tensors=(ROPE_FACTORS,)),
    "qwen2": _Architecture("qwen2", biases=("attn_q", "attn_k", "attn_v")),
    "qwen3": _Architecture("qwen3", layer_tensors=_QK_NORMS),
    "gemma3": _Architecture(
        "gemma3_text",
        settings=("attention.sliding_window",),
        layer_tensors=(*_QK_NORMS, "post_attention_norm", "post_ffw_norm"),
    ),
}
_GEMMA3_27B_LAYERS = 62  # it alone scales its attention differently


def check_gguf(field: str, file: GgufFile) -> None:
    """Refuse a GGUF file that transformers would load as another model.

    Raises:
        UserError: its architecture was not checked, or it has a tensor or a setting that transformers drops.
    """
    name = file.architecture
    if (known := _KNOWN.get(name)) is None:
        allowed = f"has the architecture {name}; supported in GGUF files are {', '.join(_KNOWN)}"
        raise UserError(field, file.path, f"{allowed}. Give the folder of the original model instead")
    stated = {key.removeprefix(f"{name}."): value for key, value in file.metadata.items() if key.startswith(f"{name}.")}
    for key in _SIZES:
        if key not in stated:
            raise UserError(field, file.path, f"must state {name}.{key}, but does not")
    supported = {*_SIZES, *_OTHER_SETTINGS, *known.settings}
    for key, value in stated.items():
        if key not in supported and (key, value) != ("rope.scaling.type", "none"):
            raise UserError(field, file.path, f"has {name}.{key} {value}, which transformers leaves out of the model")
    if len({stated[key] for key in _WIDTHS if key in stated}) > 1:
        raise UserError(field, file.path, "must have queries, keys and values of one width, which all turn with rope")
    if name == "gemma3" and stated["block_count"] == _GEMMA3_27B_LAYERS:
        raise UserError(field, file.path, "is Gemma 3 27B, whose attention transformers scales wrongly in GGUF files")
    for tensor in file.tensors:
        if not _is_known(tensor, known, stated["block_count"]):
            raise UserError(field, file.path, f"has the tensor {tensor}, which transformers leaves out of the model")


def _is_known(tensor: str, known: _Architecture, layers: int) -> bool:
    if tensor in ("token_embd.weight", "output_norm.weight", "output.weight", *known.tensors):
        return True
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor)
    if found is None or int(found[1]) >= layers:
        return False
    return found[2] in (known.biases if found[3] == "bias" else (*_TENSORS, *known.layer_tensors))


def completed(file: GgufFile, config: PretrainedConfig) -> PretrainedConfig:
    """Return transformers' configuration of the file, with the settings that transformers does not read.

    Raises:
        ValueError: transformers takes the model for another one.
    """
    if config.model_type != _KNOWN[file.architecture].model_type:  # a model whose name is "mistral"
        raise ValueError(f"transformers takes {file.architecture} for {config.model_type}")
    if (width := file.metadata.get(f"{file.architecture}.attention.key_length")) is not None:
        config.head_dim = width
    if file.architecture == "gemma3":
        config.query_pre_attn_scalar = config.head_dim
    return config


def apply_rope_factors(file: GgufFile, model: torch.nn.Module) -> None:
    """Divide the model's rotary frequencies by the file's factors, if it has any, as llama.cpp does."""
    import torch

    if ROPE_FACTORS in file.tensors:
        factors = torch.from_numpy(read_tensor(file.path, ROPE_FACTORS))
        model.model.rotary_emb.inv_freq.div_(factors.to(model.model.rotary_emb.inv_freq.device))
