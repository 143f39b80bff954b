"""Pydantic's errors as problems that name the field as the caller wrote it and state a way out.

Both come from the model's JSON Schema: followed along the error's location it tells which parts of that are tags of
unions, which a body does not have, and ends at what the field allows.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from types import MappingProxyType

from pydantic import BaseModel, ValidationError

from app.domain.request.foreign_names import field_meant, value_meant
from app.domain.request.sources import SHORT_MODEL
from bitwright.errors import FieldProblem, shorten

Location = tuple[int | str, ...]
Schema = Mapping[str, object]

MAX_PROBLEMS = 100
"""A body of a million wrong fields gets an answer of this many."""

CODES = MappingProxyType(
    {
        "missing": "missing_field",
        "union_tag_not_found": "missing_field",
        "extra_forbidden": "unknown_field",
        "conflicting_fields": "conflicting_fields",
        "value_error": "out_of_range",  # what our own validators raise; their message says what is right
    }
)
RANGES = ("greater_than", "less_than", "too_long", "too_short", "string_too", "finite_number", "int_parsing_size")
OWN = ("value_error", "value_refused", "conflicting_fields")
"""Errors of our own validators, whose context has the whole sentence."""
NULLABLE = "x-nullable"
"""Of a schema that was resolved: whether null is allowed, too."""
VALUES = ("literal", "enum", "union_tag_invalid", "value", "string_pattern", "string_unicode")


def field_problems(
    error: ValidationError, model: type[BaseModel], body: Mapping[str, object], shorthand: Sequence[str] = ()
) -> list[FieldProblem]:
    """A problem for each error of validating the full form of `body` as `model`.

    shorthand   names that `body` may have at its top besides
    """
    schema = _schema(model)
    definitions = _child(schema, "$defs")
    problems = []
    for item in error.errors(include_url=False)[:MAX_PROBLEMS]:
        kind, context = item["type"], item.get("ctx", {})
        path, node = _follow(schema, definitions, item["loc"])
        value = item["input"]
        if kind.startswith("union_tag"):
            tag = str(context["discriminator"]).strip("'")
            path, value = (*path, tag), context.get("tag")
            detail = f"must be {_choice(node)}"
        elif kind == "extra_forbidden":
            detail = unknown_field(model, item["loc"], shorthand)
        elif kind == "missing":
            detail, value = f"this field is needed: {_allowed(node, definitions)}", None
        elif item["loc"][-1] == "[key]":
            _, parent = _follow(schema, definitions, item["loc"][:-2])
            detail = f"the name must be {_text(_child(parent, 'propertyNames'))}"
        else:
            detail = str(context["error"]) if kind in OWN else f"must be {_allowed(node, definitions)}"
            detail += _meant_value(path, value)
        field = as_written(body, ".".join(map(str, path)))
        if kind == "string_pattern_mismatch" and field == "model" and "upload" not in item["loc"]:
            detail = f"must be {SHORT_MODEL}"
        problems.append(FieldProblem(field=field, code=_code(kind), detail=detail, value=shorten(value)))
    return problems


def _meant_value(path: Location, value: object) -> str:
    """Our name for another tool's scheme or format, as more of a sentence; "" where that is not known."""
    name = next((str(key) for key in reversed(path) if isinstance(key, str)), "")
    meant = value_meant(name, value)
    return f"; {meant}" if meant else ""


@lru_cache
def _schema(model: type[BaseModel]) -> Schema:
    return model.model_json_schema()


def as_written(body: Mapping[str, object], field: str) -> str:
    """The path of a field of the full form in the body that the caller sent, which may be shorthand.

    "quantization.bits" is "bits" where there is no `quantization`; "model.id" is "model" where that is a text, and a
    number stands for an object in the same way.
    """
    parts = field.split(".")
    if parts[0] == "quantization" and body.get("quantization") is None:
        return ".".join(parts[1:]) or "method"
    if parts[0] == "adapter" and body.get("adapter") is None:
        return "method" if parts[1:] in ([], ["kind"]) else ".".join(parts[1:])
    if parts[:2] == ["calibration", "mixture"] and "mixture" not in _section(body, "calibration"):
        parts[1] = "dataset"  # a list of datasets is a mixture
    value: object = body
    for depth, key in enumerate(parts):
        if isinstance(value, str | int):
            return ".".join(parts[:depth])
        if isinstance(value, list):
            value = value[int(key)] if key.isdigit() and int(key) < len(value) else None
        else:
            value = value.get(key) if isinstance(value, Mapping) else None
    return ".".join(parts)


