"""Fields of the submit form, made from the schemas of a request, and the request that a filled form stands for.

A field's name is its place in the request: `calibration.num_samples`, or `bits` for what may stand at the top. What is
left empty is left out, so that the service fills in its default. Values that are no number stay as they were typed:
the checks of every request name them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from app.api.pages.session import Form
from app.domain.adapters import ADAPTERS
from app.domain.formats import FORMATS
from app.domain.methods import METHODS, RECIPES
from app.domain.request.adapter_recipes import ADAPTER_RECIPES
from app.domain.request.finetuning import Finetune
from app.domain.request.job_request import SHORTHAND, Calibration, Evaluation, JobRequest, Requirements
from bitwright.errors import FieldProblem, InvalidRequest

Kind = Literal["text", "integer", "number", "flag", "choice"]
KINDS: Mapping[str, Kind] = {"string": "text", "integer": "integer", "number": "number", "boolean": "flag"}
FORMATS_FIELD, LABELS_FIELD, REST_FIELD, LOADS_FIELD = "formats", "metadata", "rest", "require.loads"
APART = frozenset({"method", "modules", "kv_cache", "bits", "scheme", "preset", "group_size", "symmetric"})
"""Fields of a method that stand elsewhere on the form, or in its JSON."""
FIRST = ("bits", "scheme", "preset", "group_size", "symmetric")
BY_PRESET = "Empty: as the preset says."
SOURCES = "org/name on the Hub, a path under a root of the service, or the id of an upload"


@dataclass(frozen=True)
class Field:
    """An input.

    name       its place in the request
    choices    what may be chosen; "" stands for the default
    default    what an empty input means, in words
    least, most   bounds of a number
    """

    name: str
    label: str
    kind: Kind
    about: str = ""
    choices: tuple[str, ...] = ()
    default: str = ""
    least: float | None = None
    most: float | None = None
    needed: bool = False
    known: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Fields under a heading; folded ones open on demand."""

    title: str
    fields: tuple[Field, ...]
    folded: bool = True


def groups_of(method: str, models: Sequence[str]) -> list[Group]:
    """All fields for a method or recipe; `models` are proposed as names."""
    recipe = ADAPTER_RECIPES.get(method)
    fixed = dict(RECIPES.get(method, {}) if recipe is None else recipe.expands_to())
    info = METHODS.get(str(fixed.get("method", method)))
    own = {} if info is None else {field.name: field for field in of_schema(info.spec.model_json_schema())}
    own |= {name: replace(own[name], default=in_words(value)) for name, value in fixed.items() if name in own}
    preset = {name for each in (info.presets.values() if info is not None else ()) for name in each.spec}
    own |= {
        name: replace(own[name], default="", about=f"{own[name].about} {BY_PRESET}") for name in preset & own.keys()
    }
    calibration = tuple(of_schema(Calibration.model_json_schema(), "calibration."))
    if preset:
        calibration = (
            calibration[0],
            *(replace(each, default="", about=f"{each.about} {BY_PRESET}") for each in calibration[1:]),
        )
    first = tuple(own[name] for name in FIRST if name in own)
    rest = tuple(field for name, field in own.items() if name.partition(".")[0] not in APART)
    found = [
        Group("", (_model(models), _method(), *first), folded=False),
        Group(f"More of {method}", tuple(field for field in rest if "." not in field.name)),
        Group("A goal in place of bits", tuple(field for field in rest if "." in field.name)),
        Group("Training of an adapter", tuple(_training(recipe is not None)), folded=recipe is None),
        Group("Calibration text", calibration),
        Group("Evaluation text", tuple(of_schema(Evaluation.model_json_schema(), "evaluation."))),
        Group("Requirements", tuple(of_schema(Requirements.model_json_schema(), "require."))),
        Group("The job", tuple(_job())),
    ]
    return [group for group in found if group.fields]


def of_schema(schema: Mapping[str, Any], prefix: str = "") -> Iterator[Field]:
    """The simple fields of an object's JSON Schema, and those of objects in it, by their whole names."""
    definitions, needed = schema.get("$defs", {}), schema.get("required", ())
    for name, own in schema["properties"].items():
        if name == "dataset":
            yield Field(f"{prefix}{name}", "dataset", "text", SOURCES + '; or "builtin"', default=_default(own))
            continue
        for option in _options(own, definitions):
            if "properties" in option and not prefix:
                inner = {**option, "$defs": definitions}
                yield from of_schema(inner, f"{name}.")
                break
            field = _simple(f"{prefix}{name}", name, {**own, **option}, needed=name in needed)
            if field is not None:
                yield field
                break


