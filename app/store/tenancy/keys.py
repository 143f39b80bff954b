"""Tenants and API keys. A key is shown once and kept only as a hash."""

import hashlib
import re
import secrets
import string
import zlib
from collections.abc import Mapping, Sequence, Set
from difflib import get_close_matches
from typing import Any

from sqlalchemy import Row, Select, func, or_, select, update
from sqlalchemy.orm import Session

from app.domain.access import Principal, Scope
from app.store.clock import now, seconds_from_now
from app.store.ids import new_id, require_id
from app.store.models import ApiKey, Tenant
from app.store.tenancy.tenants import own_quotas
from app.store.upsert import upsert
from bitwright.errors import Conflict, NotFound, Unauthenticated

BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
KEY_SHAPE = re.compile(r"bw_([0-9A-Za-z]{32})([0-9A-Za-z]{6})")
SHOWN = 8


def ensure_tenant(session: Session, name: str) -> Tenant:
    """The tenant of this name; made if there is none yet."""
    values = {"id": new_id("tnt"), "name": name, "created_at": now()}
    session.execute(upsert(session, Tenant).values(**values).on_conflict_do_nothing(index_elements=["name"]))
    return session.scalars(select(Tenant).where(Tenant.name == name)).one()


def find_tenant(session: Session, name: str) -> Tenant:
    """The tenant of this name.

    Raises:
        NotFound: there is none; the hint has the name that was meant, where one is alike.
    """
    tenant = session.scalars(select(Tenant).where(Tenant.name == name)).one_or_none()
    if tenant is None:
        names = session.scalars(select(Tenant.name).order_by(Tenant.name)).all()
        alike = get_close_matches(name, names, n=1)
        hint = f"did you mean {alike[0]}?" if alike else f"there are: {', '.join(names[:20]) or 'none yet'}"
        raise NotFound(f"there is no tenant {name!r}", field="tenant", value=name, hint=hint)
    return tenant


def issue_key(
    session: Session,
    tenant_id: str,
    *,
    name: str,
    scopes: frozenset[Scope],
    expires_in_seconds: float | None = None,
    replaces: str | None = None,
) -> tuple[ApiKey, str]:
    """A new key and its text, which cannot be had again."""
    secret = "".join(secrets.choice(BASE62) for _ in range(32))
    plaintext = f"bw_{secret}{_checksum(secret)}"
    key = ApiKey(
        id=new_id("key"),
        tenant_id=tenant_id,
        name=name,
        digest=_digest(plaintext),
        start=plaintext[:SHOWN],
        scopes=sorted(scopes),
        expires_at=None if expires_in_seconds is None else seconds_from_now(expires_in_seconds),
        replaces=replaces,
    )
    session.add(key)
    session.flush()
    session.refresh(key)
    return key, plaintext


def rotate_key(session: Session, tenant_id: str, key_id: str, *, overlap_seconds: float) -> tuple[ApiKey, str]:
    """A new key with the name, scopes and lifetime of this one, which ends after the overlap; the new one's text.

    Raises:
        NotFound: the tenant has no such key.
        Conflict: the key is revoked, has expired, or was rotated before.
    """
    old = _own_key(session, tenant_id, key_id, lock=True)
    at = session.scalars(select(now())).one()
    if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= at):
        detail = f"key {key_id} is not valid any more"
        raise Conflict(detail, value=key_id, hint="make a new one")
    successor = session.scalars(select(ApiKey.id).where(ApiKey.replaces == key_id)).first()
    if successor is not None:
        raise Conflict(
            f"key {key_id} was rotated before", value=successor, hint=f"rotate {successor}, which follows it"
        )
    lifetime = None if old.expires_at is None else (old.expires_at - old.created_at).total_seconds()
    scopes = frozenset(map(Scope, old.scopes))
    made = issue_key(session, tenant_id, name=old.name, scopes=scopes, expires_in_seconds=lifetime, replaces=key_id)
    end = seconds_from_now(overlap_seconds)
    sooner = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > end)
    session.execute(update(ApiKey).where(ApiKey.id == key_id, sooner).values(expires_at=end))
    return made


