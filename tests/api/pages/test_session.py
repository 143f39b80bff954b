"""Sessions: a key is exchanged for a cookie that opens pages alone, for a while, from our own pages and names."""

import hashlib
from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import select, update
from starlette.testclient import TestClient

from app.api.pages.log_ins import FAILURES, MOST_ADDRESSES, WINDOW_SECONDS, LogIns, whose
from app.api.pages.session import PLAIN_COOKIE, SECURE_COOKIE, host_of, is_known, local_path
from app.domain.access import Principal, Scope
from app.settings import Settings
from app.store.models import PageSession
from app.store.tenancy.keys import issue_key, revoke_key
from app.store.tenancy.page_sessions import (
    LIFE_SECONDS,
    MOST_OF_A_KEY,
    find_session,
    open_session,
    remove_expired_sessions,
)
from bitwright.errors import TooManyRequests
from tests.api.conftest import BROWSER, Api, problem
from tests.api.pages.conftest import Html

PAGES = ("/submit", "/compare", "/models", "/workers", "/catalogue", "/usage")


def test_without_a_session_every_page_leads_to_the_log_in(api: Api) -> None:
    job_id = api.submit()
    for path in ("/", *PAGES, "/keys", f"/jobs/{job_id}", f"/jobs/{job_id}/report", f"/jobs/{job_id}/archive"):
        answer = api.anonymous.get(path, headers=BROWSER, follow_redirects=False)
        assert answer.status_code == 303, path
        assert answer.headers["location"].startswith("/login"), path
        assert answer.headers["cache-control"] == "no-store"
    answer = api.anonymous.get("/compare?jobs=a%20b", headers=BROWSER, follow_redirects=False)
    assert answer.headers["location"] == "/login?next=%2Fcompare%3Fjobs%3Da%2520b"


def test_a_key_opens_pages_and_only_pages(api: Api) -> None:
    browser = api.visitor()
    for path in ("/", *PAGES):
        answer = browser.get(path, follow_redirects=False)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-frame-options"] == "DENY"
    for path in ("/v1/jobs", "/v1/workers", "/v1/methods"):
        problem(browser.get(path), 401, "unauthenticated")
    problem(browser.post("/v1/jobs", json={"model": "org/name", "method": "rtn"}), 401, "unauthenticated")


def test_the_cookie_is_as_closed_as_cookies_are(api: Api) -> None:
    for scheme, name, secure in (("http", PLAIN_COOKIE, False), ("https", SECURE_COOKIE, True)):
        browser = TestClient(api.client.app, base_url=f"{scheme}://testserver")
        headers = {**BROWSER, "Origin": f"{scheme}://testserver"}
        answer = browser.post("/login", data={"key": api.key}, headers=headers, follow_redirects=False)
        cookie, *flags = answer.headers["set-cookie"].split("; ")
        assert cookie.startswith(f"{name}=")
        assert {flag.lower() for flag in flags} >= {"httponly", "path=/", "samesite=strict", f"max-age={LIFE_SECONDS}"}
        assert ("Secure" in flags) == secure
        assert "domain" not in answer.headers["set-cookie"].lower()
        assert browser.get("/", headers=headers).status_code == 200


def test_the_store_knows_a_session_by_its_hash_alone(api: Api) -> None:
    browser = api.visitor()
    text = browser.cookies[PLAIN_COOKIE]
    with api.database.reading() as session:
        (stored,) = session.scalars(select(PageSession)).all()
    assert stored.digest == hashlib.sha256(text.encode()).hexdigest()
    assert stored.expires_at - stored.created_at == pytest.approx(timedelta(hours=12), abs=timedelta(seconds=5))


def test_a_session_ends_with_its_key(api: Api) -> None:
    with api.database.transaction() as session:
        key, text = issue_key(session, api.tenant_id, name="short", scopes=frozenset({Scope.READ}))
    browser = api.visitor(text)
    assert browser.get("/usage", follow_redirects=False).status_code == 200
    with api.database.transaction() as session:
        revoke_key(session, api.tenant_id, key.id)
    assert browser.get("/usage", follow_redirects=False).status_code == 303


