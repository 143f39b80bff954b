"""Idempotency-Key: the same key with the same request gives the same job or upload, for a day."""

import hashlib
import re
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.orm import InstrumentedAttribute, Session

from app.store.clock import now, seconds_from_now
from app.store.models import IdempotencyKey
from app.store.upsert import upsert
from bitwright.errors import Conflict, InvalidRequest, KeyReused

KEPT_SECONDS = 24 * 3600
KEY_SHAPE = re.compile(r"[\x21-\x7e]{1,255}")
Made = InstrumentedAttribute[str | None]
"""The column of what a key stands for: `IdempotencyKey.job_id` or `IdempotencyKey.upload_id`."""


@dataclass(frozen=True)
class Idempotency:
    """A caller's key and what it stands for."""

    key: str
    fingerprint: str
    """sha256, 64 hex digits, of what was asked for."""

    @classmethod
    def of(cls, key: str, request: BaseModel) -> Self:
        """The key for a request; shorthand and full form of one request have one fingerprint.

        Raises:
            InvalidRequest: the key is not 1 to 255 visible ASCII characters.
        """
        if not KEY_SHAPE.fullmatch(key):
            detail = "an Idempotency-Key is 1 to 255 visible ASCII characters, without spaces"
            raise InvalidRequest(detail, field="Idempotency-Key", value=key, hint="take a UUID, for one")
        # Not sorted by name: the order of modules.overrides is part of the request.
        return cls(key=key, fingerprint=hashlib.sha256(request.model_dump_json().encode()).hexdigest())


def take_key(session: Session, tenant_id: str, idempotency: Idempotency, column: Made, made_id: str) -> str:
    """The id of what the key stands for: `made_id` if the key was free or had expired, else the earlier one's.

    A second transaction with the key waits here until the first ends, then sees what that one stored.

    Raises:
        KeyReused: the key stands for another request.
        Conflict: it ended to stand for one while this looked.
    """
    fresh = {
        "fingerprint": idempotency.fingerprint,
        "job_id": None,
        "upload_id": None,
        column.key: made_id,
        "created_at": now(),
        "expires_at": seconds_from_now(KEPT_SECONDS),
    }
    statement = (
        upsert(session, IdempotencyKey)
        .values(tenant_id=tenant_id, key=idempotency.key, **fresh)
        .on_conflict_do_update(
            index_elements=["tenant_id", "key"], set_=fresh, where=IdempotencyKey.expires_at <= now()
        )
        .returning(IdempotencyKey.key)
    )
    if session.execute(statement).one_or_none() is not None:
        return made_id
    standing = find_key(session, tenant_id, idempotency, column)
    if standing is None:
        detail = "what this Idempotency-Key stood for has just been deleted"
        raise Conflict(detail, hint="send the request again")
    return standing


def made_by(session: Session, tenant_id: str, key: str, column: Made) -> str | None:
    """The id of what a key stands for now, whatever was asked for; None if it is free."""
    same_key = (IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.key == key)
    return session.scalars(select(column).where(*same_key, IdempotencyKey.expires_at > now())).one_or_none()


def find_key(session: Session, tenant_id: str, idempotency: Idempotency, column: Made) -> str | None:
    """The id of what the key stands for now; None if it is free.

    Raises:
        KeyReused: the key stands for another request.
    """
    same_key = (IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.key == idempotency.key)
    query = select(IdempotencyKey.fingerprint, column).where(*same_key, IdempotencyKey.expires_at > now())
    earlier = session.execute(query).one_or_none()
    if earlier is None:
        return None
    fingerprint, standing = earlier
    if fingerprint != idempotency.fingerprint:
        detail = "this Idempotency-Key was used for another request in the last 24 hours; use a new key"
        raise KeyReused(detail, field="Idempotency-Key", value=idempotency.key)
    return standing
