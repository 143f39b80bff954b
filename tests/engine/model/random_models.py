"""Tiny random checkpoints of every supported architecture, small enough to build in a moment."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY, LENGTH, WINDOW = 64, 40, 8
"""Sequences are longer than the sliding window, so that masks differ by layer type."""

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
PECULIARITIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": False},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": MIXED,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
    },
}


def random_model(
    architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **shape: Any
) -> PreTrainedModel:
    """A random model whose norms and biases are not at their neutral values; `shape` changes its configuration."""
    config = AutoConfig.for_model(architecture, **(SHAPE | PECULIARITIES[architecture] | shape))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def save_random_model(folder: Path, architecture: str, **options: Any) -> PreTrainedModel:
    """The model, saved to `folder`; `max_shard_size` and the options of `random_model` may be given."""
    shard = options.pop("max_shard_size", "5GB")
    model = random_model(architecture, **options)
    model.save_pretrained(folder, max_shard_size=shard)
    return model