def _section(body: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = body.get(name)
    return section if isinstance(section, Mapping) else {}


def with_new_problems(problems: list[FieldProblem], added: list[FieldProblem]) -> list[FieldProblem]:
    """Both, less what is found of a field whose problem is known: it would be the same mistake in other words."""
    fields = {problem.field for problem in problems}
    return problems + [problem for problem in added if problem.field not in fields]


def text_problems(body: Mapping[str, object]) -> list[FieldProblem]:
    """Texts and names in the body that no database, file system or UTF-8 can hold: U+0000 and lone surrogates.

    One problem for each place as it is shown: several such names in one object are one, and names that differ by what
    cannot be shown share what is told of them.
    """
    problems: dict[str, FieldProblem] = {}
    waiting: list[tuple[str, object]] = [("", body)]
    while waiting and len(problems) < MAX_PROBLEMS:
        path, value = waiting.pop()
        children: Sequence[tuple[object, object]] = ()
        if isinstance(value, str) and _is_unstorable(value):
            detail = "a text must not hold the character U+0000 or half of a surrogate pair; remove it"
            field = path or "body"
            problem = FieldProblem(field=field, code="invalid_value", detail=detail, value=shorten(value))
            problems.setdefault(field, problem)
        elif isinstance(value, Mapping):
            waiting += [(path, key) for key in value]
            children = list(value.items())
        elif isinstance(value, list):
            children = list(enumerate(value))
        waiting += [
            (f"{path}.{shorten(str(key))}" if path else str(shorten(str(key))), child) for key, child in children
        ]
    return list(problems.values())


def _is_unstorable(text: str) -> bool:
    return "\0" in text or any("\ud800" <= character <= "\udfff" for character in text)


def _follow(schema: Schema, definitions: Schema, location: Location) -> tuple[Location, Schema]:
    """The location without tags of unions, and the schema it leads to ({} where it leads to an unknown field)."""
    path: Location = ()
    node = schema
    for key in location:
        node = _resolve(node, definitions)
        tags = _child(_child(node, "discriminator"), "mapping")
        if tags:
            node = {"$ref": tags[str(key)]} if key in tags else {}
        elif "oneOf" in node:  # told apart by JSON type, which is the tag
            options = (_resolve(option, definitions) for option in _list(node, "oneOf"))
            node = next((option for option in options if option.get("type") == key), {})
        elif key != "[key]":
            path = (*path, key)
            properties, others = _child(node, "properties"), node.get("additionalProperties")
            node = (
                _child(properties, str(key)) or _child(node, "items") or (others if isinstance(others, Mapping) else {})
            )
    return path, _resolve(node, definitions)


def _resolve(node: Schema, definitions: Schema) -> Schema:
    """The schema behind references and behind "or null"."""
    while True:
        options = [option for option in _list(node, "anyOf") if option.get("type") != "null"]
        if "$ref" in node:
            target = _child(definitions, str(node["$ref"]).rpartition("/")[2])
            node = {**target, NULLABLE: node.get(NULLABLE, False)}
        elif len(options) == 1:
            nullable = len(options) < len(_list(node, "anyOf")) or node.get(NULLABLE, False)
            node = {**node, **options[0], NULLABLE: nullable}
            node.pop("anyOf")
        else:
            return node


def unknown_field(model: type[BaseModel], location: Location, shorthand: Sequence[str] = ()) -> str:
    """The problem of a name that no field at that place of a body has, with the one that may have been meant.

    shorthand   names that may stand at the top besides the model's; without any, the model is no request of a job
    """
    schema = _schema(model)
    definitions, name = _child(schema, "$defs"), str(location[-1])
    _, parent = _follow(schema, definitions, location[:-1])
    known = list(_child(parent, "properties"))
    short = [each for each in shorthand if each not in known] if len(location) == 1 else []
    if others := _others_with(schema, definitions, location):
        verb = "has" if len(others) == 1 else "have"
        return f"{location[-2]} has no {name}; {_one_of(others, 'and')} {verb} it"
    if name in short:
        beside = f"{name} stands at the top only beside a method that is the recipe of an adapter; "
        return f"there is no such field; {beside}there are: {', '.join(known)}; in shorthand also: {', '.join(short)}"
    if shorthand and (elsewhere := field_meant(name)):
        return f"there is no such field here; {elsewhere}"
    if shorthand and (places := [path for path in _places(schema, definitions) if path.rpartition(".")[2] == name]):
        return f"there is no such field here; did you mean {_one_of(places)}?"
    near = closest(name, [*known, *short])
    meant = f"did you mean {near}? " if near else ""
    besides = f"; in shorthand also: {', '.join(short)}" if short else ""
    return f"there is no such field; {meant}there are: {', '.join(known)}{besides}"


def _places(node: Schema, definitions: Schema, path: str = "") -> list[str]:
    """Paths of the fields of all objects below the top that are of one kind: names of the others are no one place's."""
    node = _resolve(node, definitions)
    mapping = _child(_child(node, "discriminator"), "mapping")
    kinds = [_resolve({"$ref": target}, definitions) for target in mapping.values()] or [node]
    found: dict[str, None] = {}
    for kind in kinds:
        for name in _child(kind, "properties"):
            below = f"{path}.{name}" if path else name
            if path and not mapping:
                found[below] = None
            found |= dict.fromkeys(_places(_child(_child(kind, "properties"), name), definitions, below))
    return list(found)


def _others_with(schema: Schema, definitions: Schema, location: Location) -> list[str]:
    """Other kinds of the object that have the field, where it is of one kind of several."""
    _, union = _follow(schema, definitions, location[:-2])
    kinds = _child(_child(union, "discriminator"), "mapping")
    return [
        kind
        for kind, target in kinds.items()
        if kind != location[-2] and location[-1] in _child(_resolve({"$ref": target}, definitions), "properties")
    ]


def closest(name: str, known: Sequence[str]) -> str | None:
    """The known name that a name was probably meant for, whatever its case and dashes."""
    plain = {_plain(each): each for each in reversed(known)}
    wanted = _plain(name)
    # Of several that begin so, the first one: those that came later are rarer.
    near = [each for each in map(_plain, known) if len(wanted) > 3 and each.startswith(wanted)][:1]
    near = near or get_close_matches(wanted, list(plain), n=1)
    near = near or [each for each in plain if len(wanted) > 3 and wanted in each][:1]
    return plain[near[0]] if near else None


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _allowed(node: Schema, definitions: Schema) -> str:
    """Values that a field takes, in words."""
    if "enum" in node or "const" in node:
        return _one_of([str(value) for value in _values(node)])
    if "discriminator" in node:
        name = _child(node, "discriminator")["propertyName"]
        return f"an object with {name} ({_choice(node)}), or a short text that stands for one"
    match node.get("type"):
        case "integer" | "number":
            return _number(node)
        case "boolean":
            return "true or false"
        case "string":
            return _text(node)
        case "array":
            entries = _resolve(_child(node, "items"), definitions)
            most = f" of at most {node['maxItems']}" if "maxItems" in node else ""
            return f"a list{most}, each {_allowed(entries, definitions)}"
        case _:
            most = f" of at most {node['maxProperties']} fields" if "maxProperties" in node else ""
            fields = list(_child(node, "properties"))
            those = f" with any of {', '.join(fields)}" if fields else ""
            return f"an object{most}{those}{', or null' if node.get(NULLABLE) else ''}"


def _number(node: Schema) -> str:
    noun = "a whole number" if node["type"] == "integer" else "a number"
    low, high, above = node.get("minimum"), node.get("maximum"), node.get("exclusiveMinimum")
    if low == -1 and high is not None and _child(node, "not").get("const") == 0:
        return f"{noun}, 1 to {high}, or -1"
    if low is not None and high is not None:
        return f"{noun}, {low} to {high}"
    bounds = [
        *([f"above {above}"] if above is not None else []),
        *([f"at least {low}"] if low is not None else []),
        *([f"at most {high}"] if high is not None else []),
    ]
    return f"{noun} {' and '.join(bounds)}".rstrip()


def _text(node: Schema) -> str:
    examples = node.get("examples")
    if isinstance(examples, list):
        return f"a text like {examples[0]}"
    least, most = node.get("minLength", 0), node.get("maxLength")
    return "a text" if most is None else f"a text of {least} to {most} characters"


def _choice(node: Schema) -> str:
    return _one_of(list(_child(_child(node, "discriminator"), "mapping")))


def _one_of(values: list[str], word: str = "or") -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} {word} {values[-1]}"


def _values(node: Schema) -> list[object]:
    values = node.get("enum", [node.get("const")])
    return list(values) if isinstance(values, list) else []


def _code(kind: str) -> str:
    if kind in CODES:
        return CODES[kind]
    if kind.startswith(RANGES):
        return "out_of_range"
    return "invalid_value" if kind.startswith(VALUES) else "wrong_type"


def _child(node: Schema, name: str) -> Schema:
    child = node.get(name)
    return child if isinstance(child, Mapping) else {}


def _list(node: Schema, name: str) -> list[Schema]:
    items = node.get(name)
    return [item for item in items if isinstance(item, Mapping)] if isinstance(items, list) else []
