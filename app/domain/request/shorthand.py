"""Shorthand requests and what they stand for. Expansion fills in structure, never judges values: validation does."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

from app.domain.adapters import ADAPTERS, GATE_TRAVEL, LEARNING_RATE, AdapterSpec, BayesianLoRASpec
from app.domain.format_rules import held_choices
from app.domain.formats import ExportFormat
from app.domain.methods import METHODS, RECIPES, SCHEMES, SchemeName
from app.domain.methods.goals import choice_order, spell_out
from app.domain.methods.schemes import OUTER
from app.domain.request.adapter_recipes import ADAPTER_RECIPES, expand_adapter
from app.domain.request.base_job import BaseJob, Folded, start_from
from app.domain.request.block_choices import fill_block_choices, fill_mix
from app.domain.request.combination_rules import default_result_formats
from app.domain.request.finetuning import Finetune
from app.domain.request.problems import closest
from app.domain.request.sources import expand_source
from bitwright.errors import FieldProblem, shorten
from bitwright.request import ADAPTER_SHORTHAND

SHORTHAND = (
    "method",
    *sorted({name for info in METHODS.values() for name in info.spec.model_fields} - {"method", "modules"}),
)
"""Fields of `quantization` that may stand at the top of the request instead."""
ALL_SHORTHAND = tuple(dict.fromkeys((*SHORTHAND, *ADAPTER_SHORTHAND)))
"""With those of `adapter`, which may do so where `method` is the recipe of one."""


@dataclass(frozen=True)
class Expansion:
    """The full form of a body, not yet validated.

    problems       those that only the expansion can see
    method_known   False: the method is missing or unknown, and another stands in so that the rest can be judged
    """

    body: dict[str, object]
    problems: list[FieldProblem]
    method_known: bool


class _AdapterPart(BaseModel):
    """The fields beside `quantization` that the formats follow from."""

    adapter: AdapterSpec | None = None
    merge: str | None = None
    round_offset: bool = False


def expand(body: Mapping[str, object], base_job: BaseJob | None = None) -> Expansion:
    """The full form of a body in shorthand or full form. `body` is not changed.

    base_job  the job that the body starts from
    """
    full = dict(body)
    problems = start_from(full, base_job)
    problems += expand_adapter(full)
    top = {name: full.pop(name) for name in SHORTHAND if name in full}
    inner = full.get("quantization")
    if inner is None:
        quantization: object = top
    else:
        quantization = inner
        problems += [_given_twice(name, value) for name, value in top.items()]
    method_known = False
    if isinstance(quantization, Mapping):
        prefix = "" if inner is None else "quantization."
        quantization, expanded, method_known = _expand_quantization(quantization, prefix)
        problems += expanded
    full["quantization"] = quantization
    _expand_sources(full)
    _apply_preset(full)
    fill_mix(full)
    _expand_outer(full)
    _fill_learning_rates(full)
    _fill_formats(full, None if base_job is None else base_job.folded)
    fill_block_choices(full)
    _fill_choices(full)
    return Expansion(full, problems, method_known)


def _given_twice(name: str, value: object) -> FieldProblem:
    detail = f"move {name} into quantization: its fields stand either there or at the top, not in both places"
    return FieldProblem(field=name, code="conflicting_fields", detail=detail, value=shorten(value))


def _expand_quantization(
    given: Mapping[str, object], prefix: str
) -> tuple[dict[str, object], list[FieldProblem], bool]:
    fields = dict(given)
    name = fields.get("method")
    problems: list[FieldProblem] = []
    if isinstance(name, str) and name in RECIPES:
        recipe = RECIPES[name]
        problems += [
            _against_recipe(prefix + field, name, meant, fields[field])
            for field, meant in recipe.items()
            if field != "method" and fields.get(field, meant) != meant
        ]
        fields |= recipe
    if isinstance(fields.get("method"), str) and fields["method"] in METHODS:
        return fields, problems, True
    return _with_stand_in(fields), [*problems, _method_problem(prefix, name, "method" in given)], False


def _against_recipe(field: str, recipe: str, meant: object, value: object) -> FieldProblem:
    detail = f"method {recipe!r} stands for {meant!r} here; leave the field out, or name the method itself"
    return FieldProblem(field=field, code="conflicting_fields", detail=detail, value=shorten(value))


def _method_problem(prefix: str, name: object, is_given: bool) -> FieldProblem:
    known = ", ".join([*METHODS, *RECIPES, *ADAPTER_RECIPES])
    if not is_given or name is None:
        detail = f"name a method; there are: {known}"
        return FieldProblem(field=f"{prefix}method", code="missing_field", detail=detail)
    near = closest(str(name), [*METHODS, *RECIPES, *ADAPTER_RECIPES])
    meant = f"did you mean {near}? " if near else ""
    detail = f"there is no method {shorten(name)!r}; {meant}there are: {known}"
    return FieldProblem(field=f"{prefix}method", code="unknown_method", detail=detail, value=shorten(name))


def _with_stand_in(fields: dict[str, object]) -> dict[str, object]:
    """The fields under the method that has most of them, without those that only another method has."""
    own = {name: set(info.spec.model_fields) for name, info in METHODS.items()}
    method = max(own, key=lambda name: len(own[name] & fields.keys()))
    foreign = set().union(*own.values()) - own[method]
    return {name: value for name, value in fields.items() if name not in foreign} | {"method": method}


def _expand_sources(body: dict[str, object]) -> None:
    if "model" in body:
        body["model"] = expand_source(body["model"])
    for name in ("calibration", "evaluation", "finetune"):
        section = body.get(name)
        if isinstance(section, Mapping) and "dataset" in section:
            body[name] = {**section, "dataset": expand_source(section["dataset"])}
    calibration = body.get("calibration")
    if isinstance(calibration, Mapping):
        body["calibration"] = _with_mixture(calibration)
    evaluation = body.get("evaluation")
    if isinstance(evaluation, Mapping) and isinstance(evaluation.get("tasks"), list):
        body["evaluation"] = {**evaluation, "tasks": [_with_source(task) for task in evaluation["tasks"]]}


def _with_mixture(calibration: Mapping[str, object]) -> dict[str, object]:
    """The section with a list of datasets as its mixture, each in full."""
    section = dict(calibration)
    if isinstance(section.get("dataset"), list) and "mixture" not in section:
        section["mixture"] = section.pop("dataset")
    if isinstance(section.get("mixture"), list):
        section["mixture"] = [_with_source(part) for part in section["mixture"]]  # type: ignore[attr-defined]
    return section


def _with_source(part: object) -> object:
    """A part of a list with its dataset in full."""
    if not isinstance(part, Mapping) or "dataset" not in part:
        return part
    return {**part, "dataset": expand_source(part["dataset"])}


def _apply_preset(body: dict[str, object]) -> None:
    """Fill the method's own fields and the calibration's size from the preset where the request is silent."""
    quantization = body.get("quantization")
    if not isinstance(quantization, dict):
        return
    info = METHODS[quantization["method"]]
    if not info.presets:
        return
    name = quantization.get("preset", info.spec.model_fields["preset"].default)
    preset = info.presets.get(str(name))
    if preset is None:
        return
    named = _named_schemes(quantization)
    for field, value in preset.fields(named).items():
        quantization.setdefault(field, value)
    calibration = body.get("calibration", {})
    if isinstance(calibration, Mapping):
        body["calibration"] = preset.text(named) | dict(calibration)


def _named_schemes(quantization: Mapping[str, object]) -> list[object]:
    """Values that stand where a request may name bits and schemes of linears, unchecked; of an average, whole bits."""
    modules = quantization.get("modules")
    overrides = modules.get("overrides") if isinstance(modules, Mapping) else None
    own = overrides.values() if isinstance(overrides, Mapping) else ()
    places = [quantization, *(each for each in own if isinstance(each, Mapping))]
    found = [each.get(name) for each in places for name in ("scheme", "bits")]
    average = found[1].get("average") if isinstance(found[1], Mapping) else None
    whole = math.floor(average) if isinstance(average, int | float) and math.isfinite(average) else None
    return [*found, whole]


def _expand_outer(body: dict[str, object]) -> None:
    """Schemes of embeddings and head in full: a width or a name alone, and the rest as the linears' default says."""
    quantization = body.get("quantization")
    modules = quantization.get("modules") if isinstance(quantization, dict) else None
    if not isinstance(quantization, dict) or not isinstance(modules, Mapping):
        return
    fields = METHODS[quantization["method"]].spec.model_fields
    silent = {name: quantization.get(name, fields[name].default) for name in ("group_size", "symmetric")}
    changed = dict(modules)
    for name in OUTER:
        given = modules.get(name)
        if isinstance(given, str):
            given = {"scheme": given}
        elif isinstance(given, int) and not isinstance(given, bool):
            given = {"bits": given}
        if isinstance(given, Mapping):
            changed[name] = dict(given) if given.get("scheme") is not None else {**silent, **given}
    quantization["modules"] = changed


