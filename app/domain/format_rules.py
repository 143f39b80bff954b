"""Rules over all formats of a job: defaults, formats stored besides, and why a request or a model does not fit."""

from collections.abc import Collection, Iterable, Mapping

from app.domain.formats import FORMATS, EmbeddingRule, ExportFormat, LowRankRule, Offsets, Result
from app.domain.inputs.architectures import ARCHITECTURES
from app.domain.methods import METHODS, PER_CHANNEL, Choice, Form, Scheme, SchemeName, WeightSpec
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
    """Those of the formats that store offsets, and zero points as offsets, rounded to 16 bits."""
    return tuple(name for name in formats if name.info.offsets in (Offsets.FLOAT16, Offsets.MODEL))


def halves_offsets(formats: Iterable[ExportFormat]) -> bool:
    """True if an adapter's fold is rounded to fp16 for all formats, since one of them would do it alone."""
    return any(name.info.offsets is Offsets.FLOAT16 for name in formats)


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
    if not holds_embeddings(weights, spec):
        # Bases of adapters are as large as the original; by itself, what every job keeps is the smallest that fits.
        weights = default_for(Result.CODEBOOK) if Form.LOW_RANK in forms else default_for(Result.OFFSETS)
    return (weights, default_for(Result.FACTORS)) if Form.LOW_RANK in forms else (weights,)


def makes_gguf(spec: WeightSpec, formats: Collection[ExportFormat], forms: frozenset[Form], model_type: str) -> bool:
    """True if a GGUF file is among a result's formats, or could be made of it later.

    forms        of what the job makes of a linear
    model_type   of the model's config.json
    """
    gguf = ExportFormat.GGUF
    if gguf in formats:
        return True
    return gguf.info.refusal_of(model_type) is None and not format_problems(spec, (gguf,), forms - {Form.LOW_RANK})


def holds_embeddings(name: ExportFormat, spec: WeightSpec) -> bool:
    """True if a format holds the spec's embeddings together with its linears and head, or they stay as they are."""
    embeddings = spec.embeddings_scheme()
    if embeddings is None or name.info.embeddings is EmbeddingRule.ANY:
        return True
    if name.info.embeddings is EmbeddingRule.NONE or embeddings.name is not None or spec.budget() is not None:
        return False
    head = spec.head_scheme() or embeddings
    return {head, *(scheme for _, scheme in spec.schemes())} == {embeddings}


def format_problems(
    spec: WeightSpec,
    formats: tuple[ExportFormat, ...],
    forms: frozenset[Form] | None = None,
    judged: Collection[int] | None = None,
) -> list[FieldProblem]:
    """Everything in `spec` that one of `formats` cannot hold, overrides included; `forms` as in `default_formats`.

    judged   places of the formats to look at, if not all: of another that is wrong anyway, a way out would lead nowhere
    """
    forms = spec.forms() if forms is None else forms
    problems = []
    for index, name in enumerate(formats):
        if judged is not None and index not in judged:
            continue
        detail = _form_refusal(spec, name, formats, forms)
        if detail is not None:
            problems.append(
                FieldProblem(field=f"formats.{index}", code="format_cannot_hold", detail=detail, value=name)
            )
        for pattern, scheme in spec.schemes():
            where = f"quantization.modules.overrides.{pattern}." if pattern else "quantization."
            of_scheme = _scheme_problems(name, where, scheme, spec.symmetries(), forms)
            if not pattern and spec.chooses():
                of_scheme = [_of_choices(problem, spec) for problem in of_scheme]
            problems += [problem for problem in of_scheme if problem not in problems]
        problems += _uniform_problems(index, name, spec)
        problems += [problem for problem in _outer_problems(index, name, spec, forms) if problem not in problems]
    return problems + _cache_problems(spec, formats)


def stored_problems(
    spec: WeightSpec, formats: tuple[ExportFormat, ...], schemes: Collection[Scheme], forms: frozenset[Form]
) -> list[FieldProblem]:
    """Everything in a result that one of `formats` cannot hold, by its linears' own schemes and forms.

    The problems name the format.
    """
    problems = []
    for index, name in enumerate(formats):
        details = [_form_refusal(spec, name, formats, forms)]
        ordered = sorted(schemes, key=str)
        details += [
            one.detail for each in ordered for one in _scheme_problems(name, "quantization.", each, (), forms)[:1]
        ]
        if name.info.uniform and len(schemes) > 1:
            details.append(_mixed(name, schemes, forms))
        found = dict.fromkeys(detail for detail in details if detail is not None)
        problems += [
            FieldProblem(field=f"formats.{index}", code="format_cannot_hold", detail=detail, value=name)
            for detail in found
        ]
    return problems


