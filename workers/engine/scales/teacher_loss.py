"""From hidden states after the last block to the KL divergence of next tokens, and back, some tokens at a time.

The logits of a model's vocabulary are its largest tensor by far. Here they exist only for a chunk of tokens: the
teacher's and the student's, and the gradient in place of the teacher's. The norm, the head and what follows it
(Gemma's soft cap) are the model's own, under autograd; the loss and its gradient by the logits are by hand
(`workers.numerics.divergence`).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workers.engine.memory import LOGITS_AT_ONCE
from workers.engine.model.streamed_model import StreamedModel
from workers.numerics.divergence import divergence


@dataclass(frozen=True)
class OutputHead:
    """The model's `after_blocks`, which must be loaded.

    quantized       the student's head weight, where that is quantized; else both have the original one
    tokens_at_once  tokens whose logits exist at a time
    """

    model: StreamedModel
    original: nn.Parameter
    quantized: nn.Parameter
    tokens_at_once: int

    @classmethod
    def of(cls, model: StreamedModel, quantized: Tensor | None) -> "OutputHead":
        weight = model.model.get_submodule(model.layout.head).weight
        assert isinstance(weight, nn.Parameter)  # noqa: S101 - for the type checker
        student = weight if quantized is None else nn.Parameter(quantized.to(model.device), requires_grad=False)
        vocabulary = model.vocabulary
        return cls(model, weight, student, max(1, LOGITS_AT_ONCE[model.device.type] // vocabulary))

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(teacher || student) summed over tokens, fp64; hidden states (batch, length, width)."""
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        for states, fixed in self._chunks(student.contiguous(), teacher):
            with torch.no_grad(), self._head(self.quantized):
                total += divergence(self._logits(states), self._teacher(fixed))[0].sum(dtype=torch.float64)
        return total

    def gradient(
        self, student: Tensor, teacher: Tensor, weights: Callable[[Tensor], Tensor | None] = lambda _: None
    ) -> tuple[Tensor, Tensor]:
        """The same sum, and its gradient by the student's hidden states, in their dtype.

        weights   what each token's gradient is multiplied by, of their divergence (tokens,); None: all by 1

        Of the sum, not of the mean: its numbers are of the size of probabilities, which half precision holds.
        """
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        student, gradient = student.contiguous(), torch.empty(student.shape, dtype=student.dtype, device=student.device)
        for states, fixed, out in self._chunks(student, teacher, gradient):
            leaf, target = states.detach().requires_grad_(), self._teacher(fixed)
            with torch.enable_grad(), self._head(self.quantized):
                logits = self._logits(leaf)
            each, by_logits = divergence(logits.detach(), target)
            torch.autograd.backward(logits, by_logits)
            assert leaf.grad is not None  # noqa: S101 - for the type checker
            weight = weights(each)
            out.copy_(leaf.grad if weight is None else leaf.grad * weight.unsqueeze(1))
            total += each.sum(dtype=torch.float64)
        return total, gradient

    def _chunks(self, *hidden: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Views of (tokens, width), of about equal size."""
        count = math.ceil(hidden[0].shape[:-1].numel() / self.tokens_at_once)
        return zip(*(torch.tensor_split(states.view(-1, states.shape[-1]), count) for states in hidden), strict=True)

    @torch.no_grad()
    def _teacher(self, hidden: Tensor) -> Tensor:
        with self._head(self.original):
            return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        """(tokens, vocabulary) of (tokens, width), with the weight that the head has now."""
        return self.model.logits(hidden.unsqueeze(0))[0]

    @contextmanager
    def _head(self, weight: nn.Parameter) -> Iterator[None]:
        head = self.model.model.get_submodule(self.model.layout.head)
        before = head.weight
        head.weight = weight
        try:
            yield
        finally:
            head.weight = before
