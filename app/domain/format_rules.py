"""Rules over all formats of a job: defaults, formats stored besides, and why a request or a model does not fit."""

from collections.abc import Collection, Iterable, Mapping

from app.domain.formats import FORMATS, ExportFormat, LowRankRule, Offsets, Result, ScaleDtype
from app.domain.inputs.architectures import ARCHITECTURES
from app.domain.methods import METHODS, PER_CHANNEL, Form, Scheme, WeightSpec
from bitwright.errors import FieldProblem


def base_alone(formats: Collection[ExportFormat]) -> bool:
    """True if checkpoints of these formats hold the quantized weights without the factors, which an adapter's does."""
    return any(name.info.is_adapter for name in formats)


def holds_base_alone(name: ExportFormat, formats: Collection[ExportFormat]) -> bool:
    """True if this one of a job's `formats` lacks the factors that another of them holds."""
    return base_alone(formats) and not name.info.holds_factors


def stored_formats(asked: Iterable[ExportFormat]) -> tuple[ExportFormat, ...]:
    """The formats that a job writes: those asked for, then those that every job keeps."""
    return tuple(dict.fromkeys([*asked, *(name for name in ExportFormat if name.info.always_kept)]))


def rounds_offsets(formats: Iterable[ExportFormat]) -> tuple[ExportFormat, ...]:
    """Those of the formats that store offsets, and zero points as offsets, rounded to fp16."""
    return tuple(name for name in formats if name.info.offsets is Offsets.FLOAT16)


KEPT = stored_formats(())[0].value
"""The format to name where another cannot hold a result."""


def default_for(result: Result) -> ExportFormat:
    """The format of such a result where a request names none."""
    return next(name for name in ExportFormat if result in name.info.default_for)


def default_formats(spec: WeightSpec, forms: frozenset[Form] | None = None) -> tuple[ExportFormat, ...]:
    """For a request that names none: packed where the weights are affine, and the adapter where there is one.

    forms   of what the job makes of a linear, if not the method's alone
    """
    forms = spec.forms() if forms is None else forms
    kind = Result.CODEBOOK if Form.CODEBOOK in forms else Result.BLOCKS if Form.BLOCKS in forms else Result.AFFINE
    weights = default_for(kind)
    return (weights, default_for(Result.FACTORS)) if Form.LOW_RANK in forms else (weights,)


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
            of_scheme = _scheme_problems(name, pattern, scheme, spec.symmetries())
            problems += [problem for problem in of_scheme if problem not in problems]
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
        info, details = FORMATS[name], _type_refusals(name, model_type)
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
        if info.model_check is not None and config is not None:
            details += info.model_check(model_type, config)
        problems += [
            FieldProblem(field=f"formats.{index}", code="format_cannot_hold", detail=detail, value=name)
            for detail in details
        ]
    return problems


def _type_refusals(name: ExportFormat, model_type: str) -> list[str]:
    """The reason why checkpoints of this format do not load for a type of model, and the formats that do."""
    accepted = ARCHITECTURES.get(model_type)
    if accepted is None or name.value not in accepted.refusals:
        return []
    rows = {f.value: info for f, info in FORMATS.items() if f.value not in accepted.refusals and not info.is_adapter}
    others = [f for f, info in rows.items() if info.architectures is None or model_type in info.architectures]
    return [f"{name.value}: {accepted.refusals[name.value]}; ask for {' or '.join(others)}"]


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
    """The reason why a format cannot hold what the spec makes of a linear, whatever its scheme; None if it can."""
    info, method = FORMATS[name], spec.method
    # Schemes by name, of which a form may have many, are judged one by one.
    foreign = sorted(forms - {Form.LOW_RANK, Form.FLOAT, Form.BLOCKS} - info.kinds)
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
            f'"{default_for(Result.FACTORS).value}" to formats, or ask for "{default_for(Result.SUMS).value}", which '
            "adds them in"
        )
    return None


def _scheme_problems(
    name: ExportFormat, pattern: str, scheme: Scheme, symmetries: Collection[bool]
) -> list[FieldProblem]:
    """Reasons why a format cannot hold linears of a scheme; `symmetries` are those that the method takes."""
    info = name.info
    where = f"quantization.modules.overrides.{pattern}." if pattern else "quantization."
    problems = []
    if scheme.name is not None:
        if scheme.name in info.schemes:
            return []
        able = ", ".join(f'"{row.value}"' for row in ExportFormat if scheme.name in row.info.schemes)
        detail = f"{name.value} cannot hold the scheme {scheme.name}; formats that can: {able}"
        return [FieldProblem(field=where + "scheme", code="format_cannot_hold", detail=detail, value=scheme.name.value)]
    if scheme.group_size != PER_CHANNEL and scheme.group_size % info.group_multiple:
        detail = (
            f"{name.value} holds groups of multiples of {info.group_multiple}, or -1; not {scheme.group_size}; change "
            f'group_size, or ask for formats: ["{KEPT}"]'
        )
        problems.append(
            FieldProblem(field=where + "group_size", code="format_cannot_hold", detail=detail, value=scheme.group_size)
        )
    if scheme.bits not in info.bits:
        widths = ", ".join(map(str, sorted(info.bits)))
        detail = f'{name.value} holds {widths} bits, not {scheme.bits}; change bits, or ask for formats: ["{KEPT}"]'
        problems.append(FieldProblem(field=where + "bits", code="format_cannot_hold", detail=detail, value=scheme.bits))
    elif not scheme.symmetric and info.asymmetric_bits is not None and scheme.bits not in info.asymmetric_bits:
        widths = ", ".join(map(str, sorted(info.asymmetric_bits)))
        detail = (
            f"{name.value} holds asymmetric weights of {widths} bits, not {scheme.bits}; set symmetric to true, or "
            f'ask for formats: ["{KEPT}"]'
        )
        problems.append(FieldProblem(field=where + "bits", code="format_cannot_hold", detail=detail, value=scheme.bits))
    if scheme.symmetric not in info.symmetries:
        word = "symmetric" if scheme.symmetric else "asymmetric"
        other = f"set symmetric to {str(not scheme.symmetric).lower()}, or " if len(symmetries) > 1 else ""
        detail = f'{name.value} cannot hold {word} weights; {other}ask for formats: ["{KEPT}"]'
        problems.append(
            FieldProblem(field=where + "symmetric", code="format_cannot_hold", detail=detail, value=scheme.symmetric)
        )
    return problems
