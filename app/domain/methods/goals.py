"""Goals of a request, in place of bits: a distance that the result must keep, a size, or memory that it must fit."""

from collections.abc import Iterable
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from app.domain.methods.named_schemes import BLOCK_SCHEMES, SCHEMES, SchemeName
from app.domain.methods.schemes import MAX_BITS, MIN_BITS, Bits, Spec, without_default
from app.domain.methods.sizes import Size

Choice = int | SchemeName
GOAL_WIDTHS = (2, 3, 4, 5, 6, 8)
"""Widths that a goal chooses from where the request names none, as far as its formats hold them."""
MOST_CHOICES = MAX_BITS - MIN_BITS + 1 + len(SchemeName)
MOST_ROUNDS = 8


def choice_order(choice: Choice) -> tuple[int, str]:
    """The order of choices: by the bits of a code, widths before names."""
    return (SCHEMES[choice].bits, choice.value) if isinstance(choice, SchemeName) else (choice, "")


def _each_once(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    if len(set(choices)) < len(choices):
        raise ValueError("must name each width once, and each scheme")
    return tuple(sorted(choices, key=choice_order))


def _json_type(value: object) -> str:
    return "string" if isinstance(value, str) else "integer"


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


OneChoice = Annotated[
    Annotated[Bits, Tag("integer")] | Annotated[SchemeName, BeforeValidator(_lower), Tag("string")],
    Discriminator(_json_type),
    Field(description="A width of integers, or a scheme by name."),
]
Choices = Annotated[
    tuple[OneChoice, ...],
    AfterValidator(_each_once),
    Field(min_length=1, max_length=MOST_CHOICES, description="What each linear's way of being stored is chosen from."),
]


ChoosesOuter = Annotated[
    bool,
    Field(
        strict=True,
        description="Choose for embeddings and head, too, where `modules` says nothing of them. True by default where "
        "gguf is the packed format and llama.cpp's types are the choices.",
        json_schema_extra=without_default,
    ),
]


def check_outer(outer: bool, choices: tuple[Choice, ...]) -> None:
    """Check that what embeddings and head are chosen from is llama.cpp's types.

    Raises:
        ValueError: it is not.
    """
    if outer and not all(choice in BLOCK_SCHEMES for choice in choices):
        raise ValueError("outer goes with choices of llama.cpp's types alone; give modules.embeddings a scheme instead")


class Goal(Spec):
    """A goal, and what may be chosen to reach it."""

    choices: Choices = Field(
        default=GOAL_WIDTHS,
        description="Widths and schemes by name that each linear's is chosen from; by default the widths of these that "
        "every requested format holds; for gguf alone llama.cpp's types.",
        json_schema_extra=without_default,
    )
    outer: ChoosesOuter = False

    @model_validator(mode="after")
    def _chooses_types_for_outer(self) -> Self:
        check_outer(self.outer, self.choices)
        return self


class AtMost(Goal):
    """A limit that the result keeps: of its distance from the original, or of its files' size."""

    kl: float | None = Field(
        default=None,
        strict=True,
        gt=0,
        le=100,
        allow_inf_nan=False,
        description="KL(original || quantized), nats a token on held-out text: the smallest result that keeps it.",
    )
    bytes: Size | None = Field(
        default=None,
        description="Of the weight files of each packed checkpoint: the closest result that is no larger.",
    )
    rounds: Annotated[int, Field(strict=True, ge=1, le=MOST_ROUNDS)] = Field(
        default=4,
        description="With kl and a method that tunes: how often the model is quantized at the most until the result is "
        "known to be the smallest.",
    )

    @model_validator(mode="after")
    def _is_one_limit(self) -> Self:
        if (self.kl is None) == (self.bytes is None):
            raise ValueError('must give kl or bytes, one of them: {"kl": 0.05} or {"bytes": "90MB"}')
        return self


class Fits(Goal):
    """Memory of the machine that is to serve the result: weights and KV cache, and a tenth of both besides."""

    memory: Size
    context: int = Field(strict=True, ge=1, le=1 << 24, description="Tokens of a sequence, prompt and answer.")
    sequences: int = Field(default=1, strict=True, ge=1, le=1 << 20, description="Sequences served at a time.")


RESERVE = 1.1
"""Memory that a server takes for each byte of weights and cache."""


def spell_out(choices: Iterable[Choice]) -> list[Any]:
    """Choices as a request has them."""
    return [choice.value if isinstance(choice, SchemeName) else choice for choice in choices]
