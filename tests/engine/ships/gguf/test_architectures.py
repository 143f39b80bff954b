"""Every architecture that gguf is written for, in a real llama.cpp: quantized linears, the merged model's perplexity.

`make test-llama-cpp` installs it and runs these. Models are random, of every layer type twice, with no number at its
neutral value: the same numbers on both sides need no training, and a wrong order of rows, a gate for an up or a window
in the wrong layer shows in every logit.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from app.domain.gguf.architectures import ARCHITECTURES, WRAPPERS
from app.domain.inputs.architectures import ARCHITECTURES as ACCEPTED
from tests.engine.architectures import configurations
from tests.engine.architectures.configurations import MIXED, SIZES, random_model
from tests.engine.conftest import run_job
from tests.engine.ships.gguf_models import save_tokenizer
from tests.engine.ships.llama_cpp import Answer, ask
from workers.engine.model.meta_model import model_class

FOLDER = os.environ.get("BITWRIGHT_TEST_LLAMA_CPP", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="make test-llama-cpp installs llama.cpp"),
    pytest.mark.filterwarnings("ignore"),
]
VOCABULARY = 400
DECAYS = ("query_decay", "key_decay", "diagonal_decay")
IDS = torch.randint(4, 300, (100,), generator=torch.Generator().manual_seed(0))
"""Longer than every window, and without the token of an image."""
BLOCKS = dict.fromkeys(("gpt2", "bloom", "falcon", "gpt_bigcode"), "h") | {"mpt": "blocks"}
"""Name of the list of blocks, where it is not `layers`."""
FULL = ["full_attention"] * 4
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0]}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 4.0],
    "factor": 4.0,
}
GPT_OSS = YARN | {
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
"""As published: llama.cpp takes whole turns, which with narrower heads and shorter contexts is another embedding."""
SLIDING = {"rope_type": "default", "rope_theta": 1e3}
ORIGINAL, LONGER = ({"original_max_position_embeddings": length} for length in (32, 512))
"""Contexts that the texts of these tests are longer than, and shorter."""
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "ministral": {"layer_types": MIXED},
    "cwm": {"layer_types": MIXED},
    "minimax": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        **dict.fromkeys(("full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor"), 1.2),
        **dict.fromkeys(("full_attn_beta_factor", "linear_attn_beta_factor", "mlp_beta_factor"), 1.0),
        "sliding_window": None,
    },
    "ministral3": {"layer_types": FULL, "sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False, "layer_types": FULL},
    "cohere": {"use_qk_norm": False, "logit_scale": 0.4},
    "starcoder2": {"sliding_window": None},
    "exaone4": {"layer_types": FULL, "sliding_window": None},
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {"decoder_sparse_step": 1, "use_sliding_window": False},
    "qwen3_moe": {"mlp_only_layers": [], "norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4, "clip_qkv": None},
    "llama4_text": {
        "moe_layers": [1, 3],
        "interleave_moe_layer_step": 2,
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        "no_rope_layers": [1, 1, 1, 0],
        "attention_chunk_size": 8192,
    },
    "qwen3_5_text": {"rope_parameters": SECTIONS},
    "qwen3_5_moe_text": {"rope_parameters": SECTIONS},
    "nemotron_h": {"layers_block_type": ["moe", "attention", "mamba", "moe"] * 2},
    "mamba": {"intermediate_size": 128},
    "falcon_mamba": {"intermediate_size": 128},
}
"""Facts that llama.cpp has built in, where the configurations of `tests.engine.architectures` are otherwise."""
MORE: list[tuple[str, dict[str, Any]]] = [
    ("ministral", {"layer_types": MIXED, "sliding_window": 128}),
    ("ministral", {"layer_types": FULL, "rope_parameters": YARN}),
    ("ministral", {"layer_types": ["sliding_attention"] * 4}),
    ("cwm", {"rope_parameters": LLAMA_3}),
    ("helium", {"attention_bias": True}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": LINEAR}),
    ("qwen2", {"rope_parameters": YARN}),
    ("smollm3", {"rope_parameters": YARN}),
    ("olmo3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": {**YARN, "rope_type": "default"}}}),
    ("exaone4", {"rope_parameters": LLAMA_3}),
    ("apertus", {"rope_parameters": LLAMA_3}),
    ("phi3", {"rope_parameters": LONG | ORIGINAL, **ORIGINAL}),
    ("phi3", {"rope_parameters": LONG | LONGER, **LONGER, "max_position_embeddings": 2048}),
    ("hunyuan_v1_dense", {"rope_parameters": {**LINEAR, "rope_type": "dynamic", "alpha": 50.0}}),
    ("gpt_oss", {"rope_parameters": GPT_OSS, "head_dim": 64}),
    ("deepseek_v2", {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
    ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    ("gemma3_text", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": SLIDING}}),
    ("granitemoehybrid", {"position_embedding_type": "rope"}),
    ("glm4_moe", {"use_qk_norm": True}),
    ("nemotron_h", {"layers_block_type": ["mlp", "attention", "mamba", "mlp"] * 2}),
    ("granitemoehybrid", {"num_local_experts": 0, "num_experts_per_tok": 0}),
    ("granitemoehybrid", {"layer_types": ["attention"] * 4, "num_local_experts": 0, "num_experts_per_tok": 0}),
    ("granitemoehybrid", {"layer_types": ["attention"] * 4, "position_embedding_type": "rope"}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("falcon", {"new_decoder_architecture": False, "multi_query": True, "num_kv_heads": 1}),
]


def save(folder: Path, model_type: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random model of a type, with what llama.cpp has built in, and a tokenizer."""
    monkeypatch.setitem(SIZES, "vocab_size", VOCABULARY)
    own = configurations._text

    def text(name: str, **rest: Any) -> Any:
        return own(name, **{**configurations.TYPES.get(name, {}), **rest, **CHANGES.get(name, {}), **changes})

    monkeypatch.setattr(configurations, "_text", text)
    model = random_model(model_type)
    for module in model.modules():
        if isinstance(module, MiniMaxLightningAttention):  # its buffers, which llama.cpp computes, are drawn as well
            module.slope_rate.copy_(module.get_slope_rate())
            for name, decay in zip(DECAYS, module.decay_factors(module.slope_rate), strict=True):
                module.get_buffer(name).copy_(decay)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def perplexity(logits: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:-1], IDS[1:]).exp())


