"""Bytes of the keys and values that a server keeps of each token, from a decoded config.json.

    a layer   2 * key_value_heads * head_dim values a token; with latent attention (MLA) kv_lora_rank + qk_rope_head_dim

A layer of sliding attention keeps its window at the most, where `layer_types` says which layers slide. Where several
sizes of a layer are given, the largest counts. Layers with a state instead of a cache are not counted but refused.
"""

from collections.abc import Mapping

from app.domain.weight_targets import text_config
from bitwright.errors import InvalidRequest

CACHE_BYTES = 2
"""Of a value in the model's own 16 bits."""
FP8_CACHE_BYTES = 1
KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
STATES = (
    *("layers_block_type", "block_types", "hybrid_override_pattern", "mamba_d_state", "mamba_num_heads", "ssm_cfg"),
    *("state_size", "linear_num_value_heads", "linear_attn_config", "attn_layer_indices", "full_attn_idxs"),
    *("conv_L_cache", "attention_hidden_size", "lru_width"),
)
"""Fields of models that keep a state of another kind in some layers."""

Config = Mapping[str, object]


def cache_bytes(config: Config, context: int, sequences: int, value_bytes: int = CACHE_BYTES) -> int:
    """Bytes of the cache of so many sequences of `context` tokens.

    Raises:
        InvalidRequest: the configuration does not say what a token takes.
    """
    text = text_config(config)
    strange = next((name for name in STATES if text.get(name)), None)
    if strange is not None:
        raise _unknown(f"config.json has {strange}, so that some layers keep a state that is not known here")
    layers = _number(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    kinds = text.get("layer_types")
    kinds = list(kinds) if isinstance(kinds, list | tuple) else ["full_attention"] * layers
    foreign = next((kind for kind in kinds if kind not in KNOWN_LAYERS), None)
    if foreign is not None:
        raise _unknown(f"config.json has layers of {str(foreign)[:60]!r}, whose cache is not known here")
    window = text.get("sliding_window")
    window = min(context, window) if isinstance(window, int) and window > 0 else context
    tokens = sum(window if kind == "sliding_attention" else context for kind in kinds)
    return tokens * _values(text) * value_bytes * sequences


def _values(text: Config) -> int:
    """Values that a layer keeps of a token."""
    if _is_count(text.get("kv_lora_rank")):
        return _number(text, "kv_lora_rank") + _number(text, "qk_rope_head_dim")
    heads = _number(text, "num_attention_heads", "n_head", "n_heads")
    groups = [text.get(name) for name in ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads")]
    widths = [text.get(name) for name in ("head_dim", "global_head_dim")]
    counts = [each for each in groups if isinstance(each, int) and each > 0] or [heads]
    sizes = [each for each in widths if isinstance(each, int) and each > 0]
    return 2 * max(counts) * max(sizes or [_number(text, "hidden_size", "n_embd", "d_model") // heads])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(text: Config, *names: str) -> int:
    value = next((text[name] for name in names if _is_count(text.get(name))), None)
    if not isinstance(value, int):
        raise _unknown(f"config.json has no {names[0]}")
    return value


def _unknown(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"the size of the KV cache cannot be told: {reason}",
        field="quantization.fits",
        hint='subtract the cache yourself and give the weights\' size: "at_most": {"bytes": ...}',
    )
