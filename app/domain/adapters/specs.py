"""Adapters: what may be trained beside each quantized linear, and what the shape of one says.

The adapters of `AdapterSpec` are one family. With W_hat in R^(O x I), x the input and s a constant,

    y = W_hat x + s * U(B A P(x))      a pair:    A in R^(r' x I/p),  B in R^(O/q x r')
    y = W_hat x + s * U(M P(x))        a single:  M in R^(O/q x I/p)

where P pools p = `pool_in` neighbouring inputs into their mean (or sum), and U repeats each output q = `repeat_out`
times:

    kind            p                    q             form     r'                          paper
    lora            1                    1             pair     r                           QLoRA, 2305.14314
    qa-lora         the group            1             pair     r                           QA-LoRA, 2309.14717
    q-bara          2                    2             pair     2r (as many parameters)     2407.17029 (v2: Q-BLoRA)
    qa-hira         multiple of group    any           single   none                        2407.17029, v1
    qa-blora        multiple of group    2             pair     as many parameters          2407.17029, v2
    bayesian-lora   1                    1             pair     at most r, learned          2406.13046

Everywhere s = alpha / r with the r of the request, "the rank of the LoRA with as many parameters", whatever r' is.
Where p is a multiple of the quantization group, the update is one number for each group of a row, and folds into its
offset.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field

from app.domain.methods.schemes import Spec, without_default
from bitwright.files.delivery import STOCK_PEFT_ADAPTERS

Pooling = Literal["mean", "sum"]
Factor = Annotated[int, Field(strict=True, ge=1, le=65_536)]
RepeatOut = Annotated[Factor, Field(description="Times that each output is repeated; must divide its outputs.")]


LEARNING_RATE = 2e-4
"""QLoRA's: of a pair on all inputs."""
GATE_TRAVEL = 27
"""A gate's learning rate times the steps: what one moves that is pulled one way all the time. It starts 7 from closing,
and is decided after 70 % of the steps, of which a schedule takes some more."""


class AdapterFields(Spec):
    """Fields of every adapter."""

    rank: int = Field(
        default=16,
        strict=True,
        ge=1,
        le=1024,
        description="Rank r of the LoRA that has as many parameters; the report shows the real inner rank.",
    )
    alpha: float = Field(
        default=16.0,
        strict=True,
        gt=0,
        le=65_536,
        allow_inf_nan=False,
        description="The update has the factor alpha / rank, with the request's rank.",
    )
    dropout: float = Field(
        default=0.0,
        strict=True,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="Share of the pooled inputs that a training step drops.",
    )


class PooledFields(AdapterFields):
    pooling: Pooling = Field(
        default="mean",
        description="mean: of a pool's inputs, as the authors' code has it; sum: as QA-LoRA's paper writes it, "
        "which is the same with the factor pool_in.",
    )


class LoRASpec(AdapterFields):
    """LoRA: a pair of low rank. On a NormalFloat base it is QLoRA. Merges in floating point alone."""

    kind: Literal["lora"] = "lora"


class QALoRASpec(PooledFields):
    """QA-LoRA: a pair on inputs that are pooled over the quantization group. Merges into the quantized weight."""

    kind: Literal["qa-lora"] = "qa-lora"


class QBaRASpec(PooledFields):
    """Q-BaRA (Q-BLoRA): pooled inputs and repeated outputs, and the parameters that this saves spent on rank."""

    kind: Literal["q-bara"] = "q-bara"
    pool_in: Factor = Field(default=2, description="Consecutive inputs that are pooled; must divide a linear's inputs.")
    repeat_out: RepeatOut = 2


class QAHiRASpec(PooledFields):
    """QA-HiRA: a single matrix between pooled inputs and repeated outputs. Merges into the quantized weight."""

    kind: Literal["qa-hira"] = "qa-hira"
    pool_in: Factor | None = Field(
        default=None,
        description="A multiple of the group size. null: with repeat_out, for each shape, as near to the parameters of "
        "LoRA as its divisors allow.",
    )
    repeat_out: Factor | None = Field(default=None, description="Times that each output is repeated; null as pool_in.")


class QABLoRASpec(PooledFields):
    """QA-BLoRA: Q-BaRA's pair with QA-HiRA's alignment. Merges into the quantized weight."""

    kind: Literal["qa-blora"] = "qa-blora"
    pool_in: Factor | None = Field(default=None, description="A multiple of the group size; null: the group.")
    repeat_out: RepeatOut = 2