def _outer_problems(index: int, name: ExportFormat, spec: WeightSpec, forms: frozenset[Form]) -> list[FieldProblem]:
    """Reasons why a format cannot hold the schemes of embeddings and head."""
    problems: list[FieldProblem] = []
    embeddings, head = spec.embeddings_scheme(), None if spec.modules.head is None else spec.head_scheme()
    for field, scheme in (("embeddings", embeddings), ("head", head)):
        if scheme is None:
            continue
        where = f"quantization.modules.{field}."
        if scheme.form not in name.info.kinds and scheme.name is None:
            detail = f"{name.value} cannot hold {scheme.form.value} weights, as the {field} would be; {other_formats()}"
            problems.append(
                FieldProblem(field=where + "bits", code="format_cannot_hold", detail=detail, value=scheme.bits)
            )
            continue
        problems += _scheme_problems(name, where, scheme, frozenset({True, False}), forms)
    if holds_embeddings(name, spec):
        return problems
    if name.info.embeddings is EmbeddingRule.NONE:
        detail = f"{name.value} holds no quantized embeddings; {other_formats()}, or leave modules.embeddings out"
    else:
        detail = (
            f"{name.value} with quantized embeddings loads with one scheme of integers for linears, head and "
            f"embeddings alone: give all of them the same, leave modules.embeddings out, or {other_formats()}"
        )
    return [
        *problems,
        FieldProblem(field=f"formats.{index}", code="format_cannot_hold", detail=detail, value=name),
    ]


def head_problems(formats: tuple[ExportFormat, ...], spec: WeightSpec, *, tied: bool) -> list[FieldProblem]:
    """Formats that hold quantized embeddings only with the head, where a model's head is another matrix that stays."""
    if spec.modules.embeddings is None or tied or spec.head_scheme() == spec.embeddings_scheme():
        return []
    detail = (
        "{} with quantized embeddings loads with one scheme for linears, head and embeddings alone, and this model's "
        f"head is a matrix of its own: give modules.head the same scheme, or {other_formats()}"
    )
    return [
        FieldProblem(field=f"formats.{index}", code="format_cannot_hold", detail=detail.format(name.value), value=name)
        for index, name in enumerate(formats)
        if name.info.embeddings is EmbeddingRule.UNIFORM
    ]


def other_formats() -> str:
    """The formats that hold embeddings in a scheme of their own, as they stand in a request."""
    able = [f for f in ExportFormat if f.info.embeddings is EmbeddingRule.ANY and not f.info.is_adapter]
    return "ask for formats: " + " or ".join(f'["{name.value}"]' for name in able)


def _of_choices(problem: FieldProblem, spec: WeightSpec) -> FieldProblem:
    """The problem of a width or scheme that stands among the choices of a budget or goal."""
    if problem.field not in ("quantization.bits", "quantization.scheme"):
        return problem
    return problem.model_copy(update={"field": f"quantization.{spec.field_of_choices()}"})


