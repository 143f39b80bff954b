#!/usr/bin/env bash
# transformers 5.23.0 with optimum-quanto 0.2.7, `QuantizedCache`: one guesses that perplexity over a text, in one pass with the cache as
# past_key_values as any measure of quality does it, shows what keys and values of 2 bits cost. The first pass that fills the cache
# attends to what it was given and quantizes for those that come later: logits are the same bits as without a cache, at every width,
# and multiple choice scored in one pass is, too. The cost is there as soon as the text comes in two pieces, or token by token as a server
# writes. A cache of 2 bits measured in the usual way is as good as none, and then is not.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 numpy==2.4.6 transformers==5.23.0 optimum-quanto==0.2.7
cat > "$folder/try.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

print("transformers", version("transformers"), "optimum-quanto", version("optimum-quanto"), "torch", torch.__version__)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, initializer_range=0.2,
)
model = LlamaForCausalLM(config).eval()
text = torch.randint(256, (1, 192))


def cache(bits: int | None):
    return QuantizedCache("quanto", config, nbits=bits, q_group_size=64, residual_length=1) if bits else DynamicCache(config=config)


def logits(bits: int | None, width: int) -> torch.Tensor:
    """Of the whole text, read `width` tokens at a time through a cache of so many bits."""
    kept = cache(bits)
    with torch.no_grad():
        return torch.cat([model(piece, past_key_values=kept).logits for piece in text.split(width, dim=1)], dim=1)


def kl(found: torch.Tensor) -> float:
    """Mean divergence from the original's predictions, in nats a token."""
    return float((exact.exp() * (exact - found.log_softmax(-1))).sum(-1).mean())


with torch.no_grad():
    plain = model(text).logits
exact = plain.log_softmax(-1)
right = True
for bits in (None, 4, 2):
    once, halves, single = (logits(bits, width) for width in (text.shape[1], text.shape[1] // 2, 1))
    same = torch.equal(once, plain)
    print(f"{bits or 'no'} bits: in one pass the same bits as without a cache: {same};", end=" ")
    print(f"KL in two pieces {kl(halves):.4f}, token by token {kl(single):.4f}")
    right &= same and (kl(halves) > 1e-2 and kl(single) > 1e-2 if bits else kl(single) < 1e-6)
sys.exit(0 if right else "the behaviour has changed")
PYTHON
OMP_NUM_THREADS=2 "$folder/venv/bin/python" "$folder/try.py" 2> "$folder/err" || { cat "$folder/err"; exit 1; }
