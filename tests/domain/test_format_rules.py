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
from app.domain.methods import Form, NormalFloatSpec, RTNSpec, WeightSpec
from app.domain.methods.schemes import ModuleRules, SchemeOverride

CT, GGUF, MERGED, NATIVE, PEFT = (
    ExportFormat(name) for name in ("compressed-tensors", "gguf", "merged", "native", "peft")
)
GPTQ, GPTQ_V2, AWQ, MLX, BITSANDBYTES = (
    ExportFormat(name) for name in ("gptq", "gptq-v2", "awq", "mlx", "bitsandbytes")
)
LLAMA: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 64}
AFFINE, WEIGHTS = frozenset({Form.AFFINE}), frozenset({Form.AFFINE, Form.CODEBOOK, Form.FLOAT, Form.BLOCKS})
PACKED = AFFINE | {Form.FLOAT}
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
    (problem,) = model_problems((GGUF,), "zaya", {"a": 32})
    assert problem.detail == "gguf is written for the model types that llama.cpp v0.5.0 knows, and zaya is none of them"
    assert model_problems((NATIVE, CT, MERGED, PEFT), "zaya", {"a": 33}) == []


@pytest.mark.parametrize(
    ("group", "held"), [(32, True), (64, True), (96, True), (-1, True), (16, False), (48, False), (1, False)]
)
def test_gguf_holds_groups_of_multiples_of_32_or_rows(group: int, held: bool) -> None:
    found = format_problems(RTNSpec(group_size=group), (GGUF,))
    assert [problem.field for problem in found] == ([] if held else ["quantization.group_size"])
    assert format_problems(RTNSpec(group_size=group), (NATIVE, CT, MERGED)) == []


def test_formats_of_any_scales_come_from_one_job() -> None:
    assert format_problems(RTNSpec(), (NATIVE, CT, MERGED, GGUF, GPTQ, GPTQ_V2, AWQ, MLX)) == []


@pytest.mark.parametrize(
    ("spec", "name", "field", "words"),
    [
        (RTNSpec(symmetric=False), GPTQ, "symmetric", 'or ["gptq-v2"] or ["awq"] or ["mlx"] or ["native"]'),
        (RTNSpec(bits=5), GPTQ, "bits", "gptq holds 2, 3, 4, 8 bits, not 5; change bits, or ask for"),
        (RTNSpec(bits=3), AWQ, "bits", "awq holds 4 bits, not 3; change bits, or ask for formats: "),
        (RTNSpec(group_size=256), MLX, "group_size", "mlx holds groups of 32, 64, 128, not 256; change group_size"),
        (RTNSpec(bits=8, symmetric=False), MLX, "bits", "asymmetric weights of 2, 3, 4, 5, 6 bits, not 8"),
        (NormalFloatSpec(bits=3), BITSANDBYTES, "bits", "bitsandbytes holds 4 bits, not 3; change bits, or ask for"),
        (
            NormalFloatSpec(group_size=-1),
            BITSANDBYTES,
            "group_size",
            'not -1; change group_size, or ask for formats: ["native"]',
        ),
    ],
)
def test_packed_formats_refuse_schemes_with_the_formats_that_hold_them(
    spec: WeightSpec, name: ExportFormat, field: str, words: str
) -> None:
    (problem,) = format_problems(spec, (NATIVE, name))
    assert (problem.field, problem.code) == (f"quantization.{field}", "format_cannot_hold")
    assert words in problem.detail
    assert problem.detail.endswith('["native"]')


def test_awq_holds_one_scheme_for_the_whole_model() -> None:
    rules = ModuleRules(overrides={"*q_proj": SchemeOverride(group_size=32)})
    (problem,) = format_problems(RTNSpec(modules=rules), (CT, AWQ, GPTQ, MLX))
    assert (problem.field, problem.code) == ("formats.1", "format_cannot_hold")
    assert "one scheme for all linears of a model, and these have 2" in problem.detail
    assert '["awq"]' not in problem.detail


@pytest.mark.parametrize("name", [GPTQ, GPTQ_V2, AWQ])
def test_words_are_filled_by_outputs(name: ExportFormat) -> None:
    (problem,) = model_problems((name,), "llama", {"a.up": 64, "a.down": 64}, outputs={"a.up": 64, "a.down": 40})
    assert "a.down has 40 outputs: add it to modules.ignore" in problem.detail
    assert model_problems((CT, MLX), "llama", {"a.down": 64}, outputs={"a.down": 40}) == []


def test_mlx_is_for_what_mlx_lm_builds() -> None:
    (problem,) = model_problems((MLX,), "bloom", {}, {"model_type": "bloom"})
    assert "mlx-lm 0.32.2 has no file for model_type 'bloom'" in problem.detail
    assert model_problems((MLX,), "llama", {"a": 64}, LLAMA) == []


def test_packed_formats_share_the_refusals_of_a_type() -> None:
    """Experts of gpt-oss are one tensor in its files, which no loader puts together from packed ones."""
    for name in (GPTQ, GPTQ_V2, AWQ, MLX, BITSANDBYTES):
        (problem,) = model_problems((name,), "gpt_oss", {"a": 64})
        assert problem.detail.startswith(f"{name.value}: experts of this type are fused")


def test_every_job_keeps_native_and_gguf_and_mlx_round_offsets() -> None:
    assert stored_formats([]) == (NATIVE,)
    assert stored_formats([CT, GGUF, CT]) == (CT, GGUF, NATIVE)
    assert stored_formats([NATIVE, CT]) == (NATIVE, CT)
    assert KEPT == "native"
    assert rounds_offsets(ExportFormat) == (GGUF, MLX)


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
        (NATIVE, WEIGHTS, LowRankRule.KEEPS, ScaleDtype.ANY, Offsets.EXACT, False, "bitwright", "weights*.safetensors"),
        (CT, PACKED, LowRankRule.BESIDE, ScaleDtype.MODEL, Offsets.NONE, False, "transformers", "*.safetensors"),
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
