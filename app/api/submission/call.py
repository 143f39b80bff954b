"""A request that may queue a job, as one argument: its caller, what the process has, and what the answer goes into."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import BackgroundTasks, Depends, Request, Response
from pydantic import SecretStr

from app.api.auth import Submitter
from app.api.deps import HubTokenHeader, IdempotencyHeader, State, StateOf
from app.api.submission.hub_child import Looks
from app.domain.access import Principal


@dataclass(frozen=True)
class Call:
    """The caller's request, apart from its body.

    hub   looks at models on the Hub; None: nobody looks
    """

    state: State
    principal: Principal
    http: Request
    response: Response
    background: BackgroundTasks
    hub: Looks | None
    hub_token: SecretStr | None = None
    idempotency_key: str | None = None


async def _call(
    *,
    state: StateOf,
    principal: Submitter,
    http: Request,
    response: Response,
    background: BackgroundTasks,
    hub_token: HubTokenHeader = None,
    idempotency_key: IdempotencyHeader = None,
) -> Call:
    return Call(state, principal, http, response, background, state.hub, hub_token, idempotency_key)


CallOf = Annotated[Call, Depends(_call)]
