"""Facts built into llama.cpp that a configuration must agree with. `tests/engine/ships` asks llama.cpp."""

from typing import Any

import pytest

from app.domain.gguf_rules import ARCHITECTURES, GgufArchitecture, gguf_refusals

ROPE = frozenset({"default", "llama3"})
SHORT: dict[str, Any] = {"max_position_embeddings": 100}
SLIDES = {**SHORT, "use_sliding_window": True, "sliding_window": 99}


def test_the_architectures_of_llama_cpp() -> None:
    assert dict(ARCHITECTURES) == {
        "llama": GgufArchitecture("llama", ROPE, positions=2048),
        "mistral": GgufArchitecture("llama", ROPE, window=4096, positions=131_072),
        "qwen2": GgufArchitecture("qwen2", frozenset({"default"}), square=True, by_layer=True, positions=32_768),
        "qwen3": GgufArchitecture(
            "qwen3", frozenset({"default"}), biases=("attention_bias",), by_layer=True, positions=32_768
        ),
    }


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("gemma3_text", {"hidden_act": "gelu"}),  # another rule refuses the whole architecture
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
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "type yarn, and gguf is written for default and llama3"),
        ("qwen2", {"rope_scaling": {"type": "llama3"}}, "written for default with llama.cpp's qwen2"),
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
    ],
    ids=str,
)
def test_a_configuration_that_the_file_cannot_say(model_type: str, config: dict[str, Any], told: str) -> None:
    (refusal,) = gguf_refusals(model_type, config)
    assert told in refusal
    assert refusal.endswith('leave gguf out, or ask for formats: ["merged"]')