def _options(own: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Schemas that a field may have, references followed; its first simple form comes first."""
    for option in own.get("anyOf", own.get("oneOf", [own])):
        target = option.get("$ref")
        yield definitions[target.rpartition("/")[2]] if target else option


def _simple(name: str, label: str, own: Mapping[str, Any], *, needed: bool) -> Field | None:
    about: dict[str, Any] = {"about": str(own.get("description", "")), "default": _default(own), "needed": needed}
    label = label.replace("_", " ")
    if "enum" in own:
        return Field(name, label, "choice", choices=tuple(map(str, own["enum"])), **about)
    kind = KINDS.get(str(own.get("type")))
    if kind is None:
        return None
    if kind == "flag":
        return Field(name, label, kind, choices=("yes", "no"), **about)
    least, most = own.get("minimum", own.get("exclusiveMinimum")), own.get("maximum", own.get("exclusiveMaximum"))
    if least is not None and kind == "integer" and most is not None and most > 2**53:
        most = None
    return Field(name, label, kind, least=least, most=most, **about)


def _default(own: Mapping[str, Any]) -> str:
    return in_words(own.get("default"))


def in_words(value: object) -> str:
    """A value as it is typed; empty for what the form has no words for."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return str(value.get("source", ""))
    return str(value) if isinstance(value, str | int | float) else ""


def _model(models: Sequence[str]) -> Field:
    return Field("model", "model", "text", SOURCES, needed=True, known=tuple(models))


def _method() -> Field:
    names = (*METHODS, *RECIPES, *ADAPTER_RECIPES)
    return Field("method", "method", "choice", "the page on methods describes each", choices=names, needed=True)


def _training(recipe: bool) -> Iterator[Field]:
    """Fields of the adapter and of its training; a recipe names the adapter's kind."""
    if not recipe:
        about = "what is trained beside the quantized linears; empty: nothing"
        yield Field("adapter.kind", "adapter", "choice", about, choices=tuple(ADAPTERS))
    prefix = "" if recipe else "adapter."
    lora = {field.name: field for field in of_schema(ADAPTERS["lora"].spec.model_json_schema())}
    for name in ("rank", "alpha", "dropout"):
        yield replace(lora[name], name=f"{prefix}{name}")
    yield from of_schema(Finetune.model_json_schema(), "finetune.")
    merge = "fold the adapter into the weights; empty: it stays apart"
    yield Field("merge", "merge", "choice", merge, choices=("quantized", "16bit"))


def _job() -> Iterator[Field]:
    schema = JobRequest.model_json_schema()
    names = ("seed", "verify", "device", "priority", "time_limit_seconds")
    kept = {**schema, "properties": {name: schema["properties"][name] for name in names}}
    yield from of_schema(kept)


def formats() -> list[tuple[str, str]]:
    """Names and titles of the formats that can be asked for."""
    return [(name.value, info.title) for name, info in FORMATS.items()]


def body_of(form: Form, fields: Sequence[Field]) -> dict[str, Any]:
    """The request's body that a filled form stands for.

    Raises:
        InvalidRequest: the JSON of the rest is none.
    """
    body: dict[str, Any] = {}
    for field in fields:
        text = next(iter(form.get(field.name, ())), "").strip()
        if text:
            put(body, field.name, value_of(field, text))
    if chosen := [name for name in form.get(FORMATS_FIELD, ()) if name]:
        body["formats"] = chosen
    if labels := labels_of(next(iter(form.get(LABELS_FIELD, ())), "")):
        body["metadata"] = labels
    rest = rest_of(next(iter(form.get(REST_FIELD, ())), ""))
    if isinstance(rest.get("quantization"), dict):
        # Its fields stand either there or at the top, not in both places.
        inner = {name: body.pop(name) for name in SHORTHAND if name in body}
        rest = {**rest, "quantization": merged(inner, rest["quantization"])}
    return merged(body, rest)


def value_of(field: Field, text: str) -> object:
    """A value as the request has it; a text that is none of its kind stays."""
    if field.kind == "flag":
        return {"yes": True, "no": False}.get(text, text)
    try:
        return int(text) if field.kind == "integer" else float(text) if field.kind == "number" else text
    except ValueError:
        return text


def put(body: dict[str, Any], name: str, value: object) -> None:
    """Set the value at a dotted name."""
    *above, last = name.split(".")
    for part in above:
        body = body.setdefault(part, {})
    body[last] = value


def labels_of(text: str) -> dict[str, str]:
    """Labels, one name=value a line."""
    lines = [line.partition("=") for line in text.splitlines() if line.strip()]
    return {name.strip(): value.strip() for name, _, value in lines}


def rest_of(text: str) -> dict[str, Any]:
    """Fields that were typed as JSON.

    Raises:
        InvalidRequest: it is no object.
    """
    if not text.strip():
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        detail = f"this is no JSON: {error}"[:300]
        raise _refused(detail) from error
    if not isinstance(found, dict):
        raise _refused("a request's fields are a JSON object: { ... }")
    return found


def _refused(detail: str) -> InvalidRequest:
    problem = FieldProblem(field=REST_FIELD, code="invalid_value", detail=detail)
    return InvalidRequest(detail, field=REST_FIELD, errors=(problem,))


def merged(body: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The body with more fields, which win; objects are joined."""
    joined = dict(body)
    for name, value in more.items():
        mine = joined.get(name)
        joined[name] = merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return joined
