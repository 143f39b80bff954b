"""The page of keys: made, rotated and revoked by admins alone, from our own page, with the text shown once."""

import re

import pytest
from starlette.testclient import TestClient

from tests.api.conftest import BROWSER, Api
from tests.api.pages.conftest import Html


def post(browser: TestClient, path: str, **fields: object) -> Html:
    """The page that answers a form that our own page sent."""
    token = Html(browser.get("/keys").text).field("token")
    answer = browser.post(path, data={"token": token, **fields}, headers=BROWSER, follow_redirects=False)
    assert answer.status_code in (201, 303, 422), answer.text
    return Html(answer.text)


def shown_key(page: Html) -> str:
    """The text of a key on a page."""
    return next(word for word in page.text.split() if word.startswith("bw_") and len(word) == 41)


def test_a_key_is_made_used_rotated_and_revoked(api: Api) -> None:
    browser = api.visitor(api.admin_key)
    made = shown_key(post(browser, "/keys", name="ci", scopes=["submit", "read"], expires_in_days="30"))
    whole = browser.get("/keys")
    assert made not in whole.text
    assert "no-store" in whole.headers["cache-control"]
    assert api.anonymous.get("/v1/jobs", headers={"Authorization": f"Bearer {made}"}).status_code == 200
    mine = re.findall(r"key_[0-9a-z]{26}", whole.text)[-1]
    successor = shown_key(post(browser, f"/keys/{mine}/rotate"))
    for key in (made, successor):
        assert api.anonymous.get("/v1/jobs", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    post(browser, f"/keys/{mine}/revoke")
    assert api.anonymous.get("/v1/jobs", headers={"Authorization": f"Bearer {made}"}).status_code == 401
    assert "revoked" in Html(browser.get("/keys").text).text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "", "scopes": "read"}, "name"),
        ({"name": "ci"}, "scopes"),
        ({"name": "ci", "scopes": "root"}, "scopes"),
        ({"name": "ci", "scopes": "read", "expires_in_days": "soon"}, "expires_in_days"),
    ],
)
def test_what_is_wrong_with_a_form_is_said_on_it(api: Api, fields: dict[str, object], words: str) -> None:
    browser = api.visitor(api.admin_key)
    page = post(browser, "/keys", **fields)
    assert words in page.text
    assert page.field("name") == fields["name"]
    assert "bw_" not in page.text.replace("bw_…", "") or "Copy it now" not in page.text


def test_only_our_own_page_and_admins_change_keys(api: Api) -> None:
    admin, other = api.visitor(api.admin_key), api.visitor()
    for path in ("/keys", "/keys/key_0123456789abcdefghjkmnpqrs/revoke", "/keys/key_0123456789abcdefghjkmnpqrs/rotate"):
        foreign = {**BROWSER, "Origin": "http://elsewhere.example"}
        assert admin.post(path, data={"name": "x", "scopes": "read"}, headers=foreign).status_code == 403
        assert other.post(path, data={"name": "x", "scopes": "read"}, headers=BROWSER).status_code == 403
    bare = TestClient(admin.app, headers={"Accept": "text/html"}, cookies=dict(admin.cookies))
    asked = {"name": "x", "scopes": "read"}
    assert bare.post("/keys", data=asked).status_code == 403  # neither an origin nor the session's token
    token = Html(admin.get("/keys").text).field("token")
    assert bare.post("/keys", data={**asked, "token": token}).status_code == 201
