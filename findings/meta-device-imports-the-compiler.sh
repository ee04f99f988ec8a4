#!/usr/bin/env bash
# torch 2.13.0: building a module on the meta device, which is meant to cost nothing (no storage, no numbers drawn),
# imports torch's compiler and sympy as soon as the module's initialisation draws from a normal distribution: on meta,
# normal_ goes through torch._refs. nn.Embedding does so, nn.Linear does not, for it draws from a uniform one.
# In a short program (loading a small model's weights) that import takes longer than building the model would have.
# Seen with torch 2.13.0 (CPU) on Python 3.11: after nn.Linear on meta neither torch._dynamo nor sympy is in
# sys.modules; after nn.Embedding both are. Built on the CPU, nn.Embedding imports neither.
# Exit status 0 as long as this holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > imported.py <<'PYTHON'
import sys

import torch
from torch import nn


def imported():
    return {name for name in ("torch._dynamo", "sympy") if name in sys.modules}


print("torch", torch.__version__)
found = {"import torch": imported()}
nn.Embedding(10, 4)
found["Embedding on the CPU"] = imported()
with torch.device("meta"):
    nn.Linear(10, 4)
    found["Linear on meta"] = imported()
    nn.Embedding(10, 4)
    found["Embedding on meta"] = imported()
for what, names in found.items():
    print(f"{what}: {', '.join(sorted(names)) or 'neither'}")
last = found.pop("Embedding on meta")
raise SystemExit(any(found.values()) or last != {"torch._dynamo", "sympy"})
PYTHON
venv/bin/python imported.py
