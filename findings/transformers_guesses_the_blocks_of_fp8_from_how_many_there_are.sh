#!/usr/bin/env bash
# transformers 5.23.0, checkpoints of quant_method "fp8" (DeepSeek's form: one scale for each block of 128 x 128 weights, and the last block of a
# row or column is smaller where 128 does not divide it). config.json says weight_block_size [128, 128], and one guesses that it is used. When it
# dequantizes (with `dequantize=True`, and always where there is no GPU), transformers divides a weight's shape by the number of its scales
# instead: 192 columns with 2 scales become blocks of 96, so that columns 96 to 127 get the scale of the next block. Nothing is said, and
# weights are wrong by as much as neighbouring scales differ. The widths 448 (4 blocks of 112) and 960 of SmolLM2-360M (8 of 120) are such.
# Where the division has a remainder (320 rows with 3 scales; DeepSeek-V3's 576 with 5), the right checkpoint is refused.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# shellcheck disable=SC2086
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0
cat > "$folder/try.py" <<'PYTHON'
import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig

BLOCK = 128
said = []
heard = logging.Handler(logging.WARNING)
heard.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(heard)


def in_blocks(weight):
    """FP8 codes and the scale of each block, the last of them partial; and what they mean."""
    rows, columns = weight.shape
    codes, meant = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scales[i, j] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scales[i, j]).to(codes.dtype)
            meant[place] = codes[place].float() * scales[i, j]
    return codes, scales, meant


def write(folder, width):
    """A checkpoint whose linears are `width` wide, their later rows larger; returns what q_proj means."""
    torch.manual_seed(0)
    shape = dict(vocab_size=128, hidden_size=width, intermediate_size=width, num_hidden_layers=1)
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2, dtype="bfloat16")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = tensor
        if "_proj" in name:
            grown = tensor.float() * torch.linspace(1, 3, width)[:, None]
            tensors[name], tensors[f"{name}_scale_inv"], meant = in_blocks(grown)
            if "q_proj" in name:
                wanted = meant
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"
    }
    (folder / "config.json").write_text(json.dumps(written))
    return wanted


print("torch", torch.__version__, "transformers", version("transformers"))
for width in (256, 192, 448, 320):
    folder = Path(sys.argv[1], str(width))
    wanted = write(folder, width)
    said.clear()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FineGrainedFP8Config(dequantize=True))
    except RuntimeError:
        refused = next(line for each in said for line in each.splitlines() if "not divisible" in line)
        print(f"{width}: {refused}")
        assert width == 320, "the behaviour has changed"
        continue
    made = model.model.layers[0].self_attn.q_proj.weight.detach().float()
    wrong = ((made - wanted).abs() > wanted.abs() * 2**-7)[0].nonzero().flatten().tolist()
    error = float((made - wanted).norm() / wanted.norm())
    columns = f"columns {wrong[0]} to {wrong[-1]} of its first row" if wrong else "none"
    print(f"{width}: relative error of q_proj {error:.4f}, wrong are {columns}, warnings {said}")
    assert not said and (error < 0.004 if width == 256 else error > 0.05), "the behaviour has changed"
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder" 2>"$folder/errors" || { tail -20 "$folder/errors"; exit 1; }
