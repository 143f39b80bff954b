"""Facts built into llama.cpp that a configuration must agree with. `tests/engine/ships` asks llama.cpp."""

from typing import Any

import pytest

from app.domain.gguf.architectures import ARCHITECTURES, WRAPPERS
from app.domain.gguf.rules import gguf_refusals

SHORT: dict[str, Any] = {"max_position_embeddings": 100}
SLIDES = {**SHORT, "use_sliding_window": True, "sliding_window": 99}
YARN = {"rope_type": "yarn", "factor": 4.0}


def test_architectures_by_their_names_in_llama_cpp() -> None:
    names = {model_type: row.name for model_type, row in ARCHITECTURES.items()}
    assert {name: names[name] for name in ("llama", "mixtral", "glm", "phi", "olmo3", "gpt_oss", "cohere")} == {
        "llama": "llama",
        "mixtral": "llama",
        "glm": "chatglm",
        "phi": "phi2",
        "olmo3": "olmo2",
        "gpt_oss": "gpt-oss",
        "cohere": "command-r",
    }
    assert set(WRAPPERS.values()) <= set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("gemma3_text", {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 8}),
        ("gemma3", {"text_config": {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"}}),
        ("llama", {"rope_scaling": YARN}),
        ("qwen2", {"rope_scaling": {"type": "linear"}}),
        ("deepseek_v3", {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
        ("deepseek_v2", {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}}),
        ("gpt_oss", {"rope_scaling": {**YARN, "truncate": False}}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0, 1]}),
        ("phi3", {**SHORT, "rope_scaling": {"rope_type": "longrope", "partial_rotary_factor": 0.5}}),
        ("nemotron", {"hidden_act": "relu2"}),
        ("exaone4", {"num_hidden_layers": 64, "layer_types": ["sliding_attention"]}),
        ("llama", {}),
        ("llama", {"hidden_act": "silu"}),
        ("llama", {"hidden_act": "swish"}),
        ("llama", {"attention_bias": True}),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}),
        ("mistral", {**SHORT, "rope_parameters": {"type": "llama3"}}),
        ("qwen2", {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "partial_rotary_factor": 1.0}}),
        ("llama", {**SHORT, "sliding_window": 1}),
        ("mistral", {**SHORT, "sliding_window": 100}),
        ("mistral", {**SHORT, "sliding_window": None}),
        ("mistral", {**SHORT, "sliding_window": True}),
        ("mistral", {"max_position_embeddings": 4096}),
        ("qwen2", {**SLIDES, "use_sliding_window": False}),
        ("qwen2", {**SLIDES, "layer_types": ["full_attention"]}),
        ("qwen2", {**SLIDES, "num_hidden_layers": 28}),
        ("qwen2", {**SLIDES, "num_hidden_layers": 5, "max_window_layers": 5}),
        ("qwen2", {**SLIDES, "sliding_window": 100}),
        ("qwen2", {"use_sliding_window": True, "max_position_embeddings": 4096}),
        ("qwen2", {"head_dim": 4, "num_attention_heads": 2, "hidden_size": 8}),
        ("qwen2", {"num_attention_heads": 2, "hidden_size": 9}),
        ("qwen3", {"head_dim": 4, "num_attention_heads": 2, "hidden_size": 9}),
        ("qwen3", {"attention_bias": False}),
        ("llama", {"num_hidden_layers": 512}),
        ("llama", {"per_layer_config": {}}),
        ("granitemoehybrid", {"layer_types": ["attention"], "num_local_experts": 0}),
        ("granitemoehybrid", {"layer_types": ["attention", "mamba"], "num_local_experts": 4}),
        (
            "granitemoehybrid",
            {"layer_types": ["attention"], "num_local_experts": 4, "position_embedding_type": "rope"},
        ),
    ],
    ids=str,
)
def test_a_configuration_that_the_file_can_say(model_type: str, config: dict[str, Any]) -> None:
    assert gguf_refusals(model_type, config) == []


