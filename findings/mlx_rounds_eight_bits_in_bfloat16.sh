#!/bin/bash
# mlx: mx.dequantize of affine codes computes scale * code + bias with both results rounded to the dtype of the scales. In
# bfloat16, which mlx-lm stores scales of most models in, a weight of 8 bits is off by up to a whole step of its scale from
# the number that codes, scale and bias mean, so that 8 bits hold no more than about 7; 4 bits are off by 0.06 of a step.
# On a CPU; mlx's own mx.quantize makes the codes. Exits with 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" 2>/dev/null || { python3 -m venv --clear --without-pip "$folder/venv" && python3 -m pip --python "$folder/venv/bin/python" install -q pip; }
"$folder/venv/bin/python" -m pip install -q 'mlx[cpu]==0.32.4' numpy
cat > "$folder/run.py" <<'PYTHON'
import sys

import mlx.core as mx
import numpy as np

mx.random.seed(0)
weight = (mx.random.normal((64, 256)) * 0.02).astype(mx.bfloat16)
found = {}
for bits in (4, 8):
    codes, scales, biases = mx.quantize(weight, group_size=64, bits=bits)
    told = np.array(mx.dequantize(codes, scales, biases, group_size=64, bits=bits).astype(mx.float32), dtype=np.float64)
    wide = [part.astype(mx.float32) for part in (scales, biases)]
    meant = np.array(mx.dequantize(codes, *wide, group_size=64, bits=bits), dtype=np.float64)
    step = np.repeat(np.abs(np.array(wide[0], dtype=np.float64)), 64, axis=1)
    found[bits] = (np.abs(told - meant) / step).max()
    print(f"{bits} bits in bfloat16: off by up to {found[bits]:.3f} steps")
print("mlx", mx.__version__)
sys.exit(not (found[8] > 0.5 and found[4] < 0.1))
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
