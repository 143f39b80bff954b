"""Tenants and API keys. A key is shown once and kept only as a hash."""

import hashlib
import re
import secrets
import string
import zlib
from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.domain.access import Principal, Scope
from app.store.clock import now
from app.store.ids import new_id, require_id
from app.store.models import ApiKey, Tenant
from app.store.upsert import upsert
from bitwright.errors import NotFound, Unauthenticated

BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
KEY_SHAPE = re.compile(r"bw_([0-9A-Za-z]{32})([0-9A-Za-z]{6})")
SHOWN = 8


def ensure_tenant(session: Session, name: str) -> Tenant:
    """The tenant of this name; made if there is none yet."""
    values = {"id": new_id("tnt"), "name": name, "created_at": now()}
    session.execute(upsert(session, Tenant).values(**values).on_conflict_do_nothing(index_elements=["name"]))
    return session.scalars(select(Tenant).where(Tenant.name == name)).one()


def issue_key(session: Session, tenant_id: str, *, name: str, scopes: frozenset[Scope]) -> tuple[ApiKey, str]:
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
    )
    session.add(key)
    session.flush()
    return key, plaintext


def authenticate(session: Session, plaintext: str) -> Principal:
    """The principal that a key stands for.

    Raises:
        Unauthenticated: no such key, or a revoked one. A mistyped key is told apart without asking the database.
    """
    shape = KEY_SHAPE.fullmatch(plaintext)
    if shape is None or _checksum(shape[1]) != shape[2]:
        raise Unauthenticated("the API key is malformed; a key is bw_ and 38 letters and digits")
    key = session.scalars(select(ApiKey).where(ApiKey.digest == _digest(plaintext))).one_or_none()
    principal = None if key is None else principal_of(key)
    if principal is None:
        raise Unauthenticated("the API key is unknown or revoked")
    return principal


def principal_of(key: ApiKey) -> Principal | None:
    """The principal that a stored key stands for now; None if it stands for nobody any more."""
    if key.revoked_at is not None:
        return None
    return Principal(tenant_id=key.tenant_id, key_id=key.id, scopes=frozenset(map(Scope, key.scopes)))


def list_keys(session: Session, tenant_id: str) -> Sequence[ApiKey]:
    """All keys of the tenant, revoked ones too, oldest first."""
    return session.scalars(select(ApiKey).where(ApiKey.tenant_id == tenant_id).order_by(ApiKey.id)).all()


def revoke_key(session: Session, tenant_id: str, key_id: str) -> None:
    """End a key's life; of a revoked one, the time stays.

    Raises:
        NotFound: the tenant has no such key.
    """
    require_id("key", key_id, "key")
    where = (ApiKey.id == key_id, ApiKey.tenant_id == tenant_id)
    if session.scalars(select(ApiKey.id).where(*where)).one_or_none() is None:
        raise NotFound(f"there is no key {key_id}", value=key_id)
    session.execute(update(ApiKey).where(*where, ApiKey.revoked_at.is_(None)).values(revoked_at=now()))


def _digest(plaintext: str) -> str:
    return hashlib.sha256(plaintext.encode()).hexdigest()


def _checksum(secret: str) -> str:
    """CRC-32 in six base-62 digits: 62^6 exceeds 2^32."""
    number = zlib.crc32(secret.encode())
    return "".join(BASE62[number // 62**place % 62] for place in range(5, -1, -1))
