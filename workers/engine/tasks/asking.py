"""A whole model that is asked rows: likelihoods of continuations and texts, and greedy texts, one row at a time.

Log-likelihoods are sums of log-softmax in fp32 over the tokens of a continuation. A text that is longer than the
model's positions is cut into windows of so many tokens. A window is predicted from the one token before it, the first
from the token that begins a text; the last, which may be short, from as many as there is room for (lm-eval's
`loglikelihood_rolling`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import StoppingCriteriaList

from workers.disk.task_rows import AskedRow, AskedTask
from workers.engine.model.overflow import original_overflows

USUAL_POSITIONS = 2048
"""Of a model that names no limit, as lm-eval takes it."""
TAIL = 64
"""Tokens at the end of a text in which a stop is looked for."""


@dataclass(frozen=True)
class Asked:
    """A model with its weights in place, its tokenizer, and the number of its positions."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    positions: int | None

    @torch.no_grad()
    def log_likelihood(self, context: Sequence[int], tokens: Sequence[int]) -> float:
        """Of tokens after a context.

        Raises:
            NumericalFailure: the model's output is not finite.
        """
        ids = torch.tensor([[*context, *tokens][:-1]], device=self.device)
        model: Any = self.model
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -len(tokens) :]
        chosen = logits.float().log_softmax(-1).gather(-1, torch.tensor(tokens, device=self.device)[:, None])
        total = float(chosen.sum())
        if math.isnan(total):
            raise original_overflows(self.model.dtype)
        return total

    def text_log_likelihood(self, row: AskedRow, first: int) -> float:
        """Of a whole text, in windows."""
        length = self.positions or USUAL_POSITIONS
        return sum(self.log_likelihood(*window) for window in windows(row.text, first, length))

    @torch.no_grad()
    def greedy(self, row: AskedRow, task: AskedTask, most: int) -> tuple[int, ...]:
        """Tokens that the model writes after a prompt, each the most likely one; with the one that ends them."""
        ids = torch.tensor([row.prompt], device=self.device)
        ends = list(task.ends) or None
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=most,
            eos_token_id=ends,
            pad_token_id=0 if ends is None else ends[0],
            use_cache=True,
        )
        generate: Any = self.model.generate
        stops = StoppingCriteriaList([_Stop(self.tokenizer, task.stops, len(row.prompt))] if task.stops else [])
        mask = torch.ones_like(ids)
        made: Tensor = generate(ids, attention_mask=mask, generation_config=settings, stopping_criteria=stops)
        return tuple(made[0, ids.shape[1] :].tolist())

    def words(self, tokens: Sequence[int], task: AskedTask) -> str:
        """A greedy text without special tokens, up to the first stop."""
        text = str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
        ends = [str(self.tokenizer.decode([token])) for token in task.ends]
        for stop in (*task.stops, *ends):
            text = text.split(stop, maxsplit=1)[0] if stop else text
        return text


class _Stop:
    """Ends a text as soon as a stop is in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], start: int) -> None:
        self._tokenizer, self._stops, self._start = tokenizer, stops, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ARG002
        tail = self._tokenizer.decode(input_ids[0, self._start :][-TAIL:].tolist())
        done = any(stop in str(tail) for stop in self._stops)
        return torch.full((len(input_ids),), done, device=input_ids.device, dtype=torch.bool)


def windows(text: Sequence[int], first: int, length: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(context, tokens) of each window of a text: every token is predicted once."""
    for start in range(0, len(text), length):
        end = min(start + length, len(text))
        yield (first,) if start == 0 else text[end - length - 1 : start], text[start:end]
