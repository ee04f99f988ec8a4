"""Writes the model as a GGUF file, for llama.cpp, Ollama and other programs that read it.

A model without a bias is written as the architecture `llama`. In llama.cpp that one has no bias at the output, but
`qwen2` has one, and is the same in everything else. So a model with a bias is written as `qwen2`, and nothing has to be
approximated. Its queries, keys and values have biases too, which are 0.

The two differ in the order of the rotary pairs: in llama.cpp `llama` rotates neighbours, `qwen2` the two halves of a
head, as transformers does for both. So for `llama`, the rows of queries and keys are reordered.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from indraquantum.config import ExportSettings
from indraquantum.data.fast_tokenizer import chat_template, padding_id
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.errors import UserError, optional_package
from indraquantum.inference.export_llama import NO_READOUTS
from indraquantum.inference.folding import FoldedModel, fold
from indraquantum.inference.gguf_tokenizer import gguf_tokenizer
from indraquantum.inference.load import Loaded
from indraquantum.inference.model_card import Exported
from indraquantum.model.decoder import neighbouring_pairs
from indraquantum.model.exports import BLOCK

if TYPE_CHECKING:
    from gguf import GGUFWriter

EXAMPLE = """```sh
llama-completion -m {name} -no-cnv -p "The history of the city begins"  # text; older builds: llama-cli
llama-cli -m {name} -cnv --jinja                                        # chat, in Alpaca's form
ollama create my-model -f Modelfile && ollama run my-model              # chat
```"""
# Ollama does not run the chat template of the file. This one does the same, in Go's language: between two exchanges are
# EOS and, if there is one, BOS.
MODELFILE = '''\
FROM ./NAME
TEMPLATE """{{- range .Messages }}
{{- if eq .Role "user" }}### Instruction:
{{ if $.System }}{{ $.System }}

### Input:
{{ end }}{{ .Content }}

### Response:
{{ else if eq .Role "assistant" }}{{ .Content }}BETWEEN
{{- end }}
{{- end }}"""
PARAMETER stop "### Instruction:"
'''
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # llama.cpp's numbers
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write(loaded: Loaded, folder: Path, settings: ExportSettings) -> Exported:
    """Write the model at `loaded` into a GGUF file in `folder`, and beside it a Modelfile for Ollama.

    Raises:
        UserError: the model can't be folded, the format does not fit its width, llama.cpp does not know its tokenizer,
            or the package gguf is missing.
    """
    with optional_package("--as", "gguf", "gguf", "indraquantum[gguf]"):
        from gguf import GGUFWriter

    folded = fold(loaded.inference_model)
    outtype = settings.outtype or "f16"
    if outtype not in FILE_TYPES:
        raise UserError("--outtype", outtype, "must be f32, f16 or q8_0 for --as gguf")
    if outtype == "q8_0" and folded.width % BLOCK:
        allowed = f"must be f32 or f16: the width {folded.width} is not a multiple of {BLOCK}"
        raise UserError("--outtype", outtype, allowed)
    name = f"model-{outtype}.gguf"
    architecture = "llama" if folded.bias_V is None else "qwen2"
    writer = GGUFWriter(folder / name, architecture)
    write_sizes(writer, folded, outtype)
    write_tokenizer(writer, loaded, folded.vocab_size)
    for tensor, value in tensors(folded, architecture):
        _add(writer, tensor, value, outtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "Modelfile").write_text(modelfile(name, loaded.tokenizer), encoding="utf-8")
    return Exported(
        use=f"`llama-cli -m {name} -cnv --jinja` opens a chat with it, and its `Modelfile` is for Ollama.",
        example=EXAMPLE.format(name=name),
        notes=(f"`{name}` has the architecture {architecture}.", NO_READOUTS),
        library="gguf",
    )


def modelfile(name: str, tokenizer: TextTokenizer) -> str:
    """Return what Ollama needs to know about the GGUF file `name`."""
    beginning = "" if tokenizer.bos_id is None else tokenizer.beginning
    return MODELFILE.replace("NAME", name).replace("BETWEEN", tokenizer.ending + beginning)


def write_sizes(writer: GGUFWriter, folded: FoldedModel, outtype: str) -> None:
    """Write the fields that describe the model."""
    writer.add_name("IndraQuantum")
    writer.add_file_type(FILE_TYPES[outtype])
    writer.add_quantization_version(2)
    writer.add_vocab_size(folded.vocab_size)
    writer.add_context_length(folded.context)
    writer.add_embedding_length(folded.width)
    writer.add_block_count(folded.layers)
    writer.add_feed_forward_length(padded_mlp_width(folded.mlp_width))
    writer.add_head_count(folded.heads)
    writer.add_head_count_kv(folded.key_value_heads)
    writer.add_layer_norm_rms_eps(folded.epsilon)
    writer.add_rope_freq_base(folded.rope_theta)
    writer.add_rope_dimension_count(folded.head_dim)


def write_tokenizer(writer: GGUFWriter, loaded: Loaded, size: int) -> None:
    """Write the fields of the tokenizer."""
    tokenizer = loaded.tokenizer
    fields = gguf_tokenizer(tokenizer, size)
    writer.add_tokenizer_model(fields.model)
    writer.add_tokenizer_pre(fields.pre)
    writer.add_token_list(fields.tokens)
    writer.add_token_types(fields.types)
    if fields.scores is not None:
        writer.add_token_scores(fields.scores)
        writer.add_add_space_prefix(fields.add_space_prefix)
    if fields.merges is not None:
        writer.add_token_merges(fields.merges)
    if fields.unknown_id is not None:
        writer.add_unk_token_id(fields.unknown_id)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    writer.add_add_eos_token(False)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(padding_id(tokenizer))
    writer.add_chat_template(chat_template(tokenizer))


def padded_mlp_width(width: int) -> int:
    """Return the inner width of the MLP in the file: in whole blocks of q8_0. What is added is 0."""
    return -(-width // BLOCK) * BLOCK


def tensors(folded: FoldedModel, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors by llama.cpp's names."""
    weights, padding = folded.weights, padded_mlp_width(folded.mlp_width) - folded.mlp_width
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    yield "output.weight", weights["lm_head.weight"]
    if folded.bias_V is not None:
        yield "output.bias", folded.bias_V
    for layer in range(folded.layers):
        for name, theirs in NAMES.items():
            value = weights[f"model.layers.{layer}.{name}.weight"]
            if theirs in ("attn_q", "attn_k") and architecture == "llama":
                value = neighbouring_pairs(value, folded.head_dim)
            if theirs in ("ffn_gate", "ffn_up"):
                value = F.pad(value, (0, 0, 0, padding))
            if theirs == "ffn_down":
                value = F.pad(value, (0, padding))
            yield f"blk.{layer}.{theirs}.weight", value
            if theirs in ("attn_q", "attn_k", "attn_v") and architecture == "qwen2":
                yield f"blk.{layer}.{theirs}.bias", torch.zeros(len(value))


def _add(writer: GGUFWriter, name: str, value: Tensor, outtype: str) -> None:
    """Add a tensor to the file; vectors are always float32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    array: Any = value.detach().float().contiguous().numpy()
    kind = GGMLQuantizationType[outtype.upper()] if array.ndim > 1 else GGMLQuantizationType.F32
    writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
