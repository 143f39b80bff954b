"""Memory plan of finetuning: micro-batch size, blocks that are recomputed, weights that stay on the device.

The estimate counts against all of the device's memory, not against what happens to be free: the same request on the
same machine always gives the same plan, and so the same adapter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from app.domain.request.finetuning import Finetune
from workers.engine.device.process_group import SINGLE_PROCESS, ProcessGroup
from workers.engine.memory import (
    ADAPTER_BYTES,
    ADAPTER_SHARE,
    CAPTURED_SHARE,
    FINETUNE_LOGITS_AT_ONCE,
    FINETUNE_LOGITS_BYTES,
    FINETUNE_SHARE,
    KEPT_SHARE,
    TOKENS_AT_ONCE,
    device_memory,
    graph_bytes,
)
from workers.engine.model.streamed_model import StreamedModel

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
    config: Finetune,
    length: int,
    *,
    divisor: int = 1,
    processes: ProcessGroup = SINGLE_PROCESS,
    pass_bytes: int = 0,
) -> TrainingPlan:
    """The plan for sequences of `length` tokens at the most; `names` of the quantized linears.

    divisor      by which micro-batches are smaller after an attempt that ran out of memory
    pass_bytes   that adapters keep for each trained number while a batch goes through
    """
    needs = _Needs.of(model, names, length, pass_bytes)
    at_once = max(1, TOKENS_AT_ONCE[needs.device] // length)
    most = max(1, min(processes.share_size(config.batch_size), at_once) // divisor)
    plan = _planned(needs, config, most, keeps=needs.kept <= KEPT_SHARE[needs.device] * needs.memory)
    if plan.keeps and plan.recomputed:
        # Where memory is so short that blocks are computed again, weights are what it is spent on last.
        plan = _planned(needs, config, most, keeps=False)
    return replace(plan, captures=needs.device == "cuda" and needs.has_room_for_pool(plan))


def _planned(needs: "_Needs", config: Finetune, micro_batch: int, *, keeps: bool) -> TrainingPlan:
    """As many sequences at once as memory allows, up to `micro_batch`."""
    blocks = needs.blocks
    if config.gradient_checkpointing is not None:
        recomputed = blocks if config.gradient_checkpointing else 0
        while micro_batch > 1 and needs.recomputed(micro_batch, keeps=keeps) > recomputed:
            micro_batch = (micro_batch + 1) // 2
        return TrainingPlan(micro_batch, recomputed, keeps)
    while micro_batch > 1 and needs.is_worth_halving(micro_batch, keeps=keeps):
        micro_batch = (micro_batch + 1) // 2
    return TrainingPlan(micro_batch, min(blocks, needs.recomputed(micro_batch, keeps=keeps)), keeps)


@dataclass(frozen=True)
class _Needs:
    """Bytes that training takes.

    memory          of the device
    kept            of all dequantized weights
    fixed           what the model, its adapters and a chunk of logits take, by whether these weights are kept
    graph, inputs   for each sequence of `length` tokens: of a block's graph, and of all blocks' inputs
    """

    device: str
    memory: int
    blocks: int
    length: int
    kept: int
    fixed: Mapping[bool, float]
    graph: int
    inputs: int

    @classmethod
    def of(cls, model: StreamedModel, names: set[str], length: int, pass_bytes: int) -> "_Needs":
        device, item, blocks = model.device.type, model.dtype.itemsize, len(model.blocks)
        linears = model.linears()
        sizes = [linears[name].weight.numel() for name in names]
        others = sum(p.numel() for n, p in model.model.named_parameters() if n.removesuffix(".weight") not in names)
        logits = max(FINETUNE_LOGITS_AT_ONCE[device], model.vocabulary) * FINETUNE_LOGITS_BYTES
        fixed = others * item + sum(sizes) * ADAPTER_SHARE * (ADAPTER_BYTES + pass_bytes) + logits
        # Made anew, all weights of one block may exist at a time (`workers.engine.finetune.adapted_linear`).
        packed = sum(sizes) * (1 + item / blocks) + 3 * max(sizes, default=0) * 4
        return cls(
            device=device,
            memory=device_memory(model.device),
            blocks=blocks,
            length=length,
            kept=sum(sizes) * item,
            fixed=MappingProxyType({True: fixed + sum(sizes) * item, False: fixed + packed}),
            graph=graph_bytes(model) * length,
            inputs=blocks * model.width * item * length,
        )

    def recomputed(self, micro_batch: int, *, keeps: bool) -> int:
        """Blocks to compute again; one more than there are if even that does not fit."""
        allowed = FINETUNE_SHARE[self.device] * self.memory - self.fixed[keeps]
        if self.blocks * self.graph * micro_batch <= allowed:
            return 0
        left = allowed - (self.graph + self.inputs) * micro_batch
        if left < 0:
            return self.blocks + 1
        return max(1, self.blocks - int(left // (self.graph * micro_batch)))

    def is_worth_halving(self, micro_batch: int, *, keeps: bool) -> bool:
        """True if memory must be saved, and fewer sequences are better than blocks that are computed again."""
        recomputed = self.recomputed(micro_batch, keeps=keeps)
        return recomputed > self.blocks or (recomputed > 0 and micro_batch * self.length > FULL_TOKENS[self.device])

    def activations(self, plan: TrainingPlan) -> int:
        """Bytes from the forward to the backward pass: graphs, or the blocks' inputs and one graph at a time."""
        if not plan.recomputed:
            return self.blocks * self.graph * plan.micro_batch
        return ((self.blocks - plan.recomputed + 1) * self.graph + self.inputs) * plan.micro_batch

    def has_room_for_pool(self, plan: TrainingPlan) -> bool:
        """True if the pool of captured passes leaves room for eager ones, of other batches and of validation."""
        activations, fixed = self.activations(plan), self.fixed[plan.keeps]
        most = FINETUNE_SHARE[self.device] * self.memory
        return activations <= CAPTURED_SHARE * self.memory and fixed + 2 * activations <= most
