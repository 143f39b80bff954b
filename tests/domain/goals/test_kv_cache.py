"""Bytes of a KV cache against the shapes that transformers' own caches have, and by hand."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from app.domain.goals.kv_cache import cache_bytes
from bitwright.errors import InvalidRequest

LLAMA: dict[str, Any] = {
    **{"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 50},
}
GEMMA: dict[str, Any] = LLAMA | {
    **{"model_type": "gemma3_text", "head_dim": 24, "sliding_window": 8, "num_hidden_layers": 4},
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
}


def cached_values(config: dict[str, Any], tokens: int) -> int:
    """Numbers in the cache of transformers after so many tokens; where it slides, of a window less one."""
    fields = {name: value for name, value in config.items() if name != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    with torch.no_grad():
        cache = model(torch.zeros(1, tokens, dtype=torch.int64), use_cache=True).past_key_values
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def test_of_full_attention() -> None:
    assert cache_bytes(LLAMA, 20, 1) == 2 * cached_values(LLAMA, 20)
    assert cache_bytes(LLAMA, 20, 5) == 5 * cache_bytes(LLAMA, 20, 1)
    assert cache_bytes({"text_config": LLAMA}, 20, 1, value_bytes=1) == cached_values(LLAMA, 20)


def test_of_sliding_windows() -> None:
    one_less = cached_values(GEMMA, 20) + 3 * 2 * 2 * 24
    assert cache_bytes(GEMMA, 20, 1) == 2 * one_less
    assert cache_bytes(GEMMA, 5, 1) == 2 * cached_values(GEMMA, 5)


def test_of_latent_attention() -> None:
    deepseek = LLAMA | {"model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert cache_bytes(deepseek, 100, 1) == 3 * 100 * (512 + 64) * 2


def test_what_is_silent_counts_as_one_head_a_query() -> None:
    silent = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    assert cache_bytes(silent, 10, 1) == 3 * 10 * 2 * 64 * 2


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        ({"mamba_d_state": 16}, "mamba_d_state"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_attention_heads": 0, "num_key_value_heads": None}, "num_attention_heads"),
    ],
)
def test_what_is_not_known_is_refused_with_the_reason(change: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidRequest, match=word) as refused:
        cache_bytes(LLAMA | change, 10, 1)
    assert refused.value.field == "quantization.fits"
    assert refused.value.hint is not None
    assert "at_most" in refused.value.hint
