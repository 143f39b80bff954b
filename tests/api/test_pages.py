"""Pages for a browser: every link and asset is there, and nothing comes from elsewhere."""

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from app.api.main import create_app
from app.settings import Settings
from tests.api.conftest import Api, make_settings, problem, run_api

LOADING = {"script": "src", "link": "href", "img": "src", "iframe": "src", "redoc": "spec-url", "a": "href"}
MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".png": "image/png", ".json": "application/json"}


class Page(HTMLParser):
    """URLs that a page loads or links to, and its inline scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs).get(LOADING.get(tag, ""))
        self.loads += [found] if found else []
        self._inside = tag == "script" and found is None

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = False


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_a_documentation_page_loads_from_this_service_alone(api: Api, path: str) -> None:
    answer = api.anonymous.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    page = Page(answer.text)
    loads = page.loads + re.findall(r"url: '([^']+)'", answer.text)
    assert {urlsplit(load)[:2] for load in loads} == {("", "")}
    assert any(load.endswith(".js") for load in loads)
    assert "/openapi.json" in loads
    for load in loads:
        asset = api.anonymous.get(load)
        assert asset.status_code == 200, load
        suffix = "." + load.rpartition(".")[2]
        assert asset.headers["content-type"].split(";")[0] == MEDIA_TYPES[suffix], load
        assert len(asset.content) > 1000, load
    policy = answer.headers["content-security-policy"]
    assert "http" not in policy
    for script in page.scripts:  # else a browser would not run them
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy


def test_behind_a_prefix_the_pages_load_under_it(settings: Settings) -> None:
    with TestClient(create_app(settings), root_path="/bitwright") as client:
        for path in ("/docs", "/redoc"):
            loads = Page(client.get("/bitwright" + path).text).loads
            assert loads
            assert all(load.startswith("/bitwright/") for load in loads), loads
            assert all(client.get(load).status_code == 200 for load in loads)


def test_an_unknown_asset_is_not_found(api: Api) -> None:
    for name in ("core.py", "..%2Fcore.py", "%2e%2e%2f__init__.py"):
        problem(api.anonymous.get(f"/docs/assets/{name}"), 404, "not_found")


@pytest.fixture
def api_alone(tmp_path: Path, sqlite_url: str) -> Iterator[Api]:
    """An API without the dashboard."""
    yield from run_api(make_settings(tmp_path, sqlite_url, dashboard=False))


def test_without_a_dashboard_there_are_no_pages_of_it(api_alone: Api) -> None:
    for path in ("/login", "/submit", "/jobs/job_x", "/workers", "/assets/0/pages.css"):
        problem(api_alone.anonymous.get(path, headers={"Accept": "text/html"}), 404, "not_found")
    assert api_alone.anonymous.post("/login", data={"key": api_alone.key}).status_code == 404


def test_the_root_says_where_to_begin(api_alone: Api) -> None:
    api = api_alone
    told = api.anonymous.get("/").json()
    assert told["name"] == "Bitwright"
    page = api.anonymous.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html")
    links = Page(page.text).loads
    assert sorted(links) == sorted(told["links"].values())
    for link in links:
        assert api.reader.get(link).status_code == 200, link


def test_what_is_chosen_by_accept_says_so_to_caches(api: Api) -> None:
    job_id = api.submit()
    for url in ("/", f"/v1/jobs/{job_id}/events"):
        for accept in ("text/html", "application/json"):
            answer = api.reader.get(url, headers={"Accept": accept})
            assert (answer.status_code, answer.headers["vary"].split(", ")[0]) == (200, "Accept")
    assert api.client.post(f"/v1/jobs/{job_id}/cancel").status_code == 202
    for after, status in (("0", 200), ("2", 204)):
        headers = {"Accept": "text/event-stream", "Last-Event-ID": after}
        answer = api.reader.get(f"/v1/jobs/{job_id}/events", headers=headers)
        assert (answer.status_code, answer.headers["vary"]) == (status, "Accept")
        assert answer.headers["cache-control"] == "no-store"


def test_assets_are_for_everybodys_cache_and_nothing_else_is(api: Api) -> None:
    asset = api.anonymous.get("/docs/assets/swagger-ui.css")
    assert asset.headers["cache-control"] == "public, max-age=3600"
    for url in ("/", "/docs", "/v1/jobs", "/v1/methods", "/openapi.json", "/v1/jobs/none"):
        assert api.client.get(url).headers["cache-control"] == "no-store", url
