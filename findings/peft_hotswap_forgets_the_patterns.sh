#!/usr/bin/env bash
# peft 0.21.2, `hotswap_adapter` on adapters with `alpha_pattern` or `rank_pattern`: one guesses that putting an adapter in its own place changes
# nothing, as it does without patterns. Each linear's scaling is computed anew, and its pattern is looked up by the name of a weight
# ("q_proj.lora_A.default.weight") where the patterns match names of modules ("q_proj"): none is found, and every linear gets lora_alpha / r of
# the whole configuration. A linear with alpha 32 among others of 8 is served at a quarter of what it was trained with, one of rank 2
# among others of 8 likewise. The configurations are compared before, patterns of alpha must be equal, and nothing is said.
# A server that swaps adapters gives other answers than one that has loaded the same adapter first.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$folder/try.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

print("peft", version("peft"), "torch", torch.__version__)
x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))


class Both(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.v_proj = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.q_proj(rows) + self.v_proj(rows)


def scalings(model: torch.nn.Module) -> dict:
    layers = {name.split(".")[-1]: module for name, module in model.named_modules() if hasattr(module, "scaling")}
    return {name: layer.scaling["default"] for name, layer in layers.items()}


def around(folder: Path, **patterns: dict) -> tuple:
    """Scalings before and after an adapter takes its own place, whether outputs stay, and the warnings."""
    made = get_peft_model(Both(), LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], **patterns))
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    made.save_pretrained(folder)
    model = PeftModel.from_pretrained(Both(), folder).eval()
    before, outputs = scalings(model), model(x)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        hotswap_adapter(model, str(folder), "default")
    return before, scalings(model), torch.equal(model(x), outputs), len(said)


found = {}
for name, patterns in {
    "no pattern": {},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 32}},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
}.items():
    found[name] = around(Path(sys.argv[1]) / name, **patterns)
    print("{}: {} before, {} after, outputs the same: {}, warnings: {}".format(name, *found[name]))
ones, fours = {"q_proj": 1.0, "v_proj": 1.0}, {"q_proj": 4.0, "v_proj": 1.0}
seen = {"no pattern": (ones, ones, True, 0), "alpha_pattern": (fours, ones, False, 0), "rank_pattern": (fours, ones, False, 0)}
sys.exit(0 if found == seen else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder/adapters" 2> "$folder/err" || { cat "$folder/err"; exit 1; }