def authenticate(session: Session, plaintext: str) -> Principal:
    """The principal that a key stands for.

    Raises:
        Unauthenticated: no such key, or one that is revoked or has expired, or whose tenant is suspended. A mistyped
            key is told apart without asking the database.
    """
    shape = KEY_SHAPE.fullmatch(plaintext)
    if shape is None or _checksum(shape[1]) != shape[2]:
        raise Unauthenticated("the API key is malformed; a key is bw_ and 38 letters and digits")
    row = session.execute(_stored().where(ApiKey.digest == _digest(plaintext))).one_or_none()
    if row is None or row.revoked_at is not None:
        raise Unauthenticated("the API key is unknown or revoked")
    if row.expired:
        raise Unauthenticated("the API key has expired", hint="rotate it in time, or ask the operator for a new one")
    if row.suspended_at is not None:
        raise Unauthenticated("the key's tenant is suspended", hint="ask the operator of this service")
    return _principal(row)


def principal_of(session: Session, key_id: str) -> Principal | None:
    """The principal that a stored key stands for now; None if it stands for nobody any more."""
    row = session.execute(_stored().where(ApiKey.id == key_id)).one_or_none()
    good = row is not None and row.revoked_at is None and not row.expired and row.suspended_at is None
    return _principal(row) if good and row is not None else None


def _stored() -> Select[*tuple[Any, ...]]:
    """Keys with what decides whether they are good."""
    expired = func.coalesce(ApiKey.expires_at <= now(), False).label("expired")
    columns = (ApiKey.id, ApiKey.tenant_id, ApiKey.scopes, ApiKey.revoked_at, expired)
    return select(*columns, Tenant.suspended_at, Tenant.quotas).join(Tenant, Tenant.id == ApiKey.tenant_id)


def _principal(row: Row[Any]) -> Principal:
    return Principal(
        tenant_id=row.tenant_id,
        key_id=row.id,
        scopes=frozenset(map(Scope, row.scopes)),
        quotas=own_quotas(row.quotas),
    )


def note_uses(session: Session, uses: Mapping[str, float]) -> None:
    """Write when keys were last used, each given as seconds before now; a later time that is known stays."""
    for key_id, ago in sorted(uses.items()):
        at = seconds_from_now(-ago)
        newer = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < at)
        session.execute(update(ApiKey).where(ApiKey.id == key_id, newer).values(last_used_at=at))


def good_keys(session: Session, key_ids: Set[str]) -> frozenset[str]:
    """Those of the keys, by id, that `authenticate` would accept now."""
    valid = (
        ApiKey.revoked_at.is_(None),
        or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now()),
        Tenant.suspended_at.is_(None),
    )
    query = select(ApiKey.id).join(Tenant, Tenant.id == ApiKey.tenant_id).where(ApiKey.id.in_(key_ids), *valid)
    return frozenset(session.scalars(query))


def list_keys(session: Session, tenant_id: str) -> Sequence[ApiKey]:
    """All keys of the tenant, revoked ones too, oldest first."""
    return session.scalars(select(ApiKey).where(ApiKey.tenant_id == tenant_id).order_by(ApiKey.id)).all()


def revoke_key(session: Session, tenant_id: str, key_id: str) -> None:
    """End a key's life; of a revoked one, the time stays.

    Raises:
        NotFound: the tenant has no such key.
    """
    _own_key(session, tenant_id, key_id)
    this = (ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
    session.execute(update(ApiKey).where(*this).values(revoked_at=now()))


def _own_key(session: Session, tenant_id: str, key_id: str, *, lock: bool = False) -> ApiKey:
    require_id("key", key_id, "key")
    query = select(ApiKey).where(ApiKey.id == key_id, ApiKey.tenant_id == tenant_id)
    query = query.with_for_update() if lock else query
    key = session.scalars(query.execution_options(populate_existing=True)).one_or_none()
    if key is None:
        raise NotFound(f"there is no key {key_id}", value=key_id)
    return key


def _digest(plaintext: str) -> str:
    return hashlib.sha256(plaintext.encode()).hexdigest()


def _checksum(secret: str) -> str:
    """CRC-32 in six base-62 digits: 62^6 exceeds 2^32."""
    number = zlib.crc32(secret.encode())
    return "".join(BASE62[number // 62**place % 62] for place in range(5, -1, -1))
