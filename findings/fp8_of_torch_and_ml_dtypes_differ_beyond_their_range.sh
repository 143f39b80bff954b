#!/usr/bin/env bash
# torch 2.13.0 and ml_dtypes 0.6.0 (numpy's and JAX's types), conversions to the same FP8 formats. In range they agree bit for bit; beyond it:
#   e4m3fn   torch makes 448 of 480, of 10,000 and of infinity; ml_dtypes makes NaN of all three. One guesses NaN or a saturation that keeps
#            an infinity visible: with torch an overflow upstream becomes an ordinary weight, and a check for NaN or infinity finds nothing.
#   e5m2     both make infinity, so that torch saturates one of the two formats and not the other.
#   e8m0fnu  (the scales of MX formats, powers of two without sign) torch makes 2 of -2 and 2**-127 of 0; ml_dtypes makes NaN of both. A
#            negative or a zero scale goes through torch unnoticed.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0
cat > "$folder/try.py" <<'PYTHON'
import sys

import ml_dtypes
import numpy as np
import torch

print("torch", torch.__version__, "ml_dtypes", ml_dtypes.__version__)
GIVEN = {
    "float8_e4m3fn": [0.3, 448.0, 464.0, 480.0, 1e4, float("inf")],
    "float8_e5m2": [0.3, 57344.0, 60000.0, 61440.0, 1e6, float("inf")],
    "float8_e8m0fnu": [0.25, 1.5, 3.0, 0.0, -2.0, float("inf")],
}
TORCH = {
    "float8_e4m3fn": [448.0, 448.0, 448.0],
    "float8_e5m2": [float("inf")] * 3,
    "float8_e8m0fnu": [2.0**-127, 2.0, float("nan")],
}
OTHER = {
    "float8_e4m3fn": [float("nan")] * 3,
    "float8_e5m2": [float("inf")] * 3,
    "float8_e8m0fnu": [float("nan")] * 3,
}
right = True
for name, given in GIVEN.items():
    ours = torch.tensor(given).to(getattr(torch, name)).float().numpy()
    theirs = np.array(given, np.float32).astype(getattr(ml_dtypes, name)).astype(np.float32)
    print(f"{name}: {given}\n  torch     {ours.tolist()}\n  ml_dtypes {theirs.tolist()}")
    right &= np.array_equal(ours[:3], theirs[:3])
    right &= np.array_equal(ours[3:], np.array(TORCH[name], np.float32), equal_nan=True)
    right &= np.array_equal(theirs[3:], np.array(OTHER[name], np.float32), equal_nan=True)
sys.exit(None if right else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" 2>&1 | grep -v Warning
