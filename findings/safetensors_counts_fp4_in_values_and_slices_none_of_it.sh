#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0, tensors of torch.float4_e2m1fn_x2 (two FP4 numbers a byte, of NVFP4 and MXFP4): torch's shape counts
# bytes, and one guesses that the file's does, as every other type has the same shape on both sides. The header counts numbers: (4, 8) becomes
# F4 of [4, 16], and comes back as (4, 8). So sizes made of a header's shape and torch's element size are twice the truth, and
# `get_slice`, which is how large checkpoints are read, gives the header's shape and then fails on every slice, even the whole.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cat > "$folder/try.py" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

print("safetensors", version("safetensors"), "torch", torch.__version__)
octets = torch.arange(32, dtype=torch.uint8).view(4, 8)
file = Path(sys.argv[1])
save_file({"codes": octets.view(torch.float4_e2m1fn_x2)}, file)
raw = file.read_bytes()
header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["codes"]
back = load_file(file)["codes"]
print("torch (4, 8) -> header", header["dtype"], header["shape"], "-> torch", tuple(back.shape))
outcomes = {}
with safe_open(file, "pt") as opened:
    piece = opened.get_slice("codes")
    shape = piece.get_shape()
    for name, where in (("rows 1 and 2", slice(1, 3)), ("all rows", slice(None))):
        try:
            outcomes[name] = f"shape {tuple(piece[where].shape)}"
        except Exception as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
print("get_slice has shape", shape, outcomes)
same = torch.equal(back.view(torch.uint8), octets)
failed = all("invalid" in said for said in outcomes.values())
sys.exit(0 if header["shape"] == [4, 16] and tuple(back.shape) == (4, 8) and same and failed else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder/codes.safetensors"
