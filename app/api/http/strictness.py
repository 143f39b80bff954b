"""Refusal of input that a route does not read: query parameters, bodies, and duplicate names.

One dependency of the whole application. It knows what a route reads from the route itself: its declared parameters,
and, of those that stand for many (`metadata.*`), what the OpenAPI document says of them.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.dependencies.models import Dependant

from app.api.auth import administrator, bearer, find_principal, name_caller, reader, submitter
from app.api.deps import get_state
from app.domain.request.problems import MAX_PROBLEMS, closest
from bitwright.errors import FieldProblem, InvalidRequest, shorten

OTHERS = ("/hub/",)
"""Paths of other services' interfaces: each version of their clients sends parameters of its own, passed over here."""
NO_BODY = (b"", b"{}", b"null")
"""Bodies of clients that have nothing to say."""


async def refuse_unread(request: Request) -> None:
    """Nothing, if the route reads all of the request.

    Raises:
        Unauthenticated, MissingScope: it does not, and the caller may not ask for it anyway: that comes first.
        InvalidRequest: names each parameter or field that is not read, and what was meant.
    """
    route = request.scope["route"]
    if route.path.startswith(OTHERS):
        return
    problems = [*query_problems(route, request.query_params.multi_items()), *await _body_problems(route, request)]
    if not problems:
        return
    for each in _dependants(route.dependant):
        if each.call in (reader, submitter, administrator):
            asked = (request, await get_state(request), await bearer(request))
            principal = await find_principal(*asked)
            await each.call(await name_caller(principal))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise InvalidRequest(f"{problems[0].field}: {problems[0].detail}{more}", errors=tuple(problems[:MAX_PROBLEMS]))


def query_problems(route: Any, given: Sequence[tuple[str, str]]) -> list[FieldProblem]:
    """Of the query (name, value): each name that the route does not read, and each that stands twice."""
    known, prefixes = declared_parameters(route)
    problems = []
    for name, count in Counter(name for name, _ in given).items():
        value = next(value for key, value in given if key == name)
        is_label = any(name.startswith(prefix) and name != prefix for prefix in prefixes)
        if name not in known and not is_label:
            detail = _unknown_parameter(name, [*known, *(f"{prefix}<name>" for prefix in prefixes)])
            problems.append(_problem(f"query.{shorten(name)}", "unknown_parameter", detail, value))
        elif count > 1:
            detail = f"stands {count} times in the query, and one value is read; send it once"
            problems.append(_problem(f"query.{shorten(name)}", "given_twice", detail, value))
    return problems


def declared_parameters(route: Any) -> tuple[list[str], list[str]]:
    """Names of the query parameters that a route reads, and prefixes of those of which it reads any."""
    known = dict.fromkeys(parameter.alias for each in _dependants(route.dependant) for parameter in each.query_params)
    extra = (route.openapi_extra or {}).get("parameters", [])
    families = [p for p in extra if p["in"] == "query" and p["schema"].get("type") == "object"]
    return list(known), [f"{p['name']}{'[' if p.get('style') == 'deepObject' else '.'}" for p in families]


def _unknown_parameter(name: str, known: Sequence[str]) -> str:
    """The problem of a parameter that is not among the known ones, with the name that may have been meant."""
    if not known:
        return "there is no such parameter; this route takes none"
    near = closest(name, known)
    meant = f"did you mean {near}? " if near else ""
    return f"there is no such parameter; {meant}there are: {', '.join(known)}"


async def _body_problems(route: Any, request: Request) -> list[FieldProblem]:
    """Fields that stand twice in a JSON body, and a body where none is read."""
    if "requestBody" in (route.openapi_extra or {}) and route.body_field is None:
        return []  # bytes, which the route reads as they come
    body = await request.body()
    if route.body_field is not None:
        return _type_problems(request, body) or [
            _problem(str(shorten(name)), "given_twice", "stands twice in one object, and one value is read", value)
            for name, value in repeated_names(body)
        ]
    if body.strip() in NO_BODY:
        return []
    detail = f"{request.method} {route.path} reads no body; leave it out"
    return [_problem("body", "unknown_field", detail, body.decode(errors="replace"))]


def _type_problems(request: Request, body: bytes) -> list[FieldProblem]:
    """curl's own Content-Type is that of a form, and the body then is no JSON, whatever it holds."""
    sent = request.headers.get("content-type", "")
    kind = sent.partition(";")[0].strip().lower()
    if not body or kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return []
    detail = f"send Content-Type: application/json; {'this body has none' if not sent else 'the body came as ' + kind}"
    return [_problem("header.Content-Type", "invalid_value", detail, sent or None)]


def repeated_names(body: bytes) -> list[tuple[str, object]]:
    """Names with the value that would win, wherever one object of a JSON text has a name twice."""
    repeated: list[tuple[str, object]] = []

    def look(pairs: list[tuple[str, object]]) -> dict[str, object]:
        members = dict(pairs)
        if len(members) < len(pairs):
            repeated.extend((name, members[name]) for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        return members

    try:
        json.loads(body, object_pairs_hook=look)
    except (ValueError, RecursionError):
        return []  # reported elsewhere
    return repeated


def _problem(field: str, code: str, detail: str, value: object) -> FieldProblem:
    return FieldProblem(field=field, code=code, detail=detail, value=shorten(value))


def _dependants(root: Dependant) -> Iterator[Dependant]:
    yield root
    for each in root.dependencies:
        yield from _dependants(each)
