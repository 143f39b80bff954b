from typing import get_args

import pytest

from app.domain.access import Scope
from app.store import keys
from app.store.ids import ALPHABET, Prefix, is_id, new_id, require_id
from app.store.models import ApiKey
from app.store.session import Database
from bitwright.errors import NotFound, Unauthenticated


def issue(database: Database, tenant: str, *scopes: Scope) -> tuple[ApiKey, str]:
    with database.transaction() as session:
        return keys.issue_key(session, tenant, name="ci", scopes=frozenset(scopes))


def test_a_key_stands_for_its_tenant_and_scopes(database: Database, tenant: str) -> None:
    key, plaintext = issue(database, tenant, Scope.SUBMIT)
    with database.reading() as session:
        principal = keys.authenticate(session, plaintext)
    assert (principal.tenant_id, principal.key_id, principal.scopes) == (tenant, key.id, frozenset({Scope.SUBMIT}))
    assert [principal.allows(scope) for scope in (Scope.READ, Scope.SUBMIT, Scope.ADMIN)] == [True, True, False]


def test_the_text_of_a_key_is_not_stored(database: Database, tenant: str) -> None:
    key, plaintext = issue(database, tenant, Scope.READ)
    with database.reading() as session:
        row = session.get_one(ApiKey, key.id)
        stored = "|".join(str(getattr(row, column.key)) for column in ApiKey.__table__.columns)
    assert plaintext not in stored
    assert plaintext[8:] not in stored
    assert len(plaintext) == 3 + 32 + 6


def test_a_revoked_key_is_refused_and_others_stay(database: Database, tenant: str) -> None:
    revoked, plaintext = issue(database, tenant, Scope.READ)
    _, other = issue(database, tenant, Scope.READ)
    with database.transaction() as session:
        keys.revoke_key(session, tenant, revoked.id)
    with database.reading() as session:
        with pytest.raises(Unauthenticated, match="revoked"):
            keys.authenticate(session, plaintext)
        assert keys.authenticate(session, other).tenant_id == tenant
        listed = keys.list_keys(session, tenant)
    assert [key.revoked_at is None for key in listed] == [False, True]


@pytest.mark.parametrize("pattern", ["{0}_", "", "bw_", "{0}\0", "{0} ", "Bearer {0}"])
def test_a_malformed_key_is_refused(database: Database, tenant: str, pattern: str) -> None:
    _, plaintext = issue(database, tenant, Scope.READ)
    with database.reading() as session, pytest.raises(Unauthenticated, match="malformed"):
        keys.authenticate(session, pattern.format(plaintext))


def test_a_mistyped_key_is_known_by_its_checksum(database: Database, tenant: str) -> None:
    _, plaintext = issue(database, tenant, Scope.READ)
    swapped = plaintext[:5] + ("x" if plaintext[5] != "x" else "y") + plaintext[6:]
    with database.reading() as session, pytest.raises(Unauthenticated, match="malformed"):
        keys.authenticate(session, swapped)


def test_a_key_of_the_right_shape_that_was_never_issued_is_refused(database: Database, tenant: str) -> None:
    secret = "A" * 32
    with database.reading() as session, pytest.raises(Unauthenticated, match="unknown"):
        keys.authenticate(session, f"bw_{secret}{keys._checksum(secret)}")


def test_another_tenants_key_cannot_be_revoked(database: Database, tenant: str, stranger: str) -> None:
    key, plaintext = issue(database, tenant, Scope.READ)
    with database.transaction() as session, pytest.raises(NotFound):
        keys.revoke_key(session, stranger, key.id)
    with database.reading() as session:
        assert keys.authenticate(session, plaintext).key_id == key.id
        assert keys.list_keys(session, stranger) == []


def test_a_tenant_is_made_once(database: Database) -> None:
    ids = []
    for _ in range(2):
        with database.transaction() as session:
            ids.append(keys.ensure_tenant(session, "team").id)
    assert ids[0] == ids[1]


def test_ids_sort_in_the_order_in_which_they_were_made() -> None:
    made = [new_id("job") for _ in range(5000)]
    assert made == sorted(made)
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("prefix", get_args(Prefix))
def test_ids_have_a_shape(prefix: Prefix) -> None:
    made = new_id(prefix)
    assert is_id(prefix, made)
    assert len(made) == 30
    assert set(made[4:]) <= set(ALPHABET)


@pytest.mark.parametrize("text", ["", "job_", "job_\0", "JOB_" + "0" * 26, "job_" + "u" * 26, "art_" + "0" * 26])
def test_what_is_no_id_is_not_found(text: str) -> None:
    with pytest.raises(NotFound):
        require_id("job", text, "job")