@pytest.mark.parametrize(
    ("model_type", "config", "told"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "written for default and linear and llama3 and yarn"),
        (
            "qwen2",
            {"rope_scaling": {"type": "llama3"}},
            "written for default and linear and yarn with llama.cpp's qwen2",
        ),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "partial_rotary_factor": 0.5}}, "factor = 0.5"),
        ("mistral", {}, "sliding_window = 4096, and llama.cpp's llama attends to all 131072"),
        ("mistral", {**SHORT, "sliding_window": 99}, "sliding_window = 99"),
        ("mistral", {"max_position_embeddings": 4097}, "all 4097 positions"),
        ("qwen2", SLIDES, "sliding_window = 99"),
        ("qwen2", {"use_sliding_window": True}, "sliding_window = 4096, and llama.cpp's qwen2 attends to all 32768"),
        ("qwen2", {**SLIDES, "layer_types": ["full_attention", "sliding_attention"]}, "sliding_window = 99"),
        ("qwen2", {**SLIDES, "num_hidden_layers": 29}, "sliding_window = 99"),
        ("qwen3", {**SLIDES, "num_hidden_layers": 6, "max_window_layers": 5}, "sliding_window = 99"),
        ("qwen2", {"head_dim": 4, "num_attention_heads": 2, "hidden_size": 9}, "head_dim = 4"),
        ("llama", {"num_hidden_layers": 513}, "num_hidden_layers = 513, and llama.cpp holds at most 512"),
        ("llama", {"per_layer_config": {"a": 1}}, "per_layer_config"),
        ("granitemoehybrid", {"layer_types": ["attention"], "num_local_experts": 4}, "granitemoe always has one"),
        ("zaya", {}, "llama.cpp v0.5.0 knows, and zaya is none of them"),
        ("llava", {"text_config": {"model_type": "zaya"}}, "llava, with a zaya inside"),
        ("phimoe", {}, "of llama.cpp v0.5.0, it computes other norms"),
        ("gemma3", {"text_config": {"model_type": "gemma3_text", "hidden_activation": "relu"}}, "hidden_activation"),
        ("llama", {"rope_scaling": {**YARN, "attention_factor": 2.0}}, "attention_factor = 2.0 of YaRN"),
        ("llama", {"rope_scaling": {**YARN, "truncate": False}}, "truncate = False of YaRN"),
        ("llama", {"rope_scaling": {**YARN, "mscale_all_dim": 1.0}}, "mscale_all_dim = 1.0 of YaRN"),
        ("deepseek_v3", {"rope_scaling": {**YARN, "mscale": 0.5, "mscale_all_dim": 2.0}}, "mscale_all_dim = 2.0"),
        (
            "qwen2_moe",
            {"norm_topk_prob": True},
            "norm_topk_prob = True, and llama.cpp's qwen2moe always computes with F",
        ),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers = [1, 0], and it leaves every fourth"),
        (
            "gemma2",
            {
                "query_pre_attn_scalar": 144,
                "head_dim": 128,
                "num_hidden_layers": 42,
                "hidden_size": 4608,
                "num_attention_heads": 32,
            },
            "query_pre_attn_scalar = 144, and it computes with 128",
        ),
        ("exaone4", {"num_hidden_layers": 30, "layer_types": ["sliding_attention"]}, "has windows in 64 alone"),
        ("hunyuan_v1_dense", {"rope_scaling": {"type": "dynamic"}}, "'dynamic' without alpha"),
        ("olmoe", {"num_attention_heads": 16, "num_key_value_heads": 4}, "num_key_value_heads = 4"),
        ("ernie4_5_moe", {"moe_layer_end_index": 3, "num_hidden_layers": 5}, "moe_layer_end_index = 3"),
        ("llama4_text", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers"),
        ("llama4_text", {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, "layer_types"),
        (
            "llama4_text",
            {"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "moe_layers": [0]},
            "moe_layers = [0]",
        ),
        ("llama4_text", {"num_hidden_layers": 4, "use_qk_norm": False}, "use_qk_norm = False"),
        ("qwen3_5_text", {"linear_key_head_dim": 64, "linear_value_head_dim": 128}, "linear_key_head_dim = 64"),
        ("mamba", {"hidden_size": 4, "intermediate_size": 12}, "intermediate_size = 12"),
        ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi = False"),
        ("minimax", {"mlp_alpha_factor": 2, "sliding_window": None}, "one factor for all three"),
        ("minimax", {"mlp_beta_factor": 0.5, "sliding_window": None}, "mlp_beta_factor = 0.5"),
        ("mpt", {"attn_config": {"softmax_scale": 0.5}}, "attn_config.softmax_scale = 0.5"),
    ],
    ids=str,
)
def test_a_configuration_that_the_file_cannot_say(model_type: str, config: dict[str, Any], told: str) -> None:
    (refusal,) = gguf_refusals(model_type, config)
    assert told in refusal
    assert refusal.endswith('leave gguf out, or ask for formats: ["merged"]')
