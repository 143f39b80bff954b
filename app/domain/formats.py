"""Export formats: one row per format, with every fact of it that code outside the format's own file asks for.

A format is its row here and its file in `workers/formats` (docs/adding-a-format.md). What a job's formats hold together
is decided by `app.domain.format_rules`.

Where a method makes low-rank factors beside its quantized weights, formats fall into four kinds (`LowRankRule`). The
rule that joins them: with an adapter's format (`peft`) among a job's formats, every other format but `native` holds the
base alone, and that checkpoint is the adapter that belongs to it; without it, the factors must be in the checkpoint.
"""

from enum import StrEnum
from types import MappingProxyType

from app.domain import packed_formats
from app.domain.format_info import (
    PEFT_PACKAGE,
    TRANSFORMERS,
    VLLM,
    VLLM_CPU,
    VLLM_FUSED,
    EmbeddingRule,
    FormatInfo,
    LowRankRule,
    Offsets,
    Result,
    ScaleDtype,
)
from app.domain.gguf.architectures import ARCHITECTURES as GGUF_ARCHITECTURES
from app.domain.gguf.architectures import RELEASE as LLAMA_CPP_RELEASE
from app.domain.gguf.architectures import WRAPPERS as GGUF_WRAPPERS
from app.domain.gguf.rules import gguf_refusals
from app.domain.methods import ALL_SCHEMES, BLOCK_SCHEMES, MAX_BITS, MIN_BITS, PRESET_SCHEMES, Form, SchemeName
from app.domain.runtimes import Runtime, RuntimeSupport, Support, WidthsSince

__all__ = [
    "ALL_BITS",
    "DENSE_WORDS",
    "FORMATS",
    "STRADDLING_BITS",
    "VLLM_CPU",
    "VLLM_FUSED",
    "WEIGHT_FORMS",
    "EmbeddingRule",
    "ExportFormat",
    "FormatInfo",
    "LowRankRule",
    "Offsets",
    "Result",
    "ScaleDtype",
]

ALL_BITS = frozenset(range(MIN_BITS, MAX_BITS + 1))
STRADDLING_BITS = frozenset({3, 5, 6, 7})
"""Widths of which no whole number fills a word of 32 bits."""

DENSE_WORDS = WidthsSince("0.18.0", STRADDLING_BITS)
"""Of the package compressed-tensors: since 0.18 it packs these widths without gaps, as we and vLLM do. Earlier releases
left bits of each word empty, and refuse the dense tensors by their shape."""

WEIGHT_FORMS = frozenset({Form.AFFINE, Form.CODEBOOK, Form.FLOAT, Form.BLOCKS})


