"""Fit of a request to the checkpoint that it names, from configuration, shapes and names, before any weight is read.

One answer for the API, for the child that looks at the Hub, and for the fetch.
"""

from collections.abc import Collection, Sequence

from app.domain.advice import dishonoured_rank
from app.domain.format_rules import head_problems, model_problems
from app.domain.fused_shapes import shape_warning
from app.domain.goals.reach import reach_errors
from app.domain.inputs.architectures import EMBEDDINGS, HEAD, Dimensions
from app.domain.inputs.inspection import Inspection
from app.domain.inputs.quantized.registry import quantized_warning
from app.domain.methods import Candidate, SchemeName, WeightSpec
from app.domain.methods.module_rules import rule_errors
from app.domain.mixes import bound_to, fallback_words
from app.domain.request.combination_rules import shape_errors
from app.domain.request.job_request import JobRequest
from app.domain.sizes.untied_heads import untied_warnings
from app.domain.weight_targets import has_head, seen_tensors, target_errors, weight_targets
from app.domain.workload import readers_of
from bitwright.errors import ERRORS, BitwrightError, FieldProblem, IndivisibleGroup, InputError, InvalidRequest

WITHOUT_MODEL = (
    "{why}: its files' tensors are quantized one by one, without a model, and nothing is evaluated (weights only)"
)
NEEDED = (
    ("finetune", "a job without a model trains nothing; leave finetune and adapter out"),
    ("base_job", "a job without a model starts from no other job"),
    ("require", "a job without a model evaluates nothing that requirements could be held against; leave require out"),
)
"""Fields of a request that need a model, and the way out."""


def can_do_without_model(request: JobRequest) -> bool:
    """True if the request could be met by tensors of files alone, or asks for that."""
    if request.quantization.asks_for_weights_alone():
        return True
    return not request.quantization.needs_model() and request.finetune is None and request.base_job is None


def does_without_model(request: JobRequest, *, accepted: bool) -> bool:
    """True if the job runs without a model: it asks for that, or could and its model's type is not accepted."""
    spec = request.quantization
    return spec.asks_for_weights_alone() or (can_do_without_model(request) and not accepted)


def misfits(request: JobRequest, inspection: Inspection) -> list[FieldProblem]:
    """Group sizes, formats and adapters that do not fit the model's linears, and patterns that name none."""
    accepted, request = inspection.dimensions is not None, bound_to(request, inspection)
    if does_without_model(request, accepted=accepted):
        return _misfits_without_model(request, inspection)
    if inspection.dimensions is None:
        return []
    return _misfits_of_shapes(request, inspection, inspection.dimensions)


def warnings_of(request: JobRequest, inspection: Inspection) -> list[str]:
    """Warnings of a dry run about a pair that fits, beside estimates."""
    accepted, said = inspection.dimensions is not None, list[str]()
    request = bound_to(request, inspection)
    without_model = does_without_model(request, accepted=accepted)
    if without_model:
        kind = inspection.config.get("model_type")
        why = "quantization.weights_only" if accepted else f"model_type {str(kind)[:60]!r} is not an accepted type"
        said.append(WITHOUT_MODEL.format(why=why))
    if inspection.quantized is not None:
        said.append(f"model: {quantized_warning(inspection.quantized)}")
    if not inspection.tokenizer:
        readers = "" if without_model else " and ".join(readers_of(request))
        reason = f"which {readers} needs: add tokenizer.json" if readers else "so none goes with the result"
        said.append(f"model: the checkpoint has no tokenizer, {reason}")
    said += untied_warnings(request, inspection)
    said += fallback_warnings(request, inspection)
    if inspection.dimensions is not None and not without_model:
        short = dishonoured_rank(request.quantization, request.adapter, inspection.dimensions.linears())
        said += [short] if short else []
    return said + shape_warnings(request, inspection)


