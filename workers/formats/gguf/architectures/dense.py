"""Dense models of attention: their rows, and what they need beside the ordinary numbers and names.

Read in llama.cpp v0.5.0 (`src/models/*.cpp`) and its converter (`conversion/*.py`).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from workers.formats.gguf.architectures.family import Config, Family, Tensors, Values
from workers.formats.gguf.architectures.rows import (
    head_dim,
    norms_plus_one,
    queries_and_keys_in_pairs,
)
from workers.formats.gguf.architectures.windows import windows

SCALES: Mapping[str, str] = MappingProxyType(
    {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
)
"""Granite's multipliers."""
CAPS: Mapping[str, str] = MappingProxyType(
    {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }
)
OF_HEADS = r"\.(q|k)_layernorm\.norms\.(\d+)$"


def gemma3_keys(config: Config) -> Values:
    """Windows, and the base of the rotary embedding of layers that have one."""
    given = config.get("rope_parameters") or {}
    sliding = given.get("sliding_attention") or {}
    base = sliding.get("rope_theta", config.get("rope_local_base_freq"))
    return {**windows(config), **({} if base is None else {"rope.freq_base_swa": float(base)})}


def phi3_keys(config: Config) -> Values:
    """The window, which says 0 where there is none, and the scale of long texts."""
    rope = config.get("rope_parameters") or {}
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    keys: dict[str, int | float | str] = {"attention.sliding_window": 0}
    if original:
        keys["rope.scaling.original_context_length"] = int(original)
    if "long_factor" in rope:
        keys["rope.scaling.attn_factor"] = attention_factor(config)
    return keys


def attention_factor(config: Config) -> float:
    """The factor of queries and keys under LongRoPE, whose texts are `factor` times as long as the original's."""
    rope = config["rope_parameters"]
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    factor = rope.get("factor") or config["max_position_embeddings"] / original
    return 1.0 if factor <= 1 else float((1 + torch.tensor(factor).log() / torch.tensor(original).log()).sqrt())


def phi3_factors(config: Config) -> Tensors:
    """Divisors of the rotary frequencies for long and for short texts."""
    rope = config.get("rope_parameters") or {}
    return {
        f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
        for kind in ("long", "short")
        if rope.get(f"{kind}_factor") is not None
    }


def layer_norms_plus_one(name: str, tensor: Tensor, config: Config) -> Tensor:
    """Nemotron's norms, with the one that transformers adds."""
    return norms_plus_one(name, tensor, config)


def parallel(config: Config) -> Values:
    """Whether attention and feed-forward part read the same input."""
    return {"use_parallel_residual": bool(config.get("use_parallel_residual", True))}


def mistral3_keys(config: Config) -> Values:
    """Ministral 3's growth of queries with their place, and what YaRN makes of the attention's scale."""
    rope = config.get("rope_parameters") or {}
    keys: dict[str, float] = {}
    if rope.get("llama_4_scaling_beta") is not None:
        keys["attention.temperature_scale"] = float(rope["llama_4_scaling_beta"])
    if rope.get("mscale_all_dim") is not None:
        keys["rope.scaling.yarn_log_multiplier"] = float(rope["mscale_all_dim"])
    return keys


def sections(config: Config) -> Values:
    """Sections of the rotary embedding for time, height and width."""
    rope = config.get("rope_parameters") or {}
    return {"rope.dimension_sections": [*rope["mrope_section"], 0, 0][:4]}


def xielu(config: Config, read: Callable[[str], Tensor]) -> Values:
    """The four numbers of each block's activation."""
    return {
        f"=xielu.{key}": [
            float(read(f"model.layers.{block}.mlp.act_fn.{key}").float()) for block in range(config["num_hidden_layers"])
        ]
        for key in ("alpha_n", "alpha_p", "beta", "eps")
    }


DENSE: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(order=queries_and_keys_in_pairs),
        "mistral": Family(order=queries_and_keys_in_pairs),
        "ministral3": Family(order=queries_and_keys_in_pairs, derive=mistral3_keys),
        "qwen2": Family(),
        "qwen3": Family(),
        "gemma": Family(change=norms_plus_one),
        "gemma2": Family(keys=CAPS, derive=windows, change=norms_plus_one),
        "gemma3_text": Family(keys=CAPS, derive=gemma3_keys, change=norms_plus_one),
        "phi": Family(epsilon="layer_norm_eps", layer_norm=True),
        "phi3": Family(derive=phi3_keys, added=phi3_factors),
        "olmo": Family(
            keys=MappingProxyType({"attention.clamp_kqv": "clip_qkv"}),
            derive=lambda _: {"attention.layer_norm_epsilon": 1e-5},
            layer_norm=True,
            epsilon="",
            order=queries_and_keys_in_pairs,
        ),
        "olmo2": Family(),
        "olmo3": Family(derive=windows),
        "granite": Family(keys=SCALES, order=queries_and_keys_in_pairs),
        "smollm3": Family(order=queries_and_keys_in_pairs),
        "glm": Family(),
        "glm4": Family(),
        "cohere": Family(
            keys=MappingProxyType({"logit_scale": "logit_scale"}), epsilon="layer_norm_eps", layer_norm=True
        ),
        "cohere2": Family(
            keys=MappingProxyType({"logit_scale": "logit_scale"}),
            derive=windows,
            epsilon="layer_norm_eps",
            layer_norm=True,
        ),
        "stablelm": Family(epsilon="layer_norm_eps", layer_norm=True, derive=parallel),
        "starcoder2": Family(epsilon="norm_epsilon", layer_norm=True),
        "nemotron": Family(epsilon="norm_eps", layer_norm=True, change=layer_norms_plus_one),
        "exaone4": Family(derive=windows),
        "ernie4_5": Family(),
        "hunyuan_v1_dense": Family(),
        "seed_oss": Family(),
        "qwen2_vl_text": Family(derive=sections),
        "qwen2_5_vl_text": Family(derive=sections),
        "qwen3_vl_text": Family(derive=sections),
        "apertus": Family(from_weights=xielu, left_out=r"\.act_fn\."),
        "arcee": Family(order=queries_and_keys_in_pairs),
    }
)
"""transformers' `model_type` -> the family."""
_ = head_dim
