"""Metadata of GGUF files: model and tokenizer as written, refusals, and the card's promises."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from app.domain.format_rules import model_problems
from app.domain.formats import ExportFormat
from app.domain.gguf.rules import gguf_refusals
from bitwright.errors import FormatCannotHold
from tests.engine.conftest import run_job
from tests.engine.ships.gguf_models import LLAMA_3, QWEN, SHAPE, save_model, save_tokenizer
from workers.formats.gguf.tokenizer import check_tokenizer
from workers.formats.gguf.tokenizers.source import SourceTokenizer

IDS = torch.randint(4, 390, (2, 64), generator=torch.Generator().manual_seed(0))
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
WINDOW = {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}


def keys(workspace: Path, result: Any) -> dict[str, Any]:
    reader = gguf.GGUFReader(workspace / result.checkpoints["gguf"] / "model.gguf")
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize(
    ("model_type", "config", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("mistral", {"hidden_act": "relu", "sliding_window": None}, "hidden_act = 'relu'"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("granite", {"rope_parameters": LINEAR}, "type linear"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type dynamic"),
        ("gemma", {"rope_scaling": {"type": "yarn", "factor": 2.0}, "hidden_act": "gelu"}, "type yarn"),
        ("llama", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ("qwen2", {"rope_parameters": ROPE}, "type llama3"),
        ("qwen3", {"rope_parameters": ROPE}, "type llama3"),
        ("mistral", {"sliding_window": 32}, "sliding_window = 32"),
        ("mistral", {"max_position_embeddings": 8192}, "sliding_window = 4096"),
        ("qwen2", WINDOW, "sliding_window = 32"),
        ("qwen3", WINDOW | {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window = 32"),
        ("qwen2", {"head_dim": 32}, "head_dim = 32"),
        ("llama", {"num_hidden_layers": 600}, "num_hidden_layers = 600"),
        ("llama", {"per_layer_config": {"0": {"intermediate_size": 64}}}, "per_layer_config"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_by_field_and_value(
    model_type: str, config: dict[str, Any], words: str
) -> None:
    given = SHAPE | config
    (problem,) = model_problems((ExportFormat.MERGED, ExportFormat.GGUF), model_type, {}, given)
    assert (problem.field, problem.code) == ("formats.1", "format_cannot_hold")
    assert words in problem.detail
    assert "leave gguf out" in problem.detail
    assert not model_problems((ExportFormat.MERGED,), model_type, {}, given)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {}),
        ("llama", {"hidden_act": "swish", "attention_bias": True, "mlp_bias": True, "rope_parameters": ROPE}),
        ("llama", {"rope_scaling": None, "sliding_window": 32}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 256}),
        ("mistral", {"max_position_embeddings": 4096}),
        ("qwen2", {"sliding_window": 32}),
        ("qwen2", WINDOW | {"max_window_layers": 2}),
        ("qwen3", WINDOW | {"layer_types": ["full_attention"] * 2}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_what_changes_nothing_is_taken(model_type: str, config: dict[str, Any]) -> None:
    given = SHAPE | config
    assert gguf_refusals(model_type, given) == []
    completed = AutoConfig.for_model(model_type, **given).to_dict()
    assert gguf_refusals(model_type, completed) == [], "nor as transformers completes it"


@pytest.mark.parametrize(
    ("model_type", "config"), [("llama", {"hidden_act": "gelu"}), ("mistral", {"sliding_window": 32})]
)
def test_a_worker_refuses_it_before_anything_is_computed(
    model_type: str, config: dict[str, Any], tmp_path: Path
) -> None:
    source = save_model(tmp_path / "source", model_type, **config)
    with pytest.raises(FormatCannotHold, match=next(iter(config))):
        run_job(source, tmp_path, formats=["gguf"])
    assert not list((tmp_path / "state").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("model_type", "config", "words"),
    [
        ("llama", {}, None),
        ("llama", {"rope_parameters": ROPE}, "the rotary embedding is of the type llama3, and it takes default"),
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {}, None),
        ("qwen3", {}, "head_dim is 16, and it takes 128"),
        ("qwen3", {"head_dim": 128}, None),
    ],
)
def test_a_card_promises_transformers_only_where_it_makes_the_same_model(
    model_type: str, config: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "source", model_type, **config)
    result = run_job(source, tmp_path, formats=["gguf", "merged"], bits=8)
    folder = tmp_path / result.checkpoints["gguf"]
    card = (folder / "README.md").read_text()
    assert "llama-cli -m path/to/this/folder/model.gguf" in card
    if words is not None:
        assert words in card
        assert "gguf_file=" not in card
    try:
        found = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    except Exception:
        assert words is not None, "it does not load"
        return
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / result.checkpoints["merged"])
    with torch.no_grad():
        difference = float((found(IDS).logits - expected(IDS).logits).abs().max())
    assert (difference < 1e-3) is (words is None)


def run_lines(card: str, **paths: Path) -> dict[str, Any]:
    """The names that a card's lines of Python leave behind."""
    (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    for name, path in paths.items():
        block = block.replace(f"path/to/{name.replace('_', '/')}", str(path))
    file = next(iter(paths.values())).parent / "card.py"
    file.write_text(block)
    return runpy.run_path(str(file))


@pytest.mark.parametrize(("model_type", "original"), [("llama", False), ("qwen2", True)])
def test_the_lines_give_the_dtype_and_a_tokenizer_that_makes_the_same_tokens(
    model_type: str, original: bool, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "source", model_type)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(source)
    card_folder = tmp_path / run_job(source, tmp_path, formats=["gguf"]).checkpoints["gguf"]
    card = (card_folder / "README.md").read_text()
    assert ("path/to/the/original/model" in card) is original, "NFC is Qwen's, and not known to a GGUF file"
    names = run_lines(card, this_folder=card_folder, the_original_model=source)
    assert names["model"].dtype is torch.bfloat16
    for text in ("It's 1234 cafe\u0301s\n\n x", "<|im_start|>a<|im_end|>"):
        assert names["tokenizer"](text).input_ids == AutoTokenizer.from_pretrained(source)(text).input_ids


@pytest.mark.parametrize(
    ("model_type", "tokenizer", "pre", "starts", "ends"),
    [
        ("llama", {}, "gpt-2", False, False),
        ("llama", {"pattern": LLAMA_3, "whole_words": True}, "llama-bpe", False, False),
        ("llama", {"pattern": LLAMA_3, "whole_words": True, "around": "<s> $A"}, "llama-bpe", True, False),
        ("llama", {"pattern": LLAMA_3, "around": "<s> $A <|endoftext|>"}, "dbrx", True, True),
        ("llama", {"pattern": QWEN, "bos_token": None, "around": "$A <|endoftext|>"}, "qwen2", False, True),
        ("qwen2", {"pattern": LLAMA_3}, "qwen2", False, False),
        ("llama", {"pattern": LLAMA_3, "tokenizer_class": "GPT2Tokenizer"}, "gpt-2", False, False),
    ],
)
def test_the_file_holds_the_tokenizer_that_transformers_makes_and_leaves_nothing_to_defaults(
    model_type: str, tokenizer: dict[str, Any], pre: str, starts: bool, ends: bool, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "source", model_type)
    save_tokenizer(source, **tokenizer)
    found = keys(tmp_path, run_job(source, tmp_path, formats=["gguf"]))
    assert found["tokenizer.ggml.pre"] == pre
    loaded = AutoTokenizer.from_pretrained(source)
    whole, plain = (loaded("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (starts, ends)
    assert whole == [0] * starts + plain + [1] * ends
    assert found["tokenizer.ggml.add_space_prefix"] is False
    assert found["tokenizer.ggml.eos_token_id"] == 1
    assert found["tokenizer.ggml.bos_token_id"] == 0
    assert len(set(found["tokenizer.ggml.tokens"])) == len(found["tokenizer.ggml.tokens"]) == 400
    for text, index in loaded.get_vocab().items():
        assert found["tokenizer.ggml.tokens"][index] == text


def test_every_stop_token_is_named_and_a_second_template_kept(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama")
    save_tokenizer(source, chat_template=[{"name": n, "template": f"{{{{ '{n}' }}}}"} for n in ("default", "tool_use")])
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1]}))
    found = keys(tmp_path, run_job(source, tmp_path, formats=["gguf"]))
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (1, 3)
    assert (found["tokenizer.chat_template"], found["tokenizer.chat_template.tool_use"]) == (
        "{{ 'default' }}",
        "{{ 'tool_use' }}",
    )


