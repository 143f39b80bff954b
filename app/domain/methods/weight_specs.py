"""Frozen specs: the parameters that every weight quantizer has, and the methods that make quantized weights alone."""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from app.domain.methods.budgets import BitBudget, Candidate, Width
from app.domain.methods.named_schemes import ALL_SCHEMES, BLOCK_SCHEMES, SchemeName
from app.domain.methods.schemes import (
    INTEGER_FIELDS,
    GroupSize,
    ModuleRules,
    Scheme,
    SchemeOverride,
    Spec,
    Symmetric,
    fits,
)
from bitwright.formats import Form

ANY_SHARE = 840
"""A batch that any number of devices up to 8 divides: of methods that sum over all sequences at once."""
SCALE_BATCH_SIZE = 4
"""Sequences of a step that tunes scales end to end."""

PresetName = Literal["light", "default", "best"]
Steps = Annotated[int, Field(strict=True, ge=0, le=20_000)]
BatchSize = Annotated[int, Field(strict=True, ge=1, le=1024, description="Sequences a step.")]
WeightsOnly = Annotated[
    bool,
    Field(
        strict=True,
        description="Quantize the files' tensors one by one, without building the model: for what no memory holds. "
        "A type that is not accepted is always quantized so. Nothing is evaluated.",
    ),
]
LearningRate = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]


