"""Hub tokens of tenants and of single jobs: encrypted with the service's keys, erased at the job's end.

A token is there in the clear in three places only: the request that brings it, the supervisor that gives it to the
fetch, and the fetch's environment.
"""

import re
from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from pydantic import SecretStr
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app.store.clock import now, seconds_from_now
from app.store.models import HubToken
from app.store.upsert import upsert
from bitwright.errors import InvalidRequest, StorageError
from bitwright.tenancy import TOKEN_PATTERN

TOKEN_FIELD = "header.X-Hub-Token"  # noqa: S105 (a name)
JOB_TOKEN_SECONDS = 30 * 86_400.0
NO_KEY_HINT = "the operator sets BITWRIGHT_TOKEN_KEYS; `bitwright tenants token-key` makes one"


def checked_token(token: SecretStr, field: str = TOKEN_FIELD) -> str:
    """The text of a token that was sent.

    Raises:
        InvalidRequest: it is none. What it was is not told.
    """
    text = token.get_secret_value()
    if not re.fullmatch(TOKEN_PATTERN, text):
        hint = "copy it anew, without quotes or line ends"
        raise InvalidRequest("a token is one word of up to 500 printable ASCII characters", field=field, hint=hint)
    return text


class Vault:
    """Fernet with the service's keys: the first encrypts, all decrypt, so that one can follow another."""

    def __init__(self, keys: Sequence[SecretStr]) -> None:
        self._keys = MultiFernet([Fernet(key.get_secret_value()) for key in keys]) if keys else None

    def seal(self, token: str, *, field: str) -> str:
        """The token encrypted; `field` is where it came from.

        Raises:
            InvalidRequest: the service has no key to encrypt with.
        """
        if self._keys is None:
            raise InvalidRequest("this service keeps no tokens: it has no key for them", field=field, hint=NO_KEY_HINT)
        return self._keys.encrypt(token.encode()).decode()

    def open(self, sealed: str) -> str:
        """The token.

        Raises:
            StorageError: none of the service's keys opens it.
        """
        try:
            if self._keys is not None:
                return self._keys.decrypt(sealed).decode()
        except InvalidToken:
            pass
        detail = "a Hub token was encrypted with a key that this process does not have"
        raise StorageError(detail, hint="put the older key behind the newer one in BITWRIGHT_TOKEN_KEYS") from None

    def renewed(self, sealed: str) -> str:
        """The same token, encrypted with the first key."""
        token = self.open(sealed)
        return self.seal(token, field="hub_token")


def keep_token(
    session: Session, vault: Vault, token: str, *, tenant_id: str, job_id: str | None = None, field: str = "hub_token"
) -> None:
    """Keep the token of a tenant, or of its job, in place of an earlier one.

    Raises:
        InvalidRequest: see `Vault.seal`.
    """
    fresh = {"sealed": vault.seal(token, field=field), "created_at": now()}
    statement = upsert(session, HubToken).values(owner=job_id or tenant_id, tenant_id=tenant_id, job_id=job_id, **fresh)
    session.execute(statement.on_conflict_do_update(index_elements=["owner"], set_=fresh))


def erase_token(session: Session, owner: str) -> None:
    """Forget the token of a tenant or a job."""
    session.execute(delete(HubToken).where(HubToken.owner == owner))


def remove_old_tokens(session: Session) -> int:
    """Forget tokens of jobs that have been kept for `JOB_TOKEN_SECONDS`, whatever became of the jobs; their number."""
    old = delete(HubToken).where(
        HubToken.job_id.is_not(None), HubToken.created_at <= seconds_from_now(-JOB_TOKEN_SECONDS)
    )
    return len(session.execute(old.returning(HubToken.owner)).all())


def token_of(session: Session, vault: Vault, *, tenant_id: str, job_id: str) -> str | None:
    """The job's own token, else its tenant's; None if neither has one.

    Raises:
        StorageError: see `Vault.open`.
    """
    query = select(HubToken.owner, HubToken.sealed).where(
        HubToken.tenant_id == tenant_id, HubToken.owner.in_([job_id, tenant_id])
    )
    sealed = {row.owner: row.sealed for row in session.execute(query)}
    chosen = sealed.get(job_id) or sealed.get(tenant_id)
    return None if chosen is None else vault.open(chosen)


def renew_tokens(session: Session, vault: Vault) -> int:
    """Encrypt every kept token with the first key, so that the others can go; how many there are.

    Raises:
        StorageError: see `Vault.open`.
    """
    rows = session.scalars(select(HubToken).with_for_update()).all()
    for row in rows:
        row.sealed = vault.renewed(row.sealed)
    session.flush()
    return len(rows)
