"""Parameters that every weight quantizer has, and ways to say the size: numbers of integers, a name, a goal."""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails

from app.domain.methods.block_presets import UNKNOWN_MODEL, MixFacts
from app.domain.methods.budgets import BitBudget, Candidate, Width
from app.domain.methods.goals import AtMost, Choice, Fits, Goal
from app.domain.methods.mixed_modules import mixed_embeddings, mixed_scheme
from app.domain.methods.named_schemes import ALL_SCHEMES, BLOCK_SCHEMES, BlockPreset, NamedChoice, SchemeName
from app.domain.methods.schemes import (
    HEAD_PATTERN,
    INTEGER_FIELDS,
    AbsmaxScheme,
    GroupSize,
    ModuleRules,
    Scheme,
    SchemeOverride,
    Spec,
    Symmetric,
    fits,
    refusal,
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
    kv_cache: Literal["fp8"] | None = Field(
        default=None,
        description="fp8: measure scales for a runtime's key-value cache in FP8 on calibration text, and store them.",
    )
    method: str = ""
    """The name in a request; each method narrows it to its own."""
    named_schemes: ClassVar[frozenset[SchemeName]] = frozenset()
    """Schemes by name that the method takes."""
    _facts: MixFacts | None = PrivateAttr(default=None)

    def of_model(self, facts: MixFacts) -> Self:
        """The parameters for a model of which mixes of types ask these facts."""
        known = self.model_copy()
        known._facts = facts
        return known

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of the linear with this full module name, of a budget the widest; None if it is ignored."""
        if self.modules.head is not None and fits(name, HEAD_PATTERN):
            return self._outer_scheme(self.modules.head, self.modules.embeddings)
        if any(fits(name, pattern) for pattern in self.modules.ignore):
            return None
        return self._schemes((o for p, o in self.modules.overrides.items() if fits(name, p)), name)[-1]

    def embeddings_scheme(self) -> Scheme | None:
        """The scheme of the matrix of embeddings, of a budget the widest; None if that stays as it is."""
        given = self.modules.embeddings
        if given is not None:
            return self._outer_scheme(given, self.modules.head, embeddings=True)
        return self._schemes(())[-1] if self.chooses_outer() else None

    def head_scheme(self) -> Scheme | None:
        """The scheme of the output head by its own field or as a linear like others; None if neither speaks of it."""
        return self.scheme_of(HEAD_PATTERN)

    def _outer_scheme(self, given: SchemeOverride, other: SchemeOverride | None, *, embeddings: bool = False) -> Scheme:
        """The scheme of a matrix outside the blocks: what it does not say is as in the linears.

        other   of embeddings and head, what is given to the other: where that is the same matrix, it says more than a
                mix does
        """
        if isinstance(given.scheme, BlockPreset):
            facts = self._facts or UNKNOWN_MODEL
            if facts.tied and other is not None and not isinstance(other.scheme, BlockPreset):
                return self._outer_scheme(other, None)
            tied_head = facts.tied or not embeddings
            head = mixed_scheme(given.scheme, facts, HEAD_PATTERN)
            return Scheme.named(head if tied_head else mixed_embeddings(given.scheme, facts))
        if given.scheme is not None:
            return Scheme.named(given.scheme)
        values = {"group_size": self.group_size, "symmetric": self.symmetric} | given.model_dump(exclude_none=True)
        return Scheme.model_validate(values)

    def candidates(self, name: str, in_features: int) -> tuple[Candidate, ...]:
        """Choices for the linear of that name: one where its width is given; those whose groups divide it; none if it
        is ignored."""
        if self.scheme_of(name) is None:
            return ()
        schemes = self._schemes((o for p, o in self.modules.overrides.items() if fits(name, p)), name)
        return _dividing(schemes, in_features)

    def embeddings_candidates(self, width: int) -> tuple[Candidate, ...]:
        """Choices for the matrix of embeddings of so many columns; none where nothing is chosen for it."""
        chosen = self.modules.embeddings is None and self.chooses_outer()
        return _dividing(self._schemes(()), width) if chosen else ()

    def head_candidates(self, width: int) -> tuple[Candidate, ...]:
        """Choices for a head of its own of so many columns; none where nothing is chosen for it."""
        chosen = self.modules.head is None and self.chooses_outer()
        return self.candidates(HEAD_PATTERN, width) if chosen else ()

    def chooses_outer(self) -> bool:
        """True if embeddings and head are among what a budget or goal chooses for, unless fields of their own speak."""
        chosen = self.budget() or self.goal()
        return chosen is not None and chosen.outer

    def schemes(self) -> tuple[tuple[str, Scheme], ...]:
        """The default's schemes with the pattern "", and each override's, alone, with its own: of a budget, several."""
        given = {"": (), **{pattern: (override,) for pattern, override in self.modules.overrides.items()}}
        return tuple((pattern, scheme) for pattern, overrides in given.items() for scheme in self._schemes(overrides))

    def _schemes(self, overrides: Iterable[SchemeOverride], module: str = "") -> list[Scheme]:
        """All that these overrides leave of the linear's schemes, by rising width."""
        values: dict[str, object] = {"group_size": self.group_size, "symmetric": self.symmetric}
        name, choices = self.default_name(module), self.choices()
        for override in overrides:
            given = override.model_dump(exclude_none=True)
            # No override names a mix: its model refuses that.
            own = override.scheme if isinstance(override.scheme, SchemeName) else None
            name = own or (None if given else name)
            values |= given
            integers = [] if override.scheme else [choice for choice in choices if isinstance(choice, int)]
            choices = tuple(integers) if given and integers else choices
        if name is not None:
            return [Scheme.named(name)]
        values.pop("scheme", None)
        if "bits" in values:
            return [Scheme.model_validate(values)]
        return [
            Scheme.named(choice) if isinstance(choice, SchemeName) else Scheme.model_validate({"bits": choice} | values)
            for choice in choices
        ]

    def default_name(self, module: str = "") -> SchemeName | None:  # noqa: ARG002 - of mixes
        """The scheme that the request gives a linear by name; None where it gives numbers of integers.

        module   its full name; "": of a mix the type that most linears get
        """
        return None

    def mix(self) -> BlockPreset | None:
        """The mix of types that gives each linear its own; None: there is none."""
        return None

    def budget(self) -> BitBudget | None:
        """The budget, where widths are chosen by it."""
        return self.bits if isinstance(self.bits, BitBudget) else None

    def goal(self) -> Goal | None:
        """The goal, where widths are chosen for it."""
        return None

    def chooses(self) -> bool:
        """True if each linear's scheme is chosen, for a budget or a goal."""
        return self.budget() is not None or self.goal() is not None

    def choices(self) -> tuple[Choice, ...]:
        """Choices of a linear without an override: of a budget or goal, several."""
        if isinstance(self.bits, BitBudget):
            return self.bits.choices
        return (self.bits,)

    def field_of_choices(self) -> str:
        """The field of `quantization` that says what is chosen from."""
        return "bits"

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
        foreign = [c for c in self.choices() if isinstance(c, SchemeName) and c not in self.named_schemes]
        refused += [self._scheme_refusal((self.field_of_choices(), "choices"), choice.value) for choice in foreign]
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
                            refused.append(refusal((*where, name), value, f"{self.method} takes {name} {limit}"))
        if refused:
            raise ValidationError.from_exception_data(type(self).__name__, refused)
        return self

    def _scheme_refusal(self, where: tuple[str, ...], value: object) -> InitErrorDetails:
        known = ", ".join(sorted(self.named_schemes)) or "none by name"
        location = where if where[-1:] == ("choices",) else (*where, "scheme")
        return refusal(location, value, f"{self.method} takes these schemes: {known}; or give bits")

    def _symmetry_refusal(self, where: tuple[str, ...], value: object) -> InitErrorDetails:
        kind = "symmetric" if value else "asymmetric"
        made = "codes of a codebook, which has no zero point" if Form.CODEBOOK in self.forms() else f"no {kind} weights"
        detail = f"must be {str(not value).lower()}: with these parameters {self.method} makes {made}"
        return refusal((*where, "symmetric"), value, detail)

    def needs_model(self) -> bool:
        """True if the method computes with the model; else tensors of files are enough."""
        return True

    def asks_for_weights_alone(self) -> bool:
        """True if the request wants the model left out, although it could be built."""
        return False

    def absmax(self) -> AbsmaxScheme | None:
        """The second level of codebooks' maxima, where it is one for all; None: there is none."""
        return None

    def factors_rank(self) -> int:
        """Rank of the factors beside each linear; 0: there are none."""
        return 0

    def rounds_to_searched_scales(self) -> bool:
        """True if rounding to nearest, which stands for the method where choices are judged, searches FP4's scales."""
        return True

    def needs_fisher(self) -> bool:
        """True if the engine measures the loss's squared gradients by the weights before the first block."""
        return False

    def observes_inputs(self) -> bool:
        """True if the method looks at the inputs of the blocks."""
        return True

    def needs_preparation(self) -> bool:
        """True if a budget is spent or Fisher information measured before the first block."""
        return self.chooses() or self.needs_fisher()

    def reads_text(self) -> bool:
        """True if the method, its budget or its weighting reads calibration text, or numbers of it are stored."""
        return self.observes_inputs() or self.needs_preparation() or self.measures_inputs()

    def measures_inputs(self) -> bool:
        """True if numbers of activations on calibration text are stored: of a calibrated scheme, or of a cache."""
        rows = (scheme.row for _, scheme in self.schemes())
        return self.kv_cache is not None or any(row is not None and row.calibrated for row in rows)

    def tuned_sequences(self, num_samples: int) -> int:  # noqa: ARG002 - for methods that tune
        """Sequences that go through a block with gradients when `num_samples` calibrate: what the work is priced by."""
        return 0

    def most_rounds(self) -> int:
        """Most times that the model is quantized until its goal is met."""
        return 1

    def end_to_end_steps(self) -> int:
        """Steps that tune the scales of the whole model after the last block; 0 leaves that stage out."""
        return 0

    def needs_original_inputs(self) -> bool:
        """True if the method looks at what the original blocks before a block put out, which then is kept: half as much
        memory for activations again."""
        return True

    def tunes_linears_apart(self) -> bool:
        """True if each linear of a block is tuned on inputs of its own, so that every token has to pass through it."""
        return False

    def shared_batch(self) -> int:
        """Sequences of a step that several GPUs may divide among themselves; 0 if they would gain nothing."""
        return 0


class GoalSpec(WeightSpec):
    """Parameters of a method that takes a goal in place of bits."""

    at_most: AtMost | None = Field(
        default=None, description="A limit in place of bits: of the distance from the original, or of the size."
    )
    fits: Fits | None = Field(default=None, description="Memory that the result is to be served in, in place of bits.")

    def goal(self) -> Goal | None:
        """The spec's `at_most` or `fits`."""
        return self.at_most or self.fits

    def choices(self) -> tuple[Choice, ...]:
        """The goal's, where there is one."""
        goal = self.goal()
        return super().choices() if goal is None else goal.choices

    def most_rounds(self) -> int:
        """The goal's; a method that looks at weights alone makes what was measured before."""
        return self.at_most.rounds if self.at_most is not None and self.at_most.kl and self.observes_inputs() else 1

    def field_of_choices(self) -> str:
        """The field of the goal, where there is one."""
        if self.goal() is None:
            return super().field_of_choices()
        return "fits" if self.at_most is None else "at_most"

    @model_validator(mode="after")
    def _says_bits_or_a_goal(self) -> Self:
        """Of bits, a scheme and a goal there is one.

        Raises:
            ValidationError: with the location of each of them.
        """
        ways = {name: value for name, value in self._ways().items() if value is not None}
        if self.goal() is not None and len(ways) > 1:
            detail = f"give {' or '.join(ways)}, one of them: each says how large the result is to be"
            refused = [refusal((name,), value, detail) for name, value in ways.items()]
            raise ValidationError.from_exception_data(type(self).__name__, refused)
        return self

    def _ways(self) -> dict[str, object]:
        given = self.bits if "bits" in self.model_fields_set else None
        return {"bits": given, "at_most": self.at_most, "fits": self.fits}

    def _said_otherwise(self) -> tuple[str, ...]:
        """Fields that another one takes the place of."""
        return () if self.goal() is None else ("bits",)

    @model_serializer(mode="wrap")
    def _without_what_is_said_otherwise(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name not in self._said_otherwise()}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema of the fields, also where they are serialized: that fewer of them are changes no field."""
        return handler(_fields_alone(core_schema))


def _dividing(schemes: Iterable[Scheme], in_features: int) -> tuple[Candidate, ...]:
    """Those whose groups divide the inputs, each as what it falls back to, once; all of them where none does."""
    schemes = list(schemes)
    dividing = dict.fromkeys(scheme.fitted(in_features) for scheme in schemes if scheme.divides(in_features))
    return tuple(Candidate(scheme) for scheme in dividing or schemes)


def _fields_alone(schema: Any) -> Any:
    """A core schema without the functions that serialize it."""
    if not isinstance(schema, dict):
        return schema
    kept = {name: value for name, value in schema.items() if name != "serialization"}
    return {name: _fields_alone(value) if name == "schema" else value for name, value in kept.items()}


class NamedSchemeSpec(GoalSpec):
    """Parameters of a method that takes schemes by name as well as integers."""

    scheme: NamedChoice | None = Field(
        default=None,
        description="A number format by name, in place of bits, group_size and symmetric; or one of llama.cpp's mixes "
        "(q4_k_m, ...), by which each linear gets a type. Upper case is the same.",
    )
    named_schemes: ClassVar[frozenset[SchemeName]] = ALL_SCHEMES

    def default_name(self, module: str = "") -> SchemeName | None:
        """The spec's `scheme`; of a mix, the linear's type."""
        if not isinstance(self.scheme, BlockPreset):
            return self.scheme
        return mixed_scheme(self.scheme, self._facts or UNKNOWN_MODEL, module)

    def mix(self) -> BlockPreset | None:
        """The spec's `scheme`, where it is a mix."""
        return self.scheme if isinstance(self.scheme, BlockPreset) else None

    @model_validator(mode="after")
    def _scheme_says_all(self) -> Self:
        given = [name for name in INTEGER_FIELDS if name in self.model_fields_set]
        if self.scheme is not None and given:
            detail = f"give scheme, or {' and '.join(given)}, not both: {self.scheme} says all of them"
            refused = [refusal((name,), getattr(self, name), detail) for name in ("scheme", *given)]
            raise ValidationError.from_exception_data(type(self).__name__, refused)
        able = self.named_schemes >= BLOCK_SCHEMES if self.mix() else self.scheme in self.named_schemes
        if self.scheme is not None and not able:
            refused = [self._scheme_refusal((), self.scheme)]
            raise ValidationError.from_exception_data(type(self).__name__, refused)
        return self

    def _ways(self) -> dict[str, object]:
        return super()._ways() | {"scheme": self.scheme}

    def _said_otherwise(self) -> tuple[str, ...]:
        return super()._said_otherwise() if self.scheme is None else INTEGER_FIELDS
