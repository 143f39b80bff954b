"""llama.cpp's architectures by transformers' `model_type`, and what of each a GGUF file can say.

A GGUF file names one of llama.cpp's architectures and some numbers. What else a configuration decides in transformers
(the activation, biases, the mask, the rotary embedding) is built into llama.cpp. Read in llama.cpp b11434 and v0.5.0,
`src/models/*.cpp`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

RELEASE = "v0.5.0"
"""The release of llama.cpp whose architectures these are."""


@dataclass(frozen=True)
class GgufArchitecture:
    """A `model_type` as llama.cpp computes it.

    name        llama.cpp's name
    """

    name: str


ARCHITECTURES: Mapping[str, GgufArchitecture] = MappingProxyType(
    {
        name: GgufArchitecture(own)
        for name, own in {
            "llama": "llama", "mistral": "llama", "mixtral": "llama", "ministral3": "mistral3", "qwen2": "qwen2", "qwen3": "qwen3",
            "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "gemma4_text": "gemma4", "phi": "phi2", "phi3": "phi3",
            "olmo": "olmo", "olmo2": "olmo2", "olmo3": "olmo2", "granite": "granite", "smollm3": "smollm3", "glm": "chatglm",
            "glm4": "glm4", "cohere": "command-r", "cohere2": "cohere2", "stablelm": "stablelm", "starcoder2": "starcoder2",
            "nemotron": "nemotron", "exaone4": "exaone4", "ernie4_5": "ernie4_5", "hunyuan_v1_dense": "hunyuan-dense",
            "seed_oss": "seed_oss", "apertus": "apertus", "arcee": "arcee",
            "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe", "granitemoe": "granitemoe",
            "granitemoeshared": "granitemoe", "gpt_oss": "gpt-oss", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2",
            "glm4_moe": "glm4moe", "glm4_moe_lite": "deepseek2", "minimax_m2": "minimax-m2", "phimoe": "phimoe",
            "qwen3_next": "qwen3next", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe", "lfm2": "lfm2", "lfm2_moe": "lfm2moe",
            "bamba": "granitehybrid", "granitemoehybrid": "granitehybrid", "mamba": "mamba", "falcon_mamba": "mamba", "mamba2": "mamba2", "jamba": "jamba",
            "qwen2_vl_text": "qwen2vl", "qwen2_5_vl_text": "qwen2vl", "qwen3_vl_text": "qwen3vl", "ernie4_5_moe": "ernie4_5-moe", "hunyuan_v1_moe": "hunyuan-moe", "llama4_text": "llama4",
            "gpt_neox": "gptneox", "gpt2": "gpt2", "falcon": "falcon", "bloom": "bloom", "mpt": "mpt", "gpt_bigcode": "starcoder",
        }.items()
    }
)
