#!/usr/bin/env bash
# hqq 0.2.8.post1, `axis=0` with `group_size=64`: one guesses that 64 neighbouring rows of a column share a scale. The weight is laid out as
# (64, all else) first, so that a group is one column of every (rows / 64)th row: of 4,096 rows the first, the 65th, the 129th. Neighbours
# never share a scale, and a weight of other numbers of rows has other neighbours in its groups. What slices rows of such a weight (tensor
# parallelism, fused q/k/v taken apart) cuts through every group, where `axis=1` cuts through none.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 numpy==2.4.6 hqq==0.2.8.post1
cat > "$folder/try.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from hqq.core.quantize import Quantizer

print("hqq", version("hqq"))
OPTIONS = {"nbits": 4, "group_size": 64, "optimize": False, "compute_dtype": torch.float32, "device": "cpu", "bitpack": False}


def group_of_the_first(rows: int, axis: int) -> tuple[list[int], list[int]]:
    """Rows and columns of the weights that change when the first weight becomes an outlier."""
    torch.manual_seed(0)
    weight = torch.randn(rows, 256)
    outlier = weight.clone()
    outlier[0, 0] = 50.0
    before, after = (Quantizer.dequantize(*Quantizer.quantize(each, axis=axis, **OPTIONS)) for each in (weight, outlier))
    changed = (before != after).nonzero()
    return sorted(set(changed[:, 0].tolist())), sorted(set(changed[:, 1].tolist()))


right = True
for rows in (128, 512, 4096):
    found, columns = group_of_the_first(rows, 0)
    print(f"axis 0, {rows} rows: the first weight shares its scale with rows {found[:5]} of columns {columns}")
    right &= columns == [0] and all(row % (rows // 64) == 0 for row in found) and len(found) > 48
found, columns = group_of_the_first(128, 1)
print(f"axis 1: with rows {found}, columns up to {columns[-1]}")
right &= found == [0] and columns[-1] <= 63
sys.exit(0 if right else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
