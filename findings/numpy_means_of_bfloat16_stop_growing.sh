#!/usr/bin/env bash
# numpy 2.4.6 with ml_dtypes 0.6.0, whose bfloat16 is what safetensors.numpy.load_file gives for BF16 weights: one guesses that np.mean, np.std
# and np.sum add in something wider, as numpy does for its own float16 (means in float32, sums in pairs) and for int8 (in int64). Types that
# numpy does not own are added one by one in themselves: a sum of ones stops at 256, and means of a large weight are far too small. Of a
# weight of 1024 x 1024 numbers the standard deviation is 14 times too small, and the mean squared error of its FP8 form 100 times: a
# quantization measured so looks excellent. np.linalg.norm and np.dot are right. `dtype=np.float32` is the way out. int4 is worse:
# 1000 ones are -8.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# shellcheck disable=SC2086
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0 safetensors==0.8.0
cat > "$folder/try.py" <<'PYTHON'
import sys
from importlib.metadata import version

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

for name in ("numpy", "ml_dtypes", "safetensors"):
    print(name, version(name))

ones = {kind.__name__: np.ones(1000, kind) for kind in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8, ml_dtypes.int4)}
sums = {name: float(values.sum()) for name, values in ones.items()}
print("sums of 1000 ones:", sums)
assert sums == {"float16": 1000, "bfloat16": 256, "float8_e4m3fn": 16, "int8": 1000, "int4": -8}, "the behaviour has changed"

made = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
save_file({"weight": made.bfloat16()}, sys.argv[1])
weight = load_file(sys.argv[1])["weight"]
wide = weight.astype(np.float64)
error = weight - weight.astype(ml_dtypes.float8_e4m3fn).astype(weight.dtype)
wrong = {"std": np.std(weight), "mean square": np.mean(weight**2), "mean squared error of FP8": np.mean(error**2)}
right = {
    "std": np.std(wide),
    "mean square": np.mean(wide**2),
    "mean squared error of FP8": np.mean(error.astype(np.float64) ** 2),
}
print(f"a weight of type {weight.dtype}:")
for name in wrong:
    ratio = right[name] / float(wrong[name])
    print(f"  {name}: {float(wrong[name]):.3g}, in float64 {right[name]:.3g}, {ratio:.0f} times as much")
    assert ratio > 10, "the behaviour has changed"
half, widened = float(np.std(weight.astype(np.float16))), float(np.std(weight, dtype=np.float32))
norm = float(np.linalg.norm(weight) / np.linalg.norm(wide))
print(f"  std as float16: {half:.3g}, with dtype=np.float32: {widened:.3g}; norm: {norm:.4f} of the right one")
assert all(abs(each / right["std"] - 1) < 1e-2 for each in (half, widened)) and abs(norm - 1) < 1e-2, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder/weight.safetensors"
