"""Rules of what each format holds of a model, and the facts of the formats as literals."""

from typing import Any

import pytest

from app.domain.format_rules import (
    KEPT,
    default_for,
    default_formats,
    format_problems,
    model_problems,
    rounds_offsets,
    stored_formats,
)
from app.domain.formats import FORMATS, ExportFormat, LowRankRule, Offsets, Result, ScaleDtype
from app.domain.methods import Form, RTNSpec

CT, GGUF, MERGED, NATIVE, PEFT = (
    ExportFormat(name) for name in ("compressed-tensors", "gguf", "merged", "native", "peft")
)
LLAMA: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 64}
AFFINE, WEIGHTS = frozenset({Form.AFFINE}), frozenset({Form.AFFINE, Form.CODEBOOK, Form.FLOAT, Form.BLOCKS})
LLAMA_CPP = frozenset({Form.AFFINE, Form.BLOCKS})


@pytest.mark.parametrize("inputs", [16, 31, 33, 48, 80, 1000])
def test_gguf_holds_rows_of_whole_blocks_of_32(inputs: int) -> None:
    linears = {"model.layers.0.mlp.up_proj": 64, "model.layers.0.mlp.down_proj": inputs, "model.layers.1.x": inputs}
    (problem,) = model_problems((NATIVE, GGUF), "llama", linears, LLAMA)
    assert (problem.field, problem.code, problem.value) == ("formats.1", "format_cannot_hold", "gguf")
    told = f"whole blocks of 32; model.layers.0.mlp.down_proj has {inputs} inputs: add it to modules.ignore"
    assert told in problem.detail
    others = (NATIVE, CT, MERGED, PEFT)
    assert model_problems(others, "llama", linears, LLAMA) == []


@pytest.mark.parametrize("inputs", [32, 64, 96, 4096])
def test_gguf_holds_every_multiple_of_32(inputs: int) -> None:
    assert model_problems((GGUF,), "llama", {"a": inputs}, LLAMA) == []


def test_gguf_is_written_for_some_architectures_and_the_others_for_all() -> None:
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        assert model_problems((GGUF,), model_type, {"a": 32}) == []
    (problem,) = model_problems((GGUF,), "gemma3_text", {"a": 32})
    assert problem.detail == "gguf is written for llama, mistral, qwen2, qwen3, not for gemma3_text"
    assert model_problems((NATIVE, CT, MERGED, PEFT), "gemma3_text", {"a": 33}) == []


@pytest.mark.parametrize(
    ("group", "held"), [(32, True), (64, True), (96, True), (-1, True), (16, False), (48, False), (1, False)]
)
def test_gguf_holds_groups_of_multiples_of_32_or_rows(group: int, held: bool) -> None:
    found = format_problems(RTNSpec(group_size=group), (GGUF,))
    assert [problem.field for problem in found] == ([] if held else ["quantization.group_size"])
    assert format_problems(RTNSpec(group_size=group), (NATIVE, CT, MERGED)) == []


def test_formats_with_other_scales_are_no_job_together() -> None:
    (problem,) = format_problems(RTNSpec(), (NATIVE, CT, MERGED, GGUF))
    assert (problem.field, problem.code) == ("formats.3", "format_cannot_hold")
    assert "gguf stores scales as float16, compressed-tensors as the model's dtype" in problem.detail
    assert format_problems(RTNSpec(), (NATIVE, GGUF, MERGED)) == []
    assert [problem.field for problem in format_problems(RTNSpec(), (GGUF, CT))] == ["formats.1"]


def test_every_job_keeps_native_and_gguf_alone_rounds_offsets() -> None:
    assert stored_formats([]) == (NATIVE,)
    assert stored_formats([CT, GGUF, CT]) == (CT, GGUF, NATIVE)
    assert stored_formats([NATIVE, CT]) == (NATIVE, CT)
    assert KEPT == "native"
    assert rounds_offsets(ExportFormat) == (GGUF,)


def test_types_by_name_are_gguf_s_and_what_holds_any_numbers() -> None:
    for name in ("q2_k", "q4_k", "iq3_s", "q8_0"):
        spec = RTNSpec.model_validate({"scheme": name})
        assert format_problems(spec, (GGUF, NATIVE, MERGED)) == []
        assert default_formats(spec) == (GGUF,)
        (problem,) = format_problems(spec, (CT,))
        assert (problem.field, problem.code) == ("quantization.scheme", "format_cannot_hold")
        assert '"gguf"' in problem.detail
    (problem,) = format_problems(RTNSpec.model_validate({"scheme": "nvfp4"}), (GGUF,))
    assert problem.field == "quantization.scheme"


def test_the_format_of_each_result() -> None:
    assert {result: default_for(result) for result in Result} == {
        Result.AFFINE: CT,
        Result.CODEBOOK: MERGED,
        Result.BLOCKS: GGUF,
        Result.OFFSETS: NATIVE,
        Result.SUMS: MERGED,
        Result.FACTORS: PEFT,
    }


@pytest.mark.parametrize(
    ("name", "kinds", "low_rank", "scales", "offsets", "dense", "library", "files"),
    [
        (NATIVE, WEIGHTS, LowRankRule.KEEPS, ScaleDtype.ANY, Offsets.EXACT, False, "bitwright", "*.safetensors"),
        (CT, AFFINE, LowRankRule.BESIDE, ScaleDtype.MODEL, Offsets.NONE, False, "transformers", "*.safetensors"),
        (MERGED, WEIGHTS, LowRankRule.MERGES, ScaleDtype.ANY, Offsets.EXACT, True, "transformers", "*.safetensors"),
        (PEFT, WEIGHTS, LowRankRule.IS, ScaleDtype.ANY, Offsets.NONE, False, "peft", "*.safetensors"),
        (GGUF, LLAMA_CPP, LowRankRule.BESIDE, ScaleDtype.FLOAT16, Offsets.FLOAT16, False, "gguf", "*.gguf"),
    ],
)
def test_the_facts_of_a_format(
    name: ExportFormat,
    kinds: frozenset[Form],
    low_rank: LowRankRule,
    scales: ScaleDtype,
    offsets: Offsets,
    dense: bool,
    library: str,
    files: str,
) -> None:
    info = FORMATS[name]
    assert (info.kinds, info.low_rank, info.scales, info.offsets) == (kinds, low_rank, scales, offsets)
    assert (info.dense, info.library, info.weight_files) == (dense, library, (files,))
    assert info.bits == {2, 3, 4, 5, 6, 7, 8}
    assert info.symmetries == {True, False}
    assert info.asymmetric_bits == ({2, 3, 4, 5} if name is GGUF else None)
    assert info.group_multiple == (32 if name is GGUF else 1)
    assert info.always_kept is (name is NATIVE)
    assert (info.is_adapter, info.holds_factors) == (name is PEFT, name is NATIVE)
    assert info.holds_sums is (name in {NATIVE, MERGED})
