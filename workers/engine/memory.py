"""Memory model of the engine: how much each stage may take, and what blocks, logits and tuning need, in bytes."""

from dataclasses import dataclass

import torch

from workers.contracts.experts import experts_of
from workers.engine.model.streamed_model import StreamedModel
from workers.machine import host_memory

MEMORY_STEP = 1 << 30
"""Free memory of a GPU is rounded down to this, so that the same machine gives the same plan."""
ACTIVATION_SHARE = 0.9
"""Of what else is left of a GPU's memory that activations may take before they move to the host."""
ACTIVATION_BYTES = 6 << 30
"""Activations beyond this live in host memory, however much is free: copies hide behind the work of such widths."""
TUNING_SHARE = 0.3
"""Of a GPU's memory that a micro-batch with gradients may take."""
SCALES_SHARE = {"cuda": 0.85, "cpu": 0.6}
"""Of the device's memory that end-to-end scale tuning may count on."""
FINETUNE_SHARE = {"cuda": 0.85, "cpu": 0.5}
"""Of the device's memory that finetuning may count on."""
KEPT_SHARE = {"cuda": 0.05, "cpu": 0.2}
"""Of it that dequantized weights may take in finetuning, which saves making them anew."""
CAPTURED_SHARE = 0.25
"""Of a GPU's memory that activations may take in finetuning if passes are to be captured."""
FISHER_SHARE = 0.2
"""Of a memory that hidden states may take while Fisher information is measured: a GPU's, else the host's."""
SQUARES_AT_ONCE = {"cuda": 1 << 28, "cpu": 1 << 22}
"""Numbers of the gradients by one weight of several sequences, while Fisher information is measured."""

LARGEST_MICRO_BATCH = 32
TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 16_384}
"""Tokens that go through a block with gradients: enough to fill the device; more only takes memory."""
LOGITS_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Elements of one logit matrix in evaluation, Fisher information and scale tuning."""
LOGITS_BYTES = 5 * 4
"""For each of these elements: some five matrices are held in fp32."""
FINETUNE_LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 25}
"""Elements of one logit matrix in finetuning."""
FINETUNE_LOGITS_BYTES = 4 * 4
"""For each of them: logits, the same in fp32, probabilities and the gradient."""
TUNED_BYTES = 16
"""For each weight that is tuned, beside the block: its value, gradient, offset, kept code and copies."""
ADAPTER_BYTES = 5 * 4
"""For each trained number of an adapter: itself, its gradient, two moments and a copy."""
ADAPTER_SHARE = 0.03
"""Trained numbers for each weight: more than a LoRA of rank 64 has."""
GROUP_BYTES = 6 * 4
"""For each group whose scale is tuned end to end: p, its gradient, m, v, s twice."""
MOVING_BYTES = {2: 4 + 3 * 2, 4: 4 * 4, 8: 4 * 8}
"""For each weight whose code is tuned end to end, by the bytes of the model's dtype: x, its gradient, m, v."""
PLACES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token", "moe_top_k")
"""Names in configurations for the number of experts that a token goes through."""
PASS_BYTES = 1 << 31
"""Of a GPU's memory that a pass without gradients may take: the fewer the calls, the less to launch."""


@dataclass(frozen=True)
class ActivationSize:
    """Sequences of a text, and how many tensors of hidden states are kept of them."""

    sequences: int
    length: int
    tensors: int


def device_memory(device: torch.device) -> int:
    """All memory of a GPU, or of the host: plans that count against it are the same on the same machine."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host_memory()


def pass_bytes(model: StreamedModel) -> int:
    """Bytes per token that a block holds at once without autograd."""
    places, inner = routed(model)
    elements = 4 * model.width + 3 * inner_width(model) + places * (4 * model.width + 4 * inner)
    return int(elements * model.dtype.itemsize)


def graph_bytes(model: StreamedModel) -> int:
    """Bytes per token that autograd keeps of a block."""
    # In units of the width and of the MLP's width, measured on Llama blocks. A token has a row for each of its experts:
    # what goes in, gate and up, what they make, what comes out, weighted and put in order, and gradients beside them.
    places, inner = routed(model)
    elements = 24 * model.width + 6 * inner_width(model) + places * (5 * model.width + 7 * inner)
    return int(elements * model.dtype.itemsize)


def routed(model: StreamedModel) -> tuple[int, int]:
    """Experts that a token goes through, and their inner width; zeros where there are none.

    A part that multiplies inputs by the router's weights computes every expert on every token.
    """
    parts = [part for block in model.blocks for part in experts_of(block).values()]
    if not parts:
        return 0, 0
    config, part = model.config.get_text_config(), max(parts, key=lambda each: each.number)
    named = next((value for name in PLACES if isinstance(value := getattr(config, name, None), int)), part.number)
    places = part.number if part.computes_all else min(named, part.number)
    return places, part.linear(0, part.down).in_features


def inner_width(model: StreamedModel) -> int:
    """Of the MLP, as the configuration names it; else of the widest linear of a block."""
    named = getattr(model.config.get_text_config(), "intermediate_size", None)
    if isinstance(named, int):
        return named
    blocks = (model.block_linears(index).values() for index in range(len(model.blocks)))
    return max((max(linear.weight.shape) for linears in blocks for linear in linears), default=4 * model.width)


def working_bytes(model: StreamedModel, length: int, micro_batch: int) -> int:
    """The most that a job needs on the device beside its activations: in a pass, while tuning, or while making logits.

    length, micro_batch   of the sequences that go through a block at once with gradients
    """
    item = model.dtype.itemsize
    block = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    # Besides the block in hand there is the next one (`workers.engine.device.read_ahead`).
    tuning = 2 * block * item + block * TUNED_BYTES + micro_batch * length * graph_bytes(model)
    head = model.vocabulary * model.width * item
    logits = min(LOGITS_AT_ONCE["cuda"], length * model.vocabulary) * LOGITS_BYTES
    # In a pass for the reference row the block's rounded weights are there besides.
    return int(max(tuning, 3 * block * item + PASS_BYTES, head + logits))


def largest_micro_batch(model: StreamedModel, length: int) -> int:
    """Sequences of this length that go through a block at once with gradients."""
    most = max(1, min(LARGEST_MICRO_BATCH, TOKENS_AT_ONCE[model.device.type] // length))
    if model.device.type != "cuda":
        return most
    budget = TUNING_SHARE * device_memory(model.device)
    return max(1, min(most, int(budget // (graph_bytes(model) * length))))


def largest_pass_batch(model: StreamedModel, length: int) -> int:
    """The same without gradients."""
    if model.device.type != "cuda":
        return largest_micro_batch(model, length)
    return max(1, PASS_BYTES // (pass_bytes(model) * length))


def activation_bytes(model: StreamedModel, sizes: list[ActivationSize]) -> int:
    """Hidden states of these sizes."""
    elements = sum(size.sequences * size.length * size.tensors for size in sizes)
    return int(elements * model.width * model.dtype.itemsize)


def activation_budget(model: StreamedModel, length: int, micro_batch: int) -> int | None:
    """Bytes of the device that are free now and that nothing else will need; None on a CPU."""
    if model.device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(model.device)[0] // MEMORY_STEP * MEMORY_STEP
    return max(0, int(ACTIVATION_SHARE * (free - working_bytes(model, length, micro_batch))))