def fallback_warnings(request: JobRequest, inspection: Inspection) -> list[str]:
    """Linears that get another of llama.cpp's types than they were given, and the bits of a weight with that.

    Nothing where each is chosen: choices are what its rows can hold.
    """
    spec, dimensions = request.quantization, inspection.dimensions
    if dimensions is None or spec.chooses() or request.base_job is not None:
        return []
    shapes = dimensions.linears() | {HEAD: (dimensions.vocabulary, dimensions.hidden)}
    given = {name: spec.scheme_of(name) for name in shapes}
    if dimensions.tied_embeddings:
        given.pop(HEAD)
    embeddings = spec.embeddings_scheme()
    if embeddings is not None:
        shapes, given = shapes | {EMBEDDINGS: shapes[HEAD]}, given | {EMBEDDINGS: embeddings}
    wanted = {name: scheme for name, scheme in given.items() if scheme is not None and min(shapes[name]) > 0}
    bits = sum(Candidate(scheme).stored_bits(shapes[name]) for name, scheme in wanted.items())
    weights = sum(out * width for out, width in (shapes[name] for name in wanted))
    words = fallback_words(wanted, {name: shapes[name][1] for name in wanted}, bits / max(1, weights))
    return [] if words is None else [f"quantization.scheme: {words}"]


def shape_warnings(request: JobRequest, inspection: Inspection) -> list[str]:
    """Runtimes that load a requested format, but not linears of these shapes."""
    spec = request.quantization
    if does_without_model(request, accepted=inspection.dimensions is not None):
        if not inspection.tensors or target_errors(inspection.tensors, inspection.config, spec):
            return []
        found = weight_targets(inspection.tensors, inspection.config, spec).linears
        schemes = {target.name: target.scheme for target in found}
        outputs = {target.name: target.shape[0] for target in found}
    else:
        linears = {} if inspection.dimensions is None else inspection.dimensions.linears()
        schemes = {name: scheme for name in linears if (scheme := spec.scheme_of(name)) is not None}
        outputs = {name: out for name, (out, _) in linears.items()}
    return [
        warning
        for name in request.formats
        for warning in shape_warning(name.value, schemes, outputs, name.info.runtimes)
    ]


def problem_of(error: BitwrightError, path: str) -> FieldProblem:
    """An error about the field at `path` as one of several problems."""
    detail = f"{error.detail}; {error.hint}" if error.hint else error.detail
    return FieldProblem(field=path, code=error.code, detail=detail, value=error.value)


def refusal(problems: Sequence[FieldProblem]) -> BitwrightError:
    """The error for all of these problems: of their kind if they are of one, else an `InvalidRequest`."""
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    codes = {problem.code for problem in problems}
    kind = ERRORS.get(first.code, InvalidRequest) if len(codes) == 1 else InvalidRequest
    if not issubclass(kind, InputError):
        kind = InvalidRequest
    detail = f"{first.field}: {first.detail}{more}"
    return kind(detail, field=first.field, value=first.value, errors=tuple(problems))


def _misfits_of_shapes(request: JobRequest, inspection: Inspection, dimensions: Dimensions) -> list[FieldProblem]:
    inputs = {name: width for name, (_, width) in dimensions.linears().items()} | {HEAD: dimensions.hidden}
    spec, adapter = request.quantization, request.adapter
    # Names of files are not those of modules, and matrices of some types lie the other way round in them: what that
    # leaves open, the worker judges by the model that it opens.
    plain = not spec.modules.overrides and not dimensions.architecture.refusals
    problems = [
        problem_of(error, error.field or "quantization")
        for error in rule_errors(spec, inputs, head=HEAD, tied=dimensions.tied_embeddings)
        if dimensions.exact or (isinstance(error, IndivisibleGroup) and plain)
    ]
    if not problems:
        problems += [problem_of(e, e.field or "quantization") for e in reach_errors(request, inspection, dimensions)]
    if adapter is not None and dimensions.exact:
        misshapen = shape_errors(spec, adapter, dimensions.linears())
        problems += [problem_of(error, error.field or "adapter") for error in misshapen]
    quantized = {name: width for name, width in inputs.items() if spec.scheme_of(name) is not None}
    outputs = {name: rows for name, (rows, _) in dimensions.linears().items() if name in quantized}
    quantized |= {} if spec.embeddings_scheme() is None else {EMBEDDINGS: dimensions.hidden}
    if dimensions.exact:
        problems += head_problems(request.formats, spec, tied=dimensions.tied_embeddings)
    problems += _apart_from_tokens(spec, outputs)
    kind = dimensions.architecture.model_type
    return problems + model_problems(request.formats, kind, quantized, inspection.config, outputs)


