"""Models with layers that carry a state: linear attention, state spaces, short convolutions.

Read in llama.cpp v0.5.0 (`src/models/*.cpp`) and its converter (`conversion/*.py`).
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from workers.formats.gguf.architectures.dense import SCALES
from workers.formats.gguf.architectures.family import Config, Family, Tensors, Value, Values
from workers.formats.gguf.architectures.mixtures import (
    GRANITE_EXPERTS,
    GRANITE_NAMES,
    SHARED,
    SIGMOID,
    WIDTH,
    granite_split,
)
from workers.formats.gguf.architectures.rows import from_groups, norms_plus_one, queries_and_keys_in_pairs

STEP_BIAS = (r"^(?:model|backbone)\.layers\.(\d+)\.(?:linear_attn|mixer|mamba)\.dt_bias$", r"=blk.\1.ssm_dt.bias")


def transition(name: str, tensor: Tensor, config: Config) -> Tensor:
    """Numbers of a state space: -exp of the logarithm that transformers stores, and convolutions as matrices."""
    del config
    if name.endswith(".A_log"):
        return -tensor.float().exp()
    return tensor.squeeze(1) if "conv" in name and tensor.ndim == 3 else tensor


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
    q, k, v, z = torch.split(whole, [key, key, value, value], 1)  # type: ignore[no-untyped-call]
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


def mamba_keys(config: Config) -> Values:
    """A state space without attention."""
    return {
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "context_length": 1 << 20,
        "attention.layer_norm_rms_epsilon": float(config["layer_norm_epsilon"]),
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.inner_size": config["intermediate_size"],
        "ssm.state_size": config["state_size"],
        "ssm.time_step_rank": config["time_step_rank"],
        "ssm.dt_b_c_rms": config["model_type"] == "falcon_mamba",
    }


def mamba2_keys(config: Config) -> Values:
    """A state space of heads without attention."""
    inner = int(config["expand"] * config["hidden_size"])
    return {
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "context_length": 1 << 20,
        "attention.layer_norm_rms_epsilon": float(config["layer_norm_epsilon"]),
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.inner_size": inner,
        "ssm.state_size": config["state_size"],
        "ssm.time_step_rank": inner // int(config["head_dim"]),
        "ssm.group_count": config["n_groups"],
    }


def by_heads(name: str, tensor: Tensor, config: Config) -> Tensor:
    """Numbers of a state space of heads in the shapes of llama.cpp: columns of one, and a norm by groups."""
    tensor = transition(name, tensor, config)
    if name.endswith((".A_log", ".D")):
        return tensor.unsqueeze(-1)
    groups = int(config.get("n_groups") or config.get("mamba_n_groups") or 1)
    return tensor.view(groups, -1) if name.endswith(("mixer.norm.weight", "mamba.norm.weight")) else tensor


def hybrid_layers(config: Config) -> list[bool]:
    """Whether each layer is one of attention."""
    types = config.get("layer_types") or config.get("layers_block_type")
    if isinstance(types, list):
        return [kind in ("attention", "full_attention") for kind in types]
    own = config.get("attn_layer_indices") or []
    return [layer in own for layer in range(config["num_hidden_layers"])]


def hybrid_keys(config: Config) -> Values:
    """State spaces of heads, and attention in some layers, with or without a rotary embedding."""
    heads, attention = int(config["num_key_value_heads"]), hybrid_layers(config)
    if all(attention):
        return shared_width(config)
    turned = config["model_type"] == "bamba" or config.get("position_embedding_type") == "rope"
    keys: dict[str, Value] = {
        "attention.head_count_kv": [heads if own else 0 for own in attention],
        "rope.scaling.finetuned": turned,
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.group_count": config["mamba_n_groups"],
        "ssm.inner_size": int(config["mamba_expand"] * config["hidden_size"]),
        "ssm.time_step_rank": config["mamba_n_heads"],
    }
    return {**keys, **shared_width(config)}


def shared_width(config: Config) -> Values:
    """The width of shared experts; without others they are the feed-forward part."""
    width = config.get("shared_intermediate_size")
    if not width or config.get("num_local_experts"):
        return {"expert_shared_feed_forward_length": int(width)} if width else {}
    return {"feed_forward_length": int(width)}


def all_attention(config: Config) -> str | None:
    """The architecture of a Granite 4 that has no state spaces."""
    if config["model_type"] != "granitemoehybrid" or not all(hybrid_layers(config)):
        return None
    return "granitemoe" if config.get("num_local_experts") else "granite"


def one_part_keys(config: Config) -> Values:
    """Blocks of one part each, attention, a state space or a feed-forward part, told apart by numbers that are 0."""
    kinds, heads = config["layers_block_type"], int(config["num_key_value_heads"])
    experts = "moe" in kinds
    width = int(config["moe_intermediate_size"] if experts else config["intermediate_size"])
    keys: dict[str, Value] = {
        "attention.head_count_kv": [heads if own else 0 for own in hybrid_layers(config)],
        "feed_forward_length": [width if kind in ("moe", "mlp") else 0 for kind in kinds],
        "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
        "attention.layer_norm_rms_epsilon": float(config["layer_norm_epsilon"]),
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.state_size": config["ssm_state_size"],
        "ssm.group_count": config["n_groups"],
        "ssm.inner_size": int(config["mamba_num_heads"] * config["mamba_head_dim"]),
        "ssm.time_step_rank": config["mamba_num_heads"],
    }
    if not experts:
        return {**keys, "expert_count": 0, "expert_used_count": 0}
    return {
        **keys,
        "expert_feed_forward_length": width,
        "expert_shared_feed_forward_length": config["moe_shared_expert_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_norm": bool(config["norm_topk_prob"]),
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_group_count": config["n_group"],
    }


def with_experts(config: Config) -> str | None:
    """The architecture of a Nemotron-H with experts."""
    return "nemotron_h_moe" if "moe" in config["layers_block_type"] else None


ONE_PART = r"^backbone\.layers\.(\d+)\.mixer\."
ONE_PART_NAMES = (
    STEP_BIAS,
    (ONE_PART + r"gate\.e_score_correction_bias$", r"=blk.\1.exp_probs_b.bias"),
    (ONE_PART + r"experts\.(up|down)_proj$", r"=blk.\1.ffn_\2_exps"),
    (ONE_PART + r"shared_experts\.(up|down)_proj$", r"=blk.\1.ffn_\2_shexp"),
)


def jamba_keys(config: Config) -> Values:
    """State spaces, and attention in some layers."""
    period, offset = config["attn_layer_period"], config["attn_layer_offset"]
    heads = int(config["num_key_value_heads"])
    own = [heads if layer % period == offset else 0 for layer in range(config["num_hidden_layers"])]
    return {
        "attention.head_count_kv": own,
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.inner_size": int(config["mamba_expand"] * config["hidden_size"]),
        "ssm.state_size": config["mamba_d_state"],
        "ssm.time_step_rank": config["mamba_dt_rank"],
    }


JAMBA_NAMES = (
    (r"^model\.layers\.(\d+)\.feed_forward\.experts\.(gate|up|down)_proj$", r"model.layers.\1.mlp.experts.\2_proj"),
)
LFM2_NAMES = (
    (r"^model\.layers\.(\d+)\.feed_forward\.expert_bias$", r"=blk.\1.exp_probs_b.bias"),
    (r"^model\.layers\.(\d+)\.feed_forward\.experts\.(?:w1|gate_proj)$", r"=blk.\1.ffn_gate_exps"),
    (r"^model\.layers\.(\d+)\.feed_forward\.experts\.(?:w2|down_proj)$", r"=blk.\1.ffn_down_exps"),
    (r"^model\.layers\.(\d+)\.feed_forward\.experts\.(?:w3|up_proj)$", r"=blk.\1.ffn_up_exps"),
)
DELTA = MappingProxyType({"renames": (STEP_BIAS,), "change": delta_change})
TILED = MappingProxyType({"order": tiled_values, "remakes": moved_outputs, "remake": tiled_outputs})
HYBRID = MappingProxyType(
    {
        "derive": hybrid_keys,
        "order": queries_and_keys_in_pairs,
        "split": granite_split,
        "change": by_heads,
        "aliases": GRANITE_EXPERTS,
        "renames": (STEP_BIAS, *GRANITE_NAMES),
    }
)

RECURRENT: Mapping[str, Family] = MappingProxyType(
    {
        "qwen3_next": Family(keys=SHARED, derive=delta_keys, split=next_split, **DELTA),  # type: ignore[arg-type]
        "qwen3_5_text": Family(derive=qwen35_keys, **DELTA, **TILED),  # type: ignore[arg-type]
        "qwen3_5_moe_text": Family(keys=SHARED, derive=qwen35_keys, **DELTA, **TILED),  # type: ignore[arg-type]
        "lfm2": Family(epsilon="norm_eps", derive=lfm2_keys, change=transition),
        "lfm2_moe": Family(epsilon="norm_eps", keys=WIDTH, derive=lfm2_moe_keys, change=transition, renames=LFM2_NAMES),
        "bamba": Family(**HYBRID),  # type: ignore[arg-type]
        "granitemoehybrid": Family(keys=SCALES, other=all_attention, **HYBRID),  # type: ignore[arg-type]
        "mamba": Family(epsilon="", derive=mamba_keys, change=transition),
        "falcon_mamba": Family(epsilon="", derive=mamba_keys, change=transition),
        "mamba2": Family(epsilon="", derive=mamba2_keys, change=by_heads, renames=(STEP_BIAS,)),
        "nemotron_h": Family(
            epsilon="", derive=one_part_keys, other=with_experts, change=by_heads, renames=ONE_PART_NAMES
        ),
        "jamba": Family(derive=jamba_keys, change=transition, renames=JAMBA_NAMES),
    }
)
"""transformers' `model_type` -> the family."""
