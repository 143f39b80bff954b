#!/bin/bash
# A Gemma 3 whose text_config has final_logit_softcapping computes other logits as Gemma3ForConditionalGeneration than
# the same language model as Gemma3ForCausalLM: the one with the vision tower leaves the cap out, without a word. Exits 0
# while that is so. Needs a network and some minutes; PIP_ARGS goes to pip (for a CPU build of torch).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 transformers==5.23.0
cat > "$folder/compare.py" <<'PYTHON'
import sys

import torch
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

text = Gemma3TextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, final_logit_softcapping=1.0,
)
vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
          "patch_size": 8, "model_type": "siglip_vision_model"}
torch.manual_seed(0)
whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, image_token_index=63)).eval()
for weight in whole.parameters():
    weight.data += 0.3 * torch.randn_like(weight)
alone = Gemma3ForCausalLM(text).eval()
own = {name.replace("language_model.", ""): value for name, value in whole.state_dict().items()}
alone.load_state_dict({name: own[name] for name in alone.state_dict()})
ids = torch.arange(10)[None]
with torch.no_grad():
    first, second = (float(model(input_ids=ids).logits.abs().max()) for model in (whole, alone))
print(f"largest logit with a cap of 1: {first:.2f} with the vision tower, {second:.2f} without")
sys.exit(0 if first > 1 >= second else 1)
PYTHON
"$folder/venv/bin/python" "$folder/compare.py" 2>/dev/null
