"""Checks that adapter, base job, merge and formats are compatible; runs before a job is queued."""

from collections.abc import Mapping, Sequence

from app.domain.adapters import ADAPTERS, AdapterFields, AdapterShape, AdapterSpec, GroupedSpec
from app.domain.adapters.shapes import shape_for
from app.domain.format_rules import default_for, default_formats, format_problems
from app.domain.formats import FORMATS, ExportFormat, Offsets, Result
from app.domain.methods import Form, WeightSpec
from app.domain.request.base_job import Folded
from bitwright.errors import FieldProblem, InputError, MisalignedAdapter


def result_forms(spec: WeightSpec, adapter: AdapterSpec | None, merge: str | None) -> frozenset[Form]:
    """Forms that a job makes of the linears, the adapter's factors included where a stock format has them."""
    forms = spec.forms()
    if adapter is None:
        return forms
    beside = merge == "16bit" or (merge is None and ADAPTERS[adapter.kind].stock_peft)
    return forms - {Form.LOW_RANK} | ({Form.LOW_RANK} if beside else set())


def default_result_formats(
    spec: WeightSpec,
    adapter: AdapterSpec | None,
    merge: str | None,
    round_offset: bool,
    folded: Folded | None = None,
) -> tuple[ExportFormat, ...]:
    """For a request that names none; `folded` as in `result_problems`."""
    if adapter is not None and merge == "quantized":
        return (default_for(Result.AFFINE if round_offset else Result.OFFSETS),)
    if adapter is not None and merge == "16bit":
        return (default_for(Result.SUMS),)
    if folded == "offsets":
        return (default_for(Result.OFFSETS),)
    return default_formats(spec, result_forms(spec, adapter, merge))


def result_problems(
    spec: WeightSpec,
    formats: tuple[ExportFormat, ...],
    adapter: AdapterSpec | None,
    merge: str | None,
    round_offset: bool,
    folded: Folded | None = None,
) -> list[FieldProblem]:
    """Everything in a request that its formats cannot hold, or that its merge cannot do.

    folded   what holds an adapter that lies in the weights from the start
    """
    stored = as_merged(spec) if folded or (adapter is not None and merge == "quantized") else spec
    of_adapter = [] if adapter is None else _adapter_format_problems(adapter, merge, formats)
    refused = {problem.field for problem in of_adapter}
    fitting = {index for index in range(len(formats)) if f"formats.{index}" not in refused}
    problems = format_problems(stored, formats, result_forms(spec, adapter, merge), judged=fitting)
    if adapter is None:
        return problems + _without_adapter(merge, round_offset)
    problems += _start_problems(spec, adapter) + of_adapter
    if merge == "quantized":
        problems += _fold_problems(spec, formats, adapter, round_offset)
    elif folded == "offsets":
        problems += _offset_problems(formats, 'merge: "quantized" with round_offset')
    if round_offset and merge != "quantized":
        problems.append(_stray_rounding())
    return problems


def as_merged(spec: WeightSpec) -> WeightSpec:
    """The spec of weights with an adapter folded in: none is symmetric any more."""
    overrides = {p: o.model_copy(update={"symmetric": False}) for p, o in spec.modules.overrides.items()}
    modules = spec.modules.model_copy(update={"overrides": overrides})
    return spec.model_copy(update={"symmetric": False, "modules": modules})


def shape_errors(spec: WeightSpec, adapter: AdapterSpec, linears: Mapping[str, tuple[int, int]]) -> list[InputError]:
    """Linears (out, in) whose shape or groups the adapter does not fit: the first for each field of the request."""
    errors: dict[str, InputError] = {}
    for name, (out_features, in_features) in linears.items():
        scheme = spec.scheme_of(name)
        if scheme is None or not isinstance(adapter, GroupedSpec):
            continue
        try:
            shape_for(adapter, in_features, out_features, scheme.group_size)
        except MisalignedAdapter as error:
            field = error.field or "adapter"
            if field not in errors:
                detail = f"{error.detail} ({name})"
                errors[field] = MisalignedAdapter(detail, field=field, value=error.value, hint=error.hint)
        except ValueError:
            continue  # the group size does not divide, which has an error of its own
    return list(errors.values())


def trained_parameters(spec: WeightSpec, adapter: AdapterSpec, linears: Mapping[str, tuple[int, int]]) -> int:
    """Trainable numbers of the adapters of linears (out, in) that fit; gates are not counted."""
    count = 0
    for name, (out_features, in_features) in linears.items():
        scheme = spec.scheme_of(name)
        if scheme is None:
            continue
        try:
            count += _shape(adapter, scheme.group_size, out_features, in_features).parameters
        except (MisalignedAdapter, ValueError):
            continue  # reported by `shape_errors`, and by the rules of groups
    return count


