"""The form that submits a job, with the dry run's answer beside it as one types."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from secrets import token_urlsafe
from typing import Annotated, Any

from fastapi import BackgroundTasks, Query, Request
from starlette.responses import RedirectResponse, Response

from app.api.deps import DatabaseOf, StateOf
from app.api.jobs import create_job
from app.api.pages.form_fields import FORMATS_FIELD, REST_FIELD, Field, Group, body_of, formats, groups_of
from app.api.pages.rendering import page, root_of
from app.api.pages.session import FORM, SEE_OTHER, Form, OwnForm, Visitor, VisitorOf, page_router
from app.api.submission.call import Call
from app.api.submission.hub_child import Looks
from app.api.views import PreflightView
from app.domain.access import Scope
from app.store.session import Database
from app.store.tenancy.totals import models_of
from bitwright.errors import BitwrightError

router = page_router()

FIRST_METHOD = "signround"
FILLED = {"method": FIRST_METHOD, "bits": "4"}
"""Values that the empty form begins with."""
LATEST_JOBS = 100
"""Jobs whose models the form proposes."""


@dataclass(frozen=True)
class Answer:
    """The dry run's answer to a form: the request as it would be stored, or what is wrong with it.

    problems   by name of the input; under "" what belongs to none of them
    body       the request's body, for the command line and for programs
    """

    body: Mapping[str, Any]
    view: PreflightView | None = None
    error: BitwrightError | None = None
    problems: Mapping[str, list[str]] = field(default_factory=dict)


@router.get("/submit")
def show_form(
    request: Request,
    found: VisitorOf,
    database: DatabaseOf,
    method: Annotated[str, Query(max_length=64)] = FIRST_METHOD,
    model: Annotated[str, Query(max_length=4096)] = "",
) -> Response:
    """The form, empty but for what the address says."""
    found.demand(Scope.SUBMIT)
    filled: Form = {name: (value,) for name, value in {**FILLED, "method": method, "model": model}.items()}
    return _form(request, found, database, filled)


@router.post("/submit", openapi_extra=FORM)
def take_form(
    request: Request, form: OwnForm, found: VisitorOf, state: StateOf, background: BackgroundTasks
) -> Response:
    """By the button: the form for another method, the dry run's answer, or the job.

    `typed` is the answer as one types, which asks the Hub nothing; `check` asks it.
    """
    found.demand(Scope.SUBMIT)
    action, method = _one(form, "action") or "submit", _one(form, "method") or FIRST_METHOD
    if action == "fields":
        return _form(request, found, state.database, form)
    fields = [each for group in groups_of(method, ()) for each in group.fields]
    dry = action in ("typed", "check")
    hub: Looks | None = state.hub.known_only() if state.hub is not None and action == "typed" else state.hub
    key = None if dry else _one(form, "once")
    body: dict[str, Any] = {}
    try:
        body = body_of(form, fields)
        call = Call(state, found.principal, request, Response(), background, hub, idempotency_key=key)
        made = create_job(body, call, dry_run=dry)
    except BitwrightError as error:
        answer = Answer(body, error=error, problems=_problems(error, fields))
        return _form(request, found, state.database, form, answer, status=200 if dry else error.status)
    if dry:
        answer = Answer(body, view=PreflightView.model_validate_json(made.body))
        return _form(request, found, state.database, form, answer)
    job = str(made.headers["Location"]).removeprefix("/v1")
    return RedirectResponse(f"{root_of(request)}{job}", SEE_OTHER, background=background)


def _form(
    request: Request,
    found: Visitor,
    database: Database,
    form: Form,
    answer: Answer | None = None,
    *,
    status: int = 200,
) -> Response:
    with database.reading() as session:
        models = [used.model for used in models_of(session, found.principal.tenant_id, LATEST_JOBS)]
    groups = groups_of(_one(form, "method") or FIRST_METHOD, models)
    return page(
        request,
        "submit",
        status=status,
        visitor=found,
        groups=[_opened(group, form, answer) for group in groups],
        values={name: values[0] for name, values in form.items()},
        formats=formats(),
        chosen=form.get(FORMATS_FIELD, ()),
        answer=answer,
        body_json=None if answer is None else json.dumps(answer.body, indent=2),
        once=_one(form, "once") or token_urlsafe(24),
    )


def _opened(group: Group, form: Form, answer: Answer | None) -> Group:
    """The group, unfolded if something in it is filled in or wrong."""
    wrong = {} if answer is None else answer.problems
    used = any(_one(form, each.name) or each.name in wrong for each in group.fields)
    return Group(group.title, group.fields, folded=group.folded and not used)


def _problems(error: BitwrightError, fields: list[Field]) -> dict[str, list[str]]:
    """Problems by the input where it is shown: the one of that name, or of which it is a part."""
    names = {each.name for each in fields} | {FORMATS_FIELD, REST_FIELD, "metadata"}
    told = [(one.field, one.detail) for one in error.errors] or [(error.field or "", error.detail)]
    found: dict[str, list[str]] = {}
    for place, detail in told:
        parts = place.removeprefix("quantization.").split(".")
        owner = next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in names), "")
        owner = owner or next((each.name for each in fields if place and each.name.startswith(f"{place}.")), "")
        found.setdefault(owner, []).append(detail if owner == place else f"{place}: {detail}" if place else detail)
    return found


def _one(form: Form, name: str) -> str | None:
    value = next(iter(form.get(name, ())), "").strip()
    return value or None
