#!/usr/bin/env bash
# accelerate 1.15.0, `disk_offload(model, folder)` and `dispatch_model(..., offload_dir=folder)`: one guesses that the model's weights are
# written into the folder, over what lies there. If it has an index.json, nothing is written, and the model computes with the weights that lie
# there, without a look at their values and without a word. An original and its quantized form, offloaded into the same folder one after
# the other (or by two runs of a script), are the same model: the error of quantization is exactly zero, and with dispatch_model
# that of the layers on disk is. The model's own weights are gone by then, as meta tensors.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cat > "$folder/try.py" <<'PYTHON'
import copy
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import disk_offload, dispatch_model

print("accelerate", version("accelerate"), "torch", torch.__version__)
torch.manual_seed(0)
original = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64))
quantized = copy.deepcopy(original)
for linear in (quantized[0], quantized[2]):
    scale = linear.weight.detach().abs().amax(1, keepdim=True)
    linear.weight.data = torch.sign(linear.weight.detach()) * scale  # one bit: an error that nobody can miss
x = torch.randn(8, 64)
with torch.no_grad():
    expected, other = original(x), quantized(x)


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def by_disk_offload(model: torch.nn.Module, where: Path) -> torch.nn.Module:
    disk_offload(model, str(where), execution_device=torch.device("cpu"))
    return model


def by_dispatch(model: torch.nn.Module, where: Path) -> torch.nn.Module:
    return dispatch_model(model, {"0": "disk", "1": "cpu", "2": "disk"}, main_device="cpu", offload_dir=str(where))


print(f"in memory: error of the quantized model {error(other, expected):.3f}")
right = error(other, expected) > 0.5
for offload in (by_disk_offload, by_dispatch):
    found = {}
    for kind in ("a folder for each", "one folder"):
        with warnings.catch_warnings(record=True) as said, torch.no_grad():
            warnings.simplefilter("always")
            names = ("a", "b") if kind == "a folder for each" else ("both", "both")
            roots = [Path(sys.argv[1], offload.__name__, name) for name in names]
            first = offload(copy.deepcopy(original), roots[0])(x)
            second = offload(copy.deepcopy(quantized), roots[1])(x)
        found[kind] = error(second, first), len(said)
        print(f"{offload.__name__}, {kind}: error of the quantized model {found[kind][0]:.3f}, warnings {len(said)}")
        right &= error(first, expected) < 1e-6
    right &= abs(found["a folder for each"][0] - error(other, expected)) < 1e-5 and found["one folder"] == (0.0, 0)
sys.exit(0 if right else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder/offloaded" 2> "$folder/err" || { cat "$folder/err"; exit 1; }
