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
    rope_of,
)
from workers.formats.gguf.architectures.windows import SLIDING, windows

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


def of_full_layers(config: Config, name: str) -> int:
    """A number of the layers that see the whole text, where they have one of their own."""
    layers = [str(layer) for layer, kind in enumerate(config["layer_types"]) if kind != SLIDING]
    given = config.get("per_layer_config") or {}
    return int(next((given[layer][name] for layer in layers if name in given.get(layer, {})), config[name]))


def gemma4_keys(config: Config) -> Values:
    """Heads of two widths, for layers with windows and for others, whose rotary embedding reaches a part of them."""
    full, sliding = int(of_full_layers(config, "head_dim")), int(config["head_dim"])
    rope = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    keys = {
        **gemma3_keys(config),
        "attention.shared_kv_layers": int(config.get("num_kv_shared_layers") or 0),
        "embedding_length_per_layer_input": int(config.get("hidden_size_per_layer_input") or 0),
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.key_length_swa": sliding,
        "attention.value_length_swa": sliding,
        "rope.dimension_count": full,
        "rope.dimension_count_swa": int(sliding * (rope.get("partial_rotary_factor") or 1)),
    }
    heads, own = of_full_layers(config, "num_key_value_heads"), config["num_key_value_heads"]
    if heads != own:
        keys["attention.head_count_kv"] = [own if kind == SLIDING else heads for kind in config["layer_types"]]
    if config.get("enable_moe_block"):
        keys["expert_feed_forward_length"] = config["moe_intermediate_size"]
        keys["expert_used_count"] = config["top_k_experts"]
        keys["expert_count"] = config["num_experts"]
    return keys


def gemma4_factors(config: Config) -> Tensors:
    """Divisors of rotary frequencies of layers that see all: those beyond the part that is turned stand still."""
    half = int(of_full_layers(config, "head_dim")) // 2
    part = rope_of(config).get("partial_rotary_factor") or 1.0
    factors = torch.full((half,), 1e30)
    factors[: int(half * part)] = 1.0
    return {"rope_freqs.weight": factors}


GEMMA4_NAMES = (
    (r"^model\.layers\.(\d+)\.layer_scalar$", r"=blk.\1.layer_output_scale.weight"),
    (r"^model\.layers\.(\d+)\.experts\.(gate|up|down)_proj$", r"=blk.\1.ffn_\2_exps"),
    (r"^model\.layers\.(\d+)\.router\.scale$", r"=blk.\1.ffn_gate_inp.scale"),
    (r"^model\.layers\.(\d+)\.router\.per_expert_scale$", r"=blk.\1.ffn_down_exps.scale"),
)


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
    """The word on attention and a feed-forward part that read the same input."""
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


def slides(config: Config) -> bool:
    """True if some layer's window is shorter than the texts that the model is made for."""
    window = windows(config).get("attention.sliding_window")
    return isinstance(window, int) and window < int(config["max_position_embeddings"])


def with_windows(config: Config) -> str | None:
    """Granite's architecture for a Llama of which some layers see a window: llama.cpp's own has none."""
    return "granite_swa" if slides(config) else None


def swa_keys(config: Config) -> Values:
    """The windows, and Granite's factor of logits, which is 1."""
    return {**windows(config), "logit_scale": 1.0} if slides(config) else {}


def no_sinks(config: Config) -> Tensors:
    """Sinks of attention, which Granite's architecture demands, so low that nothing flows into them."""
    heads = int(config["num_attention_heads"])
    every = range(int(config["num_hidden_layers"])) if slides(config) else ()
    return {f"blk.{block}.attn_sinks.weight": torch.full((heads,), -1e30) for block in every}


def grown_base(config: Config) -> Values:
    """Hunyuan's base of the rotary embedding, which a fixed `alpha` makes larger."""
    rope, width = config.get("rope_parameters") or {}, head_dim(config)
    if rope.get("rope_type") != "dynamic":
        return {}
    return {"rope.freq_base": float(rope["rope_theta"]) * float(rope["alpha"]) ** (width / (width - 2))}


def sections(config: Config) -> Values:
    """Sections of the rotary embedding for time, height and width."""
    rope = config.get("rope_parameters") or {}
    return {"rope.dimension_sections": [*rope["mrope_section"], 0, 0][:4]}


def xielu(config: Config, read: Callable[[str], Tensor]) -> Values:
    """The four numbers of each block's activation."""
    return {
        f"=xielu.{key}": [
            float(read(f"model.layers.{block}.mlp.act_fn.{key}").float())
            for block in range(config["num_hidden_layers"])
        ]
        for key in ("alpha_n", "alpha_p", "beta", "eps")
    }


LLAMA_WITH_WINDOWS = MappingProxyType(
    {"order": queries_and_keys_in_pairs, "other": with_windows, "derive": swa_keys, "added": no_sinks}
)

DENSE: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(order=queries_and_keys_in_pairs),
        "mistral": Family(order=queries_and_keys_in_pairs),
        "ministral": Family(**LLAMA_WITH_WINDOWS),  # type: ignore[arg-type]
        "cwm": Family(**LLAMA_WITH_WINDOWS),  # type: ignore[arg-type]
        "helium": Family(),
        "ministral3": Family(order=queries_and_keys_in_pairs, derive=mistral3_keys),
        "qwen2": Family(),
        "qwen3": Family(),
        "gemma": Family(change=norms_plus_one),
        "gemma2": Family(keys=CAPS, derive=windows, change=norms_plus_one),
        "gemma3_text": Family(keys=CAPS, derive=gemma3_keys, change=norms_plus_one),
        "gemma4_text": Family(keys=CAPS, derive=gemma4_keys, renames=GEMMA4_NAMES, added=gemma4_factors),
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
        "hunyuan_v1_dense": Family(derive=grown_base),
        "seed_oss": Family(),
        "qwen2_vl_text": Family(derive=sections),
        "qwen2_5_vl_text": Family(derive=sections),
        "qwen3_vl_text": Family(derive=sections),
        "apertus": Family(from_weights=xielu, left_out=r"\.act_fn\."),
        "arcee": Family(order=queries_and_keys_in_pairs),
    }
)
"""transformers' `model_type` -> the family."""
