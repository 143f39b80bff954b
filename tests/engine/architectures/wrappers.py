"""Tiny models of images and text: a language model of a type of its own, and a vision tower that must stay as it is."""

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

Text = Callable[..., PreTrainedConfig]
Make = Callable[[dict[str, Any], Text], PreTrainedConfig]
IMAGE, START, END = 311, 312, 313
"""Token ids, outside of what the tests' sequences hold."""
MIXED = ["sliding_attention", "full_attention"] * 2
SIGLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _gemma3(sizes: dict[str, Any], text: Text) -> PreTrainedConfig:
    inner = text("gemma3_text", layer_types=MIXED, final_logit_softcapping=3.0, query_pre_attn_scalar=8)
    del sizes
    return AutoConfig.for_model(
        "gemma3",
        text_config=inner.to_dict(),
        vision_config={"model_type": "siglip_vision_model", **SIGLIP},
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=4,
    )


def _gemma4(sizes: dict[str, Any], text: Text) -> PreTrainedConfig:
    inner = text(
        "gemma4_text",
        layer_types=MIXED,
        final_logit_softcapping=3.0,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        global_head_dim=32,
        pad_token_id=2,
    )
    del sizes
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 8}
    return AutoConfig.for_model(
        "gemma4", text_config=inner.to_dict(), vision_config=vision, audio_config=None, image_token_id=IMAGE
    )


def _llava(sizes: dict[str, Any], text: Text) -> PreTrainedConfig:
    del sizes
    return AutoConfig.for_model(
        "llava",
        text_config=text("llama").to_dict(),
        vision_config={"model_type": "clip_vision_model", **SIGLIP, "projection_dim": 32},
        image_token_index=IMAGE,
    )


def _mistral3(sizes: dict[str, Any], text: Text) -> PreTrainedConfig:
    del sizes
    vision = {"model_type": "pixtral", **SIGLIP, "head_dim": 16}
    return AutoConfig.for_model(
        "mistral3",
        text_config=text("mistral").to_dict(),
        vision_config=vision,
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )


def _llama4(sizes: dict[str, Any], text: Text) -> PreTrainedConfig:
    del sizes
    inner = text("llama4_text", moe_layers=[1, 3], layer_types=["chunked_attention", "full_attention"] * 2)
    vision = {**SIGLIP, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
    return AutoConfig.for_model(
        "llama4",
        text_config=inner.to_dict(),
        vision_config=vision,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": IMAGE + 3,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def _qwen(model_type: str, vision: dict[str, Any], **changes: Any) -> Make:
    def make(sizes: dict[str, Any], text: Text) -> PreTrainedConfig:
        del sizes
        rope = {} if "layer_types" in changes else {"rope_parameters": ROPE}
        inner = text(f"{model_type}_text", **rope, **changes)
        return AutoConfig.for_model(model_type, text_config=inner.to_dict(), vision_config=vision, **TOKENS)

    return make


QWEN2 = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
QWEN25 = {
    "depth": 1,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "fullatt_block_indexes": [0],
}
QWEN3 = {
    "depth": 1,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
LINEAR = ["linear_attention", "full_attention"] * 2
WRAPPERS: dict[str, Make] = {
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "llama4": _llama4,
    "llava": _llava,
    "mistral3": _mistral3,
    "qwen2_vl": _qwen("qwen2_vl", QWEN2),
    "qwen2_5_vl": _qwen("qwen2_5_vl", QWEN25),
    "qwen3_vl": _qwen("qwen3_vl", QWEN3),
    "qwen3_5": _qwen("qwen3_5", QWEN3, layer_types=LINEAR),
    "qwen3_5_moe": _qwen("qwen3_5_moe", QWEN3, layer_types=LINEAR),
}
"""By model_type: the configuration, made with the text model's own maker."""