def added(**changes: Any) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "added_tokens": [{"id": i, "content": t, **plain, **changes} for i, t in enumerate(("<s>", "<|endoftext|>"))]
    }


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ({"eos_token": None}, None),
        ({"around": "<|im_start|> $A"}, "puts none around it"),
        ({"model": {"normalizer": {"type": "Lowercase"}}}, "normalizes text"),
        ({"model": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}}}, None),
        ({"model": added(lstrip=True)}, "has lstrip"),
        ({"model": added(single_word=True)}, "has single_word"),
        ({"pad_token": "[PAD]"}, None),
        ({"additional_special_tokens": [f"<{i}>" for i in range(20)]}, "it has the token id 409"),
        ({"pattern": QWEN, "whole_words": True}, None),
    ],
)
def test_tokenizers_that_llama_cpp_would_not_follow_are_refused(
    tokenizer: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path, **tokenizer)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 1}))
    if words is None:
        check_tokenizer(tmp_path, 400)
        return
    with pytest.raises(FormatCannotHold, match=words) as refused:
        check_tokenizer(tmp_path, 400)
    assert refused.value.hint


def test_without_an_end_of_sequence_token_it_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, eos_token=None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": None}))
    with pytest.raises(FormatCannotHold, match="token 11"):
        check_tokenizer(tmp_path, 400)


def test_a_model_without_a_tokenizer_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(FormatCannotHold, match="the model has no tokenizer") as refused:
        SourceTokenizer.read(tmp_path)
    assert "tokenizer.json" in str(refused.value.hint)
