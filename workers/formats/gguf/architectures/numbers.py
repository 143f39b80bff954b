"""Numbers of a model as keys of a GGUF file: those that every architecture has, and the types that llama.cpp reads."""

from collections.abc import Iterator
from typing import Any

from gguf import GGUFWriter
from transformers import PreTrainedConfig

from workers.formats.gguf.architectures.family import Config, Family, Value
from workers.formats.gguf.architectures.rows import PART, head_dim, rope_of, turned

CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
FLOATS = frozenset(
    {
        "attention.scale",
        "attention.clamp_kqv",
        "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon",
        "attention.max_alibi_bias",
        "attention.temperature_scale",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "embedding_scale",
        "residual_scale",
        "logit_scale",
        "expert_weights_scale",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_log_multiplier",
    }
)
"""Keys that are floating-point numbers even where a configuration has a whole one."""


def config_of(config: PreTrainedConfig, *, partial: bool) -> dict[str, Any]:
    """Fields of the language model's configuration, under all names that they have.

    partial   whether the model turns heads in part, where the configuration says so
    """
    text: Any = config.get_text_config(decoder=True)
    fields: dict[str, Any] = {"num_hidden_layers": text.num_hidden_layers, **text.to_dict()}
    for alias, name in text.attribute_map.items():
        if name in fields and fields.get(alias) is None:
            fields[alias] = fields[name]
    if fields.get("tie_word_embeddings") is None or text is not config:
        fields["tie_word_embeddings"] = bool(config.to_dict().get("tie_word_embeddings", False))
    own = rope_of(fields).get("partial_rotary_factor") or fields.get("partial_rotary_factor")
    return {**fields, PART: float(own) if partial and own else 1.0}


def common_keys(family: Family, config: Config) -> Iterator[tuple[str, Value]]:
    """Keys, without the architecture's name, and values."""
    heads = int(config.get("num_attention_heads") or 0)
    yield "block_count", int(config["num_hidden_layers"])
    yield "context_length", next((int(config[name]) for name in CONTEXT if config.get(name)), 2048)
    yield "embedding_length", int(config["hidden_size"])
    yield "feed_forward_length", _first(config, "intermediate_size") or 4 * int(config["hidden_size"])
    yield "vocab_size", int(config["vocab_size"])
    if heads:
        yield "attention.head_count", heads
        yield "attention.head_count_kv", int(config.get("num_key_value_heads") or heads)
        yield "attention.key_length", head_dim(config)
        yield "attention.value_length", head_dim(config)
        yield "rope.dimension_count", turned(config)
    name = "attention.layer_norm_epsilon" if family.layer_norm else "attention.layer_norm_rms_epsilon"
    if family.epsilon in config:
        yield name, float(config[family.epsilon])
    yield from _experts(config)
    yield from _rotary(rope_of(config))
    yield from ((key, config[name]) for key, name in family.keys.items() if config.get(name) is not None)
    yield from family.derive(config).items()


def put(writer: GGUFWriter, architecture: str, key: str, value: Value) -> None:
    """Adds a key under the architecture's name, or under its own after a =, as the type that llama.cpp reads."""
    full = key[1:] if key.startswith("=") else f"{architecture}.{key}"
    if isinstance(value, bool):
        writer.add_bool(full, value)
    elif isinstance(value, str):
        writer.add_string(full, value)
    elif isinstance(value, list):
        writer.add_array(full, value)
    elif isinstance(value, float) or key in FLOATS:
        writer.add_float32(full, float(value))
    else:
        writer.add_uint32(full, int(value))


def _first(config: Config, *names: str) -> int | None:
    return next((int(config[name]) for name in names if isinstance(config.get(name), int)), None)


def _experts(config: Config) -> Iterator[tuple[str, Value]]:
    count = experts_of(config)
    used = _first(config, "num_experts_per_tok", "moe_topk", "moe_k")
    if count and used:
        yield "expert_count", count
        yield "expert_used_count", used


def experts_of(config: Config) -> int:
    """Experts of a block; 0 without any."""
    return _first(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts") or 0


def _rotary(rope: dict[str, Any]) -> Iterator[tuple[str, Value]]:
    if rope.get("rope_theta") is not None:
        yield "rope.freq_base", float(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        yield "rope.scaling.type", kind
        yield "rope.scaling.factor", float(rope["factor"])
    if kind == "yarn":
        yield "rope.scaling.original_context_length", int(rope["original_max_position_embeddings"])
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if rope.get(name) is not None:
                yield f"rope.scaling.{key}", float(rope[name])