def test_a_session_ends_after_its_time_and_is_removed(api: Api) -> None:
    browser = api.visitor()
    with api.database.transaction() as session:
        stored = session.scalars(select(PageSession)).one()
        session.execute(update(PageSession).values(expires_at=stored.created_at - timedelta(seconds=1)))
    assert browser.get("/usage", follow_redirects=False).status_code == 303
    with api.database.transaction() as session:
        remove_expired_sessions(session)
    with api.database.reading() as session:
        assert session.scalars(select(PageSession)).all() == []


def test_logging_out_ends_the_session_itself(api: Api) -> None:
    browser = api.visitor()
    text = browser.cookies[PLAIN_COOKIE]
    answer = browser.post("/logout", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    browser.cookies.set(PLAIN_COOKIE, text)
    assert browser.get("/usage", follow_redirects=False).status_code == 303


def test_a_key_has_so_many_sessions_and_no_more(api: Api) -> None:
    with api.database.transaction() as session:
        key, _ = issue_key(session, api.tenant_id, name="many", scopes=frozenset({Scope.READ}))
    principal = Principal(tenant_id=api.tenant_id, key_id=key.id, scopes=frozenset({Scope.READ}))
    texts = []
    for _ in range(MOST_OF_A_KEY + 2):
        with api.database.transaction() as session:
            texts.append(open_session(session, principal))
    with api.database.reading() as session:
        alive = [find_session(session, text) is not None for text in texts]
    assert sum(alive) == MOST_OF_A_KEY
    assert alive[-1]


def test_a_wrong_key_opens_nothing(api: Api) -> None:
    for key in ("", "bw_wrong", "bw_" + "0" * 38, "<script>"):
        answer = api.anonymous.post("/login", data={"key": key}, headers=BROWSER)
        assert answer.status_code == 401
        assert "set-cookie" not in answer.headers
        assert "API key" in Html(answer.text).text
        assert "<script>" not in answer.text


def test_attempts_that_fail_are_limited(api: Api) -> None:
    for _ in range(FAILURES):
        assert api.anonymous.post("/login", data={"key": "bw_wrong"}, headers=BROWSER).status_code == 401
    answer = api.anonymous.post("/login", data={"key": api.key}, headers=BROWSER, follow_redirects=False)
    assert answer.status_code == 429
    assert "wait" in Html(answer.text).text


def test_the_limit_is_of_an_address_and_of_a_while() -> None:
    clock = [1000.0]
    log_ins = LogIns(lambda: clock[0])
    for _ in range(FAILURES):
        log_ins.check("10.0.0.1")
        log_ins.failed("10.0.0.1")
    log_ins.check("10.0.0.2")
    with pytest.raises(TooManyRequests):
        log_ins.check("10.0.0.1")
    clock[0] += WINDOW_SECONDS
    log_ins.check("10.0.0.1")
    for number in range(MOST_ADDRESSES + 10):
        log_ins.failed(f"host-{number}")
    assert len(log_ins._failed) == MOST_ADDRESSES


def test_neighbours_in_one_network_share_a_limit() -> None:
    assert whose("2001:db8:1:2::1") == whose("2001:db8:1:2:ffff::9") != whose("2001:db8:1:3::1")
    assert whose("10.0.0.1") != whose("10.0.0.2")
    assert whose("testclient") == "testclient"


FOREIGN: dict[str, Callable[[dict[str, str]], dict[str, str]]] = {
    "another site": lambda headers: {**headers, "Origin": "http://elsewhere.example"},
    "another port": lambda headers: {**headers, "Origin": "http://testserver:81"},
    "no origin that is known": lambda headers: {**headers, "Origin": "null"},
    "neither origin nor token": lambda headers: {n: v for n, v in headers.items() if n != "Origin"},
}


def test_a_form_of_another_site_changes_nothing(api: Api) -> None:
    browser, job_id = api.visitor(), api.submit()
    browser.headers.clear()
    sent = {"model": "org/name", "method": "rtn", "key": api.key, "token": "0" * 64}
    changes = [f"/jobs/{job_id}/{verb}" for verb in ("cancel", "delete", "retry")]
    for kind, changed in FOREIGN.items():
        headers = changed(dict(BROWSER))
        for path in (*changes, "/submit", "/compare", "/logout", "/login"):
            answer = browser.post(path, data=sent, headers=headers, follow_redirects=False)
            assert answer.status_code == 403, (kind, path, answer.text)
            assert "foreign_page" in answer.text
    assert browser.get("/usage", headers=BROWSER, follow_redirects=False).status_code == 200
    assert api.reader.get(f"/v1/jobs/{job_id}").json()["status"] == "queued"
    assert len(api.reader.get("/v1/jobs").json()["items"]) == 1


def test_a_page_of_ours_may_send_its_token_in_place_of_an_origin(api: Api) -> None:
    browser, job_id = api.visitor(), api.submit()
    token = Html(browser.get(f"/jobs/{job_id}").text).field("token")
    del browser.headers["Origin"]
    assert browser.post(f"/jobs/{job_id}/cancel", data={"token": "x"}, follow_redirects=False).status_code == 403
    assert browser.post(f"/jobs/{job_id}/cancel", data={"token": token}, follow_redirects=False).status_code == 303
    assert api.reader.get(f"/v1/jobs/{job_id}").json()["status"] == "cancelled"
    assert token not in (browser.cookies[PLAIN_COOKIE], api.key)


def test_pages_are_shown_under_known_names_alone(api: Api) -> None:
    for host in ("testserver", "localhost:8080", "127.0.0.1", "[::1]:8080", "203.0.113.7"):
        assert api.anonymous.get("/login", headers={"Accept": "text/html", "Host": host}).status_code == 200, host
    for host in ("rebound.example", "localhost.rebound.example", ""):
        answer = api.anonymous.get("/login", headers={"Accept": "text/html", "Host": host})
        assert answer.status_code == 421, host
        assert "unknown_host" in answer.text
        assert api.anonymous.get("/", headers={"Accept": "text/html", "Host": host}).status_code == 421
        assert api.client.get("/v1/jobs", headers={"Host": host}).status_code == 200


def test_names_of_a_setting_are_known(settings: Settings) -> None:
    wanted = settings.model_copy(update={"page_hosts": ("quantize.example.org",)})
    assert is_known("quantize.example.org", wanted)
    assert not is_known("other.example.org", wanted)
    assert is_known("any.thing", settings.model_copy(update={"page_hosts": ("*",)}))
    assert host_of("Quantize.Example.org.:443") == "quantize.example.org"
    assert host_of("[bad") == ""


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ("/jobs/job_1?x=1", "/jobs/job_1?x=1"),
        ("//elsewhere.example", "/"),
        ("https://elsewhere.example", "/"),
        ("/\\elsewhere.example", "/"),
        ("/a\r\nSet-Cookie: x", "/"),
        ("", "/"),
        (None, "/"),
    ],
)
def test_the_log_in_leads_to_pages_of_ours_alone(wanted: str | None, path: str) -> None:
    assert local_path(wanted) == path