def held_choices(spec: WeightSpec, formats: Iterable[ExportFormat], choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """Those of `choices` that every one of the formats holds, with the spec's groups and symmetry."""
    held = []
    for choice in choices:
        if isinstance(choice, SchemeName):
            scheme = Scheme.named(choice)
        else:
            scheme = Scheme(bits=choice, group_size=spec.group_size, symmetric=spec.symmetric)
        if not any(
            _scheme_problems(name, "quantization.", scheme, spec.symmetries(), spec.forms()) for name in formats
        ):
            held.append(choice)
    return tuple(held)


def model_problems(
    formats: tuple[ExportFormat, ...],
    model_type: str,
    inputs: Mapping[str, int],
    config: Mapping[str, object] | None = None,
    outputs: Mapping[str, int] | None = None,
) -> list[FieldProblem]:
    """Everything about a model that one of `formats` cannot hold.

    model_type   of its config.json
    inputs       in_features of every linear that is to be quantized, by full name
    config       its config.json, decoded
    outputs      out_features of the same linears, as far as they are known
    """
    problems = []
    for index, name in enumerate(formats):
        info, details = FORMATS[name], _type_refusals(name, model_type)
        other = info.refusal_of(model_type)
        if other is not None and (info.model_check is None or config is None):
            details.append(f"{name.value} {other}")
        for linear, columns in inputs.items():
            if columns % info.group_multiple:
                details.append(
                    f"{name.value} holds rows of whole blocks of {info.group_multiple}; {linear} has {columns} "
                    "inputs: add it to modules.ignore"
                )
                break
        for linear, rows in (outputs or {}).items():
            if rows % info.output_multiple:
                details.append(
                    f"{name.value} packs outputs in words, {info.output_multiple} at a time; {linear} has {rows} "
                    "outputs: add it to modules.ignore"
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
    reason = None if accepted is None else _refused_as(name, accepted.refusals)
    if accepted is None or reason is None:
        return []
    rows = {f: info for f, info in FORMATS.items() if not _refused_as(f, accepted.refusals) and not info.is_adapter}
    others = [f.value for f, info in rows.items() if info.architectures is None or model_type in info.architectures]
    return [f"{name.value}: {reason}; ask for {' or '.join(others)}"]


def _refused_as(name: ExportFormat, refusals: Mapping[str, str]) -> str | None:
    """The reason for a format among those that were tried: what packs linears under their own names has that of
    compressed-tensors."""
    return refusals.get(name.value, refusals.get(ExportFormat.COMPRESSED_TENSORS) if name.info.by_name else None)


def _uniform_problems(index: int, name: ExportFormat, spec: WeightSpec) -> list[FieldProblem]:
    """The reason why a format that says one scheme for the whole model cannot hold this one's."""
    schemes = {scheme for _, scheme in spec.schemes()}
    if not name.info.uniform or len(schemes) < 2:
        return []
    detail = _mixed(name, schemes, spec.forms())
    return [FieldProblem(field=f"formats.{index}", code="format_cannot_hold", detail=detail, value=name)]


def _mixed(name: ExportFormat, schemes: Collection[Scheme], forms: frozenset[Form]) -> str:
    return (
        f"{name.value} says one scheme for all linears of a model, and these have {len(schemes)}; ask for formats: "
        f"{_able(schemes, forms)}"
    )


def _able(schemes: Collection[Scheme], forms: frozenset[Form]) -> str:
    """The formats that hold linears of all these schemes with their codes, as they stand in a request."""
    rows = [
        name.value
        for name, info in FORMATS.items()
        if not info.dense and not info.is_adapter and not info.always_kept and not (info.uniform and len(schemes) > 1)
        if forms - {Form.LOW_RANK} <= info.kinds and all(info.holds(scheme) for scheme in schemes)
    ]
    return " or ".join(f'["{row}"]' for row in [*rows, KEPT])


def _cache_problems(spec: WeightSpec, formats: tuple[ExportFormat, ...]) -> list[FieldProblem]:
    """Formats that were asked for, none of which holds the scales of a key-value cache."""
    if spec.kv_cache is None or not formats or any(name.info.kv_cache for name in formats):
        return []
    able = ", ".join(f'"{row.value}"' for row in ExportFormat if row.info.kv_cache)
    names = " and ".join(name.value for name in formats)
    detail = f"{names} cannot hold scales of a key-value cache; formats that can: {able}; or leave kv_cache out"
    field = "quantization.kv_cache"
    return [FieldProblem(field=field, code="format_cannot_hold", detail=detail, value=spec.kv_cache)]


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
        factors = f"low-rank factors of {method}" if Form.LOW_RANK in spec.forms() else "trained adapter"
        return (
            f"{name.value} holds the quantized weights without the {factors}; add "
            f'"{default_for(Result.FACTORS).value}" to formats, or ask for "{default_for(Result.SUMS).value}" alone, '
            f"which adds {'them' if Form.LOW_RANK in spec.forms() else 'it'} in"
        )
    return None


def _scheme_problems(
    name: ExportFormat, where: str, scheme: Scheme, symmetries: Collection[bool], forms: frozenset[Form]
) -> list[FieldProblem]:
    """Reasons why a format cannot hold linears of a scheme.

    where        path of the fields that give it, with a dot at its end
    symmetries   those that the method takes
    """
    info, able = name.info, _able([scheme], forms)
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
            f"group_size, or ask for formats: {able}"
        )
        problems.append(
            FieldProblem(field=where + "group_size", code="format_cannot_hold", detail=detail, value=scheme.group_size)
        )
    elif info.group_sizes is not None and scheme.group_size not in info.group_sizes:
        sizes = ", ".join(map(str, sorted(info.group_sizes)))
        detail = (
            f"{name.value} holds groups of {sizes}, not {scheme.group_size}; change group_size, or ask for formats: "
            f"{able}"
        )
        problems.append(
            FieldProblem(field=where + "group_size", code="format_cannot_hold", detail=detail, value=scheme.group_size)
        )
    if scheme.bits not in info.bits:
        widths = ", ".join(map(str, sorted(info.bits)))
        detail = f"{name.value} holds {widths} bits, not {scheme.bits}; change bits, or ask for formats: {able}"
        problems.append(FieldProblem(field=where + "bits", code="format_cannot_hold", detail=detail, value=scheme.bits))
    elif not scheme.symmetric and info.asymmetric_bits is not None and scheme.bits not in info.asymmetric_bits:
        widths = ", ".join(map(str, sorted(info.asymmetric_bits)))
        detail = (
            f"{name.value} holds asymmetric weights of {widths} bits, not {scheme.bits}; set symmetric to true, or "
            f"ask for formats: {able}"
        )
        problems.append(FieldProblem(field=where + "bits", code="format_cannot_hold", detail=detail, value=scheme.bits))
    if scheme.symmetric not in info.symmetries:
        word = "symmetric" if scheme.symmetric else "asymmetric"
        other = f"set symmetric to {str(not scheme.symmetric).lower()}, or " if len(symmetries) > 1 else ""
        detail = f"{name.value} cannot hold {word} weights; {other}ask for formats: {able}"
        problems.append(
            FieldProblem(field=where + "symmetric", code="format_cannot_hold", detail=detail, value=scheme.symmetric)
        )
    return problems
