#!/usr/bin/env bash
# torch.onnx (torch 2.13.0, onnxscript 0.7.2): an exported atan2, and so the angle of a complex number, is -pi on the
# negative real axis, where torch, NumPy and C give +pi. ONNX has no Atan2, so the exporter writes an arctangent and
# corrects its quadrant: pi is added if y > 0, otherwise subtracted, so y = 0 falls on the wrong side. The difference is
# a whole turn for an angle itself, but everything that compares, averages or clips angles sees 2 pi.
# Exporting atan(y / x) + where(y < 0, -pi, pi) for x < 0 gives torch's values.
# Seen with torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0 on Python 3.11. Exit status 0 as long as this
# holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cat > angle.py <<'PYTHON'
import logging
import warnings

import onnxruntime
import torch

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


class Angles(torch.nn.Module):
    def forward(self, x, y):
        return torch.atan2(y, x), torch.complex(x, y).angle()


x, y = torch.tensor([-1.0, -2.0, 1.0, -1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
torch.onnx.export(Angles(), (x, y), "angles.onnx", dynamo=True, verbose=False)
session = onnxruntime.InferenceSession("angles.onnx", providers=["CPUExecutionProvider"])
print("torch", torch.__version__.split("+")[0], "onnxruntime", onnxruntime.__version__)
for name, ours, theirs in zip(("atan2", "angle"), Angles()(x, y), session.run(None, {"x": x.numpy(), "y": y.numpy()})):
    print(f"{name}: torch {[round(v, 4) for v in ours.tolist()]}, exported {[round(v, 4) for v in theirs.tolist()]}")
PYTHON
venv/bin/python angle.py 2> errors > out || { cat errors; exit 1; }
cat out
grep -q "atan2: torch \[3.1416, 3.1416, 0.0, 2.3562\], exported \[-3.1416, -3.1416, 0.0, 2.3562\]" out
grep -q "angle: torch \[3.1416, 3.1416, 0.0, 2.3562\], exported \[-3.1416, -3.1416, 0.0, 2.3562\]" out
echo "The exported angle of a negative real number is -pi; torch's is pi."