class WeightSpec(Spec):
    """Parameters that every weight quantizer has."""

    bits: Width = 4
    group_size: GroupSize = 64
    symmetric: Symmetric = True
    modules: ModuleRules = ModuleRules()
    method: str = ""
    """The name in a request; each method narrows it to its own."""
    named_schemes: ClassVar[frozenset[SchemeName]] = frozenset()
    """Schemes by name that the method takes."""

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of the linear with this full module name, of a budget the widest; None if it is ignored."""
        if any(fits(name, pattern) for pattern in self.modules.ignore):
            return None
        return self._schemes(o for p, o in self.modules.overrides.items() if fits(name, p))[-1]

    def candidates(self, name: str, in_features: int) -> tuple[Candidate, ...]:  # noqa: ARG002 - for grids
        """Choices of the budget for the linear of that name: one where its width is given; none if ignored."""
        if self.scheme_of(name) is None:
            return ()
        overrides = (o for p, o in self.modules.overrides.items() if fits(name, p))
        return tuple(Candidate(scheme) for scheme in self._schemes(overrides))

    def schemes(self) -> tuple[tuple[str, Scheme], ...]:
        """The default's schemes with the pattern "", and each override's, alone, with its own: of a budget, several."""
        given = {"": (), **{pattern: (override,) for pattern, override in self.modules.overrides.items()}}
        return tuple((pattern, scheme) for pattern, overrides in given.items() for scheme in self._schemes(overrides))

    def _schemes(self, overrides: Iterable[SchemeOverride]) -> list[Scheme]:
        """All that these overrides leave, by rising width."""
        values: dict[str, object] = {"group_size": self.group_size, "symmetric": self.symmetric}
        name = self.default_name()
        for override in overrides:
            given = override.model_dump(exclude_none=True)
            name = override.scheme or (None if given else name)
            values |= given
        if name is not None:
            return [Scheme.named(name)]
        values.pop("scheme", None)
        if "bits" in values:
            return [Scheme.model_validate(values)]
        widths = self.bits.choices if isinstance(self.bits, BitBudget) else (self.bits,)
        return [Scheme.model_validate({"bits": width} | values) for width in widths]

    def default_name(self) -> SchemeName | None:
        """The scheme that the request gives by name; None where it gives numbers of integers."""
        return None

    def budget(self) -> BitBudget | None:
        """The budget, where widths are chosen by it."""
        return self.bits if isinstance(self.bits, BitBudget) else None

    def least_bits(self, name: str, in_features: int) -> float:
        """Bits a weight, scales included, of the cheapest way to store a linear that is not ignored."""
        return min(c.scheme.bits_per_weight(in_features) for c in self.candidates(name, in_features))

    def forms(self) -> frozenset[Form]:
        """Forms that these parameters make of the linears of the blocks."""
        return frozenset(scheme.form for _, scheme in self.schemes())

    def symmetries(self) -> frozenset[bool]:
        """Values of `symmetric` that it takes, of the default and of overrides alike: on a codebook there is no zero
        point. Requests that say another one are refused by the field."""
        return frozenset({True}) if Form.CODEBOOK in self.forms() else frozenset({True, False})

    @model_validator(mode="after")
    def _every_scheme_is_one_of_its_own(self) -> Self:
        """Symmetry is one of `symmetries`, and an override says nothing that the method's own field refuses.

        Raises:
            ValidationError: with the location of each value that is refused.
        """
        refused = [] if self.symmetric in self.symmetries() else [self._symmetry_refusal((), self.symmetric)]
        for pattern, override in self.modules.overrides.items():
            where = ("modules", "overrides", pattern)
            for name, value in override.model_dump(exclude_none=True).items():
                if name == "symmetric":
                    refused += [] if value in self.symmetries() else [self._symmetry_refusal(where, value)]
                    continue
                if name == "scheme":
                    refused += [] if value in self.named_schemes else [self._scheme_refusal(where, value)]
                    continue
                try:
                    type(self).model_validate({name: value})
                except ValidationError as error:
                    for reason in error.errors():
                        if reason["loc"][:1] == (name,):
                            limit = reason["msg"].removeprefix("Input should be ")
                            refused.append(_refusal((*where, name), value, f"{self.method} takes {name} {limit}"))
        if refused:
            raise ValidationError.from_exception_data(type(self).__name__, refused)
        return self

    def _scheme_refusal(self, where: tuple[str, ...], value: object) -> InitErrorDetails:
        known = ", ".join(sorted(self.named_schemes)) or "none by name"
        return _refusal((*where, "scheme"), value, f"{self.method} takes these schemes: {known}; or give bits")

    def _symmetry_refusal(self, where: tuple[str, ...], value: object) -> InitErrorDetails:
        kind = "symmetric" if value else "asymmetric"
        made = "codes of a codebook, which has no zero point" if Form.CODEBOOK in self.forms() else f"no {kind} weights"
        detail = f"must be {str(not value).lower()}: with these parameters {self.method} makes {made}"
        return _refusal((*where, "symmetric"), value, detail)

    def needs_model(self) -> bool:
        """True if the method computes with the model; else tensors of files are enough."""
        return True

    def asks_for_weights_alone(self) -> bool:
        """True if the request wants the model left out, although it could be built."""
        return False

    def factors_rank(self) -> int:
        """Rank of the factors beside each linear; 0: there are none."""
        return 0

    def needs_fisher(self) -> bool:
        """True if the engine measures the loss's squared gradients by the weights before the first block."""
        return False

    def observes_inputs(self) -> bool:
        """True if the method looks at the inputs of the blocks."""
        return True

    def needs_preparation(self) -> bool:
        """True if a budget is spent or Fisher information measured before the first block."""
        return self.budget() is not None or self.needs_fisher()

    def reads_text(self) -> bool:
        """True if the method, its budget or its weighting reads calibration text."""
        return self.observes_inputs() or self.needs_preparation()

    def tuned_sequences(self, num_samples: int) -> int:  # noqa: ARG002 - for methods that tune
        """Sequences that go through a block with gradients when `num_samples` calibrate: what the work is priced by."""
        return 0

    def end_to_end_steps(self) -> int:
        """Steps that tune the scales of the whole model after the last block; 0 leaves that stage out."""
        return 0

    def needs_original_inputs(self) -> bool:
        """True if the method looks at what the original blocks before a block put out, which then is kept: half as much
        memory for activations again."""
        return True

    def shared_batch(self) -> int:
        """Sequences of a step that several GPUs may divide among themselves; 0 if they would gain nothing."""
        return 0


def _refusal(location: tuple[str, ...], value: object, detail: str) -> InitErrorDetails:
    """A refused value, for `ValidationError.from_exception_data`."""
    reason = PydanticCustomError("value_refused", "{error}", {"error": detail})
    return InitErrorDetails(type=reason, loc=location, input=value)


