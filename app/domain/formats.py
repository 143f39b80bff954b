"""Export formats: what each can hold, and which runtime loads it. The method x format x bits table is this data.

A runtime is `tested` where a test or benchmark of this repository loads the artifact in it, else `by_rules`: the
runtime's own published limits, which a test encodes.
"""

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from app.domain.errors import FieldProblem
from app.domain.methods import METHODS, PER_CHANNEL, Scheme, WeightSpec


class ExportFormat(StrEnum):
    NATIVE = "native"
    COMPRESSED_TENSORS = "compressed-tensors"


class Support(StrEnum):
    TESTED = "tested"
    BY_RULES = "by_rules"


@dataclass(frozen=True)
class RuntimeSupport:
    """A runtime that loads a format, for which schemes, and how we know."""

    runtime: str
    support: Support
    bits: frozenset[int]
    group_sizes: frozenset[int] | None = None
    """None: any group size."""
    asymmetric_bits: frozenset[int] | None = None
    """Widths that it loads with zero points; None: all of `bits`."""
    note: str = ""

    def loads(self, scheme: Scheme) -> bool:
        """Whether a linear in this scheme is within the runtime's limits."""
        bits = self.bits if scheme.symmetric or self.asymmetric_bits is None else self.asymmetric_bits
        return scheme.bits in bits and (self.group_sizes is None or scheme.group_size in self.group_sizes)


@dataclass(frozen=True)
class FormatInfo:
    """What /v1/formats tells of a format."""

    title: str
    summary: str
    kinds: frozenset[str]
    bits: frozenset[int]
    symmetries: frozenset[bool]
    runtimes: tuple[RuntimeSupport, ...]


FORMATS: MappingProxyType[ExportFormat, FormatInfo] = MappingProxyType(
    {
        ExportFormat.NATIVE: FormatInfo(
            title="Native",
            summary="Codes, scales and zero points as safetensors with a one-file loader; kept by every job.",
            kinds=frozenset({"affine"}),
            bits=frozenset(range(2, 9)),
            symmetries=frozenset({True, False}),
            runtimes=(
                RuntimeSupport(
                    "transformers", Support.TESTED, frozenset(range(2, 9)), note="through the loader in the artifact"
                ),
            ),
        ),
        ExportFormat.COMPRESSED_TENSORS: FormatInfo(
            title="compressed-tensors (pack-quantized)",
            summary="The format of llm-compressor; loads with from_pretrained and in vLLM.",
            kinds=frozenset({"affine"}),
            bits=frozenset({2, 3, 4, 8}),
            symmetries=frozenset({True, False}),
            runtimes=(
                RuntimeSupport(
                    "transformers",
                    Support.TESTED,
                    frozenset({2, 3, 4, 8}),
                    note="from_pretrained; mixed widths with zero points through the loader in the artifact",
                ),
                RuntimeSupport(
                    "peft",
                    Support.TESTED,
                    frozenset({2, 3, 4, 8}),
                    note="LoRA on a model loaded with CompressedTensorsConfig(run_compressed=False); the model card "
                    "has the lines for mixed widths",
                ),
                RuntimeSupport(
                    "vllm",
                    Support.BY_RULES,
                    frozenset({4, 8}),
                    group_sizes=frozenset({PER_CHANNEL, 32, 64, 128}),
                    asymmetric_bits=frozenset({4}),
                    note="one scheme for q, k, v and one for gate, up; inputs of a linear divisible by the group on "
                    "every tensor-parallel rank",
                ),
            ),
        ),
    }
)


def format_problems(spec: WeightSpec, formats: tuple[ExportFormat, ...]) -> list[FieldProblem]:
    """Everything in `spec` that one of `formats` cannot hold, overrides included."""
    method = spec.model_dump()["method"]
    produces = METHODS[method].produces
    problems = []
    for index, name in enumerate(formats):
        info = FORMATS[name]
        if produces not in info.kinds:
            able = ", ".join(sorted(f.value for f, i in FORMATS.items() if produces in i.kinds))
            detail = f"{name.value} cannot hold the {produces} weights of {method}; formats that can: {able}"
            problems.append(
                FieldProblem(field=f"formats.{index}", code="format_cannot_hold", detail=detail, value=name)
            )
        for pattern, scheme in spec.schemes().items():
            problems += _scheme_problems(name, info, pattern, scheme)
    return problems


def _scheme_problems(name: ExportFormat, info: FormatInfo, pattern: str, scheme: Scheme) -> list[FieldProblem]:
    where = f"quantization.modules.overrides.{pattern}." if pattern else "quantization."
    problems = []
    if scheme.bits not in info.bits:
        widths = ", ".join(map(str, sorted(info.bits)))
        detail = f'{name.value} holds {widths} bits, not {scheme.bits}; change bits, or ask for formats: ["native"]'
        problems.append(FieldProblem(field=where + "bits", code="format_cannot_hold", detail=detail, value=scheme.bits))
    if scheme.symmetric not in info.symmetries:
        word = "symmetric" if scheme.symmetric else "asymmetric"
        detail = f"{name.value} cannot hold {word} weights; set symmetric to {str(not scheme.symmetric).lower()}"
        problems.append(
            FieldProblem(field=where + "symmetric", code="format_cannot_hold", detail=detail, value=scheme.symmetric)
        )
    return problems
