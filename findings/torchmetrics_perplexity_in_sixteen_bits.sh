#!/usr/bin/env bash
# torchmetrics 1.9.0, `Perplexity` given a model's logits in the 16 bits that it computes in: one guesses float32 inside, or a refusal. It takes
# softmax, then log, in the dtype of the logits. In float16 one token of probability below 3e-8 makes the perplexity of the whole text
# infinite, though its log-likelihood is an ordinary -17 and such tokens are in every corpus. In bfloat16 each batch's sum of
# log-likelihoods is rounded to eight bits: here perplexity moves by 0.4 % with the size of a batch alone, of which differences between
# ways to quantize to 8 bits are a fraction. `logits.float()` before the call is right in both.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
cat > "$folder/try.py" <<'PYTHON'
import math
import sys
from importlib.metadata import version

import torch
from torchmetrics.text import Perplexity

print("torchmetrics", version("torchmetrics"), "torch", torch.__version__)
torch.manual_seed(0)
VOCABULARY = 512
target = torch.randint(VOCABULARY, (16, 512))
logits = torch.randn(16, 512, VOCABULARY)
logits.scatter_add_(2, target[..., None], 4 + 2.5 * torch.randn(16, 512, 1))  # the text is likely, some of it less so


def perplexity(given: torch.Tensor, batch: int) -> float:
    """Of the text in so many rows at a time."""
    metric = Perplexity()
    for rows, right in zip(given.split(batch), target.split(batch), strict=True):
        metric.update(rows, right)
    return float(metric.compute())


def exact(given: torch.Tensor) -> float:
    """Of the same numbers, in float64."""
    flat = given.double().flatten(0, 1)
    return math.exp(torch.nn.functional.cross_entropy(flat, target.flatten()).item())


found = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    given = logits.to(dtype)
    found[dtype] = [perplexity(given, batch) / exact(given) - 1 for batch in (1, 4, 16)]
    print(f"{dtype}: exact {exact(given):.3f};", "off by", ", ".join(f"{each:+.3%}" for each in found[dtype]), "with 1, 4, 16 rows a batch")
upcast = perplexity(logits.bfloat16().float(), 16) / exact(logits.bfloat16()) - 1
print(f"bfloat16 given as float32: off by {upcast:+.3%}")
rare = logits.clone()
rare[0, 0, target[0, 0]] = -14  # one token of 8,192
half = rare.half()
least = float(half.double().log_softmax(-1)[0, 0, target[0, 0]])
print(f"float16 with one token of probability {math.exp(least):.1e}: {perplexity(half, 16)}, exact {exact(half):.3f}")
right = max(map(abs, found[torch.float32])) < 1e-5 and abs(upcast) < 1e-5
right &= max(map(abs, found[torch.bfloat16])) > 2e-3 and max(found[torch.bfloat16]) - min(found[torch.bfloat16]) > 1e-3
right &= math.isinf(perplexity(half, 16)) and math.isfinite(exact(half))
sys.exit(0 if right else "the behaviour has changed")
PYTHON
OMP_NUM_THREADS=2 "$folder/venv/bin/python" "$folder/try.py" 2> "$folder/err" || { cat "$folder/err"; exit 1; }
