#!/usr/bin/env bash
# transformers 5.23.0 loads a GGUF file of Llama 3.1, 3.2 or 3.3 without an error or a warning, but as another model.
# llama.cpp stores the factors of the "llama3" rope scaling as the tensor rope_freqs.weight, which transformers drops. No
# weight counts as missing or unexpected, and the configuration says rope_type "default".
# Seen with transformers 5.23.0, gguf 0.19.0, torch 2.13.0 (CPU) on Python 3.11, on a random Llama whose file is laid out
# as llama.cpp's converter does it: without scaling the loaded logits are those of the original; with it they move by
# more than a tenth of their spread (here by all of it), and dividing the frequencies by the factors brings them back.
# Exit status 0 as long as this holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
cat > compare.py <<'PYTHON'
import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM

WIDTH, HEADS = 16, 4
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
         "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(model, name):
    writer = gguf.GGUFWriter(name, "llama")
    writer.add_context_length(256)
    writer.add_block_count(2)
    writer.add_embedding_length(WIDTH * HEADS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(97)
    default = 1 / 10000.0 ** (torch.arange(0, WIDTH, 2) / WIDTH)
    factors = default / model.model.rotary_emb.inv_freq
    if (factors != 1).any():
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for key, value in model.state_dict().items():
        whole, array = key.removesuffix(".weight"), value.numpy()
        if whole.endswith(("q_proj", "k_proj")):
            array = array.reshape(HEADS, 2, WIDTH // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if whole.startswith("model.layers."):
            _, _, layer, part = whole.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{NAMES[part]}.weight", array)
        else:
            writer.add_tensor(f"{NAMES[whole]}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return factors


moved = {}
ids = torch.arange(60)[None]
for kind, rope in (("default", {"rope_type": "default"}), ("llama3", SCALING)):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=WIDTH * HEADS, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS,
        max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=False,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )).eval()
    factors = write(model, f"{kind}.gguf")
    loaded, about = AutoModelForCausalLM.from_pretrained(
        ".", gguf_file=f"{kind}.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32,
        output_loading_info=True,
    )
    with torch.no_grad():
        wanted, found = model(ids).logits, loaded.eval()(ids).logits
        loaded.model.rotary_emb.inv_freq.div_(factors)
        mended = loaded(ids).logits
    moved[kind] = ((found - wanted).std() / wanted.std()).item()
    after = ((mended - wanted).std() / wanted.std()).item()
    print(f"{kind}: missing {len(about['missing_keys'])}, unexpected {len(about['unexpected_keys'])}, rope "
          f"{loaded.config.rope_parameters['rope_type']}, logits moved by {moved[kind]:.1%}, mended {after:.1e}")
    assert not about["missing_keys"] and not about["unexpected_keys"] and after < 1e-3
raise SystemExit(not (moved["default"] < 1e-3 and moved["llama3"] > 0.1))
PYTHON
HF_HUB_OFFLINE=1 venv/bin/python compare.py
