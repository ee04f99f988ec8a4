#!/usr/bin/env bash
# transformers 5.23.0: several documents in one row, told apart by position_ids that begin again at 0 (no attention mask,
# no cache), are kept apart by Mistral and Gemma 3, but not by GptOss and Afmoe: these two do not hand position_ids to the
# functions that make their masks. A document then reads the one before it, without a warning.
# Seen with transformers 5.23.0, torch 2.13.0 (CPU) on Python 3.11: after a change of the first document's tokens the
# logits of the second stay as they were for Mistral and Gemma 3, and move by more than 0.1 for GptOss and Afmoe.
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
from transformers import AfmoeConfig, AfmoeForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig
from transformers import GptOssConfig, GptOssForCausalLM, MistralConfig, MistralForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
size = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 64,
}
experts = {"num_experts": 2, "num_experts_per_tok": 1, "num_shared_experts": 1, "moe_intermediate_size": 16}
models = {
    "Mistral": lambda: MistralForCausalLM(MistralConfig(**size)),
    "Gemma 3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**size)),
    "GptOss": lambda: GptOssForCausalLM(GptOssConfig(**size, num_local_experts=2, num_experts_per_tok=2)),
    "Afmoe": lambda: AfmoeForCausalLM(AfmoeConfig(**size, **experts, num_dense_layers=1)),
}
torch.manual_seed(0)
first, other, second = (torch.randint(5, 90, (1, 6)) for _ in range(3))
positions = torch.arange(6).repeat(2)[None]


def of_second(model, before):
    ids = torch.cat([before, second], dim=1)
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 6:]


leaks = {}
for name, make in models.items():
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        moved = (of_second(model, first) - of_second(model, other)).abs().max().item()
    leaks[name] = moved > 0.01
    print(f"{name}: the second document's logits move by {moved:.6f}")
raise SystemExit(leaks != {"Mistral": False, "Gemma 3": False, "GptOss": True, "Afmoe": True})
PYTHON
HF_HUB_OFFLINE=1 venv/bin/python compare.py
