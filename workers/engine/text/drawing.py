"""Tokens that a model draws one after another for many sequences at once, at temperature 1.

    next = argmax_k(l_k - log e_k)       l: logits, e: Exp(1); so k is drawn with softmax(l)_k (Gumbel's maximum)

Keys and values have their room from the start. On a GPU the step of all sequences is then one CUDA graph, captured
once a batch: launching its kernels one by one takes longer than they run, and a cache that grows is copied whole in
every step. Models whose layers keep anything else than all keys and values, as within a window, are left to `generate`
of transformers (`draws`).
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from workers.engine.device.cuda_graphs import capture


def draws(model: PreTrainedModel) -> bool:
    """True if steps of the model can be those of this module."""
    return bool(model._can_compile_fullgraph) and all(type(layer) is StaticLayer for layer in _cache(model, 2).layers)


def continued(model: PreTrainedModel, rows: Tensor, length: int, never: int | None) -> Tensor:
    """rows (sequences, tokens) on the model's device, continued to `length` tokens each.

    never   the token that is never drawn

    Drawn from torch's own generator of the device.

    Raises:
        FloatingPointError: a distribution is none: the model's numbers are not finite.
        RuntimeError: a step of the model cannot be captured.
    """
    drawing = Drawing(model, rows, length, never)
    drawing.begin()
    step = drawing.step
    if rows.is_cuda and length - rows.shape[1] > 1:
        step = capture(drawing.step, drawing.counts)
        drawing.begin()
    for _ in range(length - rows.shape[1] - 1):
        step()
    if not bool(drawing.finite):
        raise FloatingPointError("logits are not finite")
    return drawing.drawn


class Drawing:
    """The state of a batch, all of it on the device and where it was from the start.

    drawn    int64 (sequences, length): the rows, and what was drawn behind them
    place    of the next token, int64 (1,)
    finite   whether all logits were, a truth value
    """

    def __init__(self, model: PreTrainedModel, rows: Tensor, length: int, never: int | None) -> None:
        self._model, self._rows, self._never = model, rows, never
        self._cache = _cache(model, length)
        self._token = rows[:, -1:].clone()
        self.drawn = rows.new_zeros(len(rows), length)
        self.place = torch.zeros(1, dtype=torch.int64, device=rows.device)
        self.finite = torch.ones((), dtype=torch.bool, device=rows.device)

    @property
    def counts(self) -> tuple[Tensor, ...]:
        """Places: of the next token, and of each layer's cache."""
        return (self.place, *(layer.cumulative_length for layer in self._cache.layers))

    def begin(self) -> None:
        """The rows, and the first token behind them; what was drawn before is forgotten."""
        if all(layer.is_initialized for layer in self._cache.layers):
            self._cache.reset()
        self.finite.fill_(True)
        self.drawn[:, : self._rows.shape[1]] = self._rows
        self.place.fill_(self._rows.shape[1])
        self._draw(self._rows)

    def step(self) -> None:
        """One token more of each sequence."""
        self._draw(self._token)

    def _draw(self, tokens: Tensor) -> None:
        output: Any = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1].float()
        self.finite.logical_and_(logits.amax(-1).isfinite().all())
        if self._never is not None:
            logits[:, self._never] = -torch.inf
        logits -= torch.empty_like(logits).exponential_().log_()
        self._token.copy_(logits.argmax(-1, keepdim=True))
        self.drawn.index_copy_(1, self.place, self._token)
        self.place += 1


def _cache(model: PreTrainedModel, length: int) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=length)
