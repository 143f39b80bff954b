"""State spaces: Mamba, and hybrids of it and attention.

Read in llama.cpp v0.5.0 (`src/models/*.cpp`) and its converter (`conversion/*.py`).
"""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from workers.formats.gguf.architectures.dense import SCALES
from workers.formats.gguf.architectures.family import Config, Family, Value, Values
from workers.formats.gguf.architectures.mixtures import GRANITE_EXPERTS, GRANITE_NAMES, granite_split
from workers.formats.gguf.architectures.rows import queries_and_keys_in_pairs

STEP_BIAS = (r"^(?:model|backbone)\.layers\.(\d+)\.(?:linear_attn|mixer|mamba)\.dt_bias$", r"=blk.\1.ssm_dt.bias")


def transition(name: str, tensor: Tensor, config: Config) -> Tensor:
    """Numbers of a state space: -exp of the logarithm that transformers stores, and convolutions as matrices."""
    del config
    if name.endswith(".A_log"):
        return -tensor.float().exp()
    return tensor.squeeze(1) if "conv" in name and tensor.ndim == 3 else tensor


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
    """True for each layer of attention."""
    types = config.get("layer_types") or config.get("layers_block_type")
    if isinstance(types, list):
        return [kind in ("attention", "full_attention") for kind in types]
    own = config.get("attn_layer_indices") or []
    return [layer in own for layer in range(config["num_hidden_layers"])]


def hybrid_keys(config: Config) -> Values:
    """State spaces of heads, and attention in some layers, with or without a rotary embedding."""
    heads, attention = int(config["num_key_value_heads"]), hybrid_layers(config)
    turned = config["model_type"] == "bamba" or config.get("position_embedding_type") == "rope"
    if all(attention):
        return {"rope.scaling.finetuned": turned, **shared_width(config)}
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

STATE_SPACES: Mapping[str, Family] = MappingProxyType(
    {
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
