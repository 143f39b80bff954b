"""Checks that a request's rules fit the linears of its model: one answer for the API and for the engine.

`inputs` is always full module name -> in_features of every linear that may be quantized, the output head included.
"""

import math
from collections.abc import Iterable, Mapping

from app.domain.methods import PER_CHANNEL, Scheme, WeightSpec
from app.domain.methods.named_schemes import SchemeName
from app.domain.methods.schemes import HEAD_PATTERN, fits
from app.domain.runtimes import described
from bitwright.errors import IndivisibleGroup, InputError, InvalidRequest, RequestError, UnknownModule

RULES = "quantization.modules"
SMALLEST_NAMED = 8
"""Smaller groups than this cost more for their scales than most widths; hints leave them out."""


def rule_errors(
    spec: WeightSpec, inputs: Mapping[str, int], *, head: str, tied: bool, width: int | None = None
) -> list[InputError | RequestError]:
    """Everything in `spec` that does not fit, each with field, value and hint.

    head    full module name of the output head
    tied    whether it is the embedding matrix
    width   columns of the embedding matrix; None: those of the head
    """
    errors: list[InputError | RequestError] = []
    patterns = {f"{RULES}.ignore.{index}": pattern for index, pattern in enumerate(spec.modules.ignore)}
    patterns |= {f"{RULES}.overrides.{pattern}": pattern for pattern in spec.modules.overrides}
    errors += [unknown_module(field, p, inputs) for field, p in patterns.items() if not matches_any(p, inputs)]
    quantized = [name for name in inputs if spec.scheme_of(name) is not None]
    errors += outer_errors(spec, inputs.get(head, 0) if width is None else width, head=head, tied=tied)
    if not quantized:
        errors.append(
            InvalidRequest(
                "every linear of the model is ignored, so there is nothing to quantize",
                field=f"{RULES}.ignore",
                value=", ".join(spec.modules.ignore),
                hint="ignore fewer linears",
            )
        )
    problems = [*errors, *_indivisible(spec, inputs, quantized)]
    return problems or _out_of_reach(spec, inputs, [name for name in quantized if name != head])


def outer_errors(spec: WeightSpec, width: int, *, head: str, tied: bool) -> list[InputError | RequestError]:
    """Misfits of the schemes of embeddings and head; the head's groups are judged with the linears'.

    width   columns of the embedding matrix
    """
    embeddings, of_head = spec.embeddings_scheme(), spec.head_scheme()
    errors: list[InputError | RequestError] = []
    if tied and embeddings is None and of_head is not None and spec.modules.head is None:
        errors.append(
            InvalidRequest(
                f"{head} shares its matrix with the embeddings, of which this request does not speak",
                field=f"{RULES}.ignore",
                value=head,
                hint=f'give modules.embeddings a scheme, which is that of both then, or add "{head}" to modules.ignore',
            )
        )
    if tied and embeddings is not None and of_head is not None and embeddings != of_head:
        own = spec.modules.head is not None
        errors.append(
            InvalidRequest(
                f"{head} and the embeddings are one matrix in this model, and the request gives them two schemes",
                field=f"{RULES}.head" if own else f"{RULES}.ignore",
                value=described(of_head),
                hint="leave modules.head out" if own else f'add "{head}" to modules.ignore',
            )
        )
    if embeddings is not None and width and not embeddings.divides(width):
        errors.append(indivisible_outer(embeddings, width, "embeddings"))
    return errors


def unties(spec: WeightSpec) -> bool:
    """True if a head that is the embedding matrix becomes one of its own: it alone is to be quantized."""
    return spec.modules.head is not None and spec.modules.embeddings is None


def indivisible_outer(scheme: Scheme, width: int, name: str) -> IndivisibleGroup:
    """The error for groups that do not divide the rows of embeddings or head, named by their field."""
    if scheme.name is not None:
        return IndivisibleGroup(
            f"groups of {scheme.group_size} of the scheme {scheme.name} do not divide {width} columns of the {name}",
            field=f"{RULES}.{name}.scheme",
            value=scheme.name.value,
            hint="give another scheme, or leave the field out",
        )
    sizes = ", ".join(map(str, [*dividing_sizes(width), PER_CHANNEL]))
    return IndivisibleGroup(
        f"group_size {scheme.group_size} does not divide the {width} columns of the {name}",
        field=f"{RULES}.{name}.group_size",
        value=scheme.group_size,
        hint=f"use one of {sizes} (one group a row)",
    )


def matches_any(pattern: str, names: Iterable[str]) -> bool:
    """True if a glob of `modules` names at least one of the linears."""
    return any(fits(name, pattern) for name in names)


