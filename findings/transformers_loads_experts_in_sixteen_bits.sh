#!/usr/bin/env bash
# transformers 5.23.0, a mixture of experts loaded with bitsandbytes (4 or 8 bits), optimum-quanto or torchao: one guesses that its experts,
# which are nearly all of it, are quantized as its other linears are. A layer's experts are now one tensor of three
# dimensions and no linears; these methods look for linears, so that experts stay in bfloat16, and nothing says so. `is_loaded_in_4bit`
# is true. Of Qwen3-30B-A3B, 29 of 30.5 billion weights stay as they are: it needs the memory of 16 bits, and has their quality.
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

from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, Qwen3MoeConfig, TorchAoConfig

METHODS = {
    "bitsandbytes, 4 bits": BitsAndBytesConfig(load_in_4bit=True),
    "bitsandbytes, 8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "optimum-quanto, int4": QuantoConfig(weights="int4"),
    "torchao, int8": TorchAoConfig(Int8WeightOnlyConfig()),
}
said = []
heard = logging.Handler(logging.WARNING)
heard.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(heard)


def kinds(model):
    """Of an attention's linear and of the experts: type and dtype in words."""
    parameters = dict(model.named_parameters())
    named = {"q_proj": "model.layers.0.self_attn.q_proj.weight", "experts": "model.layers.0.mlp.experts.gate_up_proj"}
    return {key: f"{type(parameters[name]).__name__} {parameters[name].dtype}" for key, name in named.items()}


for name in ("transformers", "bitsandbytes", "optimum-quanto", "torchao"):
    print(name, version(name))
shape = dict(hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=1)
heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=64, num_experts=16, num_experts_per_tok=2)
config = Qwen3MoeConfig(vocab_size=128, **shape, **heads, dtype="bfloat16")
AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1])
said.clear()
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    for method, config in METHODS.items():
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, device_map="cpu")
        seen = kinds(model)
        print(f"{method}: {seen}, is_loaded_in_4bit {getattr(model, 'is_loaded_in_4bit', False)}")
        assert seen["experts"] == "Parameter torch.bfloat16", "the behaviour has changed"
        assert not seen["q_proj"].startswith("Parameter "), "the behaviour has changed"
about = [each for each in (*said, *(str(each.message) for each in warned)) if "expert" in each.lower()]
print("warnings that speak of experts:", about)
assert not about, "the behaviour has changed"
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder/model" 2>"$folder/errors" || { tail -20 "$folder/errors"; exit 1; }
