"""A real service with a worker, and a real Chromium that looks at it. `make test-browser` brings what they need."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.cli.embedded import EmbeddedService
from bitwright.endpoint import load_endpoint

CHROMIUM = os.environ.get("BITWRIGHT_TEST_CHROMIUM", "/usr/bin/chromium")
AXE = os.environ.get("BITWRIGHT_TEST_AXE", "")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


class Site:
    """The service, a page of the browser that has logged in, and what the browser complained of."""

    def __init__(self, service: EmbeddedService, key: str, page: Any) -> None:
        self.service, self.key, self.page, self.complaints = service, key, page, list[str]()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._note)
        page.on("request", lambda request: self._check(request.url))

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _check(self, url: str) -> None:
        if not url.startswith((self.service.url, "data:")):
            self.complaints.append(f"asks {url}")

    def open(self, path: str) -> Any:
        """Open a page; it must be there."""
        answer = self.page.goto(self.service.url + path)
        assert answer.status == 200, (path, answer.status)
        return answer


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def site(chromium: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A service that quantizes, and a browser on it, not logged in yet."""
    data = tmp_path_factory.mktemp("browser")
    with EmbeddedService(data, model_roots=[tiny_model.parent], device="cpu") as service:
        endpoint = load_endpoint(data)
        assert endpoint is not None
        assert endpoint.key is not None
        context = chromium.new_context(viewport=WIDE, accept_downloads=True)
        yield Site(service, endpoint.key, context.new_page())
        context.close()


def violations(page: Any) -> list[str]:
    """What axe finds wrong with a page as it is now."""
    page.evaluate(Path(AXE).read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {iframes: false})")
    assert found["passes"], "axe looked at nothing"
    return [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found["violations"]]
