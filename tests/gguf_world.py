"""Writes small GGUF files on the spot: random models of the supported architectures, with a tokenizer inside."""

from __future__ import annotations

import json

import gguf
import numpy as np

SETTINGS = {  # transformers' name: llama.cpp's
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
LLAMA_NORM = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ROPE_FACTORS = "rope_freqs.weight"
BYTE_LEVEL = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}


def tensors_of(model, architecture):
    """The tensors of a transformers model under llama.cpp's names, as float32 arrays in its layout."""
    config = model.config
    norms = GEMMA_NORMS if architecture == "gemma3" else LLAMA_NORM
    found = {}
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        whole, _, kind = name.rpartition(".")
        if architecture == "gemma3" and "norm" in whole:
            array = array + 1
        if architecture == "llama" and whole.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if whole.endswith("q_proj") else config.num_key_value_heads
            halves = array.reshape(heads, 2, config.head_dim // 2, -1)  # llama.cpp turns neighbours, not halves
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if whole.startswith("model.layers."):
            _, _, layer, part = whole.split(".", 3)
            found[f"blk.{layer}.{ {**NAMES, **norms}[part] }.{kind}"] = array
        elif whole == "lm_head" and config.tie_word_embeddings:
            continue
        else:
            ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            found[f"{ends[whole]}.{kind}"] = array
    return found


def settings_of(model, architecture):
    """The settings of a transformers model under llama.cpp's names."""
    config = model.config
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    found = {f"{architecture}.{name}": getattr(config, key) for key, name in SETTINGS.items()}
    found[f"{architecture}.rope.freq_base"] = float(rope["rope_theta"])
    if architecture == "llama":
        found["llama.rope.dimension_count"] = config.head_dim
    if architecture != "qwen2":
        found |= {f"{architecture}.attention.{part}_length": config.head_dim for part in ("key", "value")}
    if architecture == "gemma3":
        found["gemma3.attention.sliding_window"] = config.sliding_window
    return found


def byte_level_of(folder):
    """The metadata of a byte-level tokenizer.json whose first two tokens are BOS and EOS."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return BYTE_LEVEL | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }


def write_gguf(path, metadata, tensors=None, quantisation=None, architecture="llama"):
    """Write a file. An entry of the metadata that is None is left out; matrices get the type of `quantisation`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in metadata.items():
        if value is None:
            continue
        kind = gguf.GGUFValueType.get_type(value)
        sub_type = None
        if isinstance(value, int) and not isinstance(value, bool):
            kind = gguf.GGUFValueType.UINT32
        if isinstance(value, list):
            sub_type = gguf.GGUFValueType.get_type(value[0])
        writer.add_key_value(name, value, kind, sub_type)
    for name, array in (tensors or {}).items():
        if quantisation and array.ndim == 2:
            kind = gguf.GGMLQuantizationType[quantisation]
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path, model, tokenizer, architecture="llama", quantisation=None, extra_tensors=None, **metadata):
    """Write a transformers model with the tokenizer of a folder; `metadata` overrides entries, `.` written as `__`."""
    entries = settings_of(model, architecture) | byte_level_of(tokenizer)
    entries |= {name.replace("__", "."): value for name, value in metadata.items()}
    tensors = tensors_of(model, architecture) | (extra_tensors or {})
    return write_gguf(path, entries, tensors, quantisation, architecture)


def numpy_logits(path, ids):
    """The logits of a Llama in a GGUF file, computed in float64 from its own settings and tensors alone, (T, V)."""
    reader = gguf.GGUFReader(path)
    about = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
    weights = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    heads, groups = about["llama.attention.head_count"], about["llama.attention.head_count_kv"]
    width, length = about["llama.rope.dimension_count"], len(ids)
    frequencies = about["llama.rope.freq_base"] ** (-np.arange(0, width, 2) / width)
    frequencies = frequencies / weights.get("rope_freqs.weight", 1.0)
    turn = np.exp(1j * np.outer(np.arange(length), frequencies))  # (T, width / 2)

    def norm(x, name):
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + about["llama.attention.layer_norm_rms_epsilon"])
        return x / scale * weights[name]

    def rotated(x, number):  # neighbours are the real and the imaginary part of a number
        pairs = x.reshape(length, number, width // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(length, number, width)

    x = weights["token_embd.weight"][ids]
    for layer in range(about["llama.block_count"]):
        w = {name.split(".")[2]: value for name, value in weights.items() if name.startswith(f"blk.{layer}.")}
        h = norm(x, f"blk.{layer}.attn_norm.weight")
        q = rotated(h @ w["attn_q"].T, heads)
        k = np.repeat(rotated(h @ w["attn_k"].T, groups), heads // groups, 1)
        v = np.repeat((h @ w["attn_v"].T).reshape(length, groups, width), heads // groups, 1)
        scores = np.einsum("thw,shw->hts", q, k) / np.sqrt(width)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shw->thw", scores / scores.sum(-1, keepdims=True), v).reshape(length, -1)
        x = x + mixed @ w["attn_output"].T
        h = norm(x, f"blk.{layer}.ffn_norm.weight")
        gate = h @ w["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
    return norm(x, "output_norm.weight") @ weights.get("output.weight", weights["token_embd.weight"]).T
