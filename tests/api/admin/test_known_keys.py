"""Keys that are known for a moment: what changes one is seen at once here, and within a second elsewhere."""

import threading
import time

import pytest

from app.api.tenancy import known_keys
from app.api.tenancy.known_keys import KNOWN_SECONDS, KnownKeys
from app.domain.access import Principal
from app.store.session import Database
from app.store.tenancy.keys import revoke_key
from app.store.tenancy.tenants import Policy
from bitwright.errors import Unauthenticated
from bitwright.tenancy import Quotas
from tests.api.conftest import Api

GOOD = Principal("tnt_1", "key_1", frozenset())


def no_policy(_tenant_id: str) -> Policy:
    return Policy(Quotas())


def test_a_key_is_asked_for_once_in_its_time() -> None:
    asked: list[str] = []

    def ask(key: str) -> Principal:
        asked.append(key)
        return GOOD

    keys = KnownKeys(ask, no_policy, seconds=0.2)
    assert keys.known("a") is None
    assert keys.look_up("a") is GOOD
    assert keys.known("a") is GOOD
    assert keys.known("b") is None
    time.sleep(0.21)
    assert keys.known("a") is None
    keys.look_up("a")
    keys.forget()
    assert keys.known("a") is None
    assert asked == ["a", "a"]


def test_a_refusal_is_not_kept() -> None:
    def refuse(_key: str) -> Principal:
        raise Unauthenticated("no")

    keys = KnownKeys(refuse, no_policy)
    with pytest.raises(Unauthenticated):
        keys.look_up("a")
    assert keys.known("a") is None


def test_what_was_read_before_a_change_is_not_kept() -> None:
    reading, changed = threading.Event(), threading.Event()

    def slow(_key: str) -> Principal:
        reading.set()
        assert changed.wait(10)
        return GOOD

    keys = KnownKeys(slow, no_policy)
    thread = threading.Thread(target=keys.look_up, args=("a",))
    thread.start()
    assert reading.wait(10)
    keys.forget()  # a revocation, whose commit came after the read
    changed.set()
    thread.join(10)
    assert keys.known("a") is None


def test_strangers_keys_take_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_keys, "MOST_KNOWN", 3)
    keys = KnownKeys(lambda _key: GOOD, no_policy)
    for number in range(10):
        keys.look_up(str(number))
        assert len(keys._principals._found) <= 3
        assert keys.known(str(number)) is GOOD


@pytest.fixture
def used(api: Api) -> tuple[Api, str]:
    """An API that knows the submitter's key, and the key's id."""
    listed = api.admin.get(f"/v1/admin/tenants/{api.tenant_id}/keys").json()["items"]
    key = next(item["id"] for item in listed if api.key.startswith(item["start"]))
    assert api.client.get("/v1/jobs").status_code == 200
    return api, key


def test_a_key_revoked_over_http_is_refused_at_once(used: tuple[Api, str]) -> None:
    api, key = used
    assert api.admin.delete(f"/v1/admin/tenants/{api.tenant_id}/keys/{key}").status_code == 204
    assert api.client.get("/v1/jobs").status_code == 401


def test_a_key_revoked_by_another_process_is_refused_within_its_time(used: tuple[Api, str]) -> None:
    api, key = used
    other = Database(api.settings.database_url)
    with other.transaction() as session:
        revoke_key(session, api.tenant_id, key)
    other.close()
    time.sleep(KNOWN_SECONDS + 0.05)
    assert api.client.get("/v1/jobs").status_code == 401
