"""The loss of next tokens from hidden states after the last block, for the tokens that are learned alone.

    L = sum over targets of  log sum_v exp(u_v) - u_y           u the logits, y the token that follows
    dL/du = softmax(u) - 1_y

Logits exist for some tokens at a time, and with them their gradient: the head is not trained, so that what comes back
to the hidden states is known in the forward pass. Tokens that are only read never reach the head. Norm, head and what
follows it are the model's own.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from workers.engine.memory import FINETUNE_LOGITS_AT_ONCE
from workers.engine.model.streamed_model import StreamedModel


def token_loss(model: StreamedModel, hidden: Tensor, target_positions: Tensor, labels: Tensor) -> Tensor:
    """The sum over targets, fp32 (); gradients reach `hidden`. Norm and head must be loaded.

    hidden (rows, length, width); target_positions int64 (targets,) in its rows and positions, flat, each once;
    labels int64 (targets,), the tokens that follow them.
    """
    loss: Tensor = _TokenLoss.apply(hidden, target_positions, labels, model)  # type: ignore[no-untyped-call]
    return loss


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target_positions: Tensor, labels: Tensor, model: StreamedModel) -> Tensor:
        learns = ctx.needs_input_grad[0]
        states = hidden.flatten(0, -2).index_select(0, target_positions)
        gradient = torch.empty_like(states) if learns else states
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for chunk in _chunks(len(target_positions), model):
            leaf = states[chunk].detach().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                logits = model.logits(leaf.unsqueeze(0))[0]
            loss, by_logits = _cross_entropy(logits.detach(), labels[chunk])
            total += loss
            if learns:
                (gradient[chunk],) = torch.autograd.grad(logits, leaf, by_logits)
        ctx.save_for_backward(gradient, target_positions)
        ctx.shape = hidden.shape
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, target_positions = ctx.saved_tensors
        by_hidden = gradient.new_zeros(ctx.shape)
        by_hidden.view(-1, ctx.shape[-1]).index_copy_(0, target_positions, gradient * gradients[0].to(gradient.dtype))
        return by_hidden, None, None, None


@torch.no_grad()
def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over tokens, fp32 or wider, and its gradient by the logits (tokens, vocabulary), in their dtype."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    index = labels.unsqueeze(-1)
    chosen = wide.gather(-1, index)
    normal = wide.logsumexp(-1, keepdim=True)
    probabilities = wide.sub_(normal).exp_()
    probabilities.scatter_add_(-1, index, -torch.ones_like(chosen))
    return (normal - chosen).sum(), probabilities.to(logits.dtype)


def _chunks(count: int, model: StreamedModel) -> Iterator[slice]:
    """Parts of about equal size."""
    step = max(1, FINETUNE_LOGITS_AT_ONCE[model.device.type] // model.vocabulary)
    number = math.ceil(count / step)
    return (slice(count * i // number, count * (i + 1) // number) for i in range(number))
