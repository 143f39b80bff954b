"""Greedy generations of a quantized model beside the original's: what likelihoods do not show.

first difference   the place of the first token that is another, of NEW; the number of tokens where none is
repeated           the share of 4-grams of a generation that it has had before
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.against_auto_round import in_half

PROMPTS, PROMPT, NEW, GRAM = 20, 32, 64, 4
"""Prompts, tokens of a prompt, tokens that are generated, and tokens that count as repeated together."""


@torch.inference_mode()
def greedy(model: Any, prompts: Tensor, count: int) -> Tensor:
    """The `count` likeliest tokens one after another, (prompts, count); nothing ends a generation before."""
    token, cache, found = prompts.to(model.device), DynamicCache(), []
    for _ in range(count):
        logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        token = logits.argmax(-1, keepdim=True)
        found.append(token)
    return torch.cat(found, dim=1).cpu()


def first_difference(one: Tensor, other: Tensor) -> Tensor:
    """Tokens before the first that differs, (prompts,)."""
    return (one == other).long().cumprod(1).sum(1)


def repeated(tokens: Tensor) -> float:
    """The mean share of n-grams that a row has had before."""
    grams = tokens.unfold(1, GRAM, 1)
    return sum(1 - len(set(map(tuple, row.tolist()))) / len(row) for row in grams) / len(grams)


@dataclass(frozen=True)
class Prompts:
    """Prompts (prompts, PROMPT) and what the original makes of them (prompts, NEW)."""

    ids: Tensor
    original: Tensor
    device: torch.device

    @classmethod
    def of(cls, model: str, texts: list[str], device: torch.device) -> "Prompts":
        """The beginnings of the first texts that are long enough."""
        tokenizer = AutoTokenizer.from_pretrained(model)
        ids = [tokenizer(text, truncation=True, max_length=PROMPT).input_ids for text in texts[: 10 * PROMPTS]]
        rows = torch.tensor([row for row in ids if len(row) == PROMPT][:PROMPTS])
        original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device)
        return cls(rows, greedy(original, rows, NEW), device)

    def compared(self, model: Any) -> str:
        """A line on a model beside the original."""
        found = greedy(in_half(model, self.device), self.ids, NEW)
        same = first_difference(found, self.original)
        places = f"first difference {same.float().mean():.1f} of {NEW} (median {int(same.median())})"
        likes = (found == self.original).float().mean()
        repeats = f"repeated {repeated(found):.3f}, original {repeated(self.original):.3f}"
        return f"{len(found)} generations: {places}, {int((same == NEW).sum())} equal, tokens {likes:.3f}, {repeats}"
