"""Memory estimates of the engine: bytes of passes, graphs, logits and tuning state."""

from workers.engine.model.streamed_model import StreamedModel

LOGITS_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Elements of one logit matrix."""


LOGITS_BYTES = 5 * 4
"""For each of these elements: some five matrices are held in fp32."""


TOKENS_AT_ONCE_CPU = 4096


TUNED_BYTES = 16
"""What tuning keeps of a weight, beside the block: its value, gradient, learned offset, kept code and copies."""


TOKENS_AT_ONCE_GPU = 16_384
"""Enough to fill a GPU; more only takes memory, for the MLP's insides first."""


PASS_BYTES = 1 << 31
"""Of a GPU's memory that a pass without gradients may take: the fewer the calls, the less to launch."""


def _pass_bytes(model: StreamedModel) -> int:
    """What a block holds of each token at once without autograd."""
    config = model.config.get_text_config()
    return int((4 * config.hidden_size + 3 * config.intermediate_size) * model.dtype.itemsize)


def graph_bytes(model: StreamedModel) -> int:
    """What autograd keeps of a block for each token."""
    config = model.config.get_text_config()
    # In units of the width and of the MLP's width, measured on Llama blocks.
    return int((24 * config.hidden_size + 6 * config.intermediate_size) * model.dtype.itemsize)


def working_bytes(model: StreamedModel, length: int, micro_batch: int) -> int:
    """The most that a job needs on the device beside its streams: in a pass, while tuning, or while making logits.

    length, micro_batch   of the sequences that go through a block at once with gradients
    """
    item, config = model.dtype.itemsize, model.config.get_text_config()
    block = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    # Besides the block in hand there is the next one (`workers.engine.device.read_ahead`).
    tuning = 2 * block * item + block * TUNED_BYTES + micro_batch * length * graph_bytes(model)
    head = config.vocab_size * config.hidden_size * item
    logits = min(LOGITS_AT_ONCE["cuda"], length * config.vocab_size) * LOGITS_BYTES
    # In a pass for the reference row the block's rounded weights are there besides.
    return int(max(tuning, 3 * block * item + PASS_BYTES, head + logits))
