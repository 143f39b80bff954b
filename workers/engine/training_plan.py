"""How finetuning fits into memory: sequences at once, blocks that are computed again, weights that are kept.

The estimate counts against all of the device's memory, not against what happens to be free: the same request on the
same machine always gives the same plan, and so the same adapter.
"""

from dataclasses import dataclass, replace

import torch

from app.domain.finetuning import Finetune
from workers.engine.blocks import StreamedModel
from workers.engine.plan import TOKENS_AT_ONCE_CPU, TOKENS_AT_ONCE_GPU, graph_bytes
from workers.engine.ranks import ALONE, Ranks
from workers.engine.token_loss import LOGITS_AT_ONCE, LOGITS_BYTES
from workers.memory import host_memory

MEMORY_SHARE = {"cuda": 0.85, "cpu": 0.5}
"""Of the device's memory that the stage may count on."""
KEPT_SHARE = {"cuda": 0.05, "cpu": 0.2}
"""Of it that dequantized weights may take, which saves making them anew; nothing where blocks are computed again."""
CAPTURED_SHARE = 0.25
"""Of a GPU's memory that activations may take if passes are to be captured."""
ADAPTER_BYTES = 5 * 4
"""A trained number, its gradient, two moments and a copy."""
ADAPTER_SHARE = 0.03
"""Trained numbers for each weight: more than a LoRA of rank 64 has."""
FULL_TOKENS = {"cuda": 4096, "cpu": 512}
"""Enough at once to keep the device busy: rather than fewer, blocks are computed again."""


@dataclass(frozen=True)
class TrainingPlan:
    """micro_batch: sequences at once; recomputed: blocks, from the first on; keeps: dequantized weights.

    captures   whether passes may be captured; what is trained is the same
    """

    micro_batch: int
    recomputed: int
    keeps: bool
    captures: bool = False


def plan_training(
    model: StreamedModel,
    names: set[str],
    part: Finetune,
    length: int,
    *,
    divisor: int = 1,
    ranks: Ranks = ALONE,
    pass_bytes: int = 0,
) -> TrainingPlan:
    """The plan for sequences of `length` tokens at the most; `names` of the quantized linears.

    divisor      by which micro-batches are smaller after an attempt that ran out of memory
    pass_bytes   that adapters keep for each trained number while a batch goes through
    """
    device, blocks = model.device.type, len(model.blocks)
    memory = torch.cuda.get_device_properties(model.device).total_memory if device == "cuda" else host_memory()
    linears = model.linears()
    weights = sum(linears[name].weight.numel() for name in names)
    fits = weights * model.dtype.itemsize <= KEPT_SHARE[device] * memory
    most = max(1, (TOKENS_AT_ONCE_GPU if device == "cuda" else TOKENS_AT_ONCE_CPU) // length)
    micro_batch = max(1, min(ranks.part(part.batch_size), most) // divisor)

    def plan(*, keeps: bool) -> TrainingPlan:
        allowed = MEMORY_SHARE[device] * memory - _fixed_bytes(model, names, weights, pass_bytes, keeps=keeps)
        needs = _Needs(
            graph=graph_bytes(model) * length,
            inputs=blocks * model.config.get_text_config().hidden_size * model.dtype.itemsize * length,
            allowed=allowed,
            blocks=blocks,
        )
        return _planned(needs, part, micro_batch, length, device, keeps=keeps)

    found = plan(keeps=fits)
    if found.keeps and found.recomputed:
        # Where memory is so short that blocks are computed again, weights are what it is spent on last.
        found = plan(keeps=False)
    if device != "cuda" or found.recomputed:
        return found
    activations = blocks * graph_bytes(model) * length * found.micro_batch
    fixed = _fixed_bytes(model, names, weights, pass_bytes, keeps=found.keeps)
    return replace(found, captures=_may_capture(activations, fixed, memory))


def _may_capture(activations: float, fixed: float, memory: float) -> bool:
    """Whether the pool of captured passes leaves room for eager ones, of other batches and of text that judges."""
    return activations <= CAPTURED_SHARE * memory and fixed + 2 * activations <= MEMORY_SHARE["cuda"] * memory


def _planned(
    needs: "_Needs", part: Finetune, micro_batch: int, length: int, device: str, *, keeps: bool
) -> TrainingPlan:
    """As many sequences at once as memory allows, up to `micro_batch`."""
    blocks = needs.blocks
    if part.gradient_checkpointing is not None:
        recomputed = blocks if part.gradient_checkpointing else 0
        while micro_batch > 1 and needs.recomputed(micro_batch) > recomputed:
            micro_batch = (micro_batch + 1) // 2
        return TrainingPlan(micro_batch, recomputed, keeps)
    while micro_batch > 1 and _is_worth_halving(needs.recomputed(micro_batch), micro_batch, length, device, blocks):
        micro_batch = (micro_batch + 1) // 2
    return TrainingPlan(micro_batch, min(blocks, needs.recomputed(micro_batch)), keeps)


def _is_worth_halving(recomputed: int, micro_batch: int, length: int, device: str, blocks: int) -> bool:
    """Whether something must be saved, and fewer sequences at once are better than blocks that are computed again."""
    return recomputed > blocks or (recomputed > 0 and micro_batch * length > FULL_TOKENS[device])


@dataclass(frozen=True)
class _Needs:
    """Bytes for each sequence: of a block's graph, and of all blocks' inputs; and what they all may take."""

    graph: int
    inputs: int
    allowed: float
    blocks: int

    def recomputed(self, micro_batch: int) -> int:
        """Blocks to compute again; one more than there are if even that does not fit."""
        if self.blocks * self.graph * micro_batch <= self.allowed:
            return 0
        left = self.allowed - (self.graph + self.inputs) * micro_batch
        if left < 0:
            return self.blocks + 1
        return max(1, self.blocks - int(left // (self.graph * micro_batch)))


def _fixed_bytes(model: StreamedModel, names: set[str], weights: int, pass_bytes: int, *, keeps: bool) -> float:
    """What the model, its adapters and a chunk of logits take."""
    item, config = model.dtype.itemsize, model.config.get_text_config()
    others = sum(p.numel() for n, p in model.model.named_parameters() if n.removesuffix(".weight") not in names)
    largest: int = max((model.linears()[name].weight.numel() for name in names), default=0)
    # Made anew, all weights of one block may exist at a time (`workers.engine.adapted_linear`).
    stored = weights * item if keeps else weights * (1 + item / len(model.blocks)) + 3 * largest * 4
    adapters = weights * ADAPTER_SHARE * (ADAPTER_BYTES + pass_bytes)
    return float(others * item + stored + adapters + _logits(model, config.vocab_size))


def _logits(model: StreamedModel, vocabulary: int) -> int:
    return max(LOGITS_AT_ONCE[model.device.type], vocabulary) * LOGITS_BYTES
