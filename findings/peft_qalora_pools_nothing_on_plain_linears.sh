#!/usr/bin/env bash
# peft 0.21.2, `LoraConfig(use_qalora=True, qalora_group_size=16)`: QA-LoRA's adapter sees one number a group of inputs, so that its A is
# (rank, inputs / group) and merges into zero points. On an ordinary linear (a dequantized model, a test on a CPU) one guesses that it pools
# likewise, or refuses. It does neither: A is (rank, inputs) as LoRA's, no warning is given, and the saved configuration still says
# use_qalora. What was trained so cannot be merged into zero points, though everything about it says that it can.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$folder/try.py" <<'PYTHON'
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

print("peft", version("peft"))


def adapted(**options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = get_peft_model(model, LoraConfig(r=4, target_modules=["0"], **options))
    return made, [str(each.message) for each in said]


plain, _ = adapted()
made, said = adapted(use_qalora=True, qalora_group_size=16)
shape = tuple(made.base_model.model[0].lora_A["default"].weight.shape)
made.save_pretrained(sys.argv[1])
saved = json.loads(Path(sys.argv[1], "adapter_config.json").read_text())
x = torch.randn(3, 64)
for each in (plain, made):
    torch.manual_seed(1)
    for name, parameter in each.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
same = torch.equal(plain(x), made(x))
print(f"A is {shape}, warnings {said}, saved use_qalora {saved['use_qalora']}, outputs as of LoRA {same}")
sys.exit(0 if shape == (4, 64) and not said and saved["use_qalora"] and same else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder/saved"
