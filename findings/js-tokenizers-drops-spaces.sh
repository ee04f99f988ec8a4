#!/usr/bin/env bash
# @huggingface/tokenizers 0.2.0 (JavaScript): decode drops spaces before punctuation and before contractions, where the
# Python package tokenizers gives the text back. Both read the same tokenizer.json and give the same ids. The JavaScript
# library cleans up unless its configuration says clean_up_tokenization_spaces: false; without that entry it takes true.
# transformers 5 no longer writes this entry into tokenizer_config.json, so code such as `print (x , y)` comes back
# changed in a browser.
# Seen with @huggingface/tokenizers 0.2.0 in Node.js 20, tokenizers 0.23.3. Exit status 0 as long as this holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check tokenizers==0.23.3
npm install --silent --no-audit --no-fund @huggingface/tokenizers@0.2.0
cat > make.py <<'PYTHON'
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

letters = {letter: number for number, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
tokenizer = Tokenizer(models.BPE(letters, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.save("tokenizer.json")
ids = tokenizer.encode("print (x , y) is n't it ?").ids
print("tokenizers", tokenizers.__version__)
print("Python:    ", tokenizer.decode(ids), ids)
PYTHON
cat > read.mjs <<'JS'
import { readFileSync } from "node:fs";
import { Tokenizer } from "@huggingface/tokenizers";
const description = JSON.parse(readFileSync("tokenizer.json"));
for (const config of [{}, { clean_up_tokenization_spaces: false }]) {
  const tokenizer = new Tokenizer(description, config), { ids } = tokenizer.encode("print (x , y) is n't it ?");
  console.log(Object.keys(config).length ? "told not to:" : "JavaScript: ", tokenizer.decode(ids), JSON.stringify(ids).replaceAll(",", ", "));
}
JS
{ venv/bin/python make.py; node read.mjs; } > out
cat out
grep -q "^Python:     print (x , y) is n't it ? \[" out
grep -q "^JavaScript:  print (x, y) isn't it? \[" out
grep -q "^told not to: print (x , y) is n't it ? \[" out
test "$(sed -n 's/.*\(\[.*\]\)$/\1/p' out | sort -u | wc -l)" = 1
echo "The ids are the same; the JavaScript library drops spaces when it decodes."