def _apart_from_tokens(spec: WeightSpec, quantized: Collection[str]) -> list[FieldProblem]:
    """Experts, which see the tokens that are sent to them, where linears are to be tuned one by one on all tokens."""
    experts = next((name for name in quantized if "experts" in name.split(".")), None)
    if experts is None or not spec.tunes_linears_apart():
        return []
    detail = f'{experts} sees only the tokens that its router sends, and cannot be tuned apart; give "block"'
    return [FieldProblem(field="quantization.granularity", code="invalid_value", detail=detail, value="layer")]


def _misfits_without_model(request: JobRequest, inspection: Inspection) -> list[FieldProblem]:
    spec, inputs, outputs = request.quantization, dict[str, int](), dict[str, int]()
    problems = without_model_problems(request)
    tensors = seen_tensors(inspection.tensors, spec)
    if tensors:
        errors = target_errors(tensors, inspection.config, spec)
        problems += [problem_of(error, error.field or "quantization") for error in errors]
        if not errors:
            found = weight_targets(tensors, inspection.config, spec)
            inputs = {target.name: target.shape[1] for target in found.linears}
            outputs = {target.name: target.shape[0] for target in found.linears}
            problems += head_problems(request.formats, spec, tied=not has_head(tensors))
    kind = str(inspection.config.get("model_type"))
    return problems + model_problems(request.formats, kind, inputs, inspection.config, outputs)


WEIGHTS_ALONE = {SchemeName.NVFP4: SchemeName.NVFP4A16, SchemeName.FP8_TENSOR: SchemeName.FP8}
"""Schemes that store a number from calibration text, and what takes their place without a model."""


def _unmeasurable(spec: WeightSpec) -> list[FieldProblem]:
    """Numbers of activations that would be stored, and that nothing measures without a model."""
    problems = []
    for pattern, scheme in spec.schemes():
        if scheme.name in WEIGHTS_ALONE:
            where = f"quantization.modules.overrides.{pattern}.scheme" if pattern else "quantization.scheme"
            detail = (
                f"{scheme.name} stores a number of activations from calibration text, which needs the model; give "
                f'"{WEIGHTS_ALONE[scheme.name]}" to quantize the weights alone'
            )
            problems.append(
                FieldProblem(field=where, code="conflicting_fields", detail=detail, value=scheme.name.value)
            )
    if spec.kv_cache is not None:
        detail = "scales of a key-value cache are measured on calibration text, which needs the model; leave it out"
        problems.append(FieldProblem(field="quantization.kv_cache", code="conflicting_fields", detail=detail))
    return problems


def without_model_problems(request: JobRequest) -> list[FieldProblem]:
    """Parts of a request that a job without a model cannot do."""
    problems, spec = _unmeasurable(request.quantization), request.quantization
    if spec.chooses() or (spec.needs_model() and not problems):
        detail = "a budget is spent by what the model computes; give a number of bits to quantize the weights alone"
        problems.append(FieldProblem(field="quantization.bits", code="conflicting_fields", detail=detail))
    for name, detail in NEEDED:
        given = getattr(request, name)
        if given is not None and (name != "require" or given.model_dump(exclude_none=True)):
            problems.append(FieldProblem(field=name, code="conflicting_fields", detail=detail))
    for index, name in enumerate(request.formats):
        if name.info.architectures is not None or name.info.is_adapter:
            detail = f"{name.value} is written from a model; ask for native, merged or another packed format"
            problems.append(
                FieldProblem(field=f"formats.{index}", code="format_cannot_hold", detail=detail, value=name)
            )
    return problems
