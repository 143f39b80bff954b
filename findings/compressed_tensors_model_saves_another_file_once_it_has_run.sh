#!/usr/bin/env bash
# transformers 5.23.0 with compressed-tensors 0.20.0: a compressed checkpoint that is loaded and saved again stays compressed, and one guesses
# that running the model in between (an evaluation, a sample) changes nothing of what is saved. The first forward pass decompresses the weights
# in place, and save_pretrained then writes them in bfloat16 beside their scales, without a word: here 4 bits take 3 times the room. config.json
# still says "pack-quantized" or "int-quantized"; `quantization_status` alone ("decompressed") tells. What goes by the format misreads it:
# with CompressedTensorsConfig(dequantize=True), transformers itself refuses the 4-bit file, and multiplies the weights of the 8-bit one, which
# are numbers and no codes any more, by their scales once more: they come out 2,000 times too small, in silence.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# shellcheck disable=SC2086
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 \
    compressed-tensors==0.20.0
cat > "$folder/try.py" <<'PYTHON'
import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
from safetensors import safe_open
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig

SHAPE = dict(vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
FORMATS = {
    "pack-quantized": QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=64),
    "int-quantized": QuantizationArgs(num_bits=8, symmetric=True, strategy="channel"),
}
TOKENS = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
said = []
heard = logging.Handler(logging.WARNING)
heard.emit = lambda record: said.append(record.getMessage())
for library in ("transformers", "compressed_tensors"):
    logging.getLogger(library).addHandler(heard)


def write(folder, form):
    """A random Llama, rounded and compressed by compressed-tensors."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, dtype="bfloat16"))
    weights, inputs = FORMATS[form], TOKENS if form == "int-quantized" else None
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)}
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], format=form, quantization_status="compressed")
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            grouped = module.weight.detach().float().reshape(*module.weight_scale.shape, -1)
            module.weight_scale.data = (grouped.abs().amax(-1) / (2 ** (weights.num_bits - 1) - 1)).to(torch.bfloat16)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def about(folder):
    """Size, tensors of one linear, and what config.json says."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".k_proj." in name]
        kinds = {name.split(".k_proj.")[1]: file.get_slice(name).get_dtype() for name in names}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return (folder / "model.safetensors").stat().st_size, kinds, config["format"], config["quantization_status"]


def dequantized(folder):
    """k_proj as `dequantize=True` reads it, or None where it is refused."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    except RuntimeError as error:
        print(f"    with dequantize=True: RuntimeError: {str(error).splitlines()[0]}")
        return None
    return model.model.layers[0].self_attn.k_proj.weight.detach().float()


for name in ("torch", "transformers", "compressed-tensors"):
    print(name, version(name))
for form in FORMATS:
    made, unused, used = (Path(sys.argv[1], form, name) for name in ("made", "saved", "saved-after-a-pass"))
    write(made, form)
    said.clear()
    model = AutoModelForCausalLM.from_pretrained(made)
    model.save_pretrained(unused)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    model.save_pretrained(used)
    seen = {folder: about(folder) for folder in (made, unused, used)}
    for folder, each in seen.items():
        print(f"{folder.name}: {each}")
    ratio = seen[used][0] / seen[made][0]
    print(f"    {ratio:.1f} times as large, warnings {said}")
    assert seen[unused] == seen[made] and seen[used][1]["weight"] == "BF16" and not said, "the behaviour has changed"
    assert seen[used][2:] == (form, "decompressed") and ratio > 1.8, "the behaviour has changed"
    right, wrong = dequantized(made), dequantized(used)
    if form == "pack-quantized":
        assert wrong is None, "the behaviour has changed"
    else:
        smaller = float(right.norm() / wrong.norm())
        print(f"    with dequantize=True: weights {smaller:.0f} times too small")
        assert smaller > 50, "the behaviour has changed"
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder" 2>"$folder/errors" || { tail -20 "$folder/errors"; exit 1; }
