"""Tiny random checkpoints of every accepted type, in which every layer type and every multiplier matters.

Layers of each type at least twice, sequences longer than windows and chunks, multipliers and caps away from 1, linears
drawn so that no layer's part is lost in the sum: a mask of the wrong type or a factor that is left out then shows.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from tests.engine.architectures.wrappers import WRAPPERS
from tests.engine.model.families import SMALL
from workers.engine.model.meta_model import model_class

VOCABULARY, LENGTH, WINDOW = 320, 40, 8
SIZES: dict[str, Any] = SMALL | {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "intermediate_size_mlp": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_state": 16,
    "state_size": 16,
    "max_position_embeddings": 128,
    "n_positions": 128,
}
"""Under every name that a configuration may have for it; what it has not is left out."""
MIXED = ["sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "full_attention"] * 2
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
}
MLA = {"num_key_value_heads": 4, "head_dim": 16}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_chunk_size": 8}

DENSE: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {},
    "ministral": {"layer_types": MIXED},
    "ministral3": {"layer_types": MIXED},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
    "gemma": {},
    "gemma2": {"layer_types": MIXED, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"layer_types": MIXED, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma4_text": {
        "layer_types": MIXED,
        "final_logit_softcapping": 3.0,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "global_head_dim": 32,
    },
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"partial_rotary_factor": 0.5},
    "olmo": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo3": {"layer_types": MIXED},
    "granite": GRANITE,
    "smollm3": {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "layer_types": MIXED},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "cohere": {"logit_scale": 0.4, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.4, "layer_types": MIXED},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True, "partial_rotary_factor": 0.5},
    "starcoder2": {},
    "nemotron": {"partial_rotary_factor": 0.5},
    "exaone4": {"layer_types": MIXED, "sliding_window_pattern": 2},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "apertus": {},
    "helium": {},
    "arcee": {},
    "cwm": {"layer_types": MIXED},
}
RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"layer_types": LINEAR},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        **MAMBA2,
        "mamba_n_heads": 4,
        "embedding_multiplier": 3.0,
        "lm_head_multiplier": 0.4,
        "key_multiplier": 0.6,
        "attention_out_multiplier": 0.8,
        "attention_in_multiplier": 1.2,
        "ssm_in_multiplier": 1.3,
        "ssm_out_multiplier": 0.7,
        "mlp_multipliers": [0.9, 0.6],
        "ssm_multipliers": [0.9, 0.8, 0.7, 1.1, 1.2],
    },
    "bamba": {"attn_layer_indices": [1, 3], **MAMBA2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 8},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"decoder_sparse_step": 2, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3_moe": {"mlp_only_layers": [0, 2]},
    "olmoe": {"clip_qkv": 0.5},
    "phimoe": {},
    "gpt_oss": {"layer_types": MIXED},
    "deepseek_v2": {"topk_method": "greedy", "first_k_dense_replace": 2, **MLA},
    "deepseek_v3": {"first_k_dense_replace": 2, "routed_scaling_factor": 1.7, **MLA},
    "glm4_moe": {"first_k_dense_replace": 2, "routed_scaling_factor": 1.7},
    "minimax": {"layer_types": LINEAR, "full_attn_alpha_factor": 1.2, "linear_attn_beta_factor": 0.8},
    "minimax_m2": {},
    "llama4_text": {"moe_layers": [1, 3], "layer_types": ["chunked_attention", "full_attention"] * 2},
    "granitemoe": GRANITE,
    "qwen3_next": {"layer_types": LINEAR, "decoder_sparse_step": 1},
    "qwen3_5_moe_text": {"layer_types": LINEAR},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, **MAMBA2, **GRANITE},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
}
OLDER: dict[str, dict[str, Any]] = {
    "opt": {},
    "gpt_neox": {},
    "gpt2": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "bloom": {},
    "mpt": {},
}
FURTHER: dict[str, dict[str, Any]] = {
    "granitemoeshared": GRANITE,
    "ernie4_5_moe": {},
    "hunyuan_v1_moe": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {
        "layers_block_type": ["moe", "attention", "mamba", "mlp"] * 2,
        "num_hidden_layers": 8,
        "n_groups": 1,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "glm4_moe_lite": {"first_k_dense_replace": 2, "routed_scaling_factor": 1.7, **MLA},
    "flex_olmo": {},
    "mamba": {},
    "falcon_mamba": {},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "gpt_bigcode": {},
    "persimmon": {},
}
TYPES: dict[str, dict[str, Any]] = DENSE | RECURRENT | MIXTURES | OLDER | FURTHER | {name: {} for name in WRAPPERS}
"""By model_type: changes of `SIZES` that the type needs."""


def configuration(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A tiny configuration of the type."""
    if model_type in WRAPPERS:
        return WRAPPERS[model_type](SIZES | changes, _text)
    return _text(model_type, **{**TYPES[model_type], **changes})


def _text(model_type: str, **changes: Any) -> PreTrainedConfig:
    full = AutoConfig.for_model(model_type)
    known = {**full.to_dict(), **full.attribute_map}
    return AutoConfig.for_model(model_type, **{n: v for n, v in SIZES.items() if n in known} | changes)


def random_model(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of the type whose every number matters: none at its neutral value, buffers included."""
    torch.manual_seed(seed)
    config = configuration(model_type)
    model = model_class(config)._from_config(config, dtype=dtype).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            spread = 0.6 / tensor.shape[-1] ** 0.5 if tensor.ndim > 1 and "norm" not in name else 0.2
            tensor.add_(torch.randn_like(tensor), alpha=spread)
    return model


def save_random(folder: Path, model_type: str, **options: Any) -> PreTrainedModel:
    """The model, saved to `folder` as transformers saves it."""
    model = random_model(model_type, **options)
    model.save_pretrained(folder)
    return model


def is_built(model_type: str) -> bool:
    """True if this release of transformers has the type."""
    return model_type in transformers.models.auto.configuration_auto.CONFIG_MAPPING
