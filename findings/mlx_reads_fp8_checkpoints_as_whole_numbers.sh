#!/usr/bin/env bash
# mlx 0.32.4, `mx.load` of a safetensors file with F8_E4M3 tensors, as FP8 checkpoints of DeepSeek, Qwen or llm-compressor have: mlx has no FP8 array,
# and one guesses an error, as it gives for F8_E5M2 and F64, or numbers converted to one that it has. The bytes come as uint8: 1.0 is 56, and
# -0.5 is 176. Nothing warns, nn.Linear takes them as weights and computes with them, and saving writes U8, so that the file no longer says
# what it held. `mx.from_fp8` is the way out for who knows.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# shellcheck disable=SC2086
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 "mlx[cpu]==0.32.4" safetensors==0.8.0 numpy==2.4.6
cat > "$folder/try.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import torch
from safetensors import safe_open
from safetensors.torch import save_file

warnings.simplefilter("error")
mx.set_default_device(mx.cpu)
folder = Path(sys.argv[1])
print("mlx", version("mlx"))


def kind(name):
    """The weight's type as the file's header has it."""
    with safe_open(folder / name, "pt") as file:
        return file.get_slice("weight").get_dtype()


weight = torch.tensor([[1.0, -0.5], [2.0, 448.0]])
save_file({"weight": weight.to(torch.float8_e4m3fn)}, folder / "fp8.safetensors")
read = mx.load(str(folder / "fp8.safetensors"))["weight"]
print("written:", weight.tolist(), kind("fp8.safetensors"), "read:", read.tolist(), read.dtype)
linear = nn.Linear(2, 2, bias=False)
linear.load_weights(str(folder / "fp8.safetensors"))
made = linear(mx.array([[1.0, 1.0]])).tolist()
print("product with ones, right:", weight.sum(1).tolist(), "nn.Linear:", made)
mx.save_safetensors(str(folder / "again.safetensors"), {"weight": read})
print("saved again as", kind("again.safetensors"))
decoded = mx.from_fp8(read, dtype=mx.float32).tolist()
print("mx.from_fp8:", decoded)
refused = {}
for name, other in {"F8_E5M2": weight.to(torch.float8_e5m2), "F64": weight.double()}.items():
    save_file({"weight": other}, folder / "other.safetensors")
    try:
        mx.load(str(folder / "other.safetensors"))
    except RuntimeError as error:
        refused[name] = str(error)
    print(f"{name}: {refused.get(name, 'is read')}")
assert read.dtype == mx.uint8 and read.tolist() == [[56, 176], [64, 126]], "the behaviour has changed"
assert made == [[232.0, 190.0]] and kind("again.safetensors") == "U8", "the behaviour has changed"
assert decoded == weight.tolist() and set(refused) == {"F8_E5M2", "F64"}, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