class ExportFormat(StrEnum):
    """The formats by name; `info` is the row of each."""

    info: FormatInfo
    _value_: str

    NATIVE = (
        "native",
        FormatInfo(
            title="Native",
            summary="What the method made, as safetensors with a one-file loader; kept by every job.",
            kinds=WEIGHT_FORMS,
            low_rank=LowRankRule.KEEPS,
            bits=ALL_BITS,
            symmetries=frozenset({True, False}),
            default_for=frozenset({Result.OFFSETS}),
            offsets=Offsets.EXACT,
            schemes=ALL_SCHEMES,
            embeddings=EmbeddingRule.ANY,
            kv_cache=True,
            always_kept=True,
            weight_files=("weights*.safetensors",),
            read_by=(Runtime.TRANSFORMERS,),
            library="bitwright",
            runtimes=(
                RuntimeSupport(
                    "transformers",
                    Support.TESTED,
                    ALL_BITS,
                    note="through the loader in the artifact",
                    version=TRANSFORMERS,
                    schemes=ALL_SCHEMES,
                ),
            ),
        ),
    )
    COMPRESSED_TENSORS = (
        "compressed-tensors",
        FormatInfo(
            title="compressed-tensors",
            summary="The format of llm-compressor, of integers, FP8, NVFP4 and MX; loads with from_pretrained and in "
            "vLLM.",
            kinds=frozenset({Form.AFFINE, Form.FLOAT}),
            low_rank=LowRankRule.BESIDE,
            bits=ALL_BITS,
            symmetries=frozenset({True, False}),
            scales=ScaleDtype.MODEL,
            default_for=frozenset({Result.AFFINE}),
            schemes=PRESET_SCHEMES,
            kv_cache=True,
            embeddings=EmbeddingRule.UNIFORM,
            read_by=(Runtime.TRANSFORMERS, Runtime.VLLM),
            runtimes=(
                RuntimeSupport(
                    "transformers",
                    Support.TESTED,
                    ALL_BITS,
                    note="from_pretrained, with compressed-tensors 0.18 or newer for 3, 5, 6 and 7 bits; mixed widths "
                    "with zero points through the loader in the artifact; NVFP4 and MX in bfloat16; inputs are rounded "
                    "where the scheme has activations",
                    version=TRANSFORMERS,
                    schemes=PRESET_SCHEMES,
                ),
                RuntimeSupport(
                    "peft",
                    Support.TESTED,
                    ALL_BITS,
                    note="LoRA on a model loaded with CompressedTensorsConfig(dequantize=True); the model card has the "
                    "lines for mixed widths",
                    version=PEFT_PACKAGE,
                    schemes=PRESET_SCHEMES,
                ),
                RuntimeSupport(
                    "vllm",
                    Support.BY_RULES,
                    ALL_BITS,
                    note="one scheme for q, k, v and one for gate, up; inputs of a linear divisible by the group on "
                    "every tensor-parallel rank; zero points of a linear in whole words of 32 bits; not with "
                    "VLLM_BATCH_INVARIANT at 3, 5, 6 and 7 bits; FP8 in weights alone below 8.9; MXFP4 from 8.0 on; "
                    "NVFP4 and MXFP4 round inputs on Blackwell and are weights alone elsewhere; fp8-block: all fused "
                    "linears but the last in whole blocks of 128 outputs",
                    version=VLLM,
                    devices="NVIDIA GPUs of compute capability 7.5 or newer",
                    smallest_group=16,
                    embeddings=frozenset({2, 4, 8}),
                    fused=VLLM_FUSED,
                    since=(
                        WidthsSince("0.25.0", ALL_BITS - {4, 8}, frozenset({True})),
                        WidthsSince("0.31.0", ALL_BITS - {4, 8}, frozenset({False})),
                    ),
                    schemes=PRESET_SCHEMES,
                ),
                RuntimeSupport(
                    "vllm",
                    Support.TESTED,
                    frozenset({4}),
                    note="the same for fused linears; inputs and outputs in multiples of 32",
                    version=VLLM_CPU,
                    devices="CPUs",
                    group_multiple=2,
                    embeddings=frozenset(),
                    fused=VLLM_FUSED,
                    schemes=frozenset({SchemeName.FP8, SchemeName.INT8}),
                ),
            ),
        ),
    )
    MERGED = (
        "merged",
        FormatInfo(
            title="Merged (the model's own floating point)",
            summary="An ordinary checkpoint of the dequantized weights, as large as the original.",
            kinds=WEIGHT_FORMS,
            low_rank=LowRankRule.MERGES,
            bits=ALL_BITS,
            symmetries=frozenset({True, False}),
            default_for=frozenset({Result.CODEBOOK, Result.SUMS}),
            offsets=Offsets.EXACT,
            schemes=ALL_SCHEMES,
            embeddings=EmbeddingRule.ANY,
            dense=True,
            read_by=(Runtime.TRANSFORMERS, Runtime.VLLM),
            runtimes=(
                RuntimeSupport(
                    "transformers",
                    Support.TESTED,
                    ALL_BITS,
                    note="from_pretrained",
                    version=TRANSFORMERS,
                    schemes=ALL_SCHEMES,
                ),
                RuntimeSupport(
                    "vllm", Support.TESTED, ALL_BITS, note="as the original", version=VLLM_CPU, schemes=ALL_SCHEMES
                ),
            ),
        ),
    )
    PEFT = (
        "peft",
        FormatInfo(
            title="PEFT adapter",
            summary="The low-rank factors as a LoRA, for the base that `merged` or `compressed-tensors` of the same "
            "job holds, or `native` gives.",
            kinds=WEIGHT_FORMS,
            low_rank=LowRankRule.IS,
            bits=ALL_BITS,
            symmetries=frozenset({True, False}),
            default_for=frozenset({Result.FACTORS}),
            schemes=ALL_SCHEMES,
            embeddings=EmbeddingRule.ANY,
            read_by=(Runtime.PEFT, Runtime.VLLM),
            library="peft",
            runtimes=(
                RuntimeSupport(
                    "peft",
                    Support.TESTED,
                    ALL_BITS,
                    note="PeftModel.from_pretrained on that base; training starts at the calibrated point",
                    version=PEFT_PACKAGE,
                ),
                RuntimeSupport(
                    "vllm",
                    Support.TESTED,
                    ALL_BITS,
                    note="as a LoRA module on that base, within the base's own limits and `--max-lora-rank`",
                    version=VLLM_CPU,
                ),
            ),
        ),
    )
    GGUF = (
        "gguf",
        FormatInfo(
            title="GGUF",
            summary="One file for llama.cpp: its types by name (q4_k, ...); of integers, Q4_0 and Q4_1 for 2 to 4 "
            "bits, Q5_0 and Q5_1 for 5, Q8_0 for 6 to 8.",
            kinds=frozenset({Form.AFFINE, Form.BLOCKS}),
            low_rank=LowRankRule.BESIDE,
            bits=ALL_BITS,
            symmetries=frozenset({True, False}),
            scales=ScaleDtype.FLOAT16,
            asymmetric_bits=frozenset({2, 3, 4, 5}),
            group_multiple=32,
            architectures=frozenset({*GGUF_ARCHITECTURES, *GGUF_WRAPPERS}),
            stacks_experts=True,
            known_by=f"llama.cpp {LLAMA_CPP_RELEASE}",
            default_for=frozenset({Result.BLOCKS}),
            offsets=Offsets.FLOAT16,
            embeddings=EmbeddingRule.ANY,
            read_by=(Runtime.LLAMA_CPP,),
            schemes=BLOCK_SCHEMES,
            library="gguf",
            weight_files=("*.gguf",),
            model_check=gguf_refusals,
            runtimes=(
                RuntimeSupport(
                    "transformers",
                    Support.TESTED,
                    ALL_BITS,
                    note="from_pretrained with gguf_file, where transformers makes the same model of it: not with "
                    "Llama 3's rotary scaling, nor with biases; the model card says",
                    version=TRANSFORMERS,
                    schemes=BLOCK_SCHEMES - {SchemeName.Q2_0},
                ),
                RuntimeSupport(
                    "llama.cpp",
                    Support.TESTED,
                    ALL_BITS,
                    note="tokenizers of byte-level BPE, and of BPE with bytes to fall back on (SentencePiece's); text "
                    "that is not normalized to NFC stays so there; a model's vision tower is left to its own converter",
                    version="node-llama-cpp 3.22.1",
                    schemes=BLOCK_SCHEMES,
                ),
            ),
        ),
    )

    GPTQ = ("gptq", packed_formats.GPTQ)
    GPTQ_V2 = ("gptq-v2", packed_formats.GPTQ_V2)
    AWQ = ("awq", packed_formats.AWQ)
    MLX = ("mlx", packed_formats.MLX)
    BITSANDBYTES = ("bitsandbytes", packed_formats.BITSANDBYTES)

    def __new__(cls, name: str, *info: FormatInfo) -> "ExportFormat":
        """A member of that name. `ExportFormat("gguf")` does not come here: it looks the member up."""
        member = str.__new__(cls, name)
        member._value_ = name
        (member.info,) = info
        return member


FORMATS: MappingProxyType[ExportFormat, FormatInfo] = MappingProxyType({name: name.info for name in ExportFormat})
