"""`bitwright tenants` and the lives of keys, in this process, on a migrated database."""

from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import select

from app.store.models import AuditEntry, HubToken, Tenant
from app.store.session import Database
from app.store.tenancy.hub_tokens import Vault, token_of
from tests.cli.processes import command

TOKEN = "hf_" + "C" * 34


@pytest.fixture
def where(sqlite_url: str, tmp_path: Path) -> dict[str, str]:
    return {"BITWRIGHT_DATABASE_URL": sqlite_url, "BITWRIGHT_DATA_DIR": str(tmp_path)}


def rows(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


def test_a_tenant_is_made_changed_listed_suspended_and_deleted(where: dict[str, str], sqlite_url: str) -> None:
    made = command("tenants", "create", "acme", "--quota", "queued_jobs=3", "--allow-model", "org/*", **where)
    assert made.stdout.startswith("tnt_")
    changed = command("tenants", "set", "acme", "--quota", "queued_jobs=", "--quota", "max_priority=-5", **where)
    assert changed.returncode == 0
    assert command("tenants", "suspend", "acme", **where).returncode == 0
    (row,) = rows(command("tenants", "list", **where).stdout)
    assert row == ["acme", made.stdout.strip(), "yes", "0", "0", "0", "max_priority=-5"]
    assert command("tenants", "resume", "acme", **where).returncode == 0
    assert command("tenants", "set", "acme", "--all-models", **where).returncode == 0
    database = Database(sqlite_url)
    with database.reading() as session:
        tenant = session.scalars(select(Tenant)).one()
        assert (tenant.allowed_models, tenant.suspended_at) == (None, None)
    assert command("tenants", "usage", "acme", **where).stdout == ""
    assert command("tenants", "delete", "acme", **where).returncode == 0
    assert command("tenants", "list", **where).stdout == ""
    with database.reading() as session:
        actions = session.scalars(select(AuditEntry.action).order_by(AuditEntry.id)).all()
        assert set(session.scalars(select(AuditEntry.key_id))) == {None}, "nobody's key: the command line"
    assert actions == ["tenant.created", *["tenant.changed"] * 4, "tenant.deleted"]
    database.close()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["create", "two words"], "name"),
        (["create", "a", "--quota", "queued=1"], "names are queued_jobs"),
        (["create", "a", "--quota", "uploads"], "NAME=NUMBER"),
        (["create", "a", "--quota", "uploads=-1"], "quotas.uploads"),
        (["set", "nobody", "--quota", "uploads=1"], "no tenant"),
    ],
)
def test_what_is_wrong_is_named(where: dict[str, str], words: list[str], says: str) -> None:
    done = command("tenants", *words, **where)
    assert done.returncode == 2
    assert says in done.stderr


def test_tokens_are_kept_sealed_and_renewed(where: dict[str, str], sqlite_url: str) -> None:
    old, new = (command("tenants", "token-key").stdout.strip() for _ in range(2))
    assert Fernet(old)
    assert old != new
    assert command("tenants", "create", "acme", **where).returncode == 0
    words = ("tenants", "hub-token", "acme")
    assert command(*words, typed=f"{TOKEN}\n", **where).returncode == 2, "without a key nothing can be kept"
    assert command(*words, typed=f"{TOKEN}\n", BITWRIGHT_TOKEN_KEYS=old, **where).returncode == 0
    assert command("tenants", "renew-tokens", BITWRIGHT_TOKEN_KEYS=f"{new},{old}", **where).returncode == 0
    database = Database(sqlite_url)
    with database.reading() as session:
        row = session.scalars(select(HubToken)).one()
        assert TOKEN not in row.sealed
        assert Fernet(new).decrypt(row.sealed.encode()).decode() == TOKEN
        assert token_of(session, Vault(()), tenant_id="tnt_x", job_id="") is None
    assert command("tenants", "hub-token", "acme", "--erase", **where).returncode == 0
    with database.reading() as session:
        assert session.scalars(select(HubToken)).all() == []
    database.close()


def test_a_key_is_rotated_and_expires(where: dict[str, str]) -> None:
    assert command("keys", "create", "--name", "ci", "--expires-in-days", "10", **where).stdout.startswith("bw_")
    ((first, *_, expires, used),) = rows(command("keys", "list", **where).stdout)
    assert expires
    assert used == ""
    rotated = command("keys", "rotate", first, "--overlap-hours", "1", **where)
    assert rotated.stdout.startswith("bw_")
    old, new = rows(command("keys", "list", **where).stdout)
    assert old[0] == first
    assert old[-2] < new[-2], "the old one ends when the overlap does"
    again = command("keys", "rotate", first, **where)
    assert again.returncode == 2
    assert new[0] in again.stderr
