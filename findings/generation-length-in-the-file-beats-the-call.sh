#!/usr/bin/env bash
# transformers 5.23.0: if a model's generation_config.json names max_new_tokens, a caller's generate(max_length=...) has
# no effect: the value in the file counts as if the caller had given both, and of both max_new_tokens wins, with a
# warning that speaks of two arguments. A caller who asks for at most 12 tokens gets 44. Other fields of the file are
# defaults that a call replaces.
# Seen with transformers 5.23.0, torch 2.13.0 (CPU) on Python 3.11, a prompt of 4 tokens:
#     max_length=12 without the field in the file: 12 tokens; with max_new_tokens=40 in it: 44; max_new_tokens=8: 12
# Exit status 0 as long as this holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.23.0
cat > compare.py <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 31}
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None, bos_token_id=None, pad_token_id=0))
prompt = torch.tensor([[5, 6, 7, 8]])
seen = {}
for name, fields in {"plain": {}, "named": {"max_new_tokens": 40}}.items():
    model.generation_config = GenerationConfig(pad_token_id=0, **fields)
    model.save_pretrained(name)
    loaded = AutoModelForCausalLM.from_pretrained(name)
    for call in ({"max_length": 12}, {"max_new_tokens": 8}):
        seen[name, *call] = loaded.generate(prompt, do_sample=False, **call).shape[1]
print(seen)
expected = {("plain", "max_length"): 12, ("plain", "max_new_tokens"): 12,
            ("named", "max_length"): 44, ("named", "max_new_tokens"): 12}
raise SystemExit(seen != expected)
PYTHON
HF_HUB_OFFLINE=1 venv/bin/python compare.py
