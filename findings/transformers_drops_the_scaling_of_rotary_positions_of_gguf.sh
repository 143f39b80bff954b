#!/usr/bin/env bash
# transformers 5.23.0 with gguf-py 0.19.0, `from_pretrained(folder, gguf_file=...)`: a model with scaled rotary positions says so in its GGUF file,
# Llama 3.1 and later by the tensor rope_freqs.weight, a Qwen 2 with YaRN by the keys qwen2.rope.scaling.*. One guesses that the loader uses
# them, or says that it does not. It reads rope.freq_base alone: rope_type becomes "default", without a warning, and a model of the same
# weights computes other positions. What is measured of such a file, or made of it, is not the model: on long texts hardly a token agrees.
# Files without scaling load exactly.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# shellcheck disable=SC2086
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 \
    gguf==0.19.0 numpy==2.4.6
cat > "$folder/try.py" <<'PYTHON'
import logging
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

BASE, HEADS, HEAD = 500000.0, 2, 32
SHAPE = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=HEADS,
    max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, dtype="float32",
)
PLAIN = {"rope_type": "default", "rope_theta": BASE}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": BASE, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "rope_theta": BASE, "factor": 4.0, "original_max_position_embeddings": 512}
said = []
heard = logging.Handler(logging.WARNING)
heard.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(heard)


def write(file, model, kind):
    """The model's tensors as llama.cpp's converter names and orders them, in fp32."""
    writer, config = gguf.GGUFWriter(file, kind), model.config
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(BASE)
    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        unscaled = BASE ** (-torch.arange(0, HEAD, 2) / HEAD)
        writer.add_tensor("rope_freqs.weight", (unscaled / model.model.rotary_emb.inv_freq).numpy())
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        numbers, name = tensor.numpy(), names.get_name(name, try_suffixes=(".weight", ".bias"))
        if kind == "llama" and ("attn_q." in name or "attn_k." in name):  # llama.cpp turns neighbours, transformers halves
            numbers = numbers.reshape(HEADS, 2, HEAD // 2, -1).swapaxes(1, 2).reshape(numbers.shape)
        writer.add_tensor(name, np.ascontiguousarray(numbers))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


for name in ("transformers", "gguf"):
    print(name, version(name))
for kind, config, rope in (
    ("llama", LlamaConfig, PLAIN), ("llama", LlamaConfig, LLAMA3), ("qwen2", Qwen2Config, PLAIN), ("qwen2", Qwen2Config, YARN)
):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SHAPE, rope_parameters=rope)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    file = Path(sys.argv[1], f"{kind}-{rope['rope_type']}.gguf")
    write(file, model, kind)
    said.clear()
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokens = torch.randint(0, 256, (1, 1024))
    with torch.no_grad():
        wanted, made = model(tokens).logits, loaded(tokens).logits
    agree = float((wanted.argmax(-1) == made.argmax(-1)).float().mean())
    other = float((wanted - made).norm() / wanted.norm())
    read = loaded.config.rope_parameters["rope_type"]
    print(f"{kind} with {rope['rope_type']}: read as {read}, logits differ by {other:.3f}, {agree:.0%} of tokens agree, warnings {said}")
    scaled = rope is not PLAIN
    assert read == "default" and not said and (agree < 0.5 if scaled else other < 1e-4), "the behaviour has changed"
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder" 2>"$folder/errors" || { tail -20 "$folder/errors"; exit 1; }
