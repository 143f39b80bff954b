#!/usr/bin/env bash
# bitsandbytes 0.50.2, `bnb_4bit_quant_type="fp4"`: sign, two bits of exponent and one of mantissa, and one guesses the numbers of e2m1 that MXFP4,
# NVFP4 and every GPU's FP4 have: 0, 0.5, 1, 1.5, 2, 3, 4, 6, here divided by 6. The smallest of them is another: 1/192 in place of 1/12, so that
# two of sixteen codes are next to zero and nothing is between there and 1/6. Of normal numbers a sixth gets these two codes, and the error is
# 15 % above that of e2m1 with the same scales. The order of codes is another, too (0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4): who reads them as
# e2m1 gets an error larger than the weights.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# shellcheck disable=SC2086
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 bitsandbytes==0.50.2 ml_dtypes==0.6.0 numpy==2.4.6
cat > "$folder/try.py" <<'PYTHON'
from importlib.metadata import version

import ml_dtypes
import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

print("bitsandbytes", version("bitsandbytes"), "ml_dtypes", version("ml_dtypes"))
weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
packed, state = quantize_4bit(weight, blocksize=64, quant_type="fp4")
made = dequantize_4bit(packed, state)
scales = state.absmax.view(-1, 1)
shares = weight.view(-1, 64) / scales  # of each block's largest number
codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), 1).view(-1, 64).long()
e2m1 = torch.from_numpy(np.arange(16, dtype=np.uint8).astype(ml_dtypes.uint4).view(ml_dtypes.float4_e2m1fn).astype(np.float32)) / 6
best = e2m1[(shares[..., None] - e2m1).abs().argmin(-1)]


def error(numbers):
    """Relative error of a weight."""
    return float((numbers.reshape_as(weight) - weight).norm() / weight.norm())


print("numbers by code, bitsandbytes:", [round(each, 4) for each in state.code.tolist()])
print("numbers by code, e2m1 / 6:    ", [round(each, 4) for each in e2m1.tolist()])
seen = error(made), error(best * scales), error(e2m1[codes] * scales)
small = float((codes % 8 == 1).float().mean())
print(f"relative error {seen[0]:.4f}, of e2m1 with the same scales {seen[1]:.4f}, of its codes read as e2m1's {seen[2]:.2f}")
print(f"share of weights at +- 1/192: {small:.3f}")
assert torch.equal(made.reshape_as(shares), state.code[codes] * scales), "codes are read as bitsandbytes reads them"
smallest = sorted({abs(each) for each in state.code.tolist()})[1]
assert abs(smallest * 192 - 1) < 1e-3 and seen[0] > 1.1 * seen[1] and seen[2] > 1 and small > 0.1, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/try.py" 2>"$folder/errors" || { tail -20 "$folder/errors"; exit 1; }
