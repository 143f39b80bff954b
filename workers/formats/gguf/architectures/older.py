"""Models of before 2024: names without `model.layers`, and queries, keys and values in one matrix.

Read in llama.cpp v0.5.0 (`src/models/*.cpp`) and its converter (`conversion/*.py`).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from workers.formats.gguf.architectures.family import Config, Family, Values
from workers.formats.gguf.architectures.rows import from_groups, head_dim

FUSED = "query_key_value"


def by_kind(name: str, config: Config) -> Tensor | None:
    """Rows of a matrix with q, k and v of every head in turn, as all of q, all of k, all of v."""
    return from_groups(int(config["num_attention_heads"]), 3, head_dim(config)) if name.endswith(FUSED) else None


def falcon_order(name: str, config: Config) -> Tensor | None:
    """Rows of groups, each of some queries, a key and a value, as all queries, all keys, all values."""
    if not name.endswith(FUSED):
        return None
    heads, width = int(config["num_attention_heads"]), head_dim(config)
    groups = falcon_groups(config)
    rows = torch.arange((heads + 2 * groups) * width).view(groups, -1, width)
    return torch.cat([rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()])


def falcon_groups(config: Config) -> int:
    """Heads of keys and values."""
    if config.get("new_decoder_architecture"):
        return int(config["num_kv_heads"])
    return 1 if config.get("multi_query") else int(config["num_attention_heads"])


def falcon_keys(config: Config) -> Values:
    """Groups, and the name of the order of rows."""
    return {
        "attention.head_count_kv": falcon_groups(config),
        "tensor_data_layout": "jploski",
        "feed_forward_length": int(config.get("ffn_hidden_size") or 4 * config["hidden_size"]),
    }


def mpt_keys(config: Config) -> Values:
    """ALiBi, and the clip of q, k and v."""
    attention: Mapping[str, Any] = config.get("attn_config") or {}
    bias = float(attention.get("alibi_bias_max") or 0) if attention.get("alibi") else 0.0
    clip = attention.get("clip_qkv")
    return {
        "attention.max_alibi_bias": bias,
        "feed_forward_length": int(config["expansion_ratio"] * config["hidden_size"]),
        **({} if not clip else {"attention.clamp_kqv": float(clip)}),
    }


def gpt2_keys(config: Config) -> Values:
    """The width of the feed-forward part."""
    return {"feed_forward_length": int(config.get("n_inner") or 4 * config["hidden_size"])}


def bigcode_keys(config: Config) -> Values:
    """One key and value for all heads."""
    return {**gpt2_keys(config), "attention.head_count_kv": 1 if config["multi_query"] else config["n_head"]}


def gpt_neox_keys(config: Config) -> Values:
    """The word on attention and a feed-forward part that read the same input."""
    return {"use_parallel_residual": bool(config["use_parallel_residual"])}


def upright(name: str, tensor: Tensor, config: Config) -> Tensor:
    """GPT-2's matrices (in, out) as (out, in)."""
    del config
    turned = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
    return tensor.T.contiguous() if turned else tensor


def plain(layer_norm: str, **rest: Any) -> Family:
    return Family(epsilon=layer_norm, layer_norm=True, **rest)


OLDER: Mapping[str, Family] = MappingProxyType(
    {
        "gpt_neox": plain("layer_norm_eps", order=by_kind, derive=gpt_neox_keys),
        "gpt2": plain("layer_norm_epsilon", derive=gpt2_keys, change=upright),
        "falcon": plain("layer_norm_epsilon", order=falcon_order, derive=falcon_keys),
        "bloom": plain(
            "layer_norm_epsilon",
            order=by_kind,
            derive=lambda config: {"feed_forward_length": 4 * config["hidden_size"]},
            aliases=((r"^transformer\.", ""),),
        ),
        "mpt": plain("layer_norm_epsilon", derive=mpt_keys),
        "gpt_bigcode": plain("layer_norm_epsilon", derive=bigcode_keys),
    }
)
"""transformers' `model_type` -> the family."""
