#!/usr/bin/env bash
# mlx 0.32.4, affine quantization: w is scale * code + bias with unsigned codes, and one guesses that bias is the group's smallest weight and
# scale the positive step to the next. It begins at the end of larger magnitude: where that is the largest weight, bias is this weight and the
# scale is negative, so that codes count downwards. Of normal numbers half of all groups are so, at every width. Whoever turns a checkpoint
# of MLX into a format of positive scales and zero points (GPTQ, AWQ, compressed-tensors, GGUF) has to turn the codes of such groups
# around, too; taking the magnitude of a scale, or a scale's logarithm, loses half of the model.
#
# Needs a network for the installation only. Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile "mlx[cpu]==0.32.4" numpy==2.4.6
cat > "$folder/try.py" <<'PYTHON'
import sys
from importlib.metadata import version

import mlx.core as mx
import numpy as np

print("mlx", version("mlx"))
weight = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
groups = weight.reshape(-1, 64)
larger_end = np.abs(groups.max(1)) > np.abs(groups.min(1))
right = True
for bits in (2, 3, 4, 6, 8):
    _, scales, biases = (np.array(part) for part in mx.quantize(mx.array(weight), group_size=64, bits=bits))
    negative = scales.reshape(-1) < 0
    print(f"{bits} bits: {negative.mean():.1%} of scales are negative")
    right &= bool((negative == larger_end).all()) and 0.4 < negative.mean() < 0.6
few = np.linspace(-1.0, 3.0, 64, dtype=np.float32)[None]
codes, scale, bias = mx.quantize(mx.array(few), group_size=64, bits=4)
print(f"-1 to 3 in 4 bits: scale {float(scale.item()):.4f}, bias {float(bias.item()):.4f}, code of the smallest {int(np.array(codes)[0, 0] & 15)}")
right &= float(scale.item()) < 0 and abs(float(bias.item()) - 3.0) < 0.2 and int(np.array(codes)[0, 0] & 15) == 15
sys.exit(0 if right else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
