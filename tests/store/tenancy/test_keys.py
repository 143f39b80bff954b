import hashlib
from typing import get_args

import pytest
from sqlalchemy import update

from app.domain.access import Scope
from app.store import ids
from app.store.clock import seconds_from_now
from app.store.ids import ALPHABET, Prefix, is_id, new_id, require_id
from app.store.models import ApiKey
from app.store.session import Database
from app.store.tenancy import keys
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


def test_a_checksum_is_crc32_in_six_digits_of_base_62() -> None:
    """CRC-32 of 32 letters A is 2905698078."""
    assert keys._checksum("A" * 32) == "3Ae0o2"
    assert keys._checksum("0123456789abcdefghijABCDEFGHIJzz") == "3T7FsN"
    assert keys.BASE62 == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def test_a_key_is_stored_by_its_sha256_and_shown_by_its_start(database: Database, tenant: str) -> None:
    key, plaintext = issue(database, tenant, Scope.SUBMIT, Scope.READ)
    with database.reading() as session:
        row = session.get_one(ApiKey, key.id)
    assert row.digest == hashlib.sha256(plaintext.encode()).hexdigest()
    assert (row.start, row.scopes) == (plaintext[:8], ["read", "submit"])
    assert len({issue(database, tenant, Scope.READ)[1] for _ in range(20)}) == 20


def test_a_key_that_is_revoked_again_keeps_its_first_time(database: Database, tenant: str) -> None:
    key, _ = issue(database, tenant, Scope.READ)
    times: list[object] = []
    for _ in range(2):
        with database.transaction() as session:
            keys.revoke_key(session, tenant, key.id)
        with database.transaction() as session:
            if not times:
                session.execute(update(ApiKey).where(ApiKey.id == key.id).values(revoked_at=seconds_from_now(-3600)))
        with database.reading() as session:
            times.append(session.get_one(ApiKey, key.id).revoked_at)
    assert times[0] == times[1]


def test_ids_begin_with_their_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.store.ids._SEQUENCE", type(ids._SEQUENCE)())
    monkeypatch.setattr("app.store.ids.time.time_ns", lambda: 1_700_000_000_123_999_999)
    first, second = new_id("job"), new_id("job")
    digits = "0123456789abcdefghjkmnpqrstvwxyz"
    numbers = [
        sum(digits.index(digit) << 5 * place for place, digit in enumerate(made[:3:-1])) for made in (first, second)
    ]
    assert [number >> 80 for number in numbers] == [1_700_000_000_123] * 2
    assert first[:4] == "job_"
    assert numbers[0] < numbers[1]
