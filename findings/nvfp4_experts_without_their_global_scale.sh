#!/usr/bin/env bash
# transformers 5.23.0 with compressed-tensors 0.20.0: experts in NVFP4 load without an error and with wrong weights. While it makes
# one tensor of a layer's experts, transformers unpacks them without their weight_global_scale, so that every weight is larger by
# that divisor. Linears that are no experts come out right, and so do all tensors in compressed-tensors' own decompressor.
#
# Needs a network and some minutes; PIP_ARGS goes to pip (for a CPU build of torch). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# shellcheck disable=SC2086
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 transformers==5.23.0 compressed-tensors==0.20.0
cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

folder = Path(sys.argv[1])
torch.manual_seed(0)
shape = dict(hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=1, vocab_size=128)
heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2)
config = Qwen3MoeConfig(**shape, **heads, tie_word_embeddings=False, dtype="bfloat16")
AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "plain")
scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
packed, dense = {}, {}
for name, weight in load_file(folder / "plain" / "model.safetensors").items():
    packed[name] = dense[name] = weight
    if ".experts." in name:
        groups = weight.float().unflatten(-1, (-1, 16)).abs().amax(-1)
        divisor = (448 * 6 / groups.max()).reshape(1)
        scale = (groups / 6 * divisor).to(torch.float8_e4m3fn).float()
        parts = {"weight": weight.float(), "weight_scale": scale, "weight_global_scale": divisor}
        stored = compressor.compress(parts, scheme)
        del packed[name]
        packed |= {f"{name.removesuffix('weight')}{part}": tensor.contiguous() for part, tensor in stored.items()}
        dense[name] = compressor.decompress(stored, scheme)["weight"].to(torch.bfloat16)
about = dict(config_groups={"group_0": scheme}, format="nvfp4-pack-quantized", quantization_status="compressed")
quantization = QuantizationConfig(**about, ignore=["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"])
for kind, tensors in (("dense", dense), ("packed", packed)):
    (folder / kind).mkdir()
    save_file(tensors, folder / kind / "model.safetensors", metadata={"format": "pt"})
    if kind == "packed":
        config.quantization_config = quantization.model_dump(mode="json")
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder / kind)
ids = torch.arange(32).view(1, 32)
with torch.no_grad():
    expected, found = (AutoModelForCausalLM.from_pretrained(folder / k)(ids).logits.float() for k in ("dense", "packed"))
for name in ("torch", "transformers", "compressed-tensors"):
    print(name, importlib.metadata.version(name))
difference = float((expected - found).abs().max() / expected.std())
print(f"largest difference of a logit: {difference:.2f} standard deviations, and no error")
sys.exit(difference < 0.5)
PYTHON
mkdir "$folder/checkpoints"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder/checkpoints" 2>"$folder/errors" || { tail -20 "$folder/errors"; exit 1; }

# Seen on 2026-11-30:
#
#   torch 2.13.0+cpu
#   transformers 5.23.0
#   compressed-tensors 0.20.0
#   largest difference of a logit: 4.83 standard deviations, and no error