def _fill_learning_rates(body: dict[str, object]) -> None:
    """Those that suit the kind of adapter, and of gates the number of steps, where the request is silent."""
    adapter, finetune = body.get("adapter"), body.get("finetune")
    if not isinstance(adapter, Mapping) or not isinstance(finetune, Mapping):
        return
    info = ADAPTERS.get(str(adapter.get("kind")))
    if info is None:
        return
    # A sum over a pool is not small, as a mean is.
    rate = info.learning_rate if adapter.get("pooling") != "sum" else LEARNING_RATE
    body["finetune"] = {"learning_rate": rate, **finetune}
    steps = finetune.get("steps", Finetune.model_fields["steps"].default)
    if info.spec is BayesianLoRASpec and isinstance(steps, int) and steps > 0:
        body["adapter"] = {"gate_learning_rate": min(1.0, GATE_TRAVEL / steps), **adapter}


def _fill_formats(body: dict[str, object], folded: Folded | None) -> None:
    """The formats that hold what the method makes, where the request names none and its method is described well."""
    quantization = body.get("quantization")
    if "formats" in body or not isinstance(quantization, dict):
        return
    try:
        spec = METHODS[quantization["method"]].spec.model_validate(quantization)
        fields = _AdapterPart.model_validate(body)
    except ValidationError:
        return
    body["formats"] = list(default_result_formats(spec, fields.adapter, fields.merge, fields.round_offset, folded))


class _ChoicePart(BaseModel):
    """The fields that the choices of a budget or goal follow from."""

    formats: tuple[ExportFormat, ...]


def _fill_choices(body: dict[str, object]) -> None:
    """Choices of a budget or goal that does not say them: what every format holds of the usual widths, or of the
    schemes of weights alone where that is one width at the most."""
    quantization = body.get("quantization")
    if not isinstance(quantization, dict):
        return
    for field in ("bits", "at_most", "fits"):
        given = quantization.get(field)
        if not isinstance(given, Mapping) or "choices" in given:
            continue
        try:
            spec = METHODS[quantization["method"]].spec.model_validate(quantization)
            formats = _ChoicePart.model_validate(body).formats
        except ValidationError:
            return
        found = held_choices(spec, formats, spec.choices())
        if len(found) < 2:
            weights_alone = [
                name for name in SchemeName if name in spec.named_schemes and SCHEMES[name].activations is None
            ]
            found += held_choices(spec, formats, weights_alone)
        if found:
            quantization[field] = {**given, "choices": spell_out(sorted(found, key=choice_order))}
