"""GGUF files of the real engine, loaded by transformers: the weights that were made, the tokenizer that was there."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from app.domain.attempt_lines import ResultLine
from app.domain.formats import ExportFormat
from app.domain.request.job_request import JobRequest
from bitwright.errors import FormatCannotHold, InvalidRequest
from tests.engine.conftest import run_job
from tests.engine.model.random_models import PECULIARITIES, SHAPE
from tests.engine.quantize import residual_svd
from tests.formats.examples import random_result, scheme
from tests.reports import REPORTS
from workers.engine.model.checkpoint import Checkpoint
from workers.formats.gguf.read_back import TRIED
from workers.formats.gguf.tokenizers.byte_level import pre_name
from workers.formats.registry import open_writer

WEIGHTS = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 400, "bos_token_id": 0}
TEXT = "Hello world, 1234 it's été\n\n  def f(x):  return"


def random_checkpoint(folder: Path, tokenizer: Path, model_type: str, **config: Any) -> Path:
    """A random fp32 model with biases where the architecture may have them, and a real tokenizer."""
    made = AutoConfig.for_model(model_type, **(SHAPE | PECULIARITIES[model_type] | WEIGHTS | config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def load(workspace: Path, result: ResultLine) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        workspace / result.checkpoints["gguf"],
        gguf_file="model.gguf",
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )


def reader(workspace: Path, result: ResultLine) -> gguf.GGUFReader:
    return gguf.GGUFReader(workspace / result.checkpoints["gguf"] / "model.gguf")


@pytest.mark.parametrize("model_type", sorted(TRIED))
def test_every_architecture_loads_with_the_weights_that_were_made(
    model_type: str, small_model: Path, tmp_path: Path
) -> None:
    # transformers 5.23 takes a Qwen3 head's width for 128, as in every published one, whatever the file says.
    peculiar: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": True},
        "mistral": {"sliding_window": None},
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"head_dim": 128},
    }
    source = random_checkpoint(tmp_path / "source", small_model, model_type, **peculiar.get(model_type, {}))
    result = run_job(source, tmp_path, formats=["gguf", "merged"], bits=3)
    assert result.report.warnings == ()
    loaded = load(tmp_path, result)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / result.checkpoints["merged"])
    found = loaded.state_dict()
    for name, tensor in expected.state_dict().items():
        if name in found:
            assert torch.equal(found[name], tensor), name
    missing = {name.rpartition(".")[2] for name in expected.state_dict().keys() - found.keys()}
    assert missing <= {"bias"}, "transformers makes no attention biases of a GGUF of Llama"
    if not missing:
        ids = torch.randint(0, 400, (2, 8), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert (loaded(ids).logits - expected(ids).logits).abs().max() < 1e-4


def test_rows_of_llama_s_biases_move_with_their_heads(small_model: Path, tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", small_model, "llama", attention_bias=True)
    result = run_job(source, tmp_path, formats=["gguf"])
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader(tmp_path, result).tensors}
    original = AutoModelForCausalLM.from_pretrained(source).state_dict()
    bias = original["model.layers.0.self_attn.k_proj.bias"]
    for head in range(2):
        ours, theirs = stored["blk.0.attn_k.bias"][head * 16 :][:16], bias[head * 16 :][:16]
        assert torch.equal(ours[0::2], theirs[:8])
        assert torch.equal(ours[1::2], theirs[8:])
    assert torch.equal(stored["blk.0.attn_v.bias"], original["model.layers.0.self_attn.v_proj.bias"])


@pytest.mark.parametrize("symmetric", [True, False])
def test_half_precision_weights_come_back_within_the_offset_s_rounding(
    symmetric: bool, small_model: Path, tmp_path: Path
) -> None:
    result = run_job(small_model, tmp_path, formats=["gguf", "merged"], bits=4, symmetric=symmetric, group_size=64)
    assert any("offsets" in warning for warning in result.report.warnings) is not symmetric
    found = load(tmp_path, result).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(
        tmp_path / result.checkpoints["merged"]
    ).named_parameters():
        if symmetric:
            assert torch.equal(found[name].bfloat16(), tensor), name
        else:
            assert (found[name] - tensor.float()).abs().max() <= 2**-8 * tensor.float().abs().max(), name


def test_a_tensor_that_quantization_changed_takes_the_place_of_the_source_s(small_model: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(small_model)
    file = open_writer(tmp_path / "out", ExportFormat.GGUF, source)
    name = "model.layers.1.post_attention_layernorm.weight"
    file.add_tensor(name, source.read(name) * 2)
    weight = random_result((64, 64), scheme(4, 32, True), torch.float16)
    file.add_linear("model.layers.0.self_attn.o_proj", weight)
    file.finish()
    stored = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert torch.equal(stored["blk.1.ffn_norm.weight"], source.read(name).float() * 2)
    assert torch.equal(stored["output_norm.weight"], source.read("model.norm.weight").float())
    assert not list((tmp_path / "out").glob("*.partial"))


def test_numbers_and_tokenizer_are_in_the_file(small_model: Path, tmp_path: Path) -> None:
    result = run_job(small_model, tmp_path, formats=["gguf"], modules={"overrides": {"*.down_proj": {"bits": 8}}})
    fields = {name: field.contents() for name, field in reader(tmp_path, result).fields.items()}
    assert fields["general.architecture"] == "llama"
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (4, 2)
    assert (fields["llama.context_length"], fields["llama.rope.freq_base"]) == (256, 10_000)
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert "message['role']" in fields["tokenizer.chat_template"]
    assert [fields["tokenizer.ggml.token_type"][index] for index in (0, 1, 2)] == [3, 3, 1]
    kinds = {t.name: t.tensor_type.name for t in reader(tmp_path, result).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("Q8_0", "Q4_0")
    assert (kinds["token_embd.weight"], kinds["output.weight"], kinds["output_norm.weight"]) == ("BF16", "BF16", "F32")
    folder = tmp_path / result.checkpoints["gguf"]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    assert tokenizer(TEXT).input_ids == AutoTokenizer.from_pretrained(small_model)(TEXT).input_ids
    assert {file.name for file in folder.iterdir()} == {"model.gguf", "README.md", *REPORTS}


def test_the_lines_of_the_card_load_the_file(small_model: Path, tmp_path: Path) -> None:
    result = run_job(small_model, tmp_path, formats=["gguf"])
    folder = tmp_path / result.checkpoints["gguf"]
    card = (folder / "README.md").read_text()
    assert "llama-cli -m path/to/this/folder/model.gguf" in card
    (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    file = tmp_path / "card.py"
    file.write_text(block.replace("path/to/this/folder", str(folder)))
    names = runpy.run_path(str(file))
    expected = load(tmp_path, result).state_dict()
    for name, tensor in names["model"].state_dict().items():
        assert torch.allclose(tensor.float(), expected[name], rtol=2**-8), name
    assert names["tokenizer"](TEXT).input_ids == AutoTokenizer.from_pretrained(small_model)(TEXT).input_ids


def test_a_quantized_head_and_ignored_linears_are_stored_as_they_are(small_model: Path, tmp_path: Path) -> None:
    modules = {"ignore": ["model.layers.0.*"]}
    result = run_job(small_model, tmp_path, formats=["gguf", "merged"], modules=modules)
    kinds = {t.name: t.tensor_type.name for t in reader(tmp_path, result).tensors}
    assert (kinds["output.weight"], kinds["blk.0.attn_q.weight"], kinds["blk.1.attn_q.weight"]) == (
        "Q4_0",
        "BF16",
        "Q4_0",
    )
    found = load(tmp_path, result).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(
        tmp_path / result.checkpoints["merged"]
    ).named_parameters():
        assert torch.equal(found[name].bfloat16(), tensor), name


def test_llama_3_s_rotary_scaling_is_a_tensor_of_factors(small_model: Path, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    source = random_checkpoint(tmp_path / "source", small_model, "llama", rope_parameters=rope)
    result = run_job(source, tmp_path, formats=["gguf"])
    factors = {t.name: t.data for t in reader(tmp_path, result).tensors}["rope_freqs.weight"]
    scaled = LlamaRotaryEmbedding(AutoConfig.from_pretrained(source)).inv_freq
    plain = 1 / 10_000 ** (torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / torch.from_numpy(factors.copy()), scaled, rtol=1e-5)
    assert len({round(float(factor), 3) for factor in factors}) > 2


@pytest.mark.parametrize(
    ("model_type", "config", "words"),
    [
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "type dynamic"),
        ("llama", {"intermediate_size": 80}, "down_proj has 80 inputs"),
    ],
)
def test_a_model_that_it_cannot_hold_is_refused_before_anything_is_computed(
    model_type: str, config: dict[str, Any], words: str, small_model: Path, tmp_path: Path
) -> None:
    source = random_checkpoint(tmp_path / "source", small_model, model_type, **config)
    with pytest.raises(FormatCannotHold, match=words):
        run_job(source, tmp_path, formats=["gguf"], group_size=-1)
    assert not list((tmp_path / "state").glob("*.safetensors"))


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False}
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")


def split_by(pattern: str) -> list[dict[str, Any]]:
    return [SPLIT | {"pattern": {"Regex": pattern}}, BYTE_LEVEL | {"use_regex": False}]


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ([BYTE_LEVEL], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, BYTE_LEVEL], "smollm"),
        (split_by(LLAMA_3), "dbrx"),
        (split_by(QWEN), "qwen2"),
        (split_by(r"\p{L}+"), None),
        ([SPLIT | {"pattern": {"Regex": QWEN}, "behavior": "Removed"}, BYTE_LEVEL | {"use_regex": False}], None),
        ([{"type": "Digits", "individual_digits": False}, BYTE_LEVEL], None),
        ([BYTE_LEVEL | {"add_prefix_space": True}], None),
        ([{"type": "Metaspace"}], None),
    ],
)
def test_tokenizers_are_named_or_refused(parts: list[dict[str, Any]], name: str | None) -> None:
    tokenizer = {"model": {"type": "BPE", "vocab": {}}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}
    if name is not None:
        assert pre_name(tokenizer) == name
    else:
        with pytest.raises(FormatCannotHold, match="tokenizer"):
            pre_name(tokenizer)


def test_sentencepiece_and_surplus_tokens_are_refused(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatCannotHold, match="not byte-level BPE"):
        pre_name({"model": {"type": "BPE", "byte_fallback": True}, "pre_tokenizer": None})
    source = random_checkpoint(tmp_path / "source", small_model, "llama")
    found = json.loads((source / "tokenizer.json").read_text())
    found["model"]["vocab"]["surplus"] = 400
    (source / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(FormatCannotHold, match="token id 400, and the model has 400 embeddings"):
        run_job(source, tmp_path, formats=["gguf"])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"formats": ["gguf"], "group_size": 48}, "group_size"),
        ({"formats": ["gguf"], "bits": 6, "symmetric": False}, "bits"),
    ],
)
def test_schemes_that_it_cannot_hold_are_refused_at_once(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        JobRequest.parse({"model": "org/name", "method": "rtn", **body})
    assert [(problem.field, problem.code) for problem in refused.value.errors] == [(field, "format_cannot_hold")]


def test_beside_an_adapter_it_holds_the_base_alone(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    residual_svd.register(monkeypatch)
    spec: dict[str, Any] = {"method": "residual-svd", "base": "affine", "bits": 3}
    result = run_job(small_model, tmp_path, formats=["gguf", "merged", "peft"], **spec)
    found = load(tmp_path, result).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(
        tmp_path / result.checkpoints["merged"]
    ).named_parameters():
        assert torch.equal(found[name].bfloat16(), tensor), name
    assert "quantized base alone" in (tmp_path / result.checkpoints["gguf"] / "README.md").read_text()
    with pytest.raises(InvalidRequest, match='add "peft"'):
        run_job(small_model, tmp_path, formats=["gguf"], **spec)
