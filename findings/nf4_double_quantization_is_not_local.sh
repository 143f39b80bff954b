#!/usr/bin/env bash
# bitsandbytes 0.50.2, NF4 with double quantization (`bnb_4bit_use_double_quant`): each block of 64 weights has a scale of its own, and one
# guesses that its values depend on these 64 weights and, for the second step, on the 256 scales that share a constant. They depend on the
# whole tensor: the mean of all its scales is subtracted before the scales become 8 bits. So half of a fused weight (q/k/v, gate/up, experts
# in one tensor) is not the same numbers when it is quantized by itself, and rows that are 64 times larger somewhere else in the tensor
# raise the error of rows that have nothing to do with them from 9 to 15 %, 256 times to more than 60 %. Without double quantization all of
# it is local.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 bitsandbytes==0.50.2
cat > "$folder/try.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

print("bitsandbytes", version("bitsandbytes"))


def read_back(weight: torch.Tensor, double: bool) -> torch.Tensor:
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    return dequantize_4bit(codes, state)


weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
first = weight[:128].contiguous()
errors = {}
for times in (1, 4, 64, 256):
    fused = torch.cat((first, weight[128:] * times))
    for double in (False, True):
        half, alone = read_back(fused, double)[:128], read_back(first, double)
        errors[times, double] = float((half - first).norm() / first.norm())
        same = torch.equal(half, alone)
        print(f"other half {times} times as large, double quantization {double}: equal to the half alone {same}, error {errors[times, double]:.4f}")
        if same == double and times > 1:
            sys.exit("the behaviour has changed")
if not (errors[64, True] > 1.4 * errors[64, False] and errors[256, True] > 0.5 and errors[256, False] == errors[1, False]):
    sys.exit("the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