class BayesianLoRASpec(AdapterFields):
    """Bayesian-LoRA: a pair whose rank and bit widths are learned by gates, stored as integers."""

    kind: Literal["bayesian-lora"] = "bayesian-lora"
    penalty: float = Field(
        default=0.1,
        strict=True,
        ge=0,
        le=1000,
        allow_inf_nan=False,
        description="Factor of the expected bit operations, as a share of those of all ranks at 16 bits, in the loss.",
    )
    gate_learning_rate: float = Field(
        default=0.05,
        strict=True,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description=f"Of the gates. Where the request is silent: {GATE_TRAVEL:g} / steps, so that gates can close.",
        json_schema_extra=without_default,
    )


AdapterSpec = Annotated[
    LoRASpec | QALoRASpec | QBaRASpec | QAHiRASpec | QABLoRASpec | BayesianLoRASpec, Field(discriminator="kind")
]
GroupedSpec = LoRASpec | QALoRASpec | QBaRASpec | QAHiRASpec | QABLoRASpec
"""Those that `AdapterShape` says everything of; `app.domain.adapters.shapes` chooses it for a linear."""


@dataclass(frozen=True)
class AdapterShape:
    """An adapter of one linear in the module docstring's letters.

    pool_in, repeat_out   p and q
    rank                  r' of a pair; of a single matrix the most that its update can have
    alpha, nominal_rank   of the factor alpha / r
    """

    in_features: int
    out_features: int
    pool_in: int
    repeat_out: int
    form: Literal["pair", "single"]
    rank: int
    alpha: float
    nominal_rank: int
    pooling: Pooling = "mean"

    @property
    def pooled(self) -> int:
        """I/p."""
        return self.in_features // self.pool_in

    @property
    def distinct(self) -> int:
        """O/q."""
        return self.out_features // self.repeat_out

    @property
    def scale(self) -> float:
        """Factor on the mean over a pool: s, or s*p where the pool is summed."""
        return self.alpha / self.nominal_rank * (self.pool_in if self.pooling == "sum" else 1)

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        if self.form == "single":
            return self.pooled * self.distinct
        return self.rank * (self.pooled + self.distinct)

    @property
    def flops_per_token(self) -> int:
        """Multiplications and additions of a forward pass, pooling included; the sum with the base's output is not."""
        return 2 * self.parameters + (self.in_features if self.pool_in > 1 else 0)

    @property
    def update_rank(self) -> int:
        """The most that the rank of the update can be."""
        return min(self.rank, self.pooled, self.distinct)


@dataclass(frozen=True)
class AdapterInfo:
    """A kind of adapter in /v1/methods.

    merges_quantized   whether it folds into the offsets of an affine base, exactly
    learning_rate      where the request is silent: QLoRA's for a plain pair; a mean over a group is so much smaller
                       than an input that it wants a multiple (docs/results.md; qa-blora has that of qa-lora)
    """

    spec: type[AdapterFields]
    title: str
    summary: str
    paper: str
    merges_quantized: bool
    learning_rate: float = LEARNING_RATE

    @property
    def stock_peft(self) -> bool:
        """True if its factors are a LoRA that stock peft loads."""
        return self.spec.model_fields["kind"].default in STOCK_PEFT_ADAPTERS


ADAPTERS: MappingProxyType[str, AdapterInfo] = MappingProxyType(
    {
        "lora": AdapterInfo(LoRASpec, "LoRA", "A pair of low rank beside each linear.", "2305.14314", False),
        "qa-lora": AdapterInfo(
            QALoRASpec,
            "QA-LoRA",
            "A pair on inputs pooled over the quantization group.",
            "2309.14717",
            True,
            learning_rate=1.6e-3,
        ),
        "q-bara": AdapterInfo(
            QBaRASpec,
            "Q-BaRA (Q-BLoRA)",
            "Inputs pooled, outputs repeated, and twice the rank for the same parameters.",
            "2407.17029",
            False,
            learning_rate=4e-4,
        ),
        "qa-hira": AdapterInfo(
            QAHiRASpec,
            "QA-HiRA",
            "One matrix without a bottleneck, constant on tiles that are aligned with the groups.",
            "2407.17029",
            True,
            learning_rate=3.2e-3,
        ),
        "qa-blora": AdapterInfo(
            QABLoRASpec,
            "QA-BLoRA",
            "Q-BaRA's pair, aligned with the groups.",
            "2407.17029",
            True,
            learning_rate=1.6e-3,
        ),
        "bayesian-lora": AdapterInfo(
            BayesianLoRASpec,
            "Bayesian-LoRA",
            "A pair whose rank and widths are learned by gates, stored as integers.",
            "2406.13046",
            False,
        ),
    }
)