def test_after_the_log_in_comes_the_page_that_was_asked_for(api: Api) -> None:
    sent = {"key": api.key, "next": "/usage"}
    answer = api.anonymous.post("/login", data=sent, headers=BROWSER, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/usage")


def test_what_a_key_may_not_do_its_session_may_not(api: Api) -> None:
    with api.database.transaction() as session:
        _, text = issue_key(session, api.tenant_id, name="looks", scopes=frozenset({Scope.READ}))
    browser, job_id = api.visitor(text), api.submit()
    for path in ("/submit", f"/jobs/{job_id}/cancel", f"/jobs/{job_id}/delete"):
        assert browser.post(path, data={}, follow_redirects=False).status_code == 403, path
    assert browser.get("/submit").status_code == 403
    assert browser.get("/keys").status_code == 403
    assert "Cancel" not in browser.get(f"/jobs/{job_id}").text


def test_another_tenants_jobs_do_not_exist(api: Api) -> None:
    theirs = str(api.stranger.post("/v1/jobs", json={"model": "org/secret", "method": "rtn"}).json()["id"])
    browser = api.visitor()
    for path in (f"/jobs/{theirs}", f"/jobs/{theirs}/report", f"/jobs/{theirs}/archive", f"/compare?jobs={theirs}"):
        answer = browser.get(path)
        assert answer.status_code == 404, path
        assert "org/secret" not in answer.text
    assert browser.post(f"/jobs/{theirs}/cancel", data={}, follow_redirects=False).status_code == 404
    assert "org/secret" not in browser.get("/").text + browser.get("/models").text
