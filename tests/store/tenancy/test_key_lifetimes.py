"""Keys that expire, follow each other, and tell when they were last used."""

from datetime import timedelta

import pytest
from sqlalchemy import select

from app.domain.access import Scope
from app.store.models import ApiKey
from app.store.session import Database
from app.store.tenancy import keys
from app.store.tenancy.tenants import change_tenant
from bitwright.errors import Conflict, NotFound, Unauthenticated
from bitwright.tenancy import TenantChange

DAY = 86_400.0


def issue(database: Database, tenant: str, seconds: float | None = None) -> tuple[ApiKey, str]:
    with database.transaction() as session:
        return keys.issue_key(
            session, tenant, name="ci", scopes=frozenset({Scope.READ, Scope.SUBMIT}), expires_in_seconds=seconds
        )


def rotate(database: Database, tenant: str, key_id: str, overlap: float) -> tuple[ApiKey, str]:
    with database.transaction() as session:
        return keys.rotate_key(session, tenant, key_id, overlap_seconds=overlap)


def is_valid(database: Database, plaintext: str) -> bool:
    with database.reading() as session:
        try:
            keys.authenticate(session, plaintext)
        except Unauthenticated:
            return False
    return True


def let_pass(database: Database, seconds: float) -> None:
    """Move the end of every key so far into the past."""
    with database.transaction() as session:
        for key in session.scalars(select(ApiKey).where(ApiKey.expires_at.is_not(None))):
            assert key.expires_at is not None
            key.expires_at -= timedelta(seconds=seconds)


def test_a_key_is_valid_until_it_expires(database: Database, tenant: str) -> None:
    _, forever = issue(database, tenant)
    _, brief = issue(database, tenant, 60)
    assert is_valid(database, brief)
    let_pass(database, 61)
    assert is_valid(database, forever)
    with database.reading() as session, pytest.raises(Unauthenticated, match="expired"):
        keys.authenticate(session, brief)


def test_two_keys_are_valid_during_an_overlap_and_one_after_it(database: Database, tenant: str) -> None:
    old, old_text = issue(database, tenant)
    new, new_text = rotate(database, tenant, old.id, 3600)
    assert (new.name, new.scopes, new.replaces, new.expires_at) == (old.name, old.scopes, old.id, None)
    assert new_text != old_text
    assert [is_valid(database, text) for text in (old_text, new_text)] == [True, True]
    let_pass(database, 3601)
    assert [is_valid(database, text) for text in (old_text, new_text)] == [False, True]


def test_a_rotated_key_lives_as_long_as_the_one_before_and_that_one_no_longer(database: Database, tenant: str) -> None:
    old, old_text = issue(database, tenant, 10 * DAY)
    new, new_text = rotate(database, tenant, old.id, 20 * DAY)
    assert old.expires_at is not None
    assert new.expires_at is not None
    assert abs((new.expires_at - new.created_at).total_seconds() - 10 * DAY) < 1
    let_pass(database, 9 * DAY)
    assert [is_valid(database, text) for text in (old_text, new_text)] == [True, True]
    let_pass(database, 2 * DAY)
    assert not is_valid(database, old_text), "an overlap never makes a key live longer"


def test_a_key_is_rotated_once_and_only_while_it_is_valid(database: Database, tenant: str, stranger: str) -> None:
    old, _ = issue(database, tenant)
    with pytest.raises(NotFound):
        rotate(database, stranger, old.id, 0)
    new, new_text = rotate(database, tenant, old.id, 3600)
    with pytest.raises(Conflict, match="before") as caught:
        rotate(database, tenant, old.id, 3600)
    assert caught.value.value == new.id
    with database.transaction() as session:
        keys.revoke_key(session, tenant, new.id)
    with pytest.raises(Conflict, match="not valid"):
        rotate(database, tenant, new.id, 0)
    assert not is_valid(database, new_text)
    ended, ended_text = issue(database, tenant, 1)
    let_pass(database, 2)
    with pytest.raises(Conflict, match="not valid"):
        rotate(database, tenant, ended.id, 0)
    assert not is_valid(database, ended_text)


def test_without_an_overlap_the_old_key_ends_at_once(database: Database, tenant: str) -> None:
    old, old_text = issue(database, tenant)
    _, new_text = rotate(database, tenant, old.id, 0)
    assert [is_valid(database, text) for text in (old_text, new_text)] == [False, True]


def test_the_last_use_only_moves_forward(database: Database, tenant: str) -> None:
    key, _ = issue(database, tenant)
    seen = []
    for ago in (50.0, 100.0, 10.0):
        with database.transaction() as session:
            keys.note_uses(session, {key.id: ago})
        with database.reading() as session:
            seen.append(session.get_one(ApiKey, key.id).last_used_at)
    first, second, third = seen
    assert first is not None
    assert third is not None
    assert first == second
    assert 35 < (third - first).total_seconds() < 45


def test_streams_end_with_the_life_of_their_key(database: Database, tenant: str) -> None:
    """What streams ask now and then: which of their keys are still good."""
    forever, brief = issue(database, tenant)[0].id, issue(database, tenant, 60)[0].id

    def good() -> frozenset[str]:
        with database.reading() as session:
            return keys.good_keys(session, {forever, brief, "key_x"})

    assert good() == {forever, brief}
    let_pass(database, 61)
    assert good() == {forever}
    with database.transaction() as session:
        change_tenant(session, tenant, TenantChange(suspended=True))
    assert good() == frozenset()
