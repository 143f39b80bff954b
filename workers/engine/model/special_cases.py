"""Facts about modules of transformers that no call, shape or name transformation shows, each with its reason."""

from types import MappingProxyType

from workers.contracts.blocks import Fold


def folds(*, before_mlp: str = "post_attention_layernorm", offset: float = 0.0) -> tuple[Fold, ...]:
    """Places where scales can move in a block of the Llama shape.

    before_mlp  the norm whose output goes into the gated MLP
    offset      what norms add to their weights: 1 where they multiply by 1 + w
    """
    query_key, value = ("self_attn.q_proj", "self_attn.k_proj"), "self_attn.v_proj"
    return (
        Fold("input_layernorm", (*query_key, value), "self_attn", unclipped=query_key, offset=offset),
        Fold(value, ("self_attn.o_proj",), "self_attn.o_proj"),
        Fold(before_mlp, ("mlp.gate_proj", "mlp.up_proj"), "mlp", offset=offset),
        Fold("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
    )


SHARED_STATES: MappingProxyType[str, str] = MappingProxyType({"shared_kv_states": "num_kv_shared_layers"})
"""Argument that all blocks of a model get, for keys and values of one that others use again -> the number of blocks
that do. With none, nothing is ever put there (Gemma 4)."""
FOLDS: MappingProxyType[str, tuple[Fold, ...]] = MappingProxyType(
    {
        "LlamaDecoderLayer": folds(),
        "MistralDecoderLayer": folds(),
        "Qwen2DecoderLayer": folds(),
        "Qwen3DecoderLayer": folds(),
        "Gemma3DecoderLayer": folds(before_mlp="pre_feedforward_layernorm", offset=1.0),
    }
)
"""By class of the block. That attention mixes values by sums over tokens and that `up` meets `gate` in a product cannot
be seen from calls or shapes; `tests/engine/quantize/test_folds.py` holds every row against its model in fp64. A block
that is not listed has no folds."""
