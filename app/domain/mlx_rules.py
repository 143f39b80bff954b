"""Rules on a config.json for models that are to become MLX checkpoints: mlx-lm has a file for each type of model.

Read in mlx-lm 0.32.2, `mlx_lm/models` and `MODEL_REMAPPING` of `mlx_lm/utils.py`.
"""

from collections.abc import Mapping

NAMES = """
apertus cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe exaone4 falcon_h1 falcon_mamba gemma gemma2
gemma3 gemma3_text gemma4 gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss gptj
granite granitemoe granitemoehybrid helium hunyuan_v1_dense jamba lfm2 lfm2_moe llama llama4 llama4_text mamba
mamba2 minimax minimax_m2 ministral3 mistral mistral3 mixtral nemotron nemotron_h olmo olmo2 olmo3 olmoe phi
phi3 phimoe qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_moe qwen3_next qwen3_vl seed_oss
smollm3 stablelm starcoder2
"""
TYPES = frozenset(NAMES.split())
"""`model_type`s that mlx-lm builds, of those that are accepted here."""


def mlx_refusals(model_type: str, config: Mapping[str, object]) -> list[str]:  # noqa: ARG001 - one of many rules' form
    """The reason why mlx-lm does not build a model of this type; empty if it does."""
    if model_type in TYPES:
        return []
    return [
        f"mlx: mlx-lm 0.32.2 has no file for model_type {model_type[:60]!r}; leave mlx out, or ask for formats: "
        '["compressed-tensors"] or ["merged"]'
    ]
