#!/usr/bin/env bash
# transformers 5.23.0 builds the tokenizer of a GGUF file from its vocabulary and merges. It follows tokenizer.ggml.pre,
# which says how a text is cut first, for some values only; for the others it cuts as GPT-2 does, without a warning.
# SmolLM and SmolLM2 (pre: smollm) set each digit apart first, so most texts with a number of several digits become
# other ids than the model was trained on, and than llama.cpp gives.
# Seen with transformers 5.23.0, tokenizers 0.23.3, gguf 0.19.0 on Python 3.11, on a small file written here whose
# merges know "12" and "34": llama.cpp and the model's own tokenizer give one id a digit.
# Exit status 0 as long as this holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
venv/bin/pip install --quiet --disable-pip-version-check \
  transformers==5.23.0 tokenizers==0.23.3 accelerate==1.15.0 gguf==0.19.0
cat > compare.py <<'PYTHON'
import gguf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
merges = [("1", "2"), ("3", "4"), ("12", "34")]
tokens = ["<|endoftext|>", *letters, "12", "34", "1234"]
writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("smollm")
writer.add_token_list(tokens)
writer.add_token_types([3] + [1] * (len(tokens) - 1))
writer.add_token_merges([" ".join(merge) for merge in merges])
writer.add_bos_token_id(0)
writer.add_eos_token_id(0)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

# The model's own tokenizer.json: digits apart, then GPT-2's way.
own = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
own.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
theirs = AutoTokenizer.from_pretrained(".", gguf_file="model.gguf")
text = "in 1234 ways"
wanted = own.encode(text).tokens
found = theirs.convert_ids_to_tokens(theirs.encode(text, add_special_tokens=False))
print("the model's own tokenizer:", wanted)
print("transformers from the GGUF file:", found)
raise SystemExit(not ([*"1234"] == wanted[3:7] and "1234" in found))
PYTHON
HF_HUB_OFFLINE=1 venv/bin/python compare.py
