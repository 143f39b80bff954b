"""Tiny GGUF files of random models, written as llama.cpp's converter writes them."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {}),
    "starcoder2": ("starcoder2", {"use_bias": True}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "nemotron": ("nemotron", {}),
    "qwen2moe": ("qwen2_moe", {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "qwen3moe": (
        "qwen3_moe",
        {"norm_topk_prob": True, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
}
"""Name of a case -> `model_type`, and what differs from `SHAPE`."""
PLUS_ONE = ("gemma2", "gemma3", "nemotron")


def random_model(case: str) -> PreTrainedModel:
    """A model whose norms and biases are not at their neutral values, fp32."""
    model_type, changes = MODELS[case]
    if model_type == "qwen2_moe":
        changes = changes | {"shared_expert_intermediate_size": 32}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SHAPE | changes))).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def architecture_of(case: str) -> str:
    """llama.cpp's name."""
    return case.split(maxsplit=1)[0]


def write_gguf(
    file: Path,
    case: str,
    model: PreTrainedModel,
    besides: Mapping[str, Tensor] = MappingProxyType({}),
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    **more: Any,
) -> None:
    """A file with the model's weights, matrices in this type.

    besides   further tensors
    more      metadata under the architecture's name
    """
    architecture, config = architecture_of(case), model.config
    writer = GGUFWriter(file, architecture)
    for key, value in (_metadata(config) | more).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    for name, tensor in (_tensors(architecture, model) | dict(besides)).items():
        array = tensor.detach().float().numpy()
        plain = array.ndim < 2 or array.shape[-1] % 32
        if plain or kind is GGMLQuantizationType.F32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(config: Any) -> dict[str, int | float]:
    rope = config.rope_parameters
    if "rope_theta" not in rope:
        rope = rope["full_attention"]
    found: dict[str, int | float] = {
        "vocab_size": config.vocab_size,  # transformers asks for it where there is no tokenizer
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": 16,
        "rope.dimension_count": int(16 * rope.get("partial_rotary_factor", 1)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    for key, names in {
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
        "attention.layer_norm_epsilon": ("norm_epsilon", "layer_norm_eps", "norm_eps"),
        "attention.sliding_window": ("sliding_window",),
        "expert_count": ("num_experts",),
        "expert_used_count": ("num_experts_per_tok",),
        "expert_feed_forward_length": ("moe_intermediate_size",),
        "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
        "attn_logit_softcapping": ("attn_logit_softcapping",),
        "final_logit_softcapping": ("final_logit_softcapping",),
    }.items():
        value = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
        if value is not None:
            found[key] = value
    if config.model_type == "nemotron":  # transformers asks for this key, llama.cpp's converter writes the other
        found["attention.layer_norm_rms_epsilon"] = float(config.norm_eps)
    return found


def _tensors(architecture: str, model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    found: dict[str, Tensor] = {}
    for parameter, tensor in model.state_dict().items():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".experts." in parameter:
            found |= _experts(parameter, tensor)
            continue
        module, _, leaf = parameter.rpartition(".")
        name = names.get_name(module)
        assert name is not None, parameter
        if architecture == "llama" and (".q_proj." in parameter or ".k_proj." in parameter):
            heads = config.num_attention_heads if ".q_proj." in parameter else config.num_key_value_heads
            found[f"{name}.{leaf}"] = (
                tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
            )
        elif architecture in PLUS_ONE and parameter.endswith("norm.weight"):
            found[f"{name}.{leaf}"] = tensor + 1
        else:
            found[f"{name}.{leaf}"] = tensor[0] if name.endswith("ffn_gate_inp_shexp") else tensor
    return found


def _experts(parameter: str, tensor: Tensor) -> Mapping[str, Tensor]:
    block = parameter.split(".")[2]
    if parameter.endswith("down_proj"):
        return {f"blk.{block}.ffn_down_exps.weight": tensor}
    gate, up = tensor.chunk(2, dim=1)
    return {f"blk.{block}.ffn_gate_exps.weight": gate, f"blk.{block}.ffn_up_exps.weight": up}


def random_blocks(kind: GGMLQuantizationType, rows: int, blocks: int, size: int) -> np.ndarray[Any, Any]:
    """Any bytes as blocks, but with scales that are numbers."""
    octets = np.random.default_rng(int(kind)).integers(0, 256, (rows * blocks, size), dtype=np.uint8)
    return octets.reshape(rows, blocks * size)
