#!/usr/bin/env bash
# optimum-quanto 0.2.7, `quantize(model, weights=qint4)`: 4-bit weights have groups, and one guesses that all linears of a model have the same
# (128), or that a width which it does not divide is refused. Each linear gets a size of its own, without a word: 576 inputs have groups
# of 96, 640 have 128, 896 have 128, 60 have none at all, one scale for the whole row. No runtime's kernel takes
# 96, and what reads the size from one linear has another for the rest.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 transformers==5.23.0 optimum-quanto==0.2.7
cat > "$folder/try.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import torch
from optimum.quanto import freeze, qint4, quantize

print("optimum-quanto", version("optimum-quanto"))
WIDTHS = (576, 640, 896, 1152, 60)
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(width, 64, bias=False) for width in WIDTHS))
originals = [linear.weight.detach().clone() for linear in model]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    quantize(model, weights=qint4)
    freeze(model)
groups = [linear.weight_group_size for linear in model]
for width, group, linear, original in zip(WIDTHS, groups, model, originals):
    error = (linear.weight.dequantize() - original).norm() / original.norm()
    print(f"{width} inputs: groups of {group}, error {error:.3f}")
mine = [each for each in said if "group" in str(each.message).lower()]
right = groups[0] == 96 and groups[1] == 128 and groups[-1] is None and not mine
sys.exit(0 if right else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" 2> "$folder/err" || { cat "$folder/err"; exit 1; }
