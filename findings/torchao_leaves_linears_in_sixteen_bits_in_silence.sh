#!/usr/bin/env bash
# torchao 0.18.0, `quantize_` with `Int4WeightOnlyConfig(group_size=128)`: a linear whose inputs are no multiple of the group (576, as those of
# SmolLM2-135M) cannot have such groups, and one guesses an error, as `IntxWeightOnlyConfig` of the same package gives. Nothing is raised or
# warned of: the linear is left as it is in bfloat16 and the call returns. A model of such widths "in 4 bits" is exactly the original:
# its quality is perfect, and its size the same.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 torchao==0.18.0 numpy==2.4.6
cat > "$folder/try.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import torch
from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

print("torchao", version("torchao"), "torch", torch.__version__)


def outcome(config) -> str:
    model = torch.nn.Sequential(torch.nn.Linear(576, 64, bias=False)).bfloat16()
    before = model[0].weight.detach().clone()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            quantize_(model, config)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    plain = type(model[0].weight.data) is torch.Tensor and torch.equal(model[0].weight, before)
    return f"{'a plain tensor, unchanged' if plain else type(model[0].weight).__name__}, {len(said)} warnings"


int4 = outcome(Int4WeightOnlyConfig(group_size=128))
intx = outcome(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128)))
print("Int4WeightOnlyConfig, 576 inputs, groups of 128:", int4)
print("IntxWeightOnlyConfig, 576 inputs, groups of 128:", intx)
sys.exit(0 if int4 == "a plain tensor, unchanged, 0 warnings" and "divisible" in intx else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" 2> "$folder/err" || { cat "$folder/err"; exit 1; }
