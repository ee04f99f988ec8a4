#!/usr/bin/env bash
# safetensors 0.8.0, tokenizers 0.23.3: a write that the system refuses, as on a full disk, raises no OSError.
#
# Expected: as for open().write, torch.save and numpy.save, an OSError with its errno, so that `except OSError` can tell a
# full disk from a wrong tensor.
# Seen: safetensors' save_file raises SafetensorError, and Tokenizer.save raises a bare Exception. Neither is an OSError
# nor has an errno; the number stands only in the text, "(os error 27)". transformers' save_pretrained passes both on.
# Whoever must tell a full disk apart can write the bytes of safetensors.numpy.save and Tokenizer.to_str himself.
# The limit on the size of a file stands for the full disk here.
# Seen with Python 3.11 on Linux. Exit status 0 as long as this holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 tokenizers==0.23.3 numpy==2.4.6
cat > "$folder/write.py" <<'PYTHON'
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from tokenizers import Tokenizer, models

folder = Path(sys.argv[1])
tensors = {"weight": np.zeros(4096, np.float32)}
tokenizer = Tokenizer(models.WordLevel({f"word{number}": number for number in range(1000)}, unk_token="word0"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def raised(write):
    try:
        write()
    except Exception as error:
        print(f"{type(error).__name__}, an OSError: {isinstance(error, OSError)}: {str(error)[:90]}")
        return isinstance(error, OSError), "(os error " in str(error)


print("safetensors", safetensors.__version__, "tokenizers", tokenizers.__version__)
found = [
    raised(lambda: safetensors.numpy.save_file(tensors, folder / "a.safetensors")),
    raised(lambda: tokenizer.save(str(folder / "tokenizer.json"))),
    raised(lambda: (folder / "b.safetensors").write_bytes(safetensors.numpy.save(tensors))),
]
sys.exit(0 if found == [(False, True), (False, True), (True, False)] else 1)
PYTHON
"$folder/venv/bin/python" "$folder/write.py" "$folder"
