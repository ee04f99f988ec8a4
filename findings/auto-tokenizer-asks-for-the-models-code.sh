#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer asks "Do you wish to run the custom code? [y/N]" for a folder whose tokenizer needs
# no code. tokenizer_config.json names a class of transformers; only config.json has an auto_map, for the model.
# AutoTokenizer loads the model's configuration first, before it looks at the tokenizer's own class, and passes on
# trust_remote_code, which is not set. Without a terminal the question is printed, the answer counts as no, the error is
# swallowed, and the right tokenizer comes back. At a terminal, or in a notebook, the program waits.
# Passing trust_remote_code=True to AutoTokenizer avoids the question, and runs the model's code to load a tokenizer.
# Seen with transformers 5.23.0 on Python 3.11. Exit status 0 as long as this holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.23.0
mkdir model
cat > model/config.json <<'JSON'
{"model_type": "something-new", "auto_map": {"AutoConfig": "code.NewConfig"}}
JSON
cat > model/tokenizer_config.json <<'JSON'
{"tokenizer_class": "TokenizersBackend", "eos_token": "</s>"}
JSON
echo "raise SystemExit('the code was run')" > model/code.py
cat > load.py <<'PYTHON'
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

Tokenizer(models.BPE({"a": 0, "</s>": 1}, [])).save("model/tokenizer.json")
print("transformers", transformers.__version__)
print(type(AutoTokenizer.from_pretrained("model")).__name__)
PYTHON
HF_HUB_OFFLINE=1 venv/bin/python load.py < /dev/null > out 2>&1
cat out
grep -q "Do you wish to run the custom code" out
grep -q "TokenizersBackend$" out
echo "AutoTokenizer asked to run code that the tokenizer does not need."
