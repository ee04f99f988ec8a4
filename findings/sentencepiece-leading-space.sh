#!/usr/bin/env bash
# transformers 5.23.0 reads a bare SentencePiece file (tokenizer.model, class LlamaTokenizer) without an error, but gives
# other ids than SentencePiece itself to every text that begins with a space: SentencePiece puts its own space before
# the text whatever it begins with, transformers only before a text that begins with something else.
# Seen with transformers 5.23.0, tokenizers 0.23.3, sentencepiece 0.2.3, protobuf 7.36.2, on Python 3.11:
#     a line that begins with a letter: 0 of 200 differ; one that begins with two spaces: 200 of 200 differ
# Code samples and indented lists are such texts. Exit status 0 as long as this holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check \
  transformers==5.23.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2
mkdir model
cat > compare.py <<'PYTHON'
import json
import random

import sentencepiece
from transformers import AutoTokenizer

draw = random.Random(0)
words = "alpha beta gamma delta data model train loss step token".split()
lines = [" ".join(draw.choice(words) for _ in range(6)) for _ in range(200)]
with open("corpus.txt", "w") as file:
    file.writelines(f"{indent}{line}\n" for line in lines for indent in ("", "  ", "    "))
sentencepiece.SentencePieceTrainer.train(
    input="corpus.txt", model_prefix="model/tokenizer", vocab_size=320, model_type="bpe",
    normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True,
    allow_whitespace_only_pieces=True, minloglevel=2,
)
with open("model/tokenizer_config.json", "w") as file:
    json.dump({"tokenizer_class": "LlamaTokenizer"}, file)
reference = sentencepiece.SentencePieceProcessor(model_file="model/tokenizer.model")
tokenizer = AutoTokenizer.from_pretrained("model")
different = {}
for indent in ("", "  "):
    pairs = [(tokenizer.encode(indent + line, add_special_tokens=False), reference.encode(indent + line)) for line in lines]
    different[indent] = sum(ours != theirs for ours, theirs in pairs)
text = "  " + lines[0]
print("text:          ", repr(text))
print("SentencePiece: ", [reference.id_to_piece(i) for i in reference.encode(text)])
print("transformers:  ", tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False)))
print(f"other ids: {different['']} of 200 without, {different['  ']} of 200 with spaces at the beginning")
raise SystemExit(different != {"": 0, "  ": 200})
PYTHON
HF_HUB_OFFLINE=1 venv/bin/python compare.py
