"""Tiny random checkpoints of today's families, shrunk by what their configurations call their dimensions."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

HIDDEN, EXPERTS, TOP_K, WIDE = 32, 12, 3, 48
"""More than ten experts, so that an order by letters shows; gate and up joined are not as wide as what goes in."""
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 16,
    "num_kv_shared_layers": 0,
    "hidden_size": HIDDEN,
    "n_embd": HIDDEN,
    "d_model": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "intermediate_size": WIDE,
    "ffn_dim": WIDE,
    "intermediate_size_mlp": WIDE,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "shared_intermediate_size": 40,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_topk": TOP_K,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "state_size": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
DENSE: dict[str, dict[str, Any]] = {
    name: {}
    for name in [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "phi",
        "phi3",
        "olmo2",
        "olmo3",
        "granite",
        "smollm3",
        "glm",
        "glm4",
        "cohere",
        "cohere2",
        "ministral3",
        "stablelm",
        "starcoder2",
        "nemotron",
        "exaone4",
        "ernie4_5",
        "hunyuan_v1_dense",
        "seed_oss",
        "apertus",
        "helium",
    ]
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "phimoe": {},
    "gpt_oss": {},
    "deepseek_v2": {"topk_method": "greedy", "num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "glm4_moe": {},
    "minimax": {"layer_types": ["full_attention", "linear_attention"]},
    "minimax_m2": {},
    "llama4_text": {"interleave_moe_layer_step": 1, "moe_layers": [1]},
    "granitemoe": {},
    "gemma4_moe": {
        "model_type": "gemma4_text",
        "enable_moe_block": True,
        "top_k_experts": TOP_K,
        "hidden_size_per_layer_input": 0,
    },
    "nemotron_h": {"layers_block_type": ["moe", "attention", "moe"], "num_hidden_layers": 3, "n_groups": 1},
}
RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_expand": 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
}
OLD: dict[str, dict[str, Any]] = {name: {} for name in ["opt", "gpt_neox", "gpt2", "falcon", "bloom", "mpt"]}


FAMILIES: dict[str, dict[str, Any]] = DENSE | MIXTURES | RECURRENT | OLD


def small_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A configuration of that family with every dimension that it has shrunk, and then `changes`."""
    peculiar = FAMILIES[family] | changes
    kind = peculiar.pop("model_type", family)
    full = AutoConfig.for_model(kind)
    known = {**full.to_dict(), **full.attribute_map}
    return AutoConfig.for_model(kind, **{name: value for name, value in SMALL.items() if name in known} | peculiar)


def small_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of that family whose every number matters: none at its neutral value, buffers included."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(small_config(family, **changes), dtype=dtype).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            spread = 0.6 / tensor.shape[-1] ** 0.5 if tensor.ndim > 1 and "norm" not in name else 0.2
            tensor.add_(torch.randn_like(tensor), alpha=spread)
    return model


def save_small_model(folder: Path, family: str, **options: Any) -> PreTrainedModel:
    """The model, saved to `folder` as transformers saves it."""
    model = small_model(family, **options)
    model.save_pretrained(folder)
    return model
