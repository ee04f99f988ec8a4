#!/usr/bin/env bash
# torch 2.13.0 (CPU, oneDNN): a product in bfloat16 of a size that did not occur before keeps about half a megabyte.
#
# Expected: `a @ b` frees what it used, so memory is the same after 1,000 products of different sizes as after 200 of one
# size. In float32 it is.
# Seen: in bfloat16 the memory of the process grows by 0.56 MB for each new size, and stops at about 1,000 sizes: 146 MB
# after products of one size, 711 MB after 1,000 different ones, 731 MB after 2,000 (AMD EPYC with AVX-512 and
# bfloat16). malloc_trim does not get it back. oneDNN keeps the code of its last 1,024 sizes, and
# ONEDNN_PRIMITIVE_CACHE_CAPACITY=16 halves the growth, but does not end it.
# Whoever trains with a number of tokens, rows or candidates that differs from step to step meets this: let the sizes
# recur, such as by rounding them up.
#
# Needs a processor whose products in bfloat16 go through oneDNN (AVX-512 with bfloat16, or AMX).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/measure.py" <<'PYTHON'
import ctypes
import sys

import torch

torch.set_num_threads(1)
libc = ctypes.CDLL("libc.so.6")


def megabytes_after(sizes, dtype):
    a = torch.ones(256, 256, dtype=dtype)
    for n in sizes:
        a @ torch.ones(256, n, dtype=dtype)
    libc.malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


grown = {}
for dtype in (torch.float32, torch.bfloat16):
    one_size = megabytes_after([3000] * 200, dtype)
    thousand = megabytes_after(range(2000, 3000), dtype)
    more = megabytes_after(range(3000, 4000), dtype)
    grown[dtype] = thousand - one_size
    print(f"{dtype}: {one_size:.0f} MB after one size, {thousand:.0f} after 1,000, {more:.0f} after 2,000")
print("torch", torch.__version__)
sys.exit(0 if grown[torch.float32] < 50 and grown[torch.bfloat16] > 200 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/measure.py"