def _shape(adapter: AdapterSpec, group_size: int, out_features: int, in_features: int) -> AdapterShape:
    if isinstance(adapter, GroupedSpec):
        return shape_for(adapter, in_features, out_features, group_size)
    return AdapterShape(in_features, out_features, 1, 1, "pair", adapter.rank, adapter.alpha, adapter.rank)


def _without_adapter(merge: str | None, round_offset: bool) -> list[FieldProblem]:
    problems = []
    if merge is not None:
        detail = "there is no adapter to merge; leave merge out, or give finetune and adapter"
        problems.append(_problem("merge", "conflicting_fields", detail, merge))
    if round_offset:
        problems.append(_stray_rounding())
    return problems


def _stray_rounding() -> FieldProblem:
    detail = 'round_offset belongs to merge: "quantized"; leave it out, or merge so'
    return _problem("round_offset", "conflicting_fields", detail, True)


def _start_problems(spec: WeightSpec, adapter: AdapterFields) -> list[FieldProblem]:
    """A method that makes factors hands them to a LoRA of the same rank and strength, which goes on from them."""
    if Form.LOW_RANK not in spec.forms():
        return []
    given, kind = spec.model_dump(), adapter.model_dump()["kind"]
    if kind != "lora":
        detail = f"{given['method']} makes low-rank factors, and only a lora goes on from them; not {kind}"
        return [_problem("adapter.kind", "conflicting_fields", detail, kind)]
    return [
        _problem(
            f"adapter.{field}",
            "conflicting_fields",
            f"the adapter goes on from the factors of {given['method']}, whose {field} is {given[field]}",
            trained,
        )
        for field, trained in (("rank", adapter.rank), ("alpha", adapter.alpha))
        if field in given and given[field] != trained
    ]


def _adapter_format_problems(
    adapter: AdapterSpec, merge: str | None, formats: Sequence[ExportFormat]
) -> list[FieldProblem]:
    """Formats that cannot hold what becomes of the adapter, whatever the weights are: one problem for each."""
    if merge == "16bit":
        detail = f"{{}} holds no merged 16-bit weights; ask for {default_for(Result.SUMS).value}"
        return [
            _problem(f"formats.{index}", "format_cannot_hold", detail.format(name.value), name)
            for index, name in enumerate(formats)
            if not name.info.holds_sums
        ]
    if ADAPTERS[adapter.kind].stock_peft:
        return []
    detail = "stock peft has no {}; leave {} out: the job keeps the adapter as a file with a loader"
    return [
        _problem(f"formats.{index}", "format_cannot_hold", detail.format(adapter.kind, name.value), name)
        for index, name in enumerate(formats)
        if name.info.is_adapter
    ]


def _fold_problems(
    spec: WeightSpec, formats: Sequence[ExportFormat], adapter: AdapterSpec, round_offset: bool
) -> list[FieldProblem]:
    able = ", ".join(kind for kind, info in ADAPTERS.items() if info.merges_quantized)
    if not ADAPTERS[adapter.kind].merges_quantized:
        detail = f'{adapter.kind} merges in floating point alone: "16bit". Into quantized weights do: {able}'
        return [_problem("merge", "conflicting_fields", detail, "quantized")]
    if Form.AFFINE not in spec.forms():
        detail = 'weights on a codebook have no offset: take a method that makes affine weights, or merge: "16bit"'
        return [_problem("merge", "offset_not_representable", detail, "quantized")]
    if round_offset:
        return []
    return _offset_problems(formats, "set round_offset and read its error in the report")


def _offset_problems(formats: Sequence[ExportFormat], reason: str) -> list[FieldProblem]:
    able = [name.value for name, info in FORMATS.items() if info.offsets is not Offsets.NONE and not info.dense]
    detail = f"{{}} stores integer zero points: ask for {' or '.join(able)}, or {{}}"
    return [
        _problem(f"formats.{index}", "offset_not_representable", detail.format(name.value, reason), name)
        for index, name in enumerate(formats)
        if name.info.offsets is Offsets.NONE and not name.info.is_adapter
    ]


def _problem(field: str, code: str, detail: str, value: object) -> FieldProblem:
    return FieldProblem(field=field, code=code, detail=detail, value=value)
