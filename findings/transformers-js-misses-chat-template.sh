#!/usr/bin/env bash
# @huggingface/transformers 4.3.2 (transformers.js): a tokenizer that transformers 5 saved has no chat template.
# save_pretrained writes the template into chat_template.jinja only; transformers.js looks only into
# tokenizer_config.json. apply_chat_template then fails with "tokenizer.chat_template is not set".
# Writing the same text into tokenizer_config.json as "chat_template" too makes both read it.
# Seen with transformers.js 4.3.2 in Node.js 20, transformers 5.23.0. Exit status 0 as long as this holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.23.0 jinja2==3.1.6
npm install --silent --no-audit --no-fund --ignore-scripts @huggingface/transformers@4.3.2
cat > save.py <<'PYTHON'
import json

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

backend = Tokenizer(models.BPE({"<unk>": 0, "h": 1, "i": 2}, [], unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
tokenizer.save_pretrained("saved")
chat = [{"role": "user", "content": "hi"}]
print("transformers", transformers.__version__)
print("Python:", AutoTokenizer.from_pretrained("saved").apply_chat_template(chat, tokenize=False))
print("in tokenizer_config.json:", "chat_template" in json.load(open("saved/tokenizer_config.json")))
PYTHON
cat > read.mjs <<'JS'
import { readFileSync, writeFileSync } from "node:fs";
import { AutoTokenizer, env } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = "./";
const chat = [{ role: "user", content: "hi" }];
const read = async (name) => {
  try {
    const tokenizer = await AutoTokenizer.from_pretrained("saved");
    console.log(name, tokenizer.apply_chat_template(chat, { tokenize: false }));
  } catch (error) {
    console.log(name, error.message);
  }
};
await read("JavaScript:");
const config = JSON.parse(readFileSync("saved/tokenizer_config.json"));
config.chat_template = readFileSync("saved/chat_template.jinja", "utf8");
writeFileSync("saved/tokenizer_config.json", JSON.stringify(config));
await read("with the template in tokenizer_config.json:");
JS
HF_HUB_OFFLINE=1 venv/bin/python save.py 2> errors > out || { cat errors; exit 1; }
node read.mjs >> out
cat out
grep -q "^Python: hi$" out
grep -q "^in tokenizer_config.json: False$" out
grep -q "^JavaScript: .*chat_template is not set" out
grep -q "^with the template in tokenizer_config.json: hi$" out
echo "transformers.js does not read chat_template.jinja."
