"""Sessions of browsers: a random text in a cookie stands for a key, for a while, and ends with that key."""

import hashlib
import secrets

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app.domain.access import Principal
from app.store.clock import now, seconds_from_now
from app.store.models import PageSession
from app.store.tenancy.keys import principal_of

LIFE_SECONDS = 12 * 3600
RANDOM_BYTES = 32
MOST_OF_A_KEY = 50
"""Sessions of one key; a new one ends the oldest."""


def open_session(session: Session, principal: Principal) -> str:
    """The text of a new session, which cannot be had again."""
    text = secrets.token_urlsafe(RANDOM_BYTES)
    session.add(
        PageSession(
            digest=_digest(text),
            key_id=principal.key_id,
            tenant_id=principal.tenant_id,
            created_at=now(),
            expires_at=seconds_from_now(LIFE_SECONDS),
        )
    )
    session.flush()
    mine = PageSession.key_id == principal.key_id
    older = select(PageSession.digest).where(mine).order_by(PageSession.created_at.desc()).offset(MOST_OF_A_KEY)
    session.execute(delete(PageSession).where(PageSession.digest.in_(session.scalars(older).all())))
    return text


def find_session(session: Session, text: str) -> Principal | None:
    """The principal that a session stands for now; None if it is over, or its key is."""
    query = select(PageSession.key_id).where(PageSession.digest == _digest(text), PageSession.expires_at > now())
    key_id = session.scalars(query).one_or_none()
    return None if key_id is None else principal_of(session, key_id)


def end_session(session: Session, text: str) -> None:
    """End a session; one that is over already stays so."""
    session.execute(delete(PageSession).where(PageSession.digest == _digest(text)))


def remove_expired_sessions(session: Session) -> None:
    """Remove sessions whose time is over."""
    session.execute(delete(PageSession).where(PageSession.expires_at <= now()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