class NormalFloatSpec(WeightSpec):
    """NormalFloat, round to nearest: the base of QLoRA. Looks at the weights alone."""

    method: Literal["nf"] = "nf"
    bits: int = Field(default=4, strict=True, ge=2, le=4, description="Width of a code in bits: NF2, NF3 or NF4.")
    double_quantization: bool = Field(
        default=True,
        strict=True,
        description="Store the groups' largest magnitudes in 8 bits, with one fp32 number for 256 of them: 4.127 bits "
        "a weight in place of 4.25 with groups of 64.",
    )
    weights_only: WeightsOnly = False

    def needs_model(self) -> bool:
        """Weights alone."""
        return False

    def asks_for_weights_alone(self) -> bool:
        """As the request says."""
        return self.weights_only

    def observes_inputs(self) -> bool:
        """Weights alone."""
        return False

    def forms(self) -> frozenset[Form]:
        """Codes of a codebook."""
        return frozenset({Form.CODEBOOK})


class NamedSchemeSpec(WeightSpec):
    """Parameters of a method that takes schemes by name as well as integers."""

    scheme: SchemeName | None = Field(
        default=None, description="A number format by name, in place of bits, group_size and symmetric."
    )
    named_schemes: ClassVar[frozenset[SchemeName]] = ALL_SCHEMES - BLOCK_SCHEMES

    def default_name(self) -> SchemeName | None:
        """The spec's `scheme`."""
        return self.scheme

    @model_validator(mode="after")
    def _scheme_says_all(self) -> Self:
        given = [name for name in INTEGER_FIELDS if name in self.model_fields_set]
        if self.scheme is not None and given:
            detail = f"give scheme, or {' and '.join(given)}, not both: {self.scheme} says all of them"
            refused = [_refusal((name,), getattr(self, name), detail) for name in ("scheme", *given)]
            raise ValidationError.from_exception_data(type(self).__name__, refused)
        if self.scheme is not None and self.scheme not in self.named_schemes:
            refusal = self._scheme_refusal((), self.scheme)
            raise ValidationError.from_exception_data(type(self).__name__, [refusal])
        return self

    @model_serializer(mode="wrap")
    def _without_what_the_name_says(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if self.scheme is None or name not in INTEGER_FIELDS}


class RTNSpec(NamedSchemeSpec):
    """Round to nearest. Looks at the weights alone, but for llama.cpp's types, whose search weighs them by inputs."""

    method: Literal["rtn"] = "rtn"
    weights_only: WeightsOnly = False
    named_schemes: ClassVar[frozenset[SchemeName]] = ALL_SCHEMES

    def needs_model(self) -> bool:
        """A budget is spent by the outputs' errors."""
        return self.budget() is not None

    def asks_for_weights_alone(self) -> bool:
        """As the request says."""
        return self.weights_only

    def observes_inputs(self) -> bool:
        """Calibration text says how much each column of llama.cpp's types matters, unless weights alone are asked for:
        what an imatrix file is to its own quantizer."""
        return Form.BLOCKS in self.forms() and not self.weights_only

    def needs_original_inputs(self) -> bool:
        """Text is for a budget, or for sums of the inputs' squares."""
        return False


class GPTQSpec(WeightSpec):
    """GPTQ: columns rounded in turn, each column's error made up for by those that are not rounded yet."""

    method: Literal["gptq"] = "gptq"
    damping: float = Field(
        default=0.01,
        strict=True,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Added to the Hessian's diagonal, as a share of its mean (percdamp); raised if that is too little.",
    )
    act_order: bool = Field(
        default=True,
        strict=True,
        description="Take columns by falling Hessian diagonal instead of in their order. Groups stay consecutive "
        "columns, with scales from the original weights (static groups).",
    )

    def tuned_sequences(self, num_samples: int) -> int:
        """Cost of Hessians and their factors, in sequences that are tuned on: about one for each that calibrates."""
        return num_samples

    def needs_original_inputs(self) -> bool:
        """Linears are observed in the quantized activations alone."""
        return False

    def shared_batch(self) -> int:
        """Hessians are sums over sequences."""
        return ANY_SHARE