TYPES = sorted({*(ARCHITECTURES.keys() & ACCEPTED.keys()), *WRAPPERS})


@pytest.mark.parametrize(("model_type", "changes"), [*((name, {}) for name in TYPES), *MORE], ids=str)
def test_llama_cpp_computes_the_merged_model(
    model_type: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first half stays as it is: llama.cpp rounds activations to 8 bits before quantized weights, and the routers
    and states of random models make much of it. Every type has two blocks whose linears are all quantized."""
    source = save(tmp_path / "source", model_type, changes, monkeypatch)
    modules = {"ignore": ["lm_head", *(f"*{BLOCKS.get(model_type, 'layers')}.{number}.*" for number in (0, 1))]}
    result = run_job(source, tmp_path / "job", formats=["gguf", "merged"], bits=8, evaluation=None, modules=modules)
    folders = {name: tmp_path / "job" / result.checkpoints[name] for name in ("gguf", "merged")}
    answer = ask(Path(FOLDER), folders["gguf"] / "model.gguf", IDS.tolist(), [])
    assert isinstance(answer, Answer), answer
    config = AutoConfig.from_pretrained(folders["merged"])
    merged = model_class(config).from_pretrained(folders["merged"], dtype=torch.float32).eval()
    with torch.no_grad():
        expected = merged(input_ids=IDS[None], use_cache=False).logits[0].float()
    found = torch.from_numpy(answer.logits)[:, : expected.shape[1]]
    difference = float((found - expected).square().mean().sqrt() / expected.std())
    print(f"{model_type} {changes}: {perplexity(found):.3f}, {perplexity(expected):.3f}, {difference:.4f}")  # noqa: T201
    assert perplexity(found) == pytest.approx(perplexity(expected), rel=0.005)
    assert difference < 0.03
