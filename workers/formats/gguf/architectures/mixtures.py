"""Mixtures of experts of attention alone.

Read in llama.cpp v0.5.0 (`src/models/*.cpp`) and its converter (`conversion/*.py`).
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from workers.formats.gguf.architectures.dense import SCALES, grown_base
from workers.formats.gguf.architectures.family import Config, Family, Rows, Tensors, Values
from workers.formats.gguf.architectures.rows import halves, queries_and_keys_in_pairs
from workers.formats.gguf.architectures.windows import windows

WIDTH = MappingProxyType({"expert_feed_forward_length": "moe_intermediate_size"})
SHARED = MappingProxyType({**WIDTH, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"})
SOFTMAX, SIGMOID = 1, 2
CORRECTION = (r"\.e_score_correction_bias$", ".e_score_correction")
BIAS_OF_CHOICE = (r"^model\.layers\.(\d+)\..*\.e_score_correction_bias$", r"=blk.\1.exp_probs_b.bias")


SHARED_MLP = re.compile(r"\.layers\.(?P<block>\d+)\.shared_mlp\.(?P<part>input_linear|output_linear)$")


def granite_split(name: str, rows: int, config: Config) -> Sequence[tuple[str, Rows]] | None:
    """Gate and up of a fused matrix: of experts that every token has, or of the only feed-forward part."""
    found = SHARED_MLP.search(name)
    if found is None:
        return None
    last = "_shexp" if config.get("num_local_experts") else ""
    if found["part"] == "output_linear":
        return ((f"=blk.{found['block']}.ffn_down{last}", slice(None)),)
    return halves(f"=blk.{found['block']}.ffn_gate{last}", f"=blk.{found['block']}.ffn_up{last}", rows)


GRANITE_EXPERTS = (
    (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
)
GRANITE_NAMES = (
    (r"^model\.layers\.(\d+)\.block_sparse_moe\.experts\.gate_proj$", r"=blk.\1.ffn_gate_exps"),
    (r"^model\.layers\.(\d+)\.block_sparse_moe\.experts\.up_proj$", r"=blk.\1.ffn_up_exps"),
    (r"^model\.layers\.(\d+)\.block_sparse_moe\.experts\.down_proj$", r"=blk.\1.ffn_down_exps"),
    (r"^model\.layers\.(\d+)\.block_sparse_moe\.router\.layer$", r"=blk.\1.ffn_gate_inp"),
)


def dense_before(config: Config) -> int:
    """Blocks without experts, which come first."""
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list):
        return next((index for index, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    return int(config.get("first_k_dense_replace") or 0)


def mla_keys(config: Config) -> Values:
    """Multi-head latent attention as llama.cpp computes it: one key and value of the latent's width."""
    rank, nope, turned = config["kv_lora_rank"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    keys: dict[str, int | float | bool] = {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + turned,
        "attention.value_length": rank,
        "attention.key_length_mla": nope + turned,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": turned,
        "leading_dense_block_count": dense_before(config),
        "expert_shared_count": config.get("n_shared_experts") or 0,
        "expert_weights_scale": float(config.get("routed_scaling_factor") or 1.0),
    }
    if config.get("q_lora_rank") is not None:
        keys["attention.q_lora_rank"] = config["q_lora_rank"]
    if config.get("norm_topk_prob"):
        keys["expert_weights_norm"] = True
    scale = (config.get("rope_parameters") or {}).get("mscale_all_dim")
    if scale is not None:
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * float(scale)
    return keys


def v3_keys(config: Config) -> Values:
    """Experts chosen by sigmoid, in groups."""
    return {
        **mla_keys(config),
        "expert_gating_func": SIGMOID,
        "expert_group_count": config.get("n_group") or 1,
        "expert_group_used_count": config.get("topk_group") or 1,
    }


def split_latent(name: str, weight: Tensor, config: Config) -> Tensors:
    """Keys, transposed, and values of each head, out of the matrix that makes both of the latent."""
    heads, nope, value = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    each = weight.view(heads, nope + value, -1)
    before = name.removesuffix("kv_b_proj.weight")
    return {
        f"{before}k_b_proj.weight": each[:, :nope].transpose(1, 2).contiguous(),
        f"{before}v_b_proj.weight": each[:, nope:].contiguous(),
    }


def glm4_moe_keys(config: Config) -> Values:
    """Experts chosen by sigmoid, after some dense blocks."""
    return {
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_gating_func": SIGMOID,
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": bool(config["norm_topk_prob"]),
    }


def gpt_oss_keys(config: Config) -> Values:
    """Windows, and the width of experts under its own name."""
    return {**windows(config), "expert_feed_forward_length": config["intermediate_size"]}


def hunyuan_keys(config: Config) -> Values:
    """Widths of experts, which stand in lists with one entry for each layer."""

    def only(name: str) -> int:
        given = config[name]
        return int(given[0] if isinstance(given, list) else given)

    width = config.get("moe_intermediate_size")
    return {
        **grown_base(config),
        "expert_shared_feed_forward_length": config["intermediate_size"],
        "expert_feed_forward_length": config["intermediate_size"] if width is None else only("moe_intermediate_size"),
        "expert_used_count": only("moe_topk"),
        "expert_shared_count": 1,
    }


def llama4_keys(config: Config) -> Values:
    """Dense blocks between those of experts."""
    return {
        "interleave_moe_layer_step": config["interleave_moe_layer_step"],
        "expert_feed_forward_length": config["intermediate_size"],
        "feed_forward_length": config["intermediate_size_mlp"],
    }


def lightning_keys(config: Config) -> Values:
    """Lightning attention in some layers, and the factor of residual streams."""
    return {
        "residual_scale": float(config.get("full_attn_alpha_factor") or 1),
        "attention.recurrent_layers": [kind == "linear_attention" for kind in config["layer_types"]],
    }


MINIMAX_NAMES = (
    (r"^model\.layers\.(\d+)\.self_attn\.qkv_proj$", r"=blk.\1.attn_qkv"),
    (r"^model\.layers\.(\d+)\.self_attn\.out_proj$", r"=blk.\1.attn_output"),
    (r"^model\.layers\.(\d+)\.self_attn\.output_gate$", r"=blk.\1.attn_gate"),
    (r"^model\.layers\.(\d+)\.self_attn\.norm$", r"=blk.\1.attn_norm_2"),
)
SINKS = (r"^model\.layers\.(\d+)\.self_attn\.sinks$", r"=blk.\1.attn_sinks.weight")
DEEPSEEK = MappingProxyType(
    {
        "keys": WIDTH,
        "renames": (BIAS_OF_CHOICE,),
        "remakes": lambda _: r"\.kv_b_proj\.weight$",
        "remake": split_latent,
    }
)

MIXTURES: Mapping[str, Family] = MappingProxyType(
    {
        "mixtral": Family(order=queries_and_keys_in_pairs),
        "qwen2_moe": Family(keys=SHARED),
        "qwen3_moe": Family(keys=WIDTH),
        "olmoe": Family(keys=MappingProxyType({"attention.clamp_kqv": "clip_qkv"})),
        "granitemoe": Family(
            keys=SCALES, order=queries_and_keys_in_pairs, aliases=GRANITE_EXPERTS, renames=GRANITE_NAMES
        ),
        "granitemoeshared": Family(
            keys=MappingProxyType({**SCALES, "expert_shared_feed_forward_length": "shared_intermediate_size"}),
            order=queries_and_keys_in_pairs,
            split=granite_split,
            aliases=GRANITE_EXPERTS,
            renames=GRANITE_NAMES,
        ),
        "gpt_oss": Family(derive=gpt_oss_keys, renames=(SINKS,), transposed_experts=True, alternating=True),
        "deepseek_v2": Family(derive=mla_keys, **DEEPSEEK),  # type: ignore[arg-type]
        "deepseek_v3": Family(derive=v3_keys, **DEEPSEEK),  # type: ignore[arg-type]
        "glm4_moe": Family(keys=WIDTH, derive=glm4_moe_keys, renames=(BIAS_OF_CHOICE,)),
        "glm4_moe_lite": Family(derive=v3_keys, **DEEPSEEK),  # type: ignore[arg-type]
        "minimax": Family(
            derive=lightning_keys,
            renames=MINIMAX_NAMES,
            left_out=r"\.self_attn\.(?:slope_rate|query_decay|key_decay|diagonal_decay)$",
        ),
        "minimax_m2": Family(
            derive=lambda config: {
                "expert_feed_forward_length": config["intermediate_size"],
                "expert_gating_func": SIGMOID,
            },
            renames=(BIAS_OF_CHOICE,),
        ),
        "ernie4_5_moe": Family(
            keys=WIDTH,
            derive=lambda config: {
                "interleave_moe_layer_step": config["moe_layer_interval"],
                "leading_dense_block_count": config["moe_layer_start_index"],
                "expert_shared_count": config["moe_num_shared_experts"],
                "expert_shared_feed_forward_length": config["moe_intermediate_size"] * config["moe_num_shared_experts"],
            },
            renames=((r"^model\.layers\.(\d+)\.mlp\..*e_score_correction_bias$", r"=blk.\1.exp_probs_b.bias"),),
            change=lambda name, tensor, _: tensor.reshape(-1) if "e_score_correction" in name else tensor,
        ),
        "hunyuan_v1_moe": Family(derive=hunyuan_keys),
        "llama4_text": Family(derive=llama4_keys, transposed_experts=True),
    }
)
"""transformers' `model_type` -> the family."""