class AWQSpec(WeightSpec):
    """AWQ: columns of large inputs scaled up before rounding, the inverse folded into what comes before them."""

    method: Literal["awq"] = "awq"
    search_samples: int = Field(
        default=32,
        strict=True,
        ge=1,
        le=65_536,
        description="Calibration sequences on which candidate scales are scored; all of them are observed.",
    )
    clip_search: bool = Field(
        default=True,
        strict=True,
        description="Clip the groups' ranges where that lowers the error of their products with the inputs.",
    )
    quantized_inputs: bool = Field(
        default=False,
        strict=True,
        description="Observe what the quantized blocks before a block put out, instead of the original ones.",
    )

    def tuned_sequences(self, num_samples: int) -> int:
        """Cost of the search, in sequences that are tuned on: 20 candidates for each part of a block."""
        return num_samples + 8 * min(self.search_samples, num_samples)

    def needs_original_inputs(self) -> bool:
        """Only in place of the quantized blocks' outputs."""
        return not self.quantized_inputs

    def shared_batch(self) -> int:
        """All that is observed and scored is a sum over sequences."""
        return ANY_SHARE


class SignRoundSpec(WeightSpec):
    """SignRound (AutoRound): rounding offsets and clipping ranges tuned by signed gradient descent, block by block."""

    method: Literal["signround"] = "signround"
    preset: PresetName = Field(
        default="default",
        description="Fills both numbers of steps and the calibration's size where they are not given.",
    )
    steps: Steps = Field(default=200, description="Tuning steps per block; 0 equals RTN.")
    batch_size: BatchSize = 8
    learning_rate: LearningRate | None = Field(
        default=None, description="First step of the linear decay to 0; null means 1/steps."
    )
    scale_search: bool = Field(
        default=True,
        description="Start from the ranges with the least rounding error, weighted by the inputs' second moments, "
        "instead of the groups' full ranges; of no effect with 0 steps.",
    )
    quantized_inputs: bool = Field(
        default=True,
        strict=True,
        description="Feed a block the output of the quantized blocks before it, not of the original ones.",
    )
    scale_steps: Steps = Field(
        default=0,
        description="Steps that tune all scales together against the original model's next-token distribution once "
        "every block is done, codes fixed; 0 leaves that out. Skipped with a warning where the model does not fit.",
    )

    def tuned_sequences(self, num_samples: int) -> int:
        """A batch a step."""
        return self.steps * min(self.batch_size, num_samples)

    def end_to_end_steps(self) -> int:
        """The spec's `scale_steps`."""
        return self.scale_steps

    def needs_original_inputs(self) -> bool:
        """Only in place of the quantized blocks' outputs."""
        return not self.quantized_inputs

    def shared_batch(self) -> int:
        """A step's batch, if there are steps."""
        return self.batch_size if self.steps else 0


class OmniQuantSpec(WeightSpec):
    """OmniQuant's learnable weight clipping: each group's range tuned by AdamW, block by block."""

    method: Literal["omniquant"] = "omniquant"
    preset: PresetName = Field(
        default="default", description="Fills epochs, aug_loss and the calibration's size where they are not given."
    )
    epochs: int = Field(
        default=20,
        strict=True,
        ge=0,
        le=1000,
        description="Passes over the calibration sequences per block; with 0 every range is shrunk to 0.982 of itself.",
    )
    batch_size: BatchSize = 1
    learning_rate: LearningRate = Field(default=5e-3, description="Of every step.")
    aug_loss: bool = Field(
        default=False,
        strict=True,
        description="Also keep close to what the original block makes of the quantized inputs.",
    )

    def tuned_sequences(self, num_samples: int) -> int:
        """Every sequence an epoch."""
        return self.epochs * num_samples

    def needs_original_inputs(self) -> bool:
        """Targets are enough."""
        return False

    def shared_batch(self) -> int:
        """A step's batch, if there are steps."""
        return self.batch_size if self.epochs else 0
