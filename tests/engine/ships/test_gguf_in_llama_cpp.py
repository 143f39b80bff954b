"""GGUF files in a real llama.cpp: the logits of the merged checkpoint, the tokens of the source's tokenizer.

`make test-llama-cpp` installs it and runs these. What is refused is written nevertheless, past the rules, to show that
llama.cpp does not load it or computes another model.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.domain.formats import ExportFormat
from app.domain.methods import BLOCK_SCHEMES
from bitwright.errors import FormatCannotHold
from tests.engine.conftest import run_job
from tests.engine.ships.gguf_models import LLAMA_3, QWEN, save_model, save_tokenizer
from tests.engine.ships.llama_cpp import Answer, ask
from workers.formats.gguf import metadata as gguf_metadata
from workers.tiny_model import Recipe, make_tiny_model

FOLDER = os.environ.get("BITWRIGHT_TEST_LLAMA_CPP", "")
ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER, reason="make test-llama-cpp installs llama.cpp")]

IDS = torch.randint(4, 390, (96,), generator=torch.Generator().manual_seed(0))
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TEXTS = [
    "a",
    "",
    "Hello world, 1234 it's été\n\n  def f(x):  return",
    "They'LL see 12345 things;  don't 99%\r\n\t\tx = [1, 2]\n \n",
    "東京で2026年。 emoji 🙂🙃 <|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "   leading, trailing   ",
    "the statement object is the object that is the object",
]


def written(source: Path, workspace: Path, **body: Any) -> tuple[Any, Path]:
    """The merged model of a job that quantizes one linear, and its GGUF file.

    llama.cpp rounds activations to 8 bits before it multiplies quantized weights; what is left at fp32 it computes so.
    """
    modules = {"ignore": ["lm_head", "model.layers.0.*", "*.self_attn.*", "*.gate_proj", "*.up_proj"]}
    result = run_job(source, workspace, formats=["gguf", "merged"], bits=8, modules=modules, **body)
    merged = AutoModelForCausalLM.from_pretrained(workspace / result.checkpoints["merged"])
    return merged, workspace / result.checkpoints["gguf"] / "model.gguf"


def difference(answer: Answer, model: Any) -> float:
    """Of the logits, root mean square, in standard deviations."""
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
    return float((torch.from_numpy(answer.logits) - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {}),
        ("llama", {"hidden_act": "swish", "tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": LLAMA_3_ROPE}),
        ("llama", {"head_dim": 32, "rms_norm_eps": 1e-2}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "num_key_value_heads": 4}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}}),
        ("mistral", {"sliding_window": None, "head_dim": 32}),
        ("mistral", {"sliding_window": 256}),
        ("mistral", {"sliding_window": None, "rope_parameters": LLAMA_3_ROPE}),
        ("qwen2", {}),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}),
        ("qwen2", {"tie_word_embeddings": True, "layer_types": ["full_attention"] * 2, "sliding_window": 8}),
        ("qwen3", {}),
        ("qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
    ],
)
def test_what_is_written_computes_the_same(model_type: str, config: dict[str, Any], tmp_path: Path) -> None:
    merged, file = written(save_model(tmp_path / "source", model_type, **config), tmp_path)
    answer = ask(Path(FOLDER), file, IDS.tolist(), [])
    assert isinstance(answer, Answer), answer
    assert difference(answer, merged) < 0.01


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"hidden_act": "relu"}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
        ("mistral", {"sliding_window": 32}),
        ("mistral", {"hidden_act": "gelu_pytorch_tanh", "sliding_window": None}),
        ("qwen2", {"hidden_act": "gelu"}),
        ("qwen2", {"head_dim": 32}),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}),
        ("qwen2", {"rope_parameters": LLAMA_3_ROPE}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"hidden_act": "gelu"}),
        ("qwen3", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0}),
        ("qwen3", {"rope_parameters": LLAMA_3_ROPE}),
    ],
)
def test_what_is_refused_would_not_load_or_be_another_model(
    model_type: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_model(tmp_path / "source", model_type, **config)
    with pytest.raises(FormatCannotHold):
        run_job(source, tmp_path / "refused", formats=["gguf"])
    monkeypatch.setitem(vars(ExportFormat.GGUF.info), "model_check", None)
    monkeypatch.setattr(gguf_metadata, "gguf_refusals", lambda *_: [])
    merged, file = written(source, tmp_path)
    answer = ask(Path(FOLDER), file, IDS.tolist(), [])
    assert isinstance(answer, str) or difference(answer, merged) > 0.03


BOS, BOTH = "<s> $A", "<s> $A <|endoftext|>"


@pytest.mark.parametrize(
    ("model_type", "tokenizer"),
    [
        ("llama", {}),
        ("llama", {"around": BOS}),
        ("llama", {"around": BOTH}),
        ("llama", {"around": "$A <|endoftext|>"}),
        ("llama", {"bos_token": None}),
        ("llama", {"pattern": LLAMA_3}),
        ("llama", {"pattern": LLAMA_3, "whole_words": True}),
        ("llama", {"pattern": LLAMA_3, "whole_words": True, "around": BOS}),
        ("llama", {"pattern": QWEN, "around": BOS}),
        ("llama", {"tokenizer_class": "GPT2Tokenizer"}),
        ("llama", {"tokenizer_class": "GPT2Tokenizer", "pattern": LLAMA_3, "add_bos_token": True}),
        ("qwen2", {"pattern": LLAMA_3}),
        ("qwen2", {"pattern": QWEN}),
        ("qwen2", {"tokenizer_class": "Qwen2Tokenizer"}),
        ("qwen3", {"pattern": LLAMA_3}),
        ("qwen3", {"tokenizer_class": None}),
        ("mistral", {"pattern": LLAMA_3, "around": BOS}),
    ],
)
def test_llama_cpp_makes_the_tokens_that_transformers_makes(
    model_type: str, tokenizer: dict[str, Any], tmp_path: Path
) -> None:
    source = save_model(tmp_path / "source", model_type, sliding_window=None)
    save_tokenizer(source, **tokenizer)
    _, file = written(source, tmp_path)
    answer = ask(Path(FOLDER), file, IDS.tolist(), TEXTS)
    assert isinstance(answer, Answer), answer
    expected = AutoTokenizer.from_pretrained(source)
    assert answer.tokens == [expected(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Llama blocks of whole super-blocks, trained until it knows its text."""
    recipe = Recipe(vocabulary=400, width=256, intermediate=512, blocks=2, positions=256, steps=120, batch=4)
    return make_tiny_model(tmp_path_factory.mktemp("models") / "wide", recipe)


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).exp())


@pytest.mark.parametrize("name", sorted(BLOCK_SCHEMES))
def test_types_by_name_speak_in_llama_cpp_as_in_the_engine(name: str, wide_model: Path, tmp_path: Path) -> None:
    quantization = {"method": "rtn", "scheme": name}
    result = run_job(wide_model, tmp_path, formats=["gguf", "merged"], quantization=quantization)
    assert {linear.scheme for block in result.report.blocks for linear in block.linears} == {name}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(wide_model)(text, return_tensors="pt", truncation=True, max_length=256)[
        "input_ids"
    ][0]
    answer = ask(Path(FOLDER), tmp_path / result.checkpoints["gguf"] / "model.gguf", ids.tolist(), [])
    assert isinstance(answer, Answer), answer
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / result.checkpoints["merged"], dtype=torch.float32)
    with torch.no_grad():
        ours = perplexity(merged(ids[None]).logits[0], ids)
    assert perplexity(torch.from_numpy(answer.logits), ids) == pytest.approx(ours, rel=0.005)
