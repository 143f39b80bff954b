"""Models with linear attention or short convolutions.

Read in llama.cpp v0.5.0 (`src/models/*.cpp`) and its converter (`conversion/*.py`).
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from workers.formats.gguf.architectures.family import Config, Family, Tensors, Value, Values
from workers.formats.gguf.architectures.mixtures import (
    SHARED,
    SIGMOID,
    WIDTH,
)
from workers.formats.gguf.architectures.rows import from_groups, norms_plus_one
from workers.formats.gguf.architectures.state_spaces import STEP_BIAS, transition


def delta_keys(config: Config) -> Values:
    """Gated delta nets in llama.cpp's words for state spaces."""
    values = int(config["linear_num_value_heads"])
    linear = [kind == "linear_attention" for kind in config["layer_types"]]
    keys: dict[str, Value] = {
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": values,
        "ssm.inner_size": config["linear_value_head_dim"] * values,
        "attention.recurrent_layers": linear,
        "full_attention_interval": linear.index(False) + 1 if False in linear else len(linear) + 1,
    }
    return keys


def qwen35_keys(config: Config) -> Values:
    """The same, and the sections of the rotary embedding, which llama.cpp demands."""
    rope = config.get("rope_parameters") or {}
    sections = [*(rope.get("mrope_section") or (11, 11, 10)), 0, 0][:4]
    return {**delta_keys(config), "rope.dimension_sections": sections}


def delta_change(name: str, tensor: Tensor, config: Config) -> Tensor:
    """State-space numbers, and norms with the one that transformers adds, but not the gated one."""
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return norms_plus_one(name, tensor, config)
    return transition(name, tensor, config)


def next_split(name: str, rows: int, config: Config) -> Sequence[tuple[str, Tensor | slice]] | None:
    """Rows of q, k, v and z of each key head in turn, as all of q, k, v and apart from them all of z."""
    del rows
    if not name.endswith("linear_attn.in_proj_qkvz"):
        return None
    groups, key = int(config["linear_num_key_heads"]), int(config["linear_key_head_dim"])
    value = int(config["linear_value_head_dim"] * config["linear_num_value_heads"]) // groups
    whole = torch.arange(groups * 2 * (key + value)).view(groups, -1)
    q, k, v, z = torch.split(whole, [key, key, value, value], 1)
    block = name.split(".layers.")[1].split(".", maxsplit=1)[0]
    qkv = torch.cat([part.flatten() for part in (q, k, v)])
    return (f"=blk.{block}.attn_qkv", qkv), (f"=blk.{block}.attn_gate", z.flatten())


def tiled_values(name: str, config: Config) -> Tensor | None:
    """Order of rows in which heads of values go round those of keys, where transformers has them by key."""
    groups, heads = int(config["linear_num_key_heads"]), int(config["linear_num_value_heads"])
    width, last = int(config["linear_value_head_dim"]), name.rpartition(".")[2]
    if ".linear_attn." not in name:
        return None
    if last in ("in_proj_qkv", "conv1d"):
        before = 2 * int(config["linear_key_head_dim"]) * groups
        return torch.cat([torch.arange(before), before + from_groups(groups, heads // groups, width)])
    if last == "in_proj_z":
        return from_groups(groups, heads // groups, width)
    return from_groups(groups, heads // groups, 1) if last in ("in_proj_a", "in_proj_b", "A_log", "dt_bias") else None


def moved_outputs(config: Config) -> str | None:
    """Names of the matrices that read the values, if heads of these are in another order than llama.cpp's."""
    same = config["linear_num_key_heads"] == config["linear_num_value_heads"]
    return None if same else r"\.linear_attn\.out_proj\.weight$"


def tiled_outputs(name: str, weight: Tensor, config: Config) -> Tensors:
    """The matrix that reads the values, with its columns in their order."""
    order = tiled_values(name.replace("out_proj.weight", "in_proj_z"), config)
    assert order is not None  # noqa: S101 - for the type checker: the name is one of those
    return {name: weight[:, order]}


def short_keys(config: Config) -> Values:
    """Short convolutions: layers without keys and values."""
    heads = int(config["num_key_value_heads"])
    return {
        "attention.head_count_kv": [heads if kind == "full_attention" else 0 for kind in config["layer_types"]],
        "shortconv.l_cache": config["conv_L_cache"],
    }


def lfm2_keys(config: Config) -> Values:
    """The width of the feed-forward part, which a rule of its own makes."""
    width = int(config.get("block_ff_dim") or config["intermediate_size"])
    if config.get("block_auto_adjust_ff_dim"):
        multiple = int(config["block_multiple_of"])
        width = int(2 * width / 3)
        width = int((config.get("block_ffn_dim_multiplier") or 1) * width)
        width = multiple * -(-width // multiple)
    return {**short_keys(config), "feed_forward_length": width}


def lfm2_moe_keys(config: Config) -> Values:
    """Experts chosen by sigmoid, after some dense blocks."""
    return {
        **short_keys(config),
        "leading_dense_block_count": config["num_dense_layers"],
        "expert_gating_func": SIGMOID,
    }


LFM2_NAMES = (
    (r"^model\.layers\.(\d+)\.feed_forward\.expert_bias$", r"=blk.\1.exp_probs_b.bias"),
    (r"^model\.layers\.(\d+)\.feed_forward\.experts\.(?:w1|gate_proj)$", r"=blk.\1.ffn_gate_exps"),
    (r"^model\.layers\.(\d+)\.feed_forward\.experts\.(?:w2|down_proj)$", r"=blk.\1.ffn_down_exps"),
    (r"^model\.layers\.(\d+)\.feed_forward\.experts\.(?:w3|up_proj)$", r"=blk.\1.ffn_up_exps"),
)
DELTA = MappingProxyType({"renames": (STEP_BIAS,), "change": delta_change})
TILED = MappingProxyType({"order": tiled_values, "remakes": moved_outputs, "remake": tiled_outputs})
RECURRENT: Mapping[str, Family] = MappingProxyType(
    {
        "qwen3_next": Family(keys=SHARED, derive=delta_keys, split=next_split, **DELTA),  # type: ignore[arg-type]
        "qwen3_5_text": Family(derive=qwen35_keys, **DELTA, **TILED),  # type: ignore[arg-type]
        "qwen3_5_moe_text": Family(keys=SHARED, derive=qwen35_keys, **DELTA, **TILED),  # type: ignore[arg-type]
        "lfm2": Family(epsilon="norm_eps", derive=lfm2_keys, change=transition),
        "lfm2_moe": Family(epsilon="norm_eps", keys=WIDTH, derive=lfm2_moe_keys, change=transition, renames=LFM2_NAMES),
    }
)
"""transformers' `model_type` -> the family."""
