#!/usr/bin/env bash
# transformers 5.23.0, the lists of modules that stay as they are (`llm_int8_skip_modules` of bitsandbytes, `modules_to_not_convert` of others).
# One guesses that a module's name keeps it, in every method alike, and that the list is added to what is kept without one (the head). But
#   ["self_attn"]  keeps nothing: a name in the list counts from the start of a full name or, for a linear, at its end, never in the middle.
#   any list       takes the place of the default, so that the head is quantized by a list that asks for more precision elsewhere.
#   ["q_proj"]     keeps q_proj with bitsandbytes and quanto; with torchao, all of them are quantized, the head too.
#   ["up_proj"]    keeps gate_up_proj of Phi-3, since the end of a name is compared without looking for a dot before it.
# Nothing is said of a name that matches no module. Layers meant for sixteen bits are quantized, and quality suffers where it was to be saved.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# shellcheck disable=SC2086
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 \
    bitsandbytes==0.50.2 optimum-quanto==0.2.7 torchao==0.18.0
cat > "$folder/try.py" <<'PYTHON'
import logging
import sys
import warnings
from importlib.metadata import version

import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Phi3Config, QuantoConfig, TorchAoConfig

SHAPE = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype="bfloat16",
)
METHODS = {
    "bitsandbytes": lambda names: BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=names),
    "optimum-quanto": lambda names: QuantoConfig(weights="int8", modules_to_not_convert=names),
    "torchao": lambda names: TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=names),
}
said = []
heard = logging.Handler(logging.WARNING)
heard.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(heard)


def kept(folder, config):
    """Names of linears that are ordinary ones of bfloat16, without their layers' numbers."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name.split(".")[-1] for name, module in linears.items() if type(module.weight) is torch.nn.Parameter}


for name in ("transformers", *METHODS):
    print(name, version(name))
folders = {"Llama": f"{sys.argv[1]}/llama", "Phi-3": f"{sys.argv[1]}/phi"}
for folder, config in zip(folders.values(), (LlamaConfig, Phi3Config)):
    AutoModelForCausalLM.from_config(config(**SHAPE)).save_pretrained(folder)
said.clear()
seen = {}
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    for model, names in (("Llama", None), ("Llama", ["self_attn"]), ("Llama", ["q_proj"]), ("Phi-3", ["up_proj"])):
        for method, config in METHODS.items():
            seen[model, str(names), method] = kept(folders[model], config(names))
            print(f"{model}, {names}, {method}: kept are {sorted(seen[model, str(names), method]) or 'none'}")
said += [str(each.message) for each in warned]
about = [each for each in said if "skip" in each or "not_convert" in each or "self_attn" in each]
print("warnings that speak of it:", about)
expected = {
    ("Llama", "None"): [{"lm_head"}] * 3,
    ("Llama", "['self_attn']"): [set()] * 3,
    ("Llama", "['q_proj']"): [{"q_proj"}, {"q_proj"}, set()],
    ("Phi-3", "['up_proj']"): [{"gate_up_proj"}, {"gate_up_proj"}, set()],
}
for key, each in expected.items():
    assert [seen[*key, method] for method in METHODS] == each, f"the behaviour of {key} has changed"
assert not about, "the behaviour has changed"
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder" 2>"$folder/errors" || { tail -20 "$folder/errors"; exit 1; }