def unknown_module(field: str, pattern: str, names: Iterable[str]) -> UnknownModule:
    """The error for a pattern that matches none of the linears."""
    hint = f"linears are named like {next(iter(names))}"
    return UnknownModule(f"{pattern!r} matches no linear of the model", field=field, value=pattern, hint=hint)


def divides(group_size: int, width: int) -> bool:
    """True if `width` inputs fall into whole groups."""
    return group_size == PER_CHANNEL or (group_size > 0 and width % group_size == 0)


def dividing_sizes(width: int) -> list[int]:
    """Group sizes worth naming for `width` inputs: the powers of two that divide it, or a few other divisors."""
    powers = [1 << k for k in range(width.bit_length()) if 1 << k >= SMALLEST_NAMED and width % (1 << k) == 0]
    if powers:
        return powers
    few = (size for size in range(SMALLEST_NAMED, width + 1) if width % size == 0)
    return [size for size, _ in zip(few, range(SMALLEST_NAMED), strict=False)]


def _indivisible(spec: WeightSpec, inputs: Mapping[str, int], quantized: Iterable[str]) -> list[IndivisibleGroup]:
    """One error for each field that gave a size which does not divide, about the first linear that it is wrong for."""
    errors: dict[str, IndivisibleGroup] = {}
    for name in quantized:
        width = inputs[name]
        if spec.modules.head is not None and fits(name, HEAD_PATTERN):
            head = spec.head_scheme()
            if head is not None and not head.divides(width):
                errors.setdefault(f"{RULES}.head", indivisible_outer(head, width, "head"))
            continue
        scheme = next((candidate.scheme for candidate in spec.candidates(name, width)), None)
        if scheme is None or scheme.divides(width):
            continue
        if scheme.name is not None:
            field = field_of_name(spec, name)
            errors.setdefault(field, indivisible_name(scheme.name, scheme.group_size, name, width, field))
            continue
        field = _field_of_group(spec, name)
        if field not in errors:
            sizes = ", ".join(map(str, [*dividing_sizes(width), PER_CHANNEL]))
            errors[field] = IndivisibleGroup(
                f"group_size {scheme.group_size} does not divide the {width} inputs of {name}",
                field=field,
                value=scheme.group_size,
                hint=f"use one of {sizes} (one group a row), or an override for this linear",
            )
    return list(errors.values())


def _out_of_reach(
    spec: WeightSpec, inputs: Mapping[str, int], quantized: Iterable[str]
) -> list[InputError | RequestError]:
    """The error of a budget below what even the linear with the cheapest choice takes."""
    budget, least = spec.budget(), min((spec.least_bits(name, inputs[name]) for name in quantized), default=0.0)
    if budget is None or budget.over == "model" or budget.average >= least:
        return []
    return [over_budget(budget.average, least)]


def over_budget(average: float, least: float, over: str = "linears") -> InvalidRequest:
    """The error for a budget that the cheapest choices exceed."""
    whole = " of the whole model, with embeddings, head and norms" if over == "model" else ""
    return InvalidRequest(
        f"with scales and zero points the cheapest choices take {least:.4g} bits a weight{whole}, more than "
        f"{average:g}",
        field="quantization.bits.average",
        value=average,
        hint=f"ask for at least {math.ceil(least * 100) / 100:g}, smaller choices or larger groups",
    )


def indivisible_name(scheme: SchemeName, size: int, linear: str, width: int, field: str) -> IndivisibleGroup:
    """The error for a scheme by name whose groups do not divide a linear."""
    return IndivisibleGroup(
        f"groups of {size} of the scheme {scheme} do not divide the {width} inputs of {linear}",
        field=field,
        value=scheme.value,
        hint=f'add "{linear}" to modules.ignore, or give it another scheme by an override',
    )


def field_of_name(spec: WeightSpec, name: str) -> str:
    """Path of the field that gave a linear its scheme by name: of several overrides, the last one."""
    giving = [p for p, override in spec.modules.overrides.items() if override.scheme is not None and fits(name, p)]
    return f"{RULES}.overrides.{giving[-1]}.scheme" if giving else "quantization.scheme"


def _field_of_group(spec: WeightSpec, name: str) -> str:
    """Path of the field that gave the linear its group size: of several overrides, the last one."""
    giving = [
        pattern
        for pattern, override in spec.modules.overrides.items()
        if override.group_size is not None and fits(name, pattern)
    ]
    return f"{RULES}.overrides.{giving[-1]}.group_size" if giving else "quantization.group_size"
